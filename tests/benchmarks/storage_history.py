"""Databases with finished trials for the storage benchmark: seeded once, then cloned."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from optuna.trial import TrialState

from tuner.engines import make_engine, make_single_engine
from tuner.ledger import Ledger, prepare
from tuner.ledger._optuna import PARAMS, STEPS, SYSTEM, TRIALS, USER, VALUES
from tuner.ledger._tables import attempts, epochs
from tuner.storage import open_storage
from tuner.urls import parse_url

NAME = "benchmark"
STEPS_PER_TRIAL = 10
ATTRIBUTES = 20
RECIPE_LENGTH = 1500
TICKETS = 256
CHUNK = 500

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-4, 1.0, log=True),
    "share": FloatDistribution(0.0, 1.0),
    "loss": CategoricalDistribution(("cross_entropy", "ldam", "vector_scaling")),
}


class Databases:
    """Makes databases on one kind of storage, and drops them all in the end."""

    def __init__(self, kind: str, folder: Path, postgres: str) -> None:
        self.kind, self.folder, self.server = kind, folder, parse_url(postgres)
        self.made: list[str] = []
        self.templates: dict[int, str] = {}
        self.names = (f"tuner_benchmark_{number}" for number in itertools.count())

    def clone(self, finished: int) -> str:
        """URL of a new database whose study has so many finished trials."""
        if finished not in self.templates:
            self.templates[finished] = self._template(finished)
        return self._make(self.templates[finished])

    def _template(self, finished: int) -> str:
        name = next(self.names)
        url = self._create(name, None)
        seed(url, finished)
        return name

    def _make(self, template: str) -> str:
        return self._create(next(self.names), template)

    def _create(self, name: str, template: str | None) -> str:
        self.made.append(name)
        if self.kind == "sqlite":
            path = self.folder / f"{name}.db"
            if template is not None:
                shutil.copy(self.folder / f"{template}.db", path)
            return f"sqlite:///{path}"
        like = "" if template is None else f" TEMPLATE {template}"
        self._command(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self._command(f"CREATE DATABASE {name}{like}")
        return self.server.set(database=name).render_as_string(hide_password=False)

    def _command(self, command: str) -> None:
        with make_single_engine(self.server).connect() as connection:
            connection.exec_driver_sql(command)

    def drop(self, url: str) -> None:
        """Remove a database."""
        name = Path(str(parse_url(url).database)).stem
        self.made.remove(name)
        if self.kind == "sqlite":
            for path in self.folder.glob(f"{name}.db*"):
                path.unlink()
        else:
            self._command(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def drop_all(self) -> None:
        """Remove what this made."""
        for name in list(self.made):
            self.drop(f"sqlite:///{name}.db" if self.kind == "sqlite" else self._url(name))

    def _url(self, name: str) -> str:
        return self.server.set(database=name).render_as_string(hide_password=False)


def seed(url: str, finished: int) -> None:
    """Make a study with so many finished trials, each with steps, attributes and an attempt."""
    storage, engine = open_storage(url), make_engine(url)
    prepare(engine)
    study = optuna.create_study(study_name=NAME, storage=storage, direction="maximize")
    Ledger(engine, study._study_id).prepare()
    for start in range(0, finished, CHUNK):
        numbers = range(start, min(start + CHUNK, finished))
        states = [TrialState.PRUNED if n % 4 == 3 else TrialState.COMPLETE for n in numbers]
        add(engine, study._study_id, dict(zip(numbers, states, strict=True)))
    storage._backend.remove_session()  # type: ignore[attr-defined]
    storage._backend.engine.dispose()  # type: ignore[attr-defined]
    engine.dispose()
    settle(url)


def settle(url: str) -> None:
    """Leave a database as it would be when it grew slowly, by plain Optuna's hand."""
    engine = make_single_engine(parse_url(url))
    command = {"sqlite": "PRAGMA journal_mode=DELETE", "postgresql": "VACUUM ANALYZE"}
    with engine.connect() as connection:
        connection.exec_driver_sql(command[engine.dialect.name])


