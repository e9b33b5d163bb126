"""Samplers that change how likely each class is: class-aware, progressive, two-stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tuner.errors import DataError
from tuner.imbalance import Groups, class_priors, effective_number
from tuner.registry import component
from tuner.samplers.base import SAMPLERS, EpochLength, SamplerComponent


def normalized(weights: Tensor, class_counts: Tensor) -> Tensor:
    """Class probabilities from weights (C,); classes without samples get 0."""
    weights = torch.where(class_counts > 0, weights.to(torch.float64), 0.0)
    return weights / weights.sum()


def balanced(class_counts: Tensor) -> Tensor:
    """Equal probability of every class that has samples, (C,) float64."""
    return normalized(torch.ones(len(class_counts)), class_counts)


@SAMPLERS.register("natural")
@component
class Natural(SamplerComponent):
    """Every image once per epoch, shuffled."""

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """Class priors n_c / N."""
        return class_priors(class_counts)

    def is_natural(self, progress: float) -> bool:
        """Always."""
        return True

    def exponent_share(self, class_counts: Tensor, groups: Groups | None = None) -> float:
        """None."""
        return 0.0


@SAMPLERS.register("class_aware")
@component
class ClassAware(SamplerComponent):
    """Class by p ∝ n^(1-exponent), then an image of the class; can favour the tail, cap the head.

    ``exponent``: 0 = natural frequencies, 0.5 = square root, 1 = class-balanced
    (Kang et al. 2020, equation 1, with q = 1 - exponent). ``tail_factor`` multiplies p of the
    tail classes. ``head_cap`` undersamples: no class counts for more than ``head_cap``·n_min
    images, others of them each time. Before ``start`` (share of training) sampling is
    natural. ``epoch_length`` is for a ``DataLoader`` of one's own: "natural" draws N images;
    "keep_head" as many as show each image of the largest class once (after ``head_cap``):
    oversampling lengthens the pass, undersampling shortens it. It changes no trial: an epoch of
    a trial has N images for every sampler.
    """

    exponent: Annotated[float, Field(ge=0, le=1)] = 1.0
    tail_factor: Annotated[float, Field(ge=1, le=5)] = 1.0
    head_cap: Annotated[float, Field(ge=1)] | None = None
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epoch_length: EpochLength = "natural"

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """p_c ∝ f_c · min(n_c, head_cap·n_min)^(1-exponent) from ``start`` on."""
        if self.is_natural(progress):
            return class_priors(class_counts)
        weights = self._capped(class_counts).clamp(min=1) ** (1 - self.exponent)
        if self.tail_factor != 1:
            weights[list(self._tail(groups))] *= self.tail_factor
        return normalized(weights, class_counts)

    def is_natural(self, progress: float) -> bool:
        """Before ``start``, and always where nothing is changed."""
        return progress < self.start or self.canonical() == Natural()

    def num_draws(self, class_counts: Tensor, progress: float, groups: Groups | None = None) -> int:
        """N, or with "keep_head" n / p of the largest class, n after ``head_cap``."""
        if self.epoch_length == "natural" or self.is_natural(progress):
            return int(class_counts.sum())
        largest = class_counts.argmax()
        p = self.probabilities(class_counts, progress, groups)
        return max(1, round(float(self._capped(class_counts)[largest] / p[largest])))

    def exponent_share(self, class_counts: Tensor, groups: Groups | None = None) -> float:
        """``exponent``; a least-squares slope with ``tail_factor`` or ``head_cap``."""
        if self.tail_factor == 1 and self.head_cap is None:
            return self.exponent
        return super().exponent_share(class_counts, groups)

    def canonical(self) -> SamplerComponent:
        """``natural`` if nothing is changed; no cap where it cannot matter."""
        if self.exponent == 0 and self.tail_factor == 1 and self.head_cap is None:
            return Natural()
        cap = None if self.exponent == 1 else self.head_cap
        return replace(self, head_cap=cap, epoch_length="natural")

    def _capped(self, class_counts: Tensor) -> Tensor:
        counts = class_counts.to(torch.float64)
        if self.head_cap is None:
            return counts
        return counts.clamp(max=self.head_cap * float(counts[counts > 0].min()))

    def _tail(self, groups: Groups | None) -> tuple[int, ...]:
        if groups is None or not groups.tail:
            raise DataError(
                f"sampler.class_aware.tail_factor = {self.tail_factor:g} needs to know the tail; "
                "add data.tail, for example tail = { bottom = 0.3 }"
            )
        return groups.tail


@SAMPLERS.register("effective_number")
@component
class EffectiveNumber(SamplerComponent):
    """Images weighted by the inverse effective number of their class (Cui et al. 2019).

    ``beta`` 0 = natural frequencies, towards 1 = class-balanced. Before ``start`` (share of
    training) sampling is natural.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """p_c ∝ n_c (1 - β) / (1 - β^n_c) from ``start`` on."""
        if self.is_natural(progress):
            return class_priors(class_counts)
        numbers = effective_number(class_counts, self.beta).clamp(min=1)
        return normalized(class_counts / numbers, class_counts)

    def is_natural(self, progress: float) -> bool:
        """Before ``start``, and always if β = 0."""
        return progress < self.start or self.beta == 0

    def canonical(self) -> SamplerComponent:
        """``natural`` if β = 0."""
        return Natural() if self.beta == 0 else self


@SAMPLERS.register("progressive")
@component
class Progressive(SamplerComponent):
    """From natural to class-balanced in proportion to progress (Kang et al. 2020, equation 3).

    ``reverse`` goes from class-balanced to natural.
    """

    reverse: bool = False

    def probabilities(
        self, class_counts: Tensor, progress: float, groups: Groups | None = None
    ) -> Tensor:
        """(1 - t)·natural + t·balanced at progress t."""
        t = 1 - progress if self.reverse else progress
        return (1 - t) * class_priors(class_counts) + t * balanced(class_counts)

    def exponent_share(self, class_counts: Tensor, groups: Groups | None = None) -> float:
        """1 at the end, 0 in reverse."""
        return 0.0 if self.reverse else 1.0
