"""A recipe on its way through batches of its own, and the steps that lie ahead of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.heads._plans import Plan, own_planner
from tuner.heads._work import Material, Order
from tuner.placing import placed
from tuner.rows import Batch, Row, Table, bare_row, row_of

CHUNK = 64
"""Steps that are planned ahead at most."""


class Lane:
    """A recipe on its way: how far it has come, and the plan of its epoch."""

    def __init__(self, order: Order, material: Material) -> None:
        self.order, self.material = order, material
        self.planner = own_planner(
            order.recipe,
            material.data,
            material.targets,
            copies=material.copies,
            batch_size=material.settings.batch_size,
        )
        self.sampler = self.planner.sampler
        self.epoch = self.steps = 0
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Draw the epoch's plan, and switch on what is deferred until now."""
        progress = self.epoch / self.material.settings.epochs
        self.order.loss.advance(progress)
        self.plan: Plan = self.planner.plan(self.epoch, progress)
        self.sizes: list[int] = self.plan.sizes.tolist()
        self.step = 0
        self.total = 0.0

    def end_epoch(self) -> None:
        """Count the epoch, and hand its losses to a sampler that asks for them."""
        self.epoch += 1
        if self.noted:
            indices, losses = zip(*self.noted, strict=True)
            self.sampler.observe(torch.cat(indices), torch.cat(losses).cpu())
            self.noted.clear()

    @property
    def left(self) -> int:
        """Steps that are left of the epoch."""
        return len(self.plan) - self.step

    @property
    def size(self) -> int:
        """Samples of the next step."""
        return self.sizes[self.step]

    @property
    def is_done(self) -> bool:
        """Whether all epochs are trained."""
        return self.epoch == self.material.settings.epochs

    @property
    def train_loss(self) -> float:
        """Mean loss over the epoch's samples."""
        return self.total / sum(self.sizes)

    @property
    def age(self) -> tuple[int, int]:
        """What the learning rates ahead depend on."""
        return self.epoch, self.step

    def rates(self, steps: int) -> list[float]:
        """Learning rates of so many steps ahead."""
        settings = self.material.settings
        shares = [(self.step + step) / len(self.plan) for step in range(steps)]
        return [settings.rate((self.epoch + share) / settings.epochs) for share in shares]

    def row(self) -> Row:
        """The row of the loss as it acts now; that of bare logits if it has none."""
        return row_of(self.order.loss) or bare_row(self.order.loss)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Steps that lie ahead of all lanes, on their device: no step copies anything there.

    ``places``, ``targets`` and ``weights`` are (S, K, B), the others (S, K) and ``decay``
    (S, K, 1).
    """

    places: Tensor
    targets: Tensor
    weights: Tensor
    sizes: Tensor
    ages: Tensor
    rates: Tensor
    decay: Tensor | None

    def batch(self, step: int, hit: Tensor) -> Batch:
        """What the gradients of a step need to know."""
        decay = None if self.decay is None else self.decay[step]
        sizes, weight = self.sizes[step][:, None], self.weights[step][:, None]
        return Batch(self.targets[step], hit, weight, sizes, self.ages[step], decay)


def chunk_of(lanes: Sequence[Lane], material: Material, table: Table, *, decays: bool) -> Chunk:
    """The steps until a lane's epoch ends, or the next of them."""
    steps, device = min(CHUNK, *(lane.left for lane in lanes)), material.device

    def ahead(name: str) -> Tensor:
        parts = [getattr(lane.plan, name)[lane.step : lane.step + steps] for lane in lanes]
        return torch.stack(parts, 1)

    ages = [range(lane.steps, lane.steps + steps) for lane in lanes]
    sizes = ahead("sizes")
    sizes_there, ages_there = placed(torch.stack((sizes, torch.tensor(ages).t())), device)
    rates, places = _rates(lanes, steps, material.dtype), placed(ahead("places"), device)
    real = torch.arange(places.shape[2], device=device) < sizes_there[:, :, None]
    return Chunk(
        places,
        placed(ahead("targets"), device),
        real.to(material.dtype) / sizes_there[:, :, None],
        sizes_there,
        ages_there,
        placed(rates, device),
        placed(table.decay(sizes), device) if decays else None,
    )


def _rates(lanes: Sequence[Lane], steps: int, dtype: torch.dtype) -> Tensor:
    """Learning rates (S, K); those of lanes of one age are computed once."""
    of_age = {lane.age: lane for lane in lanes}
    rates = {age: lane.rates(steps) for age, lane in of_age.items()}
    return torch.tensor([rates[lane.age] for lane in lanes], dtype=dtype).t().contiguous()
