"""A refresh, block by block: both gradients of a block exist at one moment, and only their difference is kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bpfx._gradients import Grads, adder, cosine, difference, dot
from bpfx._offset_state import OffsetState
from bpfx._serial import Piece
from bpfx.passes.graph import HEADS
from bpfx.passes.programs import LocalGradient
from bpfx.passes.rng import get_rng_state, set_rng_state

Sums = defaultdict[str, float]


class TakesDifferences(Protocol):
    """What a refresh needs of the sum it fills."""

    def check(self, loss: Tensor) -> None: ...

    def measure(self, sums: Sums, g: Tensor | None, ell: Tensor | None) -> None: ...

    def settle(self, block: int, deltas: Grads, sums: Sums, share: float) -> None: ...


class RefreshSum:
    """Puts the differences of all pieces into the stored offsets, and keeps what the diagnostics need.

    The first piece's difference replaces the old offset and the others are added, so that no second set exists. A piece
    whose gradients in a block are not finite is left out of that block; where none is finite the old offset stays.

    Args:
        state: the stored offsets.
        block_of: the block of every parameter.
    """

    def __init__(self, state: OffsetState, block_of: Mapping[str, int]) -> None:
        self.state, self.block_of = state, block_of
        self.bad: list[str] = []  # parameters whose Δ was NaN or infinite
        self.seen: set[str] = set()
        self._sums: dict[int, Sums] = {}
        self._shares: dict[int, list[float]] = {}
        self._rejected: dict[int, float] = {}  # by block, the shares of the pieces that were left out
        self._blocks_of: dict[str, set[int]] = {}  # a tied parameter has a difference in every block that reads it
        self._torn: list[str] = []

    def check(self, loss: Tensor) -> None:
        """Note a loss that is not finite; its gradients will not be either."""
        if not bool(torch.isfinite(loss.detach()).all()):
            self.bad.append("the loss")

    def measure(self, sums: Sums, g: Tensor | None, ell: Tensor | None) -> None:
        """Products of one parameter's two gradients, before their difference takes the place of the first."""
        if g is not None:
            sums["bp"] += dot([g], [g])
        if ell is not None:
            sums["local"] += dot([ell], [ell])
        if g is not None and ell is not None:
            sums["across"] += dot([g], [ell])

    def settle(self, block: int, deltas: Grads, sums: Sums, share: float) -> None:
        """Store one block's differences from one piece of that share. ``deltas`` is emptied."""
        names = list(deltas)
        for name in names:
            self._blocks_of.setdefault(name, set()).add(block)
        for name in names:
            sums["delta"] += dot([deltas[name]], [deltas[name]])
            if not math.isfinite(sums["delta"]):  # one number shows it without another tensor of that size
                self.bad.append(name)
                self._rejected[block] = self._rejected.get(block, 0.0) + share
                deltas.clear()
                return
        first = not self._shares.get(block)
        known = first and all(n in self.state for n in names)
        for name in names:
            delta = deltas.pop(name).mul_(share) if share != 1.0 else deltas.pop(name)
            if name in self.seen:
                delta.add_(self.state[name])
            elif known:
                old = self.state[name]
                sums["stale"] += dot([delta], [old]) / share
                sums["old"] += dot([old], [old])
            self.state.put(name, delta)
            self.seen.add(name)
        total = self._sums.setdefault(block, defaultdict(float))
        for key, value in sums.items():
            total[key] += value if key in ("old", "stale") else value * share
        self._shares.setdefault(block, []).append(share)

    def finish(self) -> dict[int, dict[str, float | None]]:
        """Statistics per block: cosine, ratio, staleness, spread.

        With several pieces, cosine and ratio are of sums over the pieces (Σ⟨g, ℓ⟩ over √(Σ‖g‖² Σ‖ℓ‖²)), and the
        staleness takes the first piece's Δ in its product with the old one, which is gone when the second comes: an
        estimate without bias that may leave [-1, 1].
        """
        statistics: dict[int, dict[str, float | None]] = {}
        # A tied parameter's differences are one sum over its blocks: it has a mean only where as much of it was left
        # out in each of them.
        self._torn = [n for n, ks in self._blocks_of.items() if len({self._rejected.get(k, 0.0) for k in ks}) > 1]
        self.seen.difference_update(self._torn)
        for block, sums in sorted(self._sums.items()):
            names = [n for n in self.seen if self.block_of[n] == block]
            weight = accepted = sum(self._shares[block])
            if block in self._rejected:  # the mean of the pieces that were finite
                for name in names:
                    self.state.put(name, self.state[name] * (1 + self._rejected[block] / weight))
                weight += self._rejected[block]
            single = len(self._shares[block]) == 1
            square = sums["delta"] / accepted if single else self._square(names) / weight**2
            statistics[block] = {
                "cosine": cosine(sums["across"], sums["bp"], sums["local"]),
                "ratio": math.sqrt(sums["delta"] / sums["bp"]) if sums["bp"] > 0 else None,
                "staleness": cosine(sums["stale"], square, sums["old"]),
                "spread": self._spread(block, sums["delta"] / accepted, square),
            }
        self.state.keep(lambda n: n in self.seen or (self.block_of[n] in self._rejected and n not in self._torn))
        return statistics

    def complaint(self) -> str | None:
        """What was not finite, and what became of it; to be asked after :meth:`finish`."""
        if not self.bad:
            return None
        words = []
        lost = sorted(self._rejected.keys() - self._sums.keys())
        mean = sorted(self._rejected.keys() & self._sums.keys())
        if lost:
            held = {self.block_of[n] for n in self.state}
            keeps = [k for k in lost if k in held]
            words += [f"blocks {_listed(keeps)} keep the old offset"] if keeps else []
            without = [k for k in lost if k not in held]
            words += [f"blocks {_listed(without)} have no offset"] if without else []
        if mean:
            words.append(f"blocks {_listed(mean)} take the mean of the pieces that were finite")
        if self._torn:
            words.append(f"{', '.join(self._torn)}, in several blocks, has no offset until the next refresh")
        return f"first in {self.bad[0]}; {', '.join(words) or 'no offset is concerned'}"

    def _square(self, names: list[str]) -> float:
        total = 0.0
        for name in names:
            delta = self.state[name]
            total += dot([delta], [delta])
        return total

    def _spread(self, block: int, mean_square: float, square: float) -> float | None:
        """Share of ‖Δ‖² that is noise: the estimated squared error of the mean over ‖Δ‖²."""
        shares = self._shares[block]
        effective = sum(shares) ** 2 / sum(s * s for s in shares)
        if effective <= 1 or square == 0:
            return None
        variance = max(mean_square - square, 0.0)  # of one piece around the mean, biased
        return variance / (effective - 1) / square


