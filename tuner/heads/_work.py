"""What both ways of training share: the features in memory, a recipe's order, its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from tuner.datasets import Data
from tuner.heads._device import at_once, seats
from tuner.heads._features import Features
from tuner.heads._holding import holding
from tuner.heads._settings import HeadTraining
from tuner.heads._stack import Stack
from tuner.losses import Loss
from tuner.models import Head
from tuner.recipe import Recipe
from tuner.rows import lines

Stop = Callable[[], bool]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What training one classifier gave, on the CPU.

    Attributes:
        logits: Of the validation part, (V, C) float32, scaled as ``Lane.logits`` does.
        weight: Of the classifier for the backbone's own features, (C, D).
        bias: Of the classifier, (C,); None for a cosine head.
        train_loss: Mean loss of the last epoch's samples.
        diverged: Whether a number is not finite; then all of this is worth nothing.
    """

    logits: Tensor
    weight: Tensor
    bias: Tensor | None
    train_loss: float
    diverged: bool


@dataclass(frozen=True, eq=False)
class Order:
    """A recipe to train, its place in the caller's list and its built loss."""

    index: int
    recipe: Recipe
    loss: Loss

    @classmethod
    def of(cls, index: int, recipe: Recipe, data: Data) -> Order:
        """The order of a recipe; its loss stands at the beginning of the training."""
        loss: Loss = recipe.loss.build(data.class_counts).follow(recipe.seed)
        loss.advance(0.0)
        loss.train()
        return cls(index, recipe, loss)

    def admit(self, stack: Stack, lane: int) -> None:
        """Overwrite a lane of the stack with this recipe's untrained classifier."""
        loss = self.recipe.loss
        bias, scale = loss.head_bias(self.loss.num_classes), loss.output_scale()
        stack.admit(lane, self.recipe.seed, bias=bias, scale=scale)


class Material:
    """Features as training takes them, for either kind of head.

    A linear head sees them centred and divided by their root mean square length, which its
    bias and weight make good; a cosine head divided by each one's own length. Zeros fill up
    their number, see ``lines``.

    Raises:
        TunerError: The device has no memory for them.
    """

    def __init__(
        self,
        features: Features,
        data: Data,
        settings: HeadTraining,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        copies, images, self.features_wide = features.train.shape
        self.data, self.settings = data, settings
        self.copies, self.dtype, self.device = copies, dtype, device
        self.width = lines(self.features_wide)
        self.targets = features.train_targets
        self.classes = data.num_classes
        self.each_class = torch.arange(self.classes, device=device)[:, None]
        with holding(images, copies, device):
            self.features = features.to(device)
            self.mean, self.unit = self._measured()
        self.rows = self.features.train.flatten(0, 1)

    def _measured(self) -> tuple[Tensor, float]:
        """Mean (D,) of the plain copy and root mean square distance from it, in one float copy."""
        values = self.features.train[0].to(self.dtype, copy=True)
        mean = values.mean(0)
        return mean, float(values.sub_(mean).square_().sum(1).mean().sqrt()) or 1.0

    def stack(self, number: int, lanes: int, head: Head) -> Stack:
        """A stack for ``number`` recipes where ``lanes`` may be trained at once."""
        size = (seats(number, lanes, self.device), self.classes, self.width)
        return Stack(
            *size, features=self.features_wide, head=head, dtype=self.dtype, device=self.device
        )

    def steps(self, places: Tensor, targets: Tensor, head: Head) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and hits of step after step of a plan; a GPU makes those of many at once."""
        many = at_once(places[0].numel() * (self.width + self.classes), self.device)
        for first in range(0, len(places), many):
            part = slice(first, first + many)
            yield from zip(self.inputs(places[part], head), self.hits(targets[part]), strict=True)

    def inputs(self, places: Tensor, head: Head) -> Tensor:
        """Inputs (…, width) of a head at places of the features, copy · N + image."""
        rows = self.rows.index_select(0, places.flatten())
        return self._as_input(rows, head).view(*places.shape, self.width)

    def _as_input(self, rows: Tensor, head: Head) -> Tensor:
        values = rows.to(self.dtype)
        if head == "cosine":
            values = normalize(values)
        else:
            values.sub_(self.mean).div_(self.unit)
        more = self.width - self.features_wide
        return pad(values, (0, more)) if more else values

    def validation(self, head: Head) -> Tensor:
        """Inputs (V, width) of a head for the validation part."""
        return self._as_input(self.features.validation, head)

    def hits(self, targets: Tensor) -> Tensor:
        """1 at each sample's class, (…, C, B), for targets (…, B)."""
        return (targets.unsqueeze(-2) == self.each_class).to(self.dtype)

    def result(
        self, stack: Stack, lane: int, order: Order, validation: Tensor, train_loss: float
    ) -> HeadResult:
        """Judge a lane that is done."""
        weight, bias = stack.classifier(lane)
        acting = weight if bias is not None else normalize(weight)
        logits = validation @ acting.t()
        weight = weight[:, : self.features_wide]
        if bias is not None:
            logits += bias
            bias -= weight @ self.mean / self.unit
            weight = weight / (self.unit * self.features.scale)
        logits = (logits.float() * order.recipe.loss.output_scale()).cpu()
        finite = bool(logits.isfinite().all()) and train_loss - train_loss == 0
        bias = None if bias is None else bias.cpu()
        return HeadResult(logits, weight.cpu(), bias, train_loss, not finite)
