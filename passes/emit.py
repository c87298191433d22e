"""Emission: two graph modules over the same block programs and the same parameters.

The printed code of either reads as the step it is: blocks in order, a stop-gradient between two of them in the local
step; a forward sweep and a reverse sweep in the BP step.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from bpfx.passes.graph import ModelGraph
from bpfx.passes.lower import Block
from bpfx.passes.programs import ForwardOnce, LossGradient, VectorJacobian
from bpfx.passes.rng import get_rng_state, set_rng_state
from bpfx.passes.stages import Stage
from bpfx.passes.stop_gradient import accumulate, hand_over, stop_gradient


class _Writer:
    """A graph under construction, with the values of the forward graph by node."""

    def __init__(self, graph: ModelGraph) -> None:
        self.source = graph
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        for node in graph.inputs:
            assert node is not None
            self.values[node] = self.graph.placeholder(node.name)
        self.users = {n: n.name for n in graph.inputs if n is not None}

    def call(self, name: str, program: nn.Module, arguments: Sequence[Any]) -> fx.Node:
        self.root.add_module(name, program)
        node = self.graph.call_module(name, tuple(arguments))
        return node

    def item(self, values: fx.Node, index: int, name: str) -> fx.Node:
        node = self.graph.call_function(operator.getitem, (values, index))
        node._rename(name)
        return node

    def outputs(self, call: fx.Node, block: Block, cut: bool) -> None:
        for i, n in enumerate(block.outputs):
            if cut and block.trainable and n is self.source.loss:
                continue  # the program returns it by itself, without its autograd graph
            value = self.item(call, i, n.name)
            if cut and n.name in block.differentiable:
                value = self.graph.call_function(stop_gradient, (value,))
            self.values[n] = value

    def results(self) -> tuple[object, ...]:
        return tuple(self.values.get(o, o) if isinstance(o, fx.Node) else o for o in self.source.outputs)

    def module(self, result: Any, name: str) -> fx.GraphModule:
        self.graph.output(result)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name=name)


def emit_local_step(graph: ModelGraph, stages: Sequence[Stage]) -> fx.GraphModule:
    """The local step: ``(*inputs) -> (loss, local losses, gradients per block, outputs)``."""
    writer = _Writer(graph)
    local_losses, grads = [], []
    for stage in stages:
        block, k = stage.block, stage.index
        values = [writer.values[n] for n in stage.arguments]
        if isinstance(stage.local, ForwardOnce):
            call = writer.call(f"block_{k}_forward", stage.local, values)
            writer.outputs(call, block, cut=True)
            if stage is stages[-1]:
                local_losses.append(writer.values[block.outputs[0]])
            continue
        given = writer.graph.call_function(hand_over, tuple(values))
        given._rename(f"values_{k}")
        call = writer.call(f"block_{k}_local", stage.local, [given])
        writer.outputs(call, block, cut=True)
        local_losses.append(writer.item(call, len(block.outputs), f"loss_{k}"))
        grads.append(writer.item(call, len(block.outputs) + 1, f"grads_{k}"))
    writer.values[graph.loss] = local_losses[-1]  # a model that returns its loss returns it as an output, too
    return writer.module((local_losses[-1], tuple(local_losses), tuple(grads), writer.results()), "LocalStep")


def emit_bp_step(graph: ModelGraph, stages: Sequence[Stage]) -> fx.GraphModule:
    """The BP step: ``(*inputs) -> (loss, gradients per block, outputs)``, recomputing block by block."""
    writer = _Writer(graph)
    g = writer.graph
    states: dict[int, fx.Node] = {}
    for stage in stages[:-1]:
        block = stage.block
        if block.random and stage.vjp is not None:
            states[block.index] = g.call_function(get_rng_state)
            states[block.index]._rename(f"rng_{block.index}")
        assert stage.forward is not None
        call = writer.call(f"block_{block.index}_forward", stage.forward, [writer.values[n] for n in block.inputs])
        writer.outputs(call, block, cut=False)
    last, head = stages[-1].block, stages[-1].vjp
    assert isinstance(head, LossGradient)
    call = writer.call(f"block_{last.index}_backward", head, [writer.values[n] for n in last.inputs])
    for i, n in enumerate(last.outputs):
        writer.values[n] = writer.item(call, i, n.name)
    cotangents: dict[fx.Node, fx.Node] = {}
    _collect(writer, call, len(last.outputs), [last.inputs[i] for i in head.wanted], cotangents)
    grads = [writer.item(call, len(last.outputs) + len(head.wanted), f"grads_{last.index}")]
    if states:
        final = g.call_function(get_rng_state)
        final._rename("rng_after")
    for stage in reversed(stages[:-1]):
        block, vjp = stage.block, stage.vjp
        if not isinstance(vjp, VectorJacobian):
            continue
        given = [block.outputs[i] for i in vjp.given]
        call = writer.call(
            f"block_{block.index}_vjp",
            vjp,
            [
                states.get(block.index),
                *(writer.values[n] for n in block.inputs),
                *(cotangents.pop(n, None) for n in given),
            ],
        )
        _collect(writer, call, 0, [block.inputs[i] for i in vjp.wanted], cotangents)
        grads.append(writer.item(call, len(vjp.wanted), f"grads_{block.index}"))
    if states:
        g.call_function(set_rng_state, (final,))
    return writer.module((writer.values[graph.loss], tuple(grads[::-1]), writer.results()), "BPStep")


def _collect(
    writer: _Writer, call: fx.Node, offset: int, nodes: list[fx.Node], cotangents: dict[fx.Node, fx.Node]
) -> None:
    """Add the cotangents that ``call`` returns to those already known for the same values."""
    for i, n in enumerate(nodes):
        value = writer.item(call, offset + i, f"cotangent_{n.name}_{call.name.split('_')[1]}")
        if n in cotangents:
            value = writer.graph.call_function(accumulate, (cotangents[n], value))
        cotangents[n] = value
