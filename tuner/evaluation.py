"""What a trial's validation logits say: raw, and after post-hoc adjustment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tuner.datasets import Data
from tuner.imbalance import Groups, log_priors
from tuner.metrics import (
    METRICS,
    calibration,
    confusion_matrix,
    evaluate,
    recall_per_class,
)
from tuner.posthoc import (
    TAU_GRID,
    adjust_logits,
    cross_fitted,
    cross_fitted_tau_norm,
    fit_temperature,
)
from tuner.pruning import effective_images
from tuner.recipe import Recipe
from tuner.statistics import bootstrap_intervals_of_each

Metrics = dict[str, float | None]
FOLDS = 5
FEW, CERTAIN, SHOWN = 10, 400, 8


@dataclass(frozen=True)
class Assessment:
    """Metrics of one set of logits as they are, and with τ chosen by cross-fitting.

    ``tau`` is fitted on all the logits: the strength to use on new images. The adjusted
    metrics, and ``adjusted_logits`` (N, C) that they are taken from, never judge an image with
    a τ that was chosen on it.
    """

    raw: Metrics
    adjusted: Metrics
    tau: float
    adjusted_logits: Tensor

    def value(self, metric: str, *, adjusted: bool) -> float:
        """A metric by name; NaN where it cannot be estimated."""
        value = (self.adjusted if adjusted else self.raw)[metric]
        return float("nan") if value is None else value


def assess(
    logits: Tensor, targets: Tensor, class_counts: Tensor, groups: Groups, kappa: float
) -> Assessment:
    """Judge logits (N, C) against targets (N,), with the training part's class counts (C,).

    ``kappa`` is the correction that training did already; see ``tau_grid``.
    """
    priors = log_priors(class_counts).to(logits.dtype)
    grid = tau_grid(kappa)
    fitted = cross_fitted(logits, targets, priors, folds=FOLDS, seed=0, grid=grid)
    return Assessment(
        raw=evaluate(logits, targets, groups),
        adjusted=evaluate(fitted.adjusted_logits, targets, groups),
        tau=fitted.tau,
        adjusted_logits=fitted.adjusted_logits,
    )


def tau_grid(kappa: float) -> Tensor:
    """The τ that may be chosen after training with total correction κ.

    Undoing a correction helps only where there was too much of it: τ below min(0, 1 - κ) would
    favour the head beyond the training part's own priors, which few validation images, all of
    their tail correct, can seem to ask for.
    """
    return TAU_GRID[min(0.0, 1 - kappa) - 1e-9 <= TAU_GRID]


def assess_validation(logits: Tensor, data: Data, recipe: Recipe) -> Assessment:
    """Judge a recipe's logits of the validation part of ``data``."""
    kappa = recipe.correction(data.class_counts, data.groups)
    targets = data.validation.targets.cpu()
    return assess(logits, targets, data.class_counts, data.groups, kappa)


def intervals(logits: Tensor, assessment: Assessment, data: Data) -> dict[str, Any]:
    """95 % intervals of the raw and the adjusted validation metrics, as [low, high] or None."""
    each = bootstrap_intervals_of_each(
        [logits, assessment.adjusted_logits], data.validation.targets, data.groups, seed=0
    )
    return {
        kind: {name: f and [f.low, f.high] for name, f in found.items()}
        for kind, found in zip(("raw", "adjusted"), each, strict=True)
    }


def recalls(assessment: Assessment, data: Data) -> list[float | None]:
    """Recall of each class after adjustment; None where validation has no image of it."""
    predictions = assessment.adjusted_logits.argmax(1)
    confusion = confusion_matrix(predictions, data.validation.targets.cpu(), data.num_classes)
    return [None if r != r else r for r in recall_per_class(confusion).tolist()]


def certainty(data: Data) -> list[str]:
    """What the validation part cannot tell: classes with few images, and how sure the tail is."""
    counts = data.validation.targets.cpu().bincount(minlength=data.num_classes)
    few = [f"{data.class_names[c]} ({n})" for c, n in enumerate(counts.tolist()) if n < FEW]
    tail = effective_images("tail_accuracy", counts, data.groups)
    lines = []
    if few:
        shown = ", ".join(few[:SHOWN]) + (f" and {len(few) - SHOWN} more" * (len(few) > SHOWN))
        lines.append(f"fewer than {FEW} validation images, so a class says little alone: {shown}")
    if tail is not None and tail < CERTAIN:
        images = int(counts[list(data.groups.tail)].sum())
        lines.append(
            f"the tail has {images} validation image{'s' * (images != 1)}: at 50 % its accuracy "
            f"has a standard error of {50 / tail**0.5:.1f} points"
        )
    return lines


def extras(
    logits: Tensor, norms: Tensor, bias: Tensor, targets: Tensor, groups: Groups
) -> dict[str, Any]:
    """τ-norm and temperature of a trained trial, from its logits and its classifier.

    A linear classifier's τ-normalised logits are (logit - bias) / norm^τ (Kang et al. 2020), so
    the features themselves are not needed.

    Args:
        logits: Raw validation logits (N, C).
        norms: L2 norms of the classifier's rows (C,).
        bias: The classifier's bias (C,).
        targets: Validation targets (N,).
        groups: The class groups.
    """
    scaled = cross_fitted_tau_norm(logits - bias, norms, targets, folds=FOLDS, seed=0)
    temperature = fit_temperature(logits, targets)
    return {
        "tau_norm": {
            "tau": scaled.tau,
            "metrics": evaluate(scaled.adjusted_logits, targets, groups),
        },
        "temperature": temperature,
        "calibrated": calibration(logits / temperature, logits.argmax(1), targets),
    }


def adjusted_logits(logits: Tensor, class_counts: Tensor, tau: float) -> Tensor:
    """Logits adjusted with a τ that was fixed before, for the test part or for use."""
    return adjust_logits(logits, log_priors(class_counts).to(logits.dtype), tau)


def better(metric: str, a: float, b: float) -> bool:
    """Whether value ``a`` of a metric is better than ``b``; NaN is worse than anything."""
    if a != a or b != b:
        return b != b and a == a
    return a > b if METRICS[metric] == "maximize" else a < b
