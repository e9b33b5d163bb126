"""What is made for a GPU keeps the rules of one, shown by a device that is pretended.

The tests marked ``gpu`` run with it in a process of their own; ``make gpu`` runs all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pretended import why_not

TESTS = Path(__file__).parent
QUICK = (
    "test_images.py",
    "test_augment.py",
    "test_losses.py",
    "test_steps.py::test_step_of_every_kind_is_captured",
    "test_steps.py::test_chunk_of_steps_makes_nobody_wait",
    "test_stacks_grouped.py::test_chunk_of_a_group_makes_nobody_wait",
    "test_head_rung.py",
)


def passed(*arguments: str) -> int:
    """How many tests passed; none may do anything else."""
    command = [sys.executable, "-m", "pretended", "-q", "-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert "skipped" not in done.stdout
    return int(found[1])


@pytest.fixture(autouse=True)
def _possible() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"a GPU that is pretended {reason}")


@pytest.mark.timeout(600)
def test_device_keeps_the_rules_of_a_gpu() -> None:
    assert passed("tests/pretended/rules.py") >= 25


@pytest.mark.timeout(600)
def test_steps_losses_images_and_heads_run_as_on_a_gpu() -> None:
    assert passed("-m", "gpu", *(f"tests/{name}" for name in QUICK)) >= 30
