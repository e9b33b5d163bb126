"""The rung that trains everything: one lease in, its result in the storage."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Generator
from typing import Any

import torch
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tuner import artifacts
from tuner.backends import Speed, chosen
from tuner.compiled import fetch, is_wanted, keep
from tuner.engines import PATIENCE, passes
from tuner.errors import NonFiniteError, StorageError, TunerError
from tuner.ladder import rung_of
from tuner.ledger import Changes, Lease, LeaseLostError
from tuner.recipe import Recipe
from tuner.rungs.attempt import LEAVING_SECONDS, Attempt
from tuner.rungs.head import run_cohort
from tuner.rungs.memory import free, is_device_broken, is_out_of_memory, smaller
from tuner.rungs.outcome import OnEpoch, Outcome, Slot, State
from tuner.rungs.recipes import equivalent, resolve
from tuner.rungs.results import complete, constrain, finish, interrupted
from tuner.rungs.training import Complete, Pruned, Stopped, Training, metrics_of
from tuner.stores import StoreError

EX_BROKEN = 70

log = logging.getLogger(__name__)


def run(
    slot: Slot,
    lease: Lease,
    *,
    stop: Callable[[], bool],
    on_epoch: OnEpoch = lambda *_: None,
    on_trial: Callable[[Outcome], None] = lambda _: None,
) -> Generator[None, None, Outcome]:
    """Train the trial of a lease and write its result into the storage.

    It yields where it would wait for the device: other trials may go on there. At the head rung
    others that wait are trained beside it: ``on_trial`` hears of those.

    A trial that was interrupted goes on from its checkpoint. A recipe equivalent to one that
    is complete is not trained again: it gets that trial's result. When ``stop`` or the fleet's
    order says so, the step is finished, the state is kept, and the trial goes back into the
    queue. Out of memory, the slot trains on in smaller pieces.
    """
    attempt = None
    try:
        attempt = Attempt(slot.session, lease, slot.pulse)
        if rung_of(attempt) == "head":
            return run_cohort(slot, attempt, stop=stop, on_trial=on_trial)
        return (yield from _run(slot, attempt, stop, on_epoch))
    except LeaseLostError:
        return _lose(slot, lease)
    except SQLAlchemyError as error:
        _fail_to_store(slot, lease, error)
        raise
    except TunerError as error:
        # What the user can cure, such as an image that is broken: the trial waits for the cure.
        _hand_back(slot, lease, "released", "error", str(error))
        raise
    except Exception as error:
        if attempt is None:
            _hand_back(slot, lease, "released", "error", traceback.format_exc())
            raise
        return _fail(attempt, error)
    except BaseException:
        log.warning("interrupted; trial %d goes on from its last checkpoint", lease.number)
        _hand_back(slot, lease, "preempted", "interrupted")
        raise


def _run(
    slot: Slot, attempt: Attempt, stop: Callable[[], bool], on_epoch: OnEpoch
) -> Generator[None, None, Outcome]:
    session, data = slot.session, slot.data_for(attempt)
    recipe = resolve(session, attempt.trial, data, slot.device)
    way = _way(slot, recipe, _most(slot, attempt))
    slot.side_by_side = way.lanes
    known = equivalent(session, recipe, attempt)
    if known is not None:
        return _copy(attempt, known)
    while True:
        beside, model = slot.beside, repr(recipe.model)
        training = Training(attempt, recipe, data, slot, way)
        try:
            done = yield from training.run(stop, on_epoch)
        except NonFiniteError as error:
            return _end(attempt, "pruned", "not_finite", str(error))
        except Exception as error:
            size = smaller(slot.pieces.get(model), recipe.training.batch_size)
            is_alone = beside() == 1 and way.seats == 1
            if not is_out_of_memory(error) or (size is None and is_alone):
                raise
        else:
            return _conclude(attempt, training, done)
        del training
        slot.stacks.free()
        free(slot.device)
        if beside() > 1:
            return _make_room(slot, attempt)
        if way.seats > 1:
            slot.most = way.seats // 2
            log.warning("trial %d: out of memory; now %d seats", attempt.number, slot.most)
            way = _way(slot, recipe, slot.most)
            slot.side_by_side = way.lanes
        elif size is not None:
            slot.pieces[model] = size
            log.warning("trial %d: out of memory; now %d images at once", attempt.number, size)


def _most(slot: Slot, attempt: Attempt) -> int | None:
    """Seats of a group at most: it takes as long for one lane as for all that it has seats for.

    While the baseline is trained, the rungs that build on its network have nothing to do.
    """
    climbs = slot.session.file.ladder.searched != ("full",)
    return 1 if climbs and attempt.user_attrs.get("baseline") else slot.most


def _way(slot: Slot, recipe: Recipe, most: int | None) -> Speed:
    """How to execute a recipe; what was compiled to find that out is shared."""
    if torch.device(slot.device).type == "cuda" and is_wanted():
        name = torch.cuda.get_device_name(slot.device).replace(" ", "-")
        with contextlib.suppress(StoreError):
            fetch(slot.session.store, name)
            found = chosen(recipe, slot.data, slot.device, most)
            keep(slot.session.store, name)
            return found
    return chosen(recipe, slot.data, slot.device, most)


def _make_room(slot: Slot, attempt: Attempt) -> Outcome:
    """Put a trial back for which the device has no memory beside the others."""
    slot.most = max(1, slot.beside() - 1)
    log.warning("trial %d waits: out of memory; now %d at once", attempt.number, slot.most)
    attempt.give_back("released", "out_of_memory")
    return Outcome(attempt.number, "interrupted", "out_of_memory")


def _conclude(attempt: Attempt, training: Training, done: Complete | Pruned | Stopped) -> Outcome:
    if isinstance(done, Complete):
        reason = "confirm" if rung_of(attempt) == "confirm" else None
        complete(attempt, training, done)
        return Outcome(attempt.number, "complete", reason, value=done.value)
    if isinstance(done, Pruned):
        attempt.note({"metrics": metrics_of(done.assessment), "seconds": training.seconds})
        return _end(attempt, "pruned", done.reason)
    return interrupted(attempt)


def _copy(attempt: Attempt, known: FrozenTrial) -> Outcome:
    keys = ("metrics", "intervals", "recall_per_class", "tau", "extras", "sampling")
    attempt.note({key: known.user_attrs[key] for key in keys} | {"duplicate_of": known.number})
    constrain(attempt, known.user_attrs["metrics"])
    value = known.values[0]
    attempt.trial.report(value, step=known.user_attrs["epochs"] - 1)
    finish(attempt, value, "duplicate")
    artifacts.drop_checkpoint(attempt.session.trial_store(attempt.number))
    return Outcome(attempt.number, "duplicate", value=value)


def _end(
    attempt: Attempt, state: State, reason: str, detail: str | None = None, **columns: Any
) -> Outcome:
    attempt.note({"reason": reason})
    if detail:
        attempt.note({"detail": detail[-4000:]})
    constrain(attempt, attempt.user_attrs.get("metrics"))
    final = TrialState.PRUNED if state == "pruned" else TrialState.FAIL
    attempt.end(final, state, reason=reason, detail=detail, **columns)
    artifacts.drop_checkpoint(attempt.session.trial_store(attempt.number))
    return Outcome(attempt.number, state, reason, detail)


def _lose(slot: Slot, lease: Lease) -> Outcome:
    """Let go of a trial that is another worker's by now."""
    log.warning("trial %d went to another worker; its result counts", lease.number)
    slot.session.fenced.drop(lease.trial_id)
    return Outcome(lease.number, "lost")


