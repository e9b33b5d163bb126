"""Losses of all families side by side: each seat has the gradient, and the memory, of its own."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from head_cases import CASES, unlike
from test_heads_losses import BY_MODULE, COUNTS, built
from torch import Tensor

from tuner.losses import EqualizationLoss, Loss
from tuner.rows import GRADIENTS
from tuner.stacks._losses import RowLosses
from tuner.stacks._optimizers import Parts

KINDS = [case for case in CASES if case not in BY_MODULE]
CLASSES, SIZE = len(COUNTS), 37


def losses_of_all(progress: float) -> list[Loss]:
    return [built(case, progress)[0].train() for case in KINDS]


def seated(losses: list[Loss]) -> tuple[RowLosses, Parts]:
    """Each loss in a seat, and what all need together."""
    table = RowLosses(len(losses), CLASSES, torch.float64, torch.device("cpu"))
    needs = [table.admit(loss, loss, seat) for seat, loss in enumerate(losses)]
    return table, frozenset().union(*needs)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Logits (K, B, C), cosines for all, and targets (K, B)."""
    draws = torch.Generator().manual_seed(step)
    logits = torch.rand(len(KINDS), SIZE, CLASSES, generator=draws, dtype=torch.float64) * 2 - 1
    return logits, torch.randint(CLASSES, (len(KINDS), SIZE), generator=draws)


@pytest.mark.parametrize("progress", [0.0, 0.75])
def test_every_seat_has_the_gradient_of_its_loss_step_after_step(progress: float) -> None:
    table, parts = seated(losses_of_all(progress))
    frame, alone = table.frame(SIZE), losses_of_all(progress)
    for step in range(3):
        logits, targets = batch(step)
        found, values = table.gradient(logits, targets, targets, frame, None, parts)
        for seat, loss in enumerate(alone):
            leaf = logits[seat].clone().requires_grad_()
            value = loss(leaf, targets[seat])
            (expected,) = torch.autograd.grad(value, leaf)
            assert unlike(found[seat], expected) < 1e-10, KINDS[seat]
            assert values[seat].item() == pytest.approx(value.item(), rel=1e-10)


def test_seats_that_leave_classes_out_draw_by_their_own_seeds() -> None:
    seeds = (0, 1, 2**31 - 1)
    losses = [sparing(seed) for seed in seeds]
    table, parts = seated([*losses])
    frame, alone = table.frame(SIZE), [sparing(seed) for seed in seeds]
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(1, SIZE, CLASSES, generator=draws, dtype=torch.float64).expand(3, -1, -1)
    targets = torch.randint(CLASSES, (1, SIZE), generator=draws).expand(3, -1)
    _, values = table.gradient(logits, targets, targets, frame, None, parts)
    expected = [loss(logits[0], targets[0]).item() for loss in alone]
    assert values.tolist() == pytest.approx(expected, rel=1e-10)
    assert len(set(values.tolist())) == 3


def sparing(seed: int) -> Loss:
    loss = EqualizationLoss(COUNTS, gamma=0.5, threshold=1.0).follow(seed)
    return loss.train()


def test_loss_in_a_seat_remembers_what_it_would_remember_alone() -> None:
    losses, alone = losses_of_all(0.75), losses_of_all(0.75)
    table, parts = seated(losses)
    frame = table.frame(SIZE)
    for step in range(2):
        logits, targets = batch(step)
        table.gradient(logits, targets, targets, frame, None, parts)
        for seat, loss in enumerate(alone):
            loss(logits[seat], targets[seat])
    for one, other in zip(losses, alone, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_seat_that_takes_no_part_remembers_nothing() -> None:
    losses = losses_of_all(0.75)
    table, parts = seated(losses)
    logits, targets = batch(0)
    active = torch.zeros(len(KINDS), 1, dtype=torch.bool)
    before = [{n: t.clone() for n, t in loss.state_dict().items()} for loss in losses]
    table.gradient(logits, targets, targets, table.frame(SIZE), active, parts)
    for loss, known in zip(losses, before, strict=True):
        assert all(torch.equal(tensor, known[name]) for name, tensor in loss.state_dict().items())


def test_memory_of_a_seat_that_takes_no_part_is_untouched_at_every_moment_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = losses_of_all(0.75)
    table, parts = seated(losses)
    logits, targets = batch(0)
    table.gradient(logits, targets, targets, table.frame(SIZE), None, parts)
    own = table.tensors()
    before, seen = [tensor.clone() for tensor in own], list[bool]()
    original = GRADIENTS["adaptive"]

    def watched(*arguments: Any) -> Any:
        found = original(*arguments)
        seen.append(all(map(torch.equal, own, before)))
        return found

    monkeypatch.setitem(cast("dict[str, Any]", GRADIENTS), "adaptive", watched)
    active = torch.zeros(len(KINDS), 1, dtype=torch.bool)
    table.gradient(*batch(1), targets, table.frame(SIZE), active, parts)
    assert seen == [True]


def test_gradient_does_not_depend_on_what_neighbours_need() -> None:
    logits, targets = batch(0)
    table, parts = seated(losses_of_all(0.75))
    together, _ = table.gradient(logits, targets, targets, table.frame(SIZE), None, parts)
    for seat, loss in enumerate(losses_of_all(0.75)):
        own = RowLosses(len(KINDS), CLASSES, torch.float64, torch.device("cpu"))
        needs = own.admit(loss, loss, seat)
        found, _ = own.gradient(logits, targets, targets, own.frame(SIZE), None, needs)
        assert torch.equal(found[seat], together[seat]), KINDS[seat]
