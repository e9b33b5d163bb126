"""Gradients of all seats' losses, and those by rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.losses import Loss
from tuner.placing import placed
from tuner.rows import GRADIENTS, Batch, Kind, Row, Table, lines, plain_gradient, row_of
from tuner.stacks._optimizers import Parts

Family = Kind | Literal["plain"]

FAMILIES: tuple[Family, ...] = ("plain", *GRADIENTS)


@dataclass(frozen=True, eq=False)
class Frame:
    """What batches of one size have in common.

    ``weight`` (K, 1, B') is that of each sample, of which there are whole lines, 0 for those that
    fill up; ``sizes`` (1, 1) the number of real ones; ``decay`` (K, 1) what sums that remember
    keep after such a batch.
    """

    weight: Tensor
    sizes: Tensor
    decay: Tensor


class SeatLosses(Protocol):
    """The losses of all seats."""

    def admit(self, loss: Loss, here: Loss, seat: int) -> Parts:
        """Overwrite a seat by a loss as it acts now, and let the loss work on its state there.

        ``here`` is the same loss on the processor, where nobody has to wait for its numbers.

        Returns:
            What it needs of a step.
        """

    def part(self, loss: Loss) -> None:
        """Give a loss its state in tensors of its own."""

    def frame(self, size: int) -> Frame:
        """What batches of so many samples have in common."""

    def renew(self, frame: Frame, size: int) -> None:
        """Let a frame be as the losses are now."""

    def gradient(
        self,
        logits: Tensor,
        soft: Tensor,
        targets: Tensor,
        frame: Frame,
        active: Tensor | None,
        parts: Parts,
    ) -> tuple[Tensor, Tensor]:
        """Gradients (K, B, C) by logits (K, B, C), and the losses (K,) of the batches.

        Targets are (K, B), soft ones (1, B, C). Only seats that are ``active`` (K, 1), all if None,
        remember the batch. ``parts`` is what lanes need.
        """

    def tensors(self) -> list[Tensor]:
        """All that changes in a step."""


class RowLosses:
    """Losses that have rows; see ``SeatLosses`` and ``tuner.rows``.

    Gradients of all families of losses that lanes need are computed for all seats, and each seat
    takes its own: a lane of any family takes any seat.
    """

    def __init__(self, seats: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.table = Table(seats, classes, dtype, device, recorded=True)
        self.steps = torch.zeros(seats, dtype=torch.int64, device=device)
        self.host = torch.zeros(len(FAMILIES), seats, 1, dtype=torch.bool)
        self.member = placed(self.host, device).clone()
        self.classes = torch.arange(classes, device=device)[:, None]

    def admit(self, loss: Loss, here: Loss, seat: int) -> Parts:
        """See ``SeatLosses``."""
        row = row_of(here)
        assert row is not None
        own = family_of(row)
        self.table.set(seat, row)
        self.table.note()
        self.host[:, seat] = torch.tensor([[family == own] for family in FAMILIES])
        self.member.copy_(placed(self.host, self.member.device))
        views = {"steps": self.steps[seat]} | {n: t[seat] for n, t in self.table.state.items()}
        for name, buffer in loss.state_dict().items():
            if buffer.data_ptr() != views[name].data_ptr():
                views[name].copy_(buffer)
                setattr(loss, name, views[name])
        return parts_of(row)

    def part(self, loss: Loss) -> None:
        """See ``SeatLosses``."""
        for name, buffer in loss.state_dict().items():
            setattr(loss, name, buffer.clone())

    def tensors(self) -> list[Tensor]:
        """See ``SeatLosses``."""
        return [self.steps, *self.table.state.values()]

    def frame(self, size: int) -> Frame:
        """See ``SeatLosses``."""
        seats, device = len(self.steps), self.steps.device
        real = (torch.arange(lines(size)) < size).to(self.table.dtype) / size
        weight = placed(real.expand(seats, 1, -1).contiguous(), device)
        sizes = placed(torch.full((1, 1), size), device)
        found = Frame(weight, sizes, weight.new_zeros(seats, 1))
        self.renew(found, size)
        return found

    def renew(self, frame: Frame, size: int) -> None:
        """See ``SeatLosses``."""
        sizes = torch.full((1, len(self.steps)), size)
        frame.decay.copy_(placed(self.table.decay(sizes)[0], self.steps.device))

    def gradient(
        self,
        logits: Tensor,
        soft: Tensor,
        targets: Tensor,
        frame: Frame,
        active: Tensor | None,
        parts: Parts,
    ) -> tuple[Tensor, Tensor]:
        """See ``SeatLosses``."""
        size = targets.shape[1]
        more = (0, frame.weight.shape[2] - size)
        u, filled = logits.transpose(1, 2).contiguous(), targets
        if more[1]:
            u, filled = pad(u, more), pad(targets, more)
        hit = (filled[:, None] == self.classes).to(u.dtype)
        batch = Batch(filled, hit, frame.weight, frame.sizes, self.steps, frame.decay)
        mult = self.table["mult"][:, :, None]
        if "scaled" in parts:
            u = u.mul_(mult).add_(self.table["add"][:, :, None])
        gradient, losses = self._of_families(u, batch, active, parts)
        if "spared" in parts:
            self.steps.add_(1 if active is None else active[:, 0])
        if "scaled" in parts:
            gradient = gradient * mult
        return gradient[:, :, :size].transpose(1, 2), losses.double().sum((1, 2))

    def _of_families(
        self, u: Tensor, batch: Batch, active: Tensor | None, parts: Parts
    ) -> tuple[Tensor, Tensor]:
        """Gradients (K, C, B') and losses (K, 1, B'), of each seat those of its own family."""
        needed = [family for family in FAMILIES if family in parts]
        found: tuple[Tensor, Tensor] | None = None
        for family in needed:
            member = self.member[FAMILIES.index(family)]
            own = u if family == needed[-1] else u.clone()
            if family == "plain":
                new = plain_gradient(own, batch, self.table, parts)
            else:
                new = self._of_family(family, own, batch, member, active)
            found = new if found is None else _chosen(member, new, found)
        assert found is not None
        return found

    def _of_family(
        self, family: Kind, u: Tensor, batch: Batch, member: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient and losses of all seats; only members that are active remember the batch.

        What seats remember is worked on in a copy: of those that take no part, somebody may be
        reading it.
        """
        remembers, state = family == "adaptive", self.table.state
        if remembers:
            self.table.state = {name: tensor.clone() for name, tensor in state.items()}
        try:
            gradient, losses = GRADIENTS[family](u, batch, self.table, True)
            after = self.table.state
        finally:
            self.table.state = state
        own = member if active is None else member & active
        for name, now in after.items() if remembers else ():
            torch.where(own, now, state[name], out=state[name])
        assert losses is not None
        return gradient, losses


def family_of(row: Row) -> Family:
    """Losses of a kind that are not focal go through fewer operations."""
    return "plain" if row.kind == "softmax" and row.gamma == 0 else row.kind


def parts_of(row: Row) -> Parts:
    """What a row needs of a step: see ``RowLosses.gradient`` and ``plain_gradient``."""
    needs = {
        "scaled": bool((row.mult != 1).any() or (row.add != 0).any()),
        "margins": bool((row.margin != 0).any()),
        "weighted": bool((row.weight != 1).any()),
    }
    return frozenset({family_of(row), *(name for name, needed in needs.items() if needed)})


def _chosen(
    member: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the seats that are ``member`` (K, 1) the new gradients and losses, else the old ones."""
    seats = member[:, :, None]
    return torch.where(seats, new[0], old[0]), torch.where(seats, new[1], old[1])
