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
from optuna.trial import BaseTrial, Trial, TrialState
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


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 and FashionMNIST do: an array in memory, a PIL image each."""

    def __init__(self, part: Part, transform: Any) -> None:
        pixels = part.images.tensor.permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]
        self.pixels = np.ascontiguousarray(pixels.squeeze(3) if pixels.shape[3] == 1 else pixels)
        self.targets, self.transform = part.targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def optuna_study(name: str, url: str, tries: int = 5) -> optuna.Study:
    """The study of a side; Optuna's processes that make tables at the same time make them fail."""
    try:
        return optuna.create_study(
            study_name=name,
            storage=url,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )
    except SQLAlchemyError:
        if tries == 1:
            raise
        time.sleep(1.0)
        return optuna_study(name, url, tries - 1)


def _ordinary(task: Task, file: StudyFile, data: Data) -> Trials:
    """An Optuna objective over the usual training loop."""
    study = optuna_study(task.side, task.url)
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

    def __init__(
        self, file: StudyFile, data: Data, *, device: str = "cpu", workers: int = 0
    ) -> None:
        from torchvision import transforms as T

        plain = [T.ToTensor(), T.Normalize(data.mean, data.std)]
        changed = [T.RandomCrop(data.image_shape[1], padding=PADDING), T.RandomHorizontalFlip()]
        self.train = Pictures(data.train, T.Compose([*changed, *plain]))
        self.validation = Pictures(data.validation, T.Compose(plain))
        self.file, self.data, self.device = file, data, device
        self.loading: dict[str, Any] = {"num_workers": workers, "pin_memory": device != "cpu"}
        if workers:
            # As on Linux by default, but not in a process that was spawned itself.
            self.loading["multiprocessing_context"] = "fork"
        self.recipe = file.space.suggest(optuna.trial.FixedTrial(file.space.defaults()))

    def objective(self, trial: BaseTrial) -> float:
        """Train one model; its balanced accuracy after the last epoch."""
        lr = trial.suggest_float("lr", *LR, log=True)
        exponent = trial.suggest_float("exponent", *EXPONENT)
        torch.manual_seed(trial.number)
        model, optimizer = self.network(lr)
        train = self.batches(exponent)
        for epoch in range(self.file.budget.epochs):
            model.train()
            for pictures, targets in train:
                self.step(model, optimizer, pictures, targets)
            score = self._score(model)
            trial.report(score, epoch)
        return score

    def network(self, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model on the device, and what trains it."""
        model = self.recipe.model.build(self.data.num_classes, self.data.image_shape)
        model = model.to(self.device)
        return model, torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=DECAY)

    def batches(self, exponent: float) -> DataLoader[tuple[Tensor, int]]:
        """Training images, drawn by weights of their classes."""
        weights = (self.data.class_counts.double() ** -exponent)[self.data.train.targets]
        sampler = WeightedRandomSampler(weights.tolist(), len(self.train))
        return DataLoader(self.train, BATCH, sampler=sampler, **self.loading)

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, targets: Tensor
    ) -> float:
        """One training step; its loss."""
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pictures.to(self.device)), targets.to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    def unseen(self) -> DataLoader[tuple[Tensor, int]]:
        """Validation images."""
        return DataLoader(self.validation, 256, **self.loading)

    def hits(self, model: nn.Module, pictures: Tensor, targets: Tensor) -> Tensor:
        """How many images of each class are right."""
        right = model(pictures.to(self.device)).argmax(1).cpu() == targets
        return torch.bincount(targets[right], minlength=self.data.num_classes)

    @torch.no_grad()
    def _score(self, model: nn.Module) -> float:
        model.eval()
        hits = torch.zeros(self.data.num_classes)
        for pictures, targets in self.unseen():
            hits += self.hits(model, pictures, targets)
        images = torch.bincount(self.data.validation.targets, minlength=len(hits))
        return float((hits / images)[images > 0].mean())
