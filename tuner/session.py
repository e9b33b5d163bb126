"""A study in a storage: created once, joined by name, with its trials and its best."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from tuner import __version__
from tuner.datasets import Data
from tuner.errors import DataError, StorageError, TunerError, close_match
from tuner.evaluation import certainty
from tuner.metrics import METRICS
from tuner.seeding import seeded
from tuner.storage import exclusive, masked, open_storage
from tuner.study import StudyFile, parse
from tuner.tickets import fill_queue


@dataclass(frozen=True)
class Session:
    """A study file joined with its study in the storage and the folder of its artifacts."""

    file: StudyFile
    study: Study
    folder: Path
    _found: list[FrozenTrial] = field(default_factory=list, repr=False, compare=False)

    def trial_folder(self, number: int) -> Path:
        """Where the artifacts of a trial are kept."""
        return self.folder / f"trial-{number:05d}"

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in any of the states, or all of them; not copies, do not change them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value among those that keep the floor.

        Equal values are told apart by balanced accuracy, then the earlier trial wins. When all
        break the floor, it is the one that breaks it least.
        """
        complete = [t for t in self.trials(TrialState.COMPLETE) if "metrics" in t.user_attrs]
        feasible = [t for t in complete if self.keeps_floor(t)]
        if feasible:
            return max(feasible, key=self._rank)
        return min(complete, key=self._breach, default=None)

    def _breach(self, trial: FrozenTrial) -> float:
        return self.floor_violation(trial.user_attrs["metrics"]) or 0.0

    def _rank(self, trial: FrozenTrial) -> tuple[float, float, int]:
        objective = self.file.objective
        sign = 1 if METRICS[objective.metric] == "maximize" else -1
        metrics = trial.user_attrs["metrics"]["adjusted" if objective.adjusted else "raw"]
        return sign * trial.values[0], metrics["balanced_accuracy"] or 0.0, -trial.number

    def baseline(self) -> FrozenTrial | None:
        """The plain cross-entropy trial, once it is complete; it never changes after."""
        if not self._found:
            complete = self.trials(TrialState.COMPLETE)
            self._found.extend(t for t in complete if t.user_attrs.get("baseline"))
        return self._found[0] if self._found else None

    def floor_violation(
        self, metrics: dict[str, Any], plain: dict[str, Any] | None = None
    ) -> float | None:
        """How far below the floor a trial's metrics are (<= 0: kept); None without a floor.

        The floor is the baseline's metric as it is, without adjustment, minus the drop.
        ``plain`` are the baseline's metrics; by default those of the one that is complete.
        """
        floor, baseline = self.file.objective.floor, self.baseline()
        if plain is None and baseline is not None:
            plain = baseline.user_attrs["metrics"]
        if not floor or plain is None:
            return None
        reference = plain["raw"][floor.metric]
        value = metrics["adjusted" if self.file.objective.adjusted else "raw"][floor.metric]
        if reference is None or value is None:
            return None
        sign = 1 if METRICS[floor.metric] == "maximize" else -1
        return float(sign * (reference - value) - floor.drop)

    def keeps_floor(self, trial: FrozenTrial) -> bool:
        """Whether a judged trial keeps the floor, or there is none to keep.

        The baseline has to keep it too: adjusted, it may not.
        """
        return self._breach(trial) <= 0

    def identity(self) -> dict[str, str]:
        """What files of this study are told apart by: its own id and that of its data."""
        attrs = self.study.user_attrs
        return {"study": attrs["study_id"], "fingerprint": attrs["fingerprint"]}


def create(file: StudyFile, url: str, folder: Path, data: Data) -> Session:
    """Create the study of ``file`` in the storage, or find it there, and fill its queue.

    Raises:
        StorageError: The storage holds a study of that name with another study file.
        DataError: The data are not those the study was created with.
    """
    check_fit(file, data)
    storage = open_storage(url)
    with exclusive(url):
        study = optuna.create_study(
            study_name=file.name,
            storage=storage,
            direction=METRICS[file.objective.metric],
            load_if_exists=True,
        )
        attrs = study.user_attrs
        if "study_digest" in attrs and attrs["study_digest"] != file.digest():
            raise StorageError(
                f"study {file.name!r} in {masked(url)} was made from another study file; "
                "give the changed file a new name, or use another storage"
            )
        _check_data(attrs, data, file.name)
        _describe(study, file, data)
        session = Session(file, study, _own_folder(folder, study))
        fill_queue(session)
    return session


