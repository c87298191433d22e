"""Heads: what each boundary's auxiliary head reads, and the local loss behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from bpfx.errors import BpfxError
from bpfx.losses import Assignment, Boundary, Feature, Given, Head, Predictor, TailHead, Target
from bpfx.passes import downstream, programs, tail
from bpfx.passes.graph import ModelGraph, Weights, passes_gradient, tensor_bytes
from bpfx.passes.lower import Block
from bpfx.passes.precision import parameter_dtype

_aten = torch.ops.aten
_CHANNELS_LAST = {_aten.linear.default, _aten.layer_norm.default, _aten.rms_norm.default, _aten.embedding.default}
_CHANNELS_FIRST = {
    _aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.batch_norm.default,
    _aten.group_norm.default, _aten.max_pool2d.default, _aten.adaptive_avg_pool2d.default, _aten.instance_norm.default,
}  # fmt: skip

_REORDERING = {_aten.permute.default, _aten.transpose.int}


class NoHead(Head):
    """Stands for a block without a head: the last one, and those in which nothing trains."""

    description = "none"

    def forward(self, given: Given) -> Tensor:
        raise BpfxError("this block has no head: its loss is the task loss, or nothing in it trains")


def insert_heads(
    graph: ModelGraph,
    weights: Weights,
    blocks: Sequence[Block],
    predictions: list[fx.Node],
    assignment: Assignment,
    horizon: int,
) -> nn.ModuleList:
    """Build one head per block whose boundary a local loss reads.

    Block k's gradient comes from the head at the end of block ``k + horizon - 1``, so the first ``horizon - 1``
    boundaries have none.

    Returns:
        A list over all blocks but the last, with :class:`NoHead` where a block has no head.
    """
    starts = {b.index: blocks[b.index - horizon + 1] for b in blocks[:-1] if b.index >= horizon - 1}
    training = {k: start for k, start in starts.items() if start.trainable}
    # The last ones of a longer horizon have the task loss, whatever was chosen for them.
    assignment.check([(b.index, b.modules, b.name) for b in blocks[:-1] if b.trainable])
    return nn.ModuleList(
        _head(graph, weights, block, training[block.index], len(blocks), predictions, assignment)
        if block.index in training
        else NoHead()
        for block in blocks[:-1]
    )


def attach_losses(
    graph: ModelGraph,
    weights: Weights,
    blocks: Sequence[Block],
    heads: nn.ModuleList,
    predictions: list[fx.Node],
    mutated: set[str],
    assignment: Assignment,
    horizon: int,
) -> list[programs.BoundaryLoss | None]:
    """The local loss of every boundary that has a head."""
    if len(blocks) == 1:
        return [None]
    judging = any(isinstance(h, Head) and h.uses_task for h in heads)
    suffix = tail.loss_program(graph, predictions) if predictions else None
    if suffix is None and judging:
        raise BpfxError(
            "the loss cannot be taken apart from the model's layers, so no head can be trained with it; "
            "pass the loss as loss_fn, or use blocks=1"
        )
    task = programs.TaskLoss(suffix, weights, frozenset(mutated)) if suffix is not None else None
    losses: list[programs.BoundaryLoss | None] = []
    for k, head in enumerate(heads):
        assert isinstance(head, Head)
        if isinstance(head, NoHead):
            losses.append(None)
            continue
        start = blocks[k - horizon + 1]
        weighted = assignment.of(start.index, start.modules)
        losses.append(programs.BoundaryLoss(k, head, task if head.uses_task else None, weights, weighted))
    return [*losses, None]


def head_features(block: Block) -> list[fx.Node]:
    """The fewest outputs of ``block`` whose gradients together reach everything that trains in it; newest first.

    What has no entry per sample is none of them: something made of weights alone, or of flattened samples.
    """
    inside = set(block.nodes)
    given = {n for n in block.inputs if isinstance(n.meta.get("val"), Tensor)}
    behind = {n: _behind(n, inside) for n in block.outputs if n.name in block.differentiable}
    sampled = [n for n, seen in behind.items() if seen & given]
    outputs = [n for n in sampled if "batch_dim" in n.meta] or sampled or list(behind)
    reach = {n: {a for a in _behind(n, inside, passes_gradient) if a.op == "placeholder"} for n in outputs}
    everything = set().union(*reach.values()) if reach else set()
    chosen: list[fx.Node] = []
    covered: set[fx.Node] = set()
    order = {n: i for i, n in enumerate(block.nodes)}
    for node in sorted(outputs, key=order.__getitem__, reverse=True):
        if not chosen or reach[node] - covered:
            chosen.append(node)
            covered |= reach[node]
        if covered >= everything:
            break
    return chosen


def _behind(node: fx.Node, inside: set[fx.Node], through: Callable[[fx.Node], bool] = lambda n: True) -> set[fx.Node]:
    """What ``node`` depends on, ``through`` which nodes: nodes of its block, and what the block is given."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in seen:
                seen.add(a)
                if a in inside and through(a):
                    stack.append(a)
    return seen


