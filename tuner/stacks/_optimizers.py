"""Steps of SGD and AdamW over rows of weights, each row by its own hyperparameters.

Hyperparameters are tensors: a lane that takes a seat overwrites them, and no step is recorded
anew. The formulas are those of ``torch.optim``. Every operation treats rows alike and apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from tuner import optim
from tuner.placing import placed
from tuner.recipe import Recipe
from tuner.stacks._device import Uncapturable
from tuner.stacks._state import State

Bounds = Sequence[tuple[int, int]]


class RowOptimizer(ABC):
    """Hyperparameters of all seats, and the step that they govern.

    ``decay`` (K, G) are the weight decays of the groups of parameters. Learning rates come with
    each step, as the first G of its ``numbers`` (K, H); see ``numbers``.
    """

    moments: ClassVar[tuple[str, ...]]
    more: ClassVar[int] = 0
    counts_steps: ClassVar[bool] = False
    parts: frozenset[str] = frozenset()
    """What lanes so far needed beside the plain formula; a step is recorded for these."""

    def __init__(self, seats: int, groups: int, like: Tensor) -> None:
        self.groups, self.like = groups, like
        self.host = torch.zeros(seats, groups + self.more, dtype=like.dtype)
        self.there = placed(self.host, like.device).clone()

    @property
    def width(self) -> int:
        """How many numbers each step needs, H."""
        return self.groups

    def admit(self, seat: int, optimizer: torch.optim.Optimizer) -> None:
        """Overwrite the hyperparameters of a seat by those of a lane's optimizer."""
        for group, values in enumerate(optimizer.param_groups):
            self.host[seat, group] = values["weight_decay"]
        for index, value in enumerate(self.own(optimizer.param_groups[0]), self.groups):
            self.host[seat, index] = value
        self.there.copy_(placed(self.host, self.like.device))

    def own(self, options: Mapping[str, Any]) -> list[float]:
        """The ``more`` numbers that belong to the seat."""
        return []

    def column(self, index: int) -> Tensor:
        """A hyperparameter of all seats, (K, 1): decays, then what is the seats' own."""
        return self.there[:, index : index + 1]

    def numbers(self, rates: Sequence[float], steps: int) -> list[float]:
        """What the step after so many ``steps`` needs, learning rates first."""
        return list(rates)

    @abstractmethod
    def step(
        self, state: State, bounds: Bounds, gradient: Tensor, numbers: Tensor, active: Tensor | None
    ) -> None:
        """One step of the rows that are ``active`` (K, 1), of all if None; others keep their bits.

        Args:
            state: Weights and moments.
            bounds: Where the groups of parameters lie in a row.
            gradient: (K, N); it is used up.
            numbers: (K, H).
            active: Which rows take part.
        """


class RowSGD(RowOptimizer):
    """SGD with momentum, of Nesterov's kind or not; dampening is 0."""

    moments = ("momentum_buffer",)
    more = 3

    def own(self, options: Mapping[str, Any]) -> list[float]:
        """The momentum, and the shares of gradient and momentum in a step."""
        momentum = float(options["momentum"])
        if not options["nesterov"]:
            return [momentum, 0.0, 1.0]
        self.parts = frozenset({"nesterov"})
        return [momentum, 1.0, momentum]

    def step(
        self, state: State, bounds: Bounds, gradient: Tensor, numbers: Tensor, active: Tensor | None
    ) -> None:
        """See the base class."""
        momentum, of_change, of_moved = (self.column(self.groups + i) for i in range(3))
        for group, (first, end) in enumerate(bounds):
            weights, kept, change = (
                rows[:, first:end]
                for rows in (state.weights, state.moments["momentum_buffer"], gradient)
            )
            change.addcmul_(weights, self.column(group))
            moved = step = torch.addcmul(change, kept, momentum)
            if "nesterov" in self.parts:
                step = change.mul_(of_change).addcmul_(moved, of_moved)
            rate = numbers[:, group : group + 1]
            into(weights, torch.addcmul(weights, step, rate, value=-1), active)
            into(kept, moved, active)


class RowAdamW(RowOptimizer):
    """Adam with decoupled weight decay; corrections of the moments come with each step."""

    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def __init__(
        self, seats: int, groups: int, like: Tensor, *, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(seats, groups, like)
        self.betas, self.eps = betas, eps

    @property
    def width(self) -> int:
        """Learning rates, and two corrections."""
        return self.groups + 2

    def numbers(self, rates: Sequence[float], steps: int) -> list[float]:
        """Learning rates, 1 - β₁ᵗ and √(1 - β₂ᵗ)."""
        first, second = (1 - beta ** (steps + 1) for beta in self.betas)
        return [*rates, first, second**0.5]

    def step(
        self, state: State, bounds: Bounds, gradient: Tensor, numbers: Tensor, active: Tensor | None
    ) -> None:
        """See the base class."""
        state.steps.add_(1 if active is None else active[:, 0])
        first, second = numbers[:, -2:-1], numbers[:, -1:]
        mean, square = state.moments["exp_avg"], state.moments["exp_avg_sq"]
        into(mean, torch.lerp(mean, gradient, 1 - self.betas[0]), active)
        fresh = gradient.mul_(gradient).mul_(1 - self.betas[1])
        into(square, fresh.add_(square * self.betas[1]), active)
        step = (mean / first).div_((square.sqrt() / second).add_(self.eps))
        for group, (begin, end) in enumerate(bounds):
            weights, rate = state.weights[:, begin:end], numbers[:, group : group + 1]
            shrunk = weights * (1 - rate * self.column(group))
            into(weights, shrunk.addcmul_(step[:, begin:end], rate, value=-1), active)


def into(rows: Tensor, new: Tensor, active: Tensor | None) -> None:
    """Overwrite the rows that are active, all if None; the others keep their bits."""
    if active is None:
        rows.copy_(new)
    else:
        torch.where(active, new, rows, out=rows)


def row_optimizer(
    recipe: Recipe, optimizer: torch.optim.Optimizer, seats: int, like: Tensor
) -> RowOptimizer:
    """What steps rows as the recipe's optimizer does.

    Raises:
        Uncapturable: It is none of those above.
    """
    kind, groups = type(recipe.optimizer), len(optimizer.param_groups)
    options: dict[str, Any] = optimizer.param_groups[0]
    if kind is optim.SGD:
        return RowSGD(seats, groups, like)
    if kind is optim.AdamW:
        return RowAdamW(seats, groups, like, betas=options["betas"], eps=options["eps"])
    raise Uncapturable(f"{kind.__name__} does not step in rows")
