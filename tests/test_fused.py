"""Fused batch norms compute what the layers one by one compute, for any model that has some."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_cases import recipe, trained

from tuner import fused as package
from tuner.backends import speeds
from tuner.datasets import Data
from tuner.fused import FusedPasses, fused
from tuner.fused._norm import FusedNorm
from tuner.lane import Lane
from tuner.models import MODELS

CLASSES = 10


class Tutorial(nn.Module):
    """Convolution, batch norm, ReLU, pooling, as functions; ``order`` is how they follow."""

    def __init__(self, order: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        maps = self.convolution(images)
        logits: Tensor = self.head(self.order(self.norm(maps), maps * 0.5).mean((2, 3)))
        return logits


def _pooled_twice(normed: Tensor, _: Tensor) -> Tensor:
    return F.max_pool2d(F.max_pool2d(F.relu(normed), 2, stride=2), 2)


def _into_another(normed: Tensor, other: Tensor) -> Tensor:
    """The norm is added to what is needed again."""
    kept = other
    other += normed
    return F.relu(other) + kept


def _disturbed(normed: Tensor, other: Tensor) -> Tensor:
    """What is added changes before the sum is used."""
    both = normed + other
    other.mul_(3.0)
    return F.relu(both) + other


def _summed_under_two_names(normed: Tensor, other: Tensor) -> Tensor:
    kept = normed
    normed += other
    return F.relu(normed) + kept


def _normed_twice(normed: Tensor, other: Tensor) -> Tensor:
    return normed.relu() + torch.sigmoid(normed) * other


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu, pooling": lambda normed, _: F.max_pool2d(F.relu(normed), 2),
    "pooling, relu": lambda normed, _: torch.relu(F.max_pool2d(normed, kernel_size=2)),
    "pooling alone": lambda normed, _: F.max_pool2d(normed, 2),
    "pooling by three": lambda normed, _: F.relu(F.max_pool2d(normed, 3, 2, 1)),
    "pooled twice": _pooled_twice,
    "sum, relu": lambda normed, other: F.relu(normed + other),
    "sum the other way": lambda normed, other: F.relu(torch.add(other, normed)),
    "twice the sum": lambda normed, other: F.relu(torch.add(normed, other, alpha=2)),
    "sum alone": lambda normed, other: normed + other,
    "relu, sum": lambda normed, other: F.relu(normed) + other,
    "a number added": lambda normed, _: F.relu(normed + 1.0),
    "doubled": lambda normed, _: F.relu(normed + normed),
    "added to another in place": _into_another,
    "summed under two names": _summed_under_two_names,
    "disturbed": _disturbed,
    "needed twice": _normed_twice,
    "leaky": lambda normed, _: F.leaky_relu(normed),
    "nothing": lambda normed, _: normed,
}


def model_of(name: str, size: int) -> nn.Module:
    """One of Tuner's models, torchvision's, or the tutorials'; norms that are far from plain."""
    torch.manual_seed(3)
    model: nn.Module
    if name in ORDERS:
        model = Tutorial(ORDERS[name])
    elif name == "torchvision":
        from torchvision.models import resnet18

        model = resnet18(num_classes=CLASSES)
    else:
        made = MODELS.parse(name, {}, where="model")
        model = made.build(CLASSES, (3, size, size))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    last: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return last


def passed(
    model: nn.Module, by: nn.Module, size: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, list[Tensor]]:
    """Logits, gradients and buffers of ``model`` after a pass ``by`` it, in float64."""
    torch.manual_seed(4)
    images = torch.randn(12, 3, size, size).to(next(model.parameters()).dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = by(images)
    loss = F.cross_entropy(logits.to(images.dtype), torch.arange(12) % CLASSES)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters()]
    return {
        "logits": [logits.detach().double()],
        "gradients": [torch.zeros(1) if each is None else each.double() for each in gradients],
        "buffers": [buffer.double() for buffer in model.buffers()],
    }


