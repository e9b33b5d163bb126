"""The training loop: recipe and data in, one result per epoch out; no Optuna, no database."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.checkpoint import Snapshot, prefixed, without_prefix
from tuner.datasets import Data
from tuner.errors import NonFiniteError
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.seeding import repeatable
from tuner.steps import Execution, Stacks, Steps, steps_of

Stop = Callable[[], bool]
NAP_SECONDS = 2e-4
SHORT_SECONDS = 2.0
"""Of a validation no more than this is finished after a request to stop."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave.

    ``logits`` are those of the validation part, (V, C) float32 on the CPU; ``train_loss`` is
    the mean over the epoch's samples. ``seconds`` cover training and validation, and
    ``samples`` were trained on in them; of an epoch that was stopped and resumed, both count
    from the resumption only (see ``Interrupted.seconds`` for the part before).
    """

    epoch: int
    progress: float
    train_loss: float
    logits: Tensor
    samples: int
    seconds: float
    lane: Lane

    def snapshot(self) -> Snapshot:
        """Everything needed to go on after this epoch; take it before the next one starts."""
        return self.lane.snapshot()


class Interrupted(Exception):
    """Training stopped within an epoch because it was asked to; nothing is wrong.

    ``snapshot`` holds everything to go on with the next step. ``step`` steps of ``epoch`` are
    done, and ``seconds`` went into the epoch since it began or was last resumed.
    """

    def __init__(self, snapshot: Snapshot, *, epoch: int, step: int, seconds: float) -> None:
        super().__init__(f"stopped after step {step} of epoch {epoch}")
        self.snapshot = snapshot
        self.epoch, self.step, self.seconds = epoch, step, seconds


def epochs(
    recipe: Recipe,
    data: Data,
    *,
    device: str = "cpu",
    resume: Snapshot | None = None,
    stop: Stop = lambda: False,
    micro_batch: int | None = None,
    execution: Execution = "auto",
    stacks: Stacks | None = None,
    seats: int = 1,
) -> Iterator[EpochResult]:
    """Train ``recipe`` on ``data``, epoch after epoch, from the start or from a snapshot.

    The same recipe, data and number of threads give the same numbers, bit for bit on the CPU,
    also when training was interrupted and resumed, between epochs or within one.

    Args:
        recipe: What to train.
        data: Training and validation part.
        device: A torch device.
        resume: Snapshot of the same recipe, of ``EpochResult`` or of ``Interrupted``; or of
            another recipe with the same ``stage_one_key``, taken before the switch. It goes on
            as if it had trained that stage itself.
        stop: Asked after every step, or chunk of steps on a GPU, and between batches of
            validation. When it says so within an epoch, ``Interrupted`` is raised; after an
            epoch's last step the epoch is finished and yielded if that does not take long.
        micro_batch: The model sees at most so many images at a time, for a device that runs
            out of memory with whole batches; at least 2. Loss, augmentation and learning rate
            remain those of the whole batch, and so does the gradient up to rounding. But
            batch norm sees chunks and dropout draws per chunk, and every step makes a second
            forward pass. Snapshots taken with and without it are interchangeable.
        execution: How steps are executed; see ``steps_of``.
        stacks: Where this training may find a seat; see ``steps_of``.
        seats: Of the stack, if ``execution`` is "grouped".

    Raises:
        Interrupted: ``stop`` said so within an epoch.
        NonFiniteError: The training loss became NaN or infinite.
        ValueError: ``resume`` belongs to another recipe (see ``Recipe.refusal``), or
            ``micro_batch`` is below 2.
    """
    for result in epochs_in_turns(
        recipe,
        data,
        device=device,
        resume=resume,
        stop=stop,
        micro_batch=micro_batch,
        execution=execution,
        stacks=stacks,
        seats=seats,
    ):
        if result is None:
            time.sleep(NAP_SECONDS)
        else:
            yield result


def epochs_in_turns(
    recipe: Recipe,
    data: Data,
    *,
    device: str = "cpu",
    resume: Snapshot | None = None,
    stop: Stop = lambda: False,
    micro_batch: int | None = None,
    execution: Execution = "auto",
    stacks: Stacks | None = None,
    seats: int = 1,
) -> Generator[EpochResult | None, None, None]:
    """``epochs`` for one of several trainings on a device: None where it would wait.

    Whoever gets None lets others go on, and comes back a little later.
    """
    lane = Lane(recipe, data, device, micro_batch=micro_batch)
    if resume is not None:
        lane.restore(resume)
    with closing(steps_of(lane, execution, stacks, seats)) as steps:
        while lane.epoch < recipe.epochs:
            epoch = _Epoch(lane, steps, resume)
            resume = None
            yield (yield from epoch.run(stop))


class _LeftOutError(Exception):
    """An epoch's validation was not finished."""


