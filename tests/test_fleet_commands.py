"""Commands for all workers of a study: what they do to it, and what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from ledgers import claimed, complete, enter, epoch, expire, release
from optuna.trial import TrialState
from test_cli import Tuner

from tuner import session as sessions
from tuner.ledger import Changes, Ledger
from tuner.ledger._tables import attempts, metadata
from tuner.session import Session
from tuner.stores import FolderStore


class Fleet(Tuner):
    """A folder with the small study, created and not worked on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self("create", "small.toml")

    def session(self) -> Session:
        store = FolderStore(self.folder / "runs/artifacts")
        return sessions.join("small", f"sqlite:///{self.folder}/runs/tuner.db", store)

    def ledger(self) -> Ledger:
        return self.session().ledger

    def said(self, *arguments: str, **options: Any) -> str:
        return self(*arguments, **options)[0]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def fail(ledger: Ledger, worker: tuple[str, int], reason: str = "out_of_memory") -> int:
    """Let the next trial fail; its number."""
    lease = claimed(ledger, worker)
    facts = {"reason": reason, "detail": "it was too large"}
    changes = Changes(user=facts)
    ledger.finish(lease, changes, state=TrialState.FAIL, end="failed", reason=reason)
    return lease.number


# Orders


@pytest.mark.parametrize("command", ["stop", "pause"])
def test_an_order_reaches_every_worker_and_says_how_soon(fleet: Fleet, command: str) -> None:
    ledger = fleet.ledger()
    ledger.lease_seconds = 20.0
    workers = [enter(ledger, name) for name in ("one", "other")]
    text = fleet.said(command, "small", "--reason", "new driver")
    assert "2 workers hear it within 5 s: they finish the step at hand, keep their" in text
    assert "tuner resume small" in text
    for worker in workers:
        told = ledger.beat(worker, "idle")
        assert (told.state, told.reason) == (command, "new driver")


def test_a_single_worker_is_told_of_as_one(fleet: Fleet) -> None:
    enter(fleet.ledger(), "one")
    text = fleet.said("pause", "small")
    assert "1 worker hears it within" in text
    assert "s: it finishes the step at hand, keeps its" in text
    assert "back and waits\n" in text


def test_who_gave_the_order_and_why_stands_in_the_status(fleet: Fleet) -> None:
    fleet("stop", "small", "--reason", "new driver")
    assert "stopped (new driver; told by " in fleet.said("status")
    row = fleet.json("status", "small")
    assert (row["order"], row["order_reason"], row["workers"]) == ("stop", "new driver", 0)


def test_status_of_a_study_at_work_has_no_order(fleet: Fleet) -> None:
    enter(fleet.ledger())
    assert fleet.said("status").strip() == "small: 4 waiting of 4; best none yet; 1 worker"


def test_without_workers_an_order_says_what_awaits_those_that_start(fleet: Fleet) -> None:
    assert "one that starts leaves at once" in fleet.said("stop", "small")
    assert "one that starts waits" in fleet.said("pause", "small")


def test_resume_says_what_made_it_stop_and_lets_workers_claim(fleet: Fleet) -> None:
    fleet("pause", "small", "--reason", "lunch")
    ledger = fleet.ledger()
    assert ledger.claim(enter(ledger)) is None
    text = fleet.said("resume", "small")
    assert "small was paused (lunch; told by" in text
    assert "1 worker goes on" in text
    assert ledger.claim(enter(ledger, "other")) is not None


def test_resume_of_what_was_never_stopped_says_so(fleet: Fleet) -> None:
    text = fleet.said("resume", "small")
    assert "neither stopped nor paused" in text
    assert "start some: tuner worker small" in text


