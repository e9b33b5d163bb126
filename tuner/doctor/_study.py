"""Checks of one study: what it was told, who works on it, what nobody works on, its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from optuna.trial import TrialState

from tuner import study as files
from tuner.doctor._finding import Finding, fail, ok, warn
from tuner.doctor._speeds import known_speeds, speeds_of
from tuner.doctor._storage import has_tables
from tuner.errors import StorageError, StudyFileError, TunerError
from tuner.planned import all_planned
from tuner.session import Session, join
from tuner.stores import open_store


def study(given: str, url: str, data: Path | None) -> Iterator[Finding]:
    """All checks of the study that is ``given`` by its name or its file."""
    file = None
    if given.endswith(".toml"):
        try:
            file = files.load(Path(given))
        except StudyFileError as error:
            yield fail("study file", str(error), "tuner check says more")
            return
        yield ok("study file", f"{given}: {file.trials()} trials of {file.budget.epochs} epochs")
    name = given if file is None else file.name
    try:
        if not has_tables(url):
            raise StorageError("the storage has no tables yet")
        session = join(name, url, open_store(None, check=False), writes=False)
    except StorageError as error:
        yield fail("study", str(error), f"tuner create {given if file else 'STUDY.toml'}")
        return
    yield _made_from(session, file)
    yield from _trials(session)
    yield from _fleet(session)
    yield from _fingerprint(session, data)


def _made_from(session: Session, file: files.StudyFile | None) -> Finding:
    name = session.file.name
    if file is not None and session.study.user_attrs.get("study_digest") != file.digest():
        return fail(
            "study",
            f"{name} was made from another study file than this one",
            "give the changed file a new name, or use the file it was made from",
        )
    return ok("study", f"{name} is there, made by tuner {_maker(session)}")


def _maker(session: Session) -> str:
    return str(session.study.user_attrs.get("tuner_version", "of unknown version"))


def _trials(session: Session) -> Iterator[Finding]:
    name, trials = session.file.name, session.trials()
    counts = Counter(trial.state.name.lower() for trial in trials)
    found = ", ".join(f"{number} {state}" for state, number in counts.items()) or "none"
    yield ok("trials", f"{found} of {all_planned(session)}")
    retried = {t.user_attrs.get("retry_of") for t in trials}
    failed = [t for t in trials if t.state == TrialState.FAIL and t.number not in retried]
    if failed:
        reasons = Counter(t.user_attrs.get("reason", "unknown") for t in failed)
        said = ", ".join(f"{number} by {why}" for why, number in reasons.items())
        cure = f"why: tuner trials {name} --trial {failed[0].number}; once it is cured: "
        yield warn("trials", f"{len(failed)} failed: {said}", f"{cure}tuner retry {name} --failed")


def _fleet(session: Session) -> Iterator[Finding]:
    name, ledger = session.file.name, session.ledger
    if not ledger.ready():
        cure = f"tuner create the study's file again, or start a worker: tuner worker {name}"
        yield warn("workers", "the storage has no tuner tables of this version", cure)
        return
    order = ledger.standing()
    if order.state == "run":
        yield ok("order", "work")
    else:
        said = "; ".join(part for part in (order.reason, order.detail) if part)
        found = f"{order.state}: {said or 'asked for'}"
        yield warn("order", found, f"tuner resume {name} lets workers go on")
    rows = ledger.workers()
    there = {(r["worker_id"], r["generation"]) for r in rows if r["state"] not in ("left", "lost")}
    lost = sum(row["state"] == "lost" for row in rows)
    yield ok("workers", f"{len(there)} at work" + (f", {lost} lost" if lost else ""))
    yield from _leases(session, there)


def _leases(session: Session, there: set[tuple[str, int]]) -> Iterator[Finding]:
    """Trials that run by Optuna's count, but in nobody's hands."""
    name = session.file.name
    held = {a["trial_id"]: a for a in session.ledger.attempts() if a["holds"] is not None}
    numbers = {t._trial_id: t.number for t in session.trials(TrialState.RUNNING)}
    orphans = [
        numbers[trial_id]
        for trial_id, a in held.items()
        if trial_id in numbers and (a["worker_id"], a["generation"]) not in there
    ]
    if orphans:
        found = f"trials of dead workers: {', '.join(map(str, sorted(orphans)))}"
        yield warn("leases", found, f"tuner reap {name}, or start a worker")
    unknown = sorted(number for trial_id, number in numbers.items() if trial_id not in held)
    if unknown:
        found = f"running, but no worker ever took them: {', '.join(map(str, unknown))}"
        cure = (
            f"end them: optuna tell --study-name {name} --trial-number N --state fail "
            f"--storage URL; then tuner retry {name} --failed"
        )
        yield warn("leases", found, cure)
    if not orphans and not unknown:
        yield ok("leases", f"{len(held)} held by workers that are there")


def _fingerprint(session: Session, data: Path | None) -> Iterator[Finding]:
    """Whether the data here are those the study was created with."""
    if data is None and hasattr(session.file.data, "root"):
        yield ok("data", "not looked at; --data FOLDER does")
        yield from known_speeds()
        return
    from tuner.fit import check_data

    try:
        loaded = session.file.data.build(data)
        check_data(session.study.user_attrs, loaded, session.file.name)
    except TunerError as error:
        yield fail("data", str(error), "bring the study's data here, or name their folder")
        return
    yield ok("data", f"{loaded.name} is what the study was created with")
    yield from speeds_of(session, loaded)
