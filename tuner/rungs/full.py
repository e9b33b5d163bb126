"""The rung that trains everything: one ticket in, its result in the storage."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner import artifacts
from tuner.datasets import Data
from tuner.errors import NonFiniteError, TunerError
from tuner.evaluation import Assessment, assess_validation, extras, intervals, recalls
from tuner.losses import LOSSES
from tuner.pruning import MARGIN, Curve, effective_images, is_at_chance, is_behind
from tuner.recipe import Recipe
from tuner.rungs.recipes import equivalent, kept_trials, resolve
from tuner.seeding import derive_seed
from tuner.session import Session
from tuner.tickets import requeue
from tuner.trainer import EpochResult, epochs

CHECKPOINT_SECONDS = 10.0

log = logging.getLogger(__name__)

State = Literal["complete", "duplicate", "pruned", "failed", "interrupted", "lost"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its state, the reason unless it is complete, and its value if any."""

    number: int
    state: State
    reason: str | None = None
    detail: str | None = None
    value: float | None = None


def run(
    session: Session,
    trial: Trial,
    data: Data,
    *,
    device: str,
    stop: Callable[[], bool],
    on_epoch: Callable[[Trial, EpochResult, float], None] = lambda *_: None,
) -> Outcome:
    """Train the trial of a ticket and write its result into the storage.

    A trial that was interrupted goes on from its checkpoint. A recipe equivalent to one that
    is complete is not trained again: it gets that trial's result. When ``stop`` says so, the
    epoch is finished, the state is kept, and the trial goes back into the queue.
    """
    recipe = resolve(session, trial, data)
    known = equivalent(session, recipe, trial.number)
    if known is not None:
        return _copy(session, trial, known)
    training = _Training(session, trial, data, recipe, device)
    try:
        return training.run(stop, on_epoch)
    except UpdateFinishedTrialError:
        log.warning("trial %d was ended by another worker; its result stands", trial.number)
        return Outcome(trial.number, "lost")
    except NonFiniteError as error:
        return _end(session, trial, "pruned", "not_finite", str(error))
    except TunerError:
        # What the user can cure, such as an image that is broken: the trial waits for the cure.
        requeue(session, trial._trial_id)
        raise
    except torch.OutOfMemoryError as error:
        return _end(session, trial, "failed", "out_of_memory", str(error))
    except Exception:
        return _end(session, trial, "failed", "code_error", traceback.format_exc())
    except BaseException:
        log.warning("interrupted; trial %d goes on from its last checkpoint", trial.number)
        requeue(session, trial._trial_id)
        raise


def _copy(session: Session, trial: Trial, known: FrozenTrial) -> Outcome:
    for key in ("metrics", "intervals", "recall_per_class", "tau", "extras", "sampling"):
        trial.set_user_attr(key, known.user_attrs[key])
    trial.set_user_attr("duplicate_of", known.number)
    _constrain(session, trial, known.user_attrs["metrics"])
    value = known.values[0]
    trial.report(value, step=known.user_attrs["epochs"] - 1)
    session.study.tell(trial, value)
    artifacts.drop_checkpoint(session.trial_folder(trial.number))
    return Outcome(trial.number, "duplicate", value=value)


def _constrain(session: Session, trial: Trial, metrics: dict[str, Any] | None) -> None:
    """Tell Optuna whether the floor is kept.

    The Gaussian process wants the same constraints of all trials: one without metrics breaks
    the floor, one that ended before the baseline keeps it.
    """
    if session.file.objective.floor:
        plain = metrics if trial.user_attrs.get("baseline") else None
        violation = 1.0 if metrics is None else session.floor_violation(metrics, plain)
        trial.set_constraint("floor", violation or 0.0)


def _end(
    session: Session, trial: Trial, state: State, reason: str, detail: str | None = None
) -> Outcome:
    trial.set_user_attr("reason", reason)
    if detail:
        trial.set_user_attr("detail", detail[-4000:])
    _constrain(session, trial, trial.user_attrs.get("metrics"))
    final = TrialState.PRUNED if state == "pruned" else TrialState.FAIL
    session.study.tell(trial, state=final)
    artifacts.drop_checkpoint(session.trial_folder(trial.number))
    return Outcome(trial.number, state, reason, detail)


