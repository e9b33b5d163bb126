"""Cross-entropy, plain and with weights that are a power of the class counts."""

from __future__ import annotations

from typing import Annotated, Unpack

from pydantic import Field
from torch import Tensor

from tuner.imbalance import WeightNormalization
from tuner.losses._base import LOSSES, Fraction, Loss, LossComponent, LossOptions
from tuner.losses._weights import ClassCounts, fitted_exponent, frequency_weights
from tuner.registry import component

Power = Annotated[float, Field(ge=0, le=1)]
Cap = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class CrossEntropyLoss(Loss):
    """Softmax cross-entropy -log p_y, also called negative log likelihood."""

    def table(self, logits: Tensor) -> Tensor:
        """Negative log probabilities (N, C)."""
        return -logits.log_softmax(dim=1)


class WeightedCrossEntropyLoss(CrossEntropyLoss):
    """Cross-entropy with class weights n^-power.

    Args:
        class_counts: Training samples per class, (C,).
        power: 0 weighs nothing, 0.5 dampens by the square root, 1 is inverse frequency.
        normalization: See ``tuner.imbalance.normalize_weights``.
        max_weight: Cap in multiples of the median weight, before normalisation.
        **options: See ``Loss``; ``class_weights`` replaces the computed weights.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        power: float = 0.5,
        normalization: WeightNormalization = "samples",
        max_weight: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        weights = frequency_weights(class_counts, power, normalization, max_weight)
        options.setdefault("class_weights", weights)
        super().__init__(class_counts, **options)


@LOSSES.register("cross_entropy")
@component
class CrossEntropy(LossComponent):
    """Softmax cross-entropy: the baseline that every other loss has to beat."""

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return CrossEntropyLoss(class_counts)


@LOSSES.register("weighted_cross_entropy")
@component
class WeightedCrossEntropy(LossComponent):
    """Cross-entropy with class weights n^-power; 0.5 = square-root dampening.

    ``max_weight`` caps the weights at that multiple of the median weight. ``start`` defers
    the weights to the fraction of the training from which they act.
    """

    power: Power = 0.5
    normalization: WeightNormalization = "samples"
    max_weight: Cap | None = None
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return WeightedCrossEntropyLoss(
            class_counts,
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
        """Power 0 weighs nothing."""
        return CrossEntropy() if self.power == 0 else self
