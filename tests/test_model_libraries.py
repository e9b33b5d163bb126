"""Classifiers of torchvision and timm: every one gets our head; clear refusals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_cases import build, check_learns, component, noise
from torch import Tensor, nn

from tuner.errors import TunerError, UnknownNameError
from tuner.models import MODELS

FAMILIES = [
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "squeezenet1_0",
    "densenet121",
    "googlenet",
]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_torchvision_families_train(architecture: str) -> None:
    shape = (3, 64, 64)
    model = build("torchvision", shape, 5, architecture=architecture)
    check_learns(model, shape, 5)


def every_torchvision_classifier() -> list[str]:
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


@pytest.fixture
def meta_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Build without memory and initial values, for speed.

    RegNet computes its widths with tensors, which needs a device.
    """
    from torchvision.models.regnet import BlockParams

    widths = BlockParams.from_init_params

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", on_cpu)
    for draw in ("normal_", "uniform_", "erfinv_", "clamp_", "zero_", "fill_"):
        monkeypatch.setattr(Tensor, draw, lambda values, *args, **kwargs: values)
    with torch.device("meta"):
        yield


@pytest.mark.long
@pytest.mark.usefixtures("meta_device")
def test_every_torchvision_classifier_loses_its_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, without the trial run of one image, which would take most of the time."""
    monkeypatch.setattr("tuner.models._classifier._feature_width", lambda *_: 1)
    names = every_torchvision_classifier()
    assert len(names) >= 80
    for name in names:
        size = 299 if name == "inception_v3" else 224
        model = component("torchvision", architecture=name).build(7, (3, size, size))
        assert len([m for m in model.modules() if isinstance(m, nn.Identity)]) >= 1
        assert not any(1000 in p.shape for p in model.parameters())


@pytest.mark.usefixtures("meta_device")
@pytest.mark.parametrize(
    ("architecture", "width"),
    [
        ("alexnet", 4096),
        ("inception_v3", 2048),
        ("maxvit_t", 512),
        ("mnasnet0_5", 1280),
        ("regnet_y_400mf", 440),
        ("shufflenet_v2_x1_0", 1024),
        ("swin_t", 768),
        ("vgg11", 4096),
        ("vit_b_16", 768),
        ("resnext50_32x4d", 2048),
    ],
)
def test_features_are_what_the_last_layer_saw(architecture: str, width: int) -> None:
    size = 299 if architecture == "inception_v3" else 224
    model = component("torchvision", architecture=architecture).build(7, (3, size, size))
    assert model.head.weight.shape == (7, width)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_vision_transformers_take_the_size_of_the_images() -> None:
    with torch.device("meta"):
        model = component("torchvision", architecture="vit_b_16").build(7, (1, 32, 32))
        assert model.backbone.get_parameter("encoder.pos_embedding").shape == (1, 1 + 4, 768)
        assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_grey_images_are_repeated_over_three_channels(name: str) -> None:
    grey, rgb = build(name, (1, 32, 32)).eval(), build(name, (3, 32, 32)).eval()
    images = noise(2, 1, 32, 32)
    assert torch.equal(grey(images), rgb(images.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("inception_v3", (3, 32, 32)),
        ("vgg11", (3, 16, 16)),
        ("vit_b_16", (3, 30, 30)),
        ("resnet18", (4, 32, 32)),
    ],
)
def test_images_a_model_cannot_take_are_named_with_the_model(
    architecture: str, shape: tuple[int, int, int]
) -> None:
    with pytest.raises(TunerError) as caught, torch.device("meta"):
        component("torchvision", architecture=architecture).build(10, shape)
    text = str(caught.value)
    assert architecture in text
    assert f"{shape[1]}x{shape[2]} pixels with {shape[0]} channel" in text


def test_misspelt_torchvision_architecture_is_answered_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet50'"):
        build("torchvision", architecture="resnet5O")


@pytest.mark.parametrize(
    ("name", "library"), [("resnet18", "torchvision"), ("resnet10t", "timm"), ("resnet55", None)]
)
def test_architecture_that_is_given_as_a_model_is_answered_with_the_library_that_has_it(
    name: str, library: str | None
) -> None:
    if library == "timm":
        pytest.importorskip("timm")
    said = MODELS.unknown(name)
    if library is None:
        assert "did you mean 'resnet56'" in said
    else:
        assert said.endswith(f'{library} has it: name = "{library}", architecture = "{name}"')


def test_misspelt_timm_architecture_is_answered_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"'resnett18'; did you mean one of .*resnet18"):
        build("timm", architecture="resnett18")


def test_timm_never_fetches_a_model_from_the_hub() -> None:
    with pytest.raises(UnknownNameError, match="hf-hub:timm/resnet18"):
        build("timm", architecture="hf-hub:timm/resnet18")


def test_missing_timm_is_answered_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TunerError, match=r"pip install tuner\[timm\]"):
        build("timm")


@pytest.mark.parametrize("architecture", ["test_resnet", "convnext_atto", "test_vit"])
def test_timm_models_train(architecture: str) -> None:
    shape = (3, 64, 64)
    check_learns(build("timm", shape, 5, architecture=architecture), shape, 5)
