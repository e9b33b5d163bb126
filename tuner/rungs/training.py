"""A trial while it trains: epochs are reported, judged and kept until something ends them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from tuner import artifacts
from tuner.backends import Speed
from tuner.checkpoint import Snapshot
from tuner.datasets import Data
from tuner.evaluation import Assessment, assess_validation
from tuner.ladder import rung_of
from tuner.losses import LOSSES
from tuner.pruning import MARGIN, Curve, effective_images, is_at_chance, is_behind
from tuner.recipe import Recipe
from tuner.rungs import shared
from tuner.rungs.attempt import Attempt
from tuner.rungs.outcome import OnEpoch, Slot
from tuner.seeding import derive_seed
from tuner.stores import StoreError
from tuner.trainer import EpochResult, Interrupted, epochs_in_turns

CHECKPOINT_SECONDS = 10.0
WRITE_SECONDS = 0.25
"""Epochs that are shorter than this are written several at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Complete:
    """The last epoch was trained."""

    result: EpochResult
    assessment: Assessment
    value: float


@dataclass(frozen=True)
class Pruned:
    """The trial was given up."""

    reason: str
    assessment: Assessment


@dataclass(frozen=True)
class Stopped:
    """Somebody asked to stop; the state is kept."""


class Training:
    """One attempt at training a recipe, from its checkpoint or from epoch 0.

    Trainings that share a device are each counted their share of the time.
    """

    def __init__(
        self, attempt: Attempt, recipe: Recipe, data: Data, slot: Slot, way: Speed
    ) -> None:
        self.attempt, self.recipe, self.data = attempt, recipe, data
        self.slot, self.device = slot, slot.device
        self.peers, self.beside = slot.peers, slot.beside
        self.micro_batch, self.way = slot.pieces.get(repr(recipe.model)), way
        self.session = attempt.session
        self.store = self.session.trial_store(attempt.number)
        self.identity = self.session.identity()
        trial = self.session.fenced.get_trial(attempt.lease.trial_id)
        self.values = dict(trial.intermediate_values)
        self.seconds = float(trial.user_attrs.get("seconds", 0.0))
        self.spared = self._is_spared()
        self.written = time.monotonic()

    def _is_spared(self) -> bool:
        search = self.session.file.search
        draw = derive_seed(search.seed, "control", self.attempt.number) % 10_000
        needed = {"baseline", "compares", "confirms"} & self.attempt.user_attrs.keys()
        return bool(needed) or search.pruner == "none" or draw < search.control * 10_000

    def run(
        self, stop: Callable[[], bool], on_epoch: OnEpoch
    ) -> Generator[None, None, Complete | Pruned | Stopped]:
        """Train until the end, a verdict, or a request to stop.

        It yields where it would wait for the device.

        Raises:
            LeaseLostError: The trial is another worker's by now.
            NonFiniteError: The training diverged.
        """

        def over() -> bool:
            return stop() or self.attempt.pulse.interrupts(self.attempt.lease)

        key, stages = self.recipe.stage_one_key(), self.slot.stages
        # Another trial of this slot may be training the stage that this one could begin at.
        while key in stages and not over():
            yield
        resume = self._checkpoint()
        own = set() if key is None or self._is_past_the_switch(resume) else {key}
        stages |= own
        try:
            return (yield from self._train(resume, over, on_epoch))
        finally:
            stages -= own

    def _is_past_the_switch(self, state: Snapshot | None) -> bool:
        return state is not None and int(state.meta["epoch"]) >= self.recipe.switch_epoch()

    def _train(
        self, resume: Snapshot | None, over: Callable[[], bool], on_epoch: OnEpoch
    ) -> Generator[None, None, Complete | Pruned | Stopped]:
        saved = time.monotonic()
        training = self._epochs(resume, over)
        try:
            for result in training:
                if result is None:
                    yield
                    continue
                done = self._judge(result, on_epoch)
                if done is not None:
                    return done
                stopping = over()
                if stopping or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._keep(result.snapshot())
                    saved = time.monotonic()
                if stopping:
                    return Stopped()
                if self.beside() > 1:
                    # Steps that are taken one by one never wait within an epoch.
                    yield
        except Interrupted as interruption:
            self._spend(interruption.seconds)
            self._keep(interruption.snapshot)
            return Stopped()
        raise RuntimeError(f"trial {self.attempt.number} was at its last epoch already")

    def _epochs(
        self, resume: Snapshot | None, over: Callable[[], bool]
    ) -> Iterator[EpochResult | None]:
        return epochs_in_turns(
            self.recipe,
            self.data,
            device=self.device,
            resume=resume,
            stop=over,
            micro_batch=self.micro_batch,
            execution=self.way.execution,
            stacks=self.slot.stacks,
            seats=self.way.lanes,
        )

    def _judge(self, result: EpochResult, on_epoch: OnEpoch) -> Complete | Pruned | None:
        """Report an epoch; how the training ended with it, None to go on."""
        assessment = assess_validation(result.logits, self.data, self.recipe)
        value = self._report(result, assessment)
        on_epoch(self.attempt.trial, result, value)
        if result.epoch + 1 == self.recipe.epochs:
            return Complete(result, assessment, value)
        self._share(result)
        reason = self._verdict(result, assessment)
        return Pruned(reason, assessment) if reason else None

    def _checkpoint(self) -> Snapshot | None:
        """The checkpoint to go on from; what came of an earlier attempt's is noted."""
        expected = {**self.identity, "recipe": self.recipe.digest()}
        own, trouble = artifacts.load_checkpoint(self.store, expected)
        resume = own or self._branch()
        epoch = 0 if resume is None else int(resume.meta["epoch"])
        if own is None and self.attempt.lease.attempt > 1:
            self.attempt.remark(f"from epoch {epoch}: {trouble or 'there was no checkpoint'}")
        facts: dict[str, Any] = {"device": self.device}
        if self.way.execution != "plain":
            facts["execution"] = f"{self.way.execution}, {self.way.seats} seats"
        if self.micro_batch is not None:
            facts["micro_batch"] = self.micro_batch
        self.attempt.note(facts)
        self.attempt.write(first_epoch=epoch)
        return resume

    def _branch(self) -> Snapshot | None:
        """The shared state to begin at; what it cost is counted where it was trained."""
        resume, trouble = shared.branch(self.session, self.recipe)
        if trouble:
            self.attempt.remark(f"trains stage one itself: {trouble}")
        known = self.attempt.user_attrs
        spent = None if resume is None else known.get("stage_one_seconds")
        self.seconds = float(spent or 0.0)
        origin = None if resume is None or spent else self.recipe.stage_one_key()
        if origin != known.get("branched_from"):
            self.attempt.note({"branched_from": origin})
        return resume

    def _share(self, result: EpochResult) -> None:
        """Leave the state at the switch for others, and note what it cost; go on without."""
        try:
            if shared.share(self.session, self.recipe, result):
                self.attempt.note({"stage_one_seconds": self.seconds})
                self._write()
                self.slot.stages.discard(self.recipe.stage_one_key() or "")
        except StoreError as error:
            log.warning("trial %d: stage one is not shared: %s", self.attempt.number, error)
            self.attempt.remark(f"stage one is not shared: {error}")

    def _keep(self, snapshot: Snapshot) -> None:
        """Keep a checkpoint, unless the trial is another worker's; go on if that cannot be."""
        if self.attempt.is_lost:
            return
        # Whoever goes on from here finds all epochs before.
        self._write()
        try:
            artifacts.save_checkpoint(self.store, snapshot, self.identity)
        except StoreError as error:
            log.warning("trial %d goes on without a checkpoint: %s", self.attempt.number, error)
            self.attempt.remark(f"no checkpoint: {error}")
            return
        self.attempt.note({"seconds": self.seconds})

    def _spend(self, wall: float) -> None:
        seconds = wall / self.beside()
        self.seconds += seconds
        self.attempt.seconds += seconds

    def _report(self, result: EpochResult, assessment: Assessment) -> float:
        objective = self.session.file.objective
        value = assessment.value(objective.metric, adjusted=objective.adjusted)
        self._spend(result.seconds)
        self.values[result.epoch] = value
        self.attempt.report(result, value, metrics_of(assessment))
        # The last epoch is written with the result.
        due = time.monotonic() - self.written > WRITE_SECONDS
        if due and result.epoch + 1 < self.recipe.epochs:
            self._write()
        return value

    def _write(self) -> None:
        self.attempt.write()
        self.written = time.monotonic()

    def _verdict(self, result: EpochResult, assessment: Assessment) -> str | None:
        """Why the trial is given up now; None to go on."""
        data = self.data
        images = len(data.validation.targets)
        best = max(m["balanced_accuracy"] or 0.0 for m in (assessment.raw, assessment.adjusted))
        reason = None
        classes = int((data.validation.targets.bincount() > 0).sum())
        if is_at_chance(best, classes, images, result.progress) and not self._unsettled(
            result.progress
        ):
            reason = "chance"
        elif self._is_behind(result.epoch):
            reason = "behind"
        if reason and self.spared:
            if self.attempt.user_attrs.get("would_prune_at") is None:
                self.attempt.note({"would_prune_at": result.epoch})
            return None
        return reason

    def _unsettled(self, progress: float) -> bool:
        """Whether a stage or a deferred part has only just begun."""
        return 0 <= progress - self.recipe.settled() < MARGIN

    def _is_behind(self, epoch: int) -> bool:
        search, objective = self.session.file.search, self.session.file.objective
        progress = (epoch + 1) / self.recipe.epochs
        if progress < max(search.prune_after, self.recipe.settled()):
            return False
        counts = self.data.validation.targets.bincount(minlength=self.data.num_classes).cpu()
        images = effective_images(objective.metric, counts, self.data.groups)
        # A branch has no epochs before the switch.
        first = min(self.values)
        if images is None or any(e not in self.values for e in range(first, epoch + 1)):
            return False
        own = Curve(
            loss=LOSSES.name_of(self.recipe.loss),
            values=tuple(self.values[e] for e in range(first, epoch + 1)),
            first=first,
            epochs=self.recipe.epochs,
            settled=self.recipe.settled(),
            complete=False,
        )
        peers = self.peers.now(rung_of(self.attempt), plain="plain" in self.attempt.user_attrs)
        return is_behind(own, peers, images=images, after=search.prune_after)


def metrics_of(assessment: Assessment) -> dict[str, Any]:
    """The metric vector, as the logits are and adjusted."""
    return {"raw": assessment.raw, "adjusted": assessment.adjusted}
