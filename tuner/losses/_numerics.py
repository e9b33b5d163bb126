"""Sums over "all other classes" that neither overflow nor cancel, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(logits: Tensor) -> Tensor:
    """``logits`` in float32 if they come in half precision, else unchanged."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) of the log probabilities ``log_p``, (N, C), finite with its gradient.

    Only the largest class can have p near 1, where ``log1p(-p)`` would be -inf; its value
    comes from the log-sum-exp of the other classes instead.
    """
    largest = _largest(log_p)
    others = log_p.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(largest, others, torch.log1p(-log_p.exp().masked_fill(largest, 0.0)))


def sum_of_others(values: Tensor) -> Tensor:
    """Sum over the other classes, (N, C), of non-negative ``values`` (N, C).

    ``total - value`` cancels badly for the largest value of a row only (float32: 1e-3 off
    at 1e4), so that one is summed separately.
    """
    largest = _largest(values)
    total = values.sum(dim=1, keepdim=True)
    others = values.masked_fill(largest, 0.0).sum(dim=1, keepdim=True)
    return torch.where(largest, others, total - values)


def _largest(values: Tensor) -> Tensor:
    """Mask (N, C), true at one largest entry of each row."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    return mask.scatter(1, values.argmax(dim=1, keepdim=True), True)
