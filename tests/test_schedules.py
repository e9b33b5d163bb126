"""Schedules against the published ones, and at the edges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tuner.schedules import SCHEDULES, Constant, Cosine, Schedule, Step, deferred

GOLDEN = json.loads((Path(__file__).parent / "golden" / "samplers.json").read_text("utf-8"))
ALL = [Constant(), Step(), Step(per_epoch=True), Cosine(), Cosine(warmup_epochs=0, final=0.1)]


@pytest.mark.parametrize(("epoch", "lr"), GOLDEN["schedules"]["class_balanced_cifar"])
def test_step_is_the_schedule_of_the_class_balanced_paper(epoch: float, lr: float) -> None:
    assert 0.1 * Step().factor(epoch, 200) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("epoch", "lr"), GOLDEN["schedules"]["ldam_drw"])
def test_step_per_epoch_is_the_schedule_of_ldam(epoch: int, lr: float) -> None:
    schedule = Step(per_epoch=True)
    assert 0.1 * schedule.factor(epoch, 200) == pytest.approx(lr, rel=1e-12)
    assert schedule.factor(epoch + 0.99, 200) == schedule.factor(epoch, 200)


def test_cosine_after_its_warm_up_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=95, eta_min=0.1)
    schedule = Cosine(warmup_epochs=5, final=0.1)
    for epoch in range(5, 100):
        assert schedule.factor(epoch, 100) == pytest.approx(oracle.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        oracle.step()
    assert schedule.factor(2.5, 100) == 0.5


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("epochs", [1, 2, 7, 200])
def test_factor_stays_between_nothing_and_the_full_rate(schedule: Schedule, epochs: int) -> None:
    factors = [schedule.factor(i / 16, epochs) for i in range(epochs * 16)]
    assert min(factors) >= 0
    assert max(factors) == pytest.approx(1)


@pytest.mark.parametrize("schedule", [Step(), Cosine()], ids=repr)
def test_warm_up_takes_at_most_half_of_a_short_training(schedule: Schedule) -> None:
    assert schedule.warmup_end(200) == 0.025
    assert schedule.warmup_end(4) == 0.5
    assert schedule.factor(2, 4) == 1
    assert schedule.factor(1, 4) == 0.5
    assert Constant().warmup_end(4) == 0


@pytest.mark.parametrize("start", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("epochs", [10, 20, 60, 100, 200, 300])
def test_deferred_part_starts_exactly_at_its_epoch(start: float, epochs: int) -> None:
    waiting = [deferred(epoch / epochs, start) for epoch in range(epochs)]
    assert sum(waiting) == round(start * epochs)
    assert not deferred(0.0, 0.0)


def test_schedules_are_found_by_name() -> None:
    assert set(SCHEDULES) == {"constant", "step", "cosine"}
