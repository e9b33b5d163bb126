"""An Optuna storage that writes a trial only with its lease, and reads each ended trial once."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from tuner.engines import insist
from tuner.ledger._changes import Changes, Ending, Lease, Order
from tuner.ledger._history import by_number
from tuner.ledger._ledger import Ledger

T = TypeVar("T")
View = Callable[[list[FrozenTrial]], list[FrozenTrial]]
"""The trials to be seen, by number: it is given those that have not ended."""


@dataclass
class _Held:
    """A trial this process works on: as it sees it, and what the database does not have yet."""

    lease: Lease
    trial: FrozenTrial
    changes: Changes = field(default_factory=Changes)
    epoch: int | None = None


class FencedStorage(BaseStorage):
    """What samplers and trials of a worker see of a study.

    Writes to a trial are collected and written together, in a transaction that checks the
    lease: ``take`` opens a trial, ``flush`` writes, ``finish`` ends it. Trials of others can
    only be read. Everything about studies goes to the storage behind, tried again when the
    database does not answer.
    """

    def __init__(self, behind: BaseStorage, ledger: Ledger) -> None:
        self.behind, self.ledger = behind, ledger
        self.held: dict[int, _Held] = {}
        self.view: View | None = None

    def through(self, view: View) -> FencedStorage:
        """The same storage, with the trials of the study that ``view`` shows."""
        other = FencedStorage(self.behind, self.ledger)
        other.held, other.view = self.held, view
        return other

    def __reduce__(self) -> Any:
        raise TypeError("a storage is not pickled: it holds a way into the database; open it anew")

    # A worker's own trials

    def take(self, *leases: Lease) -> None:
        """Work on the trials of ``leases`` from now on."""
        found = self.ledger.by_ids([lease.trial_id for lease in leases]) if leases else []
        trials = {trial._trial_id: trial for trial in found}
        for lease in leases:
            self.held[lease.trial_id] = _Held(lease, trials[lease.trial_id])

    def flush(self, trial_id: int, **options: Any) -> Order:
        """Write what was collected, renew the lease, hear the order; see ``Ledger.write``."""
        held = self.held[trial_id]
        return self.ledger.write(held.lease, held.changes, **options)

    def finish(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None, **facts: Any
    ) -> None:
        """Write what was collected and end the attempt; see ``Ledger.finish``.

        A pruned trial's value is its last intermediate value, as with ``Study.tell``.
        """
        held = self.held[trial_id]
        # An attempt that was lost may have come further than this one.
        last = held.epoch
        steps = {
            step: value
            for step, value in held.trial.intermediate_values.items()
            if last is None or step <= last
        }
        if state == TrialState.PRUNED and steps and not math.isnan(steps[max(steps)]):
            values = [steps[max(steps)]]
        self.ledger.finish(held.lease, held.changes, state=state, values=values, **facts)
        self.drop(trial_id)

    def finish_all(self, endings: Sequence[Ending], **options: Any) -> list[Lease]:
        """End many trials at once; the leases that were lost. See ``Ledger.finish_all``."""
        lost = self.ledger.finish_all(endings, **options)
        for ending in endings:
            self.drop(ending.lease.trial_id)
        return lost

    def drop(self, trial_id: int) -> None:
        """Forget a trial and what was not written of it."""
        self.held.pop(trial_id, None)

    def note_epoch(self, trial_id: int, epoch: int, facts: dict[str, Any]) -> None:
        """Collect an epoch's row: seconds, samples, metrics."""
        held = self.held[trial_id]
        held.changes.epochs[epoch], held.epoch = facts, epoch

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Collect a parameter."""
        held = self._held(trial_id)
        text = distribution_to_json(distribution)
        held.changes.params[param_name] = (float(param_value_internal), text)
        held.trial.params[param_name] = distribution.to_external_repr(param_value_internal)
        held.trial.distributions[param_name] = distribution

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Collect an intermediate value."""
        held, value = self._held(trial_id), float(intermediate_value)
        held.changes.steps[step] = held.trial.intermediate_values[step] = value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Collect a user attribute."""
        held = self._held(trial_id)
        held.changes.user[key] = held.trial.user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Collect a system attribute."""
        held = self._held(trial_id)
        held.changes.system[key] = held.trial.system_attrs[key] = value

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """End the trial, as ``Study.tell`` does."""
        end = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
        self._held(trial_id)
        self.finish(trial_id, state, values, end=end.get(state, "failed"))
        return True

    def _held(self, trial_id: int) -> _Held:
        if trial_id not in self.held:
            raise RuntimeError(f"this process has no lease on trial {trial_id}")
        return self.held[trial_id]

    # Reading trials

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial; a worker's own with what it collected."""
        if trial_id in self.held:
            return copy.deepcopy(self.held[trial_id].trial)
        return self.ledger.trial(trial_id)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Trials of the ledger's study in any of the states."""
        wanted = tuple(s for s in TrialState if states is None or s in states)
        open_ = tuple(state for state in wanted if not state.is_finished())
        found = self._now(wanted if self.view is None else open_)
        if self.view is not None:
            found = [trial for trial in self.view(found) if trial.state in wanted]
        return copy.deepcopy(found) if deepcopy else found

    def _now(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Trials in any of the states at this moment; a worker's own with what it collected."""
        found = list(self.ledger.trials(states)) if states else []
        for own in [held.trial for held in self.held.values()]:
            place = bisect_left(found, own.number, key=by_number)
            if place < len(found) and found[place]._trial_id == own._trial_id:
                found[place] = own
        return found

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Find a trial by its number."""
        return self._insist(
            lambda: self.behind.get_trial_id_from_study_id_trial_number(study_id, trial_number)
        )

    def create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> NoReturn:
        """Refuse: trials come from tickets."""
        raise RuntimeError("trials are made by queueing tickets, so that the budget is exact")

    # Studies

    def _insist(self, action: Callable[[], T]) -> T:
        return insist(action)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Make a study."""
        return self.behind.create_new_study(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """Delete a study."""
        self.behind.delete_study(study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write a user attribute of a study."""
        self._insist(lambda: self.behind.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write a system attribute of a study."""
        self._insist(lambda: self.behind.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        """Find a study by its name."""
        return self._insist(lambda: self.behind.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """Name of a study."""
        return self._insist(lambda: self.behind.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Directions of a study."""
        return self._insist(lambda: self.behind.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """User attributes of a study."""
        return self._insist(lambda: self.behind.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """System attributes of a study."""
        return self._insist(lambda: self.behind.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies of the database."""
        return self._insist(self.behind.get_all_studies)
