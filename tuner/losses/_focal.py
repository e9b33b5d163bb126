"""Focal losses: over the softmax, and over one sigmoid per class."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.losses._base import LOSSES, Loss, LossComponent, LossOptions, NonNegative
from tuner.losses._cross_entropy import CrossEntropy
from tuner.losses._numerics import log_complement, sum_of_others
from tuner.losses._weights import ClassCounts
from tuner.registry import component


class FocalLoss(Loss):
    """Softmax focal loss (1 - p_y)^γ · -log p_y.

    p is the probability itself, so class weights scale the loss and never enter (1 - p)^γ.
    The power is taken in log space: finite gradients for γ < 1 at p = 1.
    """

    def __init__(
        self, class_counts: ClassCounts, *, gamma: float = 2.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(class_counts, **options)
        self.gamma = gamma

    def table(self, logits: Tensor) -> Tensor:
        """Focal losses (N, C)."""
        log_p = logits.log_softmax(dim=1)
        return (self.gamma * log_complement(log_p)).exp() * -log_p


def sigmoid_focal_table(logits: Tensor, gamma: float) -> Tensor:
    """Sum over the C binary focal losses of a one-versus-rest classifier, (N, C).

    Lin et al. 2017 without α; γ = 0 is binary cross-entropy. The modulator (1 - p_t)^γ is
    ``exp(γ · logsigmoid(∓z))``, which keeps its value where the usual form overflows.
    """
    yes, no = logsigmoid(logits), logsigmoid(-logits)
    own, other = (gamma * no).exp() * -yes, (gamma * yes).exp() * -no
    return own + sum_of_others(other)


class SigmoidFocalLoss(Loss):
    """One-versus-rest focal loss, summed over the classes; see ``sigmoid_focal_table``."""

    def __init__(
        self, class_counts: ClassCounts, *, gamma: float = 2.0, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(class_counts, **options)
        self.gamma = gamma

    def table(self, logits: Tensor) -> Tensor:
        """Sums of binary focal losses (N, C)."""
        return sigmoid_focal_table(logits, self.gamma)


@LOSSES.register("focal")
@component
class Focal(LossComponent):
    """Softmax focal loss: samples that are right already count less, by (1 - p)^gamma."""

    gamma: NonNegative = 2.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return FocalLoss(class_counts, gamma=self.gamma)

    def canonical(self) -> LossComponent:
        """Without ``gamma`` it is cross-entropy."""
        return CrossEntropy() if self.gamma == 0 else self
