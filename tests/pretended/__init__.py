"""A CUDA device pretended on the processor, so that what is made for a GPU runs without one.

A plugin of pytest for a process of its own: ``make gpu`` runs the tests marked ``gpu`` with it.
It keeps a GPU's rules, which the processor would not mind being broken:

* tensors of one operation are on one device, and so are generators;
* the host does not wait within a graph, nor where ``set_sync_debug_mode`` forbids it;
* a graph replays operations on the memory it was captured with, not the code that launched them;
* what one stream does with memory that another one used has to wait for that; so has whoever is
  given memory that was given back.

It shows nothing of a GPU's speed, of the numbers its kernels give, of the memory they need, nor of
several devices. It needs a torch that was built with CUDA, Linux, and a C compiler.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def why_not() -> str | None:
    """The reason why no GPU can be pretended here."""
    if not sys.platform.startswith("linux") or torch.version.cuda is None:
        return "needs Linux, and a torch that was built with CUDA"
    return None if shutil.which("cc") else "needs a C compiler"


def environment(folder: Path) -> dict[str, str]:
    """Variables of a process that finds a device; what it loads is compiled to ``folder``."""
    library, here = folder / "libcuda.so.1", Path(__file__).parent
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(here / "cuda.c")], check=True)
    paths = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    libraries = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])
    loaded = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": libraries}
    return {**loaded, "PYTHONPATH": paths, "TUNER_PRETEND_GPU": "1"}


def install() -> None:
    """Let torch's functions find the pretended device, for the rest of this process."""
    from pretended import _graphs, _random, _streams
    from pretended._tensors import Pretending

    state, own = _streams.state, _random.default
    found: dict[str, Any] = {
        "Stream": _streams.Stream,
        "Event": _streams.Event,
        "CUDAGraph": _graphs.CUDAGraph,
        "stream": state.on,
        "current_stream": lambda _=None: state.stream,
        "default_stream": lambda _=None: state.default,
        "synchronize": state.synchronize,
        "set_sync_debug_mode": state.set_sync_mode,
        "get_sync_debug_mode": lambda: state.sync_mode,
        "default_generators": (own,),
        "get_rng_state": lambda _=None: own.get_state(),
        "set_rng_state": lambda new, _=None: own.set_state(new),
        "mem_get_info": lambda _=None: (2**36, 2**37),
        "get_device_name": lambda _=None: "Pretended",
        "graph_pool_handle": lambda: (0, 1),
        "_lazy_init": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _=None: None,
    }
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1}
    answers |= {"current_device": 0, "memory_reserved": 0, "max_memory_reserved": 2**20}
    found |= {name: functools.partial(_answer, value) for name, value in answers.items()}
    for name, value in found.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch.backends.cudnn.enabled = False
    torch.__future__.set_swap_module_params_on_conversion(True)
    _replace_methods()
    Pretending().__enter__()  # type: ignore[no-untyped-call]


def _answer(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _replace_methods() -> None:
    """What asks the driver before it comes to a tensor."""
    from pretended._streams import Stream, state
    from pretended._tensors import GPU, Pretended, place_of

    real_to, real_list = Tensor.to, Tensor.tolist

    def indexed(value: Any) -> Any:
        is_device = isinstance(value, str | torch.device)
        return GPU if is_device and torch.device(value).type == "cuda" else value

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = {key: indexed(value) for key, value in kwargs.items()}
        return real_to(self, *map(indexed, args), **named)

    def keep(self: Tensor, stream: Stream) -> None:
        state.memory.keep(place_of(self), stream.number)

    methods: dict[str, Callable[..., Any]] = {
        "to": to,
        "cuda": lambda self, *_, **options: real_to(self, GPU, **options),
        "tolist": lambda self: real_list(self.cpu() if isinstance(self, Pretended) else self),
        "record_stream": keep,
        "pin_memory": lambda self, *_: self.clone(),
    }
    for name, method in methods.items():
        setattr(Tensor, name, method)
    torch.tensor, torch.as_tensor = _lifted(torch.tensor), _lifted(torch.as_tensor)


def _lifted(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Made on the host first."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, Tensor) and data.is_cuda:
            return data.to(device or data.device, options.get("dtype") or data.dtype)
        new = real(data, **options)
        return new if device is None else new.to(device)

    return made


if os.environ.get("TUNER_PRETEND_GPU"):
    install()
