"""Optimizers: which parameters decay, and that they are torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tuner.optim import OPTIMIZERS, SGD, AdamW, OptimizerComponent


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def decays(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    return {name: decay[id(p)] for name, p in model.named_parameters() if id(p) in decay}


@pytest.mark.parametrize("component", [SGD(weight_decay=0.1), AdamW(weight_decay=0.1)], ids=repr)
def test_norms_and_biases_do_not_decay(component: OptimizerComponent) -> None:
    model = network()
    assert decays(component.build(model), model) == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.1,
        "3.bias": 0.0,
    }


def test_decay_norm_lets_everything_decay_but_what_is_named() -> None:
    model = network()
    optimizer = SGD(weight_decay=0.1, decay_norm=True).build(model, no_decay=["3.weight"])
    spared = [name for name, decay in decays(optimizer, model).items() if decay == 0]
    assert spared == ["3.weight"]


def test_unknown_name_without_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.bias"):
        SGD().build(network(), no_decay=["head.bias"])


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = AdamW().build(model)
    assert set(decays(optimizer, model)) == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_no_group_is_empty() -> None:
    optimizer = SGD(decay_norm=True).build(network())
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("component", "oracle"),
    [
        (
            SGD(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01, decay_norm=True),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01),
        ),
        (
            AdamW(lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, decay_norm=True),
            lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1),
        ),
    ],
    ids=["sgd", "adamw"],
)
def test_steps_are_those_of_torch(
    component: OptimizerComponent, oracle: Callable[..., torch.optim.Optimizer]
) -> None:
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizers = component.build(ours), oracle(theirs.parameters())
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_sgd_without_momentum_accepts_nesterov() -> None:
    SGD(momentum=0.0, nesterov=True).build(network())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_learning_rate_must_be_positive(name: str) -> None:
    component: Any = OPTIMIZERS[name]
    with pytest.raises(ValidationError, match="lr"):
        component(lr=0.0)
