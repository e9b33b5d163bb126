"""Checkpoints: tensors and JSON in one safetensors file that is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tuner.errors import TunerError
from tuner.stores import write_whole

FORMAT = "tuner-checkpoint-1"
EXECUTION = ("foreach", "fused", "capturable")
"""Options of optimizers that say how they compute on a device, and nothing of what."""


class CheckpointError(TunerError):
    """A checkpoint that cannot be read, or that belongs to something else."""


def to_bytes(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """One safetensors file of ``tensors`` and the JSON values ``meta``.

    Tensors may share storage, be views or lie on any device.
    """
    header = {"format": FORMAT, "meta": json.dumps(meta)}
    own = {name: _independent(tensor) for name, tensor in tensors.items()}
    return safetensors.torch.save(own, metadata=header)


def from_bytes(content: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON values that ``to_bytes`` put together.

    Raises:
        CheckpointError: It is truncated, damaged or not a checkpoint; the text says ``where``.
    """
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        meta = json.loads(header.get("meta", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a readable checkpoint ({error}); delete it to begin anew"
        ) from error
    if header.get("format") != FORMAT or not isinstance(meta, dict):
        raise CheckpointError(f"{where}: a safetensors file, but not a checkpoint of tuner")
    return tensors, meta


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON values ``meta`` to ``path``; atomic.

    The file appears under its name only when it is complete and on disk, so a crash leaves
    the previous checkpoint. Tensors may share storage, be views or lie on any device.
    """
    write_whole(Path(path), to_bytes(tensors, meta))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON values that ``save`` wrote to ``path``.

    Raises:
        CheckpointError: No such file, or it is truncated, damaged or not a checkpoint.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return from_bytes(content, str(path))


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of ``optimizer`` as named tensors and JSON, exact and without pickle."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "groups": {}}
    for kind, parts in (
        ("state", state["state"]),
        ("groups", dict(enumerate(state["param_groups"]))),
    ):
        for index, given in parts.items():
            entries = {key: value for key, value in given.items() if key not in EXECUTION}
            values[kind][str(index)] = {
                key: value for key, value in entries.items() if not isinstance(value, Tensor)
            }
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{index}.{key}"] = value
    return tensors, values


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what ``flatten_optimizer`` returned into an optimizer built alike.

    How it computes stays as it was built.

    Raises:
        CheckpointError: The state is of an optimizer over other parameters.
    """
    parts: dict[str, dict[int, dict[str, Any]]] = {
        kind: {int(index): dict(entries) for index, entries in values[kind].items()}
        for kind in ("state", "groups")
    }
    for name, tensor in tensors.items():
        kind, index, key = name.split(".", 2)
        parts[kind][int(index)][key] = tensor
    groups = [_tuples(parts["groups"][index]) for index in sorted(parts["groups"])]
    for own, group in zip(optimizer.param_groups, groups, strict=False):
        group.update({key: own[key] for key in EXECUTION if key in own})
    try:
        _check_shapes(optimizer, parts["state"])
        optimizer.load_state_dict({"state": parts["state"], "param_groups": groups})
        _lay_out(optimizer)
    except ValueError as error:
        raise CheckpointError(f"optimizer state does not fit the model: {error}") from error


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Let what is kept of a parameter lie in memory as the parameter does."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_shapes(optimizer: torch.optim.Optimizer, state: Mapping[int, dict[str, Any]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        if index >= len(parameters):
            raise ValueError(f"it has a parameter {index}, the optimizer {len(parameters)} in all")
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameters[index].shape:
                raise ValueError(
                    f"{key} of parameter {index} is {tuple(value.shape)}, "
                    f"the parameter {tuple(parameters[index].shape)}"
                )


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON turns tuples such as AdamW's betas into lists; only the parameters are a list."""
    lists = ("params", "param_names")
    return {
        key: tuple(value) if isinstance(value, list) and key not in lists else value
        for key, value in group.items()
    }


def _independent(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Snapshot:
    """State of a training between two epochs or two steps, as tensors and JSON values."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as ``prefix/name``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors called ``prefix/name``, as ``name``."""
    start = f"{prefix}/"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
