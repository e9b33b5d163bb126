from __future__ import annotations

import itertools
import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from tuner import losses
from tuner.errors import DataError
from tuner.losses import LOSSES, Loss, LossComponent
from tuner.losses._numerics import log_complement, sum_of_others
from tuner.losses._weights import ClassCounts, fitted_exponent

torch.set_num_threads(1)

COUNTS = torch.tensor([2000, 300, 40, 10, 5])
NUM_CLASSES = len(COUNTS)
NEUTRAL: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "weighted_cross_entropy": {"power": 0.0},
    "class_balanced": {"beta": 0.0},
    "focal": {"gamma": 0.0},
    "asymmetric": {"gamma_pos": 0.0, "eps": 0.0},
    "weighted_asymmetric": {"gamma_pos": 0.0, "eps": 0.0, "power": 0.0},
    "fnr_adaptive": {"floor": 1.0},
    "label_smoothing": {"eps": 0.0},
    "label_aware_smoothing": {"smooth_head": 0.0, "smooth_tail": 0.0},
    "balanced_softmax": {"start": 0.5},
    "logit_adjusted": {"tau": 0.0},
    "vector_scaling": {"gamma": 0.0, "tau": 0.0},
    "ldam": {"max_margin": 0.0, "scale": 1.0},
    "equalization": {"gamma": 0.0},
}
COMPONENTS: dict[str, LossComponent] = {
    **{name: LOSSES[name]() for name in LOSSES},
    "class_balanced sigmoid": losses.ClassBalanced(base="sigmoid"),
    "class_balanced focal": losses.ClassBalanced(base="focal", gamma=0.5),
    "focal 0.5": losses.Focal(gamma=0.5),
    "asymmetric 0.5": losses.Asymmetric(gamma_pos=0.5, gamma_neg=0.5, eps=0.1),
    "fnr_adaptive reference": losses.FnrAdaptive(mode="reference"),
    "ldam drw": losses.Ldam(beta=0.9999, start=0.8),
    "equalization all": losses.Equalization(gamma=1.0, threshold=0.02),
}
every_component = pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS.keys())


