"""Memory that the C library keeps for the next step instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**30
MOST_BEFORE_2_35 = 2**25
SETTINGS = ("mmap_threshold", "trim_threshold", "mmap_max", "top_pad")


@cache
def keep_memory(device: str = "cpu") -> bool:
    """Let the C library keep up to ``KEPT`` bytes that are free; whether it does, asked once.

    Training and evaluating take and free the same large maps in every step: those above 32 MiB
    came anew from the system each time, zeroed page by page, and took up to twice as long.
    It acts on the whole process, for the sake of trainings on the processor: maps of another
    ``device`` come from elsewhere. Another library than glibc is left alone, and so is one that the
    environment gave thresholds: ``MALLOC_MMAP_THRESHOLD_`` and the like, or ``GLIBC_TUNABLES``.
    """
    found = None if device != "cpu" or is_set(os.environ) else _mallopt()
    return found is not None and set_thresholds(found)


def is_set(environment: Mapping[str, str]) -> bool:
    """Whether somebody has decided already when memory is given back."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    return any(
        f"MALLOC_{name.upper()}_" in environment or f"glibc.malloc.{name}=" in tunables
        for name in SETTINGS
    )


def set_thresholds(mallopt: Callable[[int, int], int]) -> bool:
    """Set both thresholds, or none: the second alone would keep the first at 128 KiB."""
    largest = any(mallopt(M_MMAP_THRESHOLD, size) for size in (KEPT, MOST_BEFORE_2_35))
    return largest and bool(mallopt(M_TRIM_THRESHOLD, KEPT))


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's own; None where there is none."""
    try:
        library = ctypes.CDLL(None)
        _ = library.gnu_get_libc_version
        found: Callable[[int, int], int] = library.mallopt
    except (AttributeError, OSError, TypeError):
        return None
    return found
