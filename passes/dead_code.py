"""Leave out what the model computes and nobody reads.

A parameter that only such nodes read gets no gradient from plain BP, and no local loss could reach it either; a cut
among them would part nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from bpfx.passes.alias import written
from bpfx.passes.graph import ModelGraph
from bpfx.passes.opaque import draws


def remove_dead_code(graph: ModelGraph, mutated: set[str]) -> None:
    """Erase every node that neither the loss nor an output depends on and that leaves no trace.

    What writes into memory or into a buffer stays, and so does what draws random numbers: the draws after it would be
    others.

    Args:
        graph: changed in place.
        mutated: names of the buffers that a step changes.
    """
    changing = {node for node, name in graph.weight_of.items() if name in mutated}

    def stays(node: fx.Node) -> bool:
        if node.op != "call_function":
            return node.op != "get_attr"
        known = isinstance(node.target, torch._ops.OpOverload) or node.target in (operator.getitem, written)
        if not known and not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return True  # a region with a graph of its own, which may write and draw
        return bool(node.is_impure()) or draws(node, graph.root) or not changing.isdisjoint(node.all_input_nodes)

    graph.graph.eliminate_dead_code(stays)
    left = set(graph.graph.nodes)
    graph.batch_dims = {node: dim for node, dim in graph.batch_dims.items() if node in left}
