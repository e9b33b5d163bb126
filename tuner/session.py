"""A study in a storage: its attributes, its queue of tickets, its trials."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner import __version__
from tuner.datasets import Data
from tuner.errors import DataError, StorageError, close_match
from tuner.evaluation import better
from tuner.metrics import METRICS
from tuner.search import algorithm
from tuner.seeding import derive_seed
from tuner.storage import exclusive, masked, open_storage
from tuner.study import PROGRESSIVE, StudyFile, distinct_grid, parse

Ticket = tuple[dict[str, Any], dict[str, Any]]
GRACE_SECONDS = 60


@dataclass(frozen=True)
class Session:
    """A study file joined with its study in the storage and the folder of its artifacts."""

    file: StudyFile
    study: Study
    folder: Path

    def trial_folder(self, number: int) -> Path:
        """Where the artifacts of a trial are kept."""
        return self.folder / f"trial-{number:05d}"

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in any of the states, or all of them; not copies, do not change them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value among those that keep the floor.

        Trials that break the floor count only when all of them do.
        """
        complete = [t for t in self.trials(TrialState.COMPLETE) if t.values]
        feasible = [t for t in complete if self.keeps_floor(t)]
        best: FrozenTrial | None = None
        for trial in feasible or complete:
            if best is None or better(self.file.objective.metric, trial.value, best.value):
                best = trial
        return best

    def baseline(self) -> FrozenTrial | None:
        """The plain cross-entropy trial, once it is complete."""
        marked = [t for t in self.trials(TrialState.COMPLETE) if t.user_attrs.get("baseline")]
        return marked[0] if marked else None

    def floor_violation(self, metrics: dict[str, Any]) -> float | None:
        """How far below the floor a trial's metrics are (<= 0: kept); None without a floor.

        The floor is the baseline's metric as it is, without adjustment, minus the drop.
        """
        floor, baseline = self.file.objective.floor, self.baseline()
        if not floor or baseline is None:
            return None
        reference = baseline.user_attrs["metrics"]["raw"][floor.metric]
        value = metrics["adjusted" if self.file.objective.adjusted else "raw"][floor.metric]
        if reference is None or value is None:
            return None
        sign = 1 if METRICS[floor.metric] == "maximize" else -1
        return float(sign * (reference - value) - floor.drop)

    def keeps_floor(self, trial: FrozenTrial) -> bool:
        """Whether a complete trial keeps the floor (or there is none to keep)."""
        if trial.user_attrs.get("baseline"):
            return True
        violation = self.floor_violation(trial.user_attrs["metrics"])
        return violation is None or violation <= 0


def create(file: StudyFile, url: str, folder: Path, data: Data) -> Session:
    """Create the study of ``file`` in the storage, or find it there, and fill its queue.

    Raises:
        StorageError: The storage holds a study of that name with another study file.
        DataError: The data are not those the study was created with.
    """
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
        session = Session(file, study, folder / file.name)
        fill_queue(session)
    return session


def join(name: str, url: str, folder: Path) -> Session:
    """Find a study by name in the storage.

    Raises:
        StorageError: There is no such storage or study, or Tuner did not make it.
    """
    storage = open_storage(url, create=False)
    names = optuna.get_all_study_names(storage)
    if name not in names:
        raise StorageError(f"no study {name!r} in {masked(url)}{close_match(name, names)}")
    study = optuna.load_study(study_name=name, storage=storage)
    text = study.user_attrs.get("study_file")
    if text is None:
        raise StorageError(f"study {name!r} in {masked(url)} was not made by Tuner")
    import tomllib

    file = parse(tomllib.loads(text), text, where=f"study {name}")
    return Session(file, study, folder / name)


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
        "warnings": list(data.warnings),
    }
    for key, value in facts.items():
        if study.user_attrs.get(key) != value:
            study.set_user_attr(key, value)


