"""Label-distribution-aware margin loss (LDAM)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Unpack

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.imbalance import WeightNormalization
from tuner.losses._base import (
    LOSSES,
    Fraction,
    Loss,
    LossComponent,
    LossOptions,
    NonNegative,
)
from tuner.losses._numerics import log_complement
from tuner.losses._weights import ClassCounts, class_balanced_weights, fitted_exponent
from tuner.registry import component


class LdamLoss(Loss):
    """Cross-entropy with a margin m_c ∝ n_c^-1/4 on the true class (Cao et al. 2019, eq. 13).

    Meant for a cosine head, whose logits in [-1, 1] are scaled up here. A margin shifts the
    log odds of the true class, so the loss is softplus(s·m_c - log odds_c). ``start`` defers
    the weights (DRW); the margins always act.

    Args:
        class_counts: Training samples per class, (C,).
        max_margin: Margin of the rarest class.
        scale: Factor s on the logits.
        beta: β of class-balanced weights; 0 weighs nothing.
        normalization: See ``tuner.imbalance.normalize_weights``.
        **options: See ``Loss``; ``class_weights`` replaces the computed weights.
    """

    margins: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.0,
        normalization: WeightNormalization = "samples",
        **options: Unpack[LossOptions],
    ) -> None:
        if beta > 0:
            weights = class_balanced_weights(class_counts, beta, normalization)
            options.setdefault("class_weights", weights)
        super().__init__(class_counts, **options)
        self.scale = scale
        smallest = self.class_counts[self.class_counts > 0].min()
        margins = max_margin * (smallest / self.class_counts.clamp(min=smallest)) ** 0.25
        self.register_buffer("margins", margins, persistent=False)

    def table(self, logits: Tensor) -> Tensor:
        """Cross-entropies with the margin on the class in question (N, C)."""
        log_p = (self.scale * logits).log_softmax(dim=1)
        margins = self.scale * self.margins.to(logits)
        return -logsigmoid(log_p - log_complement(log_p) - margins)


@LOSSES.register("ldam")
@component
class Ldam(LossComponent):
    """LDAM: margins n^-1/4 over a cosine head; with beta and start the weights of DRW.

    The published recipe is ``beta`` = 0.9999 with ``start`` = 0.8; ``beta`` = 0 weighs nothing.
    """

    head: ClassVar[Literal["linear", "cosine"]] = "cosine"

    max_margin: NonNegative = 0.5
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    beta: Fraction = 0.0
    normalization: WeightNormalization = "samples"
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return LdamLoss(
            class_counts,
            max_margin=self.max_margin,
            scale=self.scale,
            beta=self.beta,
            normalization=self.normalization,
            start=self.start,
        )

    def output_scale(self) -> float:
        """The scale of the loss: cosines in [-1, 1] are no logits yet."""
        return self.scale

    def plain(self) -> LossComponent:
        """Without margins and weights it is cross-entropy on the scaled cosines."""
        return Ldam(max_margin=0.0, scale=self.scale)

    def weight_exponent(self, class_counts: Tensor) -> float:
        """Exponent fitted to the class-balanced weights; margins have none."""
        return fitted_exponent(class_counts, class_balanced_weights(class_counts, self.beta))

    def canonical(self) -> LossComponent:
        """Without ``beta`` there is nothing to normalise or to defer."""
        return replace(self, normalization="samples", start=0.0) if self.beta == 0 else self
