"""Processes of the benchmark on a GPU: the ordinary loop, and Tuner's workers.

Each loads a model's data when it is first told to train it, and answers every order with what it
measured. Starting Python and the GPU's context come before, and count for neither side.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainer_contenders import EXPONENT, LR, OrdinaryLoop, optuna_study

from tuner.datasets import Data
from tuner.rungs.outcome import Outcome
from tuner.session import join
from tuner.stores import FolderStore
from tuner.study import StudyFile
from tuner.study import load as load_study
from tuner.worker import work

THREADS = torch.get_num_threads()
"""What torch takes unless it is told."""


@dataclass(frozen=True)
class Place:
    """Where a process finds its files, and on which device it trains."""

    folder: Path
    device: str

    @property
    def url(self) -> str:
        """The storage of Tuner's studies."""
        return f"sqlite:///{self.folder}/tuner.db"


@dataclass(frozen=True)
class Probe:
    """Estimate how long an ordinary trial takes, by so many steps after as many to warm up."""

    model: str
    workers: int
    threads: int | None
    steps: int


@dataclass(frozen=True)
class Train:
    """Train so many ordinary trials."""

    model: str
    workers: int
    trials: int
    study: str


@dataclass(frozen=True)
class Work:
    """Be a worker of Tuner until time is up and enough trials ended here, or time is long up."""

    model: str
    study: str
    seconds: float
    trials: int
    lanes: int | None

    @property
    def options(self) -> dict[str, Any]:
        """What the worker is told of lanes."""
        return {} if self.lanes is None else {"lanes": self.lanes}


@lru_cache
def load(folder: Path, model: str) -> tuple[StudyFile, Data]:
    """A model's study file and its data, which the first process decoded for all."""
    file = load_study(folder / f"{model}.toml")
    size = f"{file.data.image_size}-{file.data.channels}"
    data: Data = pickle.loads((folder / f"{size}.pickle").read_bytes())
    return file, data


def serve(place: Place, pipe: Connection) -> None:
    """Say that everything is imported, then follow orders."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.zeros(1, device=place.device)
    pipe.send(None)
    follow: dict[type, Callable[[Place, Any], Any]] = {Probe: _probe, Train: _train, Work: _work}
    while (order := pipe.recv()) is not None:
        pipe.send(follow[type(order)](place, order))


def _loop(place: Place, order: Probe | Train) -> OrdinaryLoop:
    file, data = load(place.folder, order.model)
    return OrdinaryLoop(file, data, device=place.device, workers=order.workers)


def _probe(place: Place, order: Probe) -> float:
    """Seconds that a trial will take."""
    torch.set_num_threads(order.threads or THREADS)
    loop = _loop(place, order)
    model, optimizer = loop.network(LR[0])
    model.train()
    train = pace(
        loop.batches(EXPONENT[0]), lambda *batch: loop.step(model, optimizer, *batch), order.steps
    )
    return loop.file.budget.epochs * (train + _validation(loop, model, order.steps))


@torch.no_grad()
def _validation(loop: OrdinaryLoop, model: nn.Module, steps: int) -> float:
    model.eval()
    return pace(loop.unseen(), lambda *batch: loop.hits(model, *batch), steps)


def pace(loader: DataLoader[Any], step: Callable[..., Any], steps: int) -> float:
    """Seconds of a pass over the loader: its first batch, and the mean of ``steps`` for others."""
    began = time.perf_counter()
    batches = iter(loader)
    first = next(batches)
    start = time.perf_counter() - began
    step(*first)
    for batch in islice(batches, min(steps, (len(loader) - 1) // 2)):
        step(*batch)
    began, done = time.perf_counter(), 0
    for done, batch in enumerate(islice(batches, steps), 1):  # noqa: B007
        step(*batch)
    each = (time.perf_counter() - began) / max(1, done)
    return start + each * len(loader)


def _train(place: Place, order: Train) -> tuple[float, list[float]]:
    """Seconds of all trials, and their scores."""
    loop, scores = _loop(place, order), []
    study = optuna_study(order.study, f"sqlite:///{place.folder}/ordinary.db")

    def objective(trial: optuna.Trial) -> float:
        scores.append(loop.objective(trial))
        return scores[-1]

    began = time.perf_counter()
    study.optimize(objective, n_trials=order.trials)
    return time.perf_counter() - began, scores


def _work(place: Place, order: Work) -> tuple[float, list[float]]:
    """When the worker began, and when its complete trials ended."""
    _, data = load(place.folder, order.model)
    session = join(order.study, place.url, FolderStore(place.folder), writes=True)
    on_device = data.to(place.device) if place.device != "cpu" else data
    ended: list[float] = []
    began = time.monotonic()

    def over() -> bool:
        spent = time.monotonic() - began
        enough = spent > order.seconds and len(ended) >= order.trials
        return enough or spent > 3 * order.seconds

    def note(outcome: Outcome) -> None:
        if outcome.state == "complete":
            ended.append(time.monotonic())

    options: dict[str, Any] = {"wait": False, "stop": over, "on_trial": note, **order.options}
    work(session, on_device, device=place.device, **options)
    return began, ended
