"""Asymmetric single-label loss (ASL), plain and with class weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

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
from tuner.losses._cross_entropy import Cap, Power, WeightedCrossEntropy
from tuner.losses._focal import Focal
from tuner.losses._numerics import log_complement, sum_of_others
from tuner.losses._smoothing import LabelSmoothing
from tuner.losses._weights import ClassCounts, fitted_exponent, frequency_weights
from tuner.registry import component


class AsymmetricLoss(Loss):
    """Single-label form of the asymmetric loss of Ben-Baruch et al. 2020.

    -Σ_c q_c·k_c·log p_c with targets q smoothed by ``eps``, k_y = (1 - p_y)^γ⁺ for the true
    class and k_c = p_c^γ⁻ for the others. The others only have a share of the target through
    ``eps``: with ``eps`` = 0, γ⁻ does nothing at all, and the loss is the focal loss of γ⁺.
    With ``eps`` > 0, γ⁻ > 0 takes the smoothing of unlikely classes back.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        eps: float = 0.1,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(class_counts, **options)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.eps = eps

    def table(self, logits: Tensor) -> Tensor:
        """Asymmetric losses (N, C)."""
        log_p = logits.log_softmax(dim=1)
        share = self.eps / self.num_classes
        own = (1 - self.eps + share) * (self.gamma_pos * log_complement(log_p)).exp() * -log_p
        if self.eps == 0:
            return own
        return own + sum_of_others(share * (self.gamma_neg * log_p).exp() * -log_p)


class WeightedAsymmetricLoss(AsymmetricLoss):
    """Asymmetric loss times the weight n^-power of the sample's class.

    The weight is that of the target also for the smoothed part. The arguments are those of
    ``AsymmetricLoss`` and ``WeightedCrossEntropyLoss``.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        eps: float = 0.1,
        power: float = 0.5,
        normalization: WeightNormalization = "samples",
        max_weight: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        weights = frequency_weights(class_counts, power, normalization, max_weight)
        options.setdefault("class_weights", weights)
        super().__init__(class_counts, gamma_pos=gamma_pos, gamma_neg=gamma_neg, eps=eps, **options)


@LOSSES.register("asymmetric")
@component
class Asymmetric(LossComponent):
    """Asymmetric single-label loss (ASL); gamma_neg does nothing where eps = 0.

    ``gamma_pos`` focuses on samples that are still wrong, ``eps`` smooths the targets, and
    ``gamma_neg`` takes that smoothing back for unlikely classes.
    """

    gamma_pos: NonNegative = 0.0
    gamma_neg: NonNegative = 4.0
    eps: Fraction = 0.1

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return AsymmetricLoss(
            class_counts, gamma_pos=self.gamma_pos, gamma_neg=self.gamma_neg, eps=self.eps
        )

    def canonical(self) -> LossComponent:
        """Focal loss without ``eps``, label smoothing without both gammas."""
        if self.eps == 0:
            return Focal(gamma=self.gamma_pos).canonical()
        if self.gamma_pos == self.gamma_neg == 0:
            return LabelSmoothing(eps=self.eps)
        return self


@LOSSES.register("weighted_asymmetric")
@component
class WeightedAsymmetric(LossComponent):
    """Asymmetric single-label loss with class weights n^-power; gamma_neg needs eps > 0."""

    gamma_pos: NonNegative = 0.0
    gamma_neg: NonNegative = 4.0
    eps: Fraction = 0.1
    power: Power = 0.5
    normalization: WeightNormalization = "samples"
    max_weight: Cap | None = None
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return WeightedAsymmetricLoss(
            class_counts,
            gamma_pos=self.gamma_pos,
            gamma_neg=self.gamma_neg,
            eps=self.eps,
            power=self.power,
            normalization=self.normalization,
            max_weight=self.max_weight,
            start=self.start,
        )

    def weight_exponent(self, class_counts: Tensor) -> float:
        """``power``, or the exponent fitted to the weights where a cap flattens them."""
        weights = frequency_weights(class_counts, self.power, max_weight=self.max_weight)
        return fitted_exponent(class_counts, weights)

    def canonical(self) -> LossComponent:
        """Without weights the plain loss; without ``eps`` and γ⁺ weighted cross-entropy."""
        if self.power == 0:
            return Asymmetric(
                gamma_pos=self.gamma_pos, gamma_neg=self.gamma_neg, eps=self.eps
            ).canonical()
        if self.eps == 0 and self.gamma_pos == 0:
            return WeightedCrossEntropy(
                power=self.power,
                normalization=self.normalization,
                max_weight=self.max_weight,
                start=self.start,
            )
        return replace(self, gamma_neg=0.0) if self.eps == 0 else self