def add(engine: sa.Engine, study_id: int, trials: dict[int, TrialState]) -> None:
    """Insert trials of these numbers and states, in bulk."""
    if not trials:
        return
    now = datetime.now(UTC).replace(tzinfo=None)
    rows = [
        {"number": number, "study_id": study_id, "state": state, "datetime_start": now}
        | {"datetime_complete": now if state.is_finished() else None}
        for number, state in trials.items()
    ]
    with engine.begin() as connection:
        connection.execute(sa.insert(TRIALS), rows)
        found = sa.select(TRIALS.c.trial_id, TRIALS.c.number, TRIALS.c.state).where(
            TRIALS.c.study_id == study_id, TRIALS.c.number.in_(list(trials))
        )
        made: dict[sa.Table, list[dict[str, Any]]] = {}
        for trial_id, number, state in connection.execute(found):
            for table, row in _rows(study_id, trial_id, number, state):
                made.setdefault(table, []).append(row)
        for table, inserted in made.items():
            connection.execute(sa.insert(table), inserted)


def _rows(
    study_id: int, trial_id: int, number: int, state: TrialState
) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    if state == TrialState.WAITING:
        yield SYSTEM, {"trial_id": trial_id, "key": "fixed_params", "value_json": "{}"}
        return
    chance = random.Random(number)
    for name, kind in SPACE.items():
        value = kind.to_internal_repr(_draw(chance, kind))
        text = distribution_to_json(kind)
        row = {"param_name": name, "param_value": value, "distribution_json": text}
        yield PARAMS, {"trial_id": trial_id, **row}
    curve = [chance.random() for _ in range(STEPS_PER_TRIAL)]
    for step, value in enumerate(curve):
        kept = {"intermediate_value": value, "intermediate_value_type": "FINITE"}
        yield STEPS, {"trial_id": trial_id, "step": step, **kept}
        epoch = {"seconds": 1.0, "samples": 100, "metrics": '{"m": 0.5}', "recorded_at": 0.0}
        yield epochs, {"trial_id": trial_id, "epoch": step, "token": number + 1, **epoch}
    yield attempts, _attempt(study_id, trial_id, number, state)
    if state.is_finished():
        row = {"objective": 0, "value": curve[-1], "value_type": "FINITE"}
        yield VALUES, {"trial_id": trial_id, **row}
        for key, attribute in attributes(chance):
            yield USER, {"trial_id": trial_id, "key": key, "value_json": json.dumps(attribute)}


def _attempt(study_id: int, trial_id: int, number: int, state: TrialState) -> dict[str, Any]:
    ended = state.is_finished()
    moments = dict.fromkeys(("claimed_at", "heartbeat_at"), 1.7e9)
    return {
        "study_id": study_id,
        "trial_id": trial_id,
        "attempt": 1,
        "holds": None if ended else trial_id,
        "worker_id": f"earlier-{number % 16}",
        "generation": 1,
        "lease_until": 1e10,
        "ended_at": 1.7e9 if ended else None,
        "end": "complete" if ended else None,
        **moments,
    }


def _draw(chance: random.Random, kind: BaseDistribution) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return chance.choice(kind.choices)
    assert isinstance(kind, FloatDistribution)
    return 10 ** chance.uniform(-4, 0) if kind.log else chance.random()


def attributes(chance: random.Random) -> Iterable[tuple[str, Any]]:
    """What Tuner notes about a trial: its recipe, nested metrics, and many small facts."""
    text = "".join(chance.choices("abcdefghij", k=RECIPE_LENGTH - 100))
    yield "recipe", {"loss": {"name": "ldam", "scale": 30.0}, "rest": text}
    metrics = {f"metric_{i}": chance.random() for i in range(12)}
    yield "metrics", {"raw": metrics, "adjusted": metrics}
    yield from ((f"fact_{i}", chance.random()) for i in range(ATTRIBUTES - 2))
