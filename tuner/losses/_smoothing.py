"""Label smoothing, the same for all classes or by class count."""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from tuner.losses._base import LOSSES, Fraction, Loss, LossComponent, LossOptions
from tuner.losses._cross_entropy import CrossEntropy, CrossEntropyLoss
from tuner.losses._weights import ClassCounts, checked_counts
from tuner.registry import component

Shape = Literal["concave", "linear", "convex"]


class LabelSmoothingLoss(CrossEntropyLoss):
    """Cross-entropy whose targets give a share ``eps`` evenly to all classes.

    Szegedy et al. 2016, section 7. The argument ``label_smoothing`` is taken by ``eps``.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        eps: float | Tensor = 0.1,
        **options: Unpack[LossOptions],
    ) -> None:
        options["label_smoothing"] = eps
        super().__init__(class_counts, **options)


def smoothing_by_count(
    class_counts: ClassCounts, smooth_head: float, smooth_tail: float, shape: Shape = "concave"
) -> Tensor:
    """Smoothing of each class, (C,) float64, from ``smooth_tail`` (rarest) to ``smooth_head``.

    Zhong et al. 2021 (MiSLAS), equations 7 to 9. Equal counts all get ``smooth_head``.
    """
    counts = checked_counts(class_counts).to(torch.float64)
    low, high = counts[counts > 0].min(), counts.max()
    if low == high:
        return torch.full_like(counts, smooth_head)
    position = ((counts - low) / (high - low)).clamp(min=0)
    angle = position * (math.pi / 2)
    rise = {"concave": angle.sin(), "linear": position, "convex": 1 - angle.cos()}[shape]
    return smooth_tail + (smooth_head - smooth_tail) * rise


class LabelAwareSmoothingLoss(LabelSmoothingLoss):
    """Label smoothing that grows with the class count, as head classes are over-confident.

    Zhong et al. 2021 (MiSLAS); see ``smoothing_by_count`` for the arguments.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        smooth_head: float = 0.4,
        smooth_tail: float = 0.1,
        shape: Shape = "concave",
        **options: Unpack[LossOptions],
    ) -> None:
        eps = smoothing_by_count(class_counts, smooth_head, smooth_tail, shape)
        super().__init__(class_counts, eps=eps, **options)


@LOSSES.register("label_smoothing")
@component
class LabelSmoothing(LossComponent):
    """Cross-entropy with a share eps of every target spread over all classes."""

    eps: Fraction = 0.1

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return LabelSmoothingLoss(class_counts, eps=self.eps)

    def canonical(self) -> LossComponent:
        """Without ``eps`` it is cross-entropy."""
        return CrossEntropy() if self.eps == 0 else self


@LOSSES.register("label_aware_smoothing")
@component
class LabelAwareSmoothing(LossComponent):
    """Label smoothing from smooth_tail for the rarest class to smooth_head for the largest."""

    smooth_head: Fraction = 0.4
    smooth_tail: Fraction = 0.1
    shape: Shape = "concave"

    def build(self, class_counts: Tensor) -> Loss:
        """The loss for these class counts."""
        return LabelAwareSmoothingLoss(
            class_counts,
            smooth_head=self.smooth_head,
            smooth_tail=self.smooth_tail,
            shape=self.shape,
        )

    def canonical(self) -> LossComponent:
        """The same smoothing at both ends is plain label smoothing."""
        if self.smooth_head == self.smooth_tail:
            return LabelSmoothing(eps=self.smooth_head).canonical()
        return self
