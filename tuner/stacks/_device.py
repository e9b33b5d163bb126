"""What graphs need of a CUDA device: a stream, a memory pool and a generator of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from tuner.seeding import drawing_from, generator_state


class Uncapturable(Exception):
    """A step cannot be a graph; the text says why."""


class Mark(Protocol):
    """A place in the work of a stream."""

    def query(self) -> bool:
        """Whether the device has come past it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class GraphDevice(Protocol):
    """Records steps and executes what was recorded, in the order in which it is launched."""

    def work(self) -> Any:
        """A context: what is launched inside comes after everything that was launched outside."""

    def join(self) -> None:
        """Let what is launched outside from now on come after what was launched inside."""

    def drawing(self) -> Any:
        """A context in which the model draws from the generator of this stream."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What a step launches, as one launch; the step itself is not executed."""

    def mark(self) -> Mark:
        """The place that was launched to so far, inside ``work``."""

    def reseed(self, seed: int, random: Mapping[str, Tensor] | None) -> None:
        """Let the generator begin at ``seed``, or go on at a ``random_state``."""

    def random_state(self) -> dict[str, Tensor]:
        """State of the generator."""


class CudaGraphs:
    """Records CUDA graphs; see ``GraphDevice``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.random = generator_state(device)
        self.pool: Any = torch.cuda.graph_pool_handle()

    @contextmanager
    def work(self) -> Iterator[None]:
        """See ``GraphDevice``; the stream that is current outside waits for nothing."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """See ``GraphDevice``."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def drawing(self) -> Any:
        """See ``GraphDevice``."""
        return drawing_from(self.random, self.device)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """See ``GraphDevice``; unlike torch's own context, nobody else has to wait."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            # The error that spoilt the recording says more than the one that ending it raises.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay

    def mark(self) -> Mark:
        """See ``GraphDevice``."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event  # type: ignore[no-any-return]

    def reseed(self, seed: int, random: Mapping[str, Tensor] | None) -> None:
        """See ``GraphDevice``; a state from a machine without a GPU is begun anew."""
        if random is not None and "cuda" in random:
            self.random.set_state(random["cuda"])
        else:
            self.random.manual_seed(seed)

    def random_state(self) -> dict[str, Tensor]:
        """See ``GraphDevice``."""
        return {"cuda": self.random.get_state()}
