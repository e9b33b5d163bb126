"""Passwords of storages are in no message, log, traceback, pickle or list of processes."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy
from conftest import MakeFile
from ledgers import Ledgers, claimed, enter, epoch, make_tables
from sqlalchemy.engine import make_url

from tuner import session as sessions
from tuner.cli import secrets
from tuner.datasets import Data
from tuner.engines import make_engine
from tuner.errors import TunerError
from tuner.storage import exclusive, open_storage
from tuner.stores import FolderStore
from tuner.urls import masked, parse_url, without_password

PASSWORD = "s3cret{x}%40 /#?:&='\"\\"
ENCODED = quote(PASSWORD, safe="")
MARKS = ("s3cret", ENCODED)


def with_password(url: str, user: str = "someone") -> str:
    return make_url(url).set(username=user, password=PASSWORD).render_as_string(False)


def assert_silent(text: str) -> None:
    for mark in MARKS:
        assert mark not in text


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All that is logged, down to what a library notes for its own makers."""
    names = ("tuner", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "alembic", "optuna")
    with contextlib.ExitStack() as levels:
        for name in (None, *names):
            levels.enter_context(caplog.at_level(logging.DEBUG, logger=name))
        yield caplog


PG, MY = "postgresql+psycopg://", "mariadb+pymysql://"
FAILURES = {
    "a port nobody listens to": f"{PG}someone:{ENCODED}@127.0.0.1:1/nothing",
    "the same with MariaDB": f"{MY}someone:{ENCODED}@127.0.0.1:1/nothing",
    "an unknown host": f"{PG}someone:{ENCODED}@no-such-host.invalid/nothing",
    "the same host with MariaDB": f"{MY}someone:{ENCODED}@no-such-host.invalid/nothing",
    "a password as a parameter": f"{PG}someone@127.0.0.1:1/nothing?password={ENCODED}",
    "a port that is no number": f"{PG}someone:{ENCODED}@127.0.0.1:port/nothing",
    "a password with an @": "postgresql://someone:an@s3cret@127.0.0.1:1/nothing",
    "an unknown kind": f"oracle://someone:{ENCODED}@127.0.0.1:1/nothing",
    "an unknown parameter": f"{PG}someone:{ENCODED}@127.0.0.1:1/nothing?no_such=1",
    "a driver that is not there": f"postgresql+pg8000://someone:{ENCODED}@127.0.0.1:1/x",
}


def text_of(error: BaseException) -> str:
    """All that a traceback shows, and what it would show of errors it leaves out."""
    found = ["".join(traceback.format_exception(error))]
    inner: BaseException | None = error
    while inner is not None:
        found += [str(inner), repr(inner)]
        inner = inner.__cause__ or inner.__context__
    return "\n".join(found)


def check_failure(action: Callable[[], Any], log: pytest.LogCaptureFixture) -> str:
    with pytest.raises(TunerError) as caught:
        action()
    assert_silent(text_of(caught.value))
    assert_silent(log.text)
    return str(caught.value)


@pytest.mark.parametrize("url", FAILURES.values(), ids=FAILURES)
def test_no_failure_to_open_a_storage_tells_its_password(
    url: str, everything_logged: pytest.LogCaptureFixture
) -> None:
    assert check_failure(lambda: open_storage(url), everything_logged)
    assert_silent(masked(url))


@pytest.mark.database
def test_no_server_that_refuses_us_makes_us_tell_the_password(
    postgres: str, mariadb: str, everything_logged: pytest.LogCaptureFixture
) -> None:
    absent = make_url(with_password(postgres, "root")).set(database="no_such_database")
    for url in (
        absent.render_as_string(False),
        with_password(postgres, "no_such_role"),
        with_password(mariadb, "no_such_user"),
    ):
        assert "***" in check_failure(lambda url=url: open_storage(url), everything_logged)  # type: ignore[misc]


def test_a_password_with_an_at_sign_is_refused_with_the_way_out() -> None:
    with pytest.raises(TunerError, match="%40"):
        parse_url("postgresql://someone:an@s3cret@host/database")


def test_a_driver_that_repeats_the_password_is_not_repeated() -> None:
    url = parse_url(f"{PG}someone:{ENCODED}@host/database?sslpassword=other-s3cret")
    told = without_password(f"no {PASSWORD}, no {ENCODED}, no other-s3cret", url)
    assert told == "no ***, no ***, no ***"