def fused_pass(model: nn.Module) -> nn.Module:
    """The pass of a model that has norms to fuse."""
    made = fused(model)
    assert made is not None
    return made


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Relative distance of all together."""
    away = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return float((away / sum(float(each.square().sum()) for each in expected)) ** 0.5)


def fused_norms(model: nn.Module) -> list[FusedNorm]:
    """What was fused in a model."""
    return [module for module in fused_pass(model).modules() if isinstance(module, FusedNorm)]


CASES = [("small_cnn", 16), ("small_cnn", 15), ("resnet20", 16), ("torchvision", 33)]
CASES += [(order, 12) for order in ORDERS]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_training_pass_agrees_with_float64_as_well_as_the_layers_do(name: str, size: int) -> None:
    model = model_of(name, size)
    exact = copy.deepcopy(model).double()
    expected = passed(exact, exact, size)
    made = fused_pass(model)
    found = passed(model, made, size)
    for what, limit in (("logits", 1e-5), ("gradients", 1e-4), ("buffers", 1e-6)):
        assert apart(found[what], expected[what]) < limit, what


@pytest.mark.parametrize(("name", "size"), CASES)
def test_in_bfloat16_it_is_no_further_from_float64_than_the_layers_are(
    name: str, size: int
) -> None:
    model = model_of(name, size)
    exact, layers = copy.deepcopy(model).double(), copy.deepcopy(model)
    expected = passed(exact, exact, size)
    by_layers = passed(layers, layers, size, dtype=torch.bfloat16)
    made = fused_pass(model)
    found = passed(model, made, size, dtype=torch.bfloat16)
    for what in found:
        distance = apart(by_layers[what], expected[what])
        assert apart(found[what], expected[what]) < 1.6 * distance + 1e-6, what


@pytest.mark.parametrize(("name", "size"), CASES)
def test_evaluation_agrees_with_the_layers(name: str, size: int) -> None:
    model = model_of(name, size).eval()
    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    made = fused_pass(model)
    with torch.inference_mode():
        torch.testing.assert_close(made(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pools", "positive"),
    [
        ("relu, pooling", True, True),
        ("pooling, relu", True, True),
        ("pooled twice", True, True),
        ("pooling alone", False, False),
        ("pooling by three", False, False),
        ("sum, relu", False, True),
        ("sum the other way", False, True),
        ("twice the sum", False, False),
        ("relu, sum", False, True),
        ("added to another in place", False, False),
        ("summed under two names", False, False),
        ("disturbed", False, False),
        ("needed twice", False, False),
        ("leaky", False, False),
    ],
)
def test_as_much_is_fused_as_changes_nothing(name: str, pools: bool, positive: bool) -> None:
    (norm,) = fused_norms(model_of(name, 12))
    assert (norm.pools, norm.positive) == (pools, positive)


def test_all_norms_of_known_models_are_fused() -> None:
    assert [norm.pools for norm in fused_norms(model_of("small_cnn", 16))] == [True, True, False]
    assert all(norm.positive for norm in fused_norms(model_of("resnet20", 16)))
    assert len(fused_norms(model_of("torchvision", 32))) == 20


@pytest.mark.parametrize("name", ["relu, pooling", "sum, relu"])
def test_norms_may_have_negative_weights(name: str) -> None:
    model = model_of(name, 12)
    with torch.no_grad():
        model.norm.weight[::2] *= -1  # type: ignore[union-attr, operator, index]
    exact = copy.deepcopy(model).double()
    expected = passed(exact, exact, 12)
    made = fused_pass(model)
    found = passed(model, made, 12)
    assert all(apart(found[what], expected[what]) < 1e-4 for what in found)


def test_statistics_of_maps_far_from_zero_are_exact() -> None:
    norm = nn.BatchNorm2d(3, momentum=1.0)
    maps = 1000 + torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    maps = maps.contiguous(memory_format=torch.channels_last)
    FusedNorm(norm)(maps)
    values = maps.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, values.mean(1).float())
    torch.testing.assert_close(norm.running_var, values.var(1).float())
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["relu, pooling", "sum, relu", "nothing"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_has_diverged_stays_so(name: str, training: bool, value: float) -> None:
    model = model_of(name, 12).train(training)
    made = fused_pass(model)
    images = torch.randn(4, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    images[1, :, 5, 5] = value
    with torch.no_grad():
        assert not made(images)[1].isfinite().all()


@pytest.mark.parametrize(
    "maps",
    [
        torch.randn(4, 16, 6, 6),
        torch.randn(4, 16, 6, 6).half().contiguous(memory_format=torch.channels_last),
        torch.randn(4, 16, 6, 6).contiguous(memory_format=torch.channels_last)[:, :, :4],
    ],
    ids=["contiguous", "float16", "a part of larger maps"],
)
def test_maps_that_lie_otherwise_are_left_to_the_layers(maps: Tensor) -> None:
    norm = nn.BatchNorm2d(16).to(maps.dtype)
    expected = F.relu(copy.deepcopy(norm)(maps))
    assert torch.equal(FusedNorm(norm, positive=True)(maps), expected)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
def test_unusual_norms_are_left_to_the_layers(options: dict[str, Any]) -> None:
    norm = nn.BatchNorm2d(3, **options)
    other = copy.deepcopy(norm)
    maps = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert torch.equal(FusedNorm(norm)(maps), other(maps))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_pooling_without_relu_leaves_what_is_negative(added: bool, training: bool) -> None:
    norm = nn.BatchNorm2d(3).train(training)
    maps = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = F.max_pool2d(copy.deepcopy(norm)(maps), 2)
        more = torch.randn_like(expected) if added else None
        found = FusedNorm(norm, pools=True)(maps, more)
    torch.testing.assert_close(found, expected if more is None else expected + more)


def test_maps_that_cannot_be_added_after_pooling_are_refused() -> None:
    maps = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="must match"):
        FusedNorm(nn.BatchNorm2d(3), pools=True, positive=True)(maps, maps)


def test_frozen_norm_hands_gradients_on() -> None:
    model = model_of("relu, pooling", 12).eval()
    layers = copy.deepcopy(model)
    made = fused_pass(model)
    found, expected = passed(model, made, 12), passed(layers, layers, 12)
    assert all(apart(found[what], expected[what]) < 1e-6 for what in found)


class Choosy(nn.Module):
    """Looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        normed: Tensor = self.norm(images)
        return normed if normed.mean() > 0 else -normed


