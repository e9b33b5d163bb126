"""Class counts and what follows from them: ratio, effective number, weights, priors, groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tuner.errors import DataError
from tuner.registry import component

MAX_CORRECTION = 1.2
"""Total correction from which on a recipe is said to over-correct."""

WeightNormalization = Literal["samples", "classes", "none"]


def class_counts(targets: Tensor, num_classes: int) -> Tensor:
    """Number of samples of each class, (C,) int64 on the CPU, from ``targets`` (N,).

    Raises:
        DataError: A target lies outside 0 ... num_classes - 1.
    """
    targets = targets.long().cpu()
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise DataError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, "
            f"but there are only the classes 0 to {num_classes - 1}"
        )
    return torch.bincount(targets, minlength=num_classes)


def imbalance_ratio(class_counts: Tensor) -> float:
    """Largest over smallest count of the classes that have samples; at least 1."""
    present = class_counts[class_counts > 0]
    if present.numel() == 0:
        raise DataError("no class has a single sample, so there is no imbalance ratio")
    return float(present.max()) / float(present.min())


def effective_number(class_counts: Tensor, beta: float) -> Tensor:
    """Effective number of samples E = (1 - βⁿ) / (1 - β) of each class, (C,) float64.

    Computed as ``expm1(n log β) / (β - 1)``, which keeps full precision for β close to 1
    (Cui et al. 2019, equation 2). β = 0 gives 1 for every class with samples, and β = 1 the
    limit, which is the counts themselves.
    """
    counts = class_counts.to(torch.float64)
    if beta == 0:
        return (counts > 0).to(torch.float64)
    if beta == 1:
        return counts
    return torch.expm1(counts * math.log(beta)) / (beta - 1)


def normalize_weights(
    weights: Tensor, class_counts: Tensor, normalization: WeightNormalization
) -> Tensor:
    """Scale class weights (C,); classes without samples keep weight 0 and do not count.

    ``samples``: Σ n_c·w_c = N, so that the mean weight over the training samples is 1 and
    the learning rate keeps its meaning. ``classes``: Σ w_c = C. ``none``: as they are.
    """
    counts = class_counts.to(weights)
    present = counts > 0
    weights = torch.where(present, weights, 0.0)
    if normalization == "samples":
        return weights * (counts.sum() / (counts * weights).sum())
    if normalization == "classes":
        return weights * (present.sum() / weights.sum())
    return weights


def power_weights(class_counts: Tensor, power: float) -> Tensor:
    """Unnormalised weights n_c^-power, (C,) float64: 1 = inverse frequency, 0.5 = square root.

    A class without samples gets weight 0.
    """
    counts = class_counts.to(torch.float64)
    return torch.where(counts > 0, counts.clamp(min=1) ** -power, 0.0)


def effective_number_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Unnormalised weights 1 / E_n of Cui et al. 2019, (C,) float64; 0 without samples."""
    numbers = effective_number(class_counts, beta)
    return torch.where(numbers > 0, 1 / numbers.clamp(min=1), 0.0)


def class_priors(class_counts: Tensor) -> Tensor:
    """Share of each class in the training part, (C,) float64; 0 for a class without samples."""
    counts = class_counts.to(torch.float64)
    return counts / counts.sum()


def log_priors(class_counts: Tensor) -> Tensor:
    """Logarithm of the class priors, (C,) float64.

    A class without samples is given half a sample, so that it stays finite and rarest.
    """
    counts = class_counts.to(torch.float64).clamp(min=0.5)
    return torch.log(counts / counts.sum())


def class_entropy(class_counts: Tensor) -> float:
    """Entropy of the class priors in nats: the cross-entropy of who knows nothing else."""
    counts = class_counts[class_counts > 0].to(torch.float64)
    return float(-(counts / counts.sum() * torch.log(counts / counts.sum())).sum())


@dataclass(frozen=True)
class Groups:
    """Class indices by size: head, medium and tail; each class is in exactly one."""

    head: tuple[int, ...]
    medium: tuple[int, ...]
    tail: tuple[int, ...]

    def named(self) -> dict[str, tuple[int, ...]]:
        """The groups by name, in the order head, medium, tail."""
        return {"head": self.head, "medium": self.medium, "tail": self.tail}


