"""How many samples or features stand in a stack: as many as leave no bit to chance."""

from __future__ import annotations

LINE = 32
"""Samples and features are filled up to multiples of so many, two vectors of any processor.

The bits of what is computed then do not depend on where in a stack it stands: the ends of
tensors are computed with other instructions.
"""


def lines(number: int) -> int:
    """``number``, filled up to whole lines."""
    return -(-number // LINE) * LINE
