from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imblearn.metrics import geometric_mean_score
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from tuner import metrics
from tuner.errors import DataError, NonFiniteError, UnknownNameError
from tuner.imbalance import Groups, TailRule

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8")
)["metrics"]
GROUPS = Groups((0, 1), (2,), (3, 4))


def confusion_of(case: dict[str, Any]) -> Tensor:
    predictions, targets = torch.tensor(case["preds"]), torch.tensor(case["targets"])
    return metrics.confusion_matrix(predictions, targets, len(case["train_counts"]))


def drawn(images: int, classes: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (images,), generator=generator)
    logits[torch.arange(images), targets] += 2
    return logits, targets


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_published_numbers_are_reproduced(case: dict[str, Any]) -> None:
    confusion = confusion_of(case)
    recalls = metrics.recall_per_class(confusion)
    only_predicted = (confusion.sum(1) == 0) & (confusion.sum(0) > 0)
    assert confusion.tolist() == case["confusion"]
    assert [None if math.isnan(r) else r for r in recalls.tolist()] == pytest.approx(
        case["per_class_recall"]
    )
    assert metrics.accuracy(confusion) == pytest.approx(case["top1"])
    assert metrics.balanced_accuracy(confusion) == pytest.approx(case["sklearn_balanced_accuracy"])
    assert metrics.worst_class(confusion) == pytest.approx(case["worst_present_class"])
    if not only_predicted.any():  # sklearn and imblearn score such a class 0, we leave it out
        assert metrics.macro_f1(confusion) == pytest.approx(case["sklearn_macro_f1"])
        assert metrics.geometric_mean(confusion) == pytest.approx(case["imblearn_gmean"])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_groups_score_as_in_the_literature_but_none_when_empty(case: dict[str, Any]) -> None:
    confusion, counts = confusion_of(case), case["train_counts"]
    members = {
        "many": [c for c, n in enumerate(counts) if n > 100],
        "medium": [c for c, n in enumerate(counts) if 20 <= n <= 100],
        "few": [c for c, n in enumerate(counts) if n < 20],
    }
    for name, classes in members.items():
        if confusion.sum(1)[classes].sum() == 0:
            assert metrics.group_accuracy(confusion, classes) is None
        else:
            expected = case["facebook_shot_acc"][name]
            assert metrics.group_accuracy(confusion, classes) == pytest.approx(expected)


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_confusion_metrics_equal_sklearn_and_imblearn(images: list[tuple[int, int]]) -> None:
    true, predicted = (list(column) for column in zip(*images, strict=True))
    confusion = metrics.confusion_matrix(torch.tensor(predicted), torch.tensor(true), 6)
    present = sorted(set(true))
    options: dict[str, Any] = {"labels": present, "average": "macro", "zero_division": 0}
    recall = sklearn_metrics.recall_score(true, predicted, **options)
    assert (
        confusion.tolist()
        == sklearn_metrics.confusion_matrix(true, predicted, labels=range(6)).tolist()
    )
    assert metrics.balanced_accuracy(confusion) == pytest.approx(recall)
    assert metrics.accuracy(confusion) == pytest.approx(
        sklearn_metrics.accuracy_score(true, predicted)
    )
    assert metrics.macro_f1(confusion) == pytest.approx(
        sklearn_metrics.f1_score(true, predicted, **options)
    )
    if len(present) > 1:
        assert metrics.geometric_mean(confusion) == pytest.approx(
            geometric_mean_score(true, predicted, labels=present, average="multiclass")
        )


def test_balanced_accuracy_equals_sklearn_with_absent_and_zero_recall_classes() -> None:
    true, predicted = torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 2, 0, 0, 3])
    confusion = metrics.confusion_matrix(predicted, true, 5)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = sklearn_metrics.balanced_accuracy_score(true, predicted)
    assert metrics.balanced_accuracy(confusion) == pytest.approx(expected)
    assert metrics.geometric_mean(confusion) == metrics.worst_class(confusion) == 0
    assert metrics.recall_per_class(confusion).isnan().tolist() == [False, False, True, False, True]


def test_without_images_there_is_no_number() -> None:
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for metric in (
        metrics.accuracy,
        metrics.balanced_accuracy,
        metrics.worst_class,
        metrics.geometric_mean,
        metrics.macro_f1,
    ):
        assert math.isnan(metric(confusion))
    assert metrics.group_accuracy(confusion, (0, 1)) is None
    assert metrics.group_accuracy(torch.eye(3), ()) is None


@pytest.mark.parametrize(("prediction", "target"), [(3, 0), (0, 3), (-1, 0), (0, -1)])
def test_confusion_matrix_refuses_classes_that_do_not_exist(prediction: int, target: int) -> None:
    with pytest.raises(ValueError, match="outside the classes 0 to 2"):
        metrics.confusion_matrix(torch.tensor([prediction]), torch.tensor([target]), 3)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_ece_equals_torchmetrics(scale: float) -> None:
    logits, targets = drawn(500, 10, scale=scale)
    probabilities = logits.softmax(1)
    expected = multiclass_calibration_error(probabilities, targets, num_classes=10, n_bins=15)
    assert metrics.ece(probabilities, targets) == pytest.approx(float(expected), abs=1e-6)


