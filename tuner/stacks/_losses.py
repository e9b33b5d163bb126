"""Gradients of all seats' losses: by rows of a table, or by one lane's own module."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.losses import Loss
from tuner.placing import placed
from tuner.rows import GRADIENTS, Batch, Kind, Table, lines, row_of
from tuner.stacks._device import Uncapturable

FAMILIES: tuple[Kind, ...] = tuple(GRADIENTS)


class SeatLosses(Protocol):
    """The losses of all seats."""

    parts: frozenset[str]
    """What lanes so far needed; a step is recorded for these."""

    def admit(self, loss: Loss, here: Loss, seat: int) -> None:
        """Overwrite a seat by a loss as it acts now, and let the loss work on its state there.

        ``here`` is the same loss on the processor, where nobody has to wait for its numbers.
        """

    def part(self, loss: Loss) -> None:
        """Give a loss its state in tensors of its own."""

    def gradient(
        self, logits: Tensor, soft: Tensor, targets: Tensor, decay: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients (K, B, C) by logits (K, B, C), and the losses (K,) of the batches.

        Targets are (K, B), soft ones (1, B, C); ``decay`` (K, 1) is that of batches of this size.
        Only seats that are ``active`` (K, 1), all if None, remember the batch.
        """

    def decay(self, size: int) -> Tensor:
        """What sums that remember keep after a batch of so many samples, (K, 1)."""

    def tensors(self) -> list[Tensor]:
        """All that changes in a step."""


class RowLosses:
    """Losses that have rows; see ``SeatLosses`` and ``tuner.rows``.

    Gradients of all families of losses that lanes have had so far are computed for all seats, and
    each seat takes its own: a lane of any of them takes a seat without anything recorded anew.
    """

    def __init__(self, seats: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.table = Table(seats, classes, dtype, device, recorded=True)
        self.steps = torch.zeros(seats, dtype=torch.int64, device=device)
        self.host = torch.zeros(len(FAMILIES), seats, 1, dtype=torch.bool)
        self.member = placed(self.host, device).clone()
        self.classes = torch.arange(classes, device=device)[:, None]
        self.parts: frozenset[str] = frozenset()

    def admit(self, loss: Loss, here: Loss, seat: int) -> None:
        """See ``SeatLosses``."""
        row = row_of(here)
        assert row is not None
        self.table.set(seat, row)
        self.table.note()
        self.host[:, seat] = torch.tensor([[family == row.kind] for family in FAMILIES])
        self.member.copy_(placed(self.host, self.member.device))
        self.parts |= {row.kind}
        views = {"steps": self.steps[seat]} | {n: t[seat] for n, t in self.table.state.items()}
        for name, buffer in loss.state_dict().items():
            if buffer.data_ptr() != views[name].data_ptr():
                views[name].copy_(buffer)
                setattr(loss, name, views[name])

    def part(self, loss: Loss) -> None:
        """See ``SeatLosses``."""
        for name, buffer in loss.state_dict().items():
            setattr(loss, name, buffer.clone())

    def tensors(self) -> list[Tensor]:
        """See ``SeatLosses``."""
        return [self.steps, *self.table.state.values()]

    def decay(self, size: int) -> Tensor:
        """See ``SeatLosses``."""
        sizes = torch.full((1, len(self.steps)), size)
        return placed(self.table.decay(sizes)[0], self.steps.device)

    def gradient(
        self, logits: Tensor, soft: Tensor, targets: Tensor, decay: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``SeatLosses``."""
        batch = self._batch(logits, targets, decay)
        mult, add = self.table["mult"][:, :, None], self.table["add"][:, :, None]
        more = batch.hit.shape[2] - logits.shape[1]
        u = pad(logits.transpose(1, 2), (0, more)) * mult + add
        found: tuple[Tensor, Tensor] | None = None
        for family in (family for family in FAMILIES if family in self.parts):
            member = self.member[FAMILIES.index(family)]
            new = self._of_family(family, u.clone(), batch, member, active)
            found = new if found is None else _chosen(member, new, found)
        assert found is not None
        self.steps.add_(1 if active is None else active[:, 0])
        gradient, losses = found
        gradient = (gradient * mult)[:, :, : logits.shape[1]].transpose(1, 2)
        return gradient, losses.double().sum((1, 2))

    def _batch(self, logits: Tensor, targets: Tensor, decay: Tensor) -> Batch:
        """The samples in whole lines; those that fill up count nothing."""
        seats, size, _ = logits.shape
        filled = pad(targets, (0, lines(size) - size))
        hit = (filled[:, None] == self.classes).to(logits.dtype)
        real = torch.arange(filled.shape[1], device=logits.device) < size
        weight = (real.to(logits.dtype) / size).expand(seats, 1, -1)
        sizes = torch.full((1, 1), size, device=logits.device)
        return Batch(filled, hit, weight, sizes, self.steps, decay)

    def _of_family(
        self, family: Kind, u: Tensor, batch: Batch, member: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient and losses of all seats; only members that are active remember the batch."""
        remembers = family == "adaptive"
        before = {n: t.clone() for n, t in self.table.state.items()} if remembers else {}
        gradient, losses = GRADIENTS[family](u, batch, self.table, True)
        own = member if active is None else member & active
        for name, state in before.items():
            now = self.table.state[name]
            torch.where(own, now, state, out=now)
        assert losses is not None
        return gradient, losses


def _chosen(
    member: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the seats that are ``member`` (K, 1) the new gradients and losses, else the old ones."""
    seats = member[:, :, None]
    return torch.where(seats, new[0], old[0]), torch.where(seats, new[1], old[1])


class ModuleLoss:
    """The loss of the only seat, by its own module: soft targets, and losses without a row."""

    parts: frozenset[str] = frozenset()

    def __init__(self, loss: Loss) -> None:
        self.loss = copy.deepcopy(loss)

    def admit(self, loss: Loss, here: Loss, seat: int) -> None:
        """See ``SeatLosses``; the loss has the same numbers as the one recorded."""
        own = self.loss.state_dict()
        for name, buffer in loss.state_dict().items():
            if buffer.data_ptr() != own[name].data_ptr():
                own[name].copy_(buffer)
                setattr(loss, name, own[name])

    def part(self, loss: Loss) -> None:
        """See ``SeatLosses``."""
        for name, buffer in loss.state_dict().items():
            setattr(loss, name, buffer.clone())

    def tensors(self) -> list[Tensor]:
        """See ``SeatLosses``."""
        return list(self.loss.state_dict().values())

    def decay(self, size: int) -> Tensor:
        """See ``SeatLosses``; the module knows itself what it keeps."""
        return self.loss.class_counts.new_zeros(1, 1)

    def gradient(
        self, logits: Tensor, soft: Tensor, targets: Tensor, decay: Tensor, active: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``SeatLosses``."""
        before = numbers_of(self.loss)
        with torch.enable_grad():
            leaf = logits[0].detach().requires_grad_()
            loss: Tensor = self.loss(leaf, soft[0])
            (gradient,) = torch.autograd.grad(loss, leaf)
        if numbers_of(self.loss) != before:
            raise Uncapturable("its loss keeps numbers outside of tensors")
        return gradient[None], loss.detach()[None].double()


def numbers_of(loss: Loss) -> tuple[tuple[str, object], ...]:
    """What a loss knows beside its tensors."""
    plain = {k: v for k, v in vars(loss).items() if isinstance(v, bool | int | float | str)}
    return tuple(sorted(plain.items()))
