"""A refresh, block by block: both gradients of a block exist at one moment, and only their difference is kept."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bpfx._gradients import Grads, adder, cosine, difference, dot
from bpfx._matching import matching_gradient
from bpfx._offset_state import OffsetState
from bpfx._scales import Anchor, Products, sample
from bpfx._serial import Piece
from bpfx.offset import Offset
from bpfx.passes.graph import HEADS
from bpfx.passes.programs import LocalGradient
from bpfx.passes.rng import get_rng_state, set_rng_state
from bpfx.passes.stages import Stage

if TYPE_CHECKING:
    from bpfx._parallel import Ranks

Sums = defaultdict[str, float]


class TakesDifferences(Protocol):
    """What a refresh needs of the sum it fills."""

    def check(self, loss: Tensor) -> None: ...

    def scale(self, block: int, name: str) -> float: ...

    def measure(self, block: int, name: str, sums: Sums, g: Tensor | None, ell: Tensor | None) -> None: ...

    def settle(self, block: int, deltas: Grads, sums: Sums, share: float) -> None: ...

    @property
    def matching(self) -> Grads | None: ...


@dataclasses.dataclass(frozen=True)
class BlockFound:
    """What a refresh found out about one block; ``None`` where there is nothing to compare.

    With several pieces, cosine and ratio are of sums over the pieces (Σ⟨g, ℓ⟩ over √(Σ‖g‖² Σ‖ℓ‖²)). What compares with
    the old Δ, which is gone when the second piece comes, is of the sums of all pieces, by 256 numbers of each
    parameter, so that it does not depend on the number of pieces. ``products`` has the first piece's, which are
    estimates without bias.

    Attributes:
        cosine: of BP and local gradient.
        ratio: ‖Δ‖/‖g_BP‖.
        staleness: cosine of the new and the old Δ.
        spread: share of ‖Δ‖² that the pieces disagree on.
        descent: cosine of the new BP gradient and the old Δ.
        bp, local: norms of the two gradients, over the pieces, in the units of ``norm``.
        norm: ‖Δ‖ as it is stored.
        products: what α and λ are learnt from.
    """

    cosine: float | None
    ratio: float | None
    staleness: float | None
    spread: float | None
    descent: float | None
    bp: float
    local: float
    norm: float
    products: Products

    def record(self) -> dict[str, float | None]:
        """As the diagnostics hold it."""
        names = ("cosine", "ratio", "staleness", "spread", "descent", "bp", "local")
        return {name: getattr(self, name) for name in names}


class RefreshSum:
    """Puts the differences of all pieces into the stored offsets, and keeps what the diagnostics need.

    The first piece's difference replaces the old offset and the others are added, so that no second set exists. A piece
    whose gradients in a block are not finite is left out of that block; where none is finite the old offset stays.

    Args:
        state: the stored offsets.
        block_of: the block of every parameter.
        alpha: scale of the local gradient inside Δ, by block.
        offset: says what else is wanted: a comparison of the pieces (for ``lam="auto"``), samples of both gradients
            (for ``alpha="auto"``), the heads' matching gradients.
        shared: parameters that several blocks train; their local gradient is not scaled.
        ranks: the processes among which every piece is divided, where there are several. ``part`` is the share of this
            one in the piece that it goes through; all of them measure and store the whole piece's differences.
        several: whether more than one piece comes.
    """

    def __init__(
        self,
        state: OffsetState,
        block_of: Mapping[str, int],
        alpha: Callable[[int], float] = lambda block: 1.0,
        offset: Offset | None = None,
        shared: frozenset[str] = frozenset(),
        ranks: Ranks | None = None,
        several: bool = True,
    ) -> None:
        self.several = several
        self.matching: Grads | None = {} if offset and offset.match > 0 else None  # gradients of heads by name
        self.ranks, self.part = ranks, 1.0 if ranks is None else 1.0 / ranks.size
        self.shared = shared
        self.state, self.block_of, self.alpha = state, block_of, alpha
        self.agreement = offset is not None and offset.lam == "auto"
        self.bad: list[str] = []  # parameters whose Δ was NaN or infinite
        self.seen: set[str] = set()
        self._sums: dict[int, Sums] = {}
        self._shares: dict[int, list[float]] = {}
        self._rejected: dict[int, float] = {}  # by block, the shares of the pieces that were left out
        self._blocks_of: dict[str, set[int]] = {}  # a tied parameter has a difference in every block that reads it
        self._torn: list[str] = []
        self._samples: dict[int, Anchor] = {}  # by block, of BP gradients and differences, sums over the pieces
        self._piece: dict[int, Anchor] = {}  # of the piece that is under way
        self._old: dict[int, dict[str, Tensor]] = {}  # of the old offset
        # Of the first piece that is finite.
        self._anchors: dict[int, Anchor] | None = {} if offset is not None and offset.alpha == "auto" else None

    def scale(self, block: int, name: str) -> float:
        """Of the local gradient inside Δ."""
        return 1.0 if name in self.shared else self.alpha(block)

    def check(self, loss: Tensor) -> None:
        """Note a loss that is not finite; its gradients will not be either."""
        if self.ranks is not None:
            loss = self.ranks.total([loss * self.part if self.part else loss])[0]
        if not bool(torch.isfinite(loss.detach()).all()):
            self.bad.append("the loss")

    def measure(self, block: int, name: str, sums: Sums, g: Tensor | None, ell: Tensor | None) -> None:
        """Products of one parameter's two gradients, before their difference takes the place of the first."""
        if g is not None:
            sums["bp"] += dot([g], [g])
        if ell is not None:
            sums["local"] += dot([ell], [ell])
        if g is not None and ell is not None:
            sums["across"] += dot([g], [ell])
        first, scale = not self._shares.get(block), self.scale(block, name)
        if self.several and (first or name in self._old.get(block, ())):
            picked, own = (torch.zeros(()) if t is None else _few(name, t) for t in (g, ell))
            self._piece.setdefault(block, {})[name] = picked, picked - scale * own
        if first:
            if ell is not None and name in self.state and name not in self.seen:
                sums["old_local"] += scale * dot([self.state[name]], [ell])
            if self._anchors is not None and g is not None and ell is not None and name not in self.shared:
                self._anchors.setdefault(block, {})[name] = sample(name, g), sample(name, ell)
        elif self.agreement and g is not None and name in self.seen:
            sums["ahead"] += dot([self.state[name]], [g]) / sum(self._shares[block])

    def settle(self, block: int, deltas: Grads, sums: Sums, share: float) -> None:
        """Store one block's differences from one piece of that share. ``deltas`` is emptied."""
        names, picked = list(deltas), self._piece.pop(block, {})
        for name in names:
            self._blocks_of.setdefault(name, set()).add(block)
        for name in names:
            sums["delta"] += dot([deltas[name]], [deltas[name]])
            if not math.isfinite(sums["delta"]):  # one number shows it without another tensor of that size
                self.bad.append(name)
                self._rejected[block] = self._rejected.get(block, 0.0) + share
                deltas.clear()
                if self._anchors is not None and not self._shares.get(block):
                    self._anchors.pop(block, None)
                return
        first = not self._shares.get(block)
        known = first and all(n in self.state for n in names)
        if known and self.several:
            self._old[block] = {n: _few(n, self.state[n]) for n in names if n not in self.seen}
        if block in self._old:
            whole = self._samples.setdefault(block, {})
            for name in self._old[block].keys() & picked.keys():
                g, delta = (share * p for p in picked[name])
                whole[name] = (whole[name][0] + g, whole[name][1] + delta) if name in whole else (g, delta)
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
        if known:
            total["first_bp"] = sums["bp"]
        for key, value in sums.items():
            total[key] += value if key in ("old", "old_local", "stale") else value * share
        self._shares.setdefault(block, []).append(share)

    def finish(self) -> dict[int, BlockFound]:
        """What was found out, by block."""
        found: dict[int, BlockFound] = {}
        if self.ranks is not None and self.matching is not None:
            self.matching = self.ranks.matching(self.matching)
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
            found[block] = self._found(block, sums, accepted, square, weight)
            found[block] = found[block] if single else self._of_samples(block, found[block])
        self.state.keep(lambda n: n in self.seen or (self.block_of[n] in self._rejected and n not in self._torn))
        return found

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

    def _of_samples(self, block: int, found: BlockFound) -> BlockFound:
        """The comparison with the old Δ, of whole gradients instead of the first piece's."""
        old, products = self._old.get(block, {}), Sums(float)
        for name, (g, delta) in self._samples.get(block, {}).items():
            pairs = {"gd": (g, old[name]), "dd": (delta, old[name]), "g": (g, g), "d": (delta, delta)}
            for key, (a, b) in (pairs | {"old": (old[name], old[name])}).items():
                products[key] += float((a * b).sum())
        return dataclasses.replace(
            found,
            staleness=cosine(products["dd"], products["d"], products["old"]),
            descent=cosine(products["gd"], products["g"], products["old"]),
        )

    def _found(self, block: int, sums: Sums, accepted: float, square: float, weight: float) -> BlockFound:
        spread = self._spread(block, sums["delta"] / accepted, square)
        # Pieces of a summed loss have a weight of more than 1 together, and so has the old Δ, other than its products.
        stale = sums["stale"] / weight if sums["old"] > 0 else None
        behind = stale + sums["old_local"] / weight if stale is not None else None
        first = sums["stale"] + sums["old_local"]
        shares = self._shares[block]
        later = sum(shares[1:])
        return BlockFound(
            cosine=cosine(sums["across"], sums["bp"], sums["local"]),
            ratio=math.sqrt(sums["delta"] / sums["bp"]) if sums["bp"] > 0 else None,
            staleness=cosine(sums["stale"], square, sums["old"]),
            spread=spread,
            descent=cosine(first, sums["first_bp"], sums["old"]) if behind is not None else None,
            bp=weight * math.sqrt(sums["bp"] / accepted),
            local=weight * math.sqrt(sums["local"] / accepted),
            norm=weight * math.sqrt(max(square, 0.0)),
            products=Products(
                square=square,
                noise=spread,
                behind=behind,
                stale=stale,
                ahead=sums["ahead"] / later if self.agreement and later > 0 else None,
                anchor=self._anchors.get(block) if self._anchors is not None else None,
            ),
        )

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
    together = total if isinstance(total, RefreshSum) and total.ranks is not None else None
    part = together.part if together is not None else 1.0
    losses: list[Tensor] = []
    piece.kept = keep
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
            outputs, local_loss = piece.local_again(stage, adder(own, 1.0))
            losses.append(local_loss)
            if total.matching is not None:
                _match(piece, stage, outputs, total.matching, share * part)
            del outputs
            with torch.no_grad():
                for name, value in before.items():
                    weights[name].copy_(value)
        if together is None:
            deltas: Grads = {}
            sums: Sums = defaultdict(float)
            meet = partial(_meet, total, stage.index, sums, deltas, own, local is not None)
            piece.vjp(stage, meet)
            for name in [n for n in own if n not in deltas and not n.startswith(HEADS)]:
                meet(name, None)  # BP gives it no gradient
            if deltas:
                total.settle(stage.index, deltas, sums, share)
        else:
            theirs: Grads = {}
            piece.vjp(stage, adder(theirs, 1.0))
            _settle_together(together, stage, theirs, own, share)
        if local is not None:
            local.append(own)
    set_rng_state(final)
    if local is not None:
        local.reverse()
    return losses[::-1]


