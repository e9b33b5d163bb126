"""Decoded images in a file that all processes of a machine map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.alone import alone, cache_folder
from tuner.datasets._decode import DECODER, decode_all

WORTH_KEEPING = 2**25
"""Fewer bytes are decoded sooner than they are found."""

ABANDONED_SECONDS = 24 * 3600
"""After so long nobody is still writing to a file."""

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
            with contextlib.suppress(PermissionError):  # another user's
                os.utime(path)
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
    """Whether the pixels may be kept, after others have made room for them.

    A file that is removed remains with the processes that have mapped it.
    """
    needed = _bytes(shape)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    others = sorted(path.parent.glob("*.pixels"), key=lambda other: other.stat().st_mtime)
    kept = sum(other.stat().st_size for other in others)
    room = (shutil.disk_usage(path.parent).free + kept) // 2
    if needed > min(memory // 2, room):
        return False
    for left in path.parent.glob("*.half"):
        if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
            left.unlink()
    for other in others:
        if kept + needed <= room:
            break
        kept -= other.stat().st_size
        other.unlink()
    return True


def _write(path: Path, paths: Sequence[str], shape: tuple[int, ...]) -> None:
    """Decode into a file of another name, and put it in place whole.

    The name is that of the key, so that what a killed process left is written over.
    """
    half = path.with_suffix(".half")
    try:
        with half.open("wb") as file:
            decode_all(paths, shape[2], shape[1], partial(_put, file.fileno()))
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


def _put(file: int, index: int, pixels: NDArray[np.uint8]) -> None:
    data = np.ascontiguousarray(pixels).data.cast("B")
    done, start = 0, index * len(data)
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)
