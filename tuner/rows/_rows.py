"""Losses as rows of one table: what the closed-form gradients need to know of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tuner.losses import (
    AsymmetricLoss,
    BalancedSoftmaxLoss,
    ClassBalancedLoss,
    CrossEntropyLoss,
    EqualizationLoss,
    FnrAdaptiveLoss,
    FocalLoss,
    LabelAwareSmoothingLoss,
    LabelSmoothingLoss,
    LdamLoss,
    LogitAdjustedLoss,
    Loss,
    SigmoidFocalLoss,
    VectorScalingLoss,
    WeightedAsymmetricLoss,
    WeightedCrossEntropyLoss,
)

Kind = Literal["softmax", "smooth", "sigmoid", "spared", "adaptive"]

HALF = 2**16


@dataclass(frozen=True, eq=False)
class Row:
    """A loss of logits z as a loss of u = mult·z + add; vectors are (C,) float64.

    ``softmax``: weight_y · (1 - p_y)^gamma · -log p_y, p = softmax(u - margin at y).
    ``smooth``: the same of targets of which a share ``eps`` is spread over all classes, with
    p_c^gamma_neg on the classes c that are not the sample's own.
    ``sigmoid``: weight_y times the sum of C binary focal losses, p = sigmoid(u).
    ``spared``: cross-entropy without the other classes of which a draw by ``seed`` is below
    ``spared``.
    ``adaptive``: cross-entropy, weighted by how often each class is missed if ``floor`` < 1.
    """

    kind: Kind
    weight: Tensor
    mult: Tensor
    add: Tensor
    margin: Tensor
    eps: Tensor
    spared: Tensor
    gamma: float = 0.0
    gamma_neg: float = 0.0
    floor: float = 1.0
    half_life: float = 1.0
    seed: int = 0

    @property
    def seed_high(self) -> int:
        """The upper half of the lowest 32 bits of the seed; a float32 holds it exactly."""
        return self.seed // HALF % HALF

    @property
    def seed_low(self) -> int:
        """The lower half."""
        return self.seed % HALF


def row_of(loss: Loss) -> Row | None:
    """The row of a built loss as it acts now (see ``Loss.advance``); None if it has none.

    Only exactly the types below have rows: what derives from them may compute otherwise.
    """
    read = READERS.get(type(loss))
    if read is None or loss.reduction != "batch":
        return None
    return read(loss)


def bare_row(loss: Loss) -> Row:
    """The row of a loss that is computed by its own module: logits as they are."""
    ones, zeros = torch.ones_like(loss.class_counts), torch.zeros_like(loss.class_counts)
    return Row("softmax", ones, ones, zeros, zeros, zeros, zeros)


def _row(loss: Loss, kind: Kind, **values: Any) -> Row:
    counts = loss.class_counts
    weight = loss.class_weights if loss.active else None
    plain = {
        "weight": torch.ones_like(counts) if weight is None else weight,
        "mult": torch.ones_like(counts),
        "add": torch.zeros_like(counts),
        "margin": torch.zeros_like(counts),
        "eps": torch.zeros_like(counts),
        "spared": torch.zeros_like(counts),
    }
    return Row(kind, **(plain | values))


def _cross_entropy(loss: Loss) -> Row | None:
    if loss.smoothing is None:
        return _row(loss, "softmax")
    # Weights of smoothed targets act on every class they reach, not on the sample.
    return None if loss.class_weights is not None else _row(loss, "smooth", eps=loss.smoothing)


def _unless_smoothed(read: Callable[[Any], Row | None]) -> Callable[[Any], Row | None]:
    return lambda loss: None if loss.smoothing is not None else read(loss)


def _scaled(loss: VectorScalingLoss) -> Row:
    if not loss.active:
        return _row(loss, "softmax")
    return _row(loss, "softmax", mult=loss.scale, add=loss.shift)


def _ldam(loss: LdamLoss) -> Row:
    scale = torch.full_like(loss.margins, loss.scale)
    return _row(loss, "softmax", mult=scale, margin=loss.scale * loss.margins)


def _class_balanced(loss: ClassBalancedLoss) -> Row:
    kind: Kind = "softmax" if loss.base == "softmax" else "sigmoid"
    return _row(loss, kind, gamma=loss.gamma)


def _asymmetric(loss: AsymmetricLoss) -> Row:
    if loss.eps == 0:
        return _row(loss, "softmax", gamma=loss.gamma_pos)
    eps = torch.full_like(loss.class_counts, loss.eps)
    return _row(loss, "smooth", eps=eps, gamma=loss.gamma_pos, gamma_neg=loss.gamma_neg)


def _equalization(loss: EqualizationLoss) -> Row | None:
    if loss.class_weights is not None:
        return None
    spared = loss.tail * (loss.gamma if loss.active else 0.0)
    return _row(loss, "spared", spared=spared, seed=loss.seed)


def _adaptive(loss: FnrAdaptiveLoss) -> Row | None:
    if loss.class_weights is not None or loss.mode != "repaired" or loss.unit != "epochs":
        return None
    floor = loss.floor if loss.active else 1.0
    return _row(loss, "adaptive", floor=floor, half_life=loss.half_life)


READERS: dict[type[Loss], Callable[[Any], Row | None]] = {
    CrossEntropyLoss: _cross_entropy,
    WeightedCrossEntropyLoss: _cross_entropy,
    LabelSmoothingLoss: _cross_entropy,
    LabelAwareSmoothingLoss: _cross_entropy,
    VectorScalingLoss: _unless_smoothed(_scaled),
    LogitAdjustedLoss: _unless_smoothed(_scaled),
    BalancedSoftmaxLoss: _unless_smoothed(_scaled),
    LdamLoss: _unless_smoothed(_ldam),
    ClassBalancedLoss: _unless_smoothed(_class_balanced),
    EqualizationLoss: _unless_smoothed(_equalization),
    FnrAdaptiveLoss: _unless_smoothed(_adaptive),
    FocalLoss: _unless_smoothed(lambda loss: _row(loss, "softmax", gamma=loss.gamma)),
    SigmoidFocalLoss: _unless_smoothed(lambda loss: _row(loss, "sigmoid", gamma=loss.gamma)),
    AsymmetricLoss: _unless_smoothed(_asymmetric),
    WeightedAsymmetricLoss: _unless_smoothed(_asymmetric),
}
