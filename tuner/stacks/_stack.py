"""Seats for K lanes of one kind that train in lockstep; a lane overwrites the seat it takes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from tuner.lane import Lane
from tuner.losses import Loss
from tuner.stacks._device import GraphDevice, Mark
from tuner.stacks._kind import Kind, loss_of
from tuner.stacks._losses import RowLosses, SeatLosses
from tuner.stacks._module import ModuleLoss
from tuner.stacks._networks import Alone, Network, pattern_of
from tuner.stacks._optimizers import Parts, optimizer_of
from tuner.stacks._recorded import Chunk, Recorded
from tuner.stacks._state import State
from tuner.stacks._together import Together

MOST_RECORDED = 16
"""Steps that a stack keeps: for sizes of batches, and for forms of losses."""


class Stack:
    """K seats, and the steps that were recorded for them; made for the first lane of its kind.

    Everything that lanes of a kind differ in lies in tensors that stay where they are. Steps that
    lanes ask for are launched together: as soon as all lanes have asked, or once the device has
    nothing to do and those that have not asked had their turn. Seats without a lane, and lanes
    that did not ask, keep their bits.

    All writing goes through the stack's own stream, after what was launched before: a step in
    flight rewrites every seat, those that do not take part with what they had.
    """

    def __init__(self, lane: Lane, kind: Kind, seats: int, device: GraphDevice) -> None:
        self.kind, self.seats, self.device = kind, seats, device
        self.pattern = pattern_of(lane)
        make, options = optimizer_of(lane)
        self.state = State(lane, seats, make.moments, counts_steps=make.counts_steps)
        self.optimizer = make(self.state, **options)
        self.losses: SeatLosses = (
            RowLosses(seats, lane.data.num_classes, lane.dtype, lane.device)
            if kind.loss is None
            else ModuleLoss(lane.loss)
        )
        self.network: Network = (
            Alone(self.pattern, self.state)
            if seats == 1
            else Together(self.pattern, self.state, seats)
        )
        self.totals = torch.zeros(seats, dtype=torch.float64, device=lane.device)
        self.lanes: dict[int, Lane] = {}
        self.here: dict[int, Loss] = {}
        self.asking: dict[int, Chunk] = {}
        self.parts: Parts = frozenset()
        self.needs: dict[int, Parts] = {}
        self.recorded: dict[tuple[int, Parts], Recorded] = {}
        self.flight: deque[Mark] = deque()

    def tensors(self) -> list[Tensor]:
        """All that a step changes."""
        return [*self.state.tensors(), *self.losses.tensors(), self.totals]

    @property
    def has_room(self) -> bool:
        """Whether a seat is free."""
        return len(self.lanes) < self.seats

    def take(self, lane: Lane) -> int:
        """Let a lane take a free seat, which is overwritten by what the lane has."""
        seat = next(seat for seat in range(self.seats) if seat not in self.lanes)
        self.lanes[seat] = lane
        self.here[seat] = lane.built(loss_of(lane))
        with self.device.work(), torch.no_grad():
            self.state.admit(lane, seat)
            self.optimizer.admit(seat, lane.optimizer)
        self.device.join()
        return seat

    def begin(self, seat: int, sizes: set[int], total: Tensor) -> None:
        """Begin an epoch of a lane: its loss, and the sum of its losses so far.

        Raises:
            Uncapturable: A step with one of these numbers of images cannot be recorded.
        """
        lane, joins = self.lanes[seat], seat not in self.needs or self.kind.loss is not None
        with self.device.work(), torch.no_grad():
            self._admit_loss(lane, seat)
            self.totals[seat].copy_(total)
        if joins:
            self.device.join()
        self._need(self.needs[seat] | self.optimizer.parts(lane.optimizer))
        for size in sorted(sizes, reverse=True):
            self._recorded(size)

    def _admit_loss(self, lane: Lane, seat: int) -> None:
        """Overwrite the row of a seat, unless its loss acts as in the epoch before.

        A loss without a row may have other tensors from epoch to epoch.
        """
        here = self.here[seat]
        acted = here.active
        here.advance(lane.progress)
        changes = self.kind.loss is not None or acted != here.active
        if seat not in self.needs or changes:
            self.needs[seat] = self.losses.admit(lane.loss, here, seat)
            for recorded in self.recorded.values():
                recorded.admit()

    def _need(self, parts: Parts) -> None:
        """Let steps have these parts; a lane that is alone needs no more than its own.

        With others, steps have all parts that lanes ever needed, so that they soon stay the same.
        """
        if self.seats == 1:
            self.parts = parts
        elif not parts <= self.parts:
            self.parts |= parts
            self.wait()
            self.recorded.clear()

    def _recorded(self, size: int) -> Recorded:
        """Steps of that size with the parts that are needed; recorded when first asked for."""
        key = (size, self.parts)
        found = self.recorded.pop(key, None)
        if found is None and len(self.recorded) >= MOST_RECORDED:
            self.wait()
            # The last one is the one that was used last.
            del self.recorded[next(iter(self.recorded))]
        self.recorded[key] = found or Recorded(self, size, self.parts)
        return self.recorded[key]

    def ask(self, seat: int, chunk: Chunk) -> None:
        """Ask for steps; they are launched when it is time, see ``look``."""
        self.asking[seat] = chunk
        self._launch_if_complete()

    def look(self, seat: int) -> None:
        """Look after what a lane asked for, once in each of its turns."""
        self._launch_if_complete()
        chunk = self.asking.get(seat)
        if chunk is None or self._is_busy():
            return
        chunk.asked += 1
        # Between two looks all other lanes had their turn, and nothing to wait for.
        if chunk.asked > 1:
            self._launch()

    def _launch_if_complete(self) -> None:
        if self.asking and self.asking.keys() == self.lanes.keys():
            self._launch()

    def _is_busy(self) -> bool:
        """Whether something is in flight; marks of what is done are forgotten."""
        while self.flight and self.flight[0].query():
            self.flight.popleft()
        return bool(self.flight)

    def _launch(self) -> None:
        """Launch all that was asked for; steps with as many images go together."""
        self._is_busy()
        sizes = {chunk.indices.shape[1] for chunk in self.asking.values()}
        for size in sorted(sizes, reverse=True):
            alike = {s: c for s, c in self.asking.items() if c.indices.shape[1] == size}
            # Where that fails, the lanes go on asking.
            recorded = self._recorded(size)
            with self.device.work():
                recorded.fill(alike)
                for _ in range(max(map(len, alike.values()))):
                    recorded.replay()
                if self.kind.notes:
                    with self.device.work():
                        self._note(recorded, alike)
                mark = self.device.mark()
            self.flight.append(mark)
            for seat, chunk in alike.items():
                chunk.mark = mark
                del self.asking[seat]

    def _note(self, recorded: Recorded, chunks: dict[int, Chunk]) -> None:
        """Indices and losses of the chunk just launched, for samplers that ask for them."""
        for seat, chunk in chunks.items():
            losses = recorded.losses[: len(chunk), seat].flatten().clone()
            self.lanes[seat].noted.append((chunk.indices.flatten(), losses))

    def mark(self) -> Mark:
        """The place after all that was launched so far."""
        with self.device.work():
            return self.device.mark()

    def wait(self) -> None:
        """Wait until nothing is in flight."""
        while self.flight:
            self.flight.popleft().synchronize()

    def leave(self, seat: int) -> None:
        """Give a lane tensors of its own, and its seat to the next one."""
        lane = self.lanes.pop(seat)
        self.asking.pop(seat, None)
        self.needs.pop(seat, None)
        copies = self.state.copies(lane)
        with self.device.work(), torch.no_grad():
            self.state.part(lane, seat, copies)
            for loss in set(lane.losses):
                self.losses.part(loss)
        self.device.join()