@pytest.fixture(params=["postgres", "mariadb"])
def with_a_password(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty database whose user has the password; MariaDB here asks for it."""
    url = request.getfixturevalue(request.param)
    if request.param == "postgres":
        yield with_password(url, make_url(url).username or "")
        return
    name = f"tuner_{os.urandom(4).hex()}"
    server = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        for host in ("localhost", "127.0.0.1"):
            user = f"'{name}'@'{host}'"
            make = sqlalchemy.text(f"CREATE USER {user} IDENTIFIED BY :password")
            connection.execute(make, {"password": PASSWORD})
            database = make_url(url).database
            connection.exec_driver_sql(f"GRANT ALL ON {database}.* TO {user}")
    yield with_password(url, name)
    with server.connect() as connection:
        for host in ("localhost", "127.0.0.1"):
            connection.exec_driver_sql(f"DROP USER '{name}'@'{host}'")


@pytest.mark.database
def test_work_on_a_storage_with_a_password_does_not_tell_it(
    with_a_password: str, everything_logged: pytest.LogCaptureFixture
) -> None:
    make_tables(with_a_password)
    ledgers = Ledgers(with_a_password)
    ledgers.enqueue({})
    fenced = ledgers.fenced()
    trial = ledgers.trial(fenced, claimed(ledgers.first, enter(ledgers.first)))
    trial.suggest_float("x", 0, 1)
    fenced.flush(trial._trial_id)
    with exclusive(with_a_password), pytest.raises(sqlalchemy.exc.SQLAlchemyError) as caught:
        ledgers.first._read(lambda c: c.exec_driver_sql("SELECT * FROM no_such_table"))
    ledgers.first.write(claimed(ledgers.first, ("worker", 1)), epoch(0))
    assert "CREATE TABLE" in everything_logged.text
    assert_silent(text_of(caught.value))
    assert_silent(everything_logged.text)
    for thing in (fenced, fenced.behind, ledgers.first, ledgers.first.engine, ledgers.study, trial):
        assert_silent(f"{thing!r} {thing!s}")
    ledgers.close()


@pytest.mark.database
def test_a_session_shows_no_password_and_does_not_go_into_a_pickle(
    with_a_password: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    session = sessions.create(make_file(), with_a_password, FolderStore(tmp_path), digits)
    assert_silent(f"{session!r} {session!s}")
    behind = session.fenced.behind
    for thing in (session, session.study, session.fenced, session.ledger, behind):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(thing)


def test_a_storage_is_not_pickled(sqlite: str) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(open_storage(sqlite))


def test_an_engine_is_not_pickled(sqlite: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        pickle.dumps(make_engine(sqlite))


# The command line


@pytest.mark.parametrize(
    ("given", "kept", "url"),
    [
        (["run", "x.toml"], ["run", "x.toml"], None),
        (["run", "--storage", "U", "x.toml"], ["run", "x.toml"], "U"),
        (["run", "--storage=U", "-v"], ["run", "-v"], "U"),
        (["run", "--storage=A", "--storage", "B=C"], ["run"], "B=C"),
        (["run", "--storage"], ["run", "--storage"], None),
        (["run", "--storages=U", "--", "--storage", "U"],) * 2 + (None,),
    ],
)
def test_the_storage_is_found_among_the_arguments(
    given: list[str], kept: list[str], url: str | None
) -> None:
    assert secrets.without_storage(given) == (kept, url)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{ENCODED}@host/x",
        "mysql+pymysql://user:a/b@host/x",
        "postgresql://user@host/x?password=s",
        "postgresql://user@host/x?a=b&sslpassword=s",
    ],
)
def test_a_url_with_a_password_is_told(url: str) -> None:
    assert secrets.PASSWORD.search(url)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:////tmp/a:b@c.db",
        "postgresql://user@host:5432/x",
        "postgresql+psycopg://",
        "grpc://host:13000",
        "postgresql://user@host/x?passfile=",
    ],
)
def test_a_url_without_a_password_is_told_too(url: str) -> None:
    assert not secrets.PASSWORD.search(url)


@pytest.fixture
def silence() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "program",
    [
        [sys.executable, "-m", "tuner"],
        [sys.executable, "-I", "-m", "tuner"],
        [str(Path(sys.executable).with_name("tuner"))],
    ],
    ids=["module", "with options of Python", "script"],
)
def test_a_password_on_the_command_line_is_gone_from_the_list_of_processes(
    program: list[str], silence: int, tmp_path: Path
) -> None:
    url = f"postgresql://user:{ENCODED}@127.0.0.1:{silence}/x"
    arguments = ["-q", "status", "name with spaces", "--storage", url, "--json"]
    with subprocess.Popen([*program, *arguments], cwd=tmp_path) as process:
        try:
            shown = Path(f"/proc/{process.pid}/cmdline")
            deadline = time.monotonic() + 30
            while "s3cret" in shown.read_text() or not shown.read_text():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            options = shown.read_text().split("\0")
            assert options[-5:-1] == ["-q", "status", "name with spaces", "--json"]
            kept = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
            assert f"TUNER_STORAGE={url}" in kept
        finally:
            process.kill()


@pytest.mark.long
def test_the_command_still_uses_the_storage_it_was_given(tmp_path: Path) -> None:
    url = f"postgresql://someone:{ENCODED}@127.0.0.1:1/x"
    command = [sys.executable, "-m", "tuner", "--debug", "status", "x", f"--storage={url}"]
    environment = os.environ | {"TUNER_STORAGE": "sqlite:///other.db"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "postgresql://someone:***@127.0.0.1:1/x" in done.stderr
    assert_silent(done.stdout + done.stderr)
