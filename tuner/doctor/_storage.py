"""Checks of the storage: who it is, its tables, and how it answers; the rest is by its kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata

import sqlalchemy
from sqlalchemy.engine import URL, Connection, Engine

from tuner.doctor import _file, _server
from tuner.doctor._finding import Finding, fail, ok, warn
from tuner.doctor._latency import commits, described, measured
from tuner.engines import make_engine
from tuner.errors import StorageError
from tuner.ledger import newest, read_now, version
from tuner.remote import is_remote, open_remote
from tuner.storage import opening
from tuner.urls import parse_url

SLOW_ANSWER, SLOW_COMMIT = 0.1, 0.5
CLOCK_SECONDS, AGREED_SECONDS = 2.0, 0.1
ASKED = 50
PACKAGES = {"psycopg": "psycopg", "pymysql": "PyMySQL"}


def storage(url: str, given: bool) -> Iterator[Finding]:
    """All checks of the storage at ``url``; it is left as it was."""
    if is_remote(url):
        yield from _remote(url)
        return
    parsed = parse_url(url)
    yield from _secret(parsed, given)
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite:
        yield from _file.place(parsed)
        if not _file.exists(parsed):
            return
    engine = make_engine(url)
    try:
        with opening(url), engine.connect():
            pass
    except StorageError as error:
        yield fail("storage", str(error), _reach(parsed))
        return
    try:
        yield from _open(engine)
    finally:
        engine.dispose()


def has_tables(url: str) -> bool:
    """Whether Optuna's tables are there: whoever opens a storage without them makes them.

    Raises:
        StorageError: The database cannot be reached.
    """
    if is_remote(url):
        return True
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite" and not _file.exists(parsed):
        return False
    engine = make_engine(url)
    try:
        with opening(url), engine.connect() as connection:
            return _server.optuna_version(connection) is not None
    finally:
        engine.dispose()


def _reach(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return "check that the file is a database and may be written"
    return (
        "check that the server runs, that its address and port are right and can be reached "
        "from here, and that user, password and database exist"
    )


def _secret(url: URL, given: bool) -> Iterator[Finding]:
    if url.password and given:
        yield warn(
            "password",
            "the URL in the command line holds a password: everybody on this machine can see it",
            "put the URL into TUNER_STORAGE, or the password into ~/.pgpass (PostgreSQL)",
        )


def _open(engine: Engine) -> Iterator[Finding]:
    with engine.connect() as connection:
        where = engine.url.render_as_string(hide_password=True)
        yield ok("storage", f"{where}: {_server.software(connection)}, {_driver(engine)}")
    with engine.connect() as connection:
        yield from _tables(connection)
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            yield from _file.journal(connection)
    else:
        with engine.connect() as connection:
            yield _clock(connection)
            yield _server.connections(connection)
            yield from _server.rights(connection)
    yield from _speed(engine)


def _driver(engine: Engine) -> str:
    package = PACKAGES.get(engine.dialect.driver)
    return f"{package} {metadata.version(package)}" if package else engine.dialect.driver


def _tables(connection: Connection) -> Iterator[Finding]:
    """Versions of Optuna's tables and of ours."""
    theirs, mine = _server.optuna_version(connection), version(connection)
    head = _server.optuna_head()
    if theirs is None:
        cure = "tuner create STUDY.toml makes them"
        yield warn("tables", "Optuna's and Tuner's tables are not there yet", cure)
        return
    if theirs == head:
        yield ok("tables", f"Optuna's have version {theirs}")
    else:
        cure = "optuna storage upgrade --storage URL, or the Optuna that made them"
        yield fail("tables", f"Optuna's have version {theirs}, this Optuna wants {head}", cure)
    if mine == newest():
        yield ok("tables", f"Tuner's have version {mine}")
    elif mine is None:
        cure = "tuner create STUDY.toml, or any worker, makes them"
        yield warn("tables", "Tuner's are not there yet", cure)
    elif mine < newest():
        cure = "the next tuner create or worker brings them up to date; older workers then stop"
        yield warn("tables", f"Tuner's have version {mine}, this Tuner {newest()}", cure)
    else:
        cure = "use the newer Tuner that wrote them"
        yield fail("tables", f"Tuner's have version {mine}, this Tuner knows {newest()}", cure)


def _clock(connection: Connection) -> Finding:
    before = time.time()
    theirs = read_now(connection)
    difference = theirs - (before + time.time()) / 2
    found = f"the server's is {abs(difference):.1f} s {'ahead' if difference > 0 else 'behind'}"
    if abs(difference) < AGREED_SECONDS:
        return ok("clock", "the server's and this machine's agree")
    if abs(difference) > CLOCK_SECONDS:
        cure = "leases are safe, they go by the server's; set this clock to make logs agree (NTP)"
        return warn("clock", found, cure)
    return ok("clock", found)


def _speed(engine: Engine) -> Iterator[Finding]:
    with engine.connect() as connection:
        one = sqlalchemy.text("SELECT 1")
        times = measured(ASKED, lambda: connection.execute(one).scalar())
    yield _judged("latency", f"{ASKED} questions", times, SLOW_ANSWER)
    with engine.connect() as connection:
        known = version(connection)
    if known is None:
        yield ok("commits", "not measured: there are no tables to write to")
        return
    try:
        times = commits(engine)
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        cure = "workers have to write: GRANT this role SELECT, INSERT, UPDATE, DELETE"
        yield fail("commits", f"this role cannot write: {reason}", cure)
        return
    yield _judged("commits", f"{len(times)} small ones", times, SLOW_COMMIT)


def _judged(check: str, what: str, times: list[float], slow: float) -> Finding:
    found = f"{what}: {described(times)}"
    if sorted(times)[len(times) // 2] > slow:
        cure = "each epoch costs one commit: put workers and server nearer, or train longer epochs"
        return warn(check, found, cure)
    return ok(check, found)


def _remote(url: str) -> Iterator[Finding]:
    """What can be said of a storage through the proxy."""
    try:
        behind = open_remote(url)
        ask: Callable[[], object] = partial(behind.get_study_id_from_name, "")
        times = measured(ASKED, partial(_unknown, ask))
    except (StorageError, sqlalchemy.exc.SQLAlchemyError) as error:
        yield fail("storage", str(error), "start tuner proxy there, or name the database's URL")
        return
    yield ok("storage", f"the proxy {url} answers; look at its database where the proxy runs")
    yield _judged("latency", f"{ASKED} questions through the proxy", times, SLOW_ANSWER)


def _unknown(ask: Callable[[], object]) -> None:
    try:
        ask()
    except KeyError:
        return
