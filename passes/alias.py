"""Which values share memory: an in-place operation on one of them changes them all."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

# Return their argument itself where p is 0 or train is False, without saying so in their schema.
_DROPOUT = {_aten.dropout.default, _aten.alpha_dropout.default, _aten.feature_dropout.default}


def written(value: Any, write: Any) -> Any:
    """The value itself, after an operation that wrote into its memory through another view."""
    return value


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


def show_writes(graph: fx.Graph) -> None:
    """Make every write through a view an edge of the graph: later readers get ``written(value, write)``.

    ``out[:, 0] = x`` is recorded as a write into a slice, and what reads ``out`` afterwards has no edge to it: neither
    the gradient nor the value of ``x`` would be seen to get there.
    """
    aliases = analyse(graph)
    for root, mutations in aliases.mutations.items():
        members = list(aliases.groups[root])
        for write in sorted(m.node for m in mutations):
            for member in [m for m in members if m < write]:
                later = [user for user in member.users if write < user]
                if not later:
                    continue
                with graph.inserting_after(write):
                    seen = graph.call_function(written, (member, write))
                seen.meta = {**write.meta, "val": member.meta.get("val")}
                for user in later:
                    user.replace_input_with(member, seen)
                members.append(seen)


def analyse(graph: fx.Graph) -> Aliases:
    """Group nodes by the memory they share, from the operators' schemas."""
    root: dict[fx.Node, fx.Node] = {}
    whole: dict[fx.Node, bool] = {}  # the node is its root's whole tensor, in the same shape
    writes: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        root[node], whole[node] = node, True
        if node.target is written:
            root[node], whole[node] = root[node.args[0]], whole[node.args[0]]
        elif node.target is operator.getitem and root[node.args[0]] is not node.args[0]:
            root[node], whole[node] = root[node.args[0]], False  # one of several views that one operator made
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for position, argument in enumerate(schema.arguments):
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            if not isinstance(value, fx.Node):
                continue
            info = argument.alias_info
            if info is None:
                if node.target in _DROPOUT and position == 0 and not (len(node.args) == 3 and all(node.args[1:])):
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
