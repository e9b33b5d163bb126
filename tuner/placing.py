"""Copies from the processor's memory to a device that nobody waits for."""

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
