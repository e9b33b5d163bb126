"""Copies from the processor's memory to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``; a GPU is not waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
