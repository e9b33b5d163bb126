"""Out of memory: the slot trains on in smaller pieces, and the study goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import MakeSession
from fleet import lease, run_alone, run_next, slot

from tuner.backends import Speed
from tuner.datasets import Data
from tuner.recipe import Recipe
from tuner.rungs import full, training
from tuner.rungs.memory import is_out_of_memory, smaller
from tuner.steps import Execution
from tuner.trainer import epochs_in_turns


def with_room_for(images: int, error: Exception) -> Any:
    """A trainer on a device that holds so many images at once."""

    def train(*arguments: Any, **options: Any) -> Iterator[Any]:
        if (options.get("micro_batch") or 10**9) > images:
            raise error
        yield from epochs_in_turns(*arguments, **options)

    return train


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()])
def test_slot_halves_what_it_trains_at_once_and_remembers(
    error: Exception, make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "epochs_in_turns", with_room_for(20, error))
    session = make_session()
    claimed = lease(session)
    assert claimed is not None
    own = slot(session, digits, claimed)
    assert run_alone(own, claimed).state == "complete"
    assert [*own.pieces.values()] == [16]
    assert session.study.trials[0].user_attrs["micro_batch"] == 16
    again = lease(session)
    assert again is not None
    assert run_alone(own, again).state == "complete"
    assert [*own.pieces.values()] == [16]


def test_pieces_of_a_model_that_did_not_fit_are_nothing_to_another_model(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    claimed = lease(session)
    assert claimed is not None
    own = slot(session, digits, claimed)
    own.pieces["a larger one"] = 2
    assert run_alone(own, claimed).state == "complete"
    assert "micro_batch" not in session.study.trials[0].user_attrs


def test_group_that_does_not_fit_has_fewer_seats_before_it_has_smaller_pieces(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int, int | None]] = []

    def found(recipe: Recipe, data: Data, device: str, most: int | None = None) -> Speed:
        training, seats = recipe.training, min(8, most or 8)
        way: Execution = "grouped" if seats > 1 else "plain"
        return Speed(training.precision, training.layout, 1.0, way, seats)

    def train(*arguments: Any, **options: Any) -> Iterator[Any]:
        tried.append((options["execution"], options["seats"], options["micro_batch"]))
        if options["seats"] > 2:
            raise CUDA
        yield from epochs_in_turns(*arguments, **options)

    monkeypatch.setattr(full, "chosen", found)
    monkeypatch.setattr(training, "epochs_in_turns", train)
    session = make_session()
    claimed = lease(session)
    assert claimed is not None
    own = slot(session, digits, claimed)
    assert run_alone(own, claimed).state == "complete"
    assert tried == [("grouped", 8, None), ("grouped", 4, None), ("grouped", 2, None)]
    assert (own.most, own.side_by_side, own.pieces) == (2, 2, {})


def test_result_in_pieces_is_that_in_one_piece_for_a_model_without_batch_norm(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_session()
    run_next(whole, digits)
    monkeypatch.setattr(training, "epochs_in_turns", with_room_for(20, CUDA))
    pieces = make_session(name="pieces")
    run_next(pieces, digits)
    values = [s.study.trials[0].intermediate_values for s in (whole, pieces)]
    assert values[0] == pytest.approx(values[1], abs=0.02)


def test_trial_that_never_fits_fails_with_the_reason_and_the_study_goes_on(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    with monkeypatch.context() as patched:
        patched.setattr(training, "epochs_in_turns", with_room_for(0, CUDA))
        outcome = run_next(session, digits)
    assert (outcome.state, outcome.reason) == ("failed", "out_of_memory")
    assert session.ledger.attempts()[0]["reason"] == "out_of_memory"
    assert run_next(session, digits).state == "complete"


def test_pieces_are_halved_down_to_two_images() -> None:
    sizes, size = [], smaller(None, 64)
    while size is not None:
        sizes.append(size)
        size = smaller(size, 64)
    assert sizes == [32, 16, 8, 4, 2]
    assert smaller(512, 64) == 32, "what is known of a larger batch says nothing of this one"


def test_error_of_another_kind_is_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.long
def test_machine_that_really_has_no_memory_left_says_so_in_words_that_are_known() -> None:
    code = (
        "import resource, torch; from tuner.rungs.memory import is_out_of_memory\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try:\n    torch.zeros(2**30)\n"
        "except Exception as error:\n    print(is_out_of_memory(error), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout
