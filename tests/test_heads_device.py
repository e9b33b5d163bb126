"""The head rung's engine on other devices than the CPU, as far as a CPU can tell, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from head_cases import SETTINGS, head_recipe, loss_table, pixel_features, unlike
from test_heads import DIVERGING, MIXED, OWN, identical
from torch.overrides import TorchFunctionMode

from tuner.datasets import Data
from tuner.heads import Features, HeadResult, HeadTraining, _lane, _own, _shared, _work, train_heads
from tuner.recipe import Recipe

LANES = 16
KINDS = [
    *MIXED,
    head_recipe(loss_table("weighted_asymmetric", 1)),
    head_recipe(loss_table("label_aware_smoothing", 2), "class_aware"),
    head_recipe(loss_table("equalization", 3), "class_aware"),
    head_recipe(loss_table("fnr_adaptive", 4), "class_aware", sampling={"start": 0.5}),
]
WITH_ROWS = [recipe for recipe in KINDS if getattr(recipe.loss, "mode", "") != "reference"]
STEPS: list[tuple[Any, str]] = [
    (_own._Bench, "_step"),
    (_lane.Chunk, "batch"),
    (_work.Material, "inputs"),
    (_work.Material, "hits"),
]
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "nonzero")

both_batches = pytest.mark.parametrize("settings", [SETTINGS, OWN], ids=["shared", "own"])


@pytest.fixture(scope="module")
def features(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return pixel_features(digits, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def odd(features: Features) -> Features:
    """Features whose number fills no line."""
    train, validation = features.train[..., 10:47], features.validation[:, 10:47]
    return replace(features, train=train, validation=validation)


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


def trained(
    recipes: Sequence[Recipe],
    features: Features,
    data: Data,
    settings: HeadTraining,
    **options: Any,
) -> list[HeadResult]:
    """Results in the order of the recipes, of stacks of the same size."""
    found = dict(train_heads(recipes, features, data, settings, **{"lanes": LANES} | options))
    return [found[index] for index in range(len(recipes))]


def around(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, context: Callable[[], Any]
) -> None:
    """Run a function of ``owner`` inside of a context."""
    plain = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        with context():
            return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


# On the CPU


class Unread(TorchFunctionMode):
    """Nothing that a tensor holds may become a number of the program."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert getattr(func, "__name__", "") not in READING, f"{func} reads a tensor"
        return func(*args, **(kwargs or {}))


@contextmanager
def elsewhere() -> Iterator[None]:
    """Refuse to read tensors, and to mix them with new ones that were not told their device."""
    with torch.device("meta"), Unread():
        yield


@both_batches
def test_steps_make_tensors_where_the_lanes_are_and_read_none(
    settings: HeadTraining, features: Features, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = trained(WITH_ROWS, features, digits, settings)
    for owner, name in [*STEPS, (_shared._Wave, "_step"), (_shared._Wave, "_batch")]:
        around(monkeypatch, owner, name, elsewhere)
    found = trained(WITH_ROWS, features, digits, settings)
    assert all(identical(a, b) for a, b in zip(found, calm, strict=True))


@both_batches
def test_idle_lanes_and_inputs_made_ahead_change_no_bit(
    settings: HeadTraining, features: Features, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: stacks of one size, and the inputs of three steps at once."""
    plain = trained(KINDS, features, digits, settings, lanes=3)
    for module in (_work, _own):
        monkeypatch.setattr(module, "seats", lambda number, lanes, device: lanes)
    monkeypatch.setattr(_work, "at_once", lambda numbers, device: 3)
    idle = trained(KINDS, features, digits, settings, lanes=3)
    assert all(identical(a, b) for a, b in zip(plain, idle, strict=True))


def test_features_are_not_copied_to_where_they_are(features: Features) -> None:
    there = features.to("cpu")
    assert there.train.data_ptr() == features.train.data_ptr()
    assert there.validation.data_ptr() == features.validation.data_ptr()


# On a GPU


@pytest.mark.gpu
@both_batches
def test_gpu_trains_as_the_cpu_does(
    settings: HeadTraining, features: Features, digits: Data, gpu: str
) -> None:
    exact = {"dtype": torch.float64}
    expected = trained(KINDS, features, digits, settings, **exact)
    found = trained(KINDS, features.to(gpu), digits.to(gpu), settings, device=gpu, **exact)
    for recipe, a, b in zip(KINDS, found, expected, strict=True):
        assert a.logits.device.type == a.weight.device.type == "cpu"
        assert unlike(a.weight, b.weight) < 1e-8, recipe.loss
        assert unlike(a.logits, b.logits) < 1e-6, "they come in float32"
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-8)
        if a.bias is not None and b.bias is not None:
            assert unlike(a.bias, b.bias) < 1e-8


@pytest.mark.gpu
@both_batches
@pytest.mark.parametrize("width", ["whole", "odd"])
def test_recipe_gives_the_same_bits_on_the_gpu_alone_and_in_company(
    settings: HeadTraining, width: str, features: Features, odd: Features, digits: Data, gpu: str
) -> None:
    there = (features if width == "whole" else odd).to(gpu)
    settings = replace(settings, batch_size=50 if width == "odd" else 64)
    alone = [trained([recipe], there, digits, settings, device=gpu)[0] for recipe in KINDS]
    company = trained([*KINDS[::-1], *KINDS] * 2, there, digits, settings, device=gpu)
    for result, expected in zip(company, [*alone[::-1], *alone] * 2, strict=True):
        assert identical(result, expected)


@pytest.mark.gpu
@both_batches
def test_diverged_lane_leaves_its_neighbours_on_the_gpu_alone(
    settings: HeadTraining, features: Features, digits: Data, gpu: str
) -> None:
    recipes = [MIXED[0], head_recipe(DIVERGING), *MIXED[1:3]]
    first, diverged, *rest = trained(recipes, features, digits, settings, device=gpu)
    calm = trained([MIXED[0], *MIXED[1:3]], features, digits, settings, device=gpu)
    assert diverged.diverged
    assert not any(result.diverged for result in calm)
    assert all(identical(a, b) for a, b in zip([first, *rest], calm, strict=True))


@contextmanager
def unwaited() -> Iterator[None]:
    """Refuse to wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@both_batches
def test_no_step_waits_for_the_gpu(
    settings: HeadTraining,
    features: Features,
    digits: Data,
    gpu: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = features.to(gpu)
    calm = trained(WITH_ROWS, there, digits, settings, device=gpu)
    for owner, name in [*STEPS, (_shared._Wave, "_epoch"), (_own, "chunk_of")]:
        around(monkeypatch, owner, name, unwaited)
    asked = iter(range(10**9))
    found = trained(WITH_ROWS, there, digits, settings, device=gpu, stop=lambda: next(asked) < 0)
    assert all(identical(a, b) for a, b in zip(found, calm, strict=True))
    assert next(asked) > 100, "each step asks whether to stop"
