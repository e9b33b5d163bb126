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
from tuner.seeding import generator, generator_state
from tuner.steps._capture import Captured, Uncapturable, phase, reseed
from tuner.steps._plain import PlainSteps

CHUNK = 32
AHEAD = 2
"""Chunks that are launched before the first of them is done."""

log = logging.getLogger(__name__)


class GraphSteps:
    """Executes steps by replaying graphs; see ``Steps``.

    What cannot be captured, such as a loss that reads its own result, is executed plainly.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.plain = PlainSteps(lane)
        self.total = self.plain.total
        self.stream = torch.cuda.Stream(lane.device)  # type: ignore[no-untyped-call]
        self.random = generator_state(lane.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple[object, ...], Captured] = {}
        self.launched: deque[tuple[torch.cuda.Event, int]] = deque()
        self.capturable = type(lane.augment).forward is Augmenter.forward

    def run(
        self, batches: Sequence[Tensor], done: int, random: Mapping[str, Tensor] | None
    ) -> Generator[int | None, None, None]:
        """See ``Steps``; stops are for between chunks."""
        self.total = self.plain.total
        try:
            if self.capturable:
                self._capture_all(batches)
        except Uncapturable as reason:
            log.info("a recipe is trained without CUDA graphs: %s", reason)
            self.capturable = False
        if not self.capturable:
            yield from self.plain.run(batches, done, random)
            return
        reseed(self.random, self.lane, random)
        for begin, end in _chunks(batches, done):
            self._launch(batches, begin, end)
            while len(self.launched) > (AHEAD if end < len(batches) else 0):
                yield from self._landed()

    def _landed(self) -> Iterator[int | None]:
        """Wait for the oldest chunk; the steps done with it."""
        event, end = self.launched[0]
        while not event.query():  # type: ignore[no-untyped-call]
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
        self.stream.wait_stream(torch.cuda.current_stream(lane.device))
        with torch.cuda.stream(self.stream):
            captured.fill(torch.stack(list(chunk)), [lane.rates(share) for share in shares])
            for _ in chunk:
                captured.graph.replay()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            lane.noted.extend(captured.noted(chunk))
        self.launched.append((event, end))

    def settle(self, done: int) -> int:
        """See ``Steps``."""
        while self.launched:
            event, done = self.launched.popleft()
            event.synchronize()
        return done

    def random_state(self) -> dict[str, Tensor]:
        """State of the lane's own generator."""
        if not self.capturable:
            return self.plain.random_state()
        lane = self.lane
        untouched = generator(lane.recipe.seed, "epoch", lane.epoch)
        return {"cpu": untouched.get_state(), "cuda": self.random.get_state()}


def _chunks(batches: Sequence[Tensor], begin: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of like batches, at most ``CHUNK`` long."""
    while begin < len(batches):
        end = begin + 1
        while end < min(len(batches), begin + CHUNK) and len(batches[end]) == len(batches[begin]):
            end += 1
        yield begin, end
        begin = end
