"""Batches that are made, and copied to a GPU, while the one before them is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARED = Path("/dev/shm")
"""Where processes hand tensors over, on Linux; containers have little room there."""
AHEAD = 2
"""Batches that each process of a loader makes ahead."""


def loaders(asked: int, batches: Sequence[Tensor], image_bytes: int) -> int:
    """How many processes make these batches: at most as many as ``asked``.

    There is no more than one per batch, and what they make ahead takes no more than half of the
    free memory that they share; one there is in any case, where some were asked for.
    """
    size = image_bytes * max(map(len, batches), default=0)
    fitting = asked
    if size and SHARED.is_dir():
        fitting = shutil.disk_usage(SHARED).free // (2 * AHEAD * size)
    return min(asked, max(1, min(len(batches), fitting)))


def made_ahead(
    make: Callable[[Tensor], Tensor], index_batches: Sequence[Tensor]
) -> Iterator[Tensor]:
    """What ``make`` gives for each; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = [thread.submit(make, indices) for indices in index_batches[:1]]
        for indices in index_batches[1:]:
            coming.append(thread.submit(make, indices))
            yield coming.pop(0).result()
        for last in coming:
            yield last.result()


def copied_ahead(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches on a GPU; each is copied on a stream of its own while the one before is used."""
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    coming: Tensor | None = None
    for batch in batches:
        ready = _arrived(coming, stream, device)
        with torch.cuda.stream(stream):
            coming = batch.to(device, non_blocking=True)
        if ready is not None:
            yield ready
    last = _arrived(coming, stream, device)
    if last is not None:
        yield last


def _arrived(batch: Tensor | None, stream: Any, device: torch.device) -> Tensor | None:
    """The batch, for whose copy the current stream waits; its memory is kept until that is done."""
    if batch is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        batch.record_stream(current)
    return batch
