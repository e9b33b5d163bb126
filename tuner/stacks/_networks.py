"""Forward and backward pass of all seats' models: one model on its own tensors, or a twin."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor

from tuner.augment import Drawn
from tuner.compiled import compiled
from tuner.lane import Lane
from tuner.stacks._places import Joint
from tuner.stacks._state import State


class Network(Protocol):
    """The models of all seats, over the rows of a ``State``."""

    def inputs(self, indices: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Augmented images of all seats, and their targets, soft ones where images are mixed.

        Args:
            indices: Of the images, (K, B).
            targets: Their classes, (K, B).
            drawn: What chance decided, each (K, ...).
        """

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits (K, B, C) with their graph; running statistics move on."""

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Gradients (K, N) by the weights in rows, from those by logits (K, B, C)."""

    def settle(self, active: Tensor | None) -> None:
        """Keep running statistics of the rows that are active (K, 1); the others' are as before."""


class Alone:
    """The only seat's model: the same kernels as step by step, on the tensors of the seat."""

    def __init__(self, pattern: Lane, state: State) -> None:
        self.pattern, self.state = pattern, state
        state.share(pattern.model, 0)
        places = state.trained.places
        self.weights = [pattern.model.get_parameter(place.name) for place in places]
        self.joint = Joint(state.trained, 1, state.weights)

    def inputs(self, indices: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """See ``Network``."""
        own = {name: rows[0] for name, rows in drawn.items()}
        inputs, soft = self.pattern.inputs(indices[0], targets[0], own)
        return inputs, soft[None]

    def logits(self, inputs: Tensor) -> Tensor:
        """See ``Network``."""
        pattern = self.pattern
        run = compiled(pattern.model, pattern.kind) if pattern.compiles else None
        return pattern.forward(inputs, run)[None]

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """See ``Network``."""
        found = torch.autograd.grad(logits, self.weights, gradient)
        return self.joint.of(found)

    def settle(self, active: Tensor | None) -> None:
        """See ``Network``; the model keeps them by itself."""


def pattern_of(lane: Lane) -> Lane:
    """A lane as ``lane`` is, with a model of its own; what they share must not be changed."""
    pattern = copy.copy(lane)
    pattern.model = copy.deepcopy(lane.model)
    del pattern.optimizer, pattern.samplers, pattern.losses
    return pattern
