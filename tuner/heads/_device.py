"""What another device than the CPU asks for: stacks of one size, many steps made at once.

A GPU computes a batched product, or a sum, in an order that depends on how much of it there is.
So there a stack has always as many lanes as there may be, and those that are left over repeat
the last one; the CPU computes lane by lane, and has only those that are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")

AHEAD = 2**25
"""Numbers of the inputs and classes of steps ahead that a GPU makes at once."""


def seats(number: int, lanes: int, device: torch.device) -> int:
    """Lanes of a stack for ``number`` recipes where ``lanes`` may be trained at once."""
    return number if device.type == "cpu" else lanes


def at_once(numbers: int, device: torch.device) -> int:
    """Steps whose inputs are made at once, of so many numbers each.

    A GPU is kept waiting by every single operation, a CPU by numbers that left its cache.
    """
    return 1 if device.type == "cpu" else max(1, AHEAD // numbers)


def filled(items: Sequence[Item], number: int) -> list[Item]:
    """``number`` items: those given, and the last of them again and again."""
    return [*items] + [items[-1]] * (number - len(items))