class _Epoch:
    """The epoch at hand: its batches, and how far it has come."""

    def __init__(self, lane: Lane, steps: Steps, resume: Snapshot | None) -> None:
        self.started = time.perf_counter()
        self.lane, self.steps = lane, steps
        lane.begin_epoch()
        steps.total.zero_()
        if resume is not None and "step" in resume.meta:
            self._go_on(without_prefix("epoch", resume.tensors), resume.meta["step"])
        else:
            self.batches = lane.plan()
            self.step = 0
            self.random: Mapping[str, Tensor] | None = None
        self.sizes = [batch.numel() for batch in self.batches]
        self.samples = sum(self.sizes[self.step :])

    def _go_on(self, tensors: Mapping[str, Tensor], step: int) -> None:
        self.batches = list(torch.split(tensors["indices"], tensors["sizes"].tolist()))
        self.step = step
        self.steps.total.copy_(tensors["total"])
        self.random = without_prefix("random", tensors)

    @property
    def seconds(self) -> float:
        """Time since this epoch began here."""
        return time.perf_counter() - self.started

    def run(self, stop: Stop) -> Generator[None, None, EpochResult]:
        """What is left of the epoch, training and validation, and what it gave.

        Raises:
            Interrupted: ``stop`` said so before it was over.
            NonFiniteError: The mean training loss, or a logit, is not finite.
        """
        train_loss = yield from self.train(stop)
        logits = self.logits(stop)
        self.lane.end_epoch()
        return EpochResult(
            epoch=self.lane.epoch - 1,
            progress=self.lane.epoch / self.lane.recipe.epochs,
            train_loss=train_loss,
            logits=logits,
            samples=self.samples,
            seconds=self.seconds,
            lane=self.lane,
        )

    def train(self, stop: Stop) -> Generator[None, None, float]:
        """The steps that are left; the mean training loss of all steps.

        Raises:
            Interrupted: ``stop`` said so before the last step.
            NonFiniteError: The mean training loss is not finite.
        """
        with closing(self.steps.run(self.batches, self.step, self.random)) as running:
            for done in running:
                if done is None:
                    yield
                    continue
                self.step = done
                if stop() and self.step < len(self.batches):
                    self.step = self.steps.settle(done)
                    if self.step < len(self.batches):
                        raise self._interrupted()
        mean = float(self.steps.total) / sum(self.sizes)
        if not math.isfinite(mean):
            raise NonFiniteError(f"training loss is {mean} in epoch {self.lane.epoch}")
        return mean

    def logits(self, stop: Stop) -> Tensor:
        """Logits of the validation part, (V, C).

        Raises:
            Interrupted: ``stop`` said so, and it would have taken long to finish.
            NonFiniteError: One of them is not finite.
        """
        lane, began = self.lane, time.perf_counter()

        def between(done: float) -> None:
            left = (time.perf_counter() - began) * (1 - done) / done
            if stop() and left > SHORT_SECONDS:
                raise _LeftOutError

        try:
            with repeatable(lane.device):
                logits = lane.logits(lane.data.validation.images, between)
        except _LeftOutError:
            raise self._interrupted() from None
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"validation logits are not finite in epoch {lane.epoch}")
        return logits

    def _interrupted(self) -> Interrupted:
        snapshot = self._snapshot()
        return Interrupted(snapshot, epoch=self.lane.epoch, step=self.step, seconds=self.seconds)

    def _snapshot(self) -> Snapshot:
        """The lane's state, and that of the epoch: plan, loss so far, random numbers."""
        own = {
            "indices": torch.cat(self.batches),
            "sizes": torch.tensor(self.sizes),
            "total": self.steps.total.cpu().clone(),
            **prefixed("random", self.steps.random_state()),
        }
        lane = self.lane.snapshot()
        return Snapshot(
            {**lane.tensors, **prefixed("epoch", own)}, {**lane.meta, "step": self.step}
        )
