"""Checks of a SQLite file: where it is, whether it can be written, and how it keeps its log."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import URL, Connection

from tuner.doctor._finding import Finding, fail, ok, warn
from tuner.doctor._machine import room

MOUNTS = Path("/proc/mounts")
NETWORK = {"9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"}
NETWORK |= {"ocfs2", "pvfs2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs"}


def path_of(url: URL) -> Path:
    """The file a SQLite URL names."""
    return Path(str(url.database)).absolute()


def exists(url: URL) -> bool:
    """Whether the file is there."""
    return path_of(url).exists()


def place(url: URL) -> Iterator[Finding]:
    """Where the file is, and whether it can be written there."""
    path = path_of(url)
    if not url.database or url.database == ":memory:":
        yield fail("storage", "a SQLite database in memory", "give sqlite:///FILE.db")
        return
    kind = file_system(path)
    if kind in NETWORK or kind.startswith("fuse."):
        yield fail(
            "file system",
            f"{path} is on {kind}, where SQLite's locks do not hold: results get lost",
            "use PostgreSQL, or a local disk with tuner proxy on the same machine",
        )
    else:
        yield ok("file system", f"{path} is on {kind or 'a disk'}")
    if not path.exists():
        yield warn("storage", f"{path} is not there yet", "tuner create STUDY.toml makes it")
        return
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        cure = "SQLite writes the file and its log beside it: allow both"
        yield fail("storage", f"{path} or its folder cannot be written", cure)
        return
    yield room("disk", path.parent, "the database")


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """The kind of file system a path is on; empty where the system does not say."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    best, kind = -1, ""
    for words in lines:
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), words[1])
        if path.resolve().is_relative_to(point) and len(point) >= best:
            best, kind = len(point), words[2]
    return kind


def journal(connection: Connection) -> Iterator[Finding]:
    """Whether the file keeps a write-ahead log: with it, readers and writers do not wait."""
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode == "wal":
        yield ok("journal", "a write-ahead log")
    else:
        cure = "close what holds the file open; every tuner command switches the log on"
        yield warn("journal", f"{mode} in place of a write-ahead log", cure)
