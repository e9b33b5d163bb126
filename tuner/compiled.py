"""Training passes of a model through torch.compile, compiled once for all lanes of its kind.

Opt-in (``TUNER_COMPILE=1``): compiling takes half a minute and a C++ compiler, and rounds
otherwise than the operations one by one. What was compiled can be carried to other workers.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tuner.errors import TunerError
from tuner.stores import NotThere, Store

BACKEND = "inductor"
ARTIFACTS = "compiled"
ANSWERS = dict.fromkeys(("1", "true", "yes", "on"), True)
ANSWERS |= dict.fromkeys(("0", "false", "no", "off", ""), False)

Forward = Callable[[Tensor], Tensor]

_made: dict[tuple[object, ...], Callable[..., Tensor]] = {}
_fetched: set[str] = set()
_passes: set[tuple[object, ...]] = set()
"""What was compiled here: kinds, and the sizes of batches, which are compiled one by one."""
_kept: dict[str, int] = {}


def is_wanted() -> bool:
    """Whether the user asked for compiled passes.

    Raises:
        TunerError: What stands in the environment says neither.
    """
    said = os.environ.get("TUNER_COMPILE", "")
    if said.strip().lower() not in ANSWERS:
        raise TunerError(f"TUNER_COMPILE={said}: give 1 (true, yes, on) or 0 (false, no, off)")
    return ANSWERS[said.strip().lower()]


def compiled(model: nn.Module, kind: str) -> Forward:
    """The training pass of ``model``, compiled for its kind: the same layers and sizes.

    Weights and running statistics stay the model's own; they are handed to the compiled code.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modes = tuple(module.training for module in model.modules())
    frozen = tuple(tensor.requires_grad for tensor in tensors.values())
    key = (kind, modes, frozen)
    if key not in _made:
        template = copy.deepcopy(model)

        def forward(given: dict[str, Tensor], images: Tensor) -> Tensor:
            found: Tensor = functional_call(template, given, (images,))
            return found

        _made[key] = torch.compile(forward, backend=BACKEND, dynamic=False)
    made = _made[key]

    def through(images: Tensor) -> Tensor:
        _passes.add((key, images.shape))
        return made(tensors, images)

    return through


def fetch(store: Store, device: str) -> None:
    """Load what another worker compiled for such a device; without it, it is compiled here.

    It is code that runs here: whoever may write to the store may run code on its workers.
    """
    if is_wanted() and device not in _fetched:
        _fetched.add(device)
        with contextlib.suppress(NotThere):
            torch.compiler.load_cache_artifacts(store.within(ARTIFACTS).read(device))


def keep(store: Store, device: str) -> None:
    """Leave what this process compiled for other workers, whenever it compiled more."""
    if len(_passes) == _kept.get(device, 0):
        return
    _kept[device] = len(_passes)
    found = torch.compiler.save_cache_artifacts()
    if found is not None:
        store.within(ARTIFACTS).write(device, found[0])
