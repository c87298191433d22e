"""Lowering, first half: each block becomes a graph module of its own, called with its inputs and its weights.

Weights are arguments, so structurally equal blocks share one module (and one compiled program), and a caller can hand
in scratch buffers where a run must leave no trace.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from bpfx.passes.alias import analyse
from bpfx.passes.graph import ModelGraph, Weights, differentiable_nodes, module_path, module_paths
from bpfx.passes.opaque import draws


@dataclasses.dataclass
class Block:
    """One block of the forward graph.

    Attributes:
        index: position, from 0.
        nodes: of the forward graph, in execution order.
        inputs: values it reads: user inputs, and what earlier blocks made.
        outputs: values that later blocks or the caller read; the last block's first output is the loss.
        differentiable: names of the inputs and outputs that carry a gradient in the whole model.
        weights: canonical names of the weights it reads, in the order of its code's last arguments.
        trainable: those of them that train, and that an output which carries a gradient depends on.
        mutated: buffers among them that a run changes.
        random: whether it may draw random numbers.
        opaque: module paths that run as themselves in it.
        overwrites: whether it may write into what it is given.
        source: ``(*inputs, *weights) -> outputs`` as a graph module.
        code: the same, compiled where that is asked for.
    """

    index: int
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    differentiable: set[str]
    weights: list[str]
    trainable: list[str]
    mutated: list[str]
    random: bool
    opaque: list[str]
    overwrites: bool
    source: fx.GraphModule
    code: Callable[..., Any]

    @property
    def modules(self) -> list[str]:
        """Paths of the innermost modules, in order of first use."""
        return [p for p in dict.fromkeys(module_path(n) for n in self.nodes) if p]

    @property
    def name(self) -> str:
        """``first module … last module``."""
        paths = self.modules
        if not paths:
            return "loss" if self.index else "whole model"
        return paths[0] if paths[0] == paths[-1] else f"{paths[0]} … {paths[-1]}"


def split(graph: ModelGraph, weights: Weights, cuts: Sequence[int], mutated: set[str]) -> list[Block]:
    """Cut the graph after each position of ``cuts`` (indices of compute nodes) into blocks.

    Raises nothing for a valid partition; isolation is structural, since no block's code holds another block's nodes.
    """
    nodes = graph.compute_nodes()
    live = differentiable_nodes(graph, weights)
    bounds = [0, *(c + 1 for c in cuts), len(nodes)]
    where = {n: k for k, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)) for n in nodes[a:b]}
    results = [graph.loss, *(o for o in graph.outputs if isinstance(o, fx.Node))]
    shared: dict[str, fx.GraphModule] = {}
    aliases = analyse(graph.graph)
    overwriting = {m.node for r, ms in aliases.mutations.items() if r in graph.inputs for m in ms}
    blocks = []
    for k in range(len(bounds) - 1):
        inside = nodes[bounds[k] : bounds[k + 1]]
        reads = dict.fromkeys(a for n in inside for a in n.all_input_nodes)
        names = list(dict.fromkeys(graph.weight_of[a] for a in reads if a in graph.weight_of))
        user_inputs = [a for a in graph.inputs if a in reads and a is not None]
        inputs = [*user_inputs, *(a for a in reads if where.get(a, k) < k)]
        outputs = [
            n for n in inside if n is not graph.loss and (n in results or any(where.get(u, k) > k for u in n.users))
        ]
        if where.get(graph.loss) == k:
            outputs.insert(0, graph.loss)
        code = _code(graph, inside, inputs, names, outputs)
        key = _structure(code, graph, inputs, names, weights)
        code = shared.setdefault(key, code)
        blocks.append(
            Block(
                index=k,
                nodes=inside,
                inputs=inputs,
                outputs=outputs,
                differentiable={n.name for n in (*inputs, *outputs) if n in live},
                weights=names,
                trainable=_trainable(graph, weights, names, inside, [n for n in outputs if n in live]),
                mutated=[n for n in names if n in mutated],
                random=any(draws(n, graph.root) for n in inside),
                opaque=[
                    p
                    for p in graph.opaque
                    if any(n.op == "call_module" and (p in module_paths(n) or p == "") for n in inside)
                ],
                overwrites=bool(overwriting & set(inside)) or any(n.op == "call_module" for n in inside),
                source=code,
                code=code,
            )
        )
    return blocks


def _trainable(
    graph: ModelGraph, weights: Weights, names: list[str], inside: list[fx.Node], outputs: list[fx.Node]
) -> list[str]:
    """Those that train and that something differentiable which leaves the block depends on."""
    within, reached, stack = set(inside), set(outputs), list(outputs)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in reached:
                reached.add(node)
                if node in within:
                    stack.append(node)
    read = {graph.weight_of[n] for n in reached if n in graph.weight_of}
    return [n for n in names if n in read and weights[n].requires_grad]


def _code(
    graph: ModelGraph, nodes: list[fx.Node], inputs: list[fx.Node], names: list[str], outputs: list[fx.Node]
) -> fx.GraphModule:
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {n: new.placeholder(n.name) for n in inputs}
    by_name: dict[str, fx.Node] = {}
    for name in names:
        by_name[name] = new.placeholder("w_" + re.sub(r"\W", "_", name))
    for placeholder, name in graph.weight_of.items():
        if name in by_name:
            env[placeholder] = by_name[name]
    for attribute in graph.graph.nodes:
        if attribute.op == "get_attr":
            used = [u for u in attribute.users if u in set(nodes)]
            if used:
                env[attribute] = new.node_copy(attribute, lambda n: env[n])
    for node in nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    new.output(tuple(env[n] for n in outputs))
    return fx.GraphModule(graph.root, new)


def _structure(
    code: fx.GraphModule, graph: ModelGraph, inputs: list[fx.Node], names: list[str], weights: Weights
) -> str:
    """A text that is equal for blocks that can share code: operations, constants, shapes, and what trains."""
    number = {n: i for i, n in enumerate(code.graph.nodes)}
    lines = [_kind(n.meta.get("val")) for n in inputs] + [_kind(weights[n]) for n in names]
    for node in code.graph.nodes:
        if node.op == "placeholder":
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        lines.append(f"{node.op} {node.target} {arguments}")
    return "\n".join(lines)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return (
        f"{tuple(value.shape)} {value.dtype} {value.device} {value.requires_grad and isinstance(value, nn.Parameter)}"
    )
