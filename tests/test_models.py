"""Models: sizes, heads, gradients, initial weights, images of every size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from model_cases import SMALL, build, check_learns, component, noise
from torch import Tensor, nn

from tuner.errors import TunerError
from tuner.models import MODELS, CosineHead, set_head_bias
from tuner.models._layers import GlobalMean, subsampled
from tuner.models._resnet import Block
from tuner.seeding import generator, seeded


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", SMALL)
def test_own_models_train_on_digits_fashion_and_cifar_sizes(
    name: str, shape: tuple[int, int, int], head: Literal["linear", "cosine"]
) -> None:
    check_learns(build(name, shape, 7, head), shape, 7)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("resnet20", (3, 32, 32), 269_722),
        ("resnet32", (3, 32, 32), 464_154),
        ("resnet56", (3, 32, 32), 853_018),
        ("small_cnn", (1, 28, 28), 24_058),
        ("linear", (1, 28, 28), 7_850),
        ("mlp", (1, 28, 28), 203_530),
    ],
)
def test_models_have_the_published_number_of_parameters(
    name: str, shape: tuple[int, int, int], count: int
) -> None:
    assert parameters(build(name, shape)) == count


def test_mlp_and_cnn_grow_with_width_and_depth() -> None:
    assert build("mlp", width=64, depth=3).head.weight.shape == (10, 64)
    hidden = build("mlp", (1, 8, 8), width=64, depth=3, dropout=0.5).backbone.modules()
    kinds = [type(m) for m in hidden]
    assert kinds.count(nn.Linear) == kinds.count(nn.Dropout) == 3
    assert build("small_cnn", width=8, depth=4).head.weight.shape == (10, 64)


def test_pooling_before_relu_changes_nothing() -> None:
    model = build("small_cnn", (1, 28, 28)).eval()
    images = noise(3, 1, 28, 28)
    result = images
    for layer in model.backbone.children():
        if isinstance(layer, nn.BatchNorm2d):
            result = F.relu(layer(result))
        elif not isinstance(layer, nn.ReLU):
            result = layer(result)
    assert torch.equal(model.features(images), result.flatten(1))


def test_residual_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros() -> None:
    block = Block(2, 6, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    images = noise(2, 2, 7, 8).abs()
    expected = torch.zeros(2, 6, 4, 4)
    expected[:, 2:4] = images[:, :, ::2, ::2]
    assert torch.equal(block(images), expected)


def test_residual_networks_start_with_kaiming_weights() -> None:
    for module in build("resnet56").modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_in = module.in_channels * 9
            assert float(module.weight.detach().std()) == pytest.approx(
                math.sqrt(2 / fan_in), rel=0.05
            )


@pytest.mark.parametrize("name", [*SMALL, "torchvision", "timm"])
def test_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        with seeded(seed):
            states.append(component(name).build(5, (3, 32, 32)).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


@pytest.mark.parametrize("name", [*SMALL, "torchvision"])
def test_build_draws_on_without_reseeding(name: str) -> None:
    with seeded(1):
        first, second = (component(name).build(5, (3, 32, 32)) for _ in range(2))
    assert not torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("name", [*SMALL, "torchvision"])
def test_fresh_model_is_in_training_mode_and_has_seen_no_image(name: str) -> None:
    model = build(name)
    assert all(module.training for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert not module.running_mean.any()


@pytest.mark.parametrize("name", [*SMALL, "torchvision"])
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model = build(name).eval()
    images = noise(4, 3, 32, 32)
    expected = model(images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_cosine_head_gives_cosines() -> None:
    head = CosineHead(6, 4)
    features = noise(5, 6)
    expected = F.cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(9 * features), expected)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4))
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_head_bias_can_start_a_sigmoid_head_at_one_in_c() -> None:
    model = build("linear", classes=20)
    set_head_bias(model, -math.log(19))
    nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(torch.sigmoid(model(noise(2, 3, 32, 32))), torch.full((2, 20), 0.05))


def test_cosine_head_refuses_a_bias() -> None:
    with pytest.raises(ValueError, match="CosineHead has no bias"):
        set_head_bias(build("linear", head="cosine"), 0.1)


def test_small_cnn_says_when_images_are_too_small_for_its_depth() -> None:
    with pytest.raises(TunerError, match="'small_cnn' cannot take images of 8x8 pixels"):
        build("small_cnn", (1, 8, 8), depth=5)


def test_every_component_says_what_it_is() -> None:
    for name in MODELS:
        assert MODELS[name].__doc__


def test_every_second_pixel_is_taken_as_by_slicing() -> None:
    maps = torch.rand(3, 4, 7, 6, generator=generator("maps"))
    assert torch.equal(subsampled(maps, 2), maps[:, :, ::2, ::2])


def test_mean_over_the_pixels_is_that_of_each_map() -> None:
    maps = torch.rand(3, 4, 7, 6, generator=generator("maps"))
    torch.testing.assert_close(GlobalMean()(maps), maps.mean((2, 3)))


@pytest.mark.parametrize("layer", [GlobalMean(), lambda maps: subsampled(maps, 2)])
def test_gradients_keep_the_layout_of_the_maps(layer: Callable[[Tensor], Tensor]) -> None:
    """Else every elementwise kernel before the layer takes the slow path."""
    maps = torch.rand(3, 4, 8, 8, generator=generator("maps"))
    maps = maps.to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(maps).square().sum(), maps)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