def fill_queue(session: Session) -> int:
    """Put tickets for the trials of the budget that are due and not there yet; their number.

    First the plain cross-entropy baseline, then one published default per loss, then the grid
    or free tickets for the algorithm. The progressive strategy's tickets are due rung by rung.
    Call it under ``storage.exclusive``, so that nothing is queued twice.
    """
    have = len(session.trials())
    due = list(_tickets(session))[have:]
    for params, attrs in due:
        session.study.enqueue_trial(params, user_attrs=attrs)
    return len(due)


def _tickets(session: Session) -> Iterator[Ticket]:
    file = session.file
    space, losses, budget = file.space, list(file.space.parts["loss"]), file.trials()
    plain = {"loss": "cross_entropy"} if "cross_entropy" in losses else {}
    yield space.defaults(**plain), {"baseline": True}
    if file.search.algorithm == "grid":
        yield from ((params, {}) for params in distinct_grid(space)[: budget - 1])
        return
    if file.search.strategy == "progressive":
        yield from _progressive_tickets(session)
        return
    presets = [loss for loss in losses if loss != "cross_entropy"][: budget - 1]
    yield from ((space.defaults(loss=loss), {"preset": loss}) for loss in presets)
    yield from (({}, {}) for _ in range(budget - 1 - len(presets)))


def _progressive_tickets(session: Session) -> Iterator[Ticket]:
    """A quarter of the budget for every rung that is reached, its published default first."""
    file, space = session.file, session.file.space
    budget, size = divmod(file.trials() - 1, len(PROGRESSIVE))
    for rung, loss in enumerate(PROGRESSIVE):
        if rung > 0 and not _climbs(session, rung - 1):
            return
        natural = "natural" if "natural" in space.parts["sampler"] else "class_aware"
        names = {"loss": loss, "sampler": natural if rung < 3 else "class_aware"}
        open_ = {part: name for part, name in names.items() if len(space.parts[part]) > 1}
        for position in range(budget + (rung < size)):
            first = position == 0
            params = space.defaults(**names) if first else open_
            yield params, {"rung": rung, **({"preset": loss} if first else {})}


def _climbs(session: Session, rung: int) -> bool:
    """Whether the progressive strategy goes on after ``rung``: it ended below the gate."""
    own = [t for t in session.trials() if t.user_attrs.get("rung") == rung]
    if any(not t.state.is_finished() for t in own):
        return False
    kind = "adjusted" if session.file.objective.adjusted else "raw"
    tails = [
        t.user_attrs["metrics"][kind]["tail_accuracy"] or 0.0
        for t in session.trials(TrialState.COMPLETE)
        if session.keeps_floor(t)
    ]
    return max(tails, default=0.0) < session.file.search.gate


def claim(session: Session) -> Trial | None:
    """Take the next ticket; None when none is waiting. Exactly one process gets a ticket."""
    storage, study = session.study._storage, session.study
    for waiting in session.trials(TrialState.WAITING):
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                seed = derive_seed(session.file.search.seed, "search", waiting.number)
                study.sampler = algorithm(session.file.search.algorithm, seed % 2**32)
                trial = Trial(study, waiting._trial_id)
                trial.set_user_attr("worker", worker_name())
                return trial
    return None


def requeue(session: Session, trial_id: int) -> None:
    """Put a running trial back in the queue; it keeps its parameters and its checkpoint."""
    session.study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def requeue_orphans(session: Session) -> list[int]:
    """Put back the running trials of workers of this machine that are gone; their numbers."""
    gone = [t for t in session.trials(TrialState.RUNNING) if _is_orphan(t)]
    for trial in gone:
        requeue(session, trial._trial_id)
    return [trial.number for trial in gone]


def worker_name() -> str:
    """This process: host, process number and the moment it started, as JSON text."""
    pid = os.getpid()
    return json.dumps([socket.gethostname(), pid, _started(pid)])


def _is_orphan(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial, if it was one of this machine, is gone.

    A worker killed before it could sign its trial is taken for gone after a minute.
    """
    worker = trial.user_attrs.get("worker")
    if worker is None:
        started = trial.datetime_start
        return started is None or (datetime.now() - started).total_seconds() > GRACE_SECONDS
    host, pid, started_at = json.loads(worker)
    return bool(host == socket.gethostname() and _started(pid) != started_at)


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
