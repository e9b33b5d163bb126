"""Data sets that torchvision can download, fetched only when they are missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from tuner.alone import alone
from tuner.errors import DataError

T = TypeVar("T")


def fetch(
    name: str, load: Callable[[bool], T], *, url: str, folder: Path, allowed: bool = True
) -> T:
    """Load a data set with ``load(download)``, downloading only if it is not in ``folder``.

    Raises:
        DataError: It is not there, and could not or must not be downloaded from ``url``.
    """
    try:
        return load(False)
    except (RuntimeError, OSError) as error:  # how torchvision says that files are missing
        missing = error
    way_out = (
        f"download {url} on another machine and unpack it so that {folder} is there, or say with "
        "--data or TUNER_DATA where it is"
    )
    if not allowed:
        raise DataError(
            f"{name} is not in {folder} ({_line(missing)}); set data.download = true to fetch "
            f"it, or {way_out}"
        )
    try:
        with redirect_stdout(sys.stderr), alone(folder):
            return load(True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{name} is not in {folder} and cannot be downloaded ({_line(error)}); {way_out}. "
            'A folder of class folders works instead of it, with name = "image_folder" in [data]'
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
