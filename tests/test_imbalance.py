from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from tuner import imbalance
from tuner.errors import DataError
from tuner.imbalance import Groups, TailRule, WeightNormalization, class_entropy

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8")
)
CASES = {f"{case['set']}-{case['scheme']}": case for case in GOLDEN["class_weights"]}
NAMES = [f"class {c}" for c in range(200)]

counts_of_classes = st.lists(st.integers(0, 3000), min_size=2, max_size=30).filter(any)
normalizations = st.sampled_from(["samples", "classes"])


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights_of(scheme: str, counts: Tensor) -> Tensor:
    if match := re.fullmatch(r"effective_number_([\d.]+)_sumC", scheme):
        weights = imbalance.effective_number_weights(counts, float(match[1]))
        return imbalance.normalize_weights(weights, counts, "classes")
    power = 0.5 if "sqrt" in scheme or scheme.endswith("p0.5") else 1.0
    weights = imbalance.power_weights(counts, power)
    if scheme.startswith("csce"):
        return weights * math.pow(float(counts.min()), power)
    kinds: dict[str, WeightNormalization] = {"raw": "none", "sumC": "classes"}
    kinds |= {"balanced": "samples", "p1": "classes", "p0.5": "classes"}
    return imbalance.normalize_weights(weights, counts, kinds[scheme.rsplit("_", 1)[1]])


@pytest.mark.parametrize("name", CASES)
def test_class_weights_equal_those_of_the_published_code(name: str) -> None:
    case = CASES[name]
    counts = torch.tensor(GOLDEN["class_counts"][case["set"]])
    single_precision = "timm" in name
    torch.testing.assert_close(
        weights_of(case["scheme"], counts),
        tensor(case["weights"]),
        rtol=1e-6 if single_precision else 1e-10,
        atol=0,
    )


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "effective_number" in case])
def test_effective_numbers_equal_those_of_the_published_code(name: str) -> None:
    case = CASES[name]
    beta = float(case["scheme"].split("_")[2])
    counts = torch.tensor(GOLDEN["class_counts"][case["set"]])
    expected = tensor(case["effective_number"])
    torch.testing.assert_close(
        imbalance.effective_number(counts, beta), expected, rtol=1e-10, atol=0
    )


def test_effective_number_keeps_full_precision_for_beta_close_to_one() -> None:
    for case in GOLDEN["effective_number_numerics"]:
        beta = float(case["beta"])
        number = imbalance.effective_number(torch.tensor([case["n"]]), beta).item()
        # The double nearest to beta is off by up to 1.1e-16, which 1 / (1 - beta) magnifies.
        tolerance = 1e-15 + 1.2e-16 / (1 - beta)
        assert number == pytest.approx(float(case["effective_number"]), rel=tolerance)


def test_effective_number_runs_from_one_to_the_count() -> None:
    counts = torch.tensor([0, 1, 7, 500])
    assert imbalance.effective_number(counts, 0.0).tolist() == [0, 1, 1, 1]
    assert imbalance.effective_number(counts, 1.0).tolist() == [0, 1, 7, 500]
    torch.testing.assert_close(
        imbalance.effective_number(counts, 1 - 1e-12), counts.double(), rtol=1e-8, atol=0
    )


@settings(deadline=None)
@given(counts_of_classes, st.floats(0, 1))
def test_effective_number_lies_between_one_and_the_count(counts: list[int], beta: float) -> None:
    numbers = imbalance.effective_number(torch.tensor(counts), beta)
    for count, number in zip(counts, numbers.tolist(), strict=True):
        assert min(count, 1) * (1 - 1e-9) <= number <= count * (1 + 1e-9)


@settings(deadline=None)
@given(counts_of_classes, st.floats(0, 2), normalizations)
def test_normalized_weights_keep_their_promise(
    counts: list[int], power: float, normalization: WeightNormalization
) -> None:
    n = torch.tensor(counts)
    weights = imbalance.normalize_weights(imbalance.power_weights(n, power), n, normalization)
    present = n > 0
    if normalization == "samples":
        assert float((n * weights).sum()) == pytest.approx(float(n.sum()))
    else:
        assert float(weights.sum()) == pytest.approx(float(present.sum()))
    assert (weights[~present] == 0).all()
    assert (weights[present] > 0).all()
    ordered = weights[present][n[present].argsort()]
    assert (ordered.diff() <= 1e-9 * ordered[:-1]).all(), "a rarer class never weighs less"


@settings(deadline=None)
@given(counts_of_classes, st.floats(0, 0.99999), normalizations)
def test_classes_without_samples_change_no_other_weight(
    counts: list[int], beta: float, normalization: WeightNormalization
) -> None:
    def weights(values: list[int]) -> Tensor:
        n = torch.tensor(values)
        raw = imbalance.effective_number_weights(n, beta)
        return imbalance.normalize_weights(raw, n, normalization)

    torch.testing.assert_close(weights([*counts, 0]), torch.cat([weights(counts), tensor([0])]))


@settings(deadline=None)
@given(counts_of_classes)
def test_priors_are_the_shares_and_their_logarithms_stay_finite(counts: list[int]) -> None:
    n = torch.tensor(counts)
    priors, logarithms = imbalance.class_priors(n), imbalance.log_priors(n)
    assert float(priors.sum()) == pytest.approx(1)
    assert logarithms.isfinite().all()
    assert logarithms.dtype == priors.dtype == torch.float64
    if 0 not in counts:
        torch.testing.assert_close(logarithms.exp(), priors)
    else:
        assert int(logarithms.argmin()) == counts.index(0), "a class without samples is rarest"


