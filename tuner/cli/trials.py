"""The command ``trials``: all of them, or one with its attempts and its epochs."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import app
from tuner.cli.options import Artifacts, Json, Storage, StudyName, joined
from tuner.cli.read import print_json
from tuner.errors import TunerError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tuner.session import Session

FACTS = (
    *("reason", "detail", "loss", "sampler", "kappa", "warning", "sampling", "metrics"),
    *("intervals", "recall_per_class", "tau", "extras", "duplicate_of", "baseline", "preset"),
    *("rung", "retry_of", "branched_from", "stage_one_seconds"),
)
ATTEMPT = (
    *("attempt", "claimed_at", "ended_at", "end", "reason", "detail", "note", "first_epoch"),
    *("epoch", "new_epochs", "seconds", "speed"),
)
SHARES = ("tail_accuracy", "head_accuracy", "accuracy")


@app.command()
def trials(
    study: StudyName,
    number: Annotated[
        int | None, typer.Option("--trial", help="One trial, with its attempts and epochs.")
    ] = None,
    storage: Storage = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Every trial: how it ended and why, its metrics and its parameters."""
    session = joined(study, storage, artifacts)
    if number is not None:
        _one(session, number, as_json)
        return
    tries = attempts_by_trial(session)
    rows = [trial_row(session, trial, tries[trial._trial_id]) for trial in session.trials()]
    if as_json:
        print_json(rows)
    else:
        _print_table(rows)


def attempts_by_trial(session: Session) -> dict[int, list[dict[str, Any]]]:
    """Attempts by Optuna's id of their trial, oldest first; none of a study made before them."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in session.ledger.attempts() if session.ledger.ready() else []:
        found[row["trial_id"]].append(_attempt_row(row))
    return found


def _attempt_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"worker": row["worker_id"], **{key: row[key] for key in ATTEMPT}}


def trial_row(session: Session, trial: FrozenTrial, tries: list[dict[str, Any]]) -> dict[str, Any]:
    """A trial as programs read it."""
    attrs = trial.user_attrs
    complete = trial.state.name == "COMPLETE"
    judged = complete and "metrics" in attrs
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value if complete else None,
        "keeps_floor": session.keeps_floor(trial) if judged else None,
        "end": tries[-1]["end"] if tries else None,
        **{key: attrs.get(key) for key in FACTS},
        "seconds": attrs.get("seconds"),
        "params": trial.params,
        "attempts": tries,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from tuner.cli.show import percent, wide_console

    table = Table()
    for column in ("trial", "state", "tries", "value", "loss", "sampler"):
        table.add_column(column, justify="left" if column in ("state", "loss") else "right")
    for column in ("tail", "head", "overall", "τ"):
        table.add_column(column)
    for row in rows:
        metrics = (row["metrics"] or {}).get("adjusted", {})
        shown = [percent(metrics.get(name)) for name in SHARES]
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        tau = "" if row["tau"] is None else f"{row['tau']:.2f}"
        names = [row["loss"] or "", row["sampler"] or ""]
        tries = str(len(row["attempts"]) or "")
        table.add_row(str(row["trial"]), _state(row), tries, value, *names, *shown, tau)
    wide_console().print(table)


def _state(row: dict[str, Any]) -> str:
    """How a trial stands, with what a reader has to know about it."""
    again = "" if row["retry_of"] is None else f", retry of {row['retry_of']}"
    if row["duplicate_of"] is not None:
        return f"duplicate of {row['duplicate_of']}"
    why = _why(row)
    return f"{row['state']}{f' ({why})' if why else ''}{again}"


def _why(row: dict[str, Any]) -> str:
    if row["state"] == "running":
        return ""
    if row["state"] == "waiting":
        last = row["attempts"][-1] if row["attempts"] else {"end": None, "reason": None}
        return ": ".join(filter(None, (last["end"], last["reason"])))
    if row["reason"]:
        return str(row["reason"]).replace("_", " ")
    return "breaks the floor" if row["keeps_floor"] is False else ""


def _one(session: Session, number: int, as_json: bool) -> None:
    trial = _find(session, number)
    tries = attempts_by_trial(session)[trial._trial_id]
    row = trial_row(session, trial, tries)
    epochs = session.ledger.epochs(trial._trial_id) if session.ledger.ready() else []
    if as_json:
        keys = ("epoch", "seconds", "samples", "recorded_at", "metrics")
        print_json({**row, "epochs": [{key: epoch[key] for key in keys} for epoch in epochs]})
        return
    value = "" if row["value"] is None else f" {row['value']:.4f}"
    print(f"trial {number} of {session.file.name}: {_state(row)}{value}")
    _print_attempts(tries)
    _print_epochs(epochs)
    if row["detail"]:
        print(f"\n{row['detail']}")


def _find(session: Session, number: int) -> FrozenTrial:
    trials = session.trials()
    if not 0 <= number < len(trials):
        raise TunerError(
            f"study {session.file.name} has no trial {number}; "
            + (f"it has 0 to {len(trials) - 1}" if trials else "it has none")
        )
    return trials[number]


def _print_attempts(tries: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from tuner.cli.show import wide_console

    table = Table(title="attempts", title_justify="left")
    for column in ("", "worker", "from epoch", "to epoch", "seconds", "end", "note"):
        table.add_column(column)
    for row in tries:
        end = ": ".join(filter(None, (row["end"] or "at work", row["reason"])))
        cells = [row["attempt"], row["worker"], row["first_epoch"], row["epoch"]]
        cells += [f"{row['seconds']:.1f}", end, row["note"]]
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    if tries:
        wide_console().print(table)


def _print_epochs(epochs: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from tuner.cli.show import percent, wide_console

    table = Table(title="epochs, % as the logits are / adjusted", title_justify="left")
    for column in ("epoch", "seconds", "tail", "head", "overall", "balanced"):
        table.add_column(column, justify="right")
    for row in epochs:
        kinds = [row["metrics"][kind] for kind in ("raw", "adjusted")]
        names = (*SHARES, "balanced_accuracy")
        shown = [" / ".join(percent(kind.get(name)) for kind in kinds) for name in names]
        table.add_row(str(row["epoch"]), f"{row['seconds']:.2f}", *shown)
    if epochs:
        wide_console().print(table)
