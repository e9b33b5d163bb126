"""Twins compute what their models do; models without one are found out."""

from __future__ import annotations

import pytest
import torch
from model_cases import build, noise
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from tuner.models import Classifier
from tuner.twins import NoTwinError, check, twin_of


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["linear", "mlp", "small_cnn", "resnet20"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_own_models_have_twins(name: str, head: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, 7, head)  # type: ignore[arg-type]
    check(model, shape)
    check(model.to(memory_format=torch.channels_last), shape)  # type: ignore[call-overload]


def test_frozen_backbone_in_evaluation_mode_has_a_twin() -> None:
    model = build("resnet20", (3, 16, 16))
    model.backbone.requires_grad_(False).eval()
    check(model, (3, 16, 16))


def test_block_of_a_library_has_a_twin() -> None:
    halve = nn.Sequential(nn.Conv2d(6, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
    first = nn.Conv2d(3, 6, 3, padding=1, groups=3)
    block = BasicBlock(6, 8, 2, halve)
    backbone = nn.Sequential(first, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    check(Classifier(backbone, nn.Linear(8, 5)), (3, 8, 8))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(8), "LayerNorm has no twin"),
        (nn.ChannelShuffle(3), "differ"),
        (nn.GroupNorm(3, 3, affine=False), "twin fails|differ"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "pads with reflect"),
        (nn.BatchNorm2d(3, momentum=None), "momentum"),
    ],
)
def test_layer_that_mixes_channels_has_none(layer: nn.Module, reason: str) -> None:
    model = Classifier(nn.Sequential(layer, nn.Flatten()), nn.Linear(3 * 64, 5))
    with pytest.raises(NoTwinError, match=reason):
        check(model, (3, 8, 8))


def test_dropout_has_no_twin() -> None:
    with pytest.raises(NoTwinError, match="draws"):
        twin_of(build("mlp", (1, 8, 8), dropout=0.3), 4)


class OwnMean(nn.Module):
    """A layer whose result depends on all channels there are."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps - maps.mean(1, keepdim=True)


def test_layer_that_looks_at_all_channels_is_found_out() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3), OwnMean(), nn.Flatten())
    model = Classifier(backbone, nn.Linear(16 * 36, 5))
    with pytest.raises(NoTwinError, match="logits differ"):
        check(model, (3, 8, 8))


def test_twin_of_several_models_has_their_weights() -> None:
    model = build("small_cnn", (1, 8, 8)).eval()
    twin = twin_of(model, 3).eval()
    images = noise(5, 3, 8, 8)
    expected = torch.stack([model(images[:, k : k + 1]) for k in range(3)])
    torch.testing.assert_close(twin(images), expected)
