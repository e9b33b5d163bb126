"""Copies from the processor's memory to a device that nobody waits for, and memory that lacks."""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; a GPU is not waited for.

    The page-locked memory that it is copied from is torch's, which keeps it until that is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    own = tensor.pin_memory() if tensor.device == CPU else tensor
    return own.to(device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text.lower()
    )
