"""Which sample goes to which part: stratified test, long tail, capped-balanced validation.

Every class is shuffled by its own seed, so that its split does not depend on the others, and
smaller counts keep a prefix of what larger counts would have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.imbalance import class_counts
from tuner.seeding import generator

ESTIMABLE = 4
"""A class with fewer images cannot spare the two that an accuracy needs at the least."""


@dataclass(frozen=True, eq=False)
class Split:
    """Ascending sample indices of each part (N,); None where nothing was to be split off."""

    train: Tensor
    validation: Tensor | None
    test: Tensor | None
    pool_counts: Tensor
    """Images of each class (C,) that training and validation share."""
    kept: Tensor
    """Share of each class (C,) that the profile kept, 1 without a profile."""


def test_counts(counts: Tensor, fraction: float) -> Tensor:
    """Test images of each class (C,): the fraction, at least 1, and 0 of fewer than 3."""
    wanted = (counts * fraction).round().long().clamp(min=1)
    return torch.where(counts >= 3, torch.minimum(wanted, counts // 2), 0)


def validation_counts(counts: Tensor, fraction: float, cap: int) -> Tensor:
    """Capped-balanced validation images of each class (C,); ``cap`` = 0 means no cap.

    v = min(cap, max(2, fraction·n)), but never more than half of the class: the head does
    not need more images than ``cap`` for its accuracy, and the tail cannot spare more.
    """
    wanted = (counts * fraction).round().long().clamp(min=2)
    if cap:
        wanted = wanted.clamp(max=cap)
    return torch.minimum(wanted, counts // 2)


def split(
    targets: Tensor,
    class_names: Sequence[str],
    *,
    seed: int,
    test_fraction: float | None,
    validation_fraction: float | None,
    validation_cap: int,
    carve: Callable[[Tensor], Tensor],
) -> Split:
    """Divide samples with ``targets`` (N,) into parts; a fraction of None leaves a part out.

    ``carve`` turns the class counts (C,) left after the test part into the counts to keep.
    The test part does not depend on ``seed``: otherwise what one seed trained on would be
    what another is tested on.
    """
    classes = _by_class(targets, len(class_names))
    test = None
    if test_fraction is not None:
        shuffled = _shuffled(classes, class_names, "test")
        test, classes = _divide(shuffled, test_counts(_sizes(classes), test_fraction))
    classes = _shuffled(classes, class_names, seed, "split")
    available = _sizes(classes)
    pool_counts = carve(available)
    classes = [members[:n] for members, n in zip(classes, pool_counts.tolist(), strict=True)]
    validation = None
    if validation_fraction is not None:
        wanted = validation_counts(pool_counts, validation_fraction, validation_cap)
        validation, classes = _divide(classes, wanted)
    kept = pool_counts.to(torch.float64) / available
    return Split(_joined(classes), validation, test, pool_counts, kept)


def thin(indices: Tensor, targets: Tensor, shares: Tensor, class_names: Sequence[str]) -> Tensor:
    """Keep the share (C,) of each class among ``indices`` (n,), and at least one image."""
    classes = _by_class(targets[indices], len(class_names))
    counts = (_sizes(classes) * shares).round().long().clamp(min=1)
    kept, _ = _divide(_shuffled(classes, class_names, "test"), counts)
    return indices[kept]


def _by_class(targets: Tensor, num_classes: int) -> list[Tensor]:
    order = targets.argsort(stable=True)
    return list(torch.split(order, class_counts(targets, num_classes).tolist()))


def _shuffled(classes: list[Tensor], class_names: Sequence[str], *seed: object) -> list[Tensor]:
    return [
        members[torch.randperm(len(members), generator=generator(*seed, name))]
        for members, name in zip(classes, class_names, strict=True)
    ]


def _divide(classes: list[Tensor], counts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The first ``counts`` (C,) members of each class together, and what is left of each."""
    sized = list(zip(classes, counts.tolist(), strict=True))
    return _joined([members[:n] for members, n in sized]), [members[n:] for members, n in sized]


def _sizes(classes: list[Tensor]) -> Tensor:
    return torch.tensor([len(members) for members in classes], dtype=torch.int64)


def _joined(classes: list[Tensor]) -> Tensor:
    return torch.cat(classes).sort().values