def batch(size: int = 12, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Random float64 logits and targets in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, NUM_CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.arange(size) % NUM_CLASSES


def with_gradient(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    per_sample = loss.per_sample(logits, targets)
    (gradient,) = torch.autograd.grad(per_sample.sum(), logits)
    return per_sample.detach(), gradient


def cross_entropy(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(logits, targets, reduction="none", **options)


# What every registered loss promises


def test_every_named_loss_is_registered_and_has_neutral_settings() -> None:
    assert set(LOSSES) == set(NEUTRAL)


@every_component
def test_loss_falls_when_the_true_logit_rises(component: LossComponent) -> None:
    logits, targets = batch(scale=1.0)
    logits[torch.arange(len(targets)), targets] -= 2
    _, gradient = with_gradient(component.build(COUNTS), logits, targets)
    assert (gradient[torch.arange(len(targets)), targets] < 0).all()


@every_component
def test_gradient_agrees_with_finite_differences(component: LossComponent) -> None:
    logits, targets = batch(5)
    loss = component.build(COUNTS)
    assert torch.autograd.gradcheck(lambda z: loss.per_sample(z, targets), logits.requires_grad_())


@every_component
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_finite_at_saturated_logits(
    component: LossComponent, dtype: torch.dtype
) -> None:
    rows = [
        *(1e4 * torch.eye(NUM_CLASSES)),
        *(-1e4 * torch.eye(NUM_CLASSES)),
        *(1e4 - 2e4 * torch.eye(NUM_CLASSES)),
        torch.full((NUM_CLASSES,), 1e4),
        torch.full((NUM_CLASSES,), -1e4),
        torch.zeros(NUM_CLASSES),
    ]
    pairs = list(itertools.product(rows, range(NUM_CLASSES)))
    logits = torch.stack([row for row, _ in pairs]).to(dtype)
    targets = torch.tensor([target for _, target in pairs])
    values, gradient = with_gradient(component.build(COUNTS), logits, targets)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert (values >= 0).all()


@every_component
def test_loss_does_not_depend_on_the_order_of_the_batch(component: LossComponent) -> None:
    logits, targets = batch()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    loss = component.build(COUNTS).eval()
    torch.testing.assert_close(
        loss.per_sample(logits, targets)[order],
        loss.per_sample(logits[order], targets[order]),
    )


@every_component
def test_soft_one_hot_targets_equal_hard_ones(component: LossComponent) -> None:
    logits, targets = batch()
    loss = component.build(COUNTS)
    soft = nn.functional.one_hot(targets, NUM_CLASSES)
    hard_result = with_gradient(loss, logits, targets)
    torch.testing.assert_close(with_gradient(loss, logits, soft.float()), hard_result)
    torch.testing.assert_close(with_gradient(loss, logits, soft), hard_result)


@every_component
def test_mixed_targets_mix_the_losses(component: LossComponent) -> None:
    logits, first = batch()
    second, share = first.roll(1), 0.3
    loss = component.build(COUNTS)
    soft_first, soft_second = loss.as_soft(first, logits), loss.as_soft(second, logits)
    torch.testing.assert_close(
        loss.per_sample(logits, share * soft_first + (1 - share) * soft_second),
        share * loss.per_sample(logits, first) + (1 - share) * loss.per_sample(logits, second),
    )


@every_component
def test_half_precision_logits_are_computed_in_float32(component: LossComponent) -> None:
    logits, targets = batch()
    loss = component.build(COUNTS)
    for dtype, computed in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ]:
        value = loss(logits.to(dtype), targets)
        assert value.dtype == computed
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert with_gradient(loss, logits.to(dtype), targets)[1].dtype == dtype


@every_component
def test_half_precision_models_do_not_spoil_the_class_statistics(
    component: LossComponent,
) -> None:
    counts = 1000 * COUNTS
    logits, targets = batch()
    expected = component.build(counts).per_sample(logits, targets)
    halved = component.build(counts).half()
    torch.testing.assert_close(halved.per_sample(logits, targets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_cross_entropy(name: str) -> None:
    logits, targets = batch()
    loss = LOSSES[name](**NEUTRAL[name]).build(COUNTS)
    expected = cross_entropy(logits, targets)
    torch.testing.assert_close(loss.per_sample(logits, targets), expected)


@every_component
def test_class_without_samples_is_named_and_never_nan(component: LossComponent) -> None:
    counts = torch.tensor([2000, 300, 0, 10, 0])
    with pytest.warns(UserWarning, match=r"\[2, 4\]"):
        loss = component.build(counts)
    logits, _ = batch(6)
    targets = torch.tensor([0, 1, 3, 0, 1, 3])
    values, gradient = with_gradient(loss, logits, targets)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert (values > 0).all()
    with pytest.raises(DataError, match=r"\[4\]"):
        loss(logits, torch.tensor([0, 1, 3, 0, 1, 4]))


@every_component
def test_no_warning_where_every_class_has_samples(component: LossComponent) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        component.build(COUNTS)


@every_component
def test_loss_reads_no_value_back_from_the_device(component: LossComponent) -> None:
    loss = component.build(COUNTS).to("meta")
    logits = torch.zeros(6, NUM_CLASSES, device="meta", requires_grad=True)
    for shape, dtype in (((6,), torch.int64), ((6, NUM_CLASSES), torch.float32)):
        # A tensor without data raises as soon as Python asks for a value.
        loss(logits, torch.zeros(shape, dtype=dtype, device="meta")).backward()
    assert logits.grad is not None


@every_component
def test_state_dict_carries_the_training_on(component: LossComponent) -> None:
    trained, resumed = component.build(COUNTS), component.build(COUNTS)
    for seed in range(3):
        trained(*batch(seed=seed))
    resumed.load_state_dict(trained.state_dict())
    for seed in range(3, 6):
        expected = trained(*batch(seed=seed))
        torch.testing.assert_close(resumed(*batch(seed=seed)), expected, rtol=0, atol=0)


@every_component
def test_default_weights_have_mean_one_over_the_training_samples(
    component: LossComponent,
) -> None:
    weights = component.build(COUNTS).class_weights
    if weights is not None:
        assert float((weights * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1)


DEFERRED = {
    "weighted_cross_entropy": losses.CrossEntropy(),
    "class_balanced": losses.CrossEntropy(),
    "class_balanced sigmoid": losses.ClassBalanced(base="sigmoid", beta=0.0),
    "class_balanced focal": losses.ClassBalanced(base="focal", gamma=0.5, beta=0.0),
    "weighted_asymmetric": losses.Asymmetric(),
    "fnr_adaptive": losses.CrossEntropy(),
    "fnr_adaptive reference": losses.CrossEntropy(),
    "balanced_softmax": losses.CrossEntropy(),
    "logit_adjusted": losses.CrossEntropy(),
    "vector_scaling": losses.CrossEntropy(),
    "ldam drw": losses.Ldam(),
    "equalization all": losses.CrossEntropy(),
}


@pytest.mark.parametrize("name", DEFERRED)
def test_deferred_loss_weighs_and_adjusts_from_its_start_only(name: str) -> None:
    component: Any = COMPONENTS[name]
    deferred = replace(component, start=0.8).build(COUNTS)
    at_once = replace(component, start=0.0).build(COUNTS)
    before = DEFERRED[name].build(COUNTS)
    data = batch()
    for loss in (deferred, at_once, before):
        loss(*data)
    expected = before.per_sample(*data)
    torch.testing.assert_close(deferred.per_sample(*data), expected)
    deferred.advance(0.79)
    torch.testing.assert_close(deferred.per_sample(*data), expected)
    deferred.advance(0.8)
    torch.testing.assert_close(deferred.per_sample(*data), at_once.per_sample(*data))
    assert not torch.allclose(deferred.per_sample(*data), expected)


def test_every_component_with_weights_or_adjustment_can_be_deferred() -> None:
    startable = {name for name in LOSSES if "start" in LOSSES[name].__dataclass_fields__}  # type: ignore[attr-defined]
    assert startable == {name.split()[0] for name in DEFERRED}


# Reductions, weights and targets


def test_reductions_are_the_documented_sums() -> None:
    logits, targets = batch()
    expected = cross_entropy(logits, targets) * torch.arange(1.0, 6.0)[targets]
    options: dict[str, Any] = {"class_weights": torch.arange(1.0, 6.0)}

    def reduced(reduction: Any) -> Tensor:
        loss = losses.CrossEntropyLoss(COUNTS, reduction=reduction, **options)
        return loss(logits, targets)  # type: ignore[no-any-return]

    torch.testing.assert_close(reduced("none"), expected)
    torch.testing.assert_close(reduced("sum"), expected.sum())
    torch.testing.assert_close(reduced("batch"), expected.mean())
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)[targets]
    torch.testing.assert_close(reduced("weighted"), expected.sum() / weights.sum())


@given(
    seed=st.integers(0, 1000),
    smoothing=st.floats(0, 0.9),
    weights=st.lists(st.floats(0.01, 100), min_size=5, max_size=5),
)
@settings(max_examples=30, deadline=None)
def test_weighted_reduction_is_torch_cross_entropy(
    seed: int, smoothing: float, weights: list[float]
) -> None:
    logits, targets = batch(seed=seed)
    class_weights = torch.tensor(weights, dtype=torch.float64)
    loss = losses.CrossEntropyLoss(
        COUNTS, class_weights=class_weights, label_smoothing=smoothing, reduction="weighted"
    )
    expected = nn.functional.cross_entropy(
        logits, targets, class_weights, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss(logits, targets), expected)


def test_any_loss_takes_explicit_class_weights() -> None:
    logits, targets = batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    for kind in (losses.FocalLoss, losses.LogitAdjustedLoss, losses.SigmoidFocalLoss):
        plain = kind(COUNTS).per_sample(logits, targets)
        weighted = kind(COUNTS, class_weights=weights).per_sample(logits, targets)
        torch.testing.assert_close(weighted, plain * weights[targets])
    replaced = losses.WeightedCrossEntropyLoss(COUNTS, class_weights=weights)
    torch.testing.assert_close(replaced.class_weights, weights)


def test_focal_probability_ignores_class_weights() -> None:
    logits, targets = batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    p = logits.softmax(dim=1)[torch.arange(len(targets)), targets]
    expected = weights[targets] * (1 - p) ** 2 * -p.log()
    loss = losses.FocalLoss(COUNTS, class_weights=weights)
    torch.testing.assert_close(loss.per_sample(logits, targets), expected)


def test_weight_cap_is_relative_to_the_median_and_comes_before_normalisation() -> None:
    counts = torch.tensor([1000, 100, 10, 5, 1])
    weights = losses.frequency_weights(counts, 1.0, "none", max_weight=2.0)
    torch.testing.assert_close(
        weights, torch.tensor([0.001, 0.01, 0.1, 0.2, 0.2], dtype=torch.float64)
    )
    normalised = losses.frequency_weights(counts, 1.0, "samples", max_weight=2.0)
    torch.testing.assert_close(normalised / normalised[0], weights / weights[0])


def test_misfit_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_weights must be \(5,\)"):
        losses.CrossEntropyLoss(COUNTS, class_weights=torch.ones(4))
    with pytest.raises(ValueError, match="start"):
        losses.CrossEntropyLoss(COUNTS, start=1.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.CrossEntropyLoss(COUNTS, label_smoothing=1.0)
    with pytest.raises(ValueError, match="class_counts"):
        losses.CrossEntropyLoss(torch.tensor([3]))


# Numerics


@every_component
@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([3.0, -2.0, 1.0], "class 1 has -2"),
        ([3.0, 1.0, float("nan")], "class 2 has nan"),
        ([float("inf"), 1.0, 1.0], "class 0 has inf"),
        ([0.0, 0.0, 0.0], "all are 0"),
    ],
)
def test_impossible_class_counts_are_refused(
    component: LossComponent, counts: list[float], said: str
) -> None:
    with pytest.raises(ValueError, match=f"class_counts must be .*{said}"):
        component.build(torch.tensor(counts))


def test_impossible_class_counts_are_refused_before_weights_are_capped() -> None:
    with pytest.raises(ValueError, match="all are 0"):
        losses.WeightedCrossEntropy(max_weight=3.0).build(torch.zeros(3))


@every_component
@pytest.mark.parametrize("classes", [NUM_CLASSES - 1, NUM_CLASSES + 1])
def test_logits_of_another_number_of_classes_are_refused(
    component: LossComponent, classes: int
) -> None:
    loss, logits, targets = component.build(COUNTS), torch.ones(2, classes), torch.tensor([0, 1])
    logits[:, -1] += 1
    for compute in (loss, loss.per_sample):
        with pytest.raises(ValueError, match=f"logits have {classes} classes, class_counts 5"):
            compute(logits, targets)


def test_logits_that_are_no_matrix_are_refused_with_their_shape() -> None:
    with pytest.raises(ValueError, match=r"logits must be \(N, 5\), not \(5,\)"):
        losses.CrossEntropy().build(COUNTS)(torch.zeros(5), torch.tensor([0]))


def test_confident_sigmoid_loss_does_not_cancel_in_float32() -> None:
    logits = torch.tensor([[1000.0, -3.0, -4.0, -5.0, -6.0]])
    loss = losses.SigmoidFocalLoss(COUNTS, gamma=0.0)
    exact = loss.per_sample(logits.double(), torch.tensor([0]))
    value = loss.per_sample(logits, torch.tensor([0]))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_complement_and_sum_of_others_agree_with_brute_force(values: list[float]) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    p = logits.softmax(dim=1)
    others = torch.stack(
        [torch.cat([p[:, :c], p[:, c + 1 :]], dim=1).sum(dim=1) for c in range(len(values))], 1
    )
    torch.testing.assert_close(sum_of_others(p), others, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        log_complement(logits.log_softmax(dim=1)).exp(), others, rtol=1e-11, atol=0
    )


# Asymmetric


def test_gamma_neg_does_nothing_without_eps() -> None:
    logits, targets = batch()
    for gamma_pos in (0.0, 1.0):
        reference = with_gradient(
            losses.AsymmetricLoss(COUNTS, gamma_pos=gamma_pos, gamma_neg=0.0, eps=0.0),
            logits,
            targets,
        )
        for gamma_neg in (1.0, 4.0):
            loss = losses.AsymmetricLoss(COUNTS, gamma_pos=gamma_pos, gamma_neg=gamma_neg, eps=0.0)
            actual = with_gradient(loss, logits, targets)
            torch.testing.assert_close(actual, reference, rtol=0, atol=0)
    assert "does nothing" in (losses.Asymmetric.__doc__ or "")


# Label-aware smoothing


def test_label_aware_smoothing_of_equal_counts_is_that_of_the_head() -> None:
    loss = losses.LabelAwareSmoothingLoss(torch.tensor([7, 7, 7]))
    assert loss.smoothing is not None
    assert loss.smoothing.tolist() == [0.4] * 3


# FNR-adaptive


def missing(predictions: list[int]) -> Tensor:
    """Logits whose largest entries are at ``predictions``."""
    return 4.0 * nn.functional.one_hot(torch.tensor(predictions), NUM_CLASSES).double()


def test_fnr_rates_are_ratios_of_decayed_sums() -> None:
    loss = losses.FnrAdaptiveLoss(COUNTS, half_life=1, unit="steps", floor=0.01)
    loss(missing([0, 1, 1, 0]), torch.tensor([0, 0, 1, 2]))
    assert loss.rate.tolist() == [1 / 2, 0, 1, 1, 1]
    loss(missing([0, 0, 2, 2]), torch.tensor([0, 0, 2, 2]))
    assert loss.rate.tolist() == [0.5 / 3, 0, 0.5 / 2.5, 1, 1]
    assert loss.importance.tolist() == [0.5 / 3, 0.01, 0.5 / 2.5, 1, 1]


def test_fnr_half_life_in_epochs_does_not_depend_on_the_batch_size() -> None:
    rates = []
    for size in (5, 60):
        loss = losses.FnrAdaptiveLoss(torch.full((5,), 12), half_life=0.5)
        predictions = [0] * 120
        targets = torch.arange(120) % 5
        hit = [0] * 60 + targets[60:].tolist()
        for begin in range(0, 120, size):
            part = slice(begin, begin + size)
            loss(missing((predictions if begin < 60 else hit)[part]), targets[part])
        rates.append(loss.rate[1].item())
    # One epoch of misses, then one of hits: two half-lives.
    assert rates[1] == pytest.approx(0.25 / 1.25)
    assert rates[0] == pytest.approx(rates[1], rel=0.01)


def test_fnr_batch_counts_after_its_loss_and_in_train_mode_only() -> None:
    logits, targets = batch()
    loss = losses.FnrAdaptiveLoss(COUNTS)
    torch.testing.assert_close(loss(logits, targets), cross_entropy(logits, targets).mean())
    before = loss.rate.clone()
    assert not torch.equal(before, torch.ones_like(before))
    loss.eval()(logits.flip(0), targets)
    assert torch.equal(loss.rate, before)


def test_fnr_weights_have_mean_one_over_the_batch_and_a_floor() -> None:
    loss = losses.FnrAdaptiveLoss(COUNTS, floor=0.2)
    targets = torch.tensor([0, 0, 0, 1, 2])
    for _ in range(50):
        loss(missing([0, 0, 0, 1, 0]), targets)
    weights = loss.weights(targets)
    assert weights is not None
    assert float(weights[targets].mean()) == pytest.approx(1)
    assert float(weights[2] / weights[0]) == pytest.approx(1 / 0.2)


def test_fnr_counts_soft_targets_by_their_shares() -> None:
    loss = losses.FnrAdaptiveLoss(COUNTS)
    loss(missing([0, 1]), torch.tensor([[0.75, 0.25, 0, 0, 0], [0.5, 0.5, 0, 0, 0]]))
    assert loss.rate[:3].tolist() == pytest.approx([0.5 / 1.25, 0.25 / 0.75, 1])


def test_fnr_sums_are_shared_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_process_missed_class_one(sums: Tensor) -> None:
        sums[:, 1] += 1

    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", other_process_missed_class_one)
    loss = losses.FnrAdaptiveLoss(COUNTS)
    loss(missing([0, 1]), torch.tensor([0, 1]))
    assert loss.rate[:2].tolist() == [0, 0.5]


# Equalization


def equalization_by_hand(logits: Tensor, targets: Tensor, spared: Tensor) -> Tensor:
    keep = (~spared).double()
    keep[torch.arange(len(targets)), targets] = 1
    total = (keep * logits.exp()).sum(dim=1)
    return total.log() - logits[torch.arange(len(targets)), targets]


def test_equalization_leaves_every_tail_class_out_at_gamma_one() -> None:
    logits, targets = batch()
    loss = losses.EqualizationLoss(COUNTS, gamma=1.0, threshold=0.02)
    tail = COUNTS / COUNTS.sum() < 0.02
    assert tail.tolist() == [False, False, True, True, True]
    expected = equalization_by_hand(logits, targets, tail.expand_as(logits))
    torch.testing.assert_close(loss.per_sample(logits, targets), expected)
    torch.testing.assert_close(
        loss.eval().per_sample(logits, targets), cross_entropy(logits, targets)
    )


def test_equalization_of_a_sample_with_every_other_class_left_out_is_zero() -> None:
    loss = losses.EqualizationLoss(COUNTS, gamma=1.0, threshold=1.0)
    values, gradient = with_gradient(loss, *batch())
    assert not values.any()
    assert not gradient.any()


def test_equalization_draws_anew_for_each_batch_sample_and_class() -> None:
    loss = losses.EqualizationLoss(COUNTS, gamma=0.7, threshold=1.0)
    logits = torch.zeros(400, NUM_CLASSES)
    drawn = []
    for _ in range(5):
        drawn.append(loss._spared(logits))
        loss(logits, torch.zeros(400, dtype=torch.int64))
    masks = torch.stack(drawn).double()
    assert float(masks.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(masks.mean(dim=(0, 1)).std()) < 0.03
    joint = torch.corrcoef(masks.permute(0, 2, 1).reshape(25, 400))
    assert float((joint - torch.eye(25)).abs().max()) < 0.2


def test_equalization_repeats_by_seed_and_leaves_the_global_generator_alone() -> None:
    logits = torch.zeros(50, NUM_CLASSES)
    state = torch.random.get_rng_state()
    first, again, other = (
        losses.EqualizationLoss(COUNTS, threshold=1.0, seed=seed)._spared(logits)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_equalization_draws_by_the_seed_it_follows() -> None:
    logits = torch.zeros(50, NUM_CLASSES)
    component = losses.Equalization(threshold=1.0)
    mask = losses.EqualizationLoss(COUNTS, threshold=1.0, seed=3)._spared(logits)
    following = component.build(torch.as_tensor(COUNTS)).follow(3)
    assert isinstance(following, losses.EqualizationLoss)
    assert torch.equal(following._spared(logits), mask)
    assert losses.CrossEntropyLoss(COUNTS).follow(3).state_dict() == {}


# Components: bounds, exponents, canonical forms


def test_beta_and_effective_samples_are_two_names_of_one_thing() -> None:
    by_samples = losses.ClassBalanced(effective_samples=1000.0)
    assert by_samples.resolved_beta == pytest.approx(0.999, abs=1e-12)
    assert losses.ClassBalanced().resolved_beta == 0.999
    with pytest.raises(ValidationError, match="not both"):
        losses.ClassBalanced(beta=0.9, effective_samples=10.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("class_balanced", {"beta": 1.0}),
        ("class_balanced", {"effective_samples": 0.5}),
        ("label_smoothing", {"eps": 1.0}),
        ("focal", {"gamma": -1.0}),
        ("focal", {"gamma": float("inf")}),
        ("weighted_cross_entropy", {"start": 1.0}),
        ("fnr_adaptive", {"floor": 0.0}),
        ("cross_entropy", {"power": 1.0}),
    ],
)
def test_values_out_of_bounds_are_refused(name: str, values: dict[str, float]) -> None:
    (key,) = values
    with pytest.raises(ValidationError, match=key):
        LOSSES[name](**values)


def test_heads_and_biases_are_what_the_losses_were_made_for() -> None:
    assert losses.Ldam.head == "cosine"
    assert losses.CrossEntropy.head == "linear"
    assert losses.CrossEntropy().head_bias(10) is None
    assert losses.ClassBalanced(base="focal").head_bias(10) == pytest.approx(-2.197224577)


def test_weight_exponent_is_the_share_of_the_total_correction() -> None:
    def exponent(component: LossComponent) -> float:
        return component.weight_exponent(COUNTS)

    assert exponent(losses.CrossEntropy()) == 0
    assert exponent(losses.WeightedCrossEntropy(power=0.3)) == pytest.approx(0.3)
    assert exponent(losses.WeightedAsymmetric(power=0.7)) == pytest.approx(0.7)
    assert 0 < exponent(losses.WeightedCrossEntropy(power=1.0, max_weight=1.0)) < 1
    assert exponent(losses.ClassBalanced(beta=0.0)) == pytest.approx(0)
    assert exponent(losses.ClassBalanced(beta=0.999999)) == pytest.approx(1, abs=0.01)
    assert 0 < exponent(losses.ClassBalanced(beta=0.99)) < 1
    assert exponent(losses.BalancedSoftmax()) == 1
    assert exponent(losses.LogitAdjusted(tau=0.4)) == 0.4
    assert exponent(losses.VectorScaling(tau=0.6)) == 0.6
    assert exponent(losses.Ldam()) == pytest.approx(0)
    assert exponent(losses.Ldam(beta=0.999999)) == pytest.approx(1, abs=0.01)
    assert fitted_exponent(torch.tensor([7, 7]), torch.tensor([1.0, 1.0])) == 0


CANONICAL: list[tuple[LossComponent, LossComponent]] = [
    (losses.WeightedCrossEntropy(power=0.0, start=0.5), losses.CrossEntropy()),
    (losses.ClassBalanced(beta=0.0, start=0.5), losses.CrossEntropy()),
    (losses.ClassBalanced(effective_samples=1.0), losses.CrossEntropy()),
    (losses.ClassBalanced(), losses.ClassBalanced(beta=0.999)),
    (
        losses.ClassBalanced(base="focal", gamma=0.0, beta=0.5),
        losses.ClassBalanced(base="sigmoid", beta=0.5),
    ),
    (losses.Focal(gamma=0.0), losses.CrossEntropy()),
    (losses.Asymmetric(gamma_neg=4.0, eps=0.0), losses.CrossEntropy()),
    (losses.Asymmetric(gamma_pos=1.5, eps=0.0), losses.Focal(gamma=1.5)),
    (losses.Asymmetric(gamma_neg=0.0, eps=0.2), losses.LabelSmoothing(eps=0.2)),
    (losses.WeightedAsymmetric(power=0.0, eps=0.0, start=0.5), losses.CrossEntropy()),
    (
        losses.WeightedAsymmetric(power=1.0, eps=0.0, start=0.5, max_weight=20.0),
        losses.WeightedCrossEntropy(power=1.0, start=0.5, max_weight=20.0),
    ),
    (
        losses.WeightedAsymmetric(gamma_pos=1.0, eps=0.0),
        losses.WeightedAsymmetric(gamma_pos=1.0, eps=0.0, gamma_neg=0.0),
    ),
    (losses.LabelSmoothing(eps=0.0), losses.CrossEntropy()),
    (
        losses.LabelAwareSmoothing(smooth_head=0.2, smooth_tail=0.2),
        losses.LabelSmoothing(eps=0.2),
    ),
    (losses.VectorScaling(gamma=0.0, tau=0.0), losses.CrossEntropy()),
    (losses.VectorScaling(gamma=0.0, tau=0.5), losses.LogitAdjusted(tau=0.5)),
    (losses.LogitAdjusted(tau=1.0, start=0.5), losses.BalancedSoftmax(start=0.5)),
    (losses.LogitAdjusted(tau=0.0, start=0.5), losses.CrossEntropy()),
    (losses.Ldam(start=0.5, normalization="classes"), losses.Ldam()),
    (losses.FnrAdaptive(floor=1.0, start=0.5), losses.CrossEntropy()),
    (losses.FnrAdaptive(alpha=0.5), losses.FnrAdaptive()),
    (
        losses.FnrAdaptive(mode="reference", half_life=3.0, floor=0.5),
        losses.FnrAdaptive(mode="reference"),
    ),
    (losses.Equalization(gamma=0.0), losses.CrossEntropy()),
    (losses.Equalization(threshold=0.0), losses.CrossEntropy()),
]


@pytest.mark.parametrize(("component", "canonical"), CANONICAL, ids=lambda c: repr(c))
def test_duplicates_have_one_canonical_form(
    component: LossComponent, canonical: LossComponent
) -> None:
    assert component.canonical() == canonical


VALUES: dict[str, list[Any]] = {
    "power": [0.0, 1.0],
    "normalization": ["samples", "classes", "none"],
    "max_weight": [None, 1.5],
    "start": [0.0, 0.5],
    "beta": [None, 0.0, 0.9],
    "base": ["softmax", "sigmoid", "focal"],
    "gamma": [0.0, 0.5],
    "gamma_pos": [0.0, 1.0],
    "gamma_neg": [0.0, 2.0],
    "eps": [0.0, 0.1],
    "smooth_head": [0.0, 0.1],
    "smooth_tail": [0.0, 0.1],
    "shape": ["concave", "linear", "convex"],
    "tau": [0.0, 1.0, 1.5],
    "max_margin": [0.0, 0.5],
    "scale": [1.0],
    "half_life": [0.01, 1.0],
    "floor": [0.1, 1.0],
    "mode": ["repaired", "reference"],
    "alpha": [0.01, 0.5],
    "threshold": [0.0, 0.5],
    "effective_samples": [None],
}


def every_setting(name: str) -> list[Any]:
    """Components over the grid of ``VALUES``; β = 0 instead of None where None is no choice."""
    names = [field.name for field in fields(LOSSES[name])]  # type: ignore[arg-type]
    choices = [[v for v in VALUES[key] if not (name == "ldam" and v is None)] for key in names]
    return [
        LOSSES[name](**dict(zip(names, values, strict=True)))
        for values in itertools.product(*choices)
    ]


@pytest.mark.parametrize("name", list(LOSSES))
def test_canonical_form_trains_exactly_the_same(name: str) -> None:
    first, second = batch(seed=1), batch(seed=2)
    for component in every_setting(name):
        canonical = component.canonical()
        assert canonical.canonical() == canonical
        assert canonical.head == component.head
        assert canonical.head_bias(NUM_CLASSES) == component.head_bias(NUM_CLASSES)
        assert canonical.weight_exponent(COUNTS) == pytest.approx(
            component.weight_exponent(COUNTS), abs=1e-12
        )
        if canonical == component:
            continue
        pair = component.build(COUNTS), canonical.build(COUNTS)
        for progress in (0.0, 0.9):
            for loss in pair:
                loss.advance(progress)
                loss(*first)
            actual, expected = (with_gradient(loss, *second) for loss in pair)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_component
def test_loss_on_the_gpu_equals_the_cpu_without_a_synchronisation(
    component: LossComponent,
) -> None:
    logits, targets = batch(64)
    on_cpu, on_gpu = component.build(COUNTS), component.build(COUNTS).to("cuda")
    gpu_logits, gpu_targets = logits.cuda(), targets.cuda()
    soft = on_gpu.as_soft(gpu_targets, gpu_logits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = [
            on_gpu(gpu_logits, gpu_targets),
            on_gpu(gpu_logits, soft),
            on_gpu(gpu_logits, gpu_targets),
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [
        on_cpu(logits, targets),
        on_cpu(logits, on_cpu.as_soft(targets, logits)),
        on_cpu(logits, targets),
    ]
    torch.testing.assert_close([value.cpu() for value in values], expected)


@pytest.mark.parametrize("counts", [[50, 10, 2], (50, 10, 2), np.array([50, 10, 2])], ids=repr)
def test_class_counts_may_be_a_list_or_an_array(counts: ClassCounts) -> None:
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for loss in (
        losses.WeightedCrossEntropyLoss,
        losses.ClassBalancedLoss,
        losses.LogitAdjustedLoss,
        losses.LabelAwareSmoothingLoss,
        losses.LdamLoss,
    ):
        expected = loss(torch.tensor([50, 10, 2]))(logits, targets)
        assert torch.equal(loss(counts)(logits, targets), expected)
