"""Every reported number, from one confusion matrix or one table of probabilities.

Means over classes run over the classes that have evaluation images, and over no others: a
class without images has no recall, so it neither counts as 0 nor as 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.errors import DataError, NonFiniteError, UnknownNameError, unknown_name

if TYPE_CHECKING:
    from tuner.imbalance import Groups

Array = NDArray[np.float64]
Number = TypeVar("Number", np.float64, np.int64)
Direction = Literal["maximize", "minimize"]

METRICS: Final[Mapping[str, Direction]] = {
    "accuracy": "maximize",
    "balanced_accuracy": "maximize",
    "head_accuracy": "maximize",
    "medium_accuracy": "maximize",
    "tail_accuracy": "maximize",
    "worst_class": "maximize",
    "geometric_mean": "maximize",
    "macro_f1": "maximize",
    "nll": "minimize",
    "ece": "minimize",
    "classwise_ece": "minimize",
}
"""The metrics of ``evaluate`` by name, with the direction that is better."""

RECALL_METRICS: Final = tuple(METRICS)[:5]
"""The metrics that are a weighted mean of the recalls of the classes."""

CALIBRATION_BINS: Final = 15


def confusion_matrix(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Images by true class (rows) and predicted class (columns), (C, C) int64.

    Raises:
        ValueError: A class index lies outside 0 ... num_classes - 1.
    """
    for what, classes in (("prediction", predictions), ("target", targets)):
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"a {what} lies outside the classes 0 to {num_classes - 1}")
    cells = targets.long() * num_classes + predictions.long()
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def recall_per_class(confusion: Tensor) -> Tensor:
    """Share of each class's images that are predicted right, (C,) float64; NaN without images."""
    table = confusion.to(torch.float64)
    return table.diagonal() / table.sum(1)


def accuracy(confusion: Tensor) -> float:
    """Share of all images that are predicted right; NaN without images."""
    table = confusion.to(torch.float64)
    return float(table.trace() / table.sum())


def balanced_accuracy(confusion: Tensor) -> float:
    """Mean recall of the classes that have images; NaN without images."""
    return _mean(_present_recalls(confusion))


def group_accuracy(confusion: Tensor, classes: Sequence[int]) -> float | None:
    """Mean recall of those of ``classes`` that have images; None if none of them has any."""
    return _group_mean(recall_per_class(confusion).tolist(), classes)


def worst_class(confusion: Tensor) -> float:
    """Lowest recall of a class that has images; NaN without images."""
    return min(_present_recalls(confusion), default=math.nan)


def geometric_mean(confusion: Tensor) -> float:
    """Geometric mean of the recalls of the classes that have images; 0 if one of them is 0."""
    return _geometric_mean(_present_recalls(confusion))


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 of the classes that have images; NaN without images.

    That is ``f1_score(..., labels=classes_with_images, average="macro")`` of scikit-learn.
    Its default label set adds classes that are only predicted, each with an F1 of 0; here
    such a prediction costs the true class recall, and nothing twice.
    """
    table = confusion.to(torch.float64)
    true, predicted = table.sum(1), table.sum(0)
    f1 = 2 * table.diagonal() / (true + predicted)
    return float(f1[true > 0].mean())


def nll(logits: Tensor, targets: Tensor) -> float:
    """Mean negative log-likelihood of softmax(``logits``) (N, C), in nats.

    Logarithms of probabilities are logits too; probabilities are not.
    """
    return float(likelihoods(logits, targets)[1].mean())


def likelihoods(logits: Tensor, targets: Tensor) -> tuple[Array, Array]:
    """Probabilities (C, N) of ``logits`` (N, C), and each image's negative log-likelihood (N,).

    They lie in memory class after class: sums over few classes are several times as fast so.
    """
    table = by_class(logits).cpu().numpy()
    table -= table.max(0)
    own = _of_targets(table, targets.cpu().numpy())
    probabilities = np.exp(table, out=table)
    total = probabilities.sum(0)
    probabilities /= total
    return probabilities, np.log(total) - own


def by_class(logits: Tensor) -> Tensor:
    """A copy of ``logits`` (N, C) as a float64 table (C, N) that lies in memory by class."""
    table = logits.detach().T
    return table.to(torch.float64, memory_format=torch.contiguous_format, copy=True)


def ece(probabilities: Tensor, targets: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of the top label (Guo et al. 2017, equation 3), L1.

    The bins have equal width and contain their upper edge.
    """
    confidence, predictions = probabilities.max(1)
    return _ece(confidence.numpy(), (predictions == targets).numpy(), bins)


