"""A study in a storage: created once, joined by name, with its trials and its best."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner import __version__
from tuner.datasets import Data
from tuner.ended import Ended, Place
from tuner.engines import make_engine
from tuner.errors import StorageError, StudyFileError, close_match
from tuner.evaluation import certainty
from tuner.fit import check_data, check_fit
from tuner.ladder import Rung, is_judged, rung_of
from tuner.ledger import FencedStorage, Ledger, Limits, prepare, prepared
from tuner.metrics import METRICS
from tuner.proxy import RemoteLedger
from tuner.remote import is_remote
from tuner.rounds import winner
from tuner.search import CohortTPESampler
from tuner.storage import exclusive, lease_seconds, open_storage, opening
from tuner.stores import Store
from tuner.study import StudyFile, parse
from tuner.tickets import beyond_budget, fill_queue
from tuner.urls import masked

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
GOALS = ("gpu_hours", "hours", "target", "plateau")
"""What ends a study by itself, as its budget says."""


@dataclass(frozen=True)
class Session:
    """A study file joined with its study in the storage and the store of its artifacts."""

    file: StudyFile
    study: Study
    store: Store
    fenced: FencedStorage
    views: dict[tuple[Rung, bool], Study] = field(default_factory=dict, repr=False, compare=False)
    samplers: dict[Rung, CohortTPESampler] = field(default_factory=dict, repr=False, compare=False)
    _ended: Ended = field(default_factory=Ended, repr=False, compare=False)

    @property
    def ledger(self) -> Ledger:
        """Who works on which trial, and what the fleet was told."""
        return self.fenced.ledger

    def trial_store(self, number: int) -> Store:
        """Where the artifacts of a trial are kept."""
        return self.store.within(f"trial-{number:05d}")

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in any of the states, or all of them; not copies, do not change them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def ended(self) -> Ended:
        """What is known of the trials that ended until now."""
        self._ended.take_in(self.trials(*FINISHED), self._place)
        return self._ended

    def best(self) -> FrozenTrial | None:
        """The trial whose recipe the confirm rung found best; without that, ``best_found``."""
        ended = self.ended()
        # As long as nothing was trained again, nothing is confirmed.
        chosen = winner(self) if ended.again else None
        return ended.complete.best if chosen is None else chosen

    def best_found(self) -> FrozenTrial | None:
        """The complete trial, so of the last rung searched, with the best value within the floor.

        Equal values are told apart by balanced accuracy, then the earlier trial wins. When all
        break the floor, it is the one that breaks it least.
        """
        return self.ended().complete.best

    def ranked(self, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the trials that were trained to the end of their rung, the best first.

        First come those that keep the floor, by value; then the others, by how far they break it.
        """
        baseline = self.baseline()
        judged = (trial for trial in trials if is_judged(trial))
        return sorted(judged, key=lambda trial: self._place(trial, baseline))

    def _place(self, trial: FrozenTrial, baseline: FrozenTrial | None) -> Place:
        breach = self._breach(trial, baseline)
        if breach > 0:
            return True, breach, 0.0, trial.number
        objective = self.file.objective
        sign = 1 if METRICS[objective.metric] == "maximize" else -1
        metrics = trial.user_attrs["metrics"]["adjusted" if objective.adjusted else "raw"]
        balanced = metrics["balanced_accuracy"] or 0.0
        return False, -sign * trial.values[0], -balanced, trial.number

    def _breach(self, trial: FrozenTrial, baseline: FrozenTrial | None) -> float:
        if baseline is None:
            return 0.0
        metrics, plain = (t.user_attrs["metrics"] for t in (trial, baseline))
        return self.floor_violation(metrics, plain) or 0.0

    def baseline(self) -> FrozenTrial | None:
        """The plain cross-entropy trial, once it is complete; it never changes after."""
        return self._ended.baseline or self.ended().baseline

    def floor_violation(
        self, metrics: dict[str, Any], plain: dict[str, Any] | None = None
    ) -> float | None:
        """How far below the floor a trial's metrics are (<= 0: kept); None without a floor.

        The floor follows from the baseline's metric as it is, without adjustment: see ``Floor``.
        ``plain`` are the baseline's metrics; by default those of the one that is complete.
        """
        floor = self.file.objective.floor
        if floor and plain is None:
            baseline = self.baseline()
            plain = None if baseline is None else baseline.user_attrs["metrics"]
        if not floor or plain is None:
            return None
        reference = plain["raw"][floor.metric]
        value = metrics["adjusted" if self.file.objective.adjusted else "raw"][floor.metric]
        if reference is None or value is None:
            return None
        sign = 1 if METRICS[floor.metric] == "maximize" else -1
        return float(sign * (floor.bound(reference) - value))

    def keeps_floor(self, trial: FrozenTrial) -> bool:
        """Whether a judged trial keeps the floor, or there is none to keep.

        The baseline has to keep it too: adjusted, it may not.
        """
        return self._breach(trial, self.baseline()) <= 0

    def identity(self) -> dict[str, str]:
        """What files of this study are told apart by: its own id and that of its data."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, str]:
        attrs = self.study.user_attrs
        return {"study": attrs["study_id"], "fingerprint": attrs["fingerprint"]}


def create(file: StudyFile, url: str, store: Store, data: Data) -> Session:
    """Create the study of ``file`` in the storage, or find it there, and fill its queue.

    Raises:
        StorageError: The storage holds a study of that name with another study file, or is a
            proxy.
        DataError: The data are not those the study was created with.
    """
    if is_remote(url):
        raise StorageError(
            f"a study is not created through the proxy {url}: create it with the database's URL, "
            f"then workers may use the proxy: tuner worker {file.name} --storage {url}"
        )
    check_fit(file, data)
    storage = open_storage(url)
    engine = make_engine(url)
    with exclusive(url):
        prepare(engine)
        study = optuna.create_study(
            study_name=file.name,
            storage=storage,
            direction=METRICS[file.objective.metric],
            load_if_exists=True,
        )
        attrs = study.user_attrs
        changed = attrs.get("study_file") not in (None, file.text)
        if "study_digest" in attrs and attrs["study_digest"] != file.digest():
            raise StorageError(
                f"study {file.name!r} in {masked(url)} was made from another study file; "
                "give the changed file a new name, or use another storage"
            )
        check_data(attrs, data, file.name)
        _describe(study, file, data)
    ledger = Ledger(engine, study._study_id, **_terms(file))
    session = _session(file, study, storage, ledger, store)
    session.ledger.prepare()
    if changed and session.ledger.order().reason in GOALS:
        # A larger budget is what was asked for; what it still exceeds stops the study again.
        session.ledger.give_order("run")
    fill_queue(session)
    _warn_of_more(session)
    return session


def _warn_of_more(session: Session) -> None:
    """Say so where more trials wait than a budget, lowered since, allows: they stay queued."""
    file, last = session.file, session.file.ladder.last
    own = [t for t in session.trials() if rung_of(t) == last and not beyond_budget(t)]
    waiting = sum(t.state == TrialState.WAITING for t in own)
    more = min(waiting, len(own) - file.trials())
    if more > 0:
        log.warning(
            "budget.trials = %d, but %d more wait since it was larger, and are trained too; to end "
            "the study before: tuner stop %s",
            *(file.trials(), more, file.name),
        )


def _session(
    file: StudyFile, study: Study, storage: BaseStorage, ledger: Ledger, store: Store
) -> Session:
    fenced = FencedStorage(storage, ledger)
    own = Study(study_name=study.study_name, storage=fenced)
    return Session(file, own, _own_store(store, study), fenced)


def _terms(file: StudyFile) -> dict[str, Any]:
    limits = Limits(gpu_hours=file.budget.gpu_hours, hours=file.budget.hours)
    return {"limits": limits, "lease_seconds": lease_seconds()}


def join(name: str, url: str, store: Store, *, writes: bool = True) -> Session:
    """Find a study by name in the storage, to work on it or (``writes=False``) to read it.

    Raises:
        StorageError: There is no such storage or study, or Tuner did not make it.
        StudyFileError: It needs another version of Tuner, or a package that is not here.
    """
    storage = open_storage(url, create=False, writes=writes)
    engine = None if is_remote(url) else make_engine(url)
    if writes and engine is not None:
        with opening(url):
            if not prepared(engine):
                with exclusive(url):
                    prepare(engine)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise StorageError(f"no study {name!r} in {masked(url)}{close_match(name, names)}")
    study = optuna.load_study(study_name=name, storage=storage)
    text = study.user_attrs.get("study_file")
    if text is None:
        raise StorageError(f"study {name!r} in {masked(url)} was not made by Tuner")
    file = _stored(study, text)
    ledger = (
        RemoteLedger(url, study._study_id, **_terms(file))
        if engine is None
        else Ledger(engine, study._study_id, **_terms(file))
    )
    session = _session(file, study, storage, ledger, store)
    if writes:
        session.ledger.prepare()
    return session


def _stored(study: Study, text: str) -> StudyFile:
    """The study file that the storage keeps; it was right where the study was created."""
    import tomllib

    name = study.study_name
    try:
        return parse(tomllib.loads(text), text, where=f"study {name}")
    except StudyFileError as error:
        version = study.user_attrs.get("tuner_version", "of unknown version")
        raise StudyFileError(
            f"{error}\nstudy {name} was created by tuner {version} and the packages installed "
            f"there; this is tuner {__version__}: install the same here"
        ) from None


def _own_store(root: Store, study: Study) -> Store:
    """Store of a study's artifacts; studies of one name in two storages have two."""
    return root.within(f"{study.study_name}-{study.user_attrs['study_id'][:8]}")


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
