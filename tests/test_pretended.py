"""What is made for a GPU keeps the rules of one, shown by a device that is pretended.

Tests marked ``gpu`` run with it in a process of their own; ``make gpu`` runs all of them.
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
    "pretended/rules.py",
    "test_images.py",
    "test_residence.py",
    "test_augment.py",
    "test_losses.py",
    "test_steps.py::test_step_of_every_kind_is_captured",
    "test_steps.py::test_chunk_of_steps_makes_nobody_wait",
    "test_steps.py::test_plain_step_makes_nobody_wait",
    "test_stacks_grouped.py::test_chunk_of_a_group_makes_nobody_wait",
    "test_head_rung.py",
    "test_trainer_interruption.py::"
    "test_validation_left_out_on_the_gpu_is_taken_up_with_the_losses_of_its_epoch",
)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_is_made_for_a_gpu_keeps_its_rules() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"a GPU that is pretended {reason}")
    command = [sys.executable, "-m", "pretended", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in QUICK)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None
    assert int(found[1]) >= 60
    assert "skipped" not in done.stdout
