"""Decoded images in a file that all processes of a machine map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.alone import alone, cache_folder, half_written, make_room, note_use
from tuner.datasets._decode import DECODER, decode_all

WORTH_KEEPING = 2**25
"""Fewer bytes are decoded sooner than they are found."""

log = logging.getLogger(__name__)


def stored(
    paths: Sequence[str], digests: Iterable[bytes], size: int, channels: int
) -> Tensor | None:
    """Pixels (N, channels, size, size) uint8 of image files, mapped from disk; to be read only.

    The first process that asks decodes them, the others wait for it. A file of the cache is known
    by the ``digests`` and times of the images: one that changed is decoded again, with all others.
    What was not used for longest makes room for what is new.

    Returns:
        None where half of the memory or of the disk's free space does not hold the pixels, or
        the folder of the cache cannot be written.

    Raises:
        DataError: Images are broken.
    """
    shape = (len(paths), channels, size, size)
    path = cache_folder() / "pixels" / f"{_key(paths, digests, size, channels)}.pixels"
    try:
        with alone(path):
            if not _is_whole(path, shape):
                if not _has_room(path, shape):
                    return None
                _write(path, paths, shape)
            note_use(path)
            return torch.from_file(
                str(path), shared=False, size=_bytes(shape), dtype=torch.uint8
            ).view(shape)
    except OSError as error:
        log.warning("decoded images are not kept: %s", error)
        return None


def _key(paths: Sequence[str], digests: Iterable[bytes], size: int, channels: int) -> str:
    total = hashlib.sha256(repr((DECODER, size, channels)).encode())
    for path, digest in zip(paths, digests, strict=True):
        with contextlib.suppress(OSError):  # a missing file is named when it is decoded
            total.update(str(os.stat(path).st_mtime_ns).encode())
        total.update(digest)
    return total.hexdigest()


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    return path.is_file() and path.stat().st_size == _bytes(shape)


def _has_room(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the pixels may be kept, after others have made room for them."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _bytes(shape) <= memory // 2 and make_room(path, _bytes(shape))


def _write(path: Path, paths: Sequence[str], shape: tuple[int, ...]) -> None:
    """Decode into the file, put in place whole."""
    with half_written(path) as half, half.open("wb") as file:
        decode_all(paths, shape[2], shape[1], partial(_put, file.fileno()))


def _put(file: int, index: int, pixels: NDArray[np.uint8]) -> None:
    data = np.ascontiguousarray(pixels).data.cast("B")
    done, start = 0, index * len(data)
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)
