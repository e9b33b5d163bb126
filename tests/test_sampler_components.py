"""What each sampler promises: published probabilities, repeats, its share of the correction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tuner.errors import DataError
from tuner.imbalance import Groups
from tuner.samplers import (
    SAMPLERS,
    ClassAware,
    Curriculum,
    EffectiveNumber,
    Natural,
    Progressive,
    SamplerComponent,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "samplers.json").read_text("utf-8"))
COUNTS = (200, 60, 20, 5)
GROUPS = Groups(head=(0,), medium=(1,), tail=(2, 3))


def targets_with(counts: tuple[int, ...]) -> Tensor:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]


TARGETS = targets_with(COUNTS)


def tail_at(counts: list[int], limit: int) -> Groups:
    tail = tuple(c for c, n in enumerate(counts) if n <= limit)
    return Groups(tuple(c for c in range(len(counts)) if c not in tail), (), tail)


def golden_component(vector: dict[str, Any]) -> tuple[SamplerComponent, float]:
    if "q" in vector:
        return ClassAware(exponent=1 - vector["q"]), 0.0
    if "beta" in vector:
        return EffectiveNumber(beta=vector["beta"]), 0.0
    if "factor" in vector:
        factor = vector["factor"]
        return ClassAware(exponent=0.0, tail_factor=factor, epoch_length="keep_head"), 0.0
    if "t" in vector:
        return Progressive(), vector["t"] / vector["T"]
    return ClassAware(exponent=1.0), 0.0


@pytest.mark.parametrize(
    "vector", GOLDEN["samplers"], ids=lambda vector: f"{vector['set']}-{vector['sampler']}"
)
def test_class_probabilities_are_those_of_the_published_samplers(vector: dict[str, Any]) -> None:
    counts = GOLDEN["class_counts"][vector["set"]]
    component, progress = golden_component(vector)
    groups = tail_at(counts, 238 if vector["set"] == "lt10_if50" else 100)
    sampler = component.build(targets_with(tuple(counts)), seed=0, groups=groups)
    assert sampler.class_probabilities(progress).tolist() == pytest.approx(
        vector["class_prob"], rel=1e-12
    )
    if "epoch_length_keep_head" in vector:
        assert sampler.num_draws(progress) == vector["epoch_length_keep_head"]
    if "expected_repeats_per_image" in vector:
        repeats = sampler.expected_repeats(progress).tolist()
        assert repeats == pytest.approx(vector["expected_repeats_per_image"], rel=1e-12)


def test_head_cap_undersamples_and_shows_other_images_in_every_pass() -> None:
    component = ClassAware(exponent=0.0, head_cap=4.0, epoch_length="keep_head")
    sampler = component.build(TARGETS, seed=0)
    assert sampler.class_probabilities(0.0).tolist() == pytest.approx(
        [20 / 65, 20 / 65, 20 / 65, 5 / 65]
    )
    passes = [sampler.one_pass(0.0) for _ in range(3)]
    assert [len(each) for each in passes] == [65, 65, 65]
    head = torch.cat(passes)[TARGETS[torch.cat(passes)] == 0].tolist()
    assert len(set(head)) == len(head)


def test_tail_factor_without_a_known_tail_says_what_to_add() -> None:
    with pytest.raises(DataError, match=r"data\.tail"):
        ClassAware(tail_factor=2.0).build(TARGETS, seed=0)


@pytest.mark.parametrize("s", [0.2, 0.5, 0.9])
def test_share_of_unseen_images_is_what_epochs_really_miss(s: float) -> None:
    targets = targets_with((400, 150, 90))
    sampler = ClassAware(exponent=s).build(targets, seed=0)
    missed = torch.zeros(3, dtype=torch.float64)
    for _ in range(300):
        seen = torch.bincount(sampler.epoch(0.0)).nonzero().flatten()
        missed += 1 - targets[seen].bincount() / targets.bincount()
    assert (missed / 300).tolist() == pytest.approx(sampler.unseen_share(0.0).tolist(), abs=0.015)


def test_description_says_how_often_tail_images_repeat_and_what_is_missed() -> None:
    counts = tuple(GOLDEN["class_counts"]["cifar100_if100"])
    targets = targets_with(counts)
    assert ClassAware().build(targets, seed=0).describe() == (
        "the images of the smallest class are drawn 21.7 times per epoch; "
        "78 % of the images of the largest class are not seen in an epoch"
    )
    grouped = ClassAware().build(TARGETS, seed=0, groups=GROUPS).describe()
    assert grouped == (
        "tail images are drawn 5.7 times per epoch; 65 % of head images are not seen in an epoch"
    )
    assert Natural().build(TARGETS, seed=0).describe() == "every image is drawn once per epoch"


def test_share_of_the_total_correction_is_the_exponent() -> None:
    counts = torch.tensor(COUNTS)
    assert ClassAware(exponent=0.3).exponent_share(counts) == 0.3
    assert [c.exponent_share(counts) for c in (Natural(), Curriculum(), Progressive())] == [0, 0, 1]
    assert EffectiveNumber(beta=0.0).exponent_share(counts) == pytest.approx(0)
    assert EffectiveNumber(beta=0.999999).exponent_share(counts) == pytest.approx(1, abs=1e-3)
    assert ClassAware(exponent=1.0, tail_factor=3.0).exponent_share(counts, GROUPS) > 1.2


def test_share_with_a_tail_factor_is_the_slope_of_a_line_fit() -> None:
    component = ClassAware(exponent=0.5, tail_factor=2.0)
    counts = torch.tensor(COUNTS)
    p = component.probabilities(counts, 1.0, GROUPS)
    slope = np.polyfit(np.log(counts.numpy()), np.log(p.numpy()), 1)[0]
    assert component.exponent_share(counts, GROUPS) == pytest.approx(1 - slope)


def test_canonical_form_drops_what_changes_nothing() -> None:
    assert ClassAware(exponent=0.0, start=0.6).canonical() == Natural()
    assert EffectiveNumber(beta=0.0).canonical() == Natural()
    assert ClassAware(exponent=1.0, head_cap=5.0).canonical() == ClassAware(exponent=1.0)
    kept = ClassAware(exponent=0.0, head_cap=5.0)
    assert kept.canonical() == kept


@pytest.mark.parametrize(
    "hyperparameters", [{"exponent": 1.5}, {"tail_factor": 6}, {"head_cap": 0.5}, {"start": 1.0}]
)
def test_values_outside_their_bounds_are_refused(hyperparameters: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(hyperparameters))):
        SAMPLERS["class_aware"](**hyperparameters)


@pytest.mark.parametrize(
    "component", [ClassAware(exponent=0.0), EffectiveNumber(beta=0.0)], ids=repr
)
def test_sampler_that_changes_nothing_draws_as_the_natural_one(component: SamplerComponent) -> None:
    targets = torch.tensor([0] * 30 + [1] * 7)
    assert torch.equal(
        component.build(targets, seed=3).epoch(0.5), Natural().build(targets, seed=3).epoch(0.5)
    )
