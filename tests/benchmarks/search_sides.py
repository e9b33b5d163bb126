"""Processes of the search benchmark: the ordinary search, Tuner's workers, and confirmation.

Every process loads the data once, says so by a barrier, and begins when all may begin. Both sides
ask the same study file for their recipes, train the same model for as many epochs with the same
schedule, and judge by the same metric of the same validation images, as the logits are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import optuna
import torch
from optuna.trial import BaseTrial, FrozenTrial
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from trainer_contenders import BATCH, OrdinaryLoop, optuna_study

from tuner.datasets import Data
from tuner.metrics import balanced_accuracy, confusion_matrix, evaluate, group_accuracy
from tuner.recipe import Recipe
from tuner.session import join
from tuner.stores import FolderStore
from tuner.study import StudyFile
from tuner.study import load as load_study
from tuner.trainer import epochs
from tuner.worker import work

CONFIRMED = ("tail_accuracy", "balanced_accuracy", "accuracy")
Moments = dict[int, float]
"""When trials ended, by their numbers."""


@dataclass(frozen=True)
class Setting:
    """One search: which side's, where, and in how many processes of how many threads."""

    side: str
    study: Path
    folder: Path
    seed: int
    trials: int
    processes: int
    threads: int | None

    @property
    def url(self) -> str:
        """The storage, of this search alone."""
        return f"sqlite:///{self.folder}/{self.side}.db"


@dataclass
class _Here:
    """What a process has loaded."""

    setting: Setting
    barrier: Any
    file: StudyFile
    data: Data


_here: list[_Here] = []


def first_imports() -> None:
    """Load what the first storage and the first optimizer of a process load."""
    optuna.storages.RDBStorage("sqlite://")
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], fused=True)


def enter(setting: Setting, barrier: Any) -> None:
    """Load everything; the first thing a process does."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first_imports()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    file = load_study(setting.study)
    _here[:] = [_Here(setting, barrier, file, file.data.build())]


def search(index: int) -> Moments:
    """Be one of a search's processes, once all are there and the study is."""
    here = _here[0]
    run = _tuner if here.setting.side == "tuner" else _ordinary
    here.barrier.wait()
    try:
        here.barrier.wait()
    except BrokenBarrierError:
        return {}
    return run(here, index)


def _tuner(here: _Here, _index: int) -> Moments:
    """A worker, as ``tuner worker`` starts one for each core."""
    session = join(here.file.name, here.setting.url, FolderStore(here.setting.folder), writes=True)
    ended: Moments = {}
    work(session, here.data, on_trial=lambda o: ended.update({o.number: time.time()}))
    return ended


def _ordinary(here: _Here, index: int) -> Moments:
    """An Optuna study as its tutorials write it: TPE, median pruner, an objective."""
    setting = here.setting
    study = optuna_study(setting.side, setting.url)
    study.sampler = optuna.samplers.TPESampler(seed=setting.seed * setting.processes + index)
    study.pruner = optuna.pruners.MedianPruner()
    ended: Moments = {}

    def note(_study: optuna.Study, trial: FrozenTrial) -> None:
        ended[trial.number] = time.time()

    share = setting.trials // setting.processes + (index < setting.trials % setting.processes)
    study.optimize(SearchLoop(here.file, here.data).objective, n_trials=share, callbacks=[note])
    return ended


class SearchLoop(OrdinaryLoop):
    """The ordinary loop with the recipes of a study file: losses, samplers, schedule."""

    def objective(self, trial: BaseTrial) -> float:
        """Train one recipe unless it is pruned; its metric on validation."""
        recipe = self.file.space.suggest(trial)
        torch.manual_seed(trial.number)
        data = self.data
        model = recipe.model.build(data.num_classes, data.image_shape, head=recipe.loss.head)
        optimizer = recipe.optimizer.build(model)
        loss, loader = recipe.loss.build(data.class_counts), self._drawn(recipe)
        rate = optimizer.param_groups[0]["lr"]
        for epoch in range(recipe.epochs):
            model.train()
            for step, (pictures, targets) in enumerate(loader):
                factor = recipe.schedule.factor(epoch + step / len(loader), recipe.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                optimizer.zero_grad()
                loss(model(pictures), targets).backward()
                optimizer.step()
            score = self._value(model)
            trial.report(score, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return score

    def _drawn(self, recipe: Recipe) -> DataLoader[tuple[Tensor, int]]:
        exponent = getattr(recipe.sampler, "exponent", 0.0)
        if exponent == 0:
            return DataLoader(self.train, BATCH, shuffle=True)
        weights = (self.data.class_counts.double() ** -exponent)[self.data.train.targets]
        return DataLoader(
            self.train, BATCH, sampler=WeightedRandomSampler(weights.tolist(), len(self.train))
        )

    @torch.no_grad()
    def _value(self, model: nn.Module) -> float:
        model.eval()
        guesses = torch.cat([model(pictures).argmax(1) for pictures, _ in self.unseen()])
        targets = self.data.validation.targets
        confusion = confusion_matrix(guesses, targets, self.data.num_classes)
        if self.file.objective.metric == "tail_accuracy":
            return group_accuracy(confusion, self.data.groups.tail) or 0.0
        return balanced_accuracy(confusion)


def confirm(task: tuple[dict[str, Any], int]) -> dict[str, float]:
    """Train a recipe with a fresh seed, in float32; its metrics on the test part."""
    values, seed = task
    here = _here[0]
    recipe = Recipe.from_dict({**values, "seed": seed})
    training = replace(recipe.training, precision="float32", layout="auto")
    lane = None
    for result in epochs(replace(recipe, data=here.file.data, training=training), here.data):
        lane = result.lane
    assert lane is not None
    assert here.data.test is not None
    metrics = evaluate(lane.logits(here.data.test.images), here.data.test.targets, here.data.groups)
    return {name: metrics[name] or 0.0 for name in CONFIRMED}
