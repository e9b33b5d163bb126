"""Files of a trial: its checkpoint, its validation logits, the weights of the best."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner import checkpoint
from tuner.checkpoint import CheckpointError
from tuner.lane import Snapshot

CHECKPOINT = "checkpoint.safetensors"
VALIDATION = "validation.safetensors"
WEIGHTS = "model.safetensors"

log = logging.getLogger(__name__)


def artifacts_root(given: Path | None) -> Path:
    """Folder of all artifacts: as given, else ``TUNER_ARTIFACTS``, else ``runs/artifacts``."""
    return given or Path(os.environ.get("TUNER_ARTIFACTS") or "runs/artifacts")


def save_checkpoint(folder: Path, snapshot: Snapshot, identity: Mapping[str, str]) -> None:
    """Keep a snapshot to resume from, in place of an earlier one; see ``Session.identity``."""
    checkpoint.save(folder / CHECKPOINT, snapshot.tensors, {**snapshot.meta, **identity})


def load_checkpoint(folder: Path, identity: Mapping[str, str]) -> Snapshot | None:
    """The snapshot to resume from; None when there is none, or none that can be used.

    A checkpoint with another ``identity`` (study, data, recipe digest) is not used: an earlier
    study of the same name may have left it.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        snapshot = Snapshot(*checkpoint.load(path))
    except CheckpointError as error:
        log.warning("%s; the trial starts again from epoch 0", error)
        return None
    if any(snapshot.meta.get(key) != value for key, value in identity.items()):
        log.warning("%s belongs to another study; the trial starts from epoch 0", path)
        return None
    return snapshot


def drop_checkpoint(folder: Path) -> None:
    """Remove the checkpoint of a trial that ended, and its folder if nothing else is in it."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def save_validation(
    folder: Path, logits: Tensor, targets: Tensor, norms: Tensor, bias: Tensor
) -> None:
    """Keep the last epoch's validation logits (N, C) as float16, with targets and head norms."""
    tensors = {"logits": logits.half(), "targets": targets.cpu(), "norms": norms, "bias": bias}
    checkpoint.save(folder / VALIDATION, tensors, {})


def load_validation(folder: Path) -> dict[str, Tensor] | None:
    """What ``save_validation`` kept, logits as float32; None when it is not there."""
    path = folder / VALIDATION
    if not path.exists():
        return None
    tensors, _ = checkpoint.load(path)
    return {**tensors, "logits": tensors["logits"].float()}


def save_weights(folder: Path, model: torch.nn.Module, meta: dict[str, Any]) -> None:
    """Keep a trained model's weights."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    checkpoint.save(folder / WEIGHTS, tensors, meta)


def load_weights(folder: Path, identity: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Weights that ``save_weights`` kept with this identity; None when there are none."""
    path = folder / WEIGHTS
    if not path.exists():
        return None
    tensors, meta = checkpoint.load(path)
    return tensors if all(meta.get(key) == value for key, value in identity.items()) else None


def keep_weights_only_of(root: Path, numbers: set[int]) -> None:
    """Remove the weights of all trials but the given ones."""
    for path in root.glob(f"trial-*/{WEIGHTS}"):
        if int(path.parent.name.removeprefix("trial-")) not in numbers:
            path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove everything of a trial."""
    shutil.rmtree(folder, ignore_errors=True)
