"""What a machine makes once: where it is kept, who makes it, and what makes room for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

ABANDONED_SECONDS = 24 * 3600
"""After so long nobody is still writing to a file."""
LOOK_SECONDS = 0.1

Stop = Callable[[], bool]


class Stopped(Exception):
    """Somebody asked to stop before it was made; nothing is wrong."""


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``TUNER_CACHE``, or the user's caches.

    A user of a container may have no home; then it is among the temporary files.
    """
    if own := os.environ.get("TUNER_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "tuner"
    try:
        return Path.home() / ".cache" / "tuner"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"tuner-{os.getuid()}"


@contextlib.contextmanager
def alone(path: Path, stop: Stop = lambda: False) -> Iterator[None]:
    """Let one process at a time look for ``path`` and make it, by a lock file beside it.

    Raises:
        OSError: The folder cannot be made or written to.
        Stopped: ``stop`` said so while another process was at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as file:
        while not _locked(file):
            time.sleep(LOOK_SECONDS)
            if stop():
                raise Stopped
        yield


def _locked(file: IO[str]) -> bool:
    """Lock a file unless another process has."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def half_written(path: Path) -> Iterator[Path]:
    """A name to write to; what is there then is put at ``path`` whole, or removed after an error.

    It is the same for everybody, so that what a killed process left is written over: only who
    holds the lock writes.
    """
    half = path.with_suffix(".half")
    try:
        yield half
        with half.open("rb") as file:
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def note_use(path: Path) -> None:
    """Note that a file was used just now: others make room before it.

    Raises:
        OSError: It is not there.
    """
    with contextlib.suppress(PermissionError):  # another user's
        os.utime(path)


def make_room(path: Path, needed: int, *, at_any_cost: bool = False) -> bool:
    """Remove what was not used for longest, so that ``needed`` bytes may be kept at ``path``.

    All files of its folder and suffix may take half of the space that they and nothing else take.
    One that is removed remains with the processes that have mapped it.

    Returns:
        Whether that half holds the new file. If it cannot, nothing is removed, or all
        ``at_any_cost``.
    """
    _remove_abandoned(path.parent)
    others = _by_use(path)
    kept = sum(size for _, size in others)
    room = (shutil.disk_usage(path.parent).free + kept) // 2
    if needed > room and not at_any_cost:
        return False
    for other, size in others:
        if kept + needed <= room:
            break
        with contextlib.suppress(PermissionError):  # another user's
            other.unlink(missing_ok=True)
            kept -= size
    return kept + needed <= room


def _remove_abandoned(folder: Path) -> None:
    for half in folder.glob("*.half"):
        with contextlib.suppress(OSError):
            if half.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                half.unlink()


def _by_use(path: Path) -> list[tuple[Path, int]]:
    """Files of the folder and suffix of ``path`` with their bytes, the longest unused first."""
    found = []
    for other in path.parent.glob(f"*{path.suffix}"):
        with contextlib.suppress(FileNotFoundError):  # another process made room just now
            facts = other.stat()
            found.append((facts.st_mtime_ns, other, facts.st_size))
    return [(other, size) for _, other, size in sorted(found)]
