"""Gradients of the losses that draw or remember: equalization, and weights by miss rates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner.losses import equalization_draws
from tuner.rows._gradients import (
    Batch,
    Gradient,
    Table,
    sigmoid_gradient,
    smooth_gradient,
    softmax_gradient,
)
from tuner.rows._rows import HALF, Kind


def spared_gradient(
    u: Tensor, batch: Batch, table: Table, value: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax without the classes that are left out; a sample's own class never is."""
    _, classes, samples = u.shape
    first = torch.arange(samples, device=u.device) * classes
    places = first + torch.arange(classes, device=u.device)[:, None]
    seeds = table["seed_high"].long() * HALF + table["seed_low"].long()
    draws = equalization_draws(seeds, batch.steps[:, None, None], places)
    left_out = (draws < table["spared"][:, :, None]) & (batch.hit == 0)
    absent = torch.finfo(u.dtype).min / 4
    return softmax_gradient(u.masked_fill_(left_out, absent), batch, table, value)


def adaptive_gradient(
    u: Tensor, batch: Batch, table: Table, value: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax with weights from the rates so far; then the batch counts for the rates."""
    importance = batch.pick(table.state["rate"].maximum(table["floor"][:, 0]))
    total = batch.weight.sum(2, keepdim=True)
    mean = (batch.weight * importance).sum(2, keepdim=True) / total
    missed = (u.argmax(1) != batch.targets).to(u.dtype)[:, None]
    weighted = Batch(
        batch.targets,
        batch.hit,
        batch.weight * (importance / mean),
        batch.sizes,
        batch.steps,
    )
    found = softmax_gradient(u, weighted, table, value)
    _observe(missed, batch, table)
    return found


def _observe(missed: Tensor, batch: Batch, table: Table) -> None:
    """Rate of each class: the ratio of two running sums that decay with every sample."""
    counted = batch.hit * batch.weight * batch.sizes[:, :, None]
    assert batch.decay is not None
    sums = {"missed": (counted * missed).sum(2), "seen": counted.sum(2)}
    for name, now in sums.items():
        table.state[name].mul_(batch.decay).add_(now)
    missed, seen = table.state["missed"], table.state["seen"]
    rate = table.state["rate"]
    rate.copy_(torch.where(seen > 0, missed / seen, rate))


GRADIENTS: Mapping[Kind, Gradient] = {
    "softmax": softmax_gradient,
    "smooth": smooth_gradient,
    "sigmoid": sigmoid_gradient,
    "spared": spared_gradient,
    "adaptive": adaptive_gradient,
}
