"""Streams, events and the host's waits of the pretended device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pretended._memory import HOST, Memory


class Stream:
    """As ``torch.cuda.Stream``."""

    numbers = itertools.count(HOST + 1)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(Stream.numbers)

    def wait_stream(self, other: Stream) -> None:
        """See torch."""
        state.memory.wait(self.number, state.memory.past(other.number))

    def synchronize(self) -> None:
        """See torch."""
        state.host_waits("a stream is waited for", asked=True)
        state.memory.wait(HOST, state.memory.past(self.number))


class Event:
    """As ``torch.cuda.Event``, passed at the second look."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.past: dict[int, int] = {}
        self.looks = 0

    def record(self, stream: Stream | None = None) -> None:
        """See torch."""
        self.past, self.looks = state.memory.past((stream or state.stream).number), 0

    def query(self) -> bool:
        """See torch."""
        self.looks += 1
        if self.looks > 1:
            state.memory.wait(HOST, self.past)
        return self.looks > 1

    def synchronize(self) -> None:
        """See torch."""
        state.host_waits("an event is waited for", asked=True)
        state.memory.wait(HOST, self.past)


class State:
    """What is current."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.default = self.stream = Stream()
        self.capturing: Any = None
        self.sync_mode = 0

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """As ``torch.cuda.stream``."""
        before, self.stream = self.stream, stream or self.stream
        try:
            yield
        finally:
            self.stream = before

    def host_waits(self, why: str, *, asked: bool = False) -> None:
        """The host waits for the device, because it was ``asked`` to or as a consequence.

        Raises:
            RuntimeError: Nobody may wait now.
        """
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {why}")
        if self.sync_mode == 2 and not asked:
            raise RuntimeError(f"called a synchronizing CUDA operation: {why}")

    def set_sync_mode(self, mode: int | str) -> None:
        """As ``torch.cuda.set_sync_debug_mode``."""
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore

    def synchronize(self, *_: Any) -> None:
        """As ``torch.cuda.synchronize``."""
        self.host_waits("the device is waited for", asked=True)
        for number in list(self.memory.seen):
            self.memory.wait(HOST, self.memory.past(number))


state = State()
