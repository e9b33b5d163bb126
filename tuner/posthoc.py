"""What can be done to stored logits without training: adjustment, τ-normalisation, temperature.

A strength that is chosen on the images it is judged by flatters itself; ``cross_fitted``
chooses it for every fold of the images on the other folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from tuner import metrics

if TYPE_CHECKING:
    from tuner.imbalance import Groups

TAU_GRID: Final = torch.arange(-20, 61, dtype=torch.float64) / 20
"""Strengths of logit adjustment to choose from: -1 to 3 in steps of 0.05."""

TAU_NORM_GRID: Final = torch.arange(0, 41, dtype=torch.float64) / 20
"""Exponents of τ-normalisation to choose from: 0 to 2 in steps of 0.05."""

_TIE = 1e-9
_ELEMENTS = 50_000


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """The strength fitted on all images, and logits (N, C) adjusted fold by fold.

    ``adjusted_logits`` of an image use the strength chosen on the other folds, so metrics of
    them are honest; ``tau`` is the one to deploy.
    """

    tau: float
    adjusted_logits: Tensor


def adjust_logits(logits: Tensor, log_priors: Tensor, tau: float | Tensor) -> Tensor:
    """Logits (N, C) less τ·log π (Menon et al. 2021, equation 9).

    τ = 0 changes nothing; τ = 1 turns a posterior under the training priors into one under
    equal priors. ``tau`` may be a column (N, 1).
    """
    return logits - tau * log_priors.to(logits)


def class_thresholds(log_priors: Tensor, tau: float) -> Tensor:
    """What τ adds to the logits of each class, (C,): positive for rare classes, mean 0.

    ``logits + class_thresholds(...)`` predicts as ``adjust_logits`` does.
    """
    return -tau * (log_priors - log_priors.mean())


def fit_tau(
    logits: Tensor,
    targets: Tensor,
    log_priors: Tensor,
    *,
    groups: Groups | None = None,
    metric: str = "balanced_accuracy",
    grid: Tensor = TAU_GRID,
) -> float:
    """The τ of an ascending ``grid`` with the best ``metric`` of ``metrics.RECALL_METRICS``.

    Of equally good τ the neutral 0 wins; without it, the middle of the widest run of
    neighbours, which lies farthest from where predictions change.
    """
    cells = _Cells(targets, torch.zeros_like(targets), logits.shape[1])
    return cells.fit(_hits_by_tau(logits, cells, log_priors, grid), grid, metric, groups)[-1]


def cross_fitted(
    logits: Tensor,
    targets: Tensor,
    log_priors: Tensor,
    *,
    folds: int = 5,
    seed: int,
    groups: Groups | None = None,
    metric: str = "balanced_accuracy",
    grid: Tensor = TAU_GRID,
) -> CrossFitted:
    """Adjust each fold of the images with the τ that ``fit_tau`` finds on the other folds."""
    fold = stratified_folds(targets, folds, seed)
    cells = _Cells(targets, fold, logits.shape[1])
    *by_fold, tau = cells.fit(_hits_by_tau(logits, cells, log_priors, grid), grid, metric, groups)
    tau_of_image = logits.new_tensor(by_fold)[fold, None]
    return CrossFitted(tau, adjust_logits(logits, log_priors, tau_of_image))


def tau_norm(weight: Tensor, tau: float) -> Tensor:
    """Rows of a classifier's ``weight`` (C, D) divided by their norm to the power τ.

    Kang et al. 2020, equation 4. The bias is dropped; a row of zeros stays one.
    """
    return weight * _tau_norm_scale(weight.norm(dim=1), tau)[:, None]


def tau_norm_logits(features: Tensor, weight: Tensor, tau: float) -> Tensor:
    """Logits (N, C) of ``features`` (N, D) under the τ-normalised classifier."""
    return features @ tau_norm(weight, tau).T


def fit_tau_norm(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    groups: Groups | None = None,
    metric: str = "balanced_accuracy",
    grid: Tensor = TAU_NORM_GRID,
) -> float:
    """The exponent of ``grid`` with the best ``metric``; ties as in ``fit_tau``."""
    logits, norms = features @ weight.T, weight.norm(dim=1)
    cells = _Cells(targets, torch.zeros_like(targets), len(weight))
    return cells.fit(_hits_by_exponent(logits, cells, norms, grid), grid, metric, groups)[-1]


def cross_fitted_tau_norm(
    logits: Tensor,
    norms: Tensor,
    targets: Tensor,
    *,
    folds: int = 5,
    seed: int,
    groups: Groups | None = None,
    metric: str = "balanced_accuracy",
    grid: Tensor = TAU_NORM_GRID,
) -> CrossFitted:
    """τ-normalise each fold with the exponent that ``fit_tau_norm`` finds on the other folds.

    ``logits`` (N, C) without the bias and the ``norms`` (C,) of the classifier's rows do: the
    τ-normalised logits are logits / norms^τ.
    """
    fold = stratified_folds(targets, folds, seed)
    cells = _Cells(targets, fold, logits.shape[1])
    *by_fold, tau = cells.fit(_hits_by_exponent(logits, cells, norms, grid), grid, metric, groups)
    scales = torch.stack([_tau_norm_scale(norms, t) for t in by_fold])
    return CrossFitted(tau, logits * scales[fold].to(logits))


def fit_temperature(
    logits: Tensor, targets: Tensor, *, bounds: tuple[float, float] = (0.01, 100.0)
) -> float:
    """The T within ``bounds`` that minimises the NLL of logits / T (Guo et al. 2017).

    It calibrates and never changes a prediction. The NLL is convex in 1/T; Newton steps that
    leave the bracket are replaced by its geometric middle. Logits that say nothing give 1.
    """
    table = metrics.by_class(logits)
    margins = table - table.gather(0, targets[None])
    low, high, inverse = 1 / bounds[1], 1 / bounds[0], 1.0
    if _nll_derivatives(margins, low)[0] > 0:
        return bounds[1]
    if _nll_derivatives(margins, high)[0] < 0:
        return bounds[0]
    for _ in range(100):
        slope, curvature = _nll_derivatives(margins, inverse)
        if slope == 0:
            break
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        previous, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse - previous) <= 1e-10 * inverse:
            break
    return 1 / inverse


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature T > 0."""
    return logits / temperature


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
class _Cells:
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


