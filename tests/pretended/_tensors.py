"""Tensors that say they are on a GPU, and the rules of a GPU for what is done with them.

The memory is the processor's, and it computes: at once, also what a GPU would do later.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pretended import _random
from pretended._memory import HOST, Bytes, bytes_of, changed
from pretended._streams import state

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = ("copy_", "_to_copy", "_foreach_copy_", "set_", "lift_fresh")
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")
"""The size or value of what they give is known only when it is there."""
SHAPES_ONLY = ("empty", "new_", "zeros_like", "ones_like", "full_like")
"""They read no number of what they are given."""
KEEPS_STATISTICS = ("native_batch_norm", "_native_batch_norm_legit")

Operation = Any
"""A ``torch._ops.OpOverload``."""


class _Held:
    """Ends with the tensor that has it, also where two tensors are swapped."""

    def __init__(self, storage: int) -> None:
        self.storage = storage
        state.memory.take(storage, state.stream.number, of_graph=state.capturing is not None)

    def __del__(self) -> None:
        state.memory.give_back(self.storage)


class Pretended(Tensor):
    """A tensor of the processor that is on a GPU to everybody who asks."""

    _held: _Held
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        new: Pretended = Tensor._make_subclass(
            cls, held, False, dispatch_device=True, device_for_backend_keys=GPU
        )
        new._held = _Held(held.untyped_storage()._cdata)
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Operation, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new = self.detach().clone(memory_format=torch.preserve_format)
            own = {name: value for name, value in vars(self).items() if name != "_held"}
            vars(new).update(copy.deepcopy(own, memo))
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @property
    def data(self) -> Tensor:
        """See torch."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self._held = _Held(new.untyped_storage()._cdata)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype})"


