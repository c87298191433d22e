"""Block-serial schedules: block k sees every micro-batch, and its gradient is complete, before the next block runs.

What waits between blocks are the boundaries of the micro-batches; a value dies with its last reader. The consumer of a
sweep steps and frees a block's gradient before it asks for the next, so one block's gradients exist at a time.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bpfx._gradients import Grads, adder
from bpfx._shelf import Parked
from bpfx._variant import Variant
from bpfx.passes import stop_gradient
from bpfx.passes.programs import LocalGradient, LossGradient, Sink, VectorJacobian
from bpfx.passes.rng import RngState, get_rng_state, set_rng_state
from bpfx.passes.stages import Stage


@dataclasses.dataclass
class Piece:
    """One micro-batch under way.

    Attributes:
        variant: the steps for its shapes.
        share: of its loss in the loss of the batch.
        home: where its boundaries wait; ``None`` for where they are.
        values: what is alive, by name: the caller's tensors, and parked boundaries.
        cotangents: by the name of the value they belong to.
        states: random state at the start of every block that may draw.
        loss: its task loss, once that is known.
        use: called with the names of the weights that are needed now, and of those that are needed next.
        kept: values that the caller reads at the end; they do not die with their last reader.
    """

    variant: Variant
    share: float
    home: torch.device | None
    values: dict[str, Any]
    cotangents: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    states: dict[int, RngState] = dataclasses.field(default_factory=dict)
    loss: Tensor | None = None
    use: Callable[[Iterable[str], Iterable[str]], None] | None = None
    kept: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        variant: Variant,
        tensors: Sequence[Tensor],
        share: float = 1.0,
        home: torch.device | None = None,
        use: Callable[[Iterable[str], Iterable[str]], None] | None = None,
    ) -> Piece:
        inputs = zip(variant.captured.graph.inputs, tensors, strict=True)
        return cls(variant, share, home, {n.name: t for n, t in inputs if n is not None}, use=use)

    @property
    def stages(self) -> list[Stage]:
        return self.variant.stages

    def prefetch(self, stage: Stage) -> None:
        """Begin to fetch what a stage reads."""
        for node in stage.arguments:
            value = self.values.get(node.name)
            if isinstance(value, Parked):
                value.prefetch()

    def local(self, stage: Stage, sink: Sink) -> Tensor | None:
        """The stage's local step: its local loss; its outputs are put among the values."""
        self._use(stage.reads, stage.index + 1)
        arguments = self._take([n.name for n in stage.arguments], stage.dead_after_local)
        if not isinstance(stage.local, LocalGradient):
            outputs = list(stage.local(*arguments))
            if stage is self.stages[-1]:
                self.loss = outputs[0]
            self._put(stage, outputs, self.variant.read_locally | self.kept)
            return None
        *outputs, loss, _ = stage.local(arguments, sink)
        self._put(stage, outputs, self.variant.read_locally | self.kept)
        if stage is self.stages[-1]:
            self.loss = loss
        return loss

    def forward(self, stage: Stage, keep: frozenset[str] = frozenset()) -> None:
        """The stage's part of the forward sweep."""
        self._use(stage.block.weights, stage.index + 1)
        if self.variant.draws:
            self.states[stage.index] = get_rng_state()
        assert stage.forward is not None
        outputs = list(stage.forward(*self._take([n.name for n in stage.block.inputs], ())))
        self._put(stage, outputs, self.variant.read_in_reverse | keep)

    def last(self, stage: Stage, sink: Sink, keep: frozenset[str] = frozenset()) -> None:
        """Loss and gradient of the last block, where the reverse sweep begins."""
        assert isinstance(stage.vjp, LossGradient)
        self._use(stage.block.weights, stage.index - 1)
        inputs = self._take([n.name for n in stage.block.inputs], stage.dead_after_reverse)
        outputs, found, _ = stage.vjp.pull(inputs, self.share, sink)
        self.loss = outputs[0]
        self._put(stage, outputs, keep)
        self._collect([stage.block.inputs[i].name for i in stage.vjp.wanted], found)

    def local_again(self, stage: Stage, sink: Sink) -> tuple[list[Any], Tensor]:
        """The local gradient inside a reverse sweep, with the draws of the forward sweep: outputs and local loss."""
        assert isinstance(stage.local, LocalGradient)
        self._use(stage.reads, stage.index - 1)
        set_rng_state(self.states.get(stage.index, ()))
        *outputs, loss, _ = stage.local(self._take([n.name for n in stage.arguments], ()), sink)
        return outputs, loss

    def here(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the values that there are, on their device."""
        found = {n: self.values[n] for n in names if n in self.values}
        return {n: v.fetch() if isinstance(v, Parked) else v for n, v in found.items()}

    def let_go(self, names: Iterable[str]) -> None:
        """What :meth:`here` has fetched may leave the device again."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, Parked):
                value.release()

    def vjp(self, stage: Stage, sink: Sink) -> None:
        """The stage's part of the reverse sweep."""
        assert isinstance(stage.vjp, VectorJacobian)
        self._use(stage.block.weights, stage.index - 1)
        inputs = self._take([n.name for n in stage.block.inputs], stage.dead_after_reverse)
        cotangents = [self.cotangents.pop(stage.block.outputs[i].name, None) for i in stage.vjp.given]
        found, _ = stage.vjp.pull(self.states.get(stage.index), inputs, cotangents, sink)
        self._collect([stage.block.inputs[i].name for i in stage.vjp.wanted], found)

    def _use(self, names: Iterable[str], following: int) -> None:
        if self.use is not None:
            ahead = self.stages[following].reads if 0 <= following < len(self.stages) else ()
            self.use(names, ahead)

    def _take(self, names: Sequence[str], dead: Sequence[str]) -> list[Any]:
        taken = []
        for name in names:
            value = self.values[name]
            taken.append(value.fetch() if isinstance(value, Parked) else value)
            if isinstance(value, Parked):
                value.release()
        for name in dead:
            if name not in self.kept:
                del self.values[name]
        return taken

    def _put(self, stage: Stage, outputs: list[Any], wanted: frozenset[str]) -> None:
        """Keep the outputs that someone reads later; the list is emptied."""
        for node in stage.block.outputs:
            value = outputs.pop(0)
            if node.name in wanted:
                value = stop_gradient.stop_gradient(value) if isinstance(value, Tensor) else value
                self.values[node.name] = Parked(value, self.home) if isinstance(value, Tensor) else value

    def _collect(self, names: Sequence[str], found: list[Tensor | None]) -> None:
        for name in names:
            self.cotangents[name] = stop_gradient.accumulate(self.cotangents.pop(name, None), found.pop(0))


def local_sweep(pieces: Sequence[Piece], groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, Grads, Tensor | None]]:
    """Every block's local gradient and local loss over all pieces, from the first block to the last.

    Args:
        pieces: the micro-batches.
        groups: indices of the blocks that a micro-batch passes in one go, in order; their gradients exist together, and
            nothing waits between them.
    """
    for group in groups:
        totals: dict[int, Grads] = {k: {} for k in group}
        losses: dict[int, Tensor] = {}
        for i, piece in enumerate(pieces):
            if i + 1 < len(pieces):
                pieces[i + 1].prefetch(pieces[i + 1].stages[group[0]])
            for k in group:
                loss = piece.local(piece.stages[k], adder(totals[k], piece.share))
                if loss is not None:
                    losses[k] = loss * piece.share + losses[k] if k in losses else loss * piece.share
        for k in group:
            yield k, totals.pop(k), losses.get(k)


