from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from head_cases import CASES, SETTINGS, Loop, head_recipe, loss_table, pixel_features, unlike
from pydantic import ValidationError
from torch import Tensor, nn

from tuner.datasets import Data
from tuner.heads import Features, HeadResult, HeadTraining, train_heads
from tuner.heads._plans import MIXTURE, sampler_of
from tuner.heads._work import Material
from tuner.losses import LOSSES, Loss, LossComponent
from tuner.recipe import Recipe
from tuner.registry import component

Batches = Literal["shared", "own"]
BATCHES: tuple[Batches, ...] = ("shared", "own")
OWN = replace(SETTINGS, batches="own")
DIVERGING = {"name": "logit_adjusted", "tau": 1e39}
MIXED = [
    head_recipe(),
    head_recipe({"name": "logit_adjusted", "tau": 0.7}, "class_aware"),
    head_recipe({"name": "focal"}, "progressive"),
    head_recipe({"name": "ldam", "beta": 0.99, "start": 0.5}),
    head_recipe({"name": "ldam"}, "class_aware"),
    head_recipe({"name": "label_smoothing"}),
    head_recipe({"name": "class_balanced", "base": "focal"}),
    head_recipe({"name": "equalization", "threshold": 0.1}),
    head_recipe({"name": "fnr_adaptive"}),
    head_recipe({"name": "fnr_adaptive", "mode": "reference"}),
    head_recipe({"name": "vector_scaling"}, seed=8),
    head_recipe(sampler="curriculum"),
    head_recipe(sampler="class_aware", sampling={"epoch_length": "keep_head"}),
]


