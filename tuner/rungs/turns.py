"""Trials that take turns on one device: each goes on while the others wait for it."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field

from tuner.ledger import Lease
from tuner.rungs.outcome import Outcome, Slot
from tuner.trainer import NAP_SECONDS

Running = Generator[None, None, Outcome]


@dataclass
class Entry:
    """A trial under way, what ended beside it, and since when."""

    lease: Lease
    running: Running
    outcomes: list[Outcome]
    began: float = field(default_factory=time.monotonic)


class Turns:
    """The trials at hand of a slot; there is room for as many as its device trains well at once.

    A trial that ended leaves its place to the next one at once: the others do not notice.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.entries: list[Entry] = []
        slot.beside = lambda: max(1, len(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_room(self) -> bool:
        """Whether another trial would have a place."""
        return len(self.entries) < self.slot.room

    def admit(self, lease: Lease, running: Running, outcomes: list[Outcome]) -> None:
        """Take a trial in, with the list of what ends beside it; ``go_on`` must follow.

        What has not begun could not put its trial back.
        """
        self.slot.pulse.hold(lease)
        self.entries.append(Entry(lease, running, outcomes))

    def go_on(self) -> list[Entry]:
        """Let each trial go on until it would wait; those that ended, with their outcomes."""
        ended = []
        for entry in reversed(list(self.entries)):
            try:
                next(entry.running)
            except StopIteration as end:
                entry.outcomes.append(end.value)
                ended.append(entry)
                self._part_with(entry)
            except BaseException:
                self._part_with(entry)
                raise
        if self.entries and not ended:
            time.sleep(NAP_SECONDS)
        return ended

    def _part_with(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.slot.pulse.drop(entry.lease)

    def close(self) -> None:
        """Put back what is still under way: a trial goes on from its last checkpoint."""
        while self.entries:
            entry = self.entries.pop()
            entry.running.close()
            self.slot.pulse.drop(entry.lease)