def bp_sweep(
    pieces: Sequence[Piece],
    passed: Callable[[Piece, int], None] | None = None,
    keep: frozenset[str] = frozenset(),
    one_by_one: bool = False,
) -> Iterator[tuple[int, Grads]]:
    """Every block's BP gradient over all pieces, from the last block to the first.

    Args:
        pieces: the micro-batches.
        passed: called in the forward sweep when a piece has passed a block, with the block's index.
        keep: values that ``passed`` or the caller wants.
        one_by_one: take every piece through both sweeps before the next one begins. The boundaries of one piece exist
            at a time, and in exchange the gradients of all blocks, until the last piece completes them.
    """
    totals: defaultdict[int, Grads] = defaultdict(dict)
    if one_by_one:
        for piece in pieces[:-1]:
            for _ in _there_and_back([piece], totals, passed, keep):
                pass
            for name in piece.values.keys() - piece.kept:
                del piece.values[name]
        pieces = pieces[-1:]
    for k in _there_and_back(pieces, totals, passed, keep):
        yield k, totals.pop(k)


def _there_and_back(
    pieces: Sequence[Piece],
    totals: defaultdict[int, Grads],
    passed: Callable[[Piece, int], None] | None,
    keep: frozenset[str],
) -> Iterator[int]:
    """The forward and the reverse sweep; gives the index of every block whose gradient is in ``totals``."""
    stages = pieces[0].stages
    for k in range(len(stages) - 1):
        for piece in pieces:
            piece.forward(piece.stages[k], keep)
            if passed is not None:
                passed(piece, k)
    for piece in pieces:
        piece.last(piece.stages[-1], adder(totals[len(stages) - 1], 1.0), keep)
    final = get_rng_state() if any(p.states for p in pieces) else ()
    try:
        yield len(stages) - 1
        for k in range(len(stages) - 2, -1, -1):
            if stages[k].vjp is None:
                continue
            for i, piece in enumerate(pieces):
                if i + 1 < len(pieces):
                    pieces[i + 1].prefetch(pieces[i + 1].stages[k])
                piece.vjp(piece.stages[k], adder(totals[k], 1.0))
            yield k
    finally:
        set_rng_state(final)
