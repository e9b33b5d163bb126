"""One process of a machine at a time: the others wait, and find what it made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


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
