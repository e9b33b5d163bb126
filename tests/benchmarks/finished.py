"""What a trial costs its worker, by how many trials have ended before it; SQLite, one process.

Small trials are trained as in any study, so that everything a worker does at the end of an epoch
and of a trial is in the figure. What training itself takes is the same whatever ended before.
``python tests/benchmarks/finished.py`` prints the table of ``RESULTS.md``; ``--profile`` shows
where the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
import tomli_w
import torch
from optuna.trial import FrozenTrial, TrialState

from tuner import session as sessions
from tuner.datasets import Data
from tuner.ledger._optuna import PARAMS, STEPS, SYSTEM, TRIALS, USER, VALUES
from tuner.session import Session
from tuner.stores import FolderStore
from tuner.study import parse
from tuner.worker import work

TEMPLATES = 12
LARGEST_BUDGET = 20_000
CHUNK = 500
VALUES_OF: dict[str, Any] = {
    "name": "finished",
    "data": {"name": "digits", "profile": {"name": "exponential", "ratio": 10}},
    "model": {"name": "linear"},
    "training": {"batch_size": 128, "precision": "float32", "layout": "contiguous"},
    "space": {
        "optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}},
        "loss": {
            "cross_entropy": {},
            "focal": {"gamma": {"low": 0.0, "high": 2.0}},
            "balanced_softmax": {},
        },
    },
}
LADDERS: dict[str, list[str]] = {"full": ["full"]}


def make(folder: Path, algorithm: str, ladder: str, trials: int) -> tuple[Session, Data]:
    """A study of so many trials, or the same one with a larger budget."""
    values = VALUES_OF | {
        "budget": {"trials": trials, "epochs": 6},
        "search": {"algorithm": algorithm},
        "ladder": {"rungs": LADDERS[ladder]},
    }
    file = parse(values, tomli_w.dumps(values), where="finished.toml")
    data: Data = file.data.build()
    store = FolderStore(folder / "artifacts")
    return sessions.create(file, f"sqlite:///{folder}/finished.db", store, data), data


def run(session: Session, data: Data, count: int) -> list[float]:
    """Work until so many more trials ended; the seconds from each end to the next."""
    ends: list[float] = []
    work(
        session,
        data,
        stop=lambda: len(ends) > count,
        on_trial=lambda _: ends.append(time.perf_counter()),
    )
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def pretend(session: Session, count: int) -> None:
    """Add so many ended trials: like those that were trained, but for their values."""
    models = [t for t in session.trials(TrialState.COMPLETE) if "baseline" not in t.user_attrs]
    first, engine = len(session.trials()), session.ledger.engine
    for begin in range(first, first + count, CHUNK):
        numbers = list(range(begin, min(begin + CHUNK, first + count)))
        with engine.begin() as connection:
            _insert(connection, models, numbers)


def _insert(connection: sa.Connection, models: list[FrozenTrial], numbers: list[int]) -> None:
    chosen = {n: models[n % len(models)] for n in numbers}
    study = connection.execute(sa.select(TRIALS.c.study_id).limit(1)).scalar_one()
    rows = [
        {
            "number": n,
            "study_id": study,
            "state": TrialState.COMPLETE,
            "datetime_start": t.datetime_start,
            "datetime_complete": t.datetime_complete,
        }
        for n, t in chosen.items()
    ]
    connection.execute(sa.insert(TRIALS), rows)
    new = sa.select(TRIALS.c.number, TRIALS.c.trial_id).where(TRIALS.c.number >= numbers[0])
    made: dict[sa.Table, list[dict[str, Any]]] = {}
    for number, trial_id in connection.execute(new):
        for table, row in _rows(chosen[number], number):
            made.setdefault(table, []).append({"trial_id": trial_id, **row})
    for table, inserted in made.items():
        connection.execute(sa.insert(table), inserted)


def _rows(model: FrozenTrial, number: int) -> Any:
    from optuna.distributions import distribution_to_json

    chance = random.Random(number)
    for name, kind in model.distributions.items():
        value = kind.to_internal_repr(model.params[name])
        if name.count("."):
            value *= chance.uniform(0.9, 1.0)
            value = min(max(value, getattr(kind, "low", value)), getattr(kind, "high", value))
        text = distribution_to_json(kind)
        yield PARAMS, {"param_name": name, "param_value": value, "distribution_json": text}
    noise = chance.uniform(-0.1, -0.01)
    for step, value in model.intermediate_values.items():
        kept = {"intermediate_value": value + noise, "intermediate_value_type": "FINITE"}
        yield STEPS, {"step": step, **kept}
    yield VALUES, {"objective": 0, "value": model.values[0] + noise, "value_type": "FINITE"}
    yield SYSTEM, {"key": "fixed_params", "value_json": "{}"}
    for key, fact in (model.user_attrs | {"digest": f"{number:016x}"}).items():
        if key not in ("preset", "duplicate_of"):
            yield USER, {"key": key, "value_json": json.dumps(fact)}


def measure(options: argparse.Namespace, finished: int, ladder: str) -> dict[str, float]:
    """Median milliseconds of a trial with so many ended before, and of the first one."""
    with tempfile.TemporaryDirectory() as folder:
        kind = (Path(folder), options.algorithm, ladder)
        session, data = make(*kind, TEMPLATES)
        run(session, data, TEMPLATES)
        pretend(session, finished)
        session, data = make(*kind, LARGEST_BUDGET)
        run(session, data, 2)
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        began = time.process_time()
        seconds = run(session, data, options.trials)
        processor = (time.process_time() - began) / (options.trials + 1)
        if options.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
        return {"wall": 1000 * median(seconds), "processor": 1000 * processor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, nargs="+", default=[0, 1_000, 10_000])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--ladders", nargs="+", default=["full"])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| ladder | algorithm | finished | ms per trial | processor ms | load |\n|---|---|---|---|---|---|")
    for ladder in options.ladders:
        for finished in options.finished:
            found = measure(options, finished, ladder)
            figures = f"{found['wall']:.0f} | {found['processor']:.0f}"
            load = f"{os.getloadavg()[0]:.1f}"
            print(f"| {ladder} | {options.algorithm} | {finished} | {figures} | {load} |", flush=True)


if __name__ == "__main__":
    main()
