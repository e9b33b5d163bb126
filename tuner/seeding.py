"""Seeds and generators; the only place that touches global random state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """63-bit seed that depends on every part, stable across processes and machines."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """CPU generator seeded by ``derive_seed(*parts)``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def seeded(*parts: object, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put them back after.

    For code of other libraries that draws from the global generators: the initialisation of
    ``nn.Module`` weights, dropout, stochastic depth. ``device`` names the GPU whose generator
    is put back too.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # ``torch.manual_seed`` would seed every device, and note down where that was asked for.
        torch.default_generator.manual_seed(derive_seed(*parts))
        for each in devices:
            torch.cuda.default_generators[_index(each)].manual_seed(derive_seed(*parts))
        yield


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's global generators, of the CPU and of ``device`` where that is a GPU."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` gave; only inside ``seeded``.

    A state from a machine without a GPU leaves the generator of a GPU as ``seeded`` set it.
    """
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose only algorithms that give the same bits each time, inside the block."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def generator_state(device: torch.device) -> torch.Generator:
    """A generator of a CUDA device for one lane's graphs; the device's own is not touched."""
    return torch.cuda.default_generators[_index(device)].clone_state()


@contextmanager
def drawing_from(own: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let what draws from the device's global generator draw from ``own`` inside the block."""
    default = torch.cuda.default_generators[_index(device)]
    before = default.graphsafe_get_state()
    default.graphsafe_set_state(own)
    try:
        yield
    finally:
        default.graphsafe_set_state(before)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
