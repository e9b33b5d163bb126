"""Who waited for whom: clocks of streams and of the host, and what was done with which memory.

Two accesses to the same bytes, one of which writes, have to be ordered: the later one's stream has
waited for the earlier one's, or the host has, before it launched the later one. So does what is
done with memory that was given back.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

HOST = 0
"""The host's place among the streams."""


class MisuseError(RuntimeError):
    """What a GPU would have done wrong without a word."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of a storage, from ``first`` up to ``end``."""

    storage: int
    first: int
    end: int

    def meet(self, other: Bytes) -> bool:
        """Whether they have a byte in common."""
        return self.first < other.end and other.first < self.end

    def cover(self, other: Bytes) -> bool:
        """Whether all of the other's are among them."""
        return self.first <= other.first and other.end <= self.end


def bytes_of(tensor: Tensor) -> Bytes:
    """From the first to the last one of a tensor in this machine's memory."""
    dims = zip(tensor.size(), tensor.stride(), strict=True)
    span = int(1 + sum((size - 1) * stride for size, stride in dims)) if tensor.numel() else 0
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return Bytes(tensor.untyped_storage()._cdata, first * size, (first + span) * size)


def changed(tensor: Tensor, before: Tensor) -> list[Bytes]:
    """The bytes that hold other numbers than before, in runs; many runs count as whole rows."""
    whole = bytes_of(tensor)
    if tensor.shape != before.shape:
        return [whole]
    new, old = (t.float() if t.dtype == torch.bfloat16 else t for t in (tensor, before))
    other = (new != old) & ~((new != new) & (old != old))
    if not other.any():
        return []
    if not tensor.is_contiguous() or tensor.ndim == 0:
        return [whole]
    runs = _runs(other.flatten())
    each = tensor.element_size()
    if len(runs) > 40:
        each *= tensor[0].numel()
        runs = _runs(other.reshape(len(tensor), -1).any(1))
    return [
        Bytes(whole.storage, whole.first + begin * each, whole.first + end * each)
        for begin, end in runs
    ]


def _runs(flags: Tensor) -> list[tuple[int, int]]:
    steps = flags.to(torch.int8)
    edges = torch.diff(steps, prepend=steps.new_zeros(1), append=steps.new_zeros(1))
    begins, ends = (torch.nonzero(edges == way).flatten().tolist() for way in (1, -1))
    return list(zip(begins, ends, strict=True))


@dataclass(frozen=True)
class Access:
    """What an operation did, as the ``count``-th of its stream."""

    place: Bytes
    stream: int
    count: int
    what: str
    writes: bool


@dataclass
class Owned:
    """A storage: tensors that have it, the stream whose memory it is; a graph's stays a graph's."""

    tensors: int
    stream: int
    of_graph: bool


class Memory:
    """All accesses that a later one may have to wait for."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, int]] = defaultdict(dict)
        self.accesses: dict[int, list[Access]] = defaultdict(list)
        self.owned: dict[int, Owned] = {}
        self.shared: set[tuple[int, int]] = set()
        self.given_back: dict[int, list[Access]] = {}

    def past(self, stream: int) -> dict[int, int]:
        """How far each stream was when this one is."""
        return dict(self.seen[stream])

    def wait(self, stream: int, past: dict[int, int]) -> None:
        """Let a stream, or the host, come after that."""
        mine = self.seen[stream]
        for other, count in past.items():
            mine[other] = max(mine.get(other, 0), count)

    def _knows(self, stream: int, access: Access) -> bool:
        return self.seen[stream].get(access.stream, 0) >= access.count

    def launch(
        self, what: str, stream: int, reads: list[Bytes], writes: list[Bytes], fresh: list[Bytes]
    ) -> None:
        """Note an operation.

        Raises:
            MisuseError: Something that it has to wait for may not be done yet.
        """
        count = self.seen[stream].get(stream, 0) + 1
        self.wait(stream, {**self.seen[HOST], stream: count})
        if fresh:
            self._give_out(stream)
        for place in fresh:
            self.accesses[place.storage] = [Access(place, stream, count, what, writes=True)]
        for place in reads:
            self._access(Access(place, stream, count, what, writes=False))
        for place in writes:
            self._access(Access(place, stream, count, what, writes=True))

    def _access(self, new: Access) -> None:
        before = self.accesses[new.place.storage]
        for old in before:
            both = (old.writes or new.writes) and old.place.meet(new.place)
            if both and not self._knows(new.stream, old):
                raise MisuseError(f"{_told(new)} and nobody waited for: {_told(old)}; {_where()}")
        before[:] = [old for old in before if not _replaces(new, old)]
        before.append(new)

    def keep(self, place: Bytes, stream: int) -> None:
        """Let memory stay until a stream has done what it was asked to so far."""
        self.shared.add((place.storage, stream))

    def take(self, storage: int, stream: int, *, of_graph: bool) -> None:
        """One more tensor has that storage."""
        self.owned.setdefault(storage, Owned(0, stream, of_graph)).tensors += 1

    def give_back(self, storage: int) -> None:
        """One tensor less has it; with the last one, its stream may give the memory out again."""
        owned = self.owned[storage]
        owned.tensors -= 1
        if owned.tensors == 0:
            del self.owned[storage]
            left = self.accesses.pop(storage, [])
            if not owned.of_graph:
                other = [a for a in left if (storage, a.stream) not in self.shared]
                self.given_back.setdefault(owned.stream, []).extend(other)

    def _give_out(self, stream: int) -> None:
        for access in self.given_back.pop(stream, []):
            if not self._knows(stream, access):
                raise MisuseError(f"memory is given out again before: {_told(access)}; {_where()}")


def _replaces(new: Access, old: Access) -> bool:
    mine = new.writes or (not old.writes and old.stream == new.stream)
    return mine and new.place.cover(old.place)


def _told(access: Access) -> str:
    verb = "writes" if access.writes else "reads"
    return f"{access.what} on stream {access.stream} {verb} {access.place}"


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if "pretended" not in f.filename]
    return "in " + ", ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[-8:])
