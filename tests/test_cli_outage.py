"""A storage that goes away under a command: one message that says so, whatever the command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from conftest import MakeFile
from relay import Relay
from test_cli import Tuner
from test_fleet_commands import Fleet

from tuner import session as sessions
from tuner.cli import fleet as fleet_commands
from tuner.cli import options, read, trials
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
