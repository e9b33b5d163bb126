"""Addresses of storages: read, and shown without their passwords."""

from __future__ import annotations

import re
from urllib.parse import quote

import sqlalchemy
from sqlalchemy.engine import URL, make_url

from tuner.errors import StorageError

DRIVERS = {
    "sqlite": "pysqlite",
    "postgresql": "psycopg",
    "mysql": "pymysql",
    "mariadb": "pymysql",
}
UNREADABLE = "(a storage URL that cannot be parsed)"
SECRET = re.compile("pass|secret|token", re.IGNORECASE)


def parse_url(url: str) -> URL:
    """``url`` as SQLAlchemy's, with the driver that Tuner brings where none is named.

    Raises:
        StorageError: It is no database URL, or of a database that Tuner does not know.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StorageError(
            "the storage is no database URL; give sqlite:///FILE.db or "
            "postgresql+psycopg://USER@HOST/DATABASE with --storage or TUNER_STORAGE"
        ) from None
    if "@" in (parsed.host or ""):
        raise StorageError("the password in the storage URL has an @; write it as %40")
    if backend not in DRIVERS:
        raise StorageError(
            f"{backend} is no storage Tuner knows; use sqlite:///FILE.db, "
            "postgresql+psycopg://USER@HOST/DATABASE or mysql+pymysql://USER@HOST/DATABASE"
        )
    if backend == "sqlite" and parsed.host:
        path = "/".join(filter(None, (parsed.host, parsed.database)))
        raise StorageError(f"a SQLite file stands behind three slashes: sqlite:///{path}")
    if "+" not in parsed.drivername:
        parsed = parsed.set(drivername=f"{parsed.drivername}+{DRIVERS[backend]}")
    return parsed


def masked(url: str) -> str:
    """``url`` without its password, fit for messages and logs."""
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return UNREADABLE
    if "@" in (parsed.host or ""):
        return UNREADABLE
    secret = [key for key in parsed.query if SECRET.search(key)]
    return parsed.difference_update_query(secret).render_as_string(hide_password=True)


def without_password(text: str, url: URL) -> str:
    """``text`` without the passwords of ``url``, should a driver have put them there."""
    given = [str(url.password or ""), *(str(v) for k, v in url.query.items() if SECRET.search(k))]
    secrets = {form for secret in given for form in (secret, quote(secret, safe=""))}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
