"""Concrete shapes for every node of a graph at the example's batch size, without computing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bpfx.passes.graph import ModelGraph, Weights


def propagate(graph: ModelGraph, weights: Weights, tensors: Sequence[Tensor]) -> None:
    """Set ``node.meta["val"]`` of every node to a fake tensor (or a number) of its size on ``tensors``."""
    values: list[Tensor] = []
    queue = iter(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                real = weights[graph.weight_of[node]] if node in graph.weight_of else next(queue)
                values.append(mode.from_tensor(real.detach(), static_shapes=True))
        FakeTensorProp(fx.GraphModule(graph.root, graph.graph), mode).propagate_dont_convert_inputs(*values)
