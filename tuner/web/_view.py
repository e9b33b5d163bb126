"""A storage to look through: it passes on what is read, and refuses to write."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any, NoReturn

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import StorageError

CONSTRAINTS_KEY = "constraints"


class StorageView(BaseStorage):
    """What optuna-dashboard sees of a storage.

    The dashboard 0.21 looks for constraints where Optuna 4 kept them, and takes the trial with
    the best value for the best one even when it breaks its constraints. Through this view it
    finds them, and its best trial is that of ``study.best_trial``.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def get_study_id_from_name(self, study_name: str) -> int:
        """See ``BaseStorage``."""
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """See ``BaseStorage``."""
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See ``BaseStorage``."""
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See ``BaseStorage``."""
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See ``BaseStorage``."""
        return self._storage.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """See ``BaseStorage``."""
        return self._storage.get_all_studies()

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See ``BaseStorage``."""
        return _with_constraints(self._storage.get_trial(trial_id))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See ``BaseStorage``."""
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [_with_constraints(trial) for trial in trials]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """See ``BaseStorage``; the best one that keeps its constraints, if one does."""
        name = self.get_study_name_from_id(study_id)
        try:
            best = optuna.load_study(study_name=name, storage=self._storage).best_trial
        except ValueError:
            best = self._storage.get_best_trial(study_id)
        return _with_constraints(best)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> NoReturn:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def delete_study(self, study_id: int) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: optuna.distributions.BaseDistribution,
    ) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See ``BaseStorage``; refused."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StorageError("the dashboard is read-only; change a study with the tuner command")


def _with_constraints(trial: FrozenTrial) -> FrozenTrial:
    """The trial, with its constraints also where the dashboard looks for them."""
    if not trial.constraints:
        return trial
    seen = copy.copy(trial)
    seen._system_attrs = {**trial._system_attrs, CONSTRAINTS_KEY: list(trial.constraints.values())}
    return seen
