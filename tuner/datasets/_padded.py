"""Padded copies of images, of which every crop is a view: a few are kept, the others given up."""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import Tensor
from torch.nn.functional import pad

PADDED_BYTES = 2**28
"""Of all copies that are kept, together: room for CIFAR-10. Every process keeps its own."""


def padded_bytes(pixels: Tensor, margin: int) -> int:
    """What images (N, c, H, W) uint8 take with so many black pixels around them."""
    count, channels, height, width = pixels.shape
    return count * channels * (height + 2 * margin) * (width + 2 * margin)


class Crops:
    """Views of all crops of the same images, by the margin around these.

    Those that were used last are kept, as many as ``PADDED_BYTES`` hold. Others are there as long
    as somebody has them, and whoever asks for one meanwhile shares it.
    """

    def __init__(self) -> None:
        self.there: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self.kept: dict[int, Tensor] = {}

    def of(self, pixels: Tensor, margin: int) -> Tensor:
        """View (N, c, 2·margin + 1, 2·margin + 1, H, W) of every crop of ``pixels``."""
        # The last one is the one that was used last.
        found = self.kept.pop(margin, None)
        if found is None:
            found = self.there.get(margin)
        self._make_room(padded_bytes(pixels, margin), pixels)
        if found is None:
            height, width = pixels.shape[2:]
            found = pad(pixels, [margin] * 4).unfold(2, height, 1).unfold(3, width, 1)
            self.there[margin] = found
        self.kept[margin] = found
        return found

    def _make_room(self, needed: int, pixels: Tensor) -> None:
        while self.kept and needed + self._bytes(pixels) > PADDED_BYTES:
            del self.kept[next(iter(self.kept))]

    def _bytes(self, pixels: Tensor) -> int:
        return sum(padded_bytes(pixels, margin) for margin in self.kept)