def held(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the processor."""
    with torch._C._DisableTorchDispatch():
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), *place)


def plainly(value: Any) -> Any:
    """What is held where it is a pretended tensor, else the value."""
    return held(value) if isinstance(value, Pretended) else value


def dispatch(func: Operation, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do an operation, if a GPU would."""
    name = name_of(func)
    if func is torch.ops.prim.device.default:
        return GPU
    if name == "to":
        return _to(func, args, kwargs)
    if torch.is_inference_mode_enabled() and _is_composed(func):
        with Pretending():  # type: ignore[no-untyped-call]
            return func.decompose(*args, **kwargs)
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    arrives = target is not None and target.type == "cuda"
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    kwargs |= {"device": CPU} if arrives else {}
    if not ours and not arrives:
        return func(*args, **kwargs)
    if name in COPIES:
        if _leaves(name, args, target):
            return _to_host(func, args, kwargs)
        _check_arrival(name, args, kwargs)
    else:
        _check_devices(func, args, tensors)
    if name in WAITING:
        _host_waits_for(func, ours)
    return _execute(func, args, kwargs)


class Pretending(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees also what has no tensor yet."""

    def __torch_dispatch__(
        self, func: Operation, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def name_of(func: Operation) -> str:
    """Its name without namespace and overload."""
    return str(func._schema.name).split("::")[-1]


def _is_composed(func: Operation) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _to(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """As ``_to_copy``, where something changes."""
    tensor = args[0]
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "other" in given:
        given |= {"dtype": given["other"].dtype, "device": given["other"].device}
    known = ("dtype", "device", "memory_format", "non_blocking")
    wanted = {key: given[key] for key in known if given.get(key)}
    moves = torch.device(wanted.get("device", tensor.device)).type != tensor.device.type
    if not moves:
        wanted.pop("device", None)
    is_new = moves or given.get("copy") or wanted.get("dtype", tensor.dtype) != tensor.dtype
    if not is_new and wanted.get("memory_format") in (None, torch.preserve_format):
        return tensor
    return dispatch(torch.ops.aten._to_copy.default, (tensor,), wanted)


def _leaves(name: str, args: Sequence[Any], target: torch.device | None) -> bool:
    """Whether a copy is one to the host."""
    if name == "copy_":
        return not isinstance(args[0], Pretended)
    return name == "_to_copy" and target is not None and target.type == "cpu"


def _to_host(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    source = args[1] if name_of(func) == "copy_" else args[0]
    if kwargs.get("non_blocking") or (name_of(func) == "copy_" and args[2:] and args[2]):
        state.memory.launch(str(func), state.stream.number, [place_of(source)], [], [])
    else:
        _host_waits_for(func, [source])
    result = func(*tree_map(plainly, args), **kwargs)
    return args[0] if name_of(func) == "copy_" else result


def _check_arrival(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """A copy from the host waits, or is one that a graph cannot hold: the address may be gone."""
    source = args[1] if name == "copy_" else args[0]
    if not isinstance(source, Tensor) or isinstance(source, Pretended):
        return
    if state.capturing is not None:
        raise RuntimeError("a graph that is captured copies from the host")
    if not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2])):
        state.host_waits("copy from the host")


def _check_devices(func: Operation, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Numbers may be on the host, and indices of what is on the device, who then waits."""
    name = name_of(func)
    strange = [t for t in tensors if not isinstance(t, Pretended) and t.ndim > 0]
    if name in INDEXING and isinstance(args[0], Pretended):
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            state.host_waits(f"{name} with a mask")
        if strange:
            state.host_waits(f"{name} with indices on the host")
    elif strange:
        shapes = [tuple(t.shape) for t in strange]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got {shapes} on the cpu"
        )


def _host_waits_for(func: Operation, tensors: Sequence[Tensor]) -> None:
    state.host_waits(str(func))
    state.memory.launch(str(func), state.stream.number, [place_of(t) for t in tensors], [], [])
    state.memory.wait(HOST, state.memory.past(state.stream.number))


def place_of(tensor: Tensor) -> Bytes:
    """See ``bytes_of``."""
    with torch._C._DisableTorchDispatch():
        return bytes_of(tensor)


def _execute(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute it, note it, and capture it if somebody does."""
    graph = state.capturing if state.stream is getattr(state.capturing, "stream", None) else None
    known: dict[int, Tensor] = {}

    def take(value: Any) -> Any:
        if isinstance(value, Pretended):
            return known.setdefault(id(value), held(value))
        return value

    call = tree_map(take, args), tree_map(take, kwargs)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Pretended)]
    written = [t for t in written_by(func, args, kwargs) if isinstance(t, Pretended)]
    before = [take(tensor).clone() for tensor in written]
    result = compute(func, *call, _random.default.box if graph is None else None)
    places = [p for t, b in zip(written, before, strict=True) for p in changed(take(t), b)]
    back = {id(plain): value for value in given for plain in [take(value)]}
    inside = {take(value).untyped_storage()._cdata for value in given}
    fresh: list[Pretended | None] = []
    wrapped = tree_map(lambda value: _wrap(value, back, inside, fresh), result)
    new = [tensor for tensor in fresh if tensor is not None]
    if graph is not None:
        # A graph that is captured has computed nothing.
        for tensor, value in zip(written, before, strict=True):
            take(tensor).copy_(value)
        for tensor in new:
            held(tensor).zero_()
        graph.add(func, args, kwargs, fresh)
    elif written or new or not fresh:
        reads = [] if name_of(func).startswith(SHAPES_ONLY) else [place_of(t) for t in given]
        made = [place_of(tensor) for tensor in new]
        state.memory.launch(str(func), state.stream.number, reads, places, made)
    return wrapped


def _wrap(
    value: Any, back: Mapping[int, Tensor], inside: set[int], fresh: list[Pretended | None]
) -> Any:
    """A result as a tensor of the device: the one that was given, a view of it, or a new one."""
    if not isinstance(value, Tensor):
        return value
    found = back.get(id(value))
    if found is None:
        found = Pretended(value)
        is_view = value.untyped_storage()._cdata in inside
        fresh.append(None if is_view else found)
    else:
        fresh.append(None)
    return found


def compute(
    func: Operation, args: Sequence[Any], kwargs: dict[str, Any], box: _random.Box | None
) -> Any:
    """The results of the processor, which draws from ``box``, or else as a rehearsal."""
    if not any(word in name_of(func) for word in _random.DRAWING):
        return func(*args, **kwargs)
    given = kwargs.get("generator")
    if isinstance(given, torch.Generator):
        raise TypeError("Expected a 'cuda' device type for generator but found 'cpu'")
    kwargs = {key: value for key, value in kwargs.items() if key != "generator"}
    with _random.drawing_from(box or _random.default.clone_state().box):
        return func(*args, **kwargs)


def written_by(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation changes."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))
    if name_of(func) in KEEPS_STATISTICS:
        yield from (t for t in args[3:5] if isinstance(t, Tensor))
