"""Batch augmentation on the device of the images: crop, flip, cutout, mixup, cutmix, remix."""

from tuner.augment._base import AUGMENTS, Augment, Augmenter, Drawn, NoAugment, on_device
from tuner.augment._standard import MIXING, Standard, StandardAugmenter
from tuner.augment._transforms import beta, box_share, cut_out, mirror, remix_weight, shift

__all__ = [
    "AUGMENTS",
    "MIXING",
    "Augment",
    "Augmenter",
    "Drawn",
    "NoAugment",
    "Standard",
    "StandardAugmenter",
    "beta",
    "box_share",
    "cut_out",
    "mirror",
    "on_device",
    "remix_weight",
    "shift",
]
