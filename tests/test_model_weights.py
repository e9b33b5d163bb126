"""Pretrained weights from files: which are taken, and how others are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from model_cases import SMALL, TINY, build, component, noise
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import TunerError
from tuner.models import MODELS
from tuner.seeding import seeded


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


@pytest.mark.parametrize("name", [*MODELS])
def test_weights_of_a_trained_classifier_can_be_loaded_again(tmp_path: Path, name: str) -> None:
    with seeded("other"):
        trained = component(name).build(10, (1, 32, 32)).eval()
    file = save(trained.state_dict(), tmp_path / "best.safetensors")
    again = build(name, (1, 32, 32), weights_file=file).eval()
    images = noise(2, 1, 32, 32)
    assert torch.equal(again(images), trained(images))


@pytest.mark.parametrize("name", SMALL)
def test_classifier_trained_on_other_classes_gives_its_backbone_and_the_rest_is_drawn_as_ever(
    tmp_path: Path, name: str
) -> None:
    with seeded("other"):
        trained = component(name).build(7, (3, 32, 32))
    file = save(trained.state_dict(), tmp_path / "best.safetensors")
    model, fresh = build(name, weights_file=file), build(name)
    assert torch.equal(model.head.weight, fresh.head.weight)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, trained.backbone.state_dict()[key])


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


@pytest.mark.parametrize(
    ("name", "trained", "given"),
    [
        ("mlp", {"width": 8}, {"width": 9}),
        ("small_cnn", {"shape": (1, 32, 32)}, {"shape": (3, 32, 32)}),
        ("timm", {"architecture": "test_vit", "shape": (3, 64, 64)}, {"architecture": "test_vit"}),
    ],
    ids=["settings", "channels", "image size"],
)
def test_weights_of_a_model_of_other_settings_or_images_are_refused_with_what_to_set(
    tmp_path: Path, name: str, trained: Any, given: Any
) -> None:
    file = save(build(name, **trained).state_dict(), tmp_path / "w.pth")
    with pytest.raises(TunerError, match=r"another \[model\], or .*size or channels.*image_size"):
        build(name, **given, weights_file=file)


def test_weights_of_a_model_with_fewer_layers_are_refused(tmp_path: Path) -> None:
    file = save(build("mlp", depth=1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(TunerError, match=r"w\.pth: .*lacks .*; has nothing.*; take the \[model\]"):
        build("mlp", depth=2, weights_file=file)


@pytest.mark.parametrize("name", [*MODELS])
def test_missing_weights_file_is_named_with_where_it_was_looked_for(name: str) -> None:
    with pytest.raises(TunerError) as caught:
        build(name, weights_file="nowhere.pth")
    assert f"{Path.cwd() / 'nowhere.pth'}: no such file; put it there" in str(caught.value)


class Payload:
    """Something a pickle could execute."""


@pytest.mark.parametrize(
    "content",
    [{"model": Payload()}, {}, {"epoch": 1}, [torch.zeros(2)]],
    ids=["pickle", "empty", "no tensors", "list"],
)
def test_files_that_hold_no_plain_weights_are_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "odd.pth"
    torch.save(content, file)
    with pytest.raises(TunerError, match=r"odd\.pth"):
        build("torchvision", weights_file=str(file))


@pytest.mark.filterwarnings("ignore:.*torch.(jit|load)")
@pytest.mark.parametrize("kind", ["pickle", "script", "junk", "empty", "safetensors"])
def test_unusable_file_is_refused_in_one_line_with_the_way_out(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("odd.safetensors" if kind == "safetensors" else "odd.pth")
    if kind == "pickle":
        torch.save({"model": Payload()}, file)
    elif kind == "script":
        script: Any = torch.jit
        script.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(file))
    else:
        file.write_bytes(b"" if kind == "empty" else b"not weights at all")
    with pytest.raises(TunerError) as error:
        build("torchvision", weights_file=str(file))
    assert str(error.value) == (
        f"{file} holds more than plain weights, or cannot be read; "
        "save model.state_dict() with torch.save, or use safetensors"
    )


def test_file_that_the_system_withholds_is_refused_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def withheld(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    file = save(foreign(), tmp_path / "w.pth")
    monkeypatch.setattr(torch, "load", withheld)
    with pytest.raises(TunerError, match=r"w\.pth: cannot be read \(Permission denied\)"):
        build("torchvision", weights_file=file)