def test_norm_that_is_called_in_an_unusual_way_is_left_alone() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return F.relu(self.norm(input=images))

    model, images = Named(), torch.randn(4, 3, 6, 6)
    made = fused_pass(model)
    assert torch.equal(made(images), copy.deepcopy(model)(images))


def test_model_that_looks_at_values_or_has_no_norms_is_left_alone() -> None:
    assert fused(Choosy()) is None
    assert fused(nn.Linear(3, 2)) is None


def test_training_with_fused_norms_ends_near_that_without(digits: Data) -> None:
    parts: dict[str, Any] = {"model": {"name": "small_cnn"}, "length": 2}
    layers = trained(recipe(**parts, training={"batch_size": 64}), digits)
    fusing = recipe(**parts, training={"batch_size": 64, "layout": "fused"})
    found = trained(fusing, digits)
    torch.testing.assert_close(found.logits[0], layers.logits[0], rtol=0.02, atol=0.02)
    assert not torch.equal(found.logits[-1], layers.logits[-1]), "nothing was fused"


@pytest.mark.parametrize("micro_batch", [None, 13])
def test_steps_in_chunks_too_are_those_of_the_layers(digits: Data, micro_batch: int | None) -> None:
    def after(layout: str) -> Lane:
        training = {"batch_size": 64, "layout": layout}
        which = recipe(model={"name": "small_cnn"}, training=training)
        lane = Lane(which, digits, "cpu", micro_batch=micro_batch)
        lane.begin_epoch()
        for indices, images in lane.images(lane.plan()[:2]):
            lane.step(indices, images, share=0.0)
        return lane

    expected, found = after("channels_last").model.state_dict(), after("fused").model.state_dict()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def fusing_lane(digits: Data) -> Lane:
    which = recipe(model={"name": "small_cnn"}, training={"batch_size": 64, "layout": "fused"})
    return Lane(which, digits, "cpu")


def test_without_the_compiler_or_with_more_threads_the_layout_is_channels_last(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(fusing_lane(digits).fused, FusedPasses)
    try:
        torch.set_num_threads(2)
        lane = fusing_lane(digits)
        assert lane.fused is None
    finally:
        torch.set_num_threads(1)
    package._are_there.cache_clear()
    monkeypatch.setitem(sys.modules, "tuner.fused._kernels", None)
    lane = fusing_lane(digits)
    package._are_there.cache_clear()
    assert lane.fused is None
    weight = lane.model.backbone[4].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_probe_measures_fused_norms_where_there_are_some(
    digits: Data, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    found = {
        model: {speed.layout for speed in speeds(recipe(model={"name": model}), digits, "cpu")}
        for model in ("mlp", "small_cnn")
    }
    assert found["mlp"] == {"channels_last", "contiguous"}
    assert found["small_cnn"] == {"channels_last", "contiguous", "fused"}
