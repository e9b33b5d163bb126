"""Commands that read: check, status, best, list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import app
from tuner.cli.options import Artifacts, DataFolder, Json, Storage, StudyName, StudyPath, joined

if TYPE_CHECKING:
    from tuner.session import Session
    from tuner.study import StudyFile

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
    from tuner.held import remarks

    file = files.load(study)
    rows = file.space.rows()
    lines = _looked_at(file, study, data) if load else []
    rungs, doubts = _rungs(file), list(remarks(file))
    if as_json:
        known = {"name": file.name, "trials": file.trials(), "space": dict(rows)}
        known |= {"objective": _objective(file), "rungs": rungs, "remarks": doubts, "data": lines}
        print_json(known)
        return
    title = f"{file.name}: {file.trials()} trials of {file.budget.epochs} epochs"
    table = Table(title=escape(title))
    table.add_column("hyperparameter")
    table.add_column("searched over", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
    print(f"objective: {_objective(file)}")
    if file.ladder.rungs != ("full",):
        _print_rungs(rungs, len(rows))
    for line in [*doubts, *lines]:
        print(line)


def _looked_at(file: StudyFile, path: Path, folder: Path | None) -> list[str]:
    """What the data are like, once they are found to fit the study."""
    from tuner.cli.failures import naming
    from tuner.cli.show import describe_data, describe_steps
    from tuner.fit import check_fit

    with naming(path):
        loaded = file.data.build(folder)
        lines = [*describe_data(loaded), describe_steps(file.space, len(loaded.train))]
        check_fit(file, loaded)
    return lines


def _objective(file: StudyFile) -> str:
    """What trials are judged by, in words."""
    objective = file.objective
    kind = "adjusted" if objective.adjusted else "raw"
    floor = "no floor" if objective.floor is None else str(objective.floor)
    return f"{kind} {objective.metric}; {floor}"


def _rungs(file: StudyFile) -> list[dict[str, Any]]:
    """The rungs of a study: how many trials each has, what it searches and what it holds fixed."""
    from tuner.held import held_rows, how_held, searched_rows

    return [
        {
            "rung": rung,
            "trials": file.ladder.trials(rung, file.trials()),
            "may_end_before": file.ladder.may_end_before(rung),
            "searches": dict(searched_rows(file, rung)),
            "why_held": how_held(file, rung),
            "holds": dict(held_rows(file, rung)),
        }
        for rung in file.ladder.rungs
    ]


def _print_rungs(rungs: list[dict[str, Any]], count: int) -> None:
    has_full = any(row["rung"] == "full" for row in rungs)
    apart = "" if has_full else "; before them, plain cross-entropy in full"
    print(f"the ladder, from the cheapest rung up{apart}:")
    for row in rungs:
        most = "at most " if row["may_end_before"] else ""
        print(f"  {row['rung']}: {most}{row['trials']} trials")
        if row["rung"] != "confirm":
            print(f"    searches {len(row['searches'])} of {count} hyperparameters")
        print(f"    holds fixed {row['why_held']}")
        for name, value in row["holds"].items():
            print(f"      {name} = {value}")


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
    rows = [
        _status(joined(name, storage, artifacts, quiet=number > 0))
        for number, name in enumerate(names)
    ]
    if as_json:
        print_json(rows if study is None else rows[0])
        return
    for row in rows:
        counts = ", ".join(_counted(row))
        best = "none yet" if row["best"] is None else f"trial {row['best']} {row['value_said']}"
        there = row["workers"]
        fleet = "" if not there else f"; {there} worker{'' if there == 1 else 's'}"
        told = "" if row["order"] == "run" else f"; {row['order_said']}"
        print(
            f"{row['study']}: {counts or 'no trials'} of {row['budget']}; best {best}{fleet}{told}"
        )
        for line in row["ladder"]:
            print(f"  {line}")


_STATES = ("complete", "pruned", "fail", "running", "waiting")


def _counted(row: dict[str, Any]) -> Iterator[str]:
    """Trials by state; those of other rungs, which end as pruned for Optuna, apart."""
    for state in _STATES:
        number = row[state] - (row["below"] + row["confirmed"] if state == "pruned" else 0)
        if number:
            yield f"{number} {state}"
    if row["below"]:
        yield f"{row['below']} trained at lower rungs"
    if row["confirmed"]:
        yield f"{row['confirmed']} trained to confirm"


def _status(session: Session) -> dict[str, Any]:
    """A study as programs read it; ``pruned`` has those of other rungs in it."""
    from tuner.cli.fleet import described, present
    from tuner.ladder import is_judged
    from tuner.ledger import Order
    from tuner.rounds import best_value
    from tuner.tickets import ladder_state
    from tuner.worker import progress

    best = session.best()
    done = [t for t in session.trials() if t.state.name == "PRUNED" and is_judged(t)]
    confirmed = sum("confirms" in t.user_attrs for t in done)
    order = session.ledger.standing() if session.ledger.ready() else Order("run")
    return {
        "study": session.file.name,
        **progress(session),
        "below": len(done) - confirmed,
        "confirmed": confirmed,
        "metric": session.file.objective.metric,
        "ladder": ladder_state(session),
        "best": None if best is None else best.number,
        "value": None if best is None else best.value,
        "value_said": best_value(session),
        "workers": len(present(session)),
        "order": order.state,
        "order_reason": order.reason,
        "order_said": described(order),
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

    from tuner.card import HEAD_ONLY
    from tuner.cli.trials import attempts_by_trial, trial_row
    from tuner.export import find_trial
    from tuner.ladder import rung_of
    from tuner.rounds import best_value

    session = joined(study, storage, artifacts)
    trial = find_trial(session, None)
    if as_json:
        row = trial_row(session, trial, attempts_by_trial(session)[trial._trial_id])
        print_json({**row, "recipe": trial.user_attrs["recipe"]})
        return
    metric = session.file.objective.metric
    print(f"# study {session.file.name}, trial {trial.number}: {metric} {best_value(session)}")
    if rung_of(trial) == "head":
        print(f"# {HEAD_ONLY}")
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
        print_json(found)
        return
    for name, entries in found.items():
        print(f"{name}:")
        for entry in entries:
            print(f"  {entry['name']}  {entry['summary']}")
            for key, meaning in entry["parameters"].items():
                print(f"    {key} {meaning}")


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
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
