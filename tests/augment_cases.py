"""Images and augmenters for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tuner.augment import (
    Augmenter,
    Standard,
)
from tuner.imbalance import Groups
from tuner.seeding import generator

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COUNTS = torch.tensor([1000, 300, 100, 10])
GROUPS = Groups(head=(0,), medium=(1, 2), tail=(3,))


def build(component: Any, shape: tuple[int, int, int] = (3, 12, 10), **changes: Any) -> Augmenter:
    channels = shape[0]
    arguments = {
        "mean": torch.tensor(MEAN[:channels]),
        "std": torch.tensor(STD[:channels]),
        "class_counts": COUNTS,
        "groups": GROUPS,
    }
    augmenter: Augmenter = component.build(shape, **(arguments | changes))
    return augmenter


def plain_standard(**changes: Any) -> Standard:
    return Standard(**({"crop_padding": 0, "flip": False} | changes))


def random_images(number: int, shape: tuple[int, int, int] = (3, 12, 10)) -> Tensor:
    return torch.randint(
        0, 256, (number, *shape), dtype=torch.uint8, generator=generator("images", number)
    )


def distinct_images(number: int, size: int = 12) -> Tensor:
    """Images of one value each, all different."""
    values = torch.linspace(0, 255, number).round().to(torch.uint8)
    return values[:, None, None, None].expand(-1, 1, size, size).clone()
