"""The rung that trains classifiers on the features of one backbone: many leases at a time."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import torch
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from tuner import artifacts
from tuner.alone import Stopped
from tuner.errors import TunerError
from tuner.evaluation import Assessment, assess_validation, extras, intervals, recalls
from tuner.heads import COHORT, HeadResult, train_heads
from tuner.ladder import rung_of
from tuner.ledger import LeaseLostError
from tuner.metrics import METRICS
from tuner.planned import at, planned
from tuner.proposals import forget
from tuner.recipe import Recipe
from tuner.rungs.attempt import LEAVING_SECONDS, Attempt, attempts_at
from tuner.rungs.memory import free, is_device_broken, is_out_of_memory
from tuner.rungs.outcome import Outcome, Slot
from tuner.rungs.recipes import kept_trials, resolve
from tuner.rungs.results import constrain, interrupted
from tuner.rungs.training import metrics_of
from tuner.trained import Backbone, assembled, backbone, features_folder

log = logging.getLogger(__name__)


def run_cohort(
    slot: Slot, attempt: Attempt, *, stop: Callable[[], bool], on_trial: Callable[[Outcome], None]
) -> Outcome:
    """Train the trial of ``attempt``, and others of the rung that wait beside it.

    All results are written in one transaction. Trials that were not trained when somebody asked
    to stop go back into the queue.

    Raises:
        LeaseLostError: The trial of ``attempt`` is another worker's by now.
    """
    try:
        found = _backbone(slot, lambda: stop() or slot.pulse.interrupts(attempt.lease))
    except Stopped:
        return interrupted(attempt)
    session, pulse = slot.session, slot.pulse
    leases = session.ledger.claim_alike(pulse.worker, "head", _share(slot) - 1)
    others = attempts_at(session, leases, pulse)
    pulse.hold(*leases)
    try:
        first, *rest = _Cohort(slot, [attempt, *others], found).run(stop)
    except BaseException as error:
        _put_back(slot, others)
        if not _may_do_with_fewer(slot, error, len(others)):
            raise
    else:
        slot.together = min(COHORT, 2 * slot.together)
        for outcome in rest:
            on_trial(outcome)
        if first.state == "lost":
            raise LeaseLostError
        return first
    # Outside of the handler: the error holds what the failed try had in memory.
    free(slot.device)
    return run_cohort(slot, attempt, stop=stop, on_trial=on_trial)


def _may_do_with_fewer(slot: Slot, error: BaseException, others: int) -> bool:
    """Whether a try with fewer at once may end better; if so, the next one has half as many.

    Out of memory, these are classifiers. Else one recipe raises whatever is beside it: with half
    as many trials again and again it is soon alone with its error, and the others are trained.
    """
    if is_out_of_memory(error) and slot.lanes > 1:
        slot.lanes //= 2
        log.warning("out of memory; now %d classifiers at once", slot.lanes)
        return True
    known = isinstance(error, TunerError | LeaseLostError | SQLAlchemyError)
    if known or not isinstance(error, Exception) or is_device_broken(error) or not others:
        slot.together = COHORT
        return False
    slot.together = (1 + others) // 2
    log.warning(
        "%s: %s; now %d trials at once, to find out whose recipe it is",
        *(type(error).__name__, error, slot.together),
    )
    return True


def _share(slot: Slot) -> int:
    """Trials to train at once, one of them claimed already, so that all workers end together."""
    session = slot.session
    waiting = [t for t in session.trials(TrialState.WAITING) if rung_of(t) == "head"]
    left = 1 + len(waiting) + max(0, planned(session, "head") - len(at(session, "head")))
    return min(slot.lanes, slot.together, -(-left // max(1, len(session.ledger.alive()))))


def _backbone(slot: Slot, stop: Callable[[], bool]) -> Backbone:
    if slot.backbone is None:
        folder = features_folder()
        slot.backbone = backbone(slot.session, slot.data, slot.device, folder, stop)
    return slot.backbone


def _put_back(slot: Slot, attempts: Sequence[Attempt]) -> None:
    """Put trials back whose training did not come to an end; if that fails, leases run out."""
    fenced = slot.session.fenced
    held = [a for a in attempts if a.lease.trial_id in fenced.held]
    for attempt in held:
        attempt.forget_writes()
    endings = [attempt.ending(TrialState.WAITING, "released", "error") for attempt in held]
    with contextlib.suppress(SQLAlchemyError):
        fenced.finish_all(endings, patience=LEAVING_SECONDS)


class _Cohort:
    """Trials that are trained together."""

    def __init__(self, slot: Slot, attempts: Sequence[Attempt], found: Backbone) -> None:
        self.slot, self.attempts, self.found = slot, attempts, found
        self.session, self.data = slot.session, slot.data
        self.is_last = self.session.file.ladder.last == "head"
        self.started = time.perf_counter()
        self.results: dict[int, tuple[HeadResult, Assessment]] = {}

    def run(self, stop: Callable[[], bool]) -> list[Outcome]:
        """Propose, train, judge and write; how each trial ended."""

        def over() -> bool:
            return stop() or self.slot.pulse.interrupts(self.attempts[0].lease)

        forget(self.session, "head")
        self.recipes = [resolve(self.session, a.trial, self.data) for a in self.attempts]
        trained = train_heads(
            self.recipes,
            self.found.features,
            self.data,
            self.session.file.ladder.head,
            lanes=self.slot.lanes,
            stop=over,
            device=self.slot.device,
        )
        for index, result in trained:
            self.results[index] = (result, self._judge(self.recipes[index], result))
        return self._write()

    def _judge(self, recipe: Recipe, result: HeadResult) -> Assessment:
        logits = torch.nan_to_num(result.logits) if result.diverged else result.logits
        return assess_validation(logits, self.data, recipe)

    def _write(self) -> list[Outcome]:
        best = self._best() if self.is_last else None
        share = (time.perf_counter() - self.started) / max(1, len(self.results))
        outcomes, endings = [], []
        for index, attempt in enumerate(self.attempts):
            attempt.seconds = share if index in self.results else 0.0
            outcome, state = self._conclude(index, full=index == best)
            end = "preempted" if state == TrialState.WAITING else outcome.state
            endings.append(attempt.ending(state, end, outcome.reason, outcome.value))
            outcomes.append(outcome)
        lost = {lease.number for lease in self.session.fenced.finish_all(endings)}
        self.slot.pulse.drop(*(attempt.lease for attempt in self.attempts))
        if best is not None:
            self._keep_weights(best)
        return [Outcome(o.number, "lost") if o.number in lost else o for o in outcomes]

    def _conclude(self, index: int, *, full: bool) -> tuple[Outcome, TrialState]:
        """Note a trial's result; how it ends for us and for Optuna."""
        attempt = self.attempts[index]
        if index not in self.results:
            attempt.forget_writes()
            reason = attempt.why_stopped()
            return Outcome(attempt.number, "interrupted", reason), TrialState.WAITING
        result, assessment = self.results[index]
        if result.diverged:
            attempt.note({"reason": "not_finite"})
            constrain(attempt, None)
            return Outcome(attempt.number, "pruned", "not_finite"), TrialState.PRUNED
        value = self._note(attempt, result, assessment, full)
        if self.is_last:
            return Outcome(attempt.number, "complete", value=value), TrialState.COMPLETE
        attempt.note({"reason": "head"})
        return Outcome(attempt.number, "pruned", "head", value=value), TrialState.PRUNED

    def _note(
        self, attempt: Attempt, result: HeadResult, assessment: Assessment, full: bool
    ) -> float:
        objective, data = self.session.file.objective, self.data
        value = assessment.value(objective.metric, adjusted=objective.adjusted)
        metrics = metrics_of(assessment)
        facts = {
            "metrics": metrics,
            "tau": assessment.tau,
            "train_loss": result.train_loss,
            "seconds": attempt.seconds,
        }
        if self.is_last:
            facts["recall_per_class"] = recalls(assessment, data)
            facts["sampling"] = self._sampling(attempt)
            facts["extras"] = extras(
                result.logits, *_norms(result), data.validation.targets.cpu(), data.groups
            )
        if full:
            facts["intervals"] = intervals(result.logits, assessment, data)
        attempt.note(facts)
        attempt.at_step(0, value)
        constrain(attempt, metrics)
        return value

    def _sampling(self, attempt: Attempt) -> str:
        """How often the recipe's sampler repeats images."""
        recipe, targets = self.recipes[self.attempts.index(attempt)], self.data.train.targets
        component = recipe.training.samplers(recipe.sampler)[-1]
        sampler = component.build(targets.cpu(), seed=0, groups=self.data.groups)
        return str(sampler.describe())

    def _best(self) -> int | None:
        """The trial of this cohort with the best value that keeps the floor."""
        objective, found = self.session.file.objective, []
        for place, (result, assessment) in self.results.items():
            value = assessment.value(objective.metric, adjusted=objective.adjusted)
            broken = self.session.floor_violation(metrics_of(assessment)) or 0.0
            if not result.diverged and broken <= 0:
                found.append((value, place))
        sign = 1 if METRICS[objective.metric] == "maximize" else -1
        return max(found, key=lambda pair: (sign * pair[0], -pair[1]))[1] if found else None

    def _keep_weights(self, index: int) -> None:
        attempt, recipe = self.attempts[index], self.recipes[index]
        if attempt.number not in kept_trials(self.session):
            return
        lane = assembled(recipe, self.found, self.results[index][0], self.data, self.slot.device)
        store = self.session.trial_store(attempt.number)
        meta = {**self.session.identity(), "digest": recipe.digest()}
        try:
            artifacts.save_weights(store, lane.model, meta)
        except Exception as error:
            # The result is written: nothing that happens now may undo it.
            log.warning("trial %d: its weights are not kept: %s", attempt.number, error)
        artifacts.keep_weights_only_of(self.session.store, lambda: kept_trials(self.session))


def _norms(result: HeadResult) -> tuple[Tensor, Tensor]:
    """Norms of the classifier's rows and its bias; a cosine head divides by the norms itself."""
    ones = torch.ones(len(result.weight))
    if result.bias is None:
        return ones, torch.zeros_like(ones)
    return result.weight.norm(dim=1), result.bias
