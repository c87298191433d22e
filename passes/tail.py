"""The end of the forward graph: what the loss is computed from, and the layers between a block's output and that.

A head is trained with the model's own loss, taken from the graph (:func:`loss_program`), and starts as a copy of the
model's own last layers where the shapes allow (:func:`find_tail`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bpfx.passes.alias import analyse
from bpfx.passes.graph import (
    OUTSIDE_LOSS,
    ModelGraph,
    Weights,
    ancestors,
    differentiable_nodes,
    module_path,
)
from bpfx.passes.opaque import draws

_aten = torch.ops.aten
_DROPOUT = {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}


@dataclasses.dataclass
class SubProgram:
    """A piece of the graph as a module of its own.

    Attributes:
        module: called with ``(*values, *inputs, *weights)``.
        values: the nodes whose values it starts from.
        inputs: indices of the user inputs it reads.
        weights: canonical names of the weights it reads.
        random: whether it draws random numbers.
    """

    module: fx.GraphModule
    values: list[fx.Node]
    inputs: list[int]
    weights: list[str]
    random: bool


def find_predictions(graph: ModelGraph, weights: Weights, targets: Sequence[int] | None) -> list[fx.Node]:
    """The values that the loss is computed from.

    With an outside ``loss_fn`` these are the model's outputs. Inside a model they are the values from which on no
    parameter is used any more (logits, as a rule).

    Args:
        targets: indices of the user inputs that only an outside loss reads; ``None`` for a loss inside the model.
    """
    live = differentiable_nodes(graph, weights)
    upstream = ancestors(graph.loss)
    if targets is not None:
        given = {graph.inputs[i] for i in targets}
        outputs = {n for n in graph.outputs if isinstance(n, fx.Node) and n in live and n != graph.loss}
        read = _read_first(graph.loss, outputs)
        found = [n for n in graph.outputs if n in read]
        # A loss that hands its input on (mse_loss broadcasts) may stand between the model and what it returned.
        if not any(ancestors(n) & given for n in found):
            return list(dict.fromkeys(found))
    upstream.add(graph.loss)  # the loss may be one operator, such as a cross-entropy
    own = {n for n, name in graph.weight_of.items() if not name.startswith((OUTSIDE_LOSS, "constant."))}
    suffix: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if node not in upstream or node not in live or node.op == "placeholder":
            continue
        users = [u for u in node.users if u in upstream]
        if not any(a in own for a in node.all_input_nodes) and all(u in suffix for u in users):
            suffix.add(node)
    return [
        n
        for n in graph.graph.nodes
        if n in live and n not in suffix and n.op != "placeholder" and any(u in suffix for u in n.users)
    ]


def _read_first(loss: fx.Node, outputs: set[fx.Node]) -> set[fx.Node]:
    """Those of the model's outputs that the loss reads itself, and not only through another output.

    Features that a model returns beside the logits it makes of them are no predictions.
    """
    read: set[fx.Node] = set()
    seen = {loss}
    stack = [loss]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in outputs:
                read.add(node)
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return read


def loss_program(graph: ModelGraph, predictions: Sequence[fx.Node]) -> SubProgram | None:
    """The loss as a function of the predictions and the user inputs; ``None`` where it needs other activations."""
    return extract(graph, [graph.loss], list(predictions), drop=False)


def find_tail(
    graph: ModelGraph, weights: Weights, boundary: fx.Node, predictions: Sequence[fx.Node]
) -> SubProgram | None:
    """The model's own last layers, from a value shaped like ``boundary`` to the predictions.

    Returns ``None`` where no value of that shape stands alone before the end, or where the way from there to the
    predictions trains nothing.
    """
    shape, dtype = _signature(boundary)
    live = differentiable_nodes(graph, weights)
    nodes = graph.compute_nodes()
    order = {n: i for i, n in enumerate(nodes)}
    upstream = set().union(*(ancestors(p) for p in predictions)) | set(predictions)
    last_use = {n: max((order.get(u, -1) for u in n.users if u in upstream), default=-1) for n in nodes}
    for start in reversed(nodes):
        if start not in upstream or start not in live or start in predictions or _signature(start) != (shape, dtype):
            continue
        if graph.batch_dims.get(start) != graph.batch_dims.get(boundary):
            continue
        position = order[start]
        if any(n in live and last_use[n] > position for n in nodes[:position] if n in upstream):
            continue  # something else crosses here as well
        found = extract(graph, list(predictions), [_before_norm(graph, weights, start, live, order)], drop=True)
        return found if found is not None and _is_readout(found, weights) else None
    return None


def _is_readout(program: SubProgram, weights: Weights) -> bool:
    """Whether a copy makes a head: it trains something, and is a readout of a layer or two, not half a network."""
    matrices = sum(weights[n].dim() >= 2 for n in program.weights if n in weights.parameter_names)
    convolves = any("conv" in str(n.target) for n in program.module.graph.nodes if n.op == "call_function")
    return 1 <= matrices <= 2 and not convolves


def follows_batch(program: SubProgram, graph: ModelGraph, weights: Weights, results: Sequence[fx.Node]) -> bool:
    """Whether it takes another number of samples: a graph captured for one number may hold that as a constant."""
    if graph.dynamic:
        return True

    def doubled(node: fx.Node) -> tuple[int, ...]:
        dim = graph.batch_dims.get(node)
        return tuple(2 * n if i == dim else n for i, n in enumerate(node.meta["val"].shape))

    starts = [*program.values, *(node for i in program.inputs if (node := graph.inputs[i]) is not None)]
    given = [(n, n.meta["val"]) for n in starts]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values = [torch.empty(doubled(n), dtype=v.dtype, device=v.device) for n, v in given]
        tensors = [torch.empty_like(weights[n]) for n in program.weights]
        try:
            found = program.module(*values, *tensors)
        except Exception:  # whatever an operator says to sizes that do not fit
            return False
    made = found if isinstance(found, (tuple, list)) else (found,)
    return [tuple(t.shape) for t in made] == [doubled(n) for n in results]


def last_linear(graph: ModelGraph, predictions: Sequence[fx.Node]) -> tuple[str, str | None] | None:
    """Weight and bias names of the last linear layer before the predictions."""
    upstream = set().union(*(ancestors(p) for p in predictions)) | set(predictions)
    for node in reversed(graph.compute_nodes()):
        if node not in upstream or node.target is not _aten.linear.default:
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        if isinstance(weight, fx.Node) and weight in graph.weight_of:
            return graph.weight_of[weight], graph.weight_of.get(bias) if isinstance(bias, fx.Node) else None
    return None


def _before_norm(
    graph: ModelGraph, weights: Weights, start: fx.Node, live: set[fx.Node], order: dict[fx.Node, int]
) -> fx.Node:
    """Step back over a final normalisation or dropout: a head on an unfinished stream needs them as well."""
    while True:
        source = start.args[0] if start.target is _aten.slice.Tensor else None
        if isinstance(source, fx.Node) and source in order and _signature(source) == _signature(start):
            start = source  # x[:, 0] begins with x[:]
        path = module_path(start)
        inside = [n for n in order if module_path(n) == path]
        vectors = all(
            weights[graph.weight_of[a]].dim() <= 1 for n in inside for a in n.all_input_nodes if a in graph.weight_of
        )
        entering = {a for n in inside for a in n.all_input_nodes if a in live and a in order and a not in inside}
        if not path or not vectors or len(entering) != 1 or len(inside) > 12:
            return start
        before = entering.pop()
        reads_norm = any(a in graph.weight_of for n in inside for a in n.all_input_nodes)
        if _signature(before) != _signature(start) or not (reads_norm or start.target in _DROPOUT):
            return start
        start = before
        if reads_norm:
            return start


def extract(graph: ModelGraph, results: list[fx.Node], starts: list[fx.Node], drop: bool) -> SubProgram | None:
    """Everything between ``starts`` and ``results``, recomputing from inputs and weights what else is needed."""
    wanted: set[fx.Node] = set()
    stack = [r for r in results if r not in starts]
    while stack:
        node = stack.pop()
        if node in wanted or node in starts:
            continue
        wanted.add(node)
        stack.extend(node.all_input_nodes)
    start_ancestors = set().union(*(ancestors(s) for s in starts))
    for node in wanted & start_ancestors:
        # Recomputing what the model computed before is right for a shape or a mask, not for a trunk of layers, and
        # a random draw (the noise of a denoising loss) would be another one.
        if draws(node, graph.root) or any(a in graph.weight_of for a in node.all_input_nodes):
            return None
    random = any(draws(n, graph.root) for n in wanted if n.target not in _DROPOUT or not drop)
    if drop and random:
        return None
    aliases = analyse(graph.graph)
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {s: new.placeholder(s.name) for s in starts}
    inputs = [i for i, n in enumerate(graph.inputs) if n in wanted]
    for i in inputs:
        given = graph.inputs[i]
        assert given is not None
        env[given] = new.placeholder(given.name)
    given_values = list(env)

    def overwritten(node: fx.Node) -> bool:
        return any(m.node in wanted for m in aliases.mutations.get(aliases.root[node], ()))

    names = [n for n in graph.graph.nodes if n in wanted and n in graph.weight_of]
    for node in names:
        env[node] = new.placeholder(node.name)
    for entry in given_values:
        # The features go on to the next block, and the inputs are the caller's.
        if overwritten(entry):
            env[entry] = new.call_function(_aten.clone.default, (env[entry],))
    for node in graph.graph.nodes:
        if node not in wanted or node in env:
            continue
        if drop and node.target in _DROPOUT:
            # Heads draw nothing: the blocks' own draws must stay those of the plain model.
            env[node] = env[node.args[0]]
            if overwritten(node):  # the memory that dropout would have made
                env[node] = new.call_function(_aten.clone.default, (env[node],))
        else:
            env[node] = new.node_copy(node, lambda n: env[n])
    out = [env[r] for r in results]
    new.output(out[0] if len(out) == 1 else tuple(out))
    return SubProgram(fx.GraphModule(graph.root, new), starts, inputs, [graph.weight_of[n] for n in names], random)


def _signature(node: fx.Node) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    value = node.meta.get("val")
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)
