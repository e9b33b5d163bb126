"""Budgets are optimizer steps: the same epochs cost and do the same with every sampler."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import MakeSession
from fleet import run_next
from torch import Tensor
from trainer_cases import recipe

from tuner.card import model_card
from tuner.datasets import Data
from tuner.entries import Choice, Fixed, Range
from tuner.export import collect_metrics
from tuner.heads._plans import own_planner
from tuner.lane import Lane
from tuner.samplers import SAMPLERS
from tuner.space import parse_space
from tuner.trainer import epochs
from tuner.training import batches_of, steps_per_epoch

SAMPLED: list[dict[str, Any]] = [
    *({"name": name} for name in SAMPLERS),
    {"name": "class_aware", "epoch_length": "keep_head"},
    {"name": "class_aware", "epoch_length": "keep_head", "start": 0.5},
    {"name": "class_aware", "exponent": 0.0, "head_cap": 2.0, "epoch_length": "keep_head"},
]


@pytest.mark.parametrize("sampler", SAMPLED, ids=str)
def test_trial_has_the_steps_of_its_budget_with_every_sampler(
    sampler: dict[str, Any], digits: Data
) -> None:
    which, asked = recipe(sampler=sampler), itertools.count()
    results = list(epochs(which, digits, stop=lambda: next(asked) < 0))
    images = len(digits.train)
    assert next(asked) == which.steps(images) == 4 * math.ceil(images / 64)
    assert [result.samples for result in results] == 4 * [images]
    assert [result.progress for result in results] == [0.25, 0.5, 0.75, 1.0]


def test_number_of_steps_is_that_of_the_batches() -> None:
    for images, size in itertools.product(range(1, 40), range(2, 12)):
        batches = batches_of(torch.arange(images), size)
        assert len(batches) == steps_per_epoch(images, size)
        lonely = images % size == 1 and images > size
        assert len(batches) == math.ceil(images / size) - lonely
        assert torch.equal(torch.cat(batches), torch.arange(images))


def test_step_has_the_rate_and_progress_of_its_place_in_the_training(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, list[float]]] = []
    learn = Lane.learn

    def watched(lane: Lane, *inputs: Tensor) -> Any:
        rates = [float(group["lr"]) for group in lane.optimizer.param_groups]
        seen.append((lane.progress, rates))
        return learn(lane, *inputs)

    monkeypatch.setattr(Lane, "learn", watched)
    found = []
    for sampler in SAMPLED:
        seen.clear()
        list(epochs(recipe(sampler=sampler), digits))
        found.append(list(seen))
    each = len(found[0]) // 4
    assert all(steps == found[0] for steps in found)
    assert [progress for progress, _ in found[0]] == [(s // each) / 4 for s in range(4 * each)]
    # Two epochs of warm-up to 0.1, then half a cosine over the other two.
    first_of_epoch = [found[0][epoch * each][1][0] for epoch in range(4)]
    assert first_of_epoch == pytest.approx([0.0, 0.05, 0.1, 0.05])


def test_head_rung_has_equal_epochs_with_batches_of_their_own(digits: Data) -> None:
    for sampler in SAMPLED:
        planner = own_planner(
            recipe(sampler=sampler), digits, digits.train.targets, copies=2, batch_size=64
        )
        for epoch in range(5):
            plan = planner.plan(epoch, epoch / 5)
            assert int(plan.sizes.sum()) == len(digits.train)
            assert len(plan) == math.ceil(len(digits.train) / 64)


@pytest.mark.parametrize(
    ("entry", "steps"),
    [
        ({}, (3 * 8, 3 * 8)),
        ({"batch_size": 100}, (3 * 10, 3 * 10)),
        ({"batch_size": [64, 100, 512]}, (3 * 2, 3 * 16)),
        ({"batch_size": {"low": 32, "high": 333}}, (3 * 3, 3 * 32)),
    ],
)
def test_study_knows_the_fewest_and_most_steps_of_its_trials(
    entry: dict[str, Any], steps: tuple[int, int]
) -> None:
    fixed = {"data": {"name": "digits"}, "model": {"name": "linear"}}
    space = parse_space(
        {"training": {"single_stage": entry}}, fixed, epochs=3, seed=0, where="here"
    )
    kinds = {type(e) for e in space.parts["training"]["single_stage"].values()}
    assert kinds <= {Fixed, Choice, Range}
    assert space.steps(1000) == steps


def test_card_of_a_trial_says_its_budget_in_steps(make_session: MakeSession, digits: Data) -> None:
    session = make_session(budget={"trials": 2, "epochs": 2})
    run_next(session, digits)
    trial = session.study.trials[0]
    metrics = collect_metrics(session, trial, trial.user_attrs, digits, None)
    card = model_card(session, trial, digits, metrics).replace("\n", " ")
    each = math.ceil(len(digits.train) / 64)
    assert f"2 epochs of {each} optimizer steps, {2 * each} in all, with 64 images each" in card