class _Training:
    """One trial while it trains: reports, prunes, keeps checkpoints, writes the result."""

    def __init__(
        self, session: Session, trial: Trial, data: Data, recipe: Recipe, device: str
    ) -> None:
        self.session, self.trial, self.data = session, trial, data
        self.recipe, self.device = recipe, device
        self.folder = session.trial_folder(trial.number)
        self.identity = session.identity()
        self.values = self._reported()
        self.seconds = float(trial.user_attrs.get("seconds", 0.0))
        self.spared = self._is_spared()

    def _reported(self) -> dict[int, float]:
        frozen = self.session.study._storage.get_trial(self.trial._trial_id)
        return dict(frozen.intermediate_values)

    def _is_spared(self) -> bool:
        search = self.session.file.search
        draw = derive_seed(search.seed, "control", self.trial.number) % 10_000
        baseline = bool(self.trial.user_attrs.get("baseline"))
        return baseline or search.pruner == "none" or draw < search.control * 10_000

    def run(
        self,
        stop: Callable[[], bool],
        on_epoch: Callable[[Trial, EpochResult, float], None],
    ) -> Outcome:
        """Train epoch by epoch until the end, a verdict, or a request to stop."""
        expected = {**self.identity, "recipe": self.recipe.digest()}
        resume = artifacts.load_checkpoint(self.folder, expected)
        self.trial.set_user_attr("device", self.device)
        saved = time.monotonic()
        for result in epochs(self.recipe, self.data, device=self.device, resume=resume):
            assessment = assess_validation(result.logits, self.data, self.recipe)
            value = self._report(result, assessment)
            on_epoch(self.trial, result, value)
            if result.epoch + 1 == self.recipe.epochs:
                return self._complete(result, assessment, value)
            reason = self._verdict(result, assessment)
            if reason:
                return self._prune(reason, assessment)
            stopping = stop()
            if stopping or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._keep(result)
                saved = time.monotonic()
            if stopping:
                requeue(self.session, self.trial._trial_id)
                return Outcome(self.trial.number, "interrupted")
        raise RuntimeError(f"trial {self.trial.number} was at its last epoch already")

    def _keep(self, result: EpochResult) -> None:
        artifacts.save_checkpoint(self.folder, result.snapshot(), self.identity)
        self.trial.set_user_attr("seconds", self.seconds)

    def _report(self, result: EpochResult, assessment: Assessment) -> float:
        objective = self.session.file.objective
        value = assessment.value(objective.metric, adjusted=objective.adjusted)
        self.seconds += result.seconds
        if result.epoch not in self.values:
            self.trial.report(value, step=result.epoch)
        self.values[result.epoch] = value
        return value

    def _verdict(self, result: EpochResult, assessment: Assessment) -> str | None:
        """Why the trial is given up now; None to go on."""
        data = self.data
        images = len(data.validation.targets)
        best = max(m["balanced_accuracy"] or 0.0 for m in (assessment.raw, assessment.adjusted))
        reason = None
        if is_at_chance(best, data.num_classes, images, result.progress) and not self._unsettled(
            result.progress
        ):
            reason = "chance"
        elif self._is_behind(result.epoch):
            reason = "behind"
        if reason and self.spared:
            if self.trial.user_attrs.get("would_prune_at") is None:
                self.trial.set_user_attr("would_prune_at", result.epoch)
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
        if images is None or any(e not in self.values for e in range(epoch + 1)):
            return False
        own = Curve(
            loss=LOSSES.name_of(self.recipe.loss),
            values=tuple(self.values[e] for e in range(epoch + 1)),
            epochs=self.recipe.epochs,
            settled=self.recipe.settled(),
            complete=False,
        )
        return is_behind(own, self._peers(), images=images, after=search.prune_after)

    def _peers(self) -> list[Curve]:
        """Curves of the trials that ended, but for copies and those that break the floor."""
        peers = self.session.trials(TrialState.COMPLETE, TrialState.PRUNED)
        return [
            Curve(
                loss=peer.user_attrs["loss"],
                values=tuple(v for _, v in sorted(peer.intermediate_values.items())),
                epochs=peer.user_attrs["epochs"],
                settled=peer.user_attrs["settled"],
                complete=peer.state == TrialState.COMPLETE,
            )
            for peer in peers
            if "metrics" in peer.user_attrs
            and "duplicate_of" not in peer.user_attrs
            and self.session.keeps_floor(peer)
        ]

    def _prune(self, reason: str, assessment: Assessment) -> Outcome:
        self.trial.set_user_attr("metrics", _metrics(assessment))
        self.trial.set_user_attr("seconds", self.seconds)
        return _end(self.session, self.trial, "pruned", reason)

    def _complete(self, result: EpochResult, assessment: Assessment, value: float) -> Outcome:
        norms, bias = result.lane.head_state()
        targets = self.data.validation.targets.cpu()
        facts = {
            "metrics": _metrics(assessment),
            "intervals": intervals(result.logits, assessment, self.data),
            "recall_per_class": recalls(assessment, self.data),
            "tau": assessment.tau,
            "extras": extras(result.logits, norms, bias, targets, self.data.groups),
            "sampling": result.lane.samplers[-1].describe(),
            "train_loss": result.train_loss,
            "seconds": self.seconds,
            "samples_per_second": result.samples / result.seconds,
        }
        for key, fact in facts.items():
            self.trial.set_user_attr(key, fact)
        artifacts.save_validation(self.folder, result.logits, targets, norms, bias)
        _constrain(self.session, self.trial, facts["metrics"])
        self.session.study.tell(self.trial, value)
        self._keep_weights(result)
        artifacts.drop_checkpoint(self.folder)
        return Outcome(self.trial.number, "complete", value=value)

    def _keep_weights(self, result: EpochResult) -> None:
        """Keep the weights of the best trial so far and of the baseline, no others."""
        if self.trial.number in kept_trials(self.session):
            meta = {**self.identity, "digest": self.recipe.digest()}
            artifacts.save_weights(self.folder, result.lane.model, meta)
            artifacts.keep_weights_only_of(self.session.folder, kept_trials(self.session))


def _metrics(assessment: Assessment) -> dict[str, Any]:
    return {"raw": assessment.raw, "adjusted": assessment.adjusted}