def refresh_piece(
    piece: Piece, total: TakesDifferences, share: float, local: list[Grads] | None, keep: frozenset[str] = frozenset()
) -> list[Tensor]:
    """Both gradients of every block on one piece, their differences into ``total``.

    Running statistics are updated once, random draws go on as after one forward pass.

    Args:
        piece: with a share of 1; its values are used up, but for those in ``keep``.
        total: receives the differences.
        share: of this piece in the refresh.
        local: receives the local gradients of every block, for a caller that steps on them.
        keep: values that the caller wants.

    Returns:
        The local losses of the blocks that train, in order.
    """
    weights = piece.variant.captured.weights
    losses: list[Tensor] = []
    for stage in piece.stages[:-1]:
        piece.forward(stage, keep)
    last = piece.stages[-1]
    grads: Grads = {}
    piece.last(last, adder(grads, 1.0), keep)
    assert piece.loss is not None
    final = get_rng_state() if piece.states else ()
    if local is not None:
        local.append(grads)  # the last block's local loss is the task loss: its Δ is zero
    del grads
    losses.append(piece.loss)
    total.check(piece.loss)
    for stage in reversed(piece.stages[:-1]):
        if stage.vjp is None:
            continue
        own: Grads = {}
        if isinstance(stage.local, LocalGradient):
            before = {n: weights[n].clone() for n in stage.block.mutated}
            losses.append(piece.local_again(stage, adder(own, 1.0)))
            with torch.no_grad():
                for name, value in before.items():
                    weights[name].copy_(value)
        deltas: Grads = {}
        sums: Sums = defaultdict(float)
        piece.vjp(stage, partial(_meet, total, sums, deltas, own, local is not None))
        for name in [n for n in own if n not in deltas and not n.startswith(HEADS)]:
            _meet(total, sums, deltas, own, local is not None, name, None)  # BP gives it no gradient
        if deltas:
            total.settle(stage.index, deltas, sums, share)
        if local is not None:
            local.append(own)
    set_rng_state(final)
    if local is not None:
        local.reverse()
    return losses[::-1]


def _meet(
    total: TakesDifferences, sums: Sums, deltas: Grads, own: Grads, keep: bool, name: str, g: Tensor | None
) -> None:
    """The BP gradient of a parameter meets the local one, and takes its difference from it, at once."""
    ell = own.get(name) if keep else own.pop(name, None)
    total.measure(sums, g, ell)
    deltas[name] = difference(g, ell)


def _listed(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def running_statistics(weights: Any, names: Any, heads: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a step changes."""
    own = {n: weights[n].clone() for n in names}
    return own | {f"{HEADS}{n}": b.clone() for n, b in heads.named_buffers()}


def restore_statistics(weights: Any, heads: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put back what :func:`running_statistics` copied."""
    buffers = dict(heads.named_buffers())
    with torch.no_grad():
        for name, value in saved.items():
            target = buffers[name.removeprefix(HEADS)] if name.startswith(HEADS) else weights[name]
            target.copy_(value)