def join(name: str, url: str, folder: Path, *, writes: bool = True) -> Session:
    """Find a study by name in the storage, to work on it or (``writes=False``) to read it.

    Raises:
        StorageError: There is no such storage or study, or Tuner did not make it.
    """
    storage = open_storage(url, create=False, writes=writes)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise StorageError(f"no study {name!r} in {masked(url)}{close_match(name, names)}")
    study = optuna.load_study(study_name=name, storage=storage)
    text = study.user_attrs.get("study_file")
    if text is None:
        raise StorageError(f"study {name!r} in {masked(url)} was not made by Tuner")
    import tomllib

    file = parse(tomllib.loads(text), text, where=f"study {name}")
    return Session(file, study, _own_folder(folder, study))


def check_data(session: Session, data: Data) -> None:
    """Refuse to work on other data than the study's.

    Raises:
        DataError: The fingerprints differ.
    """
    _check_data(session.study.user_attrs, data, session.file.name)


def _check_data(attrs: dict[str, Any], data: Data, name: str) -> None:
    known = attrs.get("fingerprint")
    if known is not None and known != data.fingerprint:
        raise DataError(
            f"the data are not those study {name!r} was created with (fingerprint "
            f"{data.fingerprint[:12]}, the study has {known[:12]}); use the same files, "
            "or give the study a new name"
        )


def check_fit(file: StudyFile, data: Data) -> None:
    """Refuse what cannot work with these data, before anything is trained.

    Raises:
        DataError: The validation part cannot estimate the objective at all, or a test image
            is broken.
        TunerError: A model of the space cannot be built for these images.
    """
    counts = data.validation.targets.bincount(minlength=data.num_classes)
    floor = file.objective.floor
    for metric in [file.objective.metric, *([floor.metric] if floor else [])]:
        classes = data.groups.named().get(metric.removesuffix("_accuracy"))
        if classes is not None and not counts[list(classes)].any():
            raise DataError(
                f"objective {metric} cannot be estimated: no validation image is in its "
                f"{len(classes)} classes; widen data.tail, or raise data.validation_fraction"
            )
    _check_models(file, data)
    # Decodes the test images once, where they are few enough to be held in memory.
    _ = data.test


def _check_models(file: StudyFile, data: Data) -> None:
    for params in file.space.variants("model"):
        recipe = file.space.suggest(FixedTrial(params))
        try:
            with seeded("check"):
                recipe.model.build(data.num_classes, data.image_shape, head=recipe.loss.head)
        except TunerError as error:
            raise TunerError(f"study {file.name}: model: {error}") from None


def _own_folder(root: Path, study: Study) -> Path:
    """Folder of a study's artifacts; studies of one name in two storages have two."""
    return root / f"{study.study_name}-{study.user_attrs['study_id'][:8]}"


def _describe(study: Study, file: StudyFile, data: Data) -> None:
    groups = {k: list(v) for k, v in data.groups.named().items()}
    facts = {
        "study_file": file.text,
        "study_digest": file.digest(),
        "tuner_version": __version__,
        "fingerprint": data.fingerprint,
        "class_names": list(data.class_names),
        "class_counts": data.class_counts.tolist(),
        "validation_counts": data.validation.targets.bincount(minlength=data.num_classes).tolist(),
        "groups": groups,
        "warnings": [*data.warnings, *certainty(data)],
    }
    known = study.user_attrs
    for key, value in {"study_id": known.get("study_id", uuid.uuid4().hex), **facts}.items():
        if known.get(key) != value:
            study.set_user_attr(key, value)
