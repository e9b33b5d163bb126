"""What memory the largest recipes take, with a device whose memory is made up."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import MakeFile, MakeSession

from tuner.backends import Speed
from tuner.cli import work
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.lane import Lane
from tuner.probe import CudaGauge, Need, largest, measure

GIB = 2**30


@dataclass
class FakeGauge:
    """A device of 80 GiB, one of which is taken; every recipe reserves one GiB more."""

    resets: int = 0

    def reset(self) -> None:
        self.resets += 1

    def peak(self) -> int:
        return self.resets * GIB

    def total_and_beside(self) -> tuple[int, int]:
        return 80 * GIB, GIB


def test_largest_recipes_have_every_model_and_the_largest_batches(make_file: MakeFile) -> None:
    file = make_file(
        model=None,
        training=None,
        space={
            "model": {"linear": {}, "mlp": {"width": [32, 64]}},
            "optimizer": {"sgd": {}, "adamw": {}},
            "training": {
                "single_stage": {
                    "batch_size": [32, 256, 64],
                    "precision": ["bfloat16", "float32"],
                },
                "two_stage": {"batch_size": {"low": 16, "high": 96}},
            },
            "loss": {"cross_entropy": {}, "focal": {}},
        },
    )
    recipes = list(largest(file.space))
    assert {type(r.model).__name__ for r in recipes} == {"Linear", "MLP"}
    assert {r.model.width for r in recipes if hasattr(r.model, "width")} == {32, 64}
    assert {type(r.optimizer).__name__ for r in recipes} == {"SGD", "AdamW"}
    assert {r.training.batch_size for r in recipes} == {256, 96}
    assert {r.training.precision for r in recipes} == {"float32"}
    assert len(recipes) == 3 * 2 * 2


def test_a_slot_needs_the_highest_peak_and_what_lies_beside_it(
    make_file: MakeFile, digits: Data
) -> None:
    space: dict[str, Any] = {"loss": {"cross_entropy": {}}, "model": {"linear": {}, "mlp": {}}}
    file = make_file(model=None, budget={"trials": 2, "epochs": 1}, space=space)
    gauge = FakeGauge()
    assert measure(file.space, digits, "cpu", gauge) == Need(3 * GIB, 80 * GIB)
    assert gauge.resets == 2


@pytest.mark.parametrize(
    ("images", "expected"), [(GIB // 2, (0.5 + 4 * 0.5) + 1), (10 * GIB, 40)], ids=["few", "many"]
)
def test_images_are_counted_once_for_all_lanes_and_many_are_a_quarter_of_what_is_needed(
    images: int,
    expected: float,
    make_file: MakeFile,
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space: dict[str, Any] = {"loss": {"cross_entropy": {}}}
    file = make_file(budget={"trials": 2, "epochs": 1}, space=space)
    monkeypatch.setattr(Data, "resident_bytes", images)
    beside = Speed("float32", "channels_last", 1.0, "graph", 4)
    monkeypatch.setattr("tuner.probe.chosen", lambda *_: beside)
    assert measure(file.space, digits, "cpu", FakeGauge()) == Need(int(expected * GIB), 80 * GIB)


def test_recipe_that_does_not_fit_gets_the_device_for_itself(
    make_file: MakeFile, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Lane, "step", too_large)
    assert measure(make_file().space, digits, "cpu", FakeGauge()) == Need(80 * GIB, 80 * GIB)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("tuner.slots.usable_cores", lambda: 8)


def answers(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a process that measures do something else."""
    monkeypatch.setattr(work, "_tuner", lambda: [sys.executable, "-S", "-c", code])


def test_auto_asks_a_process_on_every_gpu(
    make_session: MakeSession, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {"0": 40 * GIB, "1": 20 * GIB}
    answers(
        monkeypatch,
        f"import json, os; need = {needs}[os.environ['CUDA_VISIBLE_DEVICES']]; "
        f"print(json.dumps(dict(per_slot=need, total={100 * GIB})))",
    )
    plans = work._plans(make_session(), None, None, None, "auto", None, {})
    seen = [plan.environment["CUDA_VISIBLE_DEVICES"] for plan in plans]
    assert seen == ["0", "1", "0", "1", "1", "1"]


def test_gpu_that_cannot_be_measured_is_said_with_the_reason(
    make_session: MakeSession, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, "raise SystemExit('tuner: no data there')")
    with pytest.raises(TunerError, match=r"GPU 0 .*no data there.*give a --slots-per-gpu"):
        work._plans(make_session(), None, "0", None, "auto", None, {})


@pytest.mark.gpu
def test_memory_of_a_real_gpu_is_measured(make_file: MakeFile, digits: Data) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    need = measure(make_file().space, digits.to("cuda"), "cuda", CudaGauge("cuda"))
    assert 0 < need.per_slot < need.total
