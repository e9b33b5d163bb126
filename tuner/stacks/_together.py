"""All seats' models as their twin, and which lanes may be trained so."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner.augment import Augmenter, Drawn, StandardAugmenter
from tuner.lane import Lane
from tuner.stacks._kind import Kind
from tuner.stacks._optimizers import into
from tuner.stacks._places import Joint, Layout
from tuner.stacks._state import State
from tuner.twins import NoTwinError, check, twin_of

WHOLE = 64
"""Whole tensors begin at multiples of so many numbers."""

log = logging.getLogger(__name__)

_reasons: dict[tuple[object, ...], str | None] = {}


def is_groupable(lane: Lane, kind: Kind) -> bool:
    """Whether lanes of this kind may share a twin: only their weights and numbers differ."""
    reason = _reason(lane, kind)
    if reason is not None:
        log.debug("%s is not trained in groups: %s", kind.model, reason)
    return reason is None


def _reason(lane: Lane, kind: Kind) -> str | None:
    if kind.loss is not None:
        return "its loss is computed by its own module"
    if type(lane.augment) not in (Augmenter, StandardAugmenter):
        return "its augmentation may not treat image by image"
    key = _key(lane, kind)
    if key not in _reasons:
        try:
            check(lane.model, lane.data.image_shape)
            _reasons[key] = None
        except NoTwinError as error:
            _reasons[key] = str(error)
    return _reasons[key]


def not_groupable(lane: Lane, kind: Kind, reason: str) -> None:
    """Note that lanes with this model are better trained alone from now on."""
    _reasons[_key(lane, kind)] = reason


def _key(lane: Lane, kind: Kind) -> tuple[object, ...]:
    return kind.model, lane.data.image_shape, lane.data.num_classes, kind.modes, kind.formats


class Working:
    """Whole tensors (K, *shape) for a twin, copied from the places of rows (K, N).

    One operation copies all. What torch has for that (``split_with_sizes_copy``) reads addresses
    from memory of the host, which is gone when a graph is replayed.
    """

    def __init__(self, layout: Layout, rows: Tensor) -> None:
        self.rows, self.joint = rows, Joint(layout, len(rows), rows)
        seats, width = rows.shape
        first = width * torch.arange(seats)[:, None]
        parts: list[Tensor] = []
        starts: list[int] = []
        end = 0
        for place in layout.places:
            numbers = (first + place.start + torch.arange(place.size)).flatten()
            parts.append(pad(numbers, (0, -len(numbers) % WHOLE)))
            starts.append(end)
            end += len(parts[-1])
        order = torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
        # Half as much to read, where the numbers allow it.
        self.order = order.to(rows.device, torch.int32 if rows.numel() < 2**31 else torch.int64)
        self.copy = rows.new_zeros(end)
        self.tensors = {
            place.name: place.shaped(self.copy.narrow(0, start, seats * place.size).view(seats, -1))
            for place, start in zip(layout.places, starts, strict=True)
        }

    def refresh(self) -> None:
        """Copy what the rows have now."""
        if self.tensors:
            torch.index_select(self.rows.view(-1), 0, self.order, out=self.copy)


class Together:
    """The twin of all seats' models; see ``Network``.

    It works on copies of the rows: grouped convolutions want the weights of all models side by
    side, and what does not take part in a step must stay as it is.
    """

    def __init__(self, pattern: Lane, state: State, seats: int) -> None:
        self.pattern, self.state, self.seats = pattern, state, seats
        self.twin = twin_of(pattern.model, seats)
        self.trained = Working(state.trained, state.weights)
        self.beside = Working(state.beside, state.kept)
        self.weights = [self.twin.get_parameter(place.name) for place in state.trained.places]
        known = self.trained.tensors | self.beside.tensors
        for name, parameter in self.twin.named_parameters():
            parameter.data = known[name]
        for name, _ in list(self.twin.named_buffers()):
            if name in known:
                path, _, leaf = name.rpartition(".")
                setattr(self.twin.get_submodule(path), leaf, known[name])
        paths = [place.name.rpartition(".")[0] for place in state.counted.places]
        self.moved = state.counts.new_zeros(1, state.counted.width, dtype=torch.bool)
        for place, path in zip(state.counted.places, paths, strict=True):
            self.moved[0, place.start] = self.twin.get_submodule(path).training
        self.moves = bool(self.moved.any())

    def inputs(self, indices: Tensor, targets: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """See ``Network``; images (B, K·c, H, W), and hard targets."""
        flat = {name: rows.permute(1, 2, 0).flatten(1) for name, rows in drawn.items()}
        images, _ = self.pattern.inputs(indices.t().flatten(), targets.t().flatten(), flat)
        return images.reshape(indices.shape[1], -1, *images.shape[2:]), targets

    def logits(self, inputs: Tensor) -> Tensor:
        """See ``Network``."""
        with torch.no_grad():
            self.trained.refresh()
            self.beside.refresh()
        return self.pattern.forward(inputs, self.twin)

    def backward(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """See ``Network``."""
        found = torch.autograd.grad(logits, self.weights, gradient)
        return self.trained.joint.of(found)

    def settle(self, active: Tensor | None) -> None:
        """See ``Network``."""
        if self.moves:
            new = self.beside.joint.of(list(self.beside.tensors.values()))
            into(self.state.kept, new, active)
            self.state.counts.add_(self.moved if active is None else self.moved & active)
