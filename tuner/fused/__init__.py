"""Passes of a model over maps in a processor's memory, as few as can be: fused batch norms.

Where a network has few channels, batch norm, pooling and ReLU take as long as its convolutions.
The loops here are compiled by numba when they are first used, and kept on disk. They use one
thread, as the slots of a machine do; see ``tuner.backends`` for when they are taken.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor, nn

__all__ = ["FusedPasses", "can_fuse", "fused", "has_norms"]

log = logging.getLogger(__name__)


def has_norms(model: nn.Module) -> bool:
    """Whether there is anything in a model that could be fused."""
    return any(type(module) is nn.BatchNorm2d for module in model.modules())


def can_fuse(device: torch.device) -> bool:
    """Whether fused norms are of use here: on a processor of which torch uses one thread."""
    return device.type == "cpu" and torch.get_num_threads() == 1 and _are_there()


def fused(model: nn.Module) -> nn.Module | None:
    """The model's pass in the modes it is in now, with fused norms; None where it has none.

    Weights and running statistics stay the model's own, and the model as it was. It is left alone
    if its pass depends on the values of a tensor.
    """
    if not has_norms(model):
        return None
    from tuner.fused._graph import traced

    return traced(model)


class FusedPasses:
    """The passes of a model with fused norms: one for each combination of its layers' modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.made: dict[tuple[bool, ...], nn.Module] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """What the model makes of images, in the modes it is in now."""
        modes = tuple(module.training for module in self.model.modules())
        if modes not in self.made:
            self.made[modes] = fused(self.model) or self.model
        found: Tensor = self.made[modes](images)
        return found


@cache
def _are_there() -> bool:
    """Whether the loops can be compiled in this process."""
    try:
        import tuner.fused._kernels  # noqa: F401
    except (
        Exception
    ) as reason:  # numba is missing, too old for numpy, or finds nowhere to keep code
        log.info("batch norms are not fused: %s", reason)
        return False
    return True
