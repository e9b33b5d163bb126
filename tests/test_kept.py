"""A process that trains keeps the memory of its maps, unless its user has decided otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.kept import KEPT, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, MOST_BEFORE_2_35, set_thresholds

MAPPED = """
import ctypes

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("arena", "ordblks", "smblks", "hblks", *"123456")]

library = ctypes.CDLL(None)
library.mallinfo.restype = Mallinfo
library.malloc.restype = ctypes.c_void_p
before = library.mallinfo().hblks
assert library.malloc(ctypes.c_size_t(24 * 2**20))
print(library.mallinfo().hblks - before)
"""
"""Prints how many maps of their own 24 MiB take."""

TRAINING = """
from trainer_cases import recipe
from tuner.lane import Lane
from tuner.recipe import parse_part
data = parse_part("data", {"name": "digits"}, where="here").build()
Lane(recipe(), data, "cpu")
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def maps(code: str, **environment: str) -> int:
    """Maps of their own that a process has after ``code``."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    here = Path(__file__).parent
    paths = {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run(
        [sys.executable, "-c", code + MAPPED],
        env=settings | paths | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.long
def test_a_training_on_the_processor_keeps_memory_in_whatever_process() -> None:
    assert maps("") == 1
    assert maps(TRAINING) == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_environment_says_of_memory_stands(environment: dict[str, str]) -> None:
    keep = "from tuner.kept import keep_memory\nassert keep_memory() is {}\n"
    assert maps(keep.format(True)) == 0
    assert maps(keep.format(False), **environment) == 1


def test_a_glibc_that_takes_no_large_threshold_gets_its_largest() -> None:
    asked: list[tuple[int, int]] = []

    def older(name: int, value: int) -> int:
        asked.append((name, value))
        return int(name != M_MMAP_THRESHOLD or value <= MOST_BEFORE_2_35)

    assert set_thresholds(older)
    assert asked[1:] == [(M_MMAP_THRESHOLD, MOST_BEFORE_2_35), (M_TRIM_THRESHOLD, KEPT)]


def test_without_one_threshold_the_other_is_not_set_either() -> None:
    def refusing(name: int, value: int) -> int:
        assert name == M_MMAP_THRESHOLD
        return 0

    assert not set_thresholds(refusing)
