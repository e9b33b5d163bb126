"""Small image folders for tests, and what is in the parts made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tuner.datasets import DATASETS, Dataset, Part, ResidentImages
from tuner.imbalance import class_counts


def save_image(path: Path, seed: int) -> None:
    """Write an 8x8 RGB image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def photos(
    root: Path, counts: Mapping[str, int], *, first: int = 0, backwards: bool = False
) -> Path:
    """A folder per class with so many images, all different."""
    files = [(name, i) for name, count in counts.items() for i in range(count)]
    jobs = [(root / name / f"{i:03}.png", first + seed) for seed, (name, i) in enumerate(files)]
    for path, seed in reversed(jobs) if backwards else jobs:
        save_image(path, seed)
    return root


def dataset(name: str, **fields: Any) -> Dataset:
    """The data set component of that name."""
    component: Any = DATASETS[name]
    built: Dataset = component(**fields)
    return built


def folder(root: Path, **fields: Any) -> Dataset:
    """The image folder at ``root``."""
    return dataset("image_folder", root=str(root), image_size=8, **fields)


def pixels(part: Part | None) -> list[bytes]:
    """The bytes of every image of a part in memory."""
    assert part is not None
    assert isinstance(part.images, ResidentImages)
    return [sample.numpy().tobytes() for sample in part.images.tensor]


def counts_of(part: Part | None, num_classes: int) -> list[int]:
    """Images of each class of a part."""
    assert part is not None
    return [int(count) for count in class_counts(part.targets, num_classes)]
