"""Recipes: TOML both ways, equal digests for equal trainings, and what follows from the parts."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from tuner.datasets import PROFILES
from tuner.errors import StudyFileError
from tuner.imbalance import Groups
from tuner.recipe import DEFAULTS, PARTS, Recipe, dump_component, parse_part, read_toml
from tuner.samplers import ClassAware, Natural

COMPONENTS = [(part, name) for part, registry in PARTS.items() for name in registry]
REQUIRED = {"image_folder": {"root": "photos"}}
COUNTS = torch.tensor([1000, 300, 100, 30, 10])
GROUPS = Groups(head=(0, 1), medium=(2,), tail=(3, 4))


def recipe_of(epochs: int = 20, **parts: Any) -> Recipe:
    values = {"data": {"name": "digits"}, "model": {"name": "linear"}, "epochs": epochs, **parts}
    return Recipe.from_dict(values)


def digest_of(**parts: Any) -> str:
    return recipe_of(**parts).digest()


@pytest.mark.parametrize(("part", "name"), COMPONENTS)
def test_every_component_goes_to_toml_and_back(part: str, name: str) -> None:
    component = PARTS[part].parse(name, REQUIRED.get(name, {}), where=name)
    text = tomli_w.dumps(dump_component(part, component))
    assert parse_part(part, tomllib.loads(text), where=name) == component
    assert hash(component) == hash(parse_part(part, tomllib.loads(text), where=name))


@pytest.mark.parametrize(("part", "name"), COMPONENTS)
def test_canonical_form_of_every_component_is_canonical_itself(part: str, name: str) -> None:
    component = PARTS[part].parse(name, REQUIRED.get(name, {}), where=name)
    if hasattr(component, "canonical"):
        simple = component.canonical()
        assert simple.canonical() == simple
        assert PARTS[part].name_of(simple) in PARTS[part]


@pytest.mark.parametrize(
    "profile",
    [
        {"name": "exponential", "ratio": 10.0, "n_max": 100, "order": "size"},
        {
            "name": "step",
            "groups": [{"classes": 5, "count": 80}, {"classes": 5, "low": 8, "high": 9}],
        },
        {"name": "keep", "classes": [1, 2], "keep": 0.5, "others": 0.25},
        {"name": "counts", "counts": [90, 80, 70, 60, 50, 40, 30, 20, 10, 5]},
    ],
    ids=lambda profile: str(profile["name"]),
)
@pytest.mark.parametrize(
    "tail", [{"bottom": 0.4}, {"max_count": 50}, {"many": 60, "few": 20}, {"classes": [3, "9"]}]
)
def test_profile_and_tail_rule_of_the_data_survive_toml(
    profile: dict[str, Any], tail: dict[str, Any]
) -> None:
    data = {"name": "digits", "profile": profile, "tail": tail, "seed": 7}
    recipe = recipe_of(data=data)
    table = recipe.to_dict()["data"]
    assert table["tail"] == tail
    assert {key: table["profile"][key] for key in profile} == profile
    again = Recipe.from_dict(tomllib.loads(recipe.to_toml()))
    assert again == recipe
    assert type(again.data.profile) is PROFILES[profile["name"]]


def test_recipe_without_optional_parts_takes_the_plain_ones() -> None:
    tables = recipe_of().to_dict()
    assert {part: tables[part]["name"] for part in DEFAULTS} == DEFAULTS
    assert tables["seed"] == 0


CROSS_ENTROPY = {"name": "cross_entropy"}
EQUIVALENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("loss", {"name": "weighted_cross_entropy", "power": 0.0, "max_weight": 3.0}, CROSS_ENTROPY),
    ("loss", {"name": "asymmetric", "eps": 0.0, "gamma_neg": 4.0}, CROSS_ENTROPY),
    ("loss", {"name": "weighted_asymmetric", "eps": 0.0, "power": 0.0}, CROSS_ENTROPY),
    ("loss", {"name": "focal", "gamma": 0.0}, CROSS_ENTROPY),
    ("loss", {"name": "label_smoothing", "eps": 0.0}, CROSS_ENTROPY),
    ("loss", {"name": "logit_adjusted", "tau": 0.0}, CROSS_ENTROPY),
    ("loss", {"name": "class_balanced", "beta": 0.0}, CROSS_ENTROPY),
    ("loss", {"name": "logit_adjusted", "tau": 1.0}, {"name": "balanced_softmax"}),
    (
        "loss",
        {"name": "class_balanced", "effective_samples": 10.0},
        {"name": "class_balanced", "beta": 0.9},
    ),
    (
        "loss",
        {"name": "class_balanced", "beta": 0.9, "gamma": 3.0},
        {"name": "class_balanced", "beta": 0.9, "gamma": 1.0},
    ),
    ("sampler", {"name": "class_aware", "exponent": 0.0, "start": 0.5}, {"name": "natural"}),
    (
        "augment",
        {"name": "standard", "crop_padding": 0, "flip": False, "remix": True},
        {"name": "none"},
    ),
    ("training", {"name": "deferred", "switch": 0.5}, {"name": "single_stage"}),
]
DIFFERENT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("loss", {"name": "focal", "gamma": 1.0}, {"name": "focal", "gamma": 1.0000001}),
    ("loss", {"name": "weighted_cross_entropy", "start": 0.8}, {"name": "weighted_cross_entropy"}),
    (
        "loss",
        {"name": "class_balanced", "base": "focal", "gamma": 2.0},
        {"name": "class_balanced", "base": "focal", "gamma": 1.0},
    ),
    ("sampler", {"name": "class_aware", "exponent": 0.0, "tail_factor": 2.0}, {"name": "natural"}),
    ("augment", {"name": "standard", "crop_padding": 0}, {"name": "none"}),
    ("optimizer", {"name": "sgd", "lr": 0.1}, {"name": "sgd", "lr": 0.2}),
    ("data", {"name": "digits", "seed": 1}, {"name": "digits"}),
    ("model", {"name": "linear", "weights_file": "mine.pth"}, {"name": "linear"}),
    ("training", {"name": "two_stage"}, {"name": "single_stage"}),
]


@pytest.mark.parametrize(("part", "one", "other"), EQUIVALENT)
def test_recipes_that_train_alike_have_one_digest(
    part: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert digest_of(**{part: one}) == digest_of(**{part: other})


@pytest.mark.parametrize(("part", "one", "other"), DIFFERENT)
def test_recipes_that_train_differently_have_different_digests(
    part: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert digest_of(**{part: one}) != digest_of(**{part: other})


def test_digest_follows_epochs_and_seed() -> None:
    digests = {digest_of(), digest_of(epochs=21), digest_of(seed=1)}
    assert len(digests) == 3
    assert all(len(digest) == 16 for digest in digests)


@pytest.mark.parametrize("name", [*PARTS["model"]])
def test_weights_file_that_is_not_given_is_not_in_the_recipe(name: str) -> None:
    assert "weights_file" not in recipe_of(model={"name": name}).to_dict()["model"]


def test_digest_does_not_see_how_a_number_is_written() -> None:
    assert digest_of(optimizer={"lr": 1, "momentum": 0}) == digest_of(
        optimizer={"lr": 1.0, "momentum": 0.0}
    )


@pytest.mark.parametrize("order", ["natural_first", "balanced_first"])
def test_equal_digests_mean_equal_samplers_in_both_stages(order: str) -> None:
    training = {"name": "two_stage", "order": order}
    plain = recipe_of(training=training)
    idle = recipe_of(training=training, sampler={"name": "class_aware", "exponent": 0.0})
    assert idle.digest() == plain.digest()
    stages = idle.training.samplers(idle.sampler)
    assert stages == plain.training.samplers(plain.sampler)
    assert set(stages) == {Natural(), ClassAware(exponent=1.0)}


@pytest.mark.parametrize(
    ("sampler", "loss", "training", "kappa"),
    [
        ({"name": "natural"}, {"name": "cross_entropy"}, {}, 0.0),
        ({"name": "class_aware", "exponent": 1.0}, {"name": "cross_entropy"}, {}, 1.0),
        (
            {"name": "class_aware", "exponent": 1.0},
            {"name": "weighted_cross_entropy", "power": 0.5},
            {},
            1.5,
        ),
        (
            {"name": "class_aware", "exponent": 0.5},
            {"name": "weighted_asymmetric", "power": 0.5},
            {},
            1.0,
        ),
        ({"name": "natural"}, {"name": "class_balanced", "beta": 0.0}, {}, 0.0),
        ({"name": "natural"}, {"name": "cross_entropy"}, {"name": "two_stage"}, 1.0),
        ({"name": "natural"}, {"name": "cross_entropy"}, {"name": "deferred"}, 0.0),
        (
            {"name": "class_aware", "exponent": 0.5},
            {"name": "weighted_cross_entropy", "power": 0.5},
            {"name": "deferred"},
            1.0,
        ),
        (
            {"name": "natural"},
            {"name": "cross_entropy"},
            {"name": "two_stage", "order": "balanced_first"},
            0.0,
        ),
    ],
)
def test_correction_adds_what_sampler_and_weights_do(
    sampler: dict[str, Any], loss: dict[str, Any], training: dict[str, Any], kappa: float
) -> None:
    recipe = recipe_of(sampler=sampler, loss=loss, training=training)
    assert recipe.correction(COUNTS, GROUPS) == pytest.approx(kappa)


@pytest.mark.parametrize(
    ("parts", "settled"),
    [
        ({"schedule": {"name": "constant"}}, 0.0),
        ({"schedule": {"name": "cosine", "warmup_epochs": 5}}, 0.25),
        ({"schedule": {"name": "step", "warmup_epochs": 100}}, 0.5),
        ({"loss": {"name": "ldam", "beta": 0.99, "start": 0.8}}, 0.8),
        ({"loss": {"name": "ldam", "start": 0.8}, "schedule": {"name": "constant"}}, 0.0),
        ({"sampler": {"name": "class_aware", "start": 0.6}}, 0.6),
        ({"training": {"name": "two_stage", "switch": 0.9}, "loss": {"name": "ldam"}}, 0.9),
        ({"training": {"name": "deferred", "switch": 0.7}, "loss": {"name": "focal"}}, 0.7),
        (
            {"training": {"name": "deferred"}, "loss": {"name": "ldam", "beta": 0.9, "start": 0.9}},
            0.9,
        ),
        ({"training": {"name": "deferred"}, "schedule": {"name": "constant"}}, 0.0),
    ],
)
def test_recipe_is_settled_once_warm_up_and_deferred_parts_are_over(
    parts: dict[str, Any], settled: float
) -> None:
    assert recipe_of(**parts).settled() == pytest.approx(settled)


def stage_one(**parts: Any) -> str | None:
    return recipe_of(**{"training": {"name": "deferred"}, **parts}).stage_one_key()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"loss": {"name": "focal"}, "sampler": {"name": "class_aware"}}),
        ({}, {"loss": {"name": "weighted_cross_entropy", "start": 0.9}}),
        ({}, {"loss": {"name": "class_balanced"}}),
        ({}, {"training": {"name": "deferred", "switch": 0.79}}),
        (
            {"loss": {"name": "ldam", "max_margin": 0.1}},
            {"loss": {"name": "ldam", "beta": 0.99, "start": 0.9}},
        ),
        (
            {"loss": {"name": "class_balanced", "base": "sigmoid"}},
            {"loss": {"name": "class_balanced", "base": "focal", "beta": 0.9}},
        ),
    ],
)
def test_what_acts_after_the_switch_leaves_the_key_of_stage_one_alone(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert stage_one(**one) == stage_one(**other)
    assert len(stage_one(**one) or "") == 16


@pytest.mark.parametrize(
    "parts",
    [
        {"seed": 1},
        {"epochs": 21},
        {"data": {"name": "digits", "seed": 1}},
        {"model": {"name": "mlp"}},
        {"optimizer": {"name": "sgd", "lr": 0.2}},
        {"schedule": {"name": "constant"}},
        {"augment": {"name": "standard"}},
        {"training": {"name": "deferred", "batch_size": 64}},
        {"training": {"name": "deferred", "precision": "bfloat16"}},
        {"training": {"name": "deferred", "switch": 0.5}},
        {"loss": {"name": "ldam"}},
        {"loss": {"name": "class_balanced", "base": "sigmoid"}},
    ],
)
def test_whatever_acts_before_the_switch_changes_the_key_of_stage_one(
    parts: dict[str, Any],
) -> None:
    assert stage_one(**parts) != stage_one()


def test_cosine_heads_of_two_scales_have_two_stage_ones() -> None:
    assert stage_one(loss={"name": "ldam"}) != stage_one(loss={"name": "ldam", "scale": 20.0})


@pytest.mark.parametrize("training", ["single_stage", "two_stage"])
def test_only_deferred_training_has_a_stage_one_to_share(training: str) -> None:
    assert stage_one(training={"name": training}) is None


@pytest.mark.parametrize(
    ("switch", "epochs", "first"), [(0.8, 20, 16), (0.8, 4, 4), (0.75, 4, 3), (0.01, 4, 1)]
)
def test_switch_acts_from_the_first_epoch_that_begins_after_it(
    switch: float, epochs: int, first: int
) -> None:
    training = {"name": "deferred", "switch": switch}
    assert recipe_of(epochs=epochs, training=training).switch_epoch() == first
    assert recipe_of(epochs=epochs).switch_epoch() == 0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 3}, "recipe: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"epochs": 0}, "recipe: epochs = 0: must be at least 1"),
        ({"epochs": True}, "recipe: epochs = true: must be a number"),
        ({"epochs": 3, "seed": -1}, "recipe: seed = -1: must be at least 0"),
        ({"epochs": 3, "loss": {"name": "focal", "gama": 1}}, "recipe: loss.gama: unknown key"),
        ({"epochs": 3, "loss": "focal"}, 'recipe: loss = "focal": must be a table'),
        ({"epochs": 3, "sampler": {"name": "smote"}}, "class_aware"),
    ],
)
def test_wrong_recipe_says_which_key_is_wrong(values: dict[str, Any], said: str) -> None:
    parts = {"data": {"name": "digits"}, "model": {"name": "linear"}}
    with pytest.raises(StudyFileError) as caught:
        Recipe.from_dict(parts | values)
    assert said in str(caught.value)


def test_recipe_without_epochs_or_data_says_what_to_add() -> None:
    with pytest.raises(StudyFileError, match="epochs is missing"):
        Recipe.from_dict({"data": {"name": "digits"}, "model": {"name": "linear"}})
    with pytest.raises(StudyFileError, match=r"\[data\] is missing"):
        Recipe.from_dict({"model": {"name": "linear"}, "epochs": 3})


def test_recipes_are_frozen() -> None:
    recipe = recipe_of()
    with pytest.raises(AttributeError):
        recipe.seed = 1  # type: ignore[misc]
    assert replace(recipe, seed=1).digest() != recipe.digest()


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyFileError, match=r"missing\.toml: no such file"):
        read_toml(tmp_path / "missing.toml")
