"""How often images are right at each strength of an adjustment, and which one is best by fold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tuner import metrics

if TYPE_CHECKING:
    from tuner.imbalance import Groups

_TIE = 1e-9
_ELEMENTS = 50_000
"""Of a table at several strengths at a time: what fits into a processor's cache."""


def stratified_folds(targets: Tensor, folds: int, seed: int) -> Tensor:
    """Fold 0 ... folds - 1 of each image, (N,) int64, random within the classes.

    The folds' shares of a class differ by one image at most, as do their sizes. Classes with
    fewer images than folds take turns, so they spread over the folds too.
    """
    if folds < 2:
        raise ValueError(f"cross-fitting needs at least 2 folds, not {folds}")
    fold = _folds(targets.long().cpu().numpy().tobytes(), folds, seed)
    return fold.clone().to(targets.device)


@lru_cache(maxsize=4)
def _folds(targets: bytes, folds: int, seed: int) -> Tensor:
    """``stratified_folds``, made once for the targets of all trials."""
    of_image = torch.from_numpy(np.frombuffer(targets, dtype=np.int64).copy())
    shuffled = torch.randperm(len(of_image), generator=torch.Generator().manual_seed(seed))
    order = shuffled[of_image[shuffled].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold


@dataclass(frozen=True, eq=False)
class Cells:
    """The images of each fold and class: ``targets`` (N,) and ``fold`` (N,)."""

    targets: Tensor
    fold: Tensor
    num_classes: int

    @cached_property
    def count(self) -> int:
        """Folds times classes."""
        return (int(self.fold.max()) + 1 if len(self.fold) else 1) * self.num_classes

    @cached_property
    def of_image(self) -> Tensor:
        """The cell of each image, (N,) int64."""
        return self.fold * self.num_classes + self.targets

    def fit(self, hits: Tensor, grid: Tensor, metric: str, groups: Groups | None) -> list[float]:
        """The best grid value on the complement of each fold, and last on all images.

        ``hits`` (cells, T) are the images of each cell that are right at each grid value.
        """
        by_fold = (-1, self.num_classes)
        hits = hits.view(*by_fold, len(grid))
        images = torch.bincount(self.of_image, minlength=self.count).view(by_fold)
        hits = torch.cat([hits.sum(0) - hits, hits.sum(0, keepdim=True)])
        images = torch.cat([images.sum(0) - images, images.sum(0, keepdim=True)])
        weights = metrics.recall_weights(metric, images, groups) / images.clamp(min=1)
        scores = torch.einsum("fc,fct->ft", weights, hits)
        return [_best(row, grid.tolist()) for row in scores.tolist()]


def hits_by_tau(logits: Tensor, cells: Cells, log_priors: Tensor, grid: Tensor) -> Tensor:
    """How often argmax(logits - τ·log π) is the target, (cells, T) float64, without T argmaxes.

    The target beats class c where margin > τ·(log π_y - log π_c). That is one bound on τ for
    each rival, so the target wins on one interval of τ. A tie goes to the lower index, as in
    argmax: rivals of lower index get the smallest possible head start.
    """
    table, targets = metrics.by_class(logits), cells.targets
    priors, grid = log_priors.to(table), grid.to(table)
    classes = torch.arange(len(table), device=table.device)[:, None]
    margin = table.gather(0, targets[None]) - table
    margin = torch.where(classes < targets, margin - 1e-300, margin)
    slope = priors[targets] - priors[:, None]
    bound = margin / slope
    lowest = torch.where(slope < 0, bound, -math.inf).amax(0)
    highest = torch.where(slope > 0, bound, math.inf).amin(0)
    begin, end = torch.searchsorted(grid, lowest), torch.searchsorted(grid, highest, right=True)
    wins = (((slope != 0) | (margin >= 0)).all(0) & (begin < end)).double()
    width = len(grid) + 1
    first, size = cells.of_image * width, cells.count * width
    begun, ended = (torch.bincount(first + at, weights=wins, minlength=size) for at in (begin, end))
    return (begun - ended).view(-1, width).cumsum(1)[:, :-1]


def hits_by_exponent(logits: Tensor, cells: Cells, norms: Tensor, grid: Tensor) -> Tensor:
    """How often argmax(logits / norms^τ) is the target, (cells, T) float64.

    It is where no class has more, and no earlier one as much. (A table's argmax takes longer.)
    """
    table, own = logits.detach().T.contiguous(), cells.targets[None, None]
    classes = torch.arange(len(table), device=table.device)[:, None]
    only_earlier = table.new_zeros(table.shape).masked_fill_(classes >= cells.targets, -math.inf)
    scales = torch.stack([tau_norm_scale(norms, tau) for tau in grid.tolist()]).to(table)
    hits = []
    for some in torch.split(scales, max(1, _ELEMENTS // max(1, table.numel()))):
        scaled = table * some[:, :, None]
        score = scaled.gather(1, own.expand(len(some), 1, -1))[:, 0]
        right = (score == scaled.amax(1)) & (score > (scaled + only_earlier).amax(1))
        hits += [_count(cells, row) for row in right.double()]
    return torch.stack(hits, dim=1)


def _count(cells: Cells, right: Tensor) -> Tensor:
    return torch.bincount(cells.of_image, weights=right, minlength=cells.count)


def tau_norm_scale(norms: Tensor, tau: float) -> Tensor:
    """What τ-normalisation multiplies each class by, (C,): 1 / norm^τ, and 1 where a norm is 0."""
    return torch.where(norms > 0, norms, 1.0) ** -tau


def _best(scores: list[float], grid: list[float]) -> float:
    """The grid value with the best score, by the tie rule of ``posthoc.fit_tau``."""
    top = max(scores) - _TIE
    runs: list[list[float]] = [[]]
    for value, score in zip(grid, scores, strict=True):
        if score >= top:
            runs[-1].append(value)
        elif runs[-1]:
            runs.append([])
    if any(0.0 in run for run in runs):
        return 0.0
    middles = [(len(run), run[(len(run) - 1) // 2]) for run in runs if run]
    return max(middles, key=lambda middle: (middle[0], -abs(middle[1])))[1]
