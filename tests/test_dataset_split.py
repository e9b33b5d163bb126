"""Splits: complete, disjoint, capped-balanced, and every class on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tuner.datasets import validation_counts
from tuner.datasets._split import Split, split
from tuner.imbalance import class_counts


def test_capped_balanced_validation_counts() -> None:
    counts = torch.tensor([5000, 100, 99, 51, 10, 5, 4, 3, 2, 1])
    assert validation_counts(counts, 0.2, 20).tolist() == [20, 20, 20, 10, 2, 2, 2, 1, 1, 0]
    assert validation_counts(counts, 0.2, 0).tolist() == [1000, 20, 20, 10, 2, 2, 2, 1, 1, 0]
    assert validation_counts(counts, 0.2, 1).tolist() == [1] * 9 + [0]


def divided(targets: Tensor, names: Sequence[str], **changes: Any) -> Split:
    rules: dict[str, Any] = {
        "seed": 0,
        "test_fraction": 0.2,
        "validation_fraction": 0.2,
        "validation_cap": 20,
        "carve": lambda available: available,
    }
    return split(targets, names, **(rules | changes))


@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    test_fraction=st.none() | st.floats(0.01, 0.5),
    validation_fraction=st.none() | st.floats(0.01, 0.5),
    cap=st.integers(0, 10),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_split_is_complete_disjoint_and_leaves_every_class_to_train(
    counts: list[int],
    test_fraction: float | None,
    validation_fraction: float | None,
    cap: int,
    seed: int,
) -> None:
    names = [str(i) for i in range(len(counts))]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[order]
    plan = divided(
        targets,
        names,
        seed=seed,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        validation_cap=cap,
    )
    parts = [part for part in (plan.train, plan.validation, plan.test) if part is not None]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(targets)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    train = class_counts(targets[plan.train], len(counts))
    assert bool((train >= 1).all())
    if plan.validation is not None:
        validation = class_counts(targets[plan.validation], len(counts))
        assert torch.equal(plan.pool_counts, train + validation)
        assert bool((2 * validation <= plan.pool_counts).all())
        assert cap == 0 or int(validation.max()) <= cap


@given(seed=st.integers(0, 1000), others=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_the_split_of_a_class_is_its_own(seed: int, others: list[int]) -> None:
    alone = divided(torch.zeros(25, dtype=torch.int64), ["cat"], seed=seed)
    counts = torch.tensor([25, *others])
    targets = torch.repeat_interleave(torch.arange(len(counts)), counts)
    names = ["cat", *(str(i) for i in range(len(others)))]
    company = divided(targets, names, seed=seed)
    assert alone.train.tolist() == [i for i in company.train.tolist() if i < 25]
