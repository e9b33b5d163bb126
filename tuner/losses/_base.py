"""What every loss shares: weights, soft targets, smoothing, reduction, deferral; its component."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self, TypedDict

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.errors import DataError
from tuner.losses._numerics import at_least_float32
from tuner.losses._weights import ClassCounts, checked_counts
from tuner.registry import Registry

Reduction = Literal["batch", "weighted", "sum", "none"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossOptions(TypedDict, total=False):
    """Keyword arguments that every loss hands on to ``Loss``."""

    class_weights: Tensor | None
    reduction: Reduction
    label_smoothing: float | Tensor
    start: float


class Loss(nn.Module, ABC):
    """A classification loss, given by one table: the loss of each sample for each class.

    Hard targets pick from the table; soft targets t (N, C) take Σ_c t_c·w_c·table[:, c];
    label smoothing softens the targets first. So class weights, mixup and smoothing mean
    the same in every loss. Half-precision logits are computed in float32.

    Args:
        class_counts: Training samples per class, (C,). A class without samples gets weight
            0, a warning, and is refused as a hard target.
        class_weights: Weight of each class, (C,); None weighs nothing.
        reduction: ``batch``: Σ w·l / B, so that the learning rate keeps its meaning;
            ``weighted``: Σ w·l / Σ w, as torch does for weights and index targets;
            ``sum``; ``none``: (N,).
        label_smoothing: Share of each target spread evenly over all classes; a tensor (C,)
            smooths each class by its own share.
        start: Fraction of the training from which weights and logit adjustments act.

    Raises:
        ValueError: A tensor does not fit the classes, a fraction is not in [0, 1), or the
            counts are negative, not finite or all 0.
    """

    class_counts: Tensor
    class_weights: Tensor | None
    smoothing: Tensor | None

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        class_weights: Tensor | None = None,
        reduction: Reduction = "batch",
        label_smoothing: float | Tensor = 0.0,
        start: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), not {start}")
        self.reduction = reduction
        self.start = start
        self.active = start == 0
        counts = checked_counts(class_counts).detach().to(torch.float64)
        self.register_buffer("class_counts", counts, persistent=False)
        self.register_buffer("class_weights", _weights(class_weights, counts), persistent=False)
        self.register_buffer("smoothing", _smoothing(label_smoothing, counts), persistent=False)
        self.empty_classes = tuple((counts == 0).nonzero().flatten().tolist())
        if self.empty_classes:
            warnings.warn(
                f"classes {list(self.empty_classes)} have no training samples: weight 0",
                stacklevel=2,
            )

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self.class_counts.numel()

    @abstractmethod
    def table(self, logits: Tensor) -> Tensor:
        """Unweighted losses (N, C): entry [i, c] is the loss of sample i were its class c."""

    def weights(self, targets: Tensor) -> Tensor | None:
        """Class weights (C,) that act on this batch now; None weighs nothing."""
        return self.class_weights if self.active else None

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses (N,) including class weights, of ``targets`` (N,) or soft (N, C).

        Raises:
            DataError: A class without training samples is a hard target.
            ValueError: The logits are for another number of classes.
        """
        self._refuse_misfit(logits)
        self._refuse_empty_classes(targets)
        table = self.table(at_least_float32(logits))
        weights = self.weights(targets)
        if targets.ndim == 1 and self.smoothing is None:
            losses = table.gather(1, targets[:, None]).squeeze(1)
            return losses if weights is None else losses * weights.to(table)[targets]
        soft = self._soften(self.as_soft(targets, table))
        return (soft * (table if weights is None else table * weights.to(table))).sum(dim=1)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Reduced loss of logits (N, C) and targets, indices (N,) or soft (N, C)."""
        losses = self.per_sample(logits, targets)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if self.reduction == "batch":
            return losses.mean()
        weights = self.weights(targets)
        if weights is None:
            return losses.mean()
        return losses.sum() / self.as_soft(targets, losses).matmul(weights.to(losses)).sum()

    def advance(self, progress: float) -> None:
        """Note that a fraction ``progress`` in [0, 1) of the training is done."""
        self.active = progress >= self.start

    def follow(self, seed: int) -> Self:
        """Let what the loss draws follow the seed of a recipe; most losses draw nothing."""
        return self

    def as_soft(self, targets: Tensor, like: Tensor) -> Tensor:
        """Targets as rows of class shares (N, C), in dtype and device of ``like``."""
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, self.num_classes)
        return targets.to(like)

    def _soften(self, soft: Tensor) -> Tensor:
        if self.smoothing is None:
            return soft
        spread = soft * self.smoothing.to(soft)
        return soft - spread + spread.mean(dim=1, keepdim=True)

    def _refuse_misfit(self, logits: Tensor) -> None:
        if logits.ndim != 2:
            raise ValueError(f"logits must be (N, {self.num_classes}), not {tuple(logits.shape)}")
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits have {logits.shape[1]} classes, class_counts {self.num_classes}"
            )

    def _refuse_empty_classes(self, targets: Tensor) -> None:
        if not self.empty_classes or targets.ndim != 1:
            return
        met = [c for c in self.empty_classes if bool((targets == c).any())]
        if met:
            raise DataError(
                f"classes {met} are targets but have no training samples; "
                "count the classes on the training part, or leave these classes out"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device, but keep the class statistics in float64.

        A count above 65504 is infinite in float16, so ``model.half()`` must not reach them.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _weights(class_weights: Tensor | None, class_counts: Tensor) -> Tensor | None:
    if class_weights is None:
        return None
    if class_weights.shape != class_counts.shape:
        raise ValueError(
            f"class_weights must be {tuple(class_counts.shape)}, not {tuple(class_weights.shape)}"
        )
    return torch.where(class_counts > 0, class_weights.detach().to(class_counts), 0.0)


def _smoothing(label_smoothing: float | Tensor, class_counts: Tensor) -> Tensor | None:
    smoothing = torch.as_tensor(label_smoothing, dtype=torch.float64).to(class_counts.device)
    if bool(((smoothing < 0) | (smoothing >= 1)).any()):
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    return smoothing.expand_as(class_counts).clone() if bool((smoothing > 0).any()) else None


class LossComponent(ABC):
    """Hyperparameters of one loss, and what the rest of a recipe has to know about it."""

    head: ClassVar[Literal["linear", "cosine"]] = "linear"

    @abstractmethod
    def build(self, class_counts: Tensor) -> Loss:
        """The loss for training data with these samples per class, (C,)."""

    def head_bias(self, num_classes: int) -> float | None:
        """Initial bias of the last layer, to be kept from weight decay; None: no wish."""
        return None

    def output_scale(self) -> float:
        """Factor that turns the model's output into logits; not 1 for a cosine head."""
        return 1.0

    def plain(self) -> LossComponent:
        """The loss that a deferred training starts with: cross-entropy on the same outputs."""
        return LOSSES["cross_entropy"]()

    def weight_exponent(self, class_counts: Tensor) -> float:
        """Share w of the total correction κ = s + w + τ: weights act as n^-w."""
        return 0.0

    def canonical(self) -> LossComponent:
        """The simplest component that trains exactly the same."""
        return self


LOSSES: Registry[LossComponent] = Registry("loss")
