"""CUDA graphs of the pretended device: the operations of a step, and what they read and wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pretended import _random, _tensors
from pretended._memory import changed
from pretended._streams import Stream, state


@dataclass(frozen=True)
class Node:
    """An operation with the very tensors that it had, and what it gave; None is no new memory."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    fresh: Sequence[Tensor | None]


class CUDAGraph:
    """As ``torch.cuda.CUDAGraph``: numbers of the host are as they were when it was captured."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.nodes: list[Node] = []
        self.stream: Stream | None = None
        self.box: _random.Box = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """See torch."""
        if state.stream is state.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if state.capturing is not None:
            raise RuntimeError("another graph is being captured")
        self.stream, self.box = state.stream, _random.default.box
        state.capturing = self

    def capture_end(self) -> None:
        """See torch."""
        if state.capturing is not self:
            raise RuntimeError("the graph is not being captured")
        state.capturing = None

    def add(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        fresh: Sequence[Tensor | None],
    ) -> None:
        """Capture an operation."""
        self.nodes.append(Node(func, args, kwargs, fresh))

    def replay(self) -> None:
        """See torch."""
        if state.capturing is not None:
            raise RuntimeError("a graph is replayed while one is captured")
        for node in self.nodes:
            self._execute(node)

    def _execute(self, node: Node) -> None:
        given = [t for t in tree_leaves((node.args, node.kwargs)) if _is_ours(t)]
        written = [t for t in _tensors.written_by(node.func, node.args, node.kwargs) if _is_ours(t)]
        kept = [_tensors.held(tensor).clone() for tensor in written]
        call = tree_map(_tensors.plainly, node.args), tree_map(_tensors.plainly, dict(node.kwargs))
        result = _tensors.compute(node.func, *call, self.box)
        places = [
            place
            for tensor, before in zip(written, kept, strict=True)
            for place in changed(_tensors.held(tensor), before)
        ]
        new = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        for tensor, value in zip(node.fresh, new, strict=True):
            if tensor is not None:
                _tensors.held(tensor).copy_(value)
                places.append(_tensors.place_of(tensor))
        reads = [_tensors.place_of(tensor) for tensor in given]
        state.memory.launch(f"replayed {node.func}", state.stream.number, reads, places, [])


def _is_ours(value: Any) -> bool:
    return isinstance(value, _tensors.Pretended)
