"""Whether images lie on a GPU or come to it batch by batch, and how they get there."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from math import prod

import torch
from torch import Tensor

from tuner.datasets._images import Images, ResidentImages
from tuner.slots import own_cores, slots_on_device

GIB = 2**30
RESIDENT_LIMIT = 2 * GIB
"""Decoded bytes up to which image files are held in memory, and lie on a GPU in any case."""
DEVICE_SHARE = 0.25
"""Of a GPU's memory that the images of all its slots may take; models need the rest."""
PIECE_BYTES = 2**24
"""Copied to a GPU at a time: that much of the processor's memory is page-locked, a few times."""

log = logging.getLogger(__name__)


def brought(parts: Sequence[Images], device: torch.device) -> list[Images]:
    """The images of all parts on ``device``, in one tensor of a GPU where its memory allows it.

    What lies in the processor's memory lies on the device. What does not, because it is too large
    for a processor that shares it, is laid there piece by piece if all parts take no more than this
    slot's share of ``DEVICE_SHARE``, and than half of what is free; else batches come one by one.

    Raises:
        DataError: An image is broken that was not decoded before.
    """
    if device.type != "cuda" or all(isinstance(images, ResidentImages) for images in parts):
        return [images.to(device) for images in parts]
    need, room = bytes_of(parts), room_on(device)
    _say(need, room)
    if need > room:
        return [images.to(device) for images in parts]
    return _laid(parts, device)


def bytes_of(parts: Sequence[Images]) -> int:
    """What the decoded images of all parts take."""
    return sum(len(images) * prod(images.shape) for images in parts)


def room_on(device: torch.device) -> int:
    """Bytes of images that this slot may lay on a GPU."""
    # What torch keeps for later would count as taken.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return min(int(DEVICE_SHARE * total) // slots_on_device(), free // 2)


def with_images(need: int) -> int:
    """Memory of a GPU that a slot must have for itself to lay images of so many bytes there."""
    return int(need / DEVICE_SHARE) if need > RESIDENT_LIMIT else 0


def _say(need: int, room: int) -> None:
    count = slots_on_device()
    shared = f"{count} slots share" if count > 1 else "one slot has"
    why = f"{shared} a quarter of its memory, and no more than half of what is free: "
    why += f"{room / GIB:.2f} GiB"
    if need <= room:
        log.info("the images, %.2f GiB, lie on the GPU (%s)", need / GIB, why)
    else:
        log.warning(
            "the images, %.2f GiB, do not fit on the GPU (%s): they come to it batch by batch, "
            "and trials are trained step by step; fewer slots per GPU or smaller images are faster",
            *(need / GIB, why),
        )


def _laid(parts: Sequence[Images], device: torch.device) -> list[Images]:
    """The parts as views of one tensor on a GPU, so that they can be joined without a copy."""
    sizes = [len(images) for images in parts]
    whole = torch.empty(sum(sizes), *parts[0].shape, dtype=torch.uint8, device=device)
    views = torch.split(whole, sizes)
    for images, view in zip(parts, views, strict=True):
        rest = view
        with closing(_pieces(images, device)) as pieces:
            for piece in pieces:
                rest[: len(piece)].copy_(piece)
                rest = rest[len(piece) :]
    return [ResidentImages(view) for view in views]


def _pieces(images: Images, device: torch.device) -> Generator[Tensor, None, None]:
    """The images in their order, a few at a time; files are decoded by processes of their own."""
    at_once = max(1, PIECE_BYTES // prod(images.shape))
    places = torch.split(torch.arange(len(images)), at_once)
    source = images if isinstance(images, ResidentImages) else images.to(device)
    yield from source.batches(places, workers=own_cores(), pin=True)
