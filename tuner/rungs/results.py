"""What a trained trial leaves: its facts in the storage, logits and weights in the store."""

from __future__ import annotations

import logging
from typing import Any

from optuna.trial import TrialState

from tuner import artifacts
from tuner.evaluation import extras, intervals, recalls
from tuner.ladder import rung_of
from tuner.ledger import LeaseLostError
from tuner.models import head_state
from tuner.rungs.attempt import Attempt
from tuner.rungs.outcome import Outcome
from tuner.rungs.recipes import kept_trials
from tuner.rungs.training import Complete, Training, metrics_of
from tuner.stores import StoreError
from tuner.trainer import EpochResult

log = logging.getLogger(__name__)


def complete(attempt: Attempt, training: Training, done: Complete) -> None:
    """Write the result of a trial that was trained to its end."""
    result, assessment, data = done.result, done.assessment, training.data
    norms, bias = head_state(result.lane.model.head)
    targets = data.validation.targets.cpu()
    facts = {
        "metrics": metrics_of(assessment),
        "intervals": intervals(result.logits, assessment, data),
        "recall_per_class": recalls(assessment, data),
        "tau": assessment.tau,
        "extras": extras(result.logits, norms, bias, targets, data.groups),
        "sampling": result.lane.samplers[-1].describe(),
        "train_loss": result.train_loss,
        "seconds": training.seconds,
        "samples_per_second": result.samples / result.seconds,
    }
    attempt.note(facts)
    # Whose trial it is not any more must not replace the files of whom it is now.
    attempt.write()
    try:
        artifacts.save_validation(training.store, result.logits, targets, norms, bias)
    except StoreError as error:
        log.warning("trial %d: its validation logits are not kept: %s", attempt.number, error)
    constrain(attempt, facts["metrics"])
    finish(attempt, done.value)
    try:
        _keep_weights(attempt, training, result)
    except Exception as error:
        # The result is written: nothing that happens now may undo it.
        log.warning("trial %d: its weights are not kept: %s", attempt.number, error)
    artifacts.drop_checkpoint(training.store)


def finish(attempt: Attempt, value: float, reason: str | None = None) -> None:
    """End a trial that came to the end of its rung.

    Below the last rung it is ``PRUNED`` for Optuna, with the rung as the reason: what the study
    found best is one of the last rung.
    """
    rung = rung_of(attempt)
    if rung in ("full", attempt.session.file.ladder.last):
        attempt.end(TrialState.COMPLETE, "complete", value=value, reason=reason)
    else:
        attempt.note({"reason": rung})
        attempt.end(TrialState.PRUNED, "pruned", reason=rung)


def constrain(attempt: Attempt, metrics: dict[str, Any] | None) -> None:
    """Tell Optuna whether the floor is kept.

    The Gaussian process wants the same constraints of all trials: one without metrics breaks
    the floor, one that ended before the baseline keeps it.
    """
    session = attempt.session
    if session.file.objective.floor:
        plain = metrics if attempt.user_attrs.get("baseline") else None
        violation = 1.0 if metrics is None else session.floor_violation(metrics, plain)
        session.fenced.set_trial_system_attr(
            attempt.lease.trial_id, "constraints:floor", float(violation or 0.0)
        )


def _keep_weights(attempt: Attempt, training: Training, result: EpochResult) -> None:
    """Keep the weights of the best trial so far and of the baseline, no others."""
    session = attempt.session
    if attempt.number in kept_trials(session):
        meta = {**training.identity, "digest": training.recipe.digest()}
        artifacts.save_weights(training.store, result.lane.model, meta)
        artifacts.keep_weights_only_of(session.store, lambda: kept_trials(session))


def interrupted(attempt: Attempt) -> Outcome:
    """Put a trial back that somebody asked to stop: it goes on from its checkpoint.

    Raises:
        LeaseLostError: It is another worker's by now.
    """
    if attempt.is_lost:
        raise LeaseLostError
    reason = attempt.why_stopped()
    attempt.give_back("preempted", reason)
    return Outcome(attempt.number, "interrupted", reason)
