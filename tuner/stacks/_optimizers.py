"""Steps of SGD and AdamW over rows of weights, each row by its own hyperparameters.

Hyperparameters are tensors: a lane that takes a seat overwrites them, and no step is recorded
anew. The formulas are those of ``torch.optim``. Every operation treats rows alike and apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tuner import optim
from tuner.lane import Lane
from tuner.placing import placed
from tuner.stacks._device import Uncapturable
from tuner.stacks._state import State

Parts = frozenset[str]
"""Names of what lanes need of a step beside its plainest form; a step is recorded for these."""


class RowOptimizer(ABC):
    """Hyperparameters of all seats, and the step that they govern.

    ``decay`` (K, N) are the weight decays, ``own`` (K, H) the ``owned`` hyperparameters. The
    learning rate comes with each step, first of its ``numbers`` (K, ``width``).
    """

    moments: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = False
    owned: ClassVar[int] = 0
    width: ClassVar[int] = 1

    def __init__(self, state: State) -> None:
        self.state = state
        self.decay = torch.zeros_like(state.weights)
        self.own = state.weights.new_zeros(len(state.weights), self.owned)

    def admit(self, seat: int, optimizer: torch.optim.Optimizer) -> None:
        """Overwrite the hyperparameters of a seat by those of a lane's optimizer."""
        groups = optimizer.param_groups
        decays = [group["weight_decay"] for group in groups for _ in group["params"]]
        for place, value in zip(self.state.trained.places, decays, strict=True):
            place.view(self.decay[seat]).fill_(value)
        own = torch.tensor(self.owns(groups[0]), dtype=self.own.dtype)
        self.own[seat].copy_(placed(own, self.own.device))

    def owns(self, options: Mapping[str, Any]) -> list[float]:
        """The ``owned`` hyperparameters of a lane."""
        return []

    def parts(self, optimizer: torch.optim.Optimizer) -> Parts:
        """What a lane needs beside the plain formula."""
        return frozenset()

    def numbers(self, rate: float, steps: int) -> list[float]:
        """What the step after so many ``steps`` needs, the learning rate first."""
        return [rate]

    @abstractmethod
    def step(self, change: Tensor, numbers: Tensor, active: Tensor | None, parts: Parts) -> None:
        """One step of the rows that are ``active`` (K, 1), of all if None; others keep their bits.

        Args:
            change: The gradient (K, N); it is used up.
            numbers: (K, width).
            active: Which rows take part.
            parts: What some of the lanes need.
        """


class RowSGD(RowOptimizer):
    """SGD with momentum, of Nesterov's kind or not; dampening is 0."""

    moments = ("momentum_buffer",)
    owned = 3

    def owns(self, options: Mapping[str, Any]) -> list[float]:
        """The momentum, and the shares of gradient and momentum in a step."""
        momentum = float(options["momentum"])
        return [momentum, 1.0, momentum] if options["nesterov"] else [momentum, 0.0, 1.0]

    def parts(self, optimizer: torch.optim.Optimizer) -> Parts:
        """Nesterov's step."""
        return frozenset({"nesterov"} if optimizer.param_groups[0]["nesterov"] else ())

    def step(self, change: Tensor, numbers: Tensor, active: Tensor | None, parts: Parts) -> None:
        """See the base class."""
        weights, kept = self.state.weights, self.state.moments["momentum_buffer"]
        momentum, of_change, of_moved = (self.own[:, i : i + 1] for i in range(3))
        change.addcmul_(weights, self.decay)
        moved = step = _addcmul_into(kept, change, kept, momentum, active)
        if "nesterov" in parts:
            step = change.mul_(of_change).addcmul_(moved, of_moved)
        _addcmul_into(weights, weights, step, numbers, active, value=-1)


class RowAdamW(RowOptimizer):
    """Adam with decoupled weight decay; corrections of the moments come with each step."""

    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    width = 3

    def __init__(self, state: State, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(state)
        self.betas, self.eps = betas, eps

    def numbers(self, rate: float, steps: int) -> list[float]:
        """The learning rate, 1 - β₁ᵗ and √(1 - β₂ᵗ)."""
        first, second = (1 - beta ** (steps + 1) for beta in self.betas)
        return [rate, first, second**0.5]

    def step(self, change: Tensor, numbers: Tensor, active: Tensor | None, parts: Parts) -> None:
        """See the base class."""
        rate, first, second = (numbers[:, i : i + 1] for i in range(3))
        weights, mean = self.state.weights, self.state.moments["exp_avg"]
        square = self.state.moments["exp_avg_sq"]
        self.state.steps.add_(1 if active is None else active[:, 0])
        into(mean, torch.lerp(mean, change, 1 - self.betas[0]), active)
        fresh = change.mul_(change).mul_(1 - self.betas[1])
        into(square, fresh.add_(square * self.betas[1]), active)
        step = (mean / first).div_((square.sqrt() / second).add_(self.eps))
        shrunk = (1 - self.decay * rate).mul_(weights)
        into(weights, shrunk.addcmul_(step, rate, value=-1), active)


def into(rows: Tensor, new: Tensor, active: Tensor | None) -> None:
    """Overwrite the rows that are active, all if None; the others keep their bits."""
    if active is None:
        rows.copy_(new)
    else:
        torch.where(active, new, rows, out=rows)


def _addcmul_into(
    rows: Tensor, base: Tensor, a: Tensor, b: Tensor, active: Tensor | None, *, value: int = 1
) -> Tensor:
    """``into`` for base + value·a·b, which is returned; in one operation where all are active."""
    if active is None:
        return torch.addcmul(base, a, b, value=value, out=rows)
    new = torch.addcmul(base, a, b, value=value)
    into(rows, new, active)
    return new


def optimizer_of(lane: Lane) -> tuple[type[RowOptimizer], dict[str, Any]]:
    """What steps rows as a lane's optimizer does, and how it is made.

    Raises:
        Uncapturable: It is none of those above, or its groups differ in their learning rates.
    """
    kind, groups = type(lane.recipe.optimizer), lane.optimizer.param_groups
    if len({group["base_lr"] for group in groups}) > 1:
        raise Uncapturable("its parameters have several learning rates")
    if kind is optim.SGD:
        return RowSGD, {}
    if kind is optim.AdamW:
        return RowAdamW, {key: groups[0][key] for key in ("betas", "eps")}
    raise Uncapturable(f"{kind.__name__} does not step in rows")
