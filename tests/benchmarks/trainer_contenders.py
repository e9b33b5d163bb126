"""Processes of the trainer's benchmark: the ordinary loop as tutorials write it, and Tuner.

Each loads the data once and then trains trials whenever it is told to, so that all contenders can
take turns within one run. The same model, epochs, batches, search space and storage (SQLite).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from optuna.trial import Trial, TrialState
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from tuner.datasets import Data, Part
from tuner.session import Session, join
from tuner.stores import FolderStore
from tuner.study import StudyFile
from tuner.study import load as load_study
from tuner.worker import work

BATCH, MOMENTUM, DECAY = 128, 0.9, 5e-4
LR, EXPONENT = (0.03, 0.06), (0.4, 0.6)
PADDING = 4

Trials = Callable[[int, str], list[float]]
"""Trains so many trials of the study of this name; their validation scores."""


@dataclass(frozen=True)
class Task:
    """What one process does: which contender it is, on which study, where."""

    side: str
    study: Path
    url: str
    folder: Path
    threads: int | None


def serve(task: Task, pipe: Connection) -> None:
    """Load everything, say so, then train as many trials as each message asks for."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = load_study(task.study)
    data = file.data.build()
    trials = _tuner(task, file, data) if task.side == "tuner" else _ordinary(task, file, data)
    pipe.send({"train": len(data.train), "validation": len(data.validation)})
    while (message := pipe.recv()) is not None:
        began, before = time.perf_counter(), _processor_seconds()
        scores = trials(*message)
        spent = {"wall": time.perf_counter() - began, "cpu": _processor_seconds() - before}
        pipe.send({**spent, "scores": scores})


def _processor_seconds() -> float:
    """Processor time of this process and of those it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _tuner(task: Task, file: StudyFile, data: Data) -> Trials:
    """A worker of Tuner; every round has a study with a seed of its own."""

    def trials(count: int, name: str) -> list[float]:
        session: Session = join(name, task.url, FolderStore(task.folder), writes=True)
        numbers: list[int] = []
        work(
            session,
            data,
            wait=False,
            stop=lambda: len(numbers) == count,
            on_trial=lambda outcome: numbers.append(outcome.number),
        )
        done = (t for t in session.trials(TrialState.COMPLETE) if t.number in numbers)
        facts = [trial.user_attrs for trial in done if not trial.user_attrs.get("baseline")]
        return [each["metrics"]["raw"]["balanced_accuracy"] for each in facts]

    return trials


class _Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 and FashionMNIST do: an array in memory, a PIL image each."""

    def __init__(self, part: Part, transform: Any) -> None:
        pixels = part.images.tensor.permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]
        self.pixels = np.ascontiguousarray(pixels.squeeze(3) if pixels.shape[3] == 1 else pixels)
        self.targets, self.transform = part.targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def _study(task: Task, tries: int = 5) -> optuna.Study:
    """The study of a side; Optuna's processes that make tables at the same time make them fail."""
    try:
        return optuna.create_study(
            study_name=task.side,
            storage=task.url,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )
    except SQLAlchemyError:
        if tries == 1:
            raise
        time.sleep(1.0)
        return _study(task, tries - 1)


def _ordinary(task: Task, file: StudyFile, data: Data) -> Trials:
    """An Optuna objective over the usual training loop."""
    study = _study(task)
    loop = OrdinaryLoop(file, data)

    def trials(count: int, _name: str) -> list[float]:
        scores: list[float] = []

        def objective(trial: Trial) -> float:
            scores.append(loop.objective(trial))
            return scores[-1]

        study.optimize(objective, n_trials=count)
        return scores

    return trials


class OrdinaryLoop:
    """DataLoader with torchvision transforms, WeightedRandomSampler, SGD in float32."""

    def __init__(self, file: StudyFile, data: Data) -> None:
        from torchvision import transforms as T

        plain = [T.ToTensor(), T.Normalize(data.mean, data.std)]
        changed = [T.RandomCrop(data.image_shape[1], padding=PADDING), T.RandomHorizontalFlip()]
        self.train = _Pictures(data.train, T.Compose([*changed, *plain]))
        self.validation = _Pictures(data.validation, T.Compose(plain))
        self.file, self.data = file, data
        self.recipe = file.space.suggest(optuna.trial.FixedTrial(file.space.defaults()))

    def objective(self, trial: Trial) -> float:
        """Train one model; its balanced accuracy after the last epoch."""
        lr = trial.suggest_float("lr", *LR, log=True)
        exponent = trial.suggest_float("exponent", *EXPONENT)
        torch.manual_seed(trial.number)
        model = self.recipe.model.build(self.data.num_classes, self.data.image_shape)
        optimizer = torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=DECAY)
        weights = (self.data.class_counts.double() ** -exponent)[self.data.train.targets]
        sampler = WeightedRandomSampler(weights.tolist(), len(self.train))
        train = DataLoader(self.train, BATCH, sampler=sampler)
        for epoch in range(self.file.budget.epochs):
            _train(model, train, optimizer)
            score = self._score(model)
            trial.report(score, epoch)
        return score

    @torch.no_grad()
    def _score(self, model: nn.Module) -> float:
        model.eval()
        hits, images = (torch.zeros(self.data.num_classes) for _ in range(2))
        for pictures, targets in DataLoader(self.validation, 256):
            right = model(pictures).argmax(1) == targets
            hits += torch.bincount(targets[right], minlength=len(hits))
            images += torch.bincount(targets, minlength=len(hits))
        return float((hits / images)[images > 0].mean())


def _train(model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for pictures, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(pictures), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