@pytest.fixture(scope="module")
def features(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return pixel_features(digits, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def odd(features: Features) -> Features:
    """Features whose number fills no vector of a processor."""
    train, validation = features.train[..., 10:47], features.validation[:, 10:47]
    return replace(features, train=train, validation=validation)


def trained(
    recipes: Sequence[Recipe],
    features: Features,
    data: Data,
    settings: HeadTraining = SETTINGS,
    *,
    lanes: int = 64,
    dtype: torch.dtype = torch.float32,
) -> list[HeadResult]:
    """Results in the order of the recipes."""
    found = dict(train_heads(recipes, features, data, settings, lanes=lanes, dtype=dtype))
    assert sorted(found) == list(range(len(recipes)))
    return [found[index] for index in range(len(recipes))]


def identical(a: HeadResult, b: HeadResult) -> bool:
    biases = (a.bias is None and b.bias is None) or (
        a.bias is not None and b.bias is not None and torch.equal(a.bias, b.bias)
    )
    same = torch.equal(a.logits, b.logits) and torch.equal(a.weight, b.weight)
    return same and biases and a.train_loss == b.train_loss


# The numbers are those of an ordinary loop


def assert_equal(result: HeadResult, loop: Loop) -> None:
    """In float64, to 1e-10; logits come in float32."""
    logits, train_loss = loop.train()
    assert unlike(result.weight, loop.weight()) < 1e-10
    assert unlike(result.logits, logits) < 1e-6
    assert result.train_loss == pytest.approx(train_loss, rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_own_batches_train_as_an_ordinary_loop_does(
    case: str, features: Features, digits: Data
) -> None:
    recipe = head_recipe(loss_table(case, 1), "class_aware", sampling={"start": 0.5})
    (result,) = trained([recipe], features, digits, OWN, dtype=torch.float64)
    assert_equal(result, Loop(recipe, features, digits, torch.float64, shared=False))


@pytest.mark.parametrize("case", [case for case in CASES if "fnr" not in case])
def test_shared_batches_train_as_an_ordinary_loop_with_weighted_samples_does(
    case: str, features: Features, digits: Data
) -> None:
    recipe = head_recipe(loss_table(case, 1), "class_aware", sampling={"start": 0.5})
    (result,) = trained([recipe], features, digits, dtype=torch.float64)
    assert_equal(result, Loop(recipe, features, digits, torch.float64, shared=True))


@pytest.mark.parametrize("sampler", ["natural", "curriculum", "progressive"])
def test_samplers_that_look_at_single_images_have_their_own_batches(
    sampler: str, features: Features, digits: Data
) -> None:
    recipe = head_recipe(sampler=sampler)
    shared = sampler != "curriculum"
    (result,) = trained([recipe], features, digits, dtype=torch.float64)
    assert_equal(result, Loop(recipe, features, digits, torch.float64, shared=shared))


def test_float32_differs_from_float64_by_rounding_only(features: Features, digits: Data) -> None:
    rounded = trained(MIXED, features, digits)
    exact = trained(MIXED, features, digits, dtype=torch.float64)
    for recipe, a, b in zip(MIXED, rounded, exact, strict=True):
        assert unlike(a.logits, b.logits) < 1e-3, recipe.loss


# Nobody depends on the others


@pytest.mark.parametrize("settings", [SETTINGS, OWN], ids=["shared", "own"])
def test_recipe_gives_the_same_bits_alone_and_in_company(
    settings: HeadTraining, features: Features, digits: Data
) -> None:
    alone = [trained([recipe], features, digits, settings)[0] for recipe in MIXED]
    company = trained(MIXED * 5, features, digits, settings)
    for index, result in enumerate(company):
        assert identical(result, alone[index % len(MIXED)])


@pytest.mark.parametrize("settings", [SETTINGS, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_number_of_lanes_order_and_back_filling_change_no_bit(
    lanes: int, settings: HeadTraining, features: Features, digits: Data
) -> None:
    """With own batches, epochs of different length make lanes end and begin out of step."""
    wide = trained(MIXED, features, digits, settings)
    narrow = trained(MIXED[::-1], features, digits, settings, lanes=lanes)[::-1]
    assert all(identical(a, b) for a, b in zip(wide, narrow, strict=True))


@pytest.mark.parametrize("batches", BATCHES)
def test_odd_sizes_change_no_bit_either(batches: Batches, odd: Features, digits: Data) -> None:
    settings = replace(SETTINGS, batch_size=50, batches=batches, epochs=2)
    alone = [trained([recipe], odd, digits, settings)[0] for recipe in MIXED]
    company = trained(MIXED[::-1] * 3, odd, digits, settings, lanes=5)
    for index, result in enumerate(company):
        assert identical(result, alone[::-1][index % len(MIXED)])


@pytest.mark.parametrize("settings", [SETTINGS, OWN], ids=["shared", "own"])
def test_diverged_lane_says_so_and_leaves_its_neighbours_alone(
    settings: HeadTraining, features: Features, digits: Data
) -> None:
    recipes = [MIXED[0], head_recipe(DIVERGING), MIXED[1], MIXED[2]]
    first, diverged, *rest = trained(recipes, features, digits, settings, lanes=2)
    assert diverged.diverged
    calm = trained([MIXED[0], *MIXED[1:3]], features, digits, settings)
    assert not any(result.diverged for result in calm)
    assert all(identical(a, b) for a, b in zip([first, *rest], calm, strict=True))


# What acts, and what comes out


def test_classifier_gives_the_logits_from_the_features_of_the_backbone(
    features: Features, digits: Data
) -> None:
    linear, cosine = trained([MIXED[1], MIXED[4]], features, digits)
    backbone = features.validation.float() * features.scale
    assert linear.bias is not None
    assert unlike(backbone @ linear.weight.t() + linear.bias, linear.logits) < 1e-4
    assert cosine.bias is None
    similar = nn.functional.normalize(backbone) @ nn.functional.normalize(cosine.weight).t()
    assert unlike(30 * similar, cosine.logits) < 1e-4


def test_training_learns_and_adjustment_helps_the_rarest_classes(
    features: Features, digits: Data
) -> None:
    targets = digits.validation.targets
    tail = torch.isin(targets, torch.tensor(digits.groups.tail))
    settings = replace(SETTINGS, epochs=10)
    plain, sampled, adjusted, cosine = trained(
        [
            head_recipe({"name": "focal", "gamma": 0.0}),
            head_recipe(sampler="class_aware"),
            head_recipe({"name": "logit_adjusted", "tau": 2.0}),
            head_recipe({"name": "ldam"}, "class_aware"),
        ],
        features,
        digits,
        settings,
    )

    def accuracy(result: HeadResult, among: Tensor) -> float:
        return float((result.logits.argmax(1) == targets)[among].float().mean())

    def tail_share(result: HeadResult) -> float:
        return float(result.logits.softmax(1)[:, list(digits.groups.tail)].sum())

    assert min(accuracy(each, tail >= 0) for each in (plain, sampled, cosine)) > 0.85
    assert tail_share(adjusted) > 1.1 * tail_share(plain)


def test_seed_and_deferral_act(features: Features, digits: Data) -> None:
    weighted = {"name": "weighted_cross_entropy", "power": 1.0}
    recipes = [
        head_recipe(weighted),
        head_recipe(weighted, seed=8),
        head_recipe({**weighted, "start": 0.5}),
    ]
    first, *others = trained(recipes, features, digits)
    assert not any(torch.equal(first.logits, other.logits) for other in others)


def test_what_cannot_act_on_features_does_not(features: Features, digits: Data) -> None:
    recipe = head_recipe()
    values = recipe.to_dict()
    values |= {"epochs": 50, "optimizer": {"name": "adamw"}, "augment": {"name": "standard"}}
    a, b = trained([recipe, Recipe.from_dict(values)], features, digits)
    assert identical(a, b)


def test_last_stage_of_a_training_says_how_the_classifier_is_sampled() -> None:
    values = head_recipe().to_dict() | {"training": {"name": "two_stage"}}
    assert sampler_of(Recipe.from_dict(values)) == head_recipe(sampler="class_aware").sampler


def test_sampler_as_weights_draws_as_the_sampler_does(digits: Data) -> None:
    counts = digits.class_counts
    drawn = MIXTURE.probabilities(counts, 0.0)
    for exponent in (0.0, 0.5, 1.0):
        sampler = head_recipe(sampler="class_aware", sampling={"exponent": exponent}).sampler
        own = sampler.probabilities(counts, 1.0, digits.groups)
        ratio = MIXTURE.ratio(own, counts)
        assert torch.allclose(drawn * ratio, own)
        assert float(ratio.max()) <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_features_are_measured_to_the_bit_and_not_changed_by_that(
    dtype: torch.dtype, odd: Features, digits: Data
) -> None:
    before = odd.train.clone()
    material = Material(odd, digits, SETTINGS, dtype, torch.device("cpu"))
    first = before[0].to(dtype)
    mean = first.mean(0)
    assert torch.equal(material.mean, mean)
    assert material.unit == float((first - mean).square().sum(1).mean().sqrt())
    assert torch.equal(odd.train, before)


def test_stop_ends_the_training_between_steps(features: Features, digits: Data) -> None:
    for settings in (SETTINGS, OWN):
        asked = iter([False] * 4 + [True] * 99)
        found = train_heads(MIXED, features, digits, settings, stop=lambda: next(asked))  # noqa: B023
        assert list(found) == []


def test_any_registered_loss_trains_through_its_module(
    features: Features, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSSES, "_components", dict(LOSSES._components))

    class SquaredLoss(Loss):
        def table(self, logits: Tensor) -> Tensor:
            p = logits.softmax(1)
            return 1 - 2 * p + p.square().sum(1, keepdim=True)

    @LOSSES.register("squared")
    @component
    class Squared(LossComponent):
        def build(self, class_counts: Tensor) -> Loss:
            return SquaredLoss(class_counts)

    assert Squared() is not None
    recipe = head_recipe({"name": "squared"})
    (result,) = trained([recipe], features, digits, dtype=torch.float64)
    assert_equal(result, Loop(recipe, features, digits, torch.float64, shared=False))


def test_fewer_images_than_a_batch_can_be_trained_on(features: Features, digits: Data) -> None:
    settings = replace(SETTINGS, batch_size=4096)
    for batches in BATCHES:
        (result,) = trained([head_recipe()], features, digits, replace(settings, batches=batches))
        assert not result.diverged


@pytest.mark.parametrize("value", [{"epochs": 0}, {"lr": 0.0}, {"copies": 0}, {"batches": "all"}])
def test_settings_out_of_bounds_are_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HeadTraining(**value)  # type: ignore[arg-type]
