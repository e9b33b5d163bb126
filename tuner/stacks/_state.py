"""What lanes keep from one step to the next, in rows that lie still: one row for each seat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tuner.lane import Lane
from tuner.stacks._device import Uncapturable
from tuner.stacks._places import Layout, Place

Views = Iterator[tuple[nn.Module, str, Tensor]]


class State:
    """Rows of weights, of the moments of an optimizer, and of all else that models keep.

    ``weights`` and each of ``moments`` are (K, N) as ``trained`` says, in the order of the
    optimizer. ``kept`` (K, M) are frozen weights and running statistics, ``counts`` (K, I)
    whole numbers. ``steps`` (K,) float32 are counted for optimizers that want to know.
    """

    def __init__(
        self, lane: Lane, seats: int, moments: tuple[str, ...], *, counts_steps: bool
    ) -> None:
        model, like = lane.model, next(lane.model.parameters())
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained = {
            names[id(parameter)]: parameter.detach()
            for group in lane.optimizer.param_groups
            for parameter in group["params"]
        }
        rest = [(n, p.detach()) for n, p in model.named_parameters() if n not in trained]
        buffers = list(model.named_buffers())
        whole = [(name, buffer) for name, buffer in buffers if buffer.dtype == torch.int64]
        real = [*rest, *((name, b) for name, b in buffers if b.dtype != torch.int64)]
        if any(tensor.dtype != like.dtype for tensor in (*dict(real).values(), *trained.values())):
            raise Uncapturable("its tensors are of several types")
        self.trained, self.beside = Layout.of(trained.items()), Layout.of(real)
        self.counted = Layout.of(whole)
        self.weights = self.trained.rows(seats, like.detach())
        self.moments = {name: torch.zeros_like(self.weights) for name in moments}
        self.kept = self.beside.rows(seats, like.detach())
        self.counts = self.counted.rows(seats, self.kept.to(torch.int64))

        self.counts_steps = counts_steps
        self.steps = torch.zeros(seats, device=like.device)

    def tensors(self) -> list[Tensor]:
        """All rows."""
        return [self.weights, *self.moments.values(), self.kept, self.counts, self.steps]

    def share(self, model: nn.Module, seat: int) -> None:
        """Let a model work on the tensors of a seat; what it had is forgotten."""
        for module, name, view in self._views(model, seat):
            _put(module, name, view)

    def admit(self, lane: Lane, seat: int) -> None:
        """Overwrite a seat by what a lane has, and let the lane work on it."""
        for module, name, view in self._views(lane.model, seat):
            view.copy_(getattr(module, name).detach())
            _put(module, name, view)
        for key, state, view in self._moments(lane, seat):
            known = state.get(key)
            view.zero_() if known is None else view.copy_(known)
            state[key] = view

    def copies(self, lane: Lane) -> list[Tensor]:
        """Tensors of its own for a lane that leaves, in the order of ``part``."""
        modules = [(m, n) for m, n, _ in self._views(lane.model, 0)]
        own = [torch.empty_like(getattr(module, name).detach()) for module, name in modules]
        return own + [torch.empty_like(state[key]) for key, state, _ in self._moments(lane, 0)]

    def part(self, lane: Lane, seat: int, copies: list[Tensor]) -> None:
        """Give a lane what its seat has, in tensors of its own."""
        own = iter(copies)
        for module, name, view in self._views(lane.model, seat):
            _put(module, name, next(own).copy_(view))
        for key, state, view in self._moments(lane, seat):
            state[key] = next(own).copy_(view)

    def _views(self, model: nn.Module, seat: int) -> Views:
        parts = (self.trained, self.weights), (self.beside, self.kept), (self.counted, self.counts)
        for layout, rows in parts:
            for place in layout.places:
                path, _, name = place.name.rpartition(".")
                yield model.get_submodule(path), name, place.view(rows[seat])

    def _moments(self, lane: Lane, seat: int) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
        for place, parameter in self._parameters(lane):
            state = lane.optimizer.state[parameter]
            for key, rows in self.moments.items():
                yield key, state, place.view(rows[seat])
            if self.counts_steps:
                yield "step", state, self.steps[seat]

    def _parameters(self, lane: Lane) -> Iterator[tuple[Place, nn.Parameter]]:
        for place in self.trained.places:
            yield place, lane.model.get_parameter(place.name)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter or a buffer of a module be that tensor; parameters stay the same objects."""
    if name in module._parameters:
        getattr(module, name).data = tensor
    else:
        setattr(module, name, tensor)