def idle_piece(stages: Sequence[Stage], total: RefreshSum, share: float) -> None:
    """:func:`refresh_piece` of a rank that has no part in the piece.

    Args:
        stages: the blocks.
        total: receives the differences of the other ranks.
        share: of the piece in the refresh.
    """
    assert total.ranks is not None
    total.part = 0.0
    total.check(torch.zeros((), device=total.ranks.device))
    for stage in reversed(stages[:-1]):
        if stage.vjp is not None:
            _settle_together(total, stage, {}, {}, share)


def _settle_together(total: RefreshSum, stage: Stage, theirs: Grads, own: Grads, share: float) -> None:
    """Differences of a block from a piece that several ranks have a part of: the sums of both gradients meet.

    The products that rules decide from are those of the whole piece, and equal on every rank.
    """
    assert total.ranks is not None
    g, ell = total.ranks.both(stage.block.trainable, theirs, own, total.part)
    deltas: Grads = {}
    sums: Sums = defaultdict(float)
    for name in [n for n in stage.block.trainable if n in g or n in ell]:
        # In memory of its own: what is stored would keep the gradients of the whole block alive.
        _meet(total, stage.index, sums, deltas, ell, False, name, g.pop(name).clone() if name in g else None)
    if deltas:
        total.settle(stage.index, deltas, sums, share)


def _meet(
    total: TakesDifferences,
    block: int,
    sums: Sums,
    deltas: Grads,
    own: Grads,
    keep: bool,
    name: str,
    g: Tensor | None,
) -> None:
    """The BP gradient of a parameter meets the local one, and takes its difference from it, at once."""
    ell = own.get(name) if keep else own.pop(name, None)
    total.measure(block, name, sums, g, ell)
    deltas[name] = difference(g, ell, total.scale(block, name))


def _few(name: str, gradient: Tensor) -> Tensor:
    """Numbers of every parameter are kept from the first piece to the last, so as few as tell a direction."""
    return sample(name, gradient, 256, torch.float32)


def _match(piece: Piece, stage: Stage, outputs: list[Any], matching: Grads, share: float) -> None:
    program = stage.local
    assert isinstance(program, LocalGradient)
    named = dict(zip((n.name for n in stage.block.outputs), outputs, strict=True))
    arguments = piece.here((*program.user_inputs, *program.entering_names))
    found = matching_gradient(program, named, arguments, piece.cotangents)
    piece.let_go((*program.user_inputs, *program.entering_names))
    add = adder(matching, share)
    for name in list(found):
        add(name, found.pop(name))


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
