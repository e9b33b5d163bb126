"""What is said when there is no memory for the features: no smaller pieces would help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tuner.errors import TunerError
from tuner.placing import is_out_of_memory


@contextlib.contextmanager
def holding(images: int, copies: int, device: torch.device | str) -> Iterator[None]:
    """Name the ways out when memory runs out for features of ``images`` and what makes them.

    Raises:
        TunerError: It ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = "fewer slots (--slots)"
        if torch.device(device).type != "cpu":
            ways = "fewer slots on that GPU (--slots-per-gpu), or --device cpu"
        raise TunerError(
            f"the head rung's backbone and features of {images} images, ladder.head.copies = "
            f"{copies}, cannot be held in the memory of {device} ({_brief(error)}); take fewer "
            f"copies, or {ways}"
        ) from error


def _brief(error: Exception) -> str:
    """The first two sentences: what follows is advice that does not help here."""
    return ". ".join(str(error).split(". ")[:2]) or type(error).__name__
