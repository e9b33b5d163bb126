"""A store in a folder: files that appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuner.stores._base import NotThere, Store, StoreError

STALE_SECONDS = 3600.0
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)


@dataclass(frozen=True)
class FolderStore(Store):
    """Keys are paths below ``root``; folders are made when needed and removed when empty."""

    root: Path

    def check(self) -> None:
        """Refuse a root that is a file or below one, or that cannot be written to."""
        there = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        with self._named("use", ""):
            if not there.is_dir():
                raise NotADirectoryError(f"{there} is a file")
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(f"{there} is not writable")

    def read(self, key: str) -> bytes:
        """See ``Store``."""
        with self._named("read", key):
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                raise NotThere(self.place(key)) from None

    def write(self, key: str, content: bytes) -> None:
        """See ``Store``."""
        path = self.root / key
        with self._named("write", key):
            write_whole(path, content)
        _sweep(path.parent)

    def remove(self, key: str) -> None:
        """See ``Store``."""
        path = self.root / key
        with self._named("remove", key):
            path.unlink(missing_ok=True)
        _sweep(path.parent)
        with contextlib.suppress(OSError):
            path.parent.rmdir()

    def keys(self, prefix: str = "") -> list[str]:
        """See ``Store``."""
        top = self.root / prefix.rpartition("/")[0]
        with self._named("list", prefix):
            paths = [
                Path(folder, name)
                for folder, _, names in os.walk(top, onerror=_unless_missing)
                for name in names
                if not TEMPORARY.fullmatch(name)
            ]
        keys = [path.relative_to(self.root).as_posix() for path in paths]
        return sorted(key for key in keys if key.startswith(prefix))

    def within(self, prefix: str) -> FolderStore:
        """See ``Store``."""
        return FolderStore(self.root / prefix)

    def __str__(self) -> str:
        return str(self.root)

    @contextlib.contextmanager
    def _named(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"cannot {verb} {self.place(key)}: {error.strerror or error}; mend that, or name "
                "another place with --artifacts or TUNER_ARTIFACTS"
            ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete and on disk.

    Missing folders are made. A crash at any moment leaves the earlier file of that name.

    Raises:
        OSError: It cannot be written; the earlier file is still there.
    """
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system can; Windows cannot open folders like this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while writing have left half written."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
