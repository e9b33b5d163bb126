"""The usual augmentations of small images, batched and stronger for the tail if wanted."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tuner.augment._base import (
    AUGMENTS,
    Augment,
    Augmenter,
    Channels,
    Drawn,
    ImageShape,
    NoAugment,
)
from tuner.augment._transforms import (
    beta,
    box_share,
    cut_out,
    mirror,
    remix_weight,
    shift,
    taken,
    whole,
)
from tuner.imbalance import Groups
from tuner.registry import component

DRAWS_PER_IMAGE = 7

MIXING = ("mixup", "cutmix")
"""Settings by which an image is mixed with another one, where they are not 0."""


@AUGMENTS.register("standard")
@component
class Standard:
    """Random crop and flip, and if wanted cutout, brightness, mixup, cutmix and remix.

    ``crop_padding``: images are shifted by up to so many pixels, black coming in. ``flip``:
    mirrored left to right half of the time; off for digits and letters. ``cutout``: side of a
    square set to the mean colour, around a random pixel (DeVries & Taylor 2017).
    ``brightness``: pixels times a factor from 1 ± brightness. ``mixup`` and ``cutmix``: α of
    Beta(α, α) for the share of the first image, 0 = off (Zhang et al. 2018, Yun et al. 2019);
    with both, each batch takes one of them with equal chance. ``remix``: mixed targets go
    wholly to the rarer class where it is rare enough (Chou et al. 2020); without mixup and
    cutmix it does nothing. ``mix_until``: progress from which nothing is mixed any more.
    ``tail_strength``: shift, cutout and brightness of images of tail classes are so many times
    as large; a shift or side that outgrows half the image by that stays there.
    """

    crop_padding: Annotated[int, Field(ge=0)] = 4
    flip: bool = True
    cutout: Annotated[int, Field(ge=0)] = 0
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    remix: bool = False
    mix_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    tail_strength: Annotated[float, Field(ge=1)] = 1.0

    def build(
        self,
        image_shape: ImageShape,
        *,
        mean: Channels,
        std: Channels,
        class_counts: Tensor,
        groups: Groups,
    ) -> Augmenter:
        """An augmenter with the tail of ``groups`` and, for remix, ``class_counts`` (C,)."""
        return StandardAugmenter(self, image_shape, mean, std, class_counts, groups)

    def canonical(self) -> Augment:
        """Without what has no effect; ``none`` when nothing has."""
        simple = self
        if self.mix_until == 0 or not (self.mixup or self.cutmix):
            simple = replace(simple, mixup=0.0, cutmix=0.0, remix=False, mix_until=1.0)
        if not (self.crop_padding or self.cutout or self.brightness):
            simple = replace(simple, tail_strength=1.0)
        return NoAugment() if simple == Standard(crop_padding=0, flip=False) else simple


class StandardAugmenter(Augmenter):
    """What ``Standard`` builds: tables per class, looked up by the targets of a batch."""

    shifts: Tensor
    sides: Tensor
    brightness: Tensor
    class_counts: Tensor

    def __init__(
        self,
        settings: Standard,
        image_shape: ImageShape,
        mean: Channels,
        std: Channels,
        class_counts: Tensor,
        groups: Groups,
    ) -> None:
        super().__init__(mean, std)
        self.settings = settings
        strength = torch.ones(len(class_counts), dtype=torch.float64)
        strength[list(groups.tail)] = settings.tail_strength
        half = min(image_shape[1:]) // 2
        self._table("shifts", _scaled(settings.crop_padding, strength, half))
        self._table("sides", _scaled(settings.cutout, strength, half))
        self._table("brightness", (settings.brightness * strength).clamp(max=1).float())
        self._table("class_counts", class_counts)
        self.margin = int(self.shifts.max())

    def draw(
        self, count: int, size: tuple[int, int], generator: torch.Generator, progress: float
    ) -> Drawn:
        """Uniform draws (7, N), and with mixing the share of the first image, (1, 1) or (H, W)."""
        share = self._mixing_share(size, generator, progress)
        draws = torch.rand(DRAWS_PER_IMAGE, count, generator=generator)
        return {"draws": draws} if share is None else {"draws": draws, "share": share}

    def plan(
        self,
        steps: int,
        count: int,
        size: tuple[int, int],
        generator: torch.Generator,
        progress: float,
    ) -> Drawn:
        """See the base class; without mixing one call draws the numbers of all steps."""
        if self._mixes(progress):
            return super().plan(steps, count, size, generator, progress)
        return {"draws": torch.rand(steps, DRAWS_PER_IMAGE, count, generator=generator)}

    def transform(self, images: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Crop, flip, brightness, normalise, cutout, mix, in this order."""
        self._follow(images)
        if self.margin > 0:
            images = shift(images, *self._offsets(targets, drawn["draws"]), self.margin)
        return self._transform_cropped(images, targets, drawn)

    def transform_crops(
        self, crops: Tensor, indices: Tensor, targets: Tensor, drawn: Drawn
    ) -> tuple[Tensor, Tensor]:
        """``transform`` of the images (N,) at ``indices`` of a view of all crops.

        The view is ``ResidentImages.crops`` for ``margin``: the images are copied but once.
        """
        self._follow(crops)
        down, right = self._offsets(targets, drawn["draws"])
        images = taken(crops, indices, self.margin - down, self.margin - right)
        return self._transform_cropped(images, targets, drawn)

    def _offsets(self, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """By how many pixels (N,) each image moves down and right."""
        limits = self.shifts[targets]
        down, right = (whole(draws[i], 2 * limits + 1) - limits for i in (0, 1))
        return down, right

    def _transform_cropped(
        self, images: Tensor, targets: Tensor, drawn: Drawn
    ) -> tuple[Tensor, Tensor]:
        draws, share = drawn["draws"], drawn.get("share")
        images = self._transform(images, targets, draws)
        if share is None:
            return images, targets
        partner = draws[6].argsort(stable=True)
        mixed = images.index_select(0, partner).lerp_(images, share)
        return mixed, self._mixed_targets(targets, partner, share.mean())

    def _transform(self, images: Tensor, targets: Tensor, draws: Tensor) -> Tensor:
        settings = self.settings
        height, width = images.shape[-2:]
        if settings.flip:
            images = mirror(images, draws[2] < 0.5)
        if settings.brightness > 0:
            factor = 1 + self.brightness[targets] * (2 * draws[3] - 1)
            images = images.float().mul_(factor[:, None, None, None]).clamp_(max=255)
        images = self.normalize(images)
        if settings.cutout > 0:
            row, column = whole(draws[4], height), whole(draws[5], width)
            images = cut_out(images, row, column, self.sides[targets])
        return images

    def _mixes(self, progress: float) -> bool:
        mixing = self.settings.mixup > 0 or self.settings.cutmix > 0
        return mixing and progress < self.settings.mix_until

    def _mixing_share(
        self, size: tuple[int, int], generator: torch.Generator, progress: float
    ) -> Tensor | None:
        """Share of the first image, (1, 1) or per pixel (H, W); None when nothing is mixed.

        Where both kinds of mixing take turns it is always (H, W): steps drawn ahead are stacked.
        """
        mixup, cutmix = self.settings.mixup, self.settings.cutmix
        if not self._mixes(progress):
            return None
        both = mixup > 0 and cutmix > 0
        box = bool(torch.rand((), generator=generator) < 0.5) if both else cutmix > 0
        if not box:
            return torch.full(size if both else (1, 1), beta(mixup, generator))
        return box_share(beta(cutmix, generator), size, generator)

    def _mixed_targets(self, targets: Tensor, partner: Tensor, share: Tensor) -> Tensor:
        classes = torch.arange(len(self.class_counts), device=targets.device)
        first = (targets[:, None] == classes).float()
        weight = share.expand(len(targets))
        if self.settings.remix:
            counts = self.class_counts[targets]
            weight = remix_weight(weight, counts, counts[partner])
        return torch.lerp(first[partner], first, weight[:, None])


def _scaled(value: int, strength: Tensor, half: int) -> Tensor:
    """``value`` times ``strength`` in whole pixels, held at ``half`` unless it was above."""
    return (value * strength).round().clamp(max=max(value, half)).long()
