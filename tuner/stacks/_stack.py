"""Seats for K lanes of one kind that train in lockstep; a lane overwrites the seat it takes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from tuner.lane import Lane
from tuner.losses import Loss
from tuner.stacks._device import GraphDevice, Mark
from tuner.stacks._kind import Kind, loss_of
from tuner.stacks._losses import ModuleLoss, RowLosses, SeatLosses
from tuner.stacks._networks import Alone, Network, pattern_of
from tuner.stacks._optimizers import row_optimizer
from tuner.stacks._recorded import Chunk, Recorded
from tuner.stacks._state import State
from tuner.stacks._together import Together


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
        like = next(lane.model.parameters()).detach()
        self.optimizer = row_optimizer(lane.recipe, lane.optimizer, seats, like)
        self.state = State(
            lane, seats, self.optimizer.moments, counts_steps=self.optimizer.counts_steps
        )
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
        self.recorded: dict[tuple[object, ...], Recorded] = {}
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
        self.here[seat] = loss_of(lane).build(lane.data.class_counts)
        with self.device.work(), torch.no_grad():
            self.state.admit(lane, seat)
        self.device.join()
        return seat

    def begin(self, seat: int, sizes: set[int], total: Tensor) -> None:
        """Begin an epoch of a lane: its loss, and the sum of its losses so far.

        Raises:
            Uncapturable: A step with one of these numbers of images cannot be recorded.
        """
        lane = self.lanes[seat]
        with self.device.work(), torch.no_grad():
            self.optimizer.admit(seat, lane.optimizer)
            self.here[seat].advance(lane.progress)
            self.losses.admit(lane.loss, self.here[seat], seat)
            self.totals[seat].copy_(total)
            for recorded in self.recorded.values():
                recorded.admit()
        self.device.join()
        for size in sorted(sizes, reverse=True):
            self._recorded(size)

    def _recorded(self, size: int) -> Recorded:
        """Steps of that size with all that lanes so far need; recorded when first asked for."""
        parts = self.losses.parts, self.optimizer.parts
        if any(key[1:] != parts for key in self.recorded):
            self.wait()
            self.recorded.clear()
        key = (size, *parts)
        if key not in self.recorded:
            self.recorded[key] = Recorded(self, size)
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
        while self.flight and self.flight[0].query():
            self.flight.popleft()
        return bool(self.flight)

    def _launch(self) -> None:
        """Launch all that was asked for; steps with as many images go together."""
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

    def wait(self) -> None:
        """Wait until nothing is in flight."""
        while self.flight:
            self.flight.popleft().synchronize()

    def leave(self, seat: int) -> None:
        """Give a lane tensors of its own, and its seat to the next one."""
        lane = self.lanes.pop(seat)
        self.asking.pop(seat, None)
        copies = self.state.copies(lane)
        with self.device.work(), torch.no_grad():
            self.state.part(lane, seat, copies)
            for loss in set(lane.losses):
                self.losses.part(loss)
        self.device.join()
