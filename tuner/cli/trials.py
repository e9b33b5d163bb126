"""The command ``trials``: all of them, or one with its attempts and its epochs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from enum import StrEnum
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
    *("rung", "retry_of", "promoted_from", "unseen", "compares"),
    *("confirms", "fold"),
    *("branched_from", "stage_one_seconds"),
)
ATTEMPT = (
    *("attempt", "claimed_at", "ended_at", "end", "reason", "detail", "note", "first_epoch"),
    *("epoch", "new_epochs", "seconds", "speed"),
)
MOST_HEADS = 50
"""As many trials of the head rung are listed without being asked for."""

NOTES = {
    "duplicate of ": "duplicate of N: the recipe of trial N again; it was not trained but has "
    "that result",
    "(chance)": "chance: with 30 % of its training or more behind it, it still guessed",
    "(behind)": "behind: its upper 95 % bound was below its peers at the same share of training",
    "breaks the floor": "the floor: {floor}",
    " +": "+ in from: everything is open in it that the rung below held fixed",
}
"""What is said below a table with such a cell."""

SHARES = ("tail_accuracy", "head_accuracy", "accuracy")
COLUMNS = ("state", "tries", "value", "loss", "sampler")


class RungName(StrEnum):
    """A rung of the ladder, as an option takes it."""

    head = "head"
    deferred = "deferred"
    full = "full"
    confirm = "confirm"


@app.command()
def trials(
    study: StudyName,
    number: Annotated[
        int | None, typer.Option("--trial", help="One trial, with its attempts and epochs.")
    ] = None,
    rung: Annotated[
        RungName | None, typer.Option("--rung", help="Only the trials of one rung.")
    ] = None,
    storage: Storage = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Every trial: how it ended and why, its metrics and its parameters.

    The table leaves out trials of the head rung when there are many, and says so.
    """
    from tuner.cli.finish import command

    session = joined(study, storage, artifacts)
    if number is not None:
        _one(session, number, as_json)
        return
    tries = attempts_by_trial(session)
    rows = [trial_row(session, trial, tries[trial._trial_id]) for trial in session.trials()]
    wanted = [row for row in rows if rung is None or row["fidelity"] == rung.value]
    if as_json:
        print_json(wanted)
        return
    heads = sum(row["fidelity"] == "head" for row in wanted)
    hidden = heads if rung is None and heads > MOST_HEADS else 0
    if hidden:
        wanted = [row for row in wanted if row["fidelity"] != "head"]
    several = len({row["fidelity"] for row in rows}) > 1
    _print_table(wanted, str(session.file.objective.floor), several=several)
    if hidden:
        options = {"rung": "head", "storage": storage, "artifacts": artifacts}
        print(
            f"{hidden} trials of the head rung are not listed; to see them: "
            f"{command('trials', study, options)}"
        )


def attempts_by_trial(session: Session) -> dict[int, list[dict[str, Any]]]:
    """Attempts by Optuna's id of their trial, oldest first; none of a study made before them."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in session.ledger.attempts() if session.ledger.ready() else []:
        found[row["trial_id"]].append(_attempt_row(row))
    return found


def _attempt_row(row: dict[str, Any]) -> dict[str, Any]:
    return {"worker": row["worker_id"], **{key: row[key] for key in ATTEMPT}}


def trial_row(session: Session, trial: FrozenTrial, tries: list[dict[str, Any]]) -> dict[str, Any]:
    """A trial as programs read it.

    ``fidelity`` is its rung of the ladder, ``rung`` that of the progressive strategy.
    """
    from tuner.ladder import is_judged, rung_of

    attrs = trial.user_attrs
    judged, again = is_judged(trial), "confirms" in attrs
    complete = trial.state.name == "COMPLETE"
    return {
        "trial": trial.number,
        "fidelity": rung_of(trial),
        "state": trial.state.name.lower(),
        "value": trial.values[0] if judged or complete else None,
        "keeps_floor": session.keeps_floor(trial) if judged and not again else None,
        "end": tries[-1]["end"] if tries else None,
        **{key: attrs.get(key) for key in FACTS},
        "seconds": attrs.get("seconds"),
        "params": trial.params,
        "attempts": tries,
    }


def _print_table(rows: list[dict[str, Any]], floor: str, *, several: bool) -> None:
    """The trials as a table; with ``several`` rungs, that of each and whence it was promoted."""
    from rich.markup import escape
    from rich.table import Table

    from tuner.cli.show import percent, wide_console

    said = [*map(_state, rows), *(map(_origin, rows) if several else ())]
    notes = escape("\n".join(_notes(said, floor)))
    table = Table(caption=notes or None, caption_justify="left")
    for column in ("trial", *(("rung", "from") if several else ()), *COLUMNS):
        table.add_column(column, justify="left" if column in ("rung", "state", "loss") else "right")
    for column in ("tail", "head", "overall", "τ"):
        table.add_column(column)
    for row in rows:
        metrics = (row["metrics"] or {}).get("adjusted", {})
        shown = [percent(metrics.get(name)) for name in SHARES]
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        tau = "" if row["tau"] is None else f"{row['tau']:.2f}"
        names = [row["loss"] or "", row["sampler"] or ""]
        tries = str(len(row["attempts"]) or "")
        place = [row["fidelity"], _origin(row)] if several else []
        cells = [str(row["trial"]), *place, _state(row), tries, value]
        table.add_row(*cells, *names, *shown, tau)
    wide_console().print(table)


def _notes(said: Sequence[str], floor: str) -> Iterator[str]:
    """What the cells of a table mean that do not say it themselves: only those that are there."""
    for mark, note in NOTES.items():
        if any(mark in cell for cell in said):
            yield note.format(floor=floor)


def _origin(row: dict[str, Any]) -> str:
    """Which trial of the rung below a trial is from, and whether more is open in it."""
    if row["confirms"] is not None:
        return str(row["confirms"])
    if row["promoted_from"] is None:
        return ""
    return f"{row['promoted_from']}{' +' if row['unseen'] else ''}"


def _state(row: dict[str, Any]) -> str:
    """How a trial stands, with what a reader has to know about it."""
    again = "" if row["retry_of"] is None else f", retry of {row['retry_of']}"
    if row["duplicate_of"] is not None:
        return f"duplicate of {row['duplicate_of']}"
    if row["state"] == "pruned" and row["reason"] == row["fidelity"]:
        # For Optuna it is pruned, so that its best trial is one of the last rung.
        return f"done{' (breaks the floor)' if row['keeps_floor'] is False else ''}{again}"
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
    at = f" ({row['fidelity']} rung)" if session.file.ladder.rungs != ("full",) else ""
    print(f"trial {number} of {session.file.name}{at}: {_state(row)}{value}")
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
