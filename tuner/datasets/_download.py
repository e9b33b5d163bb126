"""Data sets that torchvision can download, fetched only when they are missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from tuner.errors import DataError

T = TypeVar("T")


def fetch(name: str, load: Callable[[bool], T], folder: Path, *, allowed: bool = True) -> T:
    """Load a data set with ``load(download)``, downloading only if it is not in ``folder``.

    Raises:
        DataError: It is not there, and could not or must not be downloaded.
    """
    try:
        return load(False)
    except (RuntimeError, OSError) as error:  # how torchvision says that files are missing
        missing = error
    way_out = (
        f"put the files that torchvision expects into {folder} on a machine that is online, "
        "or say with --data or TUNER_DATA which folder has them"
    )
    if not allowed:
        raise DataError(
            f"{name} is not in {folder} ({missing}); set data.download = true to fetch it, "
            f"{way_out}"
        )
    try:
        with redirect_stdout(sys.stderr):
            return load(True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} is not in {folder} and cannot be downloaded ({error}); {way_out}"
        ) from error
