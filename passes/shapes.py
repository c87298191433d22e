"""Concrete shapes for every node of a graph at the example's batch size, as a rule without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map_only

from bpfx.passes.graph import ModelGraph, Weights
from bpfx.passes.rng import preserve


def propagate(graph: ModelGraph, weights: Weights, tensors: Sequence[Tensor]) -> None:
    """Set ``node.meta["val"]`` of every node to a fake tensor (or a number) of its size on ``tensors``.

    Where a size depends on values (``x[mask]``) the graph is run once, without gradients; random states and buffers are
    as before afterwards.
    """
    gm = fx.GraphModule(graph.root, graph.graph)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    queue = iter(tensors)
    real = [(weights[graph.weight_of[n]] if n in graph.weight_of else next(queue)).detach() for n in placeholders]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        values = [mode.from_tensor(t, static_shapes=True) for t in real]
        try:
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*values)
            return
        except (DynamicOutputShapeException, DataDependentOutputException):
            pass
    with preserve(weights), torch.no_grad():
        _Recorder(gm, FakeTensorMode(allow_non_fake_inputs=True)).run(*real)


class _Recorder(fx.Interpreter):
    """Runs a graph, and notes the shape of every value."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._mode = mode

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = tree_map_only(Tensor, lambda t: self._mode.from_tensor(t, static_shapes=True), result)
        return result
