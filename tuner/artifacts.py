"""Files of a trial: its checkpoint, its validation logits, the weights of the best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tuner import checkpoint
from tuner.checkpoint import CheckpointError, Snapshot
from tuner.stores import NotThere, Store, StoreError

CHECKPOINT = "checkpoint.safetensors"
VALIDATION = "validation.safetensors"
WEIGHTS = "model.safetensors"

log = logging.getLogger(__name__)


def save_checkpoint(store: Store, snapshot: Snapshot, identity: Mapping[str, str]) -> None:
    """Keep a snapshot to resume from, in place of an earlier one; see ``Session.identity``.

    Raises:
        StoreError: It cannot be kept; the earlier one still is.
    """
    meta = {**snapshot.meta, **identity}
    store.write(CHECKPOINT, checkpoint.to_bytes(snapshot.tensors, meta))


def load_checkpoint(
    store: Store, identity: Mapping[str, str]
) -> tuple[Snapshot | None, str | None]:
    """The snapshot to resume from, and why not if there is one that cannot be used.

    It never raises: a checkpoint that is damaged or cannot be read costs the epochs behind it,
    not the trial. One with another ``identity`` (study, data, recipe digest) is not used
    either: an earlier study of the same name may have left it. Both are None when there simply
    is no checkpoint.
    """
    try:
        snapshot = Snapshot(*_load(store, CHECKPOINT))
    except NotThere:
        return None, None
    except (CheckpointError, StoreError) as error:
        reason = str(error)
    else:
        other = [key for key, value in identity.items() if snapshot.meta.get(key) != value]
        if not other:
            return snapshot, None
        reason = f"{store.place(CHECKPOINT)} is of another {' and '.join(other)}"
    log.warning("%s; the trial starts from epoch 0", reason)
    return None, reason


def drop_checkpoint(store: Store) -> None:
    """Remove the checkpoint of a trial that ended; what cannot be removed is left, and said."""
    _remove(store, CHECKPOINT)


def save_validation(
    store: Store, logits: Tensor, targets: Tensor, norms: Tensor, bias: Tensor
) -> None:
    """Keep the last epoch's validation logits (N, C) as float16, with targets and head norms.

    Raises:
        StoreError: They cannot be kept.
    """
    tensors = {"logits": logits.half(), "targets": targets.cpu(), "norms": norms, "bias": bias}
    store.write(VALIDATION, checkpoint.to_bytes(tensors, {}))


def load_validation(store: Store) -> dict[str, Tensor] | None:
    """What ``save_validation`` kept, logits as float32; None when it is not there.

    Raises:
        CheckpointError: It is damaged.
        StoreError: It cannot be read.
    """
    try:
        tensors, _ = _load(store, VALIDATION)
    except NotThere:
        return None
    return {**tensors, "logits": tensors["logits"].float()}


def save_weights(store: Store, model: torch.nn.Module, meta: Mapping[str, str]) -> None:
    """Keep a trained model's weights.

    Raises:
        StoreError: They cannot be kept; earlier ones still are.
    """
    store.write(WEIGHTS, checkpoint.to_bytes(model.state_dict(), meta))


def load_weights(store: Store, identity: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Weights that ``save_weights`` kept with this identity; None when none can be had."""
    try:
        tensors, meta = _load(store, WEIGHTS)
    except NotThere:
        return None
    except (CheckpointError, StoreError) as error:
        log.warning("%s", error)
        return None
    return tensors if all(meta.get(key) == value for key, value in identity.items()) else None


def keep_weights_only_of(store: Store, kept: Callable[[], set[int]]) -> None:
    """Remove the weights of all trials but those that ``kept`` numbers from the store of a study.

    Weights are written after their trial ended. So ``kept`` is asked after the look at what is
    there: it knows of every trial whose weights may be removed, whoever ends one meanwhile.
    """
    try:
        keys = store.keys("trial-")
    except StoreError as error:
        log.warning("weights that are no longer needed stay: %s", error)
        return
    numbers = kept()
    for key in keys:
        trial, _, name = key.partition("/")
        if name == WEIGHTS and int(trial.removeprefix("trial-")) not in numbers:
            _remove(store, key)


def drop_stages(store: Store) -> None:
    """Remove every shared stage from the store of a study; what stays is said."""
    try:
        keys = store.keys("stage-")
    except StoreError as error:
        log.warning("shared stages that are no longer needed stay: %s", error)
        return
    for key in keys:
        _remove(store, key)


def _load(store: Store, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return checkpoint.from_bytes(store.read(key), store.place(key))


def _remove(store: Store, key: str) -> None:
    try:
        store.remove(key)
    except StoreError as error:
        log.warning("%s", error)
