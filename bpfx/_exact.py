"""Exact BP steps, block by block, in which the heads go on learning.

At a period of 1 the local gradient cancels: α·ℓ + (g − α·ℓ) = g. So it is not computed; a head's own gradient needs no
more than the boundary, which the forward sweep passes by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bpfx._gradients import Grads, adder
from bpfx._serial import Piece, bp_sweep
from bpfx.passes.programs import LocalGradient, differentiate
from bpfx.passes.stages import Stage


def exact_sweep(
    pieces: Sequence[Piece], keep: frozenset[str] = frozenset(), one_by_one: bool = False
) -> Iterator[tuple[int, Grads, Tensor | None]]:
    """BP gradients of every block and local gradients of its head, over all pieces, from the last block to the first.

    Running statistics are updated once, random draws go on as after one forward pass.

    Args:
        pieces: the micro-batches; their values are used up.
        keep: values that the caller wants.
        one_by_one: as for :func:`bpfx._serial.bp_sweep`.

    Yields:
        Index, gradients (heads' as ``bpfx.heads.<block>.<name>``) and local loss of every block.
    """
    heads: dict[int, Grads] = defaultdict(dict)
    losses: dict[int, Tensor] = {}

    def passed(piece: Piece, k: int) -> None:
        for stage in _seen_from(piece.stages, k):
            loss = _head_gradient(piece, stage, heads[stage.index]).mul(piece.share)
            losses[stage.index] = losses[stage.index] + loss if stage.index in losses else loss

    for piece in pieces:
        piece.kept = keep
    reads = frozenset(n for s in pieces[0].stages for n in _reads(s))
    for k, grads in bp_sweep(pieces, passed, reads | keep, one_by_one):
        grads |= heads.pop(k, {})
        yield k, grads, losses.get(k)
    for k in sorted(heads, reverse=True):
        yield k, heads.pop(k), losses.get(k)  # a block that needs no gradient of its own


def _seen_from(stages: Sequence[Stage], k: int) -> Iterator[Stage]:
    """The blocks whose heads look at what block k gives."""
    for stage in stages[: k + 1]:
        program = stage.local
        if isinstance(program, LocalGradient) and program.local_loss is not None and program.last.index == k:
            yield stage


def _reads(stage: Stage) -> Sequence[str]:
    program = stage.local
    if not isinstance(program, LocalGradient) or program.local_loss is None:
        return ()
    return (*program.feature_names, *program.entering_names)


def _head_gradient(piece: Piece, stage: Stage, total: Grads) -> Tensor:
    """The local loss of a block, values of the model given; the gradient of its head goes into ``total``."""
    program = stage.local
    assert isinstance(program, LocalGradient) and program.local_loss is not None
    if piece.use is not None:
        piece.use(stage.reads, stage.reads)

    names = (*program.feature_names, *program.user_inputs, *program.entering_names)
    values = piece.here(names)
    with torch.enable_grad():
        loss = program.local_loss(
            [values[n] for n in program.feature_names],
            [values.get(n) for n in program.user_inputs],
            [values[n] for n in program.entering_names],
        )
        heads, parameters = program.local_loss.parameter_names, program.local_loss.parameters_now()
        if heads and loss.requires_grad:
            scale = program.weights.loss_scale
            seed = None if scale == 1.0 else [torch.full_like(loss, scale)]
            differentiate([loss], seed, heads, parameters, [], adder(total, piece.share), scale)
    piece.let_go(names)
    return loss.detach()