def test_resume_after_errors_tells_the_error_and_how_to_retry(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    ledger.give_order("stop", "code_error", "Traceback\nValueError: no such thing")
    text = fleet.said("resume", "small")
    assert "same error three times in a row: ValueError: no such thing" in text
    assert "tuner retry small --failed" in text


def test_resume_beyond_a_limit_says_that_the_limit_stands(tmp_path: Path) -> None:
    limited = Tuner(tmp_path)
    study = (tmp_path / "small.toml").read_text().replace("epochs = 3", "epochs = 3\nhours = 1.0")
    (tmp_path / "small.toml").write_text(study)
    limited("create", "small.toml")
    store = FolderStore(tmp_path / "runs/artifacts")
    ledger = sessions.join("small", f"sqlite:///{tmp_path}/runs/tuner.db", store).ledger
    claimed(ledger, enter(ledger))
    with ledger.engine.begin() as connection:
        connection.execute(sa.text("UPDATE tuner_controls SET started_at = started_at - 7200"))
    assert ledger.order().reason == "hours"
    text, _ = limited("resume", "small")
    assert "stopped by its limit budget.hours again at once" in text


# Retry


def test_failed_trials_wait_again_under_new_numbers_once(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    worker = enter(ledger)
    number = fail(ledger, worker)
    text = fleet.said("retry", "small", "--failed")
    assert f"1 trial waits again: {number} as trial 4" in text
    assert "1 worker is there to take them" in text
    assert "no trial failed" in fleet.said("retry", "small", "--failed")
    states = [row["state"] for row in fleet.json("trials", "small")]
    assert states == ["fail", "waiting", "waiting", "waiting", "waiting"]


def test_retry_in_a_stopped_study_says_that_it_is_stopped(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    fail(ledger, enter(ledger))
    fleet("stop", "small")
    text = fleet.said("retry", "small", "--failed")
    assert "the study is stopped" in text
    assert "tuner resume small" in text


def test_retry_wants_to_know_what(fleet: Fleet) -> None:
    _, err = fleet("retry", "small", code=2)
    assert "--failed" in err


# Workers and those that are gone


def test_workers_lists_who_is_there_on_what_doing_what_at_what_speed(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    worker = enter(ledger, "machine-7")
    lease = claimed(ledger, worker)
    ledger.write(lease, epoch(2), seconds=3.0, speed=1234.0)
    (row,) = fleet.json("workers", "small")
    expected = {"worker": "machine-7", "device": "cpu", "state": "training", "trial": lease.number}
    assert row.items() >= (expected | {"epoch": 2, "samples_per_second": 1234.0}).items()
    text = fleet.said("workers", "small")
    assert all(part in text for part in ("machine-7", "training", "1234"))


def test_workers_that_left_are_listed_only_when_asked_for(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    ledger.leave(enter(ledger))
    assert fleet.json("workers", "small") == []
    assert "start some: tuner worker small" in fleet.said("workers", "small")
    assert [row["state"] for row in fleet.json("workers", "small", "--all")] == ["left"]


def test_reap_puts_a_dead_workers_trial_back(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    lease = claimed(ledger, enter(ledger))
    assert "no trial has lost its worker; 1 is being worked on" in fleet.said("reap", "small")
    expire(ledger)
    text = fleet.said("reap", "small")
    assert f"trial {lease.number} has lost its worker; it goes on from its last check" in text
    assert "waiting (lost: lease ran out)" in fleet.said("trials", "small")


def test_reap_that_watches_looks_again_until_it_is_interrupted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = fleet.ledger()
    lease, looks = claimed(ledger, enter(ledger)), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    # Of this module only: threads that other tests left sleep too.
    monkeypatch.setattr("tuner.cli.fleet.time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("tuner.pulse.Contact.is_steady", lambda self: True)
    expire(ledger)
    text = fleet.said("reap", "small", "--watch", "100", code=130)
    assert looks == [15.0, 15.0], "a quarter of the lease, or contact would count as lost"
    assert text.count(f"trial {lease.number} has lost its worker") == 1


def test_reap_after_an_outage_gives_every_worker_the_time_to_be_heard(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    ledger = fleet.ledger()
    claimed(ledger, enter(ledger))
    expire(ledger)
    monkeypatch.setattr("tuner.cli.fleet.time", SimpleNamespace(sleep=interrupted))
    assert "lost its worker" not in fleet.said("reap", "small", "--watch", "5", code=130)
    assert ledger.running() == 1


# Why a trial ended


def test_trials_say_why_each_ended_and_how_often_it_was_tried(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    worker = enter(ledger)
    failed = fail(ledger, worker)
    release(ledger, claimed(ledger, worker), reason="signal")
    again = claimed(ledger, worker)
    complete(ledger, again, 0.7)
    rows = {row["trial"]: row for row in fleet.json("trials", "small")}
    assert (rows[failed]["end"], rows[failed]["reason"]) == ("failed", "out_of_memory")
    tries = rows[again.number]["attempts"]
    assert [(a["attempt"], a["end"], a["reason"]) for a in tries] == [
        (1, "preempted", "signal"),
        (2, "complete", None),
    ]
    assert "fail (out of memory)" in fleet.said("trials", "small")


def test_one_trial_shows_its_attempts_its_epochs_and_its_error(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    worker = enter(ledger)
    lease = claimed(ledger, worker)
    metrics = {
        "raw": {"accuracy": 0.25, "tail_accuracy": 0.0, "head_accuracy": None},
        "adjusted": {"accuracy": 0.5, "tail_accuracy": 0.125, "head_accuracy": 1.0},
    }
    row = {"seconds": 1.5, "samples": 64, "metrics": metrics}
    ledger.write(lease, Changes(epochs={0: row}), seconds=1.5)
    facts = Changes(user={"reason": "code_error", "detail": "ZeroDivisionError: here"})
    ledger.finish(lease, facts, state=TrialState.FAIL, end="failed", reason="code_error")
    found = fleet.json("trials", "small", "--trial", str(lease.number))
    assert found["epochs"][0]["metrics"] == metrics
    assert [attempt["end"] for attempt in found["attempts"]] == ["failed"]
    text = fleet.said("trials", "small", "--trial", str(lease.number))
    assert "0.0 / 12.5" in text
    assert "failed: code_error" in text
    assert "ZeroDivisionError: here" in text


def test_trial_that_is_not_there_is_refused_with_those_that_are(fleet: Fleet) -> None:
    _, err = fleet("trials", "small", "--trial", "9", code=1)
    assert "no trial 9; it has 0 to 3" in err


# Studies from before


def test_reading_commands_work_on_a_study_made_before_there_was_a_ledger(fleet: Fleet) -> None:
    with fleet.ledger().engine.begin() as connection:
        metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE tuner_version"))
    assert fleet.json("status", "small")["order"] == "run"
    assert fleet.json("workers", "small") == []
    assert [row["attempts"] for row in fleet.json("trials", "small")] == [[]] * 4
    assert fleet.json("trials", "small", "--trial", "0")["epochs"] == []
    fleet("stop", "small")
    assert fleet.json("status", "small")["order"] == "stop"


def test_reading_commands_say_that_the_storage_is_a_newer_tuners(fleet: Fleet) -> None:
    (fleet.folder / "other.toml").write_text(
        (fleet.folder / "small.toml").read_text().replace('"small"', '"other"')
    )
    fleet("create", "other.toml")
    assert "newer Tuner" not in fleet("status")[1]
    with fleet.ledger().engine.begin() as connection:
        connection.execute(sa.text("UPDATE tuner_version SET version_num = '9999'"))
    for arguments in (("status",), ("status", "small"), ("trials", "small")):
        out, err = fleet(*arguments)
        assert "small" in out or "waiting" in out
        assert err.count("the storage is a newer Tuner's") == 1
    assert "use the newer Tuner that wrote them" in fleet("stop", "small", code=1)[1]


def test_reading_commands_write_nothing(fleet: Fleet) -> None:
    ledger = fleet.ledger()
    expire_me = claimed(ledger, enter(ledger))
    expire(ledger)
    with ledger.engine.connect() as connection:
        before = connection.execute(sa.select(attempts)).all()
    for command in (["status"], ["workers", "small"], ["trials", "small"]):
        json.loads(fleet.said(*command, "--json"))
    with ledger.engine.connect() as connection:
        assert connection.execute(sa.select(attempts)).all() == before
    assert expire_me.number == 0
