"""When a trial is given up: compared at equal schedule fraction, with confidence bounds."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tuner.imbalance import Groups
from tuner.metrics import RECALL_METRICS, recall_weights
from tuner.statistics import wilson

MARGIN = 0.05
MIN_PEERS = 4
MIN_COMPLETE_PER_LOSS = 2


@dataclass(frozen=True)
class Curve:
    """A trial's objective after each epoch, in [0, 1], as far as it got.

    ``first`` is the epoch of the first value: not 0 in a trial that branched from another's
    stage one, which has no values of its own before. ``settled`` is the progress from which its
    warm-up is over and its deferred parts act.
    """

    loss: str
    values: tuple[float, ...]
    epochs: int
    settled: float
    complete: bool
    first: int = 0

    @property
    def length(self) -> int:
        """Epochs that are done."""
        return self.first + len(self.values)

    def at(self, progress: float) -> float | None:
        """Value at a share of the training; None if it was not reached or not yet settled."""
        epoch = round(progress * self.epochs) - 1
        settled = progress >= self.settled + MARGIN - 1e-9
        if not settled or not self.first <= epoch < self.length:
            return None
        return self.values[epoch - self.first]


def effective_images(metric: str, images: Tensor, groups: Groups) -> float | None:
    """Number of images a mean of recalls is as certain as: 1 / Σ w_c²/n_c.

    ``images`` (C,) are the evaluation images of each class. None for a metric that is no mean
    of recalls, and where no class that counts has an image: there is no bound to prune by.
    """
    if metric not in RECALL_METRICS:
        return None
    weights = recall_weights(metric, images, groups)
    variance = float((weights.square() / images.clamp(min=1)).sum())
    return 1 / variance if variance > 0 else None


class Curves:
    """Curves of trials that ended, to be compared with at equal shares of their training.

    What they had at a share is sorted once; each further curve finds its place.
    """

    def __init__(self, curves: Iterable[Curve] = ()) -> None:
        self.curves: list[Curve] = []
        self._complete = Counter[str]()
        self._at: dict[float, tuple[list[float], int]] = {}
        for curve in curves:
            self.add(curve)

    def __len__(self) -> int:
        return len(self.curves)

    def add(self, curve: Curve) -> None:
        """Take in the curve of one more trial."""
        self.curves.append(curve)
        self._complete[curve.loss] += curve.complete

    def complete(self, loss: str) -> int:
        """How many trials of a loss came to their end."""
        return self._complete[loss]

    def at(self, progress: float) -> Sequence[float]:
        """What those had that were settled at this share of the training, in order; no NaN."""
        values, taken = self._at.get(progress, ([], 0))
        new = self.curves[taken:]
        for value in (curve.at(progress) for curve in new):
            if value is not None and value == value:
                insort(values, value)
        self._at[progress] = values, taken + len(new)
        return values


def is_behind(curve: Curve, peers: Curves, *, images: float, after: float) -> bool:
    """Whether the trial is so far behind its peers that noise does not explain it.

    True when, after each of the last two epochs, the upper 95 % Wilson bound of its value over
    ``images`` effective images is below the peers' median, or below the lower bound of the best
    peer. Never before the share ``after`` of the training, before warm-up and deferred parts,
    with fewer than four peers, or while two trials of its loss are not yet complete.
    """
    if peers.complete(curve.loss) < MIN_COMPLETE_PER_LOSS or len(curve.values) < 2:
        return False
    last = curve.length
    return all(
        epoch / curve.epochs >= after
        and _behind_at(curve, epoch / curve.epochs, peers, max(images, 1))
        for epoch in (last - 1, last)
    )


def _behind_at(curve: Curve, progress: float, peers: Curves, images: float) -> bool:
    value = curve.at(progress)
    others = peers.at(progress)
    if value is None or len(others) < MIN_PEERS:
        return False
    upper = wilson(value * images, images).high
    return upper < max(_middle(others), wilson(others[-1] * images, images).low)


def _middle(values: Sequence[float]) -> float:
    """Median of values that are in order."""
    half = len(values) // 2
    return (values[half] + values[-half - 1]) / 2


def is_at_chance(balanced_accuracy: float, num_classes: int, images: int, progress: float) -> bool:
    """Whether a trial past 30 % of its training still guesses.

    True when its balanced accuracy is at most one of ``images`` above 1 / C, which is what
    predicting a single one of the C classes that have validation images gives.
    """
    return progress >= 0.3 and balanced_accuracy <= 1 / num_classes + 1 / max(images, 1)
