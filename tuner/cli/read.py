"""Commands that read: check, status, trials, best, list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import app
from tuner.cli.options import Artifacts, DataFolder, Json, Storage, StudyName, StudyPath, joined

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tuner.session import Session

LISTED = {
    "losses": "loss",
    "samplers": "sampler",
    "models": "model",
    "datasets": "data",
    "optimizers": "optimizer",
    "schedules": "schedule",
    "augmentations": "augment",
    "trainings": "training",
}


@app.command()
def check(
    study: StudyPath,
    load: Annotated[bool, typer.Option("--load", help="Load the data too.")] = False,
    data: DataFolder = None,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a study file and where; print its space when nothing is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tuner import study as files
    from tuner.cli.show import describe_data
    from tuner.session import check_fit

    file = files.load(study)
    rows = file.space.rows()
    lines = []
    if load:
        loaded = file.data.build(data)
        lines = describe_data(loaded)
        check_fit(file, loaded)
    if as_json:
        space = dict(rows)
        _print_json({"name": file.name, "trials": file.trials(), "space": space, "data": lines})
        return
    title = f"{file.name}: {file.trials()} trials of {file.budget.epochs} epochs"
    table = Table(title=escape(title))
    table.add_column("hyperparameter")
    table.add_column("searched over", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
    for line in lines:
        print(line)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]")] = None,
    storage: Storage = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Trials by state and the best so far, of one study or of all in the storage."""
    import optuna

    from tuner.storage import open_storage, storage_url

    if study is None:
        names = optuna.get_all_study_names(
            open_storage(storage_url(storage), create=False, writes=False)
        )
    else:
        names = [study]
    rows = [_status(joined(name, storage, artifacts)) for name in names]
    if as_json:
        _print_json(rows if study is None else rows[0])
        return
    for row in rows:
        counts = ", ".join(f"{row[s]} {s}" for s in _STATES if row[s])
        best = "none yet" if row["best"] is None else f"trial {row['best']} {row['value']:.4f}"
        ladder = "" if row["ladder"] is None else f"; {row['ladder']}"
        print(f"{row['study']}: {counts or 'no trials'} of {row['budget']}; best {best}{ladder}")


_STATES = ("complete", "pruned", "fail", "running", "waiting")


def _status(session: Session) -> dict[str, Any]:
    from tuner.tickets import ladder_state
    from tuner.worker import progress

    best = session.best()
    return {
        "study": session.file.name,
        **progress(session),
        "metric": session.file.objective.metric,
        "ladder": ladder_state(session),
        "best": None if best is None else best.number,
        "value": None if best is None else best.value,
    }


@app.command()
def trials(
    study: StudyName,
    storage: Storage = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """Every trial: how it ended and why, its metrics and its parameters."""
    from rich.table import Table

    from tuner.cli.show import percent, wide_console

    session = joined(study, storage, artifacts)
    rows = [_trial_row(session, trial) for trial in session.trials()]
    if as_json:
        _print_json(rows)
        return
    table = Table()
    for column in ("trial", "state", "value", "loss", "sampler", "tail", "head", "overall", "τ"):
        table.add_column(column, justify="right" if column in ("trial", "value") else "left")
    for row in rows:
        metrics = (row["metrics"] or {}).get("adjusted", {})
        shown = [percent(metrics.get(f"{m}accuracy")) for m in ("tail_", "head_", "")]
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        tau = "" if row["tau"] is None else f"{row['tau']:.2f}"
        loss, sampler = row["loss"] or "", row["sampler"] or ""
        table.add_row(str(row["trial"]), _state(row), value, loss, sampler, *shown, tau)
    wide_console().print(table)


def _state(row: dict[str, Any]) -> str:
    """How a trial stands, with what a reader has to know about it."""
    if row["duplicate_of"] is not None:
        return f"duplicate of {row['duplicate_of']}"
    if row["reason"]:
        return f"{row['state']} ({row['reason'].replace('_', ' ')})"
    return f"{row['state']} (breaks the floor)" if row["keeps_floor"] is False else row["state"]


def _trial_row(session: Session, trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    keys = (
        *(
            "reason",
            "detail",
            "loss",
            "sampler",
            "kappa",
            "warning",
            "sampling",
            "metrics",
            "intervals",
        ),
        *("recall_per_class", "tau", "extras", "duplicate_of", "baseline", "preset", "rung"),
    )
    return {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "keeps_floor": session.keeps_floor(trial) if trial.state.name == "COMPLETE" else None,
        **{key: attrs.get(key) for key in keys},
        "seconds": attrs.get("seconds"),
        "params": trial.params,
    }


@app.command()
def best(
    study: StudyName,
    storage: Storage = None,
    artifacts: Artifacts = None,
    as_json: Json = False,
) -> None:
    """The best trial's recipe, as TOML."""
    import tomli_w

    from tuner.export import find_trial

    session = joined(study, storage, artifacts)
    trial = find_trial(session, None)
    if as_json:
        _print_json({**_trial_row(session, trial), "recipe": trial.user_attrs["recipe"]})
        return
    metric = session.file.objective.metric
    print(f"# study {session.file.name}, trial {trial.number}: {metric} {trial.value:.4f}")
    print(tomli_w.dumps(trial.user_attrs["recipe"]), end="")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(LISTED))] = "",
    as_json: Json = False,
) -> None:
    """What can be named in a study file, with parameters and defaults."""
    from tuner.describe import components
    from tuner.errors import UnknownNameError, unknown_name

    if what and what not in LISTED:
        raise UnknownNameError(unknown_name("list", what, LISTED))
    found = {name: components(LISTED[name]) for name in ([what] if what else LISTED)}
    if as_json:
        _print_json(found)
        return
    for name, entries in found.items():
        print(f"{name}:")
        for entry in entries:
            print(f"  {entry['name']}  {entry['summary']}")
            for key, meaning in entry["parameters"].items():
                print(f"    {key} {meaning}")


def _print_json(document: Any) -> None:
    print(json.dumps(_finite(document), indent=2, default=str, ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Strict JSON knows no NaN: it becomes null."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
