"""Checkpoints: exact, atomic, and clear about broken files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tuner.checkpoint import CheckpointError, flatten_optimizer, load, restore_optimizer, save
from tuner.optim import SGD, AdamW, OptimizerComponent

OPTIMIZERS = [
    SGD(lr=0.05, momentum=0.9, nesterov=True),
    SGD(lr=0.05, momentum=0.0),
    AdamW(lr=0.01, betas=(0.8, 0.95)),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Training:
    """A small training with everything that must survive: model, optimizer, generator."""

    def __init__(self, component: OptimizerComponent, width: int = 7) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
            )
        self.optimizer = component.build(self.model)
        self.generator = torch.Generator().manual_seed(1)

    def steps(self, number: int) -> None:
        for _ in range(number):
            images = torch.randn(8, 5, generator=self.generator)
            targets = torch.randint(0, 3, (8,), generator=self.generator)
            self.optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(self.model(images), targets))
            self.optimizer.param_groups[0]["lr"] *= 0.97
            self.optimizer.step()

    def save(self, path: Path) -> None:
        state, values = flatten_optimizer(self.optimizer)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in state.items()}
        save(path, tensors | {"generator": self.generator.get_state()}, {"optimizer": values})

    def load(self, path: Path) -> None:
        tensors, meta = load(path)
        self.model.load_state_dict(strip(tensors, "model."))
        restore_optimizer(self.optimizer, strip(tensors, "optimizer."), meta["optimizer"])
        self.generator.set_state(tensors["generator"])


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("component", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("before", [0, 1, 13])
def test_training_continues_bit_for_bit_after_a_restart(
    component: OptimizerComponent, before: int, tmp_path: Path
) -> None:
    whole = Training(component)
    whole.steps(before)
    whole.save(tmp_path / "trial.safetensors")
    whole.steps(20)
    resumed = Training(component)
    resumed.generator.manual_seed(99)
    resumed.load(tmp_path / "trial.safetensors")
    resumed.steps(20)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert whole.optimizer.param_groups[0]["lr"] == resumed.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("component", OPTIMIZERS, ids=repr)
def test_restored_optimizer_has_the_state_of_the_saved_one(component: OptimizerComponent) -> None:
    saved, restored = Training(component), Training(component)
    saved.steps(3)
    restore_optimizer(restored.optimizer, *flatten_optimizer(saved.optimizer))
    expected, state = saved.optimizer.state_dict(), restored.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)


def test_optimizer_of_another_model_is_refused() -> None:
    saved, other = Training(AdamW()), Training(AdamW(), width=8)
    saved.steps(1)
    with pytest.raises(CheckpointError, match="does not fit"):
        restore_optimizer(other.optimizer, *flatten_optimizer(saved.optimizer))


def test_optimizer_with_other_groups_is_refused() -> None:
    saved, other = Training(SGD()), Training(SGD(decay_norm=True))
    saved.steps(1)
    with pytest.raises(CheckpointError, match="does not fit"):
        restore_optimizer(other.optimizer, *flatten_optimizer(saved.optimizer))


def test_views_shared_and_odd_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "strided": base[::2, 1:],
        "expanded": torch.ones(1).expand(3),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.rand(3).half(),
        "bytes": torch.Generator().get_state(),
        "mask": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.rand(2)),
    }
    save(tmp_path / "x.safetensors", tensors, {})
    loaded, _ = load(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_json_values_come_back(tmp_path: Path) -> None:
    meta = {"epoch": 3, "lr": 0.1 + 0.2, "name": "τ", "none": None, "list": [1, {"a": True}]}
    save(tmp_path / "deep" / "x.safetensors", {}, meta)
    assert load(tmp_path / "deep" / "x.safetensors") == ({}, meta)


def test_loaded_tensors_outlive_a_newer_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.ones(1000)}, {})
    loaded, _ = load(path)
    loaded["a"] += 1
    path.write_bytes(b"")
    assert loaded["a"].tolist() == [2.0] * 1000


@pytest.mark.parametrize("crash_at", ["fsync", "replace"])
def test_crash_while_saving_leaves_the_old_checkpoint(
    crash_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {"a": torch.zeros(3)}, {"epoch": 1})

    def crash(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, crash_at, crash)
    with pytest.raises(OSError, match="disk gone"):
        save(path, {"a": torch.ones(3)}, {"epoch": 2})
    tensors, meta = load(path)
    assert (tensors["a"].tolist(), meta) == ([0.0] * 3, {"epoch": 1})
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    save(path, {"a": torch.ones(100)}, {"epoch": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        load(path)


def test_foreign_and_missing_files_are_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text").write_text("hello, this is no checkpoint at all")
    for name in ("foreign.safetensors", "text", "missing"):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)
