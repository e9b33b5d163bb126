"""Pretrained weights from a local file into a freshly built classifier; never from the net."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import TunerError
from tuner.models._classifier import Classifier

logger = logging.getLogger(__name__)


def load_weights(
    model: Classifier, file: str | None, *, file_head: str = "head", unused: Collection[str] = ()
) -> Classifier:
    """``model`` with the weights in ``file``, if there is one; a head of another size stays.

    Keys are those of a classifier that was exported here, or those of the library the backbone
    is from, with ``file_head`` the name of its last layer. Layers named in ``unused`` (auxiliary
    heads) are passed over. Images are normalised by the mean and standard deviation of the data at
    hand, whatever the weights were trained with.

    Raises:
        TunerError: The file is missing, not a file of weights, or for another architecture.
    """
    if file is None:
        return model
    path = Path(file)
    weights = _own_keys(read_weights(path), file_head)
    weights = {k: v for k, v in weights.items() if not k.startswith(_prefixes(unused))}
    expected = model.state_dict()
    _drop_head_of_another_size(weights, expected, path)
    _check_sizes(weights, expected, path)
    result = model.load_state_dict(weights, strict=False)
    missing = [key for key in result.missing_keys if not key.startswith("head.")]
    if missing or result.unexpected_keys:
        raise TunerError(
            f"{path}: not the weights of this architecture: lacks {_some(missing)}; "
            f"has {_some(result.unexpected_keys)}, which the model does not know; "
            "take the [model] that it was trained as, or another file"
        )
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors, .pth or .pt file; nothing in it is executed.

    Raises:
        TunerError: The file is missing, or holds something else than named tensors.
    """
    if not path.is_file():
        raise TunerError(
            f"weights_file: {path.absolute()}: no such file; put it there, or name another"
        )
    try:
        content = _read(path)
    except OSError as error:
        raise TunerError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # Each format has its own errors, and those of torch advise to switch its safety off.
        raise TunerError(
            f"{path} holds more than plain weights, or cannot be read; "
            "save model.state_dict() with torch.save, or use safetensors"
        ) from error
    if not isinstance(content, Mapping):
        raise TunerError(f"{path}: holds a {type(content).__name__}, not a state_dict")
    for wrapping in ("state_dict", "model"):
        if isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise TunerError(f"{path}: holds no tensors; save the state_dict of a model")
    return tensors


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _own_keys(weights: Mapping[str, Tensor], file_head: str) -> dict[str, Tensor]:
    """The weights under the names they have in our classifier."""
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    if any(key.startswith("backbone.") for key in weights):
        return weights
    return {_own_key(key, file_head): value for key, value in weights.items()}


def _own_key(key: str, file_head: str) -> str:
    if key.startswith(f"{file_head}."):
        return "head." + key.removeprefix(f"{file_head}.")
    # Files of torchvision's densenets still carry "norm.1" for what is "norm1" today.
    return "backbone." + re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key)


def _prefixes(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"backbone.{name}." for name in names)


def _drop_head_of_another_size(
    weights: dict[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    own = {k: v.shape for k, v in expected.items() if k.startswith("head.")}
    found = {k: v.shape for k, v in weights.items() if k.startswith("head.")}
    if found and found != own:
        for key in found:
            del weights[key]
        logger.info(
            "%s: its head of %d classes is left out; the head starts afresh",
            path,
            next(iter(found.values()))[0],
        )


def _check_sizes(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    misfits = [k for k, v in weights.items() if k in expected and v.shape != expected[k].shape]
    if misfits:
        raise TunerError(
            f"{path}: other sizes than the model's at {_some(misfits)}: it is of another [model], "
            "or was trained on images of another size or channels; take those "
            "(data.image_size, data.channels)"
        )


def _some(keys: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(key.removeprefix("backbone.") for key in list(keys)[:limit])
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return (shown or "nothing") + more
