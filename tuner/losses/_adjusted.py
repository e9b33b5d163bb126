"""Losses on logits adjusted by the class priors: balanced softmax, logit-adjusted, VS."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from tuner.imbalance import log_priors
from tuner.losses._base import (
    LOSSES,
    Fraction,
    Loss,
    LossComponent,
    LossOptions,
    NonNegative,
)
from tuner.losses._cross_entropy import CrossEntropy
from tuner.losses._weights import ClassCounts
from tuner.registry import component


class VectorScalingLoss(Loss):
    """Cross-entropy of z_c·(n_c / n_max)^γ + τ·log π_c (Kini et al. 2021, equation 2).

    γ alone is the class-dependent temperature loss, τ alone is logit adjustment. The model
    predicts with its bare logits.

    Args:
        class_counts: Training samples per class, (C,).
        gamma: Strength of the multiplicative adjustment.
        tau: Strength of the additive adjustment.
        floor: Added to π^τ inside the logarithm; the code of Menon et al. uses 1e-12.
        **options: See ``Loss``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma: float = 0.15,
        tau: float = 1.0,
        floor: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(class_counts, **options)
        log_prior = log_priors(self.class_counts)
        shift = tau * log_prior if floor == 0 else ((tau * log_prior).exp() + floor).log()
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", (gamma * (log_prior - log_prior.max())).exp(), False)
        self.scaled = gamma != 0

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits as the training sees them (N, C); bare before ``start``."""
        if not self.active:
            return logits
        if self.scaled:
            logits = logits * self.scale.to(logits)
        return logits + self.shift.to(logits)

    def table(self, logits: Tensor) -> Tensor:
        """Negative log probabilities of the adjusted logits (N, C)."""
        return -self.adjust(logits).log_softmax(dim=1)


class LogitAdjustedLoss(VectorScalingLoss):
    """Cross-entropy of z + τ·log π (Menon et al. 2021, equation 10)."""

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        tau: float = 1.0,
        floor: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(class_counts, gamma=0.0, tau=tau, floor=floor, **options)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """Cross-entropy of z + log n (Ren et al. 2020): logit adjustment with τ = 1."""

    def __init__(self, class_counts: ClassCounts, **options: Unpack[LossOptions]) -> None:
        super().__init__(class_counts, tau=1.0, **options)


@LOSSES.register("balanced_softmax")
@component
class BalancedSoftmax(LossComponent):
    """Balanced softmax: cross-entropy of logits + log n, the priors learnt outside the model."""

    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return BalancedSoftmaxLoss(class_counts, start=self.start)

    def weight_exponent(self, class_counts: Tensor) -> float:
        """τ = 1."""
        return 1.0


@LOSSES.register("logit_adjusted")
@component
class LogitAdjusted(LossComponent):
    """Logit-adjusted loss: cross-entropy of logits + tau * log prior."""

    tau: NonNegative = 1.0
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return LogitAdjustedLoss(class_counts, tau=self.tau, start=self.start)

    def weight_exponent(self, class_counts: Tensor) -> float:
        """τ."""
        return self.tau

    def canonical(self) -> LossComponent:
        """τ = 0 is cross-entropy, τ = 1 balanced softmax."""
        if self.tau == 0:
            return CrossEntropy()
        return BalancedSoftmax(start=self.start) if self.tau == 1 else self


@LOSSES.register("vector_scaling")
@component
class VectorScaling(LossComponent):
    """Vector-scaling loss: logits times (n / n_max)^gamma, plus tau * log prior."""

    gamma: NonNegative = 0.15
    tau: NonNegative = 1.0
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return VectorScalingLoss(class_counts, gamma=self.gamma, tau=self.tau, start=self.start)

    def weight_exponent(self, class_counts: Tensor) -> float:
        """τ; γ acts on margins and has no exponent."""
        return self.tau

    def canonical(self) -> LossComponent:
        """Without ``gamma`` it is the logit-adjusted loss."""
        if self.gamma == 0:
            return LogitAdjusted(tau=self.tau, start=self.start).canonical()
        return self
