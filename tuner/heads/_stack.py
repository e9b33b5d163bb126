"""A stack of classifiers that are trained together and know nothing of each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.heads._settings import COSINE_PACE, MOMENTUM, WEIGHT_DECAY
from tuner.models import CosineHead, Head
from tuner.placing import placed
from tuner.rows import Table
from tuner.seeding import seeded

TINY = 1e-12


class Stack:
    """Weights (K, C, D), biases (K, C, 1) and their momentum: one linear or cosine head per lane.

    The matrix products are batched: each lane's has the same shape wherever it lies and however
    many there are, so that its bits are the same. One large product would be faster (by up to
    1.4 where classes are few) but leaves the bits to where a library draws its blocks. For the
    same reason the width is in whole lines, see ``tuner.rows``; of it, ``features``
    are real and the rest zero.
    """

    def __init__(
        self,
        lanes: int,
        classes: int,
        width: int,
        *,
        features: int,
        head: Head,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.features, self.head, self.device = features, head, device
        self.weight = torch.zeros(lanes, classes, width, dtype=dtype, device=device)
        self.bias = torch.zeros(lanes, classes, 1, dtype=dtype, device=device)
        self.momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)
        self.pace = torch.ones(lanes, 1, 1, dtype=dtype, device=device)
        self.table = Table(lanes, classes, dtype, device)

    def __len__(self) -> int:
        return len(self.weight)

    def admit(self, lane: int, seed: int, *, bias: float | None, scale: float) -> None:
        """Overwrite a lane with an untrained classifier, whose outputs the loss will scale.

        A linear one starts at zero, as the problem is convex and a random start only noise; a
        cosine one at directions drawn from ``seed``.
        """
        self.weight[lane] = 0.0 if self.head == "linear" else self._directions(seed)
        self.pace[lane] = COSINE_PACE / scale**2 if self.head == "cosine" else 1.0
        self.bias[lane] = bias or 0.0
        self.momentum[lane] = 0.0
        self.bias_momentum[lane] = 0.0
        self.table.admit(lane)

    def _directions(self, seed: int) -> Tensor:
        _, classes, width = self.weight.shape
        with seeded(seed, "head"):
            drawn = CosineHead(self.features, classes).weight.detach()
        return placed(pad(drawn, (0, width - self.features)), self.device)

    def keep(self, lanes: list[int]) -> None:
        """Only the given lanes, in that order; the table must be noted before the next step."""
        kept = torch.tensor(lanes, dtype=torch.int64)
        self.table.keep(kept)
        chosen = placed(kept, self.device)
        for name in ("weight", "bias", "momentum", "bias_momentum", "pace"):
            setattr(self, name, getattr(self, name).index_select(0, chosen))

    def logits(self, inputs: Tensor) -> Tensor:
        """mult·z + add of the lanes' losses, (K, C, B), for inputs (1 or K, B, D)."""
        mult, add = self.table["mult"][:, :, None], self.table["add"][:, :, None]
        self.acting = self.weight
        if self.head == "cosine":
            self.norm = self.weight.norm(dim=2, keepdim=True).clamp_(min=TINY)
            self.acting = self.weight / self.norm
        scaled = self.acting * mult if self.table.scaled else self.acting
        lanes, _, width = self.weight.shape
        columns = inputs.transpose(1, 2).expand(lanes, width, inputs.shape[1])
        return torch.bmm(scaled, columns).add_(self.bias * mult + add)

    def step(self, inputs: Tensor, gradient: Tensor, rate: Tensor) -> None:
        """One step of SGD from the gradient (K, C, B) by the last ``logits``.

        ``rate`` is (K, 1, 1) or of one element. Weights decay, biases do not.
        """
        lanes, _, width = self.weight.shape
        rows = inputs.expand(lanes, inputs.shape[1], width)
        if self.table.scaled:
            gradient = gradient * self.table["mult"][:, :, None]
        if self.head == "cosine":
            change = torch.bmm(gradient, rows)
            inward = (change * self.acting).sum(2, keepdim=True)
            change.addcmul_(self.acting, inward, value=-1).div_(self.norm)
            self.momentum.mul_(MOMENTUM).add_(change)
        else:
            self.momentum.baddbmm_(gradient, rows, beta=MOMENTUM)
        self.momentum.add_(self.weight, alpha=WEIGHT_DECAY)
        self.weight.addcmul_(self.momentum, rate * self.pace, value=-1)
        if self.head == "linear":
            self._step_bias(gradient, rate)

    def _step_bias(self, gradient: Tensor, rate: Tensor) -> None:
        change = gradient.sum(2, keepdim=True)
        self.bias_momentum.mul_(MOMENTUM).add_(change)
        # In two operations: biases do not fill lines, and fused ones round otherwise at the end.
        self.bias.sub_(self.bias_momentum * rate)

    def classifier(self, lane: int) -> tuple[Tensor, Tensor | None]:
        """Copies of the weight (C, D) and the bias (C,), None for a cosine head."""
        bias = None if self.head == "cosine" else self.bias[lane].flatten().clone()
        return self.weight[lane].clone(), bias
