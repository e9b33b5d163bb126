"""The data of a study: its parts, what is known of its classes, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from tuner.datasets._images import Images, ResidentImages, Shape
from tuner.datasets._residence import brought, bytes_of
from tuner.errors import counted
from tuner.imbalance import Groups

Identity = tuple[str, bytes]
"""A sample's name inside its data set, and a digest of its content."""


@dataclass(frozen=True, eq=False)
class Part:
    """Images and their classes, ``targets`` (N,) int64."""

    images: Images
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Part:
        """The same part on ``device``."""
        return Part(self.images.to(device), self.targets.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """Everything a trial needs of its data set; the test part is not loaded until asked for.

    Attributes:
        mean: Mean of each channel over the training part, 1 = full brightness.
        std: Standard deviation of each channel, in the same unit.
        class_counts: Training images of each class (C,), for weights and priors.
        pool_counts: Training and validation images of each class (C,), by which ``groups``
            are made.
        fingerprint: SHA-256 of the image contents, their classes and the split.
        warnings: What the user should know, such as classes too small to estimate.
        carved: Whether the validation part was taken out of the training part.
        load_test: Loads the test part; None if there is none.
        test_images: How many images the test part has, known before it is loaded.
    """

    name: str
    train: Part
    validation: Part
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: Groups
    class_counts: Tensor
    pool_counts: Tensor
    fingerprint: str
    warnings: tuple[str, ...] = ()
    carved: bool = False
    load_test: Callable[[], Part] | None = field(default=None, repr=False)
    test_images: int = 0

    @cached_property
    def test(self) -> Part | None:
        """The test part, decoded on first use: search never touches it.

        Raises:
            DataError: A test image is broken.
        """
        return None if self.load_test is None else self.load_test()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> Shape:
        """Channels, height and width of one image."""
        return self.train.images.shape

    @property
    def resident_bytes(self) -> int:
        """What images for training and validation take that lie in memory, or on the device."""
        images = (self.train.images, self.validation.images)
        return bytes_of([each for each in images if isinstance(each, ResidentImages)])

    def to(self, device: torch.device | str) -> Data:
        """The same data with every part on ``device``; the test part follows when asked for.

        Images that are too many for the device stay where they are, and batches are delivered
        there; those of the test part stay where they are too many for the processor.
        """
        load, parts = self.load_test, (self.train, self.validation)
        images = brought([part.images for part in parts], torch.device(device))
        train, validation = (
            Part(own, part.targets.to(device)) for own, part in zip(images, parts, strict=True)
        )
        return replace(
            self,
            train=train,
            validation=validation,
            load_test=None if load is None else lambda: load().to(device),
        )


def fingerprint(
    name: str,
    shape: Shape,
    class_names: Sequence[str],
    identities: Mapping[str, Sequence[Identity]],
    classes: Mapping[str, Sequence[int]],
    decoder: str = "",
) -> str:
    """SHA-256 over all names, and over the identity and class of each sample of each part.

    Where there is a ``decoder`` it counts too: another one makes other pixels of the same files.
    """
    total = hashlib.sha256(repr((name, shape, tuple(class_names))).encode())
    total.update(decoder.encode())
    for part, samples in identities.items():
        total.update(repr(part).encode())
        for (key, digest), target in zip(samples, classes[part], strict=True):
            total.update(f"{key!r} {target} ".encode())
            total.update(digest)
    return total.hexdigest()


def duplicates(parts: Mapping[str, Sequence[Identity]]) -> list[str]:
    """Say which parts share images of the same content."""
    owner: dict[bytes, tuple[str, str]] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for part, identities in parts.items():
        for key, digest in identities:
            other, twin = owner.setdefault(digest, (part, key))
            if other != part:
                shared.setdefault((other, part), []).append(f"{key} = {twin}")
    return [
        f"{counted(len(pairs), 'image')} of the {second} part {'is' if len(pairs) == 1 else 'are'} "
        f"in the {first} part too, for example {pairs[0]}"
        for (first, second), pairs in shared.items()
    ]
