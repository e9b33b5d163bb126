"""Finds in a model what ``FusedNorm`` does in one: batch norms, and what follows them."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tuner.fused._norm import FusedNorm

RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
SUMS: tuple[Any, ...] = (operator.add, torch.add, "add")
SUMS_IN_PLACE: tuple[Any, ...] = (operator.iadd, "add_")
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
POOL = {
    "kernel_size": 2,
    "stride": 2,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
Layers = dict[str, nn.Module]

log = logging.getLogger(__name__)


def traced(model: nn.Module) -> nn.Module | None:
    """See ``tuner.fused.fused``."""
    try:
        found = fx.GraphModule(model, _Tracer().trace(model))
    except Exception as reason:  # whatever a model's code makes of stand-ins for tensors
        log.debug("the batch norms of %s are not fused: %s", type(model).__name__, reason)
        return None
    layers = dict(found.named_modules())
    norms = [node for node in found.graph.nodes if _is_norm(node, layers)]
    for number, node in enumerate(norms):
        chain, norm = _chain(node, layers), layers[str(node.target)]
        assert isinstance(norm, nn.BatchNorm2d)
        name = f"fused_{number}"
        found.add_submodule(name, FusedNorm(norm, pools=chain.pools, positive=chain.positive))
        _replace(found.graph, chain, name)
    found.recompile()
    return found


class _Proxy(fx.Proxy):
    """Stands for a tensor; what is written into it in place is traced so.

    fx itself takes ``a += b`` for ``a = a + b``, which is another thing where ``a`` has two names.
    """


def _recorded(name: str) -> Any:
    """The method of a proxy for an operator in place."""
    target = getattr(operator, name)

    def record(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _recorded(_name))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@dataclass
class _Chain:
    """A batch norm and the operations after it that are done with it."""

    nodes: list[fx.Node]
    added: fx.Node | None = None
    pools: bool = False
    positive: bool = False


def _chain(norm: fx.Node, layers: Layers) -> _Chain:
    """What follows the norm, as far as nothing else needs what is in between."""
    chain = _Chain([norm])
    while (node := _only_user(chain.nodes[-1])) is not None:
        if not chain.positive and _is_relu(node, layers):
            chain.positive = True
        elif not chain.pools and chain.added is None and _is_pool(node, layers):
            if not chain.positive and not _is_relu(_only_user(node), layers):
                break
            chain.pools = True
        elif not chain.pools and not chain.positive and chain.added is None:
            chain.added = _added(chain.nodes[-1], node)
            if chain.added is None:
                break
        else:
            break
        chain.nodes.append(node)
    return chain if _is_undisturbed(chain, layers) else _Chain([norm])


def _is_undisturbed(chain: _Chain, layers: Layers) -> bool:
    """Whether nothing is written in place while the chain is under way, but by the chain."""
    node, last = chain.nodes[0], chain.nodes[-1]
    while node is not last:
        node = node.next
        if node not in chain.nodes and _writes(node, layers):
            return False
    return True


def _writes(node: fx.Node, layers: Layers) -> bool:
    """Whether an operation may write its result over what it is given."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    asked = bool(node.kwargs.get("inplace")) or any(each is True for each in node.args)
    by_layer = bool(getattr(_layer(node, layers), "inplace", False))
    return asked or by_layer or name in IN_PLACE or name.endswith("_")


def _replace(graph: fx.Graph, chain: _Chain, name: str) -> None:
    """One call in place of the chain's."""
    norm, last = chain.nodes[0], chain.nodes[-1]
    with graph.inserting_before(last):
        given = (norm.args[0], *([] if chain.added is None else [chain.added]))
        call = graph.call_module(name, given)
    last.replace_all_uses_with(call)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _layer(node: fx.Node | None, layers: Layers) -> nn.Module | None:
    return layers.get(str(node.target)) if node is not None and node.op == "call_module" else None


def _is_norm(node: fx.Node, layers: Layers) -> bool:
    plainly = len(node.args) == 1 and not node.kwargs
    return plainly and type(_layer(node, layers)) is nn.BatchNorm2d


def _is_relu(node: fx.Node | None, layers: Layers) -> bool:
    if node is None or node.op == "call_module":
        return type(_layer(node, layers)) is nn.ReLU
    return node.target in RELUS


def _is_pool(node: fx.Node, layers: Layers) -> bool:
    """Whether it takes the largest of 2x2 pixels."""
    layer = _layer(node, layers)
    if type(layer) is nn.MaxPool2d:
        given = {name: getattr(layer, name) for name in POOL}
    elif node.op == "call_function" and node.target is F.max_pool2d:
        given = {**POOL, **dict(zip(POOL, node.args[1:], strict=False)), **node.kwargs}
        given["stride"] = given["stride"] or given["kernel_size"]
    else:
        return False
    return all(given[name] in (value, (value, value)) for name, value in POOL.items())


def _added(maps: fx.Node, node: fx.Node) -> fx.Node | None:
    """What ``node`` adds to the maps; None if it does something else, or changes another tensor."""
    if len(node.args) != 2 or node.kwargs or node.target not in (*SUMS, *SUMS_IN_PLACE):
        return None
    first, second = node.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if first is maps:
        return second
    return first if node.target in SUMS else None
