"""A storage that goes away under a command: one message that says so, whatever the command."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from conftest import MakeFile
from relay import Relay, free_port
from test_cli import Tuner
from test_fleet_commands import Fleet

from tuner import engines
from tuner import session as sessions
from tuner.cli import fleet as fleet_commands
from tuner.cli import options, read, trials, work
from tuner.cli.failures import curable
from tuner.datasets import Data
from tuner.errors import StorageError
from tuner.ledger import Ledger
from tuner.stores import FolderStore
from tuner.supervisor import TEMPORARY

COMMANDS = [
    *(["reap", "small"], ["stop", "small"], ["pause", "small"], ["resume", "small"]),
    *(["retry", "small", "--failed"], ["workers", "small"], ["trials", "small"]),
    *(["status"], ["status", "small"], ["best", "small"], ["worker", "small"]),
]
URL = "postgresql+psycopg://someone:s3cret%40@host/tuner"


def gone(*_: object) -> Any:
    said = psycopg.OperationalError("connection failed: no route\n  is it running?")
    raise sa.exc.OperationalError("SELECT secret FROM rows", {}, said)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("outage"))


@pytest.fixture
def away(made: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A study whose database goes away as soon as it is opened."""

    def join(*arguments: Any, **named: Any) -> sessions.Session:
        session = real(*arguments, **named)
        monkeypatch.setattr(Ledger, "_read", gone)
        monkeypatch.setattr(Ledger, "_write", gone)
        return session

    real = sessions.join
    monkeypatch.setattr(sessions, "join", join)
    return made


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_whose_database_goes_away_ends_with_one_message(
    away: Fleet, command: list[str], request: pytest.FixtureRequest
) -> None:
    if command[0] == "worker":
        # It waits until the storage is back; only what it cannot read before it starts ends it.
        request.getfixturevalue("monkeypatch").setattr("tuner.cli.work._plans", gone)
    _, said = away(*command, code=1)
    assert said.startswith("tuner: the storage sqlite:///runs/tuner.db does not answer: ")
    assert said.count("\n") == 1
    assert "connection failed: no route; try again when it is back" in said
    assert "Traceback" not in said


def test_with_debug_the_traceback_is_shown(away: Fleet) -> None:
    with pytest.raises(sa.exc.OperationalError):
        away("--debug", "reap", "small")


