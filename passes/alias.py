"""Which values share memory: an in-place operation on one of them changes them all."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

_aten = torch.ops.aten

# Return their argument itself when there is nothing to do, without saying so in their schema.
_MAYBE_SAME = {_aten.dropout.default, _aten.alpha_dropout.default, _aten.feature_dropout.default}


@dataclasses.dataclass
class Mutation:
    """One in-place operation on an activation.

    Attributes:
        node: the operation.
        target: the value it overwrites.
        simple: every later use of the memory goes through values that are the whole tensor, so that the operation
            can be replaced by its functional form.
        functional: that form, where there is one.
    """

    node: fx.Node
    target: fx.Node
    simple: bool
    functional: torch._ops.OpOverload | None


@dataclasses.dataclass
class Aliases:
    """Groups of nodes that share memory, by their first node, and what overwrites each group."""

    root: dict[fx.Node, fx.Node]
    groups: dict[fx.Node, list[fx.Node]]
    mutations: dict[fx.Node, list[Mutation]]


def analyse(graph: fx.Graph) -> Aliases:
    """Group nodes by the memory they share, from the operators' schemas."""
    root: dict[fx.Node, fx.Node] = {}
    whole: dict[fx.Node, bool] = {}  # the node is its root's whole tensor, in the same shape
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        root[node], whole[node] = node, True
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for position, argument in enumerate(schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if not isinstance(value, fx.Node):
                continue
            info = argument.alias_info
            if info is None:
                if node.target in _MAYBE_SAME and position == 0:
                    root[node], whole[node] = root[value], whole[value]
                continue
            returns = any(r.alias_info is not None for r in schema.returns)
            if info.is_write:
                writes.append((node, value))
                if returns:
                    root[node], whole[node] = root[value], whole[value]
            elif returns:
                root[node] = root[value]
                whole[node] = False
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, first in root.items():
        groups.setdefault(first, []).append(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    mutations: dict[fx.Node, list[Mutation]] = {}
    for node, target in writes:
        group = groups[root[target]]
        # A view taken before the write and read after it would miss a functional replacement.
        viewed_later = any(
            not whole[member] and order[member] < order[node] and any(order[u] > order[node] for u in member.users)
            for member in group
        )
        functional = _functional(node.target)
        simple = whole[target] and not viewed_later and functional is not None
        mutations.setdefault(root[target], []).append(Mutation(node, target, simple, functional))
    return Aliases(root, groups, mutations)


def _functional(op: object) -> torch._ops.OpOverload | None:
    """``aten.relu_.default`` → ``aten.relu.default``."""
    if not isinstance(op, torch._ops.OpOverload):
        return None
    packet = op.overloadpacket.__name__
    if not packet.endswith("_"):
        return None
    pure = getattr(getattr(torch.ops, op.namespace), packet[:-1], None)
    return getattr(pure, op._overloadname, None) if pure is not None else None