@component
class TailRule:
    """Which classes are head, medium and tail; one way is given, or none for 100 and 20.

    ``many``/``few``: the thresholds of Liu et al. 2019 (head n > many = 100, tail n < few = 20).
    ``max_count``: tail n <= max_count, everything else is head. ``bottom``: the given
    fraction of the classes, smallest first, is tail and the same fraction at the top is head.
    ``classes``: the tail by class name or index.
    """

    many: Annotated[int, Field(ge=1)] | None = None
    few: Annotated[int, Field(ge=1)] | None = None
    max_count: Annotated[int, Field(ge=1)] | None = None
    bottom: Annotated[float, Field(gt=0, le=0.5)] | None = None
    classes: tuple[int | str, ...] | None = None

    def groups(self, class_counts: Tensor, class_names: Sequence[str]) -> Groups:
        """Sort the classes into groups by their counts (C,).

        Raises:
            DataError: A class is unknown, or the tail is empty.
        """
        counts = class_counts.tolist()
        head, tail = self._head_and_tail(counts, list(class_names))
        if not tail:
            raise DataError(
                f"data.tail: no class is in the tail (classes have {min(counts)} to {max(counts)} "
                "images, before validation takes its share); widen the rule, for example "
                "tail = { bottom = 0.3 }"
            )
        rest = [c for c in range(len(counts)) if c not in head and c not in tail]
        return Groups(tuple(sorted(head)), tuple(rest), tuple(sorted(tail)))

    def _head_and_tail(self, counts: list[int], names: list[str]) -> tuple[set[int], set[int]]:
        everything = set(range(len(counts)))
        if self.max_count is not None:
            tail = {c for c in everything if counts[c] <= self.max_count}
            return everything - tail, tail
        if self.bottom is not None:
            order = sorted(everything, key=lambda c: (counts[c], c))
            size = max(1, min(round(self.bottom * len(order)), len(order) // 2))
            return set(order[-size:]) - set(order[:size]), set(order[:size])
        if self.classes is not None:
            tail = {_class_index(c, names) for c in self.classes}
            return everything - tail, tail
        many, few = self._thresholds()
        return {c for c in everything if counts[c] > many}, {
            c for c in everything if counts[c] < few
        }

    @model_validator(mode="after")
    def _is_one_way(self) -> Self:
        thresholds = True if self.many is not None or self.few is not None else None
        ways = (thresholds, self.max_count, self.bottom, self.classes)
        if sum(way is not None for way in ways) > 1:
            raise ValueError("give one of many/few, max_count, bottom, classes, not several")
        if self.classes == ():
            raise ValueError("classes must name at least one class")
        many, few = self._thresholds()
        if few > many + 1:
            raise ValueError(
                f"few = {few} and many = {many} put a class of {many + 1} images in both head and "
                "tail; give both, with few not above many"
            )
        return self

    def _thresholds(self) -> tuple[int, int]:
        return self.many or 100, self.few or 20


def _class_index(name: int | str, names: list[str]) -> int:
    if isinstance(name, int) and 0 <= name < len(names):
        return name
    if name in names:
        return names.index(str(name))
    raise DataError(f"data.tail.classes: no class {name!r}; known: {', '.join(names[:20])}")


def total_correction(sampler: float, weight: float, adjustment: float) -> float:
    """Total correction κ = s + w + τ of sampler p ∝ n^(1-s), weights ∝ n^-w, adjustment τ.

    κ = 1 makes the population optimum balanced; above 1 it favours the tail beyond balance.
    """
    return sampler + weight + adjustment


def correction_warning(kappa: float) -> str | None:
    """What to tell the user of a recipe that corrects well beyond balance; None if it does not."""
    if kappa <= MAX_CORRECTION:
        return None
    return (
        f"sampler and loss together correct by kappa = {kappa:.2f}; above 1 the tail is favoured "
        "beyond balance (oversampling and re-weighting add up)"
    )
