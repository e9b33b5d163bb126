"""Steps as CUDA graphs on a stream of their own: captured once, replayed without the host.

A step reads everything that changes from tensors at fixed places: the images it takes, what
chance decided, the learning rate. These are drawn ahead for a chunk of steps and copied in one
go; nothing on the host is asked before the chunk is done. Lanes on streams of their own fill the
device together and know nothing of each other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tuner.augment import Augmenter
from tuner.lane import Lane
from tuner.seeding import derive_seed, generator
from tuner.steps._capture import Captured, Uncapturable, phase
from tuner.steps._device import CudaGraphs, GraphDevice, Mark
from tuner.steps._plain import PlainSteps

CHUNK = 32
AHEAD = 2
"""Chunks that are launched before the first of them is done."""

log = logging.getLogger(__name__)


class GraphSteps:
    """Executes steps by replaying graphs; see ``Steps``.

    What cannot be captured, such as a loss that reads its own result, is executed plainly.
    """

    def __init__(self, lane: Lane, device: GraphDevice | None = None) -> None:
        self.lane = lane
        self.device = device or CudaGraphs(lane.device)
        self.plain = PlainSteps(lane)
        self.total = self.plain.total
        self.captured: dict[tuple[object, ...], Captured] = {}
        self.launched: deque[tuple[Mark, int]] = deque()
        self.capturable = type(lane.augment).forward is Augmenter.forward

    def run(
        self, batches: Sequence[Tensor], done: int, random: Mapping[str, Tensor] | None
    ) -> Generator[int | None, None, None]:
        """See ``Steps``; stops are for between chunks."""
        try:
            if self.capturable:
                self._capture_all(batches)
        except Uncapturable as reason:
            log.info("a recipe is trained without graphs: %s", reason)
            self.capturable = False
        if not self.capturable:
            yield from self.plain.run(batches, done, random)
            return
        self.device.reseed(derive_seed(*self._epoch), random)
        try:
            for begin, end in _chunks(batches, done):
                self._launch(batches, begin, end)
                while len(self.launched) > (AHEAD if end < len(batches) else 0):
                    yield from self._landed()
        finally:
            # Memory that the device still works on must not be given to others.
            self.settle(done)

    @property
    def _epoch(self) -> tuple[object, ...]:
        return self.lane.recipe.seed, "epoch", self.lane.epoch

    def _landed(self) -> Iterator[int | None]:
        """Wait for the oldest chunk; the steps done with it."""
        mark, end = self.launched[0]
        while not mark.query():
            yield None
        self.launched.popleft()
        yield end

    def _capture_all(self, batches: Sequence[Tensor]) -> None:
        """Capture steps of all sizes of batch, unless they are there from an earlier epoch."""
        sizes = {len(batch) for batch in batches}
        current = phase(self.lane)
        stale = [key for key in self.captured if key[0] != current]
        for key in stale:
            del self.captured[key]
        for size in sorted(sizes, reverse=True):
            if (current, size) not in self.captured:
                self.captured[current, size] = Captured(self, size, CHUNK)

    def _launch(self, batches: Sequence[Tensor], begin: int, end: int) -> None:
        """Draw a chunk ahead, and let the device come to it."""
        lane, chunk = self.lane, batches[begin:end]
        captured = self.captured[phase(lane), len(chunk[0])]
        shares = [step / len(batches) for step in range(begin, end)]
        with self.device.work():
            captured.fill(torch.stack(list(chunk)), [lane.rates(share) for share in shares])
            for _ in chunk:
                captured.replay()
            lane.noted.extend(captured.noted(chunk))
            self.launched.append((self.device.mark(), end))

    def settle(self, done: int) -> int:
        """See ``Steps``."""
        while self.launched:
            mark, done = self.launched.popleft()
            mark.synchronize()
        return done

    def random_state(self) -> dict[str, Tensor]:
        """State of the lane's own generator, and of one of the processor that nothing drew from."""
        if not self.capturable:
            return self.plain.random_state()
        return {"cpu": generator(*self._epoch).get_state(), **self.device.random_state()}


def _chunks(batches: Sequence[Tensor], begin: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of like batches, at most ``CHUNK`` long."""
    while begin < len(batches):
        end = begin + 1
        while end < min(len(batches), begin + CHUNK) and len(batches[end]) == len(batches[begin]):
            end += 1
        yield begin, end
        begin = end
