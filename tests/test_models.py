"""Models: sizes, heads, gradients, images of every size, pretrained weights, clear refusals."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.errors import TunerError, UnknownNameError
from tuner.models import MODELS, Classifier, CosineHead, set_head_bias
from tuner.models._resnet import Block
from tuner.seeding import seeded

SMALL = ["linear", "mlp", "small_cnn", "resnet20", "resnet32", "resnet56"]
TINY = {"torchvision": "shufflenet_v2_x0_5", "timm": "test_resnet"}
FAMILIES = [
    "resnet18",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "squeezenet1_0",
    "densenet121",
    "googlenet",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def component(name: str, **settings: Any) -> Any:
    """A model component; the libraries' default architecture is a tiny one here."""
    if name in TINY:
        settings = {"architecture": TINY[name]} | settings
    return MODELS[name](**settings)


def build(
    name: str,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    head: Literal["linear", "cosine"] = "linear",
    **settings: Any,
) -> Classifier:
    with seeded(0):
        model: Classifier = component(name, **settings).build(classes, shape, head=head)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check_learns(model: Classifier, shape: tuple[int, int, int], classes: int) -> None:
    """Shapes of features and logits, and a gradient from the loss to the first layer."""
    images = noise(4, *shape)
    features = model.features(images)
    assert features.shape == (4, model.head.weight.shape[1])
    logits = model(images)
    assert logits.shape == (4, classes)
    F.cross_entropy(logits, torch.arange(4) % classes).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert model.head.weight.grad is not None
    assert float(model.head.weight.grad.abs().sum()) > 0
    assert float(gradients[0].abs().sum()) > 0


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
    """Build without memory and initial values, which takes a tenth of the time.

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


def save(tensors: dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def foreign(classes: int = 1000) -> dict[str, Tensor]:
    """Weights as torchvision publishes them: with the head of its own data."""
    from torchvision.models import get_model

    with seeded("foreign"):
        model = get_model(TINY["torchvision"], num_classes=classes)
    state: dict[str, Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_pretrained_backbone_is_loaded_and_its_head_of_another_size_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    suffix: str,
    head: Literal["linear", "cosine"],
) -> None:
    weights = foreign()
    file = save(weights, tmp_path / f"shufflenet{suffix}")
    with caplog.at_level(logging.INFO, logger="tuner"):
        model = build("torchvision", head=head, weights_file=file)
    loaded = model.backbone.state_dict()["conv5.0.weight"]
    assert torch.equal(loaded, weights["conv5.0.weight"])
    assert torch.equal(model.head.weight, build("torchvision", head=head).head.weight)
    assert "head of 1000 classes is left out" in caplog.text
    assert file in caplog.text


def test_pretrained_head_of_the_right_size_is_kept(tmp_path: Path) -> None:
    weights = foreign(classes=10)
    file = save(weights, tmp_path / "shufflenet.pth")
    model = build("torchvision", weights_file=file)
    assert torch.equal(model.head.weight, weights["fc.weight"])


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_weights_of_a_trained_classifier_can_be_loaded_again(tmp_path: Path, name: str) -> None:
    with seeded("other"):
        trained = component(name).build(10, (1, 32, 32)).eval()
    file = save(trained.state_dict(), tmp_path / "best.safetensors")
    again = build(name, (1, 32, 32), weights_file=file).eval()
    images = noise(2, 1, 32, 32)
    assert torch.equal(again(images), trained(images))


def test_timm_reads_the_head_from_where_the_architecture_has_it(tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("convnext_atto", num_classes=10).state_dict()
    file = save(weights, tmp_path / "convnext.safetensors")
    model = build("timm", architecture="convnext_atto", weights_file=file)
    assert torch.equal(model.head.weight, weights["head.fc.weight"])
    assert torch.equal(model.backbone.state_dict()["head.norm.weight"], weights["head.norm.weight"])


@pytest.mark.parametrize("wrapping", ["state_dict", "model"])
def test_weights_may_be_wrapped_as_training_scripts_save_them(
    tmp_path: Path, wrapping: str
) -> None:
    weights = {f"module.{key}": value for key, value in foreign().items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({wrapping: weights, "epoch": 90}, file)
    model = build("torchvision", weights_file=str(file))
    assert torch.equal(
        model.backbone.state_dict()["conv1.1.weight"], weights["module.conv1.1.weight"]
    )


def test_auxiliary_heads_in_a_file_are_passed_over(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    weights = googlenet(aux_logits=True, init_weights=False).state_dict()
    assert any(key.startswith("aux1.") for key in weights)
    file = save(weights, tmp_path / "googlenet.pth")
    model = build("torchvision", (3, 64, 64), architecture="googlenet", weights_file=file)
    loaded = model.backbone.state_dict()["conv1.conv.weight"]
    assert torch.equal(loaded, weights["conv1.conv.weight"])


def test_densenet_files_with_their_old_names_are_understood(tmp_path: Path) -> None:
    from torchvision.models import densenet121

    weights = densenet121().state_dict()
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
        if "denselayer" in key
        else key: v
        for key, v in weights.items()
    }
    assert old.keys() != weights.keys()
    file = save(old, tmp_path / "densenet.pth")
    model = build("torchvision", (3, 64, 64), architecture="densenet121", weights_file=file)
    key = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(model.backbone.state_dict()[key], weights[key])


def test_weights_of_another_architecture_are_refused_with_file_and_keys(tmp_path: Path) -> None:
    file = save(foreign(), tmp_path / "shufflenet.pth")
    with pytest.raises(TunerError, match=r"shufflenet\.pth: .*lacks .*features"):
        build("torchvision", (3, 64, 64), architecture="mobilenet_v2", weights_file=file)


def test_weights_of_other_sizes_are_refused_with_file_and_keys(tmp_path: Path) -> None:
    file = save(foreign() | {"conv1.0.weight": torch.zeros(24, 3, 5, 5)}, tmp_path / "w.pth")
    with pytest.raises(TunerError, match=r"w\.pth: .*sizes.*conv1\.0\.weight"):
        build("torchvision", weights_file=file)


def test_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TunerError, match=r"nowhere\.pth: no such file"):
        build("torchvision", weights_file=str(tmp_path / "nowhere.pth"))


class Payload:
    """Something a pickle could execute."""


@pytest.mark.parametrize(
    "content", [{"model": Payload()}, {}, {"epoch": 1}, [torch.zeros(2)]], ids=str
)
def test_files_that_hold_no_plain_weights_are_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "odd.pth"
    torch.save(content, file)
    with pytest.raises(TunerError, match=r"odd\.pth"):
        build("torchvision", weights_file=str(file))


def test_broken_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"not weights at all")
    with pytest.raises(TunerError, match=r"broken\.safetensors: cannot be read as weights"):
        build("torchvision", weights_file=str(file))


def test_every_component_says_what_it_is() -> None:
    for name in MODELS:
        assert MODELS[name].__doc__
