"""Class weights as losses use them: power or effective number, capped, normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tuner.imbalance import (
    WeightNormalization,
    effective_number_weights,
    normalize_weights,
    power_weights,
)

ClassCounts = Tensor | Sequence[float] | np.ndarray
"""Training samples per class (C,), however they were counted."""


def checked_counts(class_counts: ClassCounts) -> Tensor:
    """The counts as a tensor, (C,).

    Raises:
        ValueError: They are not (C,) with C >= 2, one is negative or not finite, or all are 0.
    """
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1 or counts.numel() < 2:
        raise ValueError(f"class_counts must be (C,) with C >= 2, not {tuple(counts.shape)}")
    impossible = (~counts.isfinite() | (counts < 0)).nonzero().flatten().tolist()
    if impossible:
        first = impossible[0]
        raise ValueError(
            f"class_counts must be finite and >= 0, but class {first} has {counts[first].item():g}"
        )
    if not counts.any():
        raise ValueError("class_counts must be > 0 for some class, but all are 0")
    return counts


def frequency_weights(
    class_counts: ClassCounts,
    power: float,
    normalization: WeightNormalization = "samples",
    max_weight: float | None = None,
) -> Tensor:
    """Weights n^-power, (C,) float64, none above ``max_weight`` times the median weight."""
    class_counts = checked_counts(class_counts)
    weights = power_weights(class_counts, power)
    if max_weight is not None:
        weights = weights.clamp(max=max_weight * weights[weights > 0].quantile(0.5))
    return normalize_weights(weights, class_counts, normalization)


def class_balanced_weights(
    class_counts: ClassCounts, beta: float, normalization: WeightNormalization = "samples"
) -> Tensor:
    """Weights 1 / E_n, (C,) float64 (Cui et al. 2019, equation 4); equal for β = 0."""
    class_counts = checked_counts(class_counts)
    return normalize_weights(
        effective_number_weights(class_counts, beta), class_counts, normalization
    )


def fitted_exponent(class_counts: Tensor, weights: Tensor) -> float:
    """The w of the least-squares fit weights ∝ n^-w over the classes with samples.

    0 where all classes have the same count: there is nothing to correct.
    """
    present = class_counts > 0
    size = class_counts[present].to(torch.float64).log()
    size = size - size.mean()
    spread = size.square().sum()
    if spread == 0:
        return 0.0
    return float(-(size * weights[present].log()).sum() / spread)