def _hits_by_tau(logits: Tensor, cells: _Cells, log_priors: Tensor, grid: Tensor) -> Tensor:
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


def _hits_by_exponent(logits: Tensor, cells: _Cells, norms: Tensor, grid: Tensor) -> Tensor:
    """How often argmax(logits / norms^τ) is the target, (cells, T) float64.

    It is where no class has more, and no earlier one as much. (A table's argmax takes longer.)
    """
    table, own = logits.detach().T.contiguous(), cells.targets[None, None]
    classes = torch.arange(len(table), device=table.device)[:, None]
    only_earlier = table.new_zeros(table.shape).masked_fill_(classes >= cells.targets, -math.inf)
    scales = torch.stack([_tau_norm_scale(norms, tau) for tau in grid.tolist()]).to(table)
    hits = []
    for some in scales.split(max(1, _ELEMENTS // max(1, table.numel()))):
        scaled = table * some[:, :, None]
        score = scaled.gather(1, own.expand(len(some), 1, -1))[:, 0]
        right = (score == scaled.amax(1)) & (score > (scaled + only_earlier).amax(1))
        hits += [_count(cells, row) for row in right.double()]
    return torch.stack(hits, dim=1)


def _count(cells: _Cells, right: Tensor) -> Tensor:
    return torch.bincount(cells.of_image, weights=right, minlength=cells.count)


def _tau_norm_scale(norms: Tensor, tau: float) -> Tensor:
    return torch.where(norms > 0, norms, 1.0) ** -tau


def _best(scores: list[float], grid: list[float]) -> float:
    """The grid value with the best score, by the tie rule of ``fit_tau``."""
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


def _nll_derivatives(margins: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL by 1/T; ``margins`` (C, N) are z - z_y."""
    probabilities = (margins * inverse).softmax(0)
    means = (probabilities * margins).sum(0)
    variances = (probabilities * (margins - means).square()).sum(0)
    return float(means.mean()), float(variances.mean())