def entering(first: Block) -> list[fx.Node]:
    """What enters a block and carries a gradient; the floating-point inputs of the batch where nothing does."""
    live = [n for n in first.inputs if n.name in first.differentiable]
    given = [n for n in first.inputs if isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point()]
    return live or given


def _head(
    graph: ModelGraph,
    weights: Weights,
    block: Block,
    first: Block,
    count: int,
    predictions: list[fx.Node],
    assignment: Assignment,
) -> Head:
    nodes = head_features(block)
    linear = tail.last_linear(graph, predictions)
    boundary = Boundary(
        features=[feature(graph, n) for n in nodes],
        targets=[Target(tuple(p.meta["val"].shape), graph.batch_dims.get(p)) for p in predictions],
        index=first.index,
        count=count,
        inputs=[feature(graph, n) for n in graph.inputs if n is not None],
        labels=class_labels(graph, predictions),
        answers=answers(graph, predictions),
        entering=[feature(graph, n) for n in entering(first)],
        tail=_tail(graph, weights, block, first, nodes, predictions),
        last_linear=(weights[linear[0]], weights[linear[1]] if linear[1] else None) if linear else None,
        downstream=downstream.maker(graph, weights, first, block, nodes, predictions),
    )
    loss = assignment.of(first.index, first.modules).loss
    head = loss.head(boundary)
    if not isinstance(head, Head):
        raise BpfxError(f"the local loss {loss.name!r} built a {type(head).__name__}; head() must return a losses.Head")
    head.place(boundary.feature)
    return head


def _tail(
    graph: ModelGraph,
    weights: Weights,
    block: Block,
    first: Block,
    nodes: list[fx.Node],
    predictions: list[fx.Node],
) -> Callable[[bool], Predictor] | None:
    """Makes the model's own last layers a head for these features; ``None`` where they do not take them."""
    found = tail.find_tail(graph, weights, nodes[0], predictions) if len(nodes) == 1 else None
    if found is None or not tail.follows_batch(found, graph, weights, predictions):
        return None
    own = sum(tensor_bytes(weights[n]) for n in {*first.weights, *block.weights})

    def make(copy: bool) -> TailHead:
        # A vocabulary-sized readout at every boundary would outweigh the blocks themselves.
        rows = [(n, weights[n], copy and tensor_bytes(weights[n]) <= max(own, 2**20)) for n in found.weights]
        return TailHead(found.module, found.inputs, rows, weights.__getitem__)

    return make


def class_labels(graph: ModelGraph, predictions: list[fx.Node]) -> int | None:
    """Position of the one input that holds an integer label per sample and that the loss reads."""
    suffix = tail.loss_program(graph, predictions) if predictions else None
    found = []
    for i in suffix.inputs if suffix is not None else ():
        node = graph.inputs[i]
        value = node.meta.get("val") if node is not None else None
        if isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int64, torch.int32, torch.uint8):
            found.append(i)
    return found[0] if len(found) == 1 else None


def answers(graph: ModelGraph, predictions: list[fx.Node]) -> tuple[int, ...]:
    """Positions of the inputs that the loss reads and the predictions do not depend on."""
    suffix = tail.loss_program(graph, predictions) if predictions else None
    everything = set(graph.graph.nodes)
    seen = {n for p in predictions for n in _behind(p, everything)}
    return tuple(i for i in (suffix.inputs if suffix is not None else ()) if graph.inputs[i] not in seen)


def feature(graph: ModelGraph, node: fx.Node) -> Feature:
    """What a local loss may know of a value."""
    value = node.meta["val"]
    batch = graph.batch_dims.get(node, 0)
    channel = value.dim() - 1
    if value.dim() >= 4 or value.dim() == 3:
        channel = _channel_dim(node, value.dim())
    dtype = parameter_dtype(value.dtype, value.device)
    return Feature(node.name, tuple(value.shape), batch, channel, dtype, value.device)


def _channel_dim(node: fx.Node, dims: int) -> int:
    """Which dimension counts features: what the readers and the maker of a value treat as such."""
    seen: set[fx.Node] = set()
    queue = [*node.users, node]
    while queue and len(seen) < 40:
        n = queue.pop(0)
        if n in seen:
            continue
        seen.add(n)
        if n.target in _CHANNELS_FIRST:
            return 1
        if n.target in _CHANNELS_LAST:
            return dims - 1
        value = n.meta.get("val")
        if (
            isinstance(value, Tensor)
            and value.dim() == dims
            and n.target not in (_aten.permute.default, _aten.transpose.int)
        ):
            queue.extend(n.users)
            if n is node or not n.users:
                queue.extend(n.all_input_nodes)
    return 1 if dims >= 4 else dims - 1
