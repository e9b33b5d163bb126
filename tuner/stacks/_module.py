"""The loss of a lane that is alone in its stack, by its own module: see ``SeatLosses``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.losses import Loss
from tuner.stacks._device import Uncapturable
from tuner.stacks._losses import Frame
from tuner.stacks._optimizers import Parts


class ModuleLoss:
    """The loss of the only seat, by its own module: soft targets, and losses without a row."""

    def __init__(self, loss: Loss) -> None:
        self.loss = copy.deepcopy(loss)

    def admit(self, loss: Loss, here: Loss, seat: int) -> Parts:
        """See ``SeatLosses``; the loss has the same numbers as the one recorded.

        Tensors that it put in the place of others since are copied, and are the seat's again.

        Raises:
            Uncapturable: Its tensors are not like those that were recorded, or share memory.
        """
        own, given = tensors_of(self.loss), tensors_of(loss)
        if _forms(own) != _forms(given):
            raise Uncapturable("its loss changes how many tensors it has, or their shapes")
        places = [t.untyped_storage().data_ptr() for t in given.values() if t.numel()]
        if len(set(places)) < len(places):
            raise Uncapturable("its loss has tensors that share memory")
        for name, tensor in given.items():
            if tensor is not own[name]:
                own[name].copy_(tensor)
                _put(loss, name, own[name])
        return frozenset()

    def part(self, loss: Loss) -> None:
        """See ``SeatLosses``."""
        for name, tensor in copy.deepcopy(tensors_of(loss)).items():
            _put(loss, name, tensor)

    def tensors(self) -> list[Tensor]:
        """See ``SeatLosses``."""
        return [tensor.detach() for tensor in tensors_of(self.loss).values()]

    def frame(self, size: int) -> Frame:
        """See ``SeatLosses``; the module knows all that by itself."""
        nothing = self.loss.class_counts.new_zeros(0)
        return Frame(nothing, nothing, nothing)

    def renew(self, frame: Frame, size: int) -> None:
        """See ``SeatLosses``."""

    def gradient(
        self,
        logits: Tensor,
        soft: Tensor,
        targets: Tensor,
        frame: Frame,
        active: Tensor | None,
        parts: Parts,
    ) -> tuple[Tensor, Tensor]:
        """See ``SeatLosses``."""
        before, held = numbers_of(self.loss), tensors_of(self.loss)
        with torch.enable_grad():
            leaf = logits[0].detach().requires_grad_()
            loss: Tensor = self.loss(leaf, soft[0])
            (gradient,) = torch.autograd.grad(loss, leaf)
        if numbers_of(self.loss) != before:
            raise Uncapturable("its loss keeps numbers outside of tensors")
        now = tensors_of(self.loss)
        if now.keys() != held.keys() or any(now[name] is not held[name] for name in now):
            raise Uncapturable("its loss replaces tensors in a step instead of writing into them")
        return gradient[None], loss.detach()[None].double()


def numbers_of(loss: Loss) -> tuple[tuple[str, object], ...]:
    """What a loss and its modules know beside their tensors."""
    held = _held(loss, bool | int | float | str)
    return tuple(sorted(held.items()))


def tensors_of(loss: Loss) -> dict[str, Tensor]:
    """The tensors of a loss and its modules, by dotted name; those that are no buffers too."""
    return _held(loss, Tensor)


def _held(loss: Loss, kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, module in loss.named_modules():
        values = {**vars(module), **module._parameters, **module._buffers}
        found |= {f"{prefix}.{k}".lstrip("."): v for k, v in values.items() if isinstance(v, kind)}
    return found


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()}


def _put(loss: Loss, name: str, tensor: Tensor) -> None:
    """Let a tensor be the one of a loss, or of a module in it, of that dotted name."""
    prefix, _, own = name.rpartition(".")
    setattr(loss.get_submodule(prefix), own, tensor)