def _fail_to_store(slot: Slot, lease: Lease, error: SQLAlchemyError) -> None:
    """Put a trial back that the storage had an error with; if it is away, the lease runs out.

    Raises:
        StorageError: The storage did not answer in time.
    """
    slot.session.fenced.drop(lease.trial_id)
    if passes(error):
        raise StorageError(
            f"the storage did not answer for {PATIENCE / 60:.0f} minutes; trial {lease.number} "
            "goes on from its last checkpoint once it does; start this worker again then"
        ) from error
    _hand_back(slot, lease, "released", "error", traceback.format_exc())


def _fail(attempt: Attempt, error: Exception) -> Outcome:
    """End a trial with an error that is nobody's wish; which one is told by type and place.

    Raises:
        SystemExit: The device broke down.
    """
    if is_device_broken(error):
        # Nothing works in this process any more; the trial is found and tried elsewhere.
        log.error("trial %d: the device broke down: %s", attempt.number, error)
        raise SystemExit(EX_BROKEN) from error
    text = "".join(traceback.format_exception(error))
    if is_out_of_memory(error):
        return _end(attempt, "failed", "out_of_memory", str(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    note = f"{type(error).__name__} in {place.filename}:{place.lineno}"
    return _end(attempt, "failed", "code_error", text, note=note[-255:])


def _hand_back(slot: Slot, lease: Lease, end: str, reason: str, detail: str | None = None) -> None:
    """Put the trial of a worker that leaves back; if that fails, its lease runs out."""
    slot.pulse.drop(lease)
    options: dict[str, Any] = {
        "end": end,
        "reason": reason,
        "detail": detail,
        "patience": LEAVING_SECONDS,
    }
    with contextlib.suppress(LeaseLostError, SQLAlchemyError):
        fenced = slot.session.fenced
        if lease.trial_id in fenced.held:
            fenced.finish(lease.trial_id, TrialState.WAITING, None, **options)
        else:
            slot.session.ledger.finish(lease, Changes(), state=TrialState.WAITING, **options)