def test_slot_whose_database_goes_away_starts_again_later(
    away: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would end this process and all its group once this one's standard input ends.
    monkeypatch.setattr("tuner.cli.slot._leave_with_input", lambda *_: None)
    away("slot", "small", "--id", "me", "--device", "cpu", code=TEMPORARY)


def test_error_of_ours_keeps_its_traceback(made: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("somebody's bug")

    monkeypatch.setattr(sessions, "join", broken)
    with pytest.raises(ZeroDivisionError):
        made("reap", "small")


def wrapped(error: Exception) -> Exception:
    found = optuna.exceptions.StorageInternalError("An exception is raised during the commit")
    found.__cause__ = error
    return found


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["SQLAlchemy's", "Optuna's"])
@pytest.mark.parametrize(
    ("original", "said", "away"),
    [
        (psycopg.OperationalError("connection failed for s3cret@"), "does not answer", True),
        (psycopg.errors.AdminShutdown("terminating s3cret%40"), "does not answer", True),
        (psycopg.errors.UndefinedTable("no table s3cret@"), "refused", False),
    ],
)
def test_what_a_database_says_is_told_without_the_password(
    wrap: Callable[[Exception], Exception], original: Exception, said: str, away: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tuner", "reap", "--storage", URL])
    error = sa.exc.OperationalError("SELECT 1", {}, original)
    if not away:
        error = sa.exc.ProgrammingError("SELECT 1", {}, original)  # type: ignore[assignment]
    found = curable(wrap(error))
    assert isinstance(found, StorageError)
    assert found.passes is away
    assert f"postgresql+psycopg://someone:***@host/tuner {said}: " in str(found)
    assert "s3cret" not in str(found)


@pytest.mark.database
@pytest.mark.parametrize(
    "command", [["reap"], ["stop"], ["status"], ["retry", "--failed"], ["workers"], ["trials"]],
    ids=" ".join,
)  # fmt: skip
def test_server_that_goes_away_after_the_study_was_opened(
    command: list[str], postgres: str, make_file: MakeFile, digits: Data, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sessions.create(make_file(), postgres, FolderStore(tmp_path / "artifacts"), digits)
    monkeypatch.setattr(options, "PATIENCE", 0.5)
    with Relay(postgres) as relay:

        def joined(*arguments: Any, **named: Any) -> sessions.Session:
            session = options.joined(*arguments, **named)
            relay.cut()
            return session

        for module in (fleet_commands, read, trials):
            monkeypatch.setattr(module, "joined", joined)
        first, *rest = command
        _, said = Tuner(tmp_path)(first, "tiny", *rest, code=1, TUNER_STORAGE=relay.url)
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("tuner: ")]
    assert len(lines) == 1
    assert " does not answer: " in lines[0]


@pytest.fixture
def made_on_server(
    postgres: str,
    make_file: MakeFile,
    digits: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """URL of a server with the study tiny; a worker that finds it ends at once."""
    sessions.create(make_file(), postgres, FolderStore(tmp_path / "artifacts"), digits)
    monkeypatch.setattr(work, "supervise", lambda *_, **__: "over")
    return postgres


@pytest.mark.database
def test_worker_that_starts_before_its_server_waits_for_it(
    made_on_server: str, tmp_path: Path
) -> None:
    port = free_port()
    url = sa.make_url(made_on_server).set(port=port).render_as_string(hide_password=False)
    relays: list[Relay] = []
    starts = threading.Timer(0.5, lambda: relays.append(Relay(made_on_server, port)))
    starts.start()
    try:
        _, said = Tuner(tmp_path)("worker", "tiny", "--device", "cpu", TUNER_STORAGE=url)
    finally:
        starts.join()
        for relay in relays:
            relay.__exit__(None, None, None)
    first, last = said.splitlines()
    assert "Connection refused; waiting for it, up to 10 minutes" in first
    assert last == "study tiny: the budget is spent"


@pytest.mark.database
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"database": "nobodys"}, 'database "nobodys" does not exist'),
        ({"username": "nobody"}, 'role "nobody" does not exist'),
        ({"host": "tuner.invalid"}, "failed to resolve host"),
        ({"port": 80800}, "invalid port number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_worker_does_not_wait_for_what_is_wrong(
    wrong: dict[str, Any], reason: str, made_on_server: str, tmp_path: Path
) -> None:
    url = sa.make_url(made_on_server).set(**wrong).render_as_string(hide_password=False)
    _, said = Tuner(tmp_path)("worker", "tiny", "--device", "cpu", code=1, TUNER_STORAGE=url)
    assert said.startswith("tuner: cannot open the storage ")
    assert reason in said
    assert said.count("\n") == 1


def test_worker_does_not_wait_for_a_study_that_is_not_there(made: Fleet) -> None:
    _, said = made("worker", "smal", "--device", "cpu", code=1)
    assert "did you mean 'small'?" in said


def test_worker_whose_storage_does_not_come_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "PATIENCE", 0.2)
    url = f"postgresql+psycopg://someone:s3cret@127.0.0.1:{free_port()}/tuner"
    _, said = Tuner(tmp_path)("worker", "small", "--device", "cpu", code=1, TUNER_STORAGE=url)
    first, last = said.splitlines()
    assert "waiting for it" in first
    assert last.startswith("tuner: cannot open the storage postgresql+psycopg://someone:***@")
    assert "Connection refused" in last
    assert "s3cret" not in said


def test_worker_that_waits_can_be_stopped() -> None:
    def away() -> sessions.Session:
        raise StorageError("not yet", passes=True)

    asked = iter((False, True))
    assert work.joined_when_there(away, lambda: next(asked)) is None