def test_classwise_ece_is_the_mean_of_torchmetrics_over_classes_with_images() -> None:
    logits, targets = drawn(400, 7)
    targets[targets == 6] = 0
    probabilities = logits.softmax(1)
    columns = probabilities.T.contiguous()[:6]
    expected = [
        float(binary_calibration_error(column, (targets == c).long(), n_bins=15))
        for c, column in enumerate(columns)
    ]
    assert metrics.classwise_ece(probabilities, targets) == pytest.approx(
        sum(expected) / 6, abs=1e-6
    )


def test_certainty_falls_into_the_last_bin_and_bins_contain_their_upper_edge() -> None:
    edges = np.array([0.0, 0.05, 0.1, 0.100001, 0.9, 0.95, 1.0])
    assert metrics.confidence_bins(edges, bins=10).tolist() == [0, 0, 0, 1, 8, 9, 9]
    certain = torch.eye(3)[[0, 1, 2, 0]]
    assert metrics.ece(certain, torch.tensor([0, 1, 2, 1])) == pytest.approx(0.25)


def test_nll_equals_sklearn_and_survives_saturated_logits() -> None:
    logits, targets = drawn(200, 4)
    expected = sklearn_metrics.log_loss(targets, logits.softmax(1), labels=range(4))
    assert metrics.nll(logits, targets) == pytest.approx(expected)
    assert metrics.nll(torch.tensor([[1e4, 0.0]]), torch.tensor([1])) == 1e4


def test_evaluate_gives_every_named_metric() -> None:
    logits, targets = drawn(300, 5)
    confusion = metrics.confusion_matrix(logits.argmax(1), targets, 5)
    found = metrics.evaluate(logits.float(), targets, GROUPS)
    assert list(found) == list(metrics.METRICS)
    assert all(isinstance(value, float) for value in found.values())
    assert found["accuracy"] == metrics.accuracy(confusion)
    assert found["head_accuracy"] == metrics.group_accuracy(confusion, GROUPS.head)
    assert found["medium_accuracy"] == metrics.group_accuracy(confusion, GROUPS.medium)
    assert found["tail_accuracy"] == metrics.group_accuracy(confusion, GROUPS.tail)
    assert found["ece"] == pytest.approx(metrics.ece(logits.softmax(1), targets), abs=1e-6)


def test_evaluate_gives_none_for_a_group_without_images() -> None:
    logits, targets = drawn(50, 5)
    found = metrics.evaluate(logits, targets.clamp(max=2), GROUPS)
    assert found["tail_accuracy"] is None
    assert found["balanced_accuracy"] is not None


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_better_model_is_better_in_the_direction_of_the_metric(name: str) -> None:
    _, targets = drawn(400, 5)
    table = torch.nn.functional.one_hot(targets, 5).double()
    noise = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
    good = metrics.evaluate(8 * table + noise, targets, GROUPS)[name]
    bad = metrics.evaluate(table + 6 * noise, targets, GROUPS)[name]
    assert good is not None
    assert bad is not None
    assert good > bad if metrics.METRICS[name] == "maximize" else good < bad


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_evaluate_refuses_logits_that_are_not_finite(value: float) -> None:
    logits, targets = drawn(20, 5)
    logits[7, 2] = value
    with pytest.raises(NonFiniteError, match="1 of 20 images .*first: image 7"):
        metrics.evaluate(logits, targets, GROUPS)


def test_evaluate_refuses_an_empty_evaluation_part() -> None:
    with pytest.raises(DataError, match="no images"):
        metrics.evaluate(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), GROUPS)


@pytest.mark.parametrize("metric", metrics.RECALL_METRICS)
def test_recall_weights_reproduce_every_metric_of_recalls(metric: str) -> None:
    logits, targets = drawn(80, 5)
    targets[targets == 3] = 0
    confusion = metrics.confusion_matrix(logits.argmax(1), targets, 5)
    recalls = metrics.recall_per_class(confusion).nan_to_num(0)
    weights = metrics.recall_weights(metric, confusion.sum(1), GROUPS)
    expected = metrics.evaluate(logits, targets, GROUPS)[metric]
    assert float(weights @ recalls) == pytest.approx(expected)
    assert float(weights.sum()) == pytest.approx(1)


def test_recall_weights_are_zero_without_images_and_name_unknown_metrics() -> None:
    images = torch.tensor([4, 4, 4, 0, 0])
    assert metrics.recall_weights("tail_accuracy", images, GROUPS).tolist() == [0] * 5
    with pytest.raises(UnknownNameError, match="did you mean 'tail_accuracy'"):
        metrics.recall_weights("tail_acuracy", images, GROUPS)
    with pytest.raises(ValueError, match="needs the groups"):
        metrics.recall_weights("tail_accuracy", images)


def test_groups_of_a_tail_rule_fit_evaluate() -> None:
    groups = TailRule(bottom=0.4).groups(torch.tensor([90, 50, 30, 9, 5]), list("abcde"))
    logits, targets = drawn(60, 5)
    found = metrics.evaluate(logits, targets, groups)
    tail = sum(float((logits.argmax(1)[targets == c] == c).double().mean()) for c in (3, 4)) / 2
    assert found["tail_accuracy"] == pytest.approx(tail)
