"""What a machine makes once: where it is kept, and one process at a time that makes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``TUNER_CACHE``, or the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TUNER_CACHE") or Path(home) / "tuner")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let one process at a time look for ``path`` and make it, by a lock file beside it.

    Raises:
        OSError: The folder cannot be made or written to.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
