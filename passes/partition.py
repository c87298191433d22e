"""Partition: where to cut the forward graph into blocks.

Cuts are positions in execution order. A position is *natural* where what crosses is finished (no activation,
normalisation or residual sum is its only reader), has one entry per sample, and no innermost module is cut in two.
Among the natural positions a dynamic program picks those that make the largest block's memory smallest, its head
included, and of equally good ones those where the fewest bytes cross, which are what the BP step stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from bpfx.errors import BpfxError, suggest
from bpfx.passes.graph import ModelGraph, Weights, differentiable_nodes, module_paths, tensor_bytes
from bpfx.passes.normalise import barred_cuts
from bpfx.passes.readable import pointwise, unreadable
from bpfx.passes.tail import last_linear

# A dozen per layer of an 80-layer transformer. The program's time grows with the square, so beyond that it is thinned.
MAX_CANDIDATES = 1000
MAX_AUTO = 16
# Cuts whose largest block is this much above the smallest possible count as equally good.
SLACK = 1.05
# A head's logits, their log-softmax and their gradient are alive together.
HEAD_VALUES = 3
# As in the heads pass: a matrix above this and above the block's own weights is read, not copied.
HEAD_COPY = 2**20
_aten = torch.ops.aten


@dataclasses.dataclass
class CutPoint:
    """A position at which the graph may be cut; a policy receives a list of them and returns some of them.

    Attributes:
        position: index of the last node before the cut.
        after: name of that node.
        module: path of the module that the next node belongs to.
        crossing_bytes: bytes of the activations that cross here.
        saved_bytes: bytes saved for backward by everything before the cut.
        natural: see the module's docstring.
    """

    position: int
    after: str
    module: str
    crossing_bytes: int
    saved_bytes: int
    natural: bool


Policy = Callable[[list[CutPoint]], Sequence[CutPoint]]
Blocks = int | str | Sequence[str] | Policy


class Liveness:
    """Which values are alive, differentiable and finished at every position of a graph."""

    def __init__(
        self,
        graph: ModelGraph,
        weights: Weights,
        saved: Mapping[fx.Node, int],
        predictions: Sequence[fx.Node],
        mutated: set[str],
    ) -> None:
        self.graph, self.weights, self.mutated = graph, weights, mutated
        self.nodes = graph.compute_nodes()
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.live = differentiable_nodes(graph, weights)
        self.last_use = {n: max((self.order.get(u, -1) for u in n.users), default=-1) for n in self.nodes}
        self.saved = [saved.get(n, 0) for n in self.nodes]
        self.end = min((self.order[p] for p in predictions if p in self.order), default=len(self.nodes))
        paths = [module_paths(n) for n in self.nodes]
        outer = {p for stack in paths for p in stack[:-1]}
        # The innermost module of each node, where that module has no modules inside: a norm, not a layer.
        self.leaf = [stack[-1] if stack and stack[-1] not in outer else None for stack in paths]
        self.trains = [
            any(a in graph.weight_of and weights[graph.weight_of[a]].requires_grad for a in n.all_input_nodes)
            for n in self.nodes
        ]
        self.sizes = [_bytes(n) for n in self.nodes]
        counted: set[str] = set()
        first = [self._first_used(n, counted) for n in self.nodes]
        # Of the parameters that each node is the first to use: bytes of their gradients, and of all of them.
        self.gradients = [sum(tensor_bytes(weights[n]) for n in names if weights[n].requires_grad) for names in first]
        self.owned = [sum(tensor_bytes(weights[n]) for n in names) for names in first]
        self.head_values = HEAD_VALUES * sum(_bytes(p) for p in predictions)
        self.head_weights = [tensor_bytes(weights[n]) for n in last_linear(graph, predictions) or () if n is not None]
        self._costs: dict[tuple[tuple[int, ...], int | None], Costs] = {}

    def _first_used(self, node: fx.Node, counted: set[str]) -> set[str]:
        """Parameters that ``node`` is the first to use."""
        names = {self.graph.weight_of[a] for a in node.all_input_nodes if a in self.graph.weight_of} - counted
        counted |= names
        return names

    def costs(self, positions: Sequence[int], pieces: int | None = None) -> Costs:
        """Memory of every block between two of these cuts; made once for every count of blocks."""
        key = tuple(positions), pieces
        if key not in self._costs:
            self._costs[key] = Costs(self, positions, pieces)
        return self._costs[key]

    def crossing(self, position: int) -> list[fx.Node]:
        """Values produced at or before ``position`` and read after it."""
        return [n for n in self.nodes[: position + 1] if self.last_use[n] > position]

    def candidates(self) -> list[CutPoint]:
        """Every position at which a cut is possible, in order."""
        count = len(self.nodes)
        ranges = [*barred_cuts(self.graph, self.order, self.mutated), *unreadable(self.graph, self.nodes, self.live)]
        barred = _overlaps(ranges, [1] * len(ranges), count)
        lives = [(p, self.last_use[n]) for p, n in enumerate(self.nodes)]
        crossing = _overlaps(lives, self.sizes, count)
        odd = [n in self.live and not isinstance(n.meta.get("val"), Tensor) for n in self.nodes]
        unfinished = _overlaps(lives, odd, count)
        saved = list(accumulate(self.saved))
        first = next((i for i, t in enumerate(self.trains) if t), count)
        last = max((i for i, t in enumerate(self.trains) if t), default=-1)
        points = []
        newest: list[fx.Node] = []  # differentiable values in order; those that are dead go when they come to the top
        for p, node in enumerate(self.nodes):
            if node in self.live:
                newest.append(node)
            while newest and self.last_use[newest[-1]] <= p:
                newest.pop()
            if not first <= p < min(last, self.end) or barred[p] or not newest or unfinished[p]:
                continue
            if newest[-1] not in self.graph.batch_dims:
                continue
            module = (module_paths(self.nodes[p + 1]) or [""])[-1]
            natural = self._natural(newest[-1], node, p)
            points.append(CutPoint(p, node.name, module, crossing[p], saved[p], natural))
        return points

    def _natural(self, newest: fx.Node, node: fx.Node, position: int) -> bool:
        if self.leaf[position] is not None and self.leaf[position] == self.leaf[position + 1]:
            return False  # in the middle of a norm or an activation
        readers = [u for u in newest.users if self.order.get(u, -1) > position]
        if len(readers) == 1 and (pointwise(readers[0]) or readers[0].target in (_aten.t.default,)):
            return False
        # Cut right behind the value that crosses, not behind an unrelated node after it.
        return newest is node


def _overlaps(ranges: Sequence[tuple[int, int]], weights: Sequence[int], count: int) -> list[int]:
    """For every position p below ``count``: the summed weights of the ranges with ``first <= p < last``."""
    change = [0] * (count + 1)
    for (first, last), weight in zip(ranges, weights, strict=False):
        if last > first:
            change[first] += weight
            change[min(last, count)] -= weight
    return list(accumulate(change))[:count]


Peak = Callable[[list[int]], float]


def choose(liveness: Liveness, blocks: Blocks, peak: Peak | None = None, limit: float = 0.0) -> list[int]:
    """Return the positions after which the graph is cut.

    Args:
        liveness: of the graph.
        blocks: ``"auto"`` (the fewest blocks whose peak is inside the limit), a count, module names that each begin a
            new block, or a policy.
        peak: for ``"auto"``: predicts the peak of the steps over some cuts, in bytes; without it the estimated memory
            of the largest block is used.
        limit: for ``"auto"``, in bytes.

    Raises:
        BpfxError: a name that does not exist, or more blocks than the graph can be cut into.
    """
    points = liveness.candidates()
    if callable(blocks):
        chosen = list(blocks(points))
        foreign = [c for c in chosen if c not in points]
        if foreign:
            raise BpfxError(f"the policy returned {foreign[0]!r}; return some of the cut points it was given")
        return sorted({c.position for c in chosen})
    if isinstance(blocks, bool) or not isinstance(blocks, (int, str, Sequence)):
        raise BpfxError(f"blocks={blocks!r}: pass 'auto', a count, a list of module names, or a policy")
    if blocks == "auto":
        return _auto(liveness, points, peak, limit)
    if isinstance(blocks, str):
        raise BpfxError(f"blocks={blocks!r}: the only word is 'auto'; module names go in a list, as in [{blocks!r}]")
    if isinstance(blocks, int):
        if blocks < 1:
            raise BpfxError(f"blocks={blocks}: pass a count of at least 1, or 'auto'")
        cuts = balanced(liveness, points, blocks)
        if cuts is None:
            raise BpfxError(
                f"blocks={blocks}, but this graph can be cut into at most {most_blocks(liveness, points)} blocks "
                "that each have a parameter to train"
            )
        return cuts
    return by_name(liveness, points, list(blocks))


def by_name(liveness: Liveness, points: list[CutPoint], names: list[str]) -> list[int]:
    """Cut in front of each named module."""
    paths = [module_paths(n) for n in liveness.nodes]
    known = dict.fromkeys(p for stack in paths for p in stack if p)
    possible = {p.position for p in points}
    cuts = []
    for name in names:
        if not isinstance(name, str) or name not in known:
            inside = next((p for p in liveness.graph.opaque if str(name).startswith(p + ".") or p == ""), None)
            if inside is not None:
                where = f"inside {inside!r}, which" if inside else "inside the model as a whole, which"
                raise BpfxError(
                    f"blocks: module {name!r} lies {where} runs as one opaque block ({liveness.graph.opaque[inside]})"
                )
            raise BpfxError(f"blocks: the graph has no module {name!r}; {suggest(str(name), known)}")
        position = next(i for i, stack in enumerate(paths) if name in stack) - 1
        if position < 0:
            continue
        # Bookkeeping nodes (a shape, a step counter) may stand between the last module's output and this one; not what
        # carries a gradient, or the cut would be inside another module.
        while position not in possible and position > 0 and liveness.nodes[position] not in liveness.live:
            position -= 1
        if position not in possible:
            raise BpfxError(
                f"blocks: the graph cannot be cut in front of {name!r}: nothing that trains stands before it, "
                "memory is overwritten across that place, or no head could reach what trains right before it"
            )
        cuts.append(position)
    return sorted(set(cuts))


def most_blocks(liveness: Liveness, points: list[CutPoint]) -> int:
    """The largest possible number of blocks with a trainable parameter each."""
    seen = list(accumulate(liveness.trains, initial=0))
    count, previous = 0, -1
    for point in points:
        if seen[point.position + 1] > seen[previous + 1]:
            count, previous = count + 1, point.position
    return count + 1


def balanced(liveness: Liveness, points: list[CutPoint], count: int) -> list[int] | None:
    """``count - 1`` cuts that make the largest block smallest; ``None`` when there are not enough places."""
    if count == 1:
        return []
    for pool in _pools(points):
        cuts = liveness.costs([p.position for p in pool]).cuts(count)
        if cuts is not None:
            return cuts
    return None


def by_count(
    liveness: Liveness, most: int = MAX_AUTO, serial: bool = False, pieces: int | None = None
) -> dict[int, list[int]]:
    """The best cuts for every possible count of blocks up to ``most``, from one table of costs.

    Args:
        liveness: of the graph.
        most: the largest count.
        serial: make the peak of the BP step smallest instead, block by block with every boundary before it stored.
        pieces: the same for one of so many micro-batches, every block's gradients freed before the next block runs.
    """
    points = liveness.candidates()
    found: dict[int, list[int]] = {}
    for count in range(1, min(most, most_blocks(liveness, points)) + 1):
        cuts = balanced(liveness, points, count)
        if cuts is None:
            break
        if (serial or pieces) and count > 1:
            # From the same pool as the balanced ones, which are the bound to be improved on.
            pool = next(p for p in _pools(points) if set(cuts) <= {point.position for point in p})
            cuts = liveness.costs([p.position for p in pool], pieces).serial_cuts(count, cuts)
        found[count] = cuts
    return found


def _pools(points: list[CutPoint]) -> list[list[CutPoint]]:
    """Where to look for cuts, the better places first."""
    natural = [p for p in points if p.natural]
    pools = [_thin(natural), natural, _thin(points), points]
    return [pool for k, pool in enumerate(pools) if pool not in pools[:k]]


def _thin(points: list[CutPoint]) -> list[CutPoint]:
    """At most ``MAX_CANDIDATES`` points: of neighbours, the one where the fewest bytes cross."""
    if len(points) <= MAX_CANDIDATES:
        return points
    step = len(points) / MAX_CANDIDATES
    groups: dict[int, list[CutPoint]] = {}
    for i, point in enumerate(points):
        groups.setdefault(int(i / step), []).append(point)
    return [min(group, key=lambda p: p.crossing_bytes) for group in groups.values()]


class Costs:
    """Estimated memory of the block between each pair of ends, and the best chains of blocks over them.

    In the local step a block holds what it reads, what it saves for backward, the gradients of every block so far, and
    the largest transient of its backward or of its head, whichever is larger: the head's backward is over before the
    block's own begins. A head takes what the loss needs of the predictions, and the gradient of a copy of the model's
    last linear layer; a readout of another width is not told apart, nor are the copies' gradients of earlier blocks
    counted. In the BP step there are no heads, the later blocks' gradients are there, and a cotangent for what crosses.
    With ``pieces`` it is one micro-batch of so many, and of gradients there are only the block's own.

    Matrices have a row per end of a block and a column per start; ``inf`` stands where there is no block.
    """

    def __init__(self, liveness: Liveness, positions: Sequence[int], pieces: int | None = None) -> None:
        parts = pieces or 1
        sizes, saved = [s // parts for s in liveness.sizes], [s // parts for s in liveness.saved]
        last = len(liveness.nodes) - 1
        self.ends = [-1, *positions, last]
        m = len(self.ends)
        stop = torch.tensor([e + 1 for e in self.ends], device="cpu")
        block = torch.ones(m, m, dtype=torch.bool, device="cpu").tril(-1)

        def between(values: Sequence[float]) -> Tensor:
            total = _floats([0.0, *accumulate(values)])[stop]
            return total[:, None] - total[None, :]

        most = [max(sizes[a + 1 : b + 1], default=0) for a, b in zip(self.ends, self.ends[1:], strict=False)]
        biggest = torch.where(block, _floats([0, *most])[:, None], 0.0).cummax(0).values
        lives = [(p, liveness.last_use[n]) for p, n in enumerate(liveness.nodes)]
        crossing = [0, *_overlaps(lives, sizes, last + 1)]
        self.crossing = _floats([crossing[e + 1] for e in self.ends])
        allowed = block & (between(liveness.trains) > 0)
        held = self.crossing[None, :] + between(saved)
        gradients = _floats([0.0, *accumulate(liveness.gradients)])[stop]
        transient = 2 * biggest
        own = between(liveness.owned).clamp_min(HEAD_COPY)
        copied = sum((torch.where(own >= w, float(w), 0.0) for w in liveness.head_weights), torch.zeros_like(own))
        values = torch.full_like(transient, float(liveness.head_values // parts))
        values[-1], copied[-1] = 0.0, 0.0  # the last block has no head
        inf = float("inf")
        # What was handed on has a cotangent while the block is differentiated.
        alone = between(liveness.gradients)
        after = gradients[-1] - gradients[None, :] if pieces is None else alone
        self.bare = torch.where(allowed, held + after + self.crossing[:, None] + transient, inf)
        before = (gradients[:, None] if pieces is None else alone) + copied
        self.local = torch.where(allowed, held + before + torch.maximum(transient, values), inf)
        self.new = self._new_bytes(sizes, lives)
        self._layers = [self._start()]

    def _new_bytes(self, sizes: Sequence[int], lives: list[tuple[int, int]]) -> Tensor:
        """Bytes that cross the end of a block but not its start: a skip over several cuts is stored once."""
        m = len(self.ends)
        # A value crosses the ends [made, read): count values by both, then sum over made <= start and read > end.
        ends = _floats(self.ends)
        made = torch.searchsorted(ends, _floats([p for p, _ in lives]))
        read = torch.searchsorted(ends, _floats([u for _, u in lives]))
        table = torch.zeros(m + 1, m + 1, dtype=torch.float64, device="cpu")
        table.index_put_((made, read), _floats(sizes), accumulate=True)
        both = table.cumsum(0)[:m].flip(1).cumsum(1).flip(1)[:, 1:]  # [start, end]
        return self.crossing[:, None] - both.T

    def _start(self) -> Tensor:
        start = torch.full((len(self.ends),), float("inf"), dtype=torch.float64, device="cpu")
        start[0] = 0.0
        return start

    def bottleneck(self, count: int) -> float:
        """The smallest possible memory of the largest of ``count`` blocks; ``inf`` where there are too few places."""
        while len(self._layers) <= count:
            self._layers.append(torch.maximum(self.local, self._layers[-1][None, :]).min(1).values)
        return float(self._layers[count][-1])

    def cuts(self, count: int) -> list[int] | None:
        """Of the cuts whose largest block is as good as the smallest, those that store the fewest bytes."""
        bottleneck = self.bottleneck(count)
        if bottleneck == float("inf"):
            return None
        weigh = torch.where(self.local <= SLACK * bottleneck, self.new + 1e-3 * self.local, float("inf"))
        return self._chain(count, lambda best: best[None, :] + weigh)

    def serial_cuts(self, count: int, known: list[int]) -> list[int]:
        """Cuts whose peak in the BP step is within 1 % of the smallest; ``known`` are any that are possible.

        For a bound on the peak the fewest stored bytes up to each end are found exactly, since to have stored less is
        never worse; bisection finds the bound.
        """
        low, high = 0.0, self.serial(known)
        while high - low > 0.01 * high:
            bound = (low + high) / 2
            found = self._chain(count, partial(self._within, bound))
            if found is None:
                low = bound
            else:
                known, high = found, min(bound, self.serial(found))
        return known

    def _within(self, bound: float, stored: Tensor) -> Tensor:
        room = bound - self.bare + self.crossing[None, :]  # what a block reads is stored already
        return torch.where(stored <= room, stored + self.new, float("inf"))

    def serial(self, cuts: Sequence[int]) -> float:
        """Estimated peak of the BP step over these cuts: a block, and the boundaries before it."""
        at = {e: k for k, e in enumerate(self.ends)}
        chain = [0, *(at[c] for c in cuts), len(self.ends) - 1]
        stored, peak = 0.0, 0.0
        for i, j in zip(chain, chain[1:], strict=False):
            peak = max(peak, stored - float(self.crossing[i]) + float(self.bare[j, i]))
            stored += float(self.new[j, i])
        return peak

    def _chain(self, count: int, step: Callable[[Tensor], Tensor]) -> list[int] | None:
        """The cheapest ``count`` blocks; ``step`` makes totals by end and start from the best totals by start."""
        best, back = self._start(), []
        for _ in range(count):
            best, start = step(best).min(1)
            back.append(start)
        if best[-1] == float("inf"):
            return None
        chain = [len(self.ends) - 1]
        for start in reversed(back):
            chain.append(int(start[chain[-1]]))
        return [self.ends[k] for k in chain[-2:0:-1]]


def _floats(values: Sequence[float]) -> Tensor:
    """In double precision, in which bytes are exact, and on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _bytes(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return sum(tensor_bytes(v) for v in value) if isinstance(value, (list, tuple)) else tensor_bytes(value)


def _auto(liveness: Liveness, points: list[CutPoint], peak: Peak | None, limit: float) -> list[int]:
    """The fewest blocks whose peak is inside the limit; where none are, the fewest within 2 % of the smallest."""
    tried: list[tuple[float, list[int]]] = []
    for count in range(1, min(MAX_AUTO, most_blocks(liveness, points)) + 1):
        cuts = balanced(liveness, points, count)
        if cuts is None:
            break
        estimate = largest(liveness, cuts)
        # Where the largest block alone is too large, the whole step needs no prediction.
        size = estimate if peak is None or estimate > limit else peak(cuts)
        if size <= limit:
            return cuts
        tried.append((size, cuts))
    smallest = min(size for size, _ in tried)
    return next(cuts for size, cuts in tried if size <= 1.02 * smallest)


def largest(liveness: Liveness, cuts: Sequence[int]) -> float:
    """Estimated memory of the largest block between these cuts, its head included, in bytes."""
    return float(Costs(liveness, cuts).local.diagonal(-1).max())


def serial(liveness: Liveness, cuts: Sequence[int], pieces: int | None = None) -> float:
    """Estimated peak of the BP step over these cuts, in bytes: the largest block with the boundaries before it.

    Args:
        pieces: as for :func:`by_count`.
    """
    return Costs(liveness, cuts, pieces).serial(cuts)
