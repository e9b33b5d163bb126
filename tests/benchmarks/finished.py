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
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
import tomli_w
import torch
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import FrozenTrial

from tuner import session as sessions
from tuner import tickets
from tuner.datasets import Data
from tuner.ladder import Rung
from tuner.ledger._optuna import PARAMS, STEPS, SYSTEM, TRIALS, USER, VALUES
from tuner.session import Session
from tuner.stores import FolderStore
from tuner.study import parse
from tuner.worker import work

TEMPLATES = 12
BUDGETS: dict[Rung, int] = {"full": 20_000, "head": 80}
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
            "vector_scaling": {"gamma": {"low": 0.0, "high": 1.0}},
        },
    },
}
Made = tuple[Session, Data]
RUNGS: dict[str, list[Rung]] = {"full": ["full"], "head": ["head", "full"]}


def make(folder: Path, algorithm: str, below: Rung, trials: int, heads: int) -> Made:
    """A study with so many trials, or the same one with a larger budget."""
    values = VALUES_OF | {
        "budget": {"trials": trials, "epochs": 6},
        "search": {"algorithm": algorithm},
        "ladder": {"rungs": RUNGS[below], "head": {"trials": heads, "epochs": 2}},
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


def pretend(session: Session, below: Rung, count: int) -> None:
    """Add so many ended trials of a rung: like those that were trained, but for their values."""
    # Equal recipes would be answered from the record.
    models = [t for t in session.ended().of_rung[below].trials if "cross" not in t.params["loss"]]
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
            "state": t.state,
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


def _rows(model: FrozenTrial, number: int) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    chance = random.Random(number)
    for name, kind in model.distributions.items():
        value = kind.to_internal_repr(model.params[name])
        if isinstance(kind, FloatDistribution):
            value = chance.uniform(kind.low, kind.high)
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


def measure(options: argparse.Namespace, finished: int) -> tuple[float, float]:
    """Milliseconds of a trial of ``full`` with so many ended before: median, and of processor."""
    with tempfile.TemporaryDirectory() as folder:
        kind = (Path(folder), options.algorithm, options.of)
        heads = TEMPLATES + finished
        # A queue that is filled ahead would have its trials begin before those that ended.
        tickets.AHEAD = TEMPLATES
        session, data = make(*kind, TEMPLATES, heads)
        run(session, data, TEMPLATES)
        pretend(session, options.of, finished)
        session, data = make(*kind, BUDGETS[options.of], heads)
        run(session, data, 2)
        profile = cProfile.Profile(builtins=False)
        if options.profile:
            profile.enable()
        began = time.process_time()
        seconds = run(session, data, options.trials)
        processor = (time.process_time() - began) / (options.trials + 1)
        if options.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
        return 1000 * median(seconds), 1000 * processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finished", type=int, nargs="+", default=[0, 1_000, 10_000])
    parser.add_argument("--of", choices=list(RUNGS), default="full", help="rung of these")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| algorithm | finished | of rung | ms per trial | processor ms | load |")
    print("|---|---|---|---|---|---|")
    for finished in options.finished:
        load = os.getloadavg()[0]
        wall, processor = measure(options, finished)
        figures = f"{wall:.0f} | {processor:.0f} | {load:.1f}"
        print(f"| {options.algorithm} | {finished} | {options.of} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
