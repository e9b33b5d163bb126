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

    The shuffled training images of a class stand in a ring, and each fold takes the next ones: the
    folds share no image until the training part is used up, and never one with the search's own
    validation part, which goes to training. The test part, the class counts, and the mean and
    standard deviation that images are normalised with stay. A validation part that was given, not
    carved, stays as it is.
    """
    if not data.carved:
        return data
    counts = data.class_counts + data.validation.targets.cpu().bincount(minlength=data.num_classes)
    images = joined(data.train.images, data.validation.images)
    targets = torch.cat([data.train.targets, data.validation.targets])
    taken = torch.zeros(int(counts.sum()), dtype=torch.bool)
    for name, members, own in _rings(data):
        ring = members[torch.randperm(len(members), generator=generator("fold", name))]
        taken[ring[(index * own + torch.arange(own)) % max(1, len(ring))]] = True
    parts = [
        Part(images.select(chosen), targets[chosen.to(targets.device)])
        for chosen in (torch.nonzero(~taken).flatten(), torch.nonzero(taken).flatten())
    ]
    return dataclasses.replace(data, train=parts[0], validation=parts[1])


def _rings(data: Data) -> list[tuple[str, Tensor, int]]:
    """Of each class its name, its training images, and how many validation images it has."""
    train, validation = data.train.targets.cpu(), data.validation.targets.cpu()
    return [
        (name, (train == c).nonzero().flatten(), int((validation == c).sum()))
        for c, name in enumerate(data.class_names)
    ]
