"""The generator of the pretended device, whose state several may share as graphs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

DRAWING = ("rand", "normal", "uniform", "bernoulli", "dropout", "multinomial", "exponential")
"""Operations whose name has one of these draw."""

Box = list[Tensor]
"""A state that changes in place."""


class Generator:
    """As a ``torch.Generator`` of a CUDA device."""

    def __init__(self, state: Tensor | None = None) -> None:
        self.box: Box = [torch.Generator().get_state() if state is None else state]

    def manual_seed(self, seed: int) -> Self:
        """See torch."""
        self.box[0] = torch.Generator().manual_seed(seed).get_state()
        return self

    def get_state(self) -> Tensor:
        """See torch."""
        return self.box[0].clone()

    def set_state(self, state: Tensor) -> Self:
        """See torch."""
        if state.is_cuda or state.dtype != torch.uint8:
            raise TypeError("a state is bytes on the host")
        self.box[0] = state.clone()
        return self

    def clone_state(self) -> Generator:
        """See torch."""
        return Generator(self.get_state())

    def graphsafe_get_state(self) -> Generator:
        """See torch; the state is shared."""
        same = Generator()
        same.box = self.box
        return same

    def graphsafe_set_state(self, other: Generator) -> Self:
        """See torch; the state is shared."""
        self.box = other.box
        return self


default = Generator()


@contextmanager
def drawing_from(box: Box) -> Iterator[None]:
    """Let the processor draw what the device's generator draws."""
    host = torch.default_generator
    before = host.get_state()
    host.set_state(box[0])
    try:
        yield
    finally:
        box[0] = host.get_state()
        host.set_state(before)
