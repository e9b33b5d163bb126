"""Class-balanced losses: weights from the effective number of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self, Unpack

from pydantic import Field, model_validator
from torch import Tensor

from tuner.imbalance import WeightNormalization
from tuner.losses._base import (
    LOSSES,
    Fraction,
    Loss,
    LossComponent,
    LossOptions,
    NonNegative,
)
from tuner.losses._cross_entropy import CrossEntropy
from tuner.losses._focal import sigmoid_focal_table
from tuner.losses._weights import ClassCounts, class_balanced_weights, fitted_exponent
from tuner.registry import component

Base = Literal["softmax", "sigmoid", "focal"]


class ClassBalancedLoss(Loss):
    """Softmax, sigmoid or sigmoid-focal loss with weights 1 / E_n (Cui et al. 2019).

    Args:
        class_counts: Training samples per class, (C,).
        beta: β of the effective number E = (1 - βⁿ) / (1 - β); 0 weighs nothing.
        base: The weighted loss; ``sigmoid`` and ``focal`` sum over the classes.
        gamma: Focusing of ``focal``; the other bases do not use it.
        normalization: ``classes`` is the paper's; see ``tuner.imbalance.normalize_weights``.
        **options: See ``Loss``; ``class_weights`` replaces the computed weights.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        beta: float = 0.999,
        base: Base = "softmax",
        gamma: float = 1.0,
        normalization: WeightNormalization = "samples",
        **options: Unpack[LossOptions],
    ) -> None:
        weights = class_balanced_weights(class_counts, beta, normalization)
        options.setdefault("class_weights", weights)
        super().__init__(class_counts, **options)
        self.base = base
        self.gamma = gamma if base == "focal" else 0.0

    def table(self, logits: Tensor) -> Tensor:
        """Losses of the base (N, C)."""
        if self.base == "softmax":
            return -logits.log_softmax(dim=1)
        return sigmoid_focal_table(logits, self.gamma)


@LOSSES.register("class_balanced")
@component
class ClassBalanced(LossComponent):
    """Class-balanced loss: weights from the effective number of samples (Cui et al. 2019).

    β acts relative to the class counts: where (1 - β)·n is well above 1, all classes get the
    same weight. ``effective_samples`` = 1 / (1 - β) says it as a number of samples instead;
    with neither, β is 0.999. ``gamma`` acts for the base ``focal`` only.
    """

    published: ClassVar[Mapping[str, float]] = {"beta": 0.999, "effective_samples": 1000.0}

    beta: Fraction | None = None
    effective_samples: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    base: Base = "softmax"
    gamma: NonNegative = 1.0
    normalization: WeightNormalization = "samples"
    start: Fraction = 0.0

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.beta is not None and self.effective_samples is not None:
            raise ValueError("give beta or effective_samples = 1 / (1 - beta), not both")
        return self

    @property
    def resolved_beta(self) -> float:
        """β, whichever way it was given."""
        if self.effective_samples is not None:
            return 1 - 1 / self.effective_samples
        return self.published["beta"] if self.beta is None else self.beta

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return ClassBalancedLoss(
            class_counts,
            beta=self.resolved_beta,
            base=self.base,
            gamma=self.gamma,
            normalization=self.normalization,
            start=self.start,
        )

    def head_bias(self, num_classes: int) -> float | None:
        """-log(C - 1) for one sigmoid per class, so that training starts at p = 1 / C."""
        return None if self.base == "softmax" else -math.log(num_classes - 1)

    def weight_exponent(self, class_counts: Tensor) -> float:
        """Exponent fitted to the weights: 0 where β saturates, towards 1 for β towards 1."""
        weights = class_balanced_weights(class_counts, self.resolved_beta)
        return fitted_exponent(class_counts, weights)

    def canonical(self) -> LossComponent:
        """β instead of effective samples; nothing that does not act."""
        beta = self.resolved_beta
        if beta == 0 and self.base == "softmax":
            return CrossEntropy()
        plain = ClassBalanced(beta=beta)
        focal = self.base == "focal" and self.gamma > 0
        canonical = replace(plain, base="focal", gamma=self.gamma) if focal else plain
        if self.base != "softmax" and not focal:
            canonical = replace(plain, base="sigmoid")
        if beta == 0:
            return canonical
        return replace(canonical, normalization=self.normalization, start=self.start)
