"""Where a head could not read what crosses: no cut is made there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bpfx.passes.graph import ModelGraph

_NORMS = {"batch_norm", "group_norm", "instance_norm", "dropout", "alpha_dropout", "feature_dropout", "hardtanh"}
_SOFTMAX = {"softmax", "log_softmax"}


def unreadable(graph: ModelGraph, nodes: Sequence[fx.Node], live: set[fx.Node]) -> list[tuple[int, int]]:
    """Ranges of positions that no cut may fall into, as pairs ``(first, last)``: after p where ``first <= p < last``.

    Args:
        graph: with shapes.
        nodes: its compute nodes in order.
        live: those of its nodes that carry a gradient.
    """
    return _out_of_reach(graph, nodes, live) + _scores(nodes, live)


def _out_of_reach(graph: ModelGraph, nodes: Sequence[fx.Node], live: set[fx.Node]) -> list[tuple[int, int]]:
    """From the use of a weight to the first value with an entry per sample that depends on it.

    A head reads values with samples. What a weight makes may have none for a while: something of the weight's own
    shape, or samples and tokens in one dimension.
    """
    pending: dict[fx.Node, set[int]] = {}  # where the weights behind a value without samples are used
    ranges: dict[int, int] = {}
    for p, node in enumerate(nodes):
        weighted = any(a in live and a in graph.weight_of for a in node.all_input_nodes)
        uses = set().union([p] if weighted else [], *(pending.get(a, ()) for a in node.all_input_nodes))
        if node in graph.batch_dims:
            ranges = {**dict.fromkeys(uses, p), **ranges}
        elif node in live:
            pending[node] = uses
    return list(ranges.items())


def _scores(nodes: Sequence[fx.Node], live: set[fx.Node]) -> list[tuple[int, int]]:
    """From a value that only a softmax reads to that softmax: such values are masked with infinity."""
    order = {node: p for p, node in enumerate(nodes)}
    scores: set[fx.Node] = set()
    for node in reversed(nodes):
        # The second argument of type_as lends its dtype and nothing else.
        users = [u for u in node.users if _op(u) != "type_as" or u.args[0] is node]
        if users and all(_op(u) in _SOFTMAX or (u in scores and _passes_on(u)) for u in users):
            scores.add(node)
    return [(order[n], max(order[u] for u in n.users)) for n in scores if n in live]


def pointwise(node: fx.Node) -> bool:
    """Whether an operator works element by element, normalisations and dropout counted in."""
    return _op(node) in _NORMS or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _passes_on(node: fx.Node) -> bool:
    """Whether a value is made of its argument element by element, or a view of it."""
    schema = getattr(node.target, "_schema", None)
    return pointwise(node) or (schema is not None and any(r.alias_info is not None for r in schema.returns))


def _op(node: fx.Node) -> str:
    """Name of the operator, without the mark of an in-place one."""
    return node.target.overloadpacket.__name__.strip("_") if isinstance(node.target, torch._ops.OpOverload) else ""
