"""Where the tensors of like models lie: a row for each seat, and in it a place for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tuner.rows import lines

ALIGNED = 16
"""Places begin at multiples of so many numbers: kernels want the first one on a boundary."""


@dataclass(frozen=True)
class Place:
    """Where in a row the tensor called ``name`` begins; the last dimension of rows is theirs.

    ``channels_last`` tensors of four dimensions lie in the order (0, 2, 3, 1).
    """

    name: str
    start: int
    shape: tuple[int, ...]
    channels_last: bool

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    def view(self, rows: Tensor) -> Tensor:
        """The tensor, or the tensors (K, *shape), in a row (N,) or in rows (K, N)."""
        return self.shaped(rows.narrow(-1, self.start, self.size))

    def shaped(self, numbers: Tensor) -> Tensor:
        """The tensor (..., *shape) of its numbers (..., n) as they lie."""
        if not self.shape:
            return numbers.squeeze(-1)
        if not self.channels_last:
            return numbers.view(*numbers.shape[:-1], *self.shape)
        outputs, inputs, height, width = self.shape
        as_it_lies = numbers.view(*numbers.shape[:-1], outputs, height, width, inputs)
        return as_it_lies.movedim(-1, -3)

    def numbers(self, tensors: Tensor) -> Tensor:
        """The numbers (..., n) of tensors (..., *shape), as they lie."""
        if not self.shape:
            return tensors.unsqueeze(-1)
        if self.channels_last:
            tensors = tensors.movedim(-3, -1)
        return tensors.flatten(tensors.ndim - len(self.shape))


@dataclass(frozen=True)
class Layout:
    """The places of a row of ``width`` numbers, which are whole lines: see ``tuner.rows``."""

    places: tuple[Place, ...]
    width: int

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Layout:
        """The layout of named tensors, in their order."""
        places: list[Place] = []
        end = 0
        for name, tensor in named:
            places.append(Place(name, end, tuple(tensor.shape), _is_channels_last(tensor)))
            end += -(-tensor.numel() // ALIGNED) * ALIGNED
        return cls(tuple(places), lines(end))

    def rows(self, seats: int, like: Tensor) -> Tensor:
        """Rows (K, width) of zeros, of the kind of ``like``."""
        return like.new_zeros(seats, self.width)

    def gaps(self) -> list[int]:
        """How many numbers lie between the end of each place and the next one."""
        ends = [*(place.start for place in self.places[1:]), self.width]
        return [end - p.start - p.size for p, end in zip(self.places, ends, strict=False)]


class Joint:
    """Whole rows (K, N) from tensors of their places (K, *shape)."""

    def __init__(self, layout: Layout, seats: int, like: Tensor) -> None:
        self.layout, self.seats = layout, seats
        self.gaps = [like.new_zeros(seats, gap) for gap in layout.gaps()]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The rows, with zeros between places."""
        parts: list[Tensor] = []
        for place, tensor, gap in zip(self.layout.places, tensors, self.gaps, strict=True):
            parts.append(place.numbers(tensor.view(self.seats, *place.shape)))
            if gap.numel():
                parts.append(gap)
        return torch.cat(parts, 1)


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, 1, width * channels, channels)
