"""Gradients of the losses that have rows, in closed form, for a stack of lanes at once.

Logits are (K, C, B): lanes, classes, samples. Samples come last because softmax over any other
axis than the last is vectorised across samples, which for ten classes is twenty times as fast.
Every operation treats lanes alike and apart: a lane's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tuner.placing import CPU, placed
from tuner.rows._rows import Row

VECTORS = ("weight", "mult", "add", "margin", "eps", "spared")
NUMBERS = ("gamma", "gamma_neg", "floor", "half_life", "seed_high", "seed_low")
STATE = {"missed": 0.0, "seen": 0.0, "rate": 1.0}


@dataclass(frozen=True, eq=False)
class Batch:
    """Classes of the samples, of one batch for all lanes or of one per lane.

    ``hit`` (1 or K, C, B) is 1 at the class of each sample, else 0; ``targets`` are (B,) or
    (K, B). ``weight`` (K, 1, B) counts each sample in its lane's gradient, 1/B included.
    ``sizes`` (1 or K, 1) are the numbers of samples, ``steps`` (1 or K,) those of the steps
    that went before. ``decay`` (1 or K, 1) is what losses that remember keep of the past.
    """

    targets: Tensor
    hit: Tensor
    weight: Tensor
    sizes: Tensor
    steps: Tensor
    decay: Tensor | None = None

    def pick(self, table: Tensor) -> Tensor:
        """Values (K, 1, B) of a table (K, C) at the samples' classes."""
        if self.targets.ndim == 1:
            return table.index_select(1, self.targets)[:, None]
        return table.gather(1, self.targets)[:, None]

    def own(self, values: Tensor) -> Tensor:
        """Of values (K, C, B) those of each sample's class, (K, 1, B)."""
        return values.gather(1, self.targets.expand(len(values), -1)[:, None])


class Table:
    """The rows of all lanes: set on the CPU, and on the lanes' device as of the last ``note``.

    Of one that is ``recorded`` the steps are in a graph: they find rows and state where they were,
    and leave nothing out that some later row may need.
    """

    def __init__(
        self,
        lanes: int,
        classes: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        *,
        recorded: bool = False,
    ) -> None:
        self.dtype, self.device, self.recorded = dtype, device, recorded
        self.vectors = torch.zeros(len(VECTORS), lanes, classes, dtype=dtype)
        self.numbers = torch.zeros(len(NUMBERS), lanes, 1, 1, dtype=dtype)
        self.state = {
            name: torch.zeros(lanes, classes, dtype=dtype, device=device) for name in STATE
        }
        self.noted: tuple[Tensor, ...] = ()
        self.note()

    def admit(self, lane: int) -> None:
        """Overwrite what a lane's loss remembers of its training."""
        for name, start in STATE.items():
            self.state[name][lane] = start

    def set(self, lane: int, row: Row) -> None:
        """Overwrite the row of a lane; ``note`` must follow before the next step."""
        for name, vectors in zip(VECTORS, self.vectors, strict=True):
            vectors[lane] = getattr(row, name)
        for name, numbers in zip(NUMBERS, self.numbers, strict=True):
            numbers[lane] = getattr(row, name)

    def note(self) -> None:
        """Take the rows to the device, and note what no lane uses.

        Leaving that out changes no bit of any lane.
        """
        vectors = dict(zip(VECTORS, self.vectors, strict=True))
        numbers = dict(zip(NUMBERS, self.numbers, strict=True))
        self.scaled = self.recorded or bool((vectors["mult"] != 1).any())
        self.margins = self.recorded or bool((vectors["margin"] != 0).any())
        self.focal = self.recorded or bool((numbers["gamma"] != 0).any())
        self.half_life = numbers["half_life"]
        there = placed(self.vectors, self.device), placed(self.numbers, self.device)
        if self.recorded and self.noted:
            for known, new in zip(self.noted, there, strict=True):
                known.copy_(new)
        else:
            self.noted = there
        self.acting: dict[str, Tensor] = dict(zip(VECTORS, self.noted[0], strict=True))
        self.acting |= dict(zip(NUMBERS, self.noted[1], strict=True))

    def decay(self, sizes: Tensor) -> Tensor:
        """What running sums keep, (S, K, 1), after batches of ``sizes`` (S, 1 or K) samples."""
        halves = sizes / self.half_life[:, 0, 0]
        # Number by number: powers in a tensor depend on where in it they stand.
        kept = [0.5**half for half in halves.flatten().tolist()]
        return torch.tensor(kept, dtype=self.dtype).view(*halves.shape, 1)

    def keep(self, lanes: Tensor) -> None:
        """Only the given lanes, in that order; ``note`` must follow before the next step."""
        self.vectors = self.vectors.index_select(1, lanes)
        self.numbers = self.numbers.index_select(1, lanes)
        chosen = placed(lanes, self.device)
        for name, tensor in self.state.items():
            self.state[name] = tensor.index_select(0, chosen)

    def __getitem__(self, name: str) -> Tensor:
        return self.acting[name]


