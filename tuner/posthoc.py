"""What can be done to stored logits without training: adjustment, τ-normalisation, temperature.

A strength that is chosen on the images it is judged by flatters itself; ``cross_fitted``
chooses it for every fold of the images on the other folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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
    """The τ of ``grid`` with the best ``metric``, one of ``metrics.RECALL_METRICS``.

    Of equally good τ the neutral 0 wins; without it, the middle of the widest run of
    neighbours, which lies farthest from where predictions change.
    """
    correct = _correct_by_tau(logits, targets, log_priors, grid)
    everything = torch.zeros_like(targets)
    return _fit(correct, targets, everything, grid, metric, groups, logits.shape[1])[-1]


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
    correct = _correct_by_tau(logits, targets, log_priors, grid)
    *by_fold, tau = _fit(correct, targets, fold, grid, metric, groups, logits.shape[1])
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
    correct = _correct_by_exponent(logits, norms, targets, grid)
    everything = torch.zeros_like(targets)
    return _fit(correct, targets, everything, grid, metric, groups, weight.shape[0])[-1]


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
    correct = _correct_by_exponent(logits, norms, targets, grid)
    *by_fold, tau = _fit(correct, targets, fold, grid, metric, groups, logits.shape[1])
    scales = torch.stack([_tau_norm_scale(norms, t) for t in by_fold])
    return CrossFitted(tau, logits * scales[fold].to(logits))


def fit_temperature(
    logits: Tensor, targets: Tensor, *, bounds: tuple[float, float] = (0.01, 100.0)
) -> float:
    """The T within ``bounds`` that minimises the NLL of logits / T (Guo et al. 2017).

    It calibrates and never changes a prediction. The NLL is convex in 1/T; Newton steps that
    leave the bracket are replaced by its geometric middle. Logits that say nothing give 1.
    """
    margins = logits.detach().to(torch.float64)
    margins = margins - margins.gather(1, targets[:, None])
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
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = shuffled[targets.cpu()[shuffled].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold.to(targets.device)


def _correct_by_tau(logits: Tensor, targets: Tensor, log_priors: Tensor, grid: Tensor) -> Tensor:
    """Whether argmax(logits - τ·log π) is the target, (N, T) bool, without T argmaxes.

    The target beats class c where margin > τ·(log π_y - log π_c). That is one bound on τ for
    each rival, so the target wins on one interval of τ. A tie goes to the lower index, as in
    argmax: rivals of lower index get the smallest possible head start.
    """
    table, priors = logits.detach().to(torch.float64), log_priors.to(logits.device, torch.float64)
    classes = torch.arange(table.shape[1], device=table.device)
    margin = table.gather(1, targets[:, None]) - table
    margin = torch.where(classes < targets[:, None], margin - 1e-300, margin)
    slope = (priors[:, None] - priors)[targets]
    bound = margin / slope
    lowest = torch.where(slope < 0, bound, -math.inf).amax(1, keepdim=True)
    highest = torch.where(slope > 0, bound, math.inf).amin(1, keepdim=True)
    possible = ((slope != 0) | (margin >= 0)).all(1, keepdim=True)
    grid = grid.to(table)
    return possible & (grid >= lowest) & (grid <= highest)


def _correct_by_exponent(logits: Tensor, norms: Tensor, targets: Tensor, grid: Tensor) -> Tensor:
    scales = [_tau_norm_scale(norms, tau).to(logits) for tau in grid.tolist()]
    return torch.stack([(logits * scale).argmax(1) == targets for scale in scales], dim=1)


def _tau_norm_scale(norms: Tensor, tau: float) -> Tensor:
    return torch.where(norms > 0, norms, 1.0) ** -tau


def _fit(
    correct: Tensor,
    targets: Tensor,
    fold: Tensor,
    grid: Tensor,
    metric: str,
    groups: Groups | None,
    num_classes: int,
) -> list[float]:
    """The best grid value on the complement of each fold, and last on all images."""
    folds = int(fold.max()) + 1 if len(fold) else 1
    cells = fold * num_classes + targets
    hits = correct.new_zeros((folds * num_classes, len(grid)), dtype=torch.float64)
    hits = hits.index_add_(0, cells, correct.to(hits)).view(folds, num_classes, -1)
    images = torch.bincount(cells, minlength=folds * num_classes).view(folds, num_classes)
    hits = torch.cat([hits.sum(0) - hits, hits.sum(0, keepdim=True)])
    images = torch.cat([images.sum(0) - images, images.sum(0, keepdim=True)])
    weights = metrics.recall_weights(metric, images, groups) / images.clamp(min=1)
    scores = torch.einsum("fc,fct->ft", weights, hits)
    return [_best(row, grid.tolist()) for row in scores.tolist()]


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
    """First and second derivative of the mean NLL by 1/T; ``margins`` (N, C) are z - z_y."""
    probabilities = (margins * inverse).softmax(1)
    means = (probabilities * margins).sum(1)
    variances = (probabilities * (margins - means[:, None]).square()).sum(1)
    return float(means.mean()), float(variances.mean())
