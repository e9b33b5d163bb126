"""Other divisions of the same images into training and validation, to confirm a choice with."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tuner.datasets._data import Data, Part
from tuner.datasets._images import joined
from tuner.seeding import generator


def fold(data: Data, index: int) -> Data:
    """The data with other validation images: as many of each class, out of the training part.

    The images of a class stand in a ring, those of training shuffled and then those of
    validation; fold ``index`` takes the next ones as 0 did before it. So the folds share no
    image until the training part is used up, and the search's own validation images come last.
    The test part, the class counts, and the mean and standard deviation that images are
    normalised with stay. A validation part that was given, not carved, stays as it is.
    """
    if not data.carved:
        return data
    counts = data.class_counts + data.validation.targets.cpu().bincount(minlength=data.num_classes)
    images = joined(data.train.images, data.validation.images)
    targets = torch.cat([data.train.targets, data.validation.targets])
    taken = torch.zeros(int(counts.sum()), dtype=torch.bool)
    for name, members, own in _rings(data):
        order = torch.randperm(len(members) - own, generator=generator("fold", name))
        ring = torch.cat([members[order], members[len(order) :]])
        taken[ring[(index * own + torch.arange(own)) % len(ring)]] = True
    parts = [
        Part(images.select(chosen), targets[chosen.to(targets.device)])
        for chosen in (torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten())
    ]
    return dataclasses.replace(data, train=parts[0], validation=parts[1])


def _rings(data: Data) -> list[tuple[str, Tensor, int]]:
    """Of each class its name, its images in both parts joined, and how many are validation's."""
    train, validation = data.train.targets.cpu(), data.validation.targets.cpu()
    both = torch.cat([train, validation])
    return [
        (name, (both == c).nonzero().flatten(), int((validation == c).sum()))
        for c, name in enumerate(data.class_names)
    ]