Gradient = Callable[[Tensor, Batch, Table, bool], tuple[Tensor, Tensor | None]]


def softmax_gradient(
    u: Tensor, batch: Batch, table: Table, value: bool
) -> tuple[Tensor, Tensor | None]:
    """(p - hit) times the weight, and for focal lanes times d loss / d -log p_y."""
    if table.margins:
        u = u.addcmul_(batch.hit, batch.pick(table["margin"]), value=-1)
    weight = batch.weight * batch.pick(table["weight"])
    if not table.focal and not value:
        return torch.softmax(u, 1).sub_(batch.hit).mul_(weight), None
    p = torch.softmax(u, 1)
    log_p, log_q = _own(u, p, batch)
    losses = -weight * log_p
    if table.focal:
        steep, losses = _focal(log_p, log_q, losses, table["gamma"])
        weight = weight * steep
    return p.sub_(batch.hit).mul_(weight), losses if value else None


def plain_gradient(
    u: Tensor, batch: Batch, table: Table, parts: Collection[str]
) -> tuple[Tensor, Tensor]:
    """``softmax_gradient`` of lanes that are not focal, in as few operations as they need.

    These are, by the names in ``parts``: "margins" and "weighted". To leave one out that no lane
    needs changes no bit.
    """
    if "margins" in parts:
        u = u.addcmul_(batch.hit, batch.pick(table["margin"]), value=-1)
    weight = batch.weight
    if "weighted" in parts:
        weight = weight * batch.pick(table["weight"])
    log_p = torch.log_softmax(u, 1)
    losses = batch.own(log_p).mul_(weight).neg_()
    return log_p.exp_().sub_(batch.hit).mul_(weight), losses


def _own(u: Tensor, p: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """log p_y and log(1 - p_y), (K, 1, B) each, exact where p_y is near 1."""
    rest = (p * (1 - batch.hit)).sum(1, keepdim=True).clamp_(min=torch.finfo(p.dtype).tiny)
    # The largest p is 1/C at least: its logarithm is exact, and log Σ exp u with it.
    total = u.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
    log_p = torch.where(rest < 0.5, torch.log1p(-rest), batch.own(u) - total)
    return log_p, rest.log()


def _focal(log_p: Tensor, log_q: Tensor, losses: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """d [-(1 - p)^γ log p] / d [-log p], and the losses times (1 - p)^γ."""
    modulator = (gamma * log_q).exp()
    steep = modulator - gamma * (log_p + (gamma - 1) * log_q).exp() * log_p
    return steep, losses * modulator


def smooth_gradient(
    u: Tensor, batch: Batch, table: Table, value: bool
) -> tuple[Tensor, Tensor | None]:
    """With G = d loss / d log p, the gradient is G - p · ΣG."""
    weight = batch.weight * batch.pick(table["weight"])
    eps = batch.pick(table["eps"])
    share = eps / u.shape[1]
    log_all = torch.log_softmax(u, 1)
    p = log_all.exp()
    log_p, log_q = _own(u, p, batch)
    ones = torch.ones_like(log_p)
    steep, modulator = _focal(log_p, log_q, ones, table["gamma"])
    own = (1 - eps + share) * steep
    falling = table["gamma_neg"] * log_all
    kept = falling.exp()
    other = kept * (falling + 1) * share
    pull = other + (own - other) * batch.hit
    losses = None
    if value:
        spread = (kept * log_all * (1 - batch.hit)).sum(1, keepdim=True)
        losses = -weight * ((1 - eps + share) * modulator * log_p + share * spread)
    return p.mul_(pull.sum(1, keepdim=True)).sub_(pull).mul_(weight), losses


def sigmoid_gradient(
    u: Tensor, batch: Batch, table: Table, value: bool
) -> tuple[Tensor, Tensor | None]:
    """Per class with v = ±u: the gradient of σ(-v)^γ · -log σ(v)."""
    weight = batch.weight * batch.pick(table["weight"])
    if not table.focal and not value:
        return torch.sigmoid(u).sub_(batch.hit).mul_(weight), None
    sign = 2 * batch.hit - 1
    v = u * sign
    log_p, log_q = logsigmoid(v), logsigmoid(-v)
    modulator = (table["gamma"] * log_q).exp()
    slope = modulator * (table["gamma"] * log_p.exp() * log_p - log_q.exp())
    losses = -weight * (modulator * log_p).sum(1, keepdim=True) if value else None
    return slope.mul_(sign).mul_(weight), losses
