"""Softmax equalization loss (SEQL): tail classes are spared as negatives."""

from __future__ import annotations

from typing import Annotated, Self, Unpack

import torch
from pydantic import Field
from torch import Tensor

from tuner.imbalance import class_priors
from tuner.losses._base import LOSSES, Fraction, Loss, LossComponent, LossOptions
from tuner.losses._cross_entropy import CrossEntropy
from tuner.losses._weights import ClassCounts
from tuner.registry import component
from tuner.seeding import derive_seed

_WORD = 0xFFFFFFFF


class EqualizationLoss(Loss):
    """Cross-entropy whose denominator leaves out tail classes (Tan et al. 2020, equation 8).

    In train mode, a class whose share of the training samples is below ``threshold`` is left
    out of the softmax of a sample of another class with probability ``gamma``, drawn for each
    sample and class. In eval mode nothing is left out, so it is plain cross-entropy.

    The draws are a hash of ``seed``, the number of batches so far (in the ``state_dict``) and
    the place in the batch: the same on every device, resumable, without a host round trip.

    Args:
        class_counts: Training samples per class, (C,).
        gamma: Probability that a tail class is left out.
        threshold: Share of the training samples below which a class belongs to the tail.
        seed: Seed of the draws.
        **options: See ``Loss``.
    """

    tail: Tensor
    steps: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma: float = 0.9,
        threshold: float = 0.005,
        seed: int = 0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(class_counts, **options)
        self.gamma = gamma
        self.follow(seed)
        tail = class_priors(self.class_counts) < threshold
        self.register_buffer("tail", tail, persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def follow(self, seed: int) -> Self:
        """Draw by this seed from here on."""
        self.seed = derive_seed("equalization", seed)
        return self

    def table(self, logits: Tensor) -> Tensor:
        """Negative log probabilities over the classes that are not left out (N, C)."""
        if not (self.training and self.active):
            return -logits.log_softmax(dim=1)
        spared = self._spared(logits)
        # Finite, because the gradient through a row of -inf alone would be NaN.
        absent = torch.finfo(logits.dtype).min / 4
        total = logits.masked_fill(spared, absent).logsumexp(dim=1, keepdim=True)
        return torch.where(spared, torch.logaddexp(total, logits), total) - logits

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Reduced loss; in train mode the next batch draws anew."""
        loss = super().forward(logits, targets)
        if self.training:
            self.steps.add_(1)
        return loss

    def _spared(self, logits: Tensor) -> Tensor:
        """Mask (N, C) of the tail classes that are left out as negatives of each sample."""
        places = torch.arange(logits.numel(), device=logits.device).view(logits.shape)
        drawn = equalization_draws(self.seed, self.steps.to(logits.device), places)
        return (drawn < self.gamma) & self.tail.to(logits.device)


def equalization_draws(seed: int | Tensor, steps: Tensor, places: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, that decide who is left out in the batch after ``steps``.

    Of the seed the lowest 32 bits count. ``places`` count samples and their classes, sample after
    sample, in any arrangement.
    """
    return _mix(places + _mix(steps + seed)).double() / (_WORD + 1)


def _mix(words: Tensor) -> Tensor:
    """Scramble 32-bit words held in int64 (two rounds of shift, xor and multiply)."""
    words = words & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = ((words ^ (words >> shift)) * factor) & _WORD
    return words ^ (words >> 16)


@LOSSES.register("equalization")
@component
class Equalization(LossComponent):
    """Softmax equalization loss: classes below a share of the data are spared as negatives."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.9
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.005
    start: Fraction = 0.0

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return EqualizationLoss(
            class_counts, gamma=self.gamma, threshold=self.threshold, start=self.start
        )

    def canonical(self) -> LossComponent:
        """Nobody spared is cross-entropy."""
        return CrossEntropy() if self.gamma == 0 or self.threshold == 0 else self