def classwise_ece(probabilities: Tensor, targets: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Calibration error of each class's probability over all images, averaged over classes.

    Kull et al. 2019, equation 2, with the mean over the classes that have images.
    """
    return _classwise_ece(probabilities.T.contiguous().numpy(), targets.numpy(), bins)


def confidence_bins(probabilities: Array, bins: int = CALIBRATION_BINS) -> NDArray[np.int64]:
    """Index of the calibration bin (lower, upper] of each probability, same shape."""
    found = np.ceil(probabilities * bins).astype(np.int64)
    found -= 1
    return np.minimum(np.maximum(found, 0, out=found), bins - 1, out=found)


def refuse_unusable(logits: Tensor) -> None:
    """Raise unless there are ``logits`` (N, C), or predictions (N,), and all are finite.

    Raises:
        DataError: There are no images.
        NonFiniteError: A logit is NaN or infinite.
    """
    if logits.shape[0] == 0:
        raise DataError("there are no images to evaluate; give the data set an evaluation part")
    if not bool(logits.isfinite().all()):
        broken = ~logits.isfinite().reshape(len(logits), -1).all(1)
        raise NonFiniteError(
            f"{int(broken.sum())} of {len(broken)} images have a logit that is NaN or infinite "
            f"(first: image {int(broken.nonzero()[0])}); the training diverged"
        )


def evaluate(logits: Tensor, targets: Tensor, groups: Groups) -> dict[str, float | None]:
    """Every metric of ``METRICS`` for ``logits`` (N, C) and ``targets`` (N,).

    Computed in float64 on the CPU, so that equal logits give equal numbers on every device.
    The accuracy of a group whose classes have no images is None.

    Raises:
        DataError: There are no images.
        NonFiniteError: A logit is NaN or infinite; no number would mean anything then.
    """
    logits, targets = logits.detach().cpu(), targets.cpu()
    refuse_unusable(logits)
    predictions = logits.argmax(1)
    confusion = confusion_matrix(predictions, targets, logits.shape[1])
    return {**_of_recalls(confusion, groups), **calibration(logits, predictions, targets)}


def calibration(logits: Tensor, predictions: Tensor, targets: Tensor) -> dict[str, float | None]:
    """The metrics of probabilities, from logits (N, C) and their largest (N,), on the CPU."""
    probabilities, losses = likelihoods(logits, targets)
    return {
        "nll": float(losses.mean()),
        "ece": _ece(probabilities.max(0), (predictions == targets).numpy()),
        "classwise_ece": _classwise_ece(probabilities, targets.numpy()),
    }


def _of_recalls(confusion: Tensor, groups: Groups) -> dict[str, float | None]:
    """The metrics of a confusion matrix."""
    recalls = recall_per_class(confusion).tolist()
    present = _present(recalls)
    return {
        "accuracy": accuracy(confusion),
        "balanced_accuracy": _mean(present),
        **{f"{name}_accuracy": _group_mean(recalls, c) for name, c in groups.named().items()},
        "worst_class": min(present),
        "geometric_mean": _geometric_mean(present),
        "macro_f1": macro_f1(confusion),
    }


def recall_weights(metric: str, images: Tensor, groups: Groups | None = None) -> Tensor:
    """Weights w of the classes such that the metric is Σ w_c·recall_c, (..., C) float64.

    ``images`` (..., C) are the evaluation images of each class. The weights add up to 1, or
    are all 0 where no class that counts has an image.

    Raises:
        UnknownNameError: ``metric`` is not one of ``RECALL_METRICS``.
        ValueError: The metric is of a group and there are no ``groups``.
    """
    if metric not in RECALL_METRICS:
        raise UnknownNameError(unknown_name("metric of recalls", metric, RECALL_METRICS))
    shares = images.to(torch.float64)
    if metric != "accuracy":
        shares = (shares > 0).to(torch.float64)
    if metric not in ("accuracy", "balanced_accuracy"):
        if groups is None:
            raise ValueError(f"{metric} needs the groups of the classes")
        members = torch.zeros_like(shares)
        members[..., list(groups.named()[metric.removesuffix("_accuracy")])] = 1
        shares = shares * members
    return shares / shares.sum(-1, keepdim=True).clamp(min=1)


def _present_recalls(confusion: Tensor) -> list[float]:
    return _present(recall_per_class(confusion).tolist())


def _present(recalls: Sequence[float]) -> list[float]:
    return [recall for recall in recalls if recall == recall]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _group_mean(recalls: Sequence[float], classes: Sequence[int]) -> float | None:
    present = _present([recalls[c] for c in classes])
    return _mean(present) if present else None


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values])) if all(values) else 0.0


def _ece(confidence: Array, hits: NDArray[np.bool_], bins: int = CALIBRATION_BINS) -> float:
    cells = confidence_bins(confidence, bins)
    gaps = np.bincount(cells, confidence, bins) - np.bincount(cells[hits], minlength=bins)
    return float(np.abs(gaps).sum() / len(hits))


def _classwise_ece(
    probabilities: Array, targets: NDArray[np.int64], bins: int = CALIBRATION_BINS
) -> float:
    """From probabilities (C, N)."""
    num_classes = len(probabilities)
    cells = confidence_bins(probabilities, bins)
    cells += bins * np.arange(num_classes)[:, None]
    size = bins * num_classes
    gaps = np.bincount(cells.ravel(), probabilities.ravel(), size)
    gaps -= np.bincount(_of_targets(cells, targets), minlength=size)
    present = np.bincount(targets, minlength=num_classes) > 0
    found = np.abs(gaps.reshape(num_classes, bins)[present]).sum()
    return float(found / (len(targets) * present.sum()))


def _of_targets(table: NDArray[Number], targets: NDArray[np.int64]) -> NDArray[Number]:
    """What a table (C, N) holds for the class of each image (N,)."""
    return table[targets, np.arange(len(targets))]
