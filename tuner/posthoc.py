"""What can be done to stored logits without training: adjustment, τ-normalisation, temperature.

A strength that is chosen on the images it is judged by flatters itself; ``cross_fitted``
chooses it for every fold of the images on the other folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from tuner import metrics
from tuner.strengths import (
    Cells,
    hits_by_exponent,
    hits_by_tau,
    stratified_folds,
    tau_norm_scale,
)

if TYPE_CHECKING:
    from tuner.imbalance import Groups

TAU_GRID: Final = torch.arange(-20, 61, dtype=torch.float64) / 20
"""Strengths of logit adjustment to choose from: -1 to 3 in steps of 0.05."""

TAU_NORM_GRID: Final = torch.arange(0, 41, dtype=torch.float64) / 20
"""Exponents of τ-normalisation to choose from: 0 to 2 in steps of 0.05."""


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
    cells = Cells(targets, torch.zeros_like(targets), logits.shape[1])
    return cells.fit(hits_by_tau(logits, cells, log_priors, grid), grid, metric, groups)[-1]


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
    cells = Cells(targets, fold, logits.shape[1])
    *by_fold, tau = cells.fit(hits_by_tau(logits, cells, log_priors, grid), grid, metric, groups)
    tau_of_image = logits.new_tensor(by_fold)[fold, None]
    return CrossFitted(tau, adjust_logits(logits, log_priors, tau_of_image))


def tau_norm(weight: Tensor, tau: float) -> Tensor:
    """Rows of a classifier's ``weight`` (C, D) divided by their norm to the power τ.

    Kang et al. 2020, equation 4. The bias is dropped; a row of zeros stays one.
    """
    return weight * tau_norm_scale(weight.norm(dim=1), tau)[:, None]


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
    cells = Cells(targets, torch.zeros_like(targets), len(weight))
    return cells.fit(hits_by_exponent(logits, cells, norms, grid), grid, metric, groups)[-1]


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
    cells = Cells(targets, fold, logits.shape[1])
    *by_fold, tau = cells.fit(hits_by_exponent(logits, cells, norms, grid), grid, metric, groups)
    scales = torch.stack([tau_norm_scale(norms, t) for t in by_fold])
    return CrossFitted(tau, logits * scales[fold].to(logits))


def fit_temperature(
    logits: Tensor, targets: Tensor, *, bounds: tuple[float, float] = (0.01, 100.0)
) -> float:
    """The T within ``bounds`` that minimises the NLL of logits / T (Guo et al. 2017).

    It calibrates and never changes a prediction. The NLL is convex in 1/T; Newton steps that
    leave the bracket are replaced by its geometric middle. Logits that say nothing give 1.
    """
    table = metrics.by_class(logits)
    margins = (table - table.gather(0, targets[None])).cpu().numpy()
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


def _nll_derivatives(margins: metrics.Array, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL by 1/T; ``margins`` (C, N) are z - z_y."""
    scaled = margins * inverse
    scaled -= scaled.max(0)
    probabilities = np.exp(scaled, out=scaled)
    probabilities /= probabilities.sum(0)
    means = (probabilities * margins).sum(0)
    spread = margins - means
    spread *= spread
    spread *= probabilities
    return float(means.mean()), float(spread.sum(0).mean())
