"""Where samples come from before they are divided: one array, or a folder of files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tuner.datasets._data import Identity
from tuner.datasets._decode import BrokenImagesError, broken_images, decoded, undecodable
from tuner.datasets._images import Images, MappedImages, ResidentImages, StreamedImages
from tuner.datasets._stored import WORTH_KEEPING, stored
from tuner.slots import usable_cores

DIGEST_EDGE = 8 * 1024
"""Bytes read at either end of a file for its digest.

With the size of the file that tells a replaced image, and reads a hundredth of what hashing
a large data set in full would.
"""

UNCOMPRESSED = (".bmp", ".pgm", ".ppm", ".tif", ".tiff")
"""Of these files the edges are often the same background in many images: more is read of them."""

BLOCKS = 32
"""Of ``DIGEST_EDGE`` bytes, evenly spaced, that are read of an uncompressed file at most."""


class Source(Protocol):
    """Samples with known classes, whose images can be had by index."""

    @property
    def targets(self) -> Tensor:
        """Class of each sample (N,) int64."""

    def images(self, indices: Tensor, resident_limit: int) -> Images:
        """The images at ``indices`` (n,), in memory if they need no more bytes than the limit."""

    def identities(self, indices: Tensor) -> list[Identity]:
        """Name and content digest of the samples at ``indices`` (n,)."""

    def broken(self, indices: Tensor) -> list[str]:
        """The images at ``indices`` (n,) that cannot be decoded, and why."""


@dataclass(frozen=True, eq=False)
class Sources:
    """The samples of a data set as it comes; None for parts that it does not have.

    ``decoder`` says how files become pixels, where there are files: it changes the fingerprint.
    """

    class_names: tuple[str, ...]
    train: Source
    validation: Source | None = None
    test: Source | None = None
    warnings: tuple[str, ...] = ()
    decoder: str = ""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Samples in memory: ``pixels`` uint8 (N, c, H, W), named by their index."""

    pixels: Tensor
    targets: Tensor
    name: str

    def images(self, indices: Tensor, resident_limit: int) -> Images:
        """The images at ``indices`` (n,)."""
        return ResidentImages(self.pixels[indices])

    def identities(self, indices: Tensor) -> list[Identity]:
        """Name and content digest of the samples at ``indices`` (n,)."""
        rows = self.pixels.numpy()
        return [
            (f"{self.name}/{i}", hashlib.sha256(rows[i].tobytes()).digest())
            for i in indices.tolist()
        ]

    def broken(self, indices: Tensor) -> list[str]:
        """None: they are decoded."""
        return []


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files under ``root``; ``paths`` are relative to it, with forward slashes."""

    root: Path
    paths: tuple[str, ...]
    targets: Tensor
    size: int
    channels: int
    known: dict[int, bytes] = field(default_factory=dict, repr=False)

    def images(self, indices: Tensor, resident_limit: int) -> Images:
        """The images at ``indices`` (n,), in memory if they need no more bytes than the limit.

        Beyond the limit they are mapped from the machine's cache of decoded images, or streamed
        where that has no room for them. Up to the limit too all processes share the cache.

        Raises:
            DataError: Images are broken; those of streamed images show when they are read.
        """
        paths = self._files(indices)
        need, pixels = len(paths) * self.channels * self.size**2, None
        if need >= WORTH_KEEPING:
            pixels = stored(paths, self._digests(indices), self.size, self.channels)
        if need <= resident_limit:
            if pixels is None:
                pixels = torch.from_numpy(decoded(paths, self.size, self.channels))
            return ResidentImages(pixels)
        if pixels is None:
            return StreamedImages(tuple(paths), self.size, self.channels)
        return MappedImages(pixels, torch.arange(len(paths)))

    def identities(self, indices: Tensor) -> list[Identity]:
        """Name and content digest of the samples at ``indices`` (n,)."""
        names = [self.paths[i] for i in indices.tolist()]
        return list(zip(names, self._digests(indices), strict=True))

    def broken(self, indices: Tensor) -> list[str]:
        """The images at ``indices`` (n,) that cannot be decoded, and why."""
        return undecodable(self._files(indices), self.size, self.channels)

    def _digests(self, indices: Tensor) -> list[bytes]:
        """Content digest of each file; none is read twice.

        Raises:
            DataError: Files cannot be read.
        """
        unknown = [i for i in indices.tolist() if i not in self.known]
        with ThreadPool(usable_cores()) as pool:
            found = pool.map(_digest_or_error, self._files(torch.tensor(unknown)), chunksize=64)
        if broken := [each for each in found if isinstance(each, str)]:
            which = f"{len(broken)} of {len(unknown)} images"
            raise BrokenImagesError(broken_images(broken, which))
        digests = [each for each in found if isinstance(each, bytes)]
        self.known.update(zip(unknown, digests, strict=True))
        return [self.known[i] for i in indices.tolist()]

    def _files(self, indices: Tensor) -> list[str]:
        return [f"{self.root}/{self.paths[i]}" for i in indices.tolist()]


def _digest_or_error(path: str) -> bytes | str:
    try:
        return _file_digest(path)
    except OSError as error:
        return f"{path} ({error.strerror or error})"


def _file_digest(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for begin in _blocks(path, size):
            file.seek(begin)
            digest.update(file.read(DIGEST_EDGE))
    return digest.digest()


def _blocks(path: str, size: int) -> list[int]:
    """Where the bytes that are read begin: at both edges, and in between where that is needed."""
    last = max(DIGEST_EDGE, size - DIGEST_EDGE)
    between = range(DIGEST_EDGE, last, max(DIGEST_EDGE, size // BLOCKS))
    inside = between if path.lower().endswith(UNCOMPRESSED) else ()
    return [0, *inside, *([last] if size > DIGEST_EDGE else [])]
