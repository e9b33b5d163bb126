"""What every augmentation is: it normalises images, and may change and mix them before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from tuner.imbalance import Groups
from tuner.placing import placed
from tuner.registry import Registry, component

ImageShape = tuple[int, int, int]
Channels = Tensor | Sequence[float]
Drawn = Mapping[str, Tensor]


def on_device(drawn: Drawn, device: torch.device) -> Drawn:
    """The drawn tensors on ``device``; they are on their way there, nobody waits."""
    return {name: placed(tensor, device) for name, tensor in drawn.items()}


class Augmenter(nn.Module):
    """Turns uint8 images into normalised float images, and by itself does nothing else.

    ``mean`` and ``std`` (c,) are those of pixels in [0, 1]; a channel without spread is only
    centred. Tables follow the device of the images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        center, spread = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std))
        spread = torch.where(spread > 0, spread, 1.0)
        self._table("scale", (1 / (255 * spread)).float().view(1, -1, 1, 1))
        self._table("shift", (-center / spread).float().view(1, -1, 1, 1))

    def _table(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values, persistent=False)

    def _follow(self, images: Tensor) -> None:
        if self.scale.device != images.device:
            self.to(images.device)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (N, c, H, W) of 0 … 255 as float32 with the data's mean 0 and spread 1."""
        self._follow(images)
        return images.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift)

    def draw(
        self, count: int, size: tuple[int, int], generator: torch.Generator, progress: float
    ) -> Drawn:
        """What chance decides in one step: named tensors on the CPU, none of them here.

        Args:
            count: Number of images.
            size: Their height and width.
            generator: On the CPU; equal states draw the same on every device.
            progress: Share of the training that is done, in [0, 1).
        """
        return {}

    def plan(
        self,
        steps: int,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator,
        progress: float,
    ) -> Drawn:
        """``draw`` for that many steps ahead, stacked: the same numbers from the same state."""
        each = [self.draw(count, size, generator, progress) for _ in range(steps)]
        return {name: torch.stack([drawn[name] for drawn in each]) for name in each[0]}

    def transform(self, images: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Training images and their targets for one step; nothing is drawn and nothing waits.

        Args:
            images: (N, c, H, W) uint8.
            targets: (N,) class indices.
            drawn: What ``draw`` gave, on the device of the images.

        Returns:
            Normalised images (N, c, H, W) float32, and the targets: (N,) as they came, or
            (N, C) float32 summing to 1 when images were mixed.
        """
        return self.normalize(images), targets

    def forward(
        self, images: Tensor, targets: Tensor, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, Tensor]:
        """``draw`` and ``transform``: images (N, c, H, W) uint8 and targets (N,) of one step."""
        height, width = images.shape[-2:]
        drawn = self.draw(len(images), (height, width), generator, progress)
        return self.transform(images, targets, on_device(drawn, images.device))


class Augment(Protocol):
    """Hyperparameters of an augmentation."""

    def build(
        self,
        image_shape: ImageShape,
        *,
        mean: Channels,
        std: Channels,
        class_counts: Tensor,
        groups: Groups,
    ) -> Augmenter:
        """Augmenter for images of ``image_shape`` with pixel ``mean`` and ``std`` (c,)."""

    def canonical(self) -> Augment:
        """The simplest augmentation that does the same."""


AUGMENTS: Registry[Augment] = Registry("augment")


@AUGMENTS.register("none")
@component
class NoAugment:
    """Images as they are, only normalised."""

    def build(
        self,
        image_shape: ImageShape,
        *,
        mean: Channels,
        std: Channels,
        class_counts: Tensor,
        groups: Groups,
    ) -> Augmenter:
        """An augmenter that only normalises."""
        return Augmenter(mean, std)

    def canonical(self) -> Augment:
        """Itself."""
        return self
