"""Stages: the programs of every block, and what each reads and leaves behind, in the order in which blocks run.

The emitted steps and the block-serial schedules run the same programs; a schedule needs to know, besides them, when a
value or a weight is used for the last time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from torch import fx

from bpfx.passes.graph import ModelGraph, Weights
from bpfx.passes.heads import entering, head_features
from bpfx.passes.lower import Block
from bpfx.passes.programs import BoundaryLoss, Forward, ForwardOnce, LocalGradient, LossGradient, VectorJacobian


@dataclasses.dataclass
class Stage:
    """One block's programs.

    Attributes:
        block: the block.
        local: its local step; a block in which nothing trains only runs forward.
        arguments: the values that ``local`` reads.
        forward: its part of the BP step's forward sweep; ``None`` for the last block.
        vjp: its part of the reverse sweep; ``None`` where no gradient is needed.
        reads: names of the weights that ``local`` reads, those of blocks it looks ahead at included.
        dead_after_local: values (of earlier blocks) that the local sweep needs no more once this stage has read them.
        dead_after_reverse: the same for a reverse sweep that runs both ``vjp`` and ``local``.
    """

    block: Block
    local: LocalGradient | ForwardOnce
    arguments: list[fx.Node]
    forward: Forward | ForwardOnce | None
    vjp: VectorJacobian | LossGradient | None
    reads: set[str]
    dead_after_local: list[str] = dataclasses.field(default_factory=list)
    dead_after_reverse: list[str] = dataclasses.field(default_factory=list)

    @property
    def index(self) -> int:
        return self.block.index


def make_stages(
    graph: ModelGraph,
    weights: Weights,
    blocks: Sequence[Block],
    losses: Sequence[BoundaryLoss | None],
    horizon: int,
) -> list[Stage]:
    """The stages of all blocks, in order."""
    stages = [_stage(graph, weights, blocks, losses, horizon, block) for block in blocks]
    made = {n.name for b in blocks for n in b.outputs}
    for order, where in ((stages, "dead_after_local"), (stages[::-1], "dead_after_reverse")):
        seen: set[str] = set()
        for stage in reversed(order):
            read = [n.name for n in (stage.arguments if order is stages else _both(stage)) if n.name in made]
            getattr(stage, where).extend(dict.fromkeys(n for n in read if n not in seen))
            seen.update(read)
    return stages


def _both(stage: Stage) -> Iterable[fx.Node]:
    return (*stage.arguments, *stage.block.inputs)


def _stage(
    graph: ModelGraph,
    weights: Weights,
    blocks: Sequence[Block],
    losses: Sequence[BoundaryLoss | None],
    horizon: int,
    block: Block,
) -> Stage:
    last = block is blocks[-1]
    needed = block.trainable or any(n.name in block.differentiable for n in block.inputs)
    forward = None if last else Forward(block, weights) if needed else ForwardOnce(block, weights)
    vjp = LossGradient(block, weights) if last else VectorJacobian(block, weights) if needed else None
    if not block.trainable:
        return Stage(block, ForwardOnce(block, weights), block.inputs, forward, vjp, set(block.weights))
    user_inputs = [n for n in graph.inputs if n is not None]
    window = list(blocks[block.index : block.index + horizon])
    local_loss = losses[window[-1].index]
    made = {n for b in window for n in b.outputs}
    arguments = dict.fromkeys(n for b in window for n in b.inputs if n not in made)
    reads = {n for b in window for n in b.weights}
    features: list[str] = []
    entered: list[str] = []
    if local_loss is not None:
        arguments.update(dict.fromkeys(n for i, n in enumerate(user_inputs) if i in local_loss.inputs))
        features = [n.name for n in head_features(window[-1])]
        entered = [n.name for n in entering(block)] if local_loss.head.uses_entering else []
        reads |= local_loss.reads
    local = LocalGradient(
        window, [n.name for n in arguments], weights, local_loss, features, entered, [n.name for n in user_inputs]
    )
    return Stage(block, local, list(arguments), forward, vjp, reads)