@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [100, 10, 1], [0, 3, 7], [4]])
def test_class_entropy_is_the_loss_of_who_knows_the_priors_only(counts: list[int]) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    logits = torch.log(torch.tensor(counts, dtype=torch.float64)).expand(len(targets), -1)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert class_entropy(torch.tensor(counts)) == pytest.approx(float(expected), abs=1e-12)


def test_class_counts_equal_numpy() -> None:
    targets = torch.randint(7, (500,), generator=torch.Generator().manual_seed(0))
    counts = imbalance.class_counts(targets, 9)
    assert counts.tolist() == np.bincount(targets.numpy(), minlength=9).tolist()
    assert counts.dtype == torch.int64
    assert imbalance.class_counts(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("target", [-1, 3])
def test_class_counts_refuse_targets_outside_the_classes(target: int) -> None:
    with pytest.raises(DataError, match="only the classes 0 to 2"):
        imbalance.class_counts(torch.tensor([0, 1, target]), 3)


def test_imbalance_ratio_leaves_out_classes_without_samples() -> None:
    assert imbalance.imbalance_ratio(torch.tensor([500, 0, 5])) == 100
    assert imbalance.imbalance_ratio(torch.tensor([4, 4])) == 1
    with pytest.raises(DataError, match="no imbalance ratio"):
        imbalance.imbalance_ratio(torch.zeros(3))


def test_total_correction_adds_sampler_weight_and_adjustment() -> None:
    assert imbalance.total_correction(1.0, 0.5, 0.0) == 1.5


def every_class_once(groups: Groups, num_classes: int) -> bool:
    members = sorted(groups.head + groups.medium + groups.tail)
    return members == list(range(num_classes))


@pytest.mark.parametrize("profile", GOLDEN["longtail_counts"], ids=lambda p: p["name"])
def test_default_groups_have_the_sizes_of_the_literature(profile: dict[str, Any]) -> None:
    counts = torch.tensor(profile["counts"])
    assert int(counts.sum()) == profile["total"]
    if profile["few_lt20"] == 0:
        with pytest.raises(DataError, match=r"\(classes have .* before validation.*bottom"):
            TailRule().groups(counts, NAMES)
        return
    groups = TailRule().groups(counts, NAMES)
    sizes = [len(members) for members in groups.named().values()]
    assert sizes == [profile["many_gt100"], profile["medium_20_100"], profile["few_lt20"]]
    assert every_class_once(groups, len(counts))


def test_counts_of_exactly_100_and_20_are_medium() -> None:
    groups = TailRule().groups(torch.tensor([101, 100, 20, 19]), NAMES)
    assert groups == Groups((0,), (1, 2), (3,))


def test_thresholds_that_overlap_are_refused() -> None:
    with pytest.raises(ValidationError, match="both head and tail"):
        TailRule(many=10)
    assert TailRule(many=19).groups(torch.tensor([5, 19, 20]), NAMES) == Groups((2,), (), (0, 1))


def test_max_count_splits_into_head_and_tail() -> None:
    groups = TailRule(max_count=50).groups(torch.tensor([500, 50, 51, 0]), NAMES)
    assert groups == Groups((0, 2), (), (1, 3))


def test_bottom_takes_the_smallest_classes_and_as_many_at_the_top() -> None:
    counts = torch.tensor([9, 1, 5, 5, 7, 2, 8, 3, 6, 4])
    assert TailRule(bottom=0.3).groups(counts, NAMES) == Groups((0, 4, 6), (2, 3, 8, 9), (1, 5, 7))


@settings(deadline=None)
@given(counts_of_classes, st.floats(0.01, 0.5))
def test_bottom_groups_are_equal_in_size_and_ordered_by_count(
    counts: list[int], bottom: float
) -> None:
    groups = TailRule(bottom=bottom).groups(torch.tensor(counts), NAMES)
    assert every_class_once(groups, len(counts))
    assert len(groups.head) == len(groups.tail) >= 1
    assert max(counts[c] for c in groups.tail) <= min(counts[c] for c in groups.head)


@settings(deadline=None)
@given(counts_of_classes, st.integers(1, 200), st.integers(1, 200))
def test_threshold_groups_hold_every_class_once(counts: list[int], a: int, b: int) -> None:
    rule = TailRule(many=max(a, b), few=min(a, b))
    if min(counts) < min(a, b):
        assert every_class_once(rule.groups(torch.tensor(counts), NAMES), len(counts))


def test_tail_may_be_listed_by_name_or_index() -> None:
    counts = torch.tensor([5, 5, 5])
    rule = TailRule(classes=("fox", 0))
    assert rule.groups(counts, ["owl", "lynx", "fox"]) == Groups((1,), (), (0, 2))
    for stranger in ("fxo", 3, -1):
        with pytest.raises(DataError, match=f"{stranger!r}; known: owl, lynx, fox"):
            TailRule(classes=(stranger,)).groups(counts, ["owl", "lynx", "fox"])


def test_two_ways_to_name_the_tail_are_refused() -> None:
    with pytest.raises(ValidationError, match="not several"):
        TailRule(max_count=5, bottom=0.3)
    with pytest.raises(ValidationError):
        TailRule(bottom=0.6)
