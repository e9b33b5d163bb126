"""Cross-entropy weighted by how often each class is currently missed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor, distributed

from tuner.losses._base import LOSSES, Fraction, Loss, LossComponent, LossOptions
from tuner.losses._cross_entropy import CrossEntropy, CrossEntropyLoss
from tuner.losses._weights import ClassCounts
from tuner.registry import component

Mode = Literal["repaired", "reference"]


class FnrAdaptiveLoss(CrossEntropyLoss):
    """Cross-entropy whose class weights follow the false negative rates of the training.

    ``repaired``: the rate is the ratio of two running sums, misses and targets, which decay
    with every sample seen; so a rare class is not held at its start value, and a start value
    needs no correction. The weights have a floor and mean 1 over the batch's targets, hence
    the loss does not fade as the training accuracy grows. A batch counts after its loss.

    ``reference``: the rate of each class in the batch moves by ``alpha`` towards the batch's
    rate, before the loss of that batch, with neither floor nor normalisation.

    Rates start at 1, change in train mode only, are summed over processes where
    ``torch.distributed`` runs, and are part of the ``state_dict``.

    Args:
        class_counts: Training samples per class, (C,); their sum is one epoch.
        half_life: Epochs or steps after which a sample counts half; ``repaired`` only.
        unit: Unit of ``half_life``.
        floor: Smallest rate a weight is made of, in (0, 1]; ``repaired`` only.
        mode: See above.
        alpha: Step of ``reference``.
        **options: See ``Loss``.
    """

    missed: Tensor
    seen: Tensor
    rate: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        half_life: float = 1.0,
        unit: Literal["epochs", "steps"] = "epochs",
        floor: float = 0.1,
        mode: Mode = "repaired",
        alpha: float = 0.01,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(class_counts, **options)
        self.mode = mode
        self.alpha = alpha
        self.floor = floor if mode == "repaired" else 0.0
        self.half_life = half_life * (float(self.class_counts.sum()) if unit == "epochs" else 1)
        self.unit = unit
        self.register_buffer("missed", torch.zeros_like(self.class_counts))
        self.register_buffer("seen", torch.zeros_like(self.class_counts))
        self.register_buffer("rate", torch.ones_like(self.class_counts))

    @property
    def importance(self) -> Tensor:
        """Weight of each class before the normalisation over the batch, (C,)."""
        return self.rate.clamp(min=self.floor)

    def weights(self, targets: Tensor) -> Tensor | None:
        """Class weights (C,) from the rates, times the fixed weights if there are some."""
        fixed = super().weights(targets)
        if not self.active:
            return fixed
        importance = self.importance
        if self.mode == "repaired":
            importance = importance / self.as_soft(targets, importance).matmul(importance).mean()
        return importance if fixed is None else importance * fixed

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Reduced loss; in train mode the batch then counts for the rates."""
        self._refuse_misfit(logits)
        if self.training and self.mode == "reference":
            self._observe(logits, targets)
        loss = super().forward(logits, targets)
        if self.training and self.mode == "repaired":
            self._observe(logits, targets)
        return loss

    @torch.no_grad()
    def _observe(self, logits: Tensor, targets: Tensor) -> None:
        shares = self.as_soft(targets, self.rate)
        hit = self.as_soft(logits.argmax(dim=1), self.rate)
        sums = torch.stack([(shares * (1 - hit)).sum(dim=0), shares.sum(dim=0)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        missed, seen = sums
        if self.mode == "repaired":
            decay = 0.5 ** ((len(logits) if self.unit == "epochs" else 1) / self.half_life)
            missed = self.missed.mul_(decay).add_(missed)
            seen = self.seen.mul_(decay).add_(seen)
            moved = missed / seen
        else:
            moved = self.rate.lerp(missed / seen, self.alpha)
        self.rate.copy_(torch.where(seen > 0, moved, self.rate))


@LOSSES.register("fnr_adaptive")
@component
class FnrAdaptive(LossComponent):
    """Cross-entropy weighted by the running false negative rate of each class.

    ``half_life`` is in epochs; it and ``floor`` belong to the mode ``repaired``, ``alpha`` to
    ``reference``, which is the plain moving average per batch.
    """

    half_life: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    mode: Mode = "repaired"
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.01
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return FnrAdaptiveLoss(
            class_counts,
            half_life=self.half_life,
            floor=self.floor,
            mode=self.mode,
            alpha=self.alpha,
            start=self.start,
        )

    def canonical(self) -> LossComponent:
        """A floor of 1 weighs nothing; what the mode does not use takes its default."""
        if self.mode == "reference":
            return replace(FnrAdaptive(mode="reference"), alpha=self.alpha, start=self.start)
        return CrossEntropy() if self.floor == 1 else replace(self, alpha=0.01)
