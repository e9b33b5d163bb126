from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuner import imbalance, metrics, posthoc, strengths
from tuner.errors import UnknownNameError
from tuner.imbalance import Groups

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8")
)
seeds = st.integers(0, 2**31)
torch.set_num_threads(1)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def long_tailed(
    per_class: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a model that learned the training priors, targets and log priors."""
    generator = torch.Generator().manual_seed(seed)
    log_priors = torch.linspace(0, -4, classes, dtype=dtype).log_softmax(0)
    targets = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(targets), classes, generator=generator, dtype=dtype)
    logits = 2 * (noise + 2 * torch.nn.functional.one_hot(targets, classes)) + log_priors
    return logits, targets, log_priors


def balanced_accuracy(logits: Tensor, targets: Tensor) -> float:
    confusion = metrics.confusion_matrix(logits.argmax(1), targets, logits.shape[1])
    return metrics.balanced_accuracy(confusion)


def test_adjusted_predictions_equal_the_published_code() -> None:
    golden = GOLDEN["posthoc_logit_adjustment"]
    logits, counts = tensor(golden["logits"]), tensor(golden["class_counts"])
    log_priors = imbalance.log_priors(counts)
    for result in golden["results"]:
        adjusted = posthoc.adjust_logits(logits, log_priors, result["tau"])
        assert adjusted.argmax(1).tolist() == result["adjusted_argmax"]
        shifted = logits + posthoc.class_thresholds(log_priors, result["tau"])
        assert shifted.argmax(1).tolist() == result["adjusted_argmax"]


def test_tau_zero_changes_nothing_and_dtype_stays() -> None:
    logits, _, log_priors = long_tailed(3, 4, dtype=torch.float32)
    assert torch.equal(posthoc.adjust_logits(logits, log_priors.double(), 0.0), logits)
    assert posthoc.adjust_logits(logits, log_priors.double(), 1.5).dtype == torch.float32


def test_thresholds_favour_the_rare_and_have_mean_zero() -> None:
    thresholds = posthoc.class_thresholds(tensor([0.7, 0.2, 0.1]).log(), 1.0)
    assert (thresholds.diff() > 0).all()
    assert float(thresholds.sum()) == pytest.approx(0, abs=1e-12)


def test_a_constant_in_the_log_priors_changes_nothing() -> None:
    logits, targets, log_priors = long_tailed(8, 6)
    fitted = posthoc.cross_fitted(logits, targets, log_priors, seed=3)
    moved = posthoc.cross_fitted(logits, targets, log_priors + 7, seed=3)
    assert moved.tau == fitted.tau
    assert torch.equal(moved.adjusted_logits.argmax(1), fitted.adjusted_logits.argmax(1))
    torch.testing.assert_close(
        posthoc.class_thresholds(log_priors + 7, 1.3), posthoc.class_thresholds(log_priors, 1.3)
    )


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(2, 7), st.sampled_from(["normal", "collapsed", "integers"]))
def test_correct_at_every_tau_equals_argmax(seed: int, classes: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(30, classes, generator=generator, dtype=torch.float64)
    if kind != "normal":
        logits = logits.round() if kind == "integers" else torch.zeros_like(logits)
    counts = torch.randint(1, 5, (classes,), generator=generator)
    log_priors = imbalance.log_priors(counts)
    targets = torch.randint(classes, (30,), generator=generator)
    each = strengths.Cells(targets, torch.arange(30), classes)
    hits = strengths.hits_by_tau(logits, each, log_priors, posthoc.TAU_GRID)
    correct = hits[each.of_image].bool()
    for column, tau in enumerate(posthoc.TAU_GRID.tolist()):
        predictions = posthoc.adjust_logits(logits, log_priors, tau).argmax(1)
        assert torch.equal(correct[:, column], predictions == targets), tau


@pytest.mark.parametrize("metric", metrics.RECALL_METRICS)
def test_fitted_tau_is_as_good_as_the_best_of_the_grid(metric: str) -> None:
    groups = Groups((0, 1), (2, 3), (4, 5))
    for seed in range(3):
        logits, targets, log_priors = long_tailed(7, 6, seed)

        def score(
            tau: float, logits: Tensor = logits, targets: Tensor = targets, p: Tensor = log_priors
        ) -> float:
            found = metrics.evaluate(posthoc.adjust_logits(logits, p, tau), targets, groups)
            value = found[metric]
            assert value is not None
            return value

        tau = posthoc.fit_tau(logits, targets, log_priors, groups=groups, metric=metric)
        best = max(score(candidate) for candidate in posthoc.TAU_GRID.tolist())
        assert score(tau) == pytest.approx(best)


def test_of_equally_good_tau_zero_wins_then_the_middle_of_the_widest_run() -> None:
    grid = [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert strengths._best([0.5] * 7, grid) == 0.0
    assert strengths._best([0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.9], grid) == 2.0
    assert strengths._best([0.9, 0.1, 0.2, 0.9, 0.2, 0.1, 0.2], grid) == -1.0
    assert strengths._best([0.1, 0.2, 0.9, 0.9, 0.2, 0.1, 0.2], grid) == 1.0


def test_equal_priors_need_no_adjustment() -> None:
    logits, targets, _ = long_tailed(5, 4)
    assert posthoc.fit_tau(logits, targets, torch.zeros(4).log_softmax(0)) == 0.0


def test_tau_recovers_the_priors_a_model_has_learned() -> None:
    logits, targets, log_priors = long_tailed(300, 5)
    assert posthoc.fit_tau(logits, targets, log_priors) == pytest.approx(1.0, abs=0.2)
    residual = logits - 0.6 * log_priors
    assert posthoc.fit_tau(residual, targets, log_priors) == pytest.approx(0.4, abs=0.2)


def test_cross_fitting_helps_on_images_it_did_not_see() -> None:
    gains, flattery = [], []
    for seed in range(20):
        logits, targets, log_priors = long_tailed(8, 10, seed)
        fitted = posthoc.cross_fitted(logits, targets, log_priors, seed=seed)
        honest = balanced_accuracy(fitted.adjusted_logits, targets)
        gains.append(honest - balanced_accuracy(logits, targets))
        flattered = posthoc.adjust_logits(logits, log_priors, fitted.tau)
        flattery.append(balanced_accuracy(flattered, targets) - honest)
    assert sum(gains) / len(gains) > 0.05
    assert sum(flattery) / len(flattery) > 0.005


def test_every_fold_is_adjusted_with_the_tau_of_the_other_folds() -> None:
    logits, targets, log_priors = long_tailed(6, 5)
    fitted = posthoc.cross_fitted(logits, targets, log_priors, folds=3, seed=9)
    fold = strengths.stratified_folds(targets, 3, 9)
    assert fitted.tau == posthoc.fit_tau(logits, targets, log_priors)
    for k in range(3):
        rest, here = fold != k, fold == k
        tau = posthoc.fit_tau(logits[rest], targets[rest], log_priors)
        expected = posthoc.adjust_logits(logits[here], log_priors, tau)
        torch.testing.assert_close(fitted.adjusted_logits[here], expected, rtol=0, atol=0)


def test_an_image_never_decides_its_own_tau() -> None:
    logits, targets, log_priors = long_tailed(4, 5)
    fold = strengths.stratified_folds(targets, 5, 0)
    before = posthoc.cross_fitted(logits, targets, log_priors, seed=0).adjusted_logits
    spoiled = logits.clone()
    spoiled[fold == 2] = spoiled[fold == 2].flip(1)
    after = posthoc.cross_fitted(spoiled, targets, log_priors, seed=0).adjusted_logits
    torch.testing.assert_close(
        after[fold == 2] - spoiled[fold == 2], before[fold == 2] - logits[fold == 2]
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(2, 7), seeds)
def test_folds_are_stratified_even_and_reproducible(
    targets: list[int], folds: int, seed: int
) -> None:
    fold = strengths.stratified_folds(torch.tensor(targets), folds, seed)
    assert torch.equal(fold, strengths.stratified_folds(torch.tensor(targets), folds, seed))
    sizes = torch.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for c in set(targets):
        shares = torch.bincount(fold[torch.tensor(targets) == c], minlength=folds)
        assert shares.max() - shares.min() <= 1
    with pytest.raises(ValueError, match="at least 2 folds"):
        strengths.stratified_folds(torch.tensor(targets), 1, seed)


def test_classes_with_one_image_or_none_are_survived() -> None:
    logits, _, log_priors = long_tailed(1, 6)
    fitted = posthoc.cross_fitted(logits[:2], torch.tensor([0, 4]), log_priors, seed=0)
    assert fitted.adjusted_logits.isfinite().all()
    fitted = posthoc.cross_fitted(logits[:1], torch.tensor([5]), log_priors, seed=0)
    assert torch.equal(fitted.adjusted_logits, logits[:1])


def test_broken_logits_stay_visible_after_adjustment() -> None:
    logits, targets, log_priors = long_tailed(3, 4)
    logits[5] = math.nan
    adjusted = posthoc.cross_fitted(logits, targets, log_priors, seed=0).adjusted_logits
    assert adjusted[5].isnan().all()


def test_unknown_metrics_are_named() -> None:
    logits, targets, log_priors = long_tailed(3, 4)
    with pytest.raises(UnknownNameError, match="'ece'"):
        posthoc.fit_tau(logits, targets, log_priors, metric="ece")


def test_cross_fitting_is_fast_enough_for_every_epoch() -> None:
    logits, targets, log_priors = long_tailed(10, 200, dtype=torch.float32)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        posthoc.cross_fitted(logits, targets, log_priors, seed=0)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_tau_norm_equals_the_published_code() -> None:
    golden = GOLDEN["tau_norm"]
    weight = tensor(golden["weight"])
    for result in golden["results"]:
        torch.testing.assert_close(
            posthoc.tau_norm(weight, result["tau"]), tensor(result["weight"]), rtol=1e-12, atol=0
        )


def test_tau_norm_leaves_a_row_of_zeros_alone() -> None:
    weight = tensor([[3.0, 4.0], [0.0, 0.0]])
    expected = tensor([[0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(posthoc.tau_norm(weight, 1.0), expected)


def long_normed() -> tuple[Tensor, Tensor, Tensor]:
    """Features, a classifier whose head rows are too long, and targets."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    targets = torch.arange(8).repeat_interleave(12)
    features = directions[targets] + 0.25 * torch.randn(96, 16, generator=generator)
    return features, directions * torch.logspace(1, -0.5, 8)[:, None], targets


def test_fitted_tau_norm_is_the_best_of_the_grid_and_helps() -> None:
    features, weight, targets = long_normed()
    tau = posthoc.fit_tau_norm(features, weight, targets)
    scores = [
        balanced_accuracy(posthoc.tau_norm_logits(features, weight, t), targets)
        for t in posthoc.TAU_NORM_GRID.tolist()
    ]
    found = balanced_accuracy(posthoc.tau_norm_logits(features, weight, tau), targets)
    assert found == pytest.approx(max(scores))
    assert found > scores[0] + 0.2


def test_cross_fitted_tau_norm_needs_only_logits_and_norms() -> None:
    features, weight, targets = long_normed()
    logits, norms = features @ weight.T, weight.norm(dim=1)
    fitted = posthoc.cross_fitted_tau_norm(logits, norms, targets, seed=1)
    assert fitted.tau == posthoc.fit_tau_norm(features, weight, targets)
    fold = strengths.stratified_folds(targets, 5, 1)
    for k in range(5):
        rest, here = fold != k, fold == k
        tau = posthoc.fit_tau_norm(features[rest], weight, targets[rest])
        expected = posthoc.tau_norm_logits(features[here], weight, tau)
        torch.testing.assert_close(fitted.adjusted_logits[here], expected)


def test_temperature_equals_scipy_and_calibrates() -> None:
    golden = GOLDEN["temperature_scaling"]
    logits, targets = tensor(golden["logits"]), torch.tensor(golden["targets"])
    temperature = posthoc.fit_temperature(logits, targets)
    scaled = posthoc.apply_temperature(logits, temperature)
    assert temperature == pytest.approx(golden["T_opt"], rel=1e-4)
    assert metrics.nll(logits, targets) == pytest.approx(golden["nll_T1"])
    assert metrics.nll(scaled, targets) == pytest.approx(golden["nll_Topt"])
    assert metrics.ece(logits.softmax(1), targets) == pytest.approx(golden["ece_T1"], abs=1e-6)
    assert metrics.ece(scaled.softmax(1), targets) == pytest.approx(golden["ece_Topt"], abs=1e-5)
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 30.0, 300.0])
def test_no_other_temperature_has_a_lower_nll(scale: float) -> None:
    logits, targets, _ = long_tailed(20, 5)
    logits = scale * logits
    temperature = posthoc.fit_temperature(logits, targets, bounds=(1e-4, 1e4))
    best = metrics.nll(logits / temperature, targets)
    for factor in (0.5, 0.98, 1.02, 2.0):
        assert metrics.nll(logits / (temperature * factor), targets) > best


def test_temperature_stays_within_its_bounds() -> None:
    targets = torch.arange(4)
    right = torch.eye(4, dtype=torch.float64)
    assert posthoc.fit_temperature(right * 1e-3, targets) == 0.01
    assert posthoc.fit_temperature(-right, targets) == 100.0
    assert posthoc.fit_temperature(torch.zeros(4, 4), targets) == 1.0
    assert 0.01 <= posthoc.fit_temperature(1000 * right, targets) <= 100
