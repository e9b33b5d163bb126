"""Optimizers, and which parameters weight decay leaves alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from tuner.registry import Registry, component

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimizerComponent(ABC):
    """Hyperparameters of an optimizer."""

    @abstractmethod
    def build(self, model: nn.Module, *, no_decay: Collection[str] = ()) -> torch.optim.Optimizer:
        """Optimizer over the trainable parameters of ``model``.

        ``no_decay`` names further parameters that keep their size, as in
        ``model.named_parameters()``.

        Raises:
            ValueError: ``no_decay`` names a parameter that the model does not have.
        """


def for_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let an optimizer compute as suits the device; what it computes stays the same.

    Fused where torch can: a step is a few kernels on a GPU, and takes half the time on a
    processor.
    """
    for group in optimizer.param_groups:
        if "fused" in group and device.type in ("cpu", "cuda"):
            group["fused"], group["foreach"] = True, False


OPTIMIZERS: Registry[OptimizerComponent] = Registry("optimizer")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_norm: bool, no_decay: Collection[str]
) -> list[dict[str, Any]]:
    """Trainable parameters with weight decay, then those without; empty groups are left out.

    Without decay are the parameters in ``no_decay`` and, unless ``decay_norm``, those with
    at most one dimension: biases and the scales and shifts of normalisation.
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(no_decay) - set(parameters)):
        raise ValueError(f"no_decay: the model has no parameter {', '.join(unknown)}")
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            spare = name in no_decay or (parameter.ndim <= 1 and not decay_norm)
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@OPTIMIZERS.register("sgd")
@component
class SGD(OptimizerComponent):
    """Stochastic gradient descent with momentum."""

    lr: Rate = 0.1
    momentum: Momentum = 0.9
    weight_decay: Decay = 2e-4
    nesterov: bool = False
    decay_norm: bool = False

    def build(self, model: nn.Module, *, no_decay: Collection[str] = ()) -> torch.optim.SGD:
        """Optimizer over the trainable parameters of ``model``; see the base class."""
        return torch.optim.SGD(
            parameter_groups(
                model, self.weight_decay, decay_norm=self.decay_norm, no_decay=no_decay
            ),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov and self.momentum > 0,
        )


@OPTIMIZERS.register("adamw")
@component
class AdamW(OptimizerComponent):
    """Adam with decoupled weight decay."""

    lr: Rate = 1e-3
    weight_decay: Decay = 0.01
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    decay_norm: bool = False

    def build(self, model: nn.Module, *, no_decay: Collection[str] = ()) -> torch.optim.AdamW:
        """Optimizer over the trainable parameters of ``model``; see the base class."""
        return torch.optim.AdamW(
            parameter_groups(
                model, self.weight_decay, decay_norm=self.decay_norm, no_decay=no_decay
            ),
            lr=self.lr,
            betas=self.betas,
        )
