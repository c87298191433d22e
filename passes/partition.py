"""Partition: where to cut the forward graph into blocks.

Cuts are positions in execution order. A position is *natural* where what crosses is finished (no activation,
normalisation or residual sum is its only reader), has one entry per sample, and no innermost module is cut in two.
Among the natural positions a dynamic program picks those that make the largest block's memory smallest, and of equally
good ones those where the fewest bytes cross.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bpfx.errors import BpfxError, suggest
from bpfx.passes.graph import ModelGraph, Weights, differentiable_nodes, module_paths, tensor_bytes
from bpfx.passes.normalise import barred_cuts

MAX_CANDIDATES = 160
MAX_AUTO = 16
_aten = torch.ops.aten
_NORMS = {"batch_norm", "group_norm", "instance_norm", "dropout", "alpha_dropout", "feature_dropout", "hardtanh"}


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
        counted: set[str] = set()
        self.gradients = [self._gradient_bytes(n, counted) for n in self.nodes]

    def _gradient_bytes(self, node: fx.Node, counted: set[str]) -> int:
        """Bytes of the gradients of the parameters that ``node`` is the first to use."""
        names = {self.graph.weight_of[a] for a in node.all_input_nodes if a in self.graph.weight_of}
        new = {n for n in names - counted if self.weights[n].requires_grad}
        counted |= new
        return sum(tensor_bytes(self.weights[n]) for n in new)

    def crossing(self, position: int) -> list[fx.Node]:
        """Values produced at or before ``position`` and read after it."""
        return [n for n in self.nodes[: position + 1] if self.last_use[n] > position]

    def candidates(self) -> list[CutPoint]:
        """Every position at which a cut is possible, in order."""
        barred = barred_cuts(self.graph, self.order, self.mutated)
        first = next((i for i, t in enumerate(self.trains) if t), len(self.nodes))
        last = max((i for i, t in enumerate(self.trains) if t), default=-1)
        points = []
        alive: set[fx.Node] = set()
        saved = 0
        for p, node in enumerate(self.nodes):
            alive = {n for n in alive if self.last_use[n] > p}
            if self.last_use[node] > p:
                alive.add(node)
            saved += self.saved[p]
            if not first <= p < min(last, self.end) or any(a <= p < b for a, b in barred):
                continue
            live = [n for n in alive if n in self.live]
            if not live or any(not isinstance(n.meta.get("val"), Tensor) for n in live):
                continue
            newest = max(live, key=self.order.__getitem__)
            if newest not in self.graph.batch_dims:
                continue
            points.append(
                CutPoint(
                    p,
                    node.name,
                    (module_paths(self.nodes[p + 1]) or [""])[-1],
                    sum(tensor_bytes(n.meta["val"]) for n in alive),
                    saved,
                    self._natural(newest, node, p),
                )
            )
        return points

    def _natural(self, newest: fx.Node, node: fx.Node, position: int) -> bool:
        if self.leaf[position] is not None and self.leaf[position] == self.leaf[position + 1]:
            return False  # in the middle of a norm or an activation
        readers = [u for u in newest.users if self.order.get(u, -1) > position]
        if len(readers) == 1 and (_pointwise(readers[0]) or readers[0].target in (_aten.t.default,)):
            return False
        # Cut right behind the value that crosses, not behind an unrelated node after it.
        return newest is node


def _pointwise(node: fx.Node) -> bool:
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return op.overloadpacket.__name__.rstrip("_") in _NORMS or torch.Tag.pointwise in op.tags


Peak = Callable[[list[int]], float]


def choose(
    liveness: Liveness, blocks: Blocks, peak: Peak | None = None, limit: float = 0.0, thorough: bool = False
) -> list[int]:
    """Return the positions after which the graph is cut.

    Args:
        liveness: of the graph.
        blocks: ``"auto"`` (the fewest blocks whose peak is inside the limit), a count, module names that each begin a
            new block, or a policy.
        peak: for ``"auto"``: predicts the peak of the steps over some cuts, in bytes; without it the estimated memory
            of the largest block is used.
        limit: for ``"auto"``, in bytes.
        thorough: predict every count, also those whose largest block alone is above the limit.

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
        return _auto(liveness, points, peak, limit, thorough)
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
        # Bookkeeping nodes (a shape, a step counter) may stand between the last module's output and this one.
        while position not in possible and position > 0 and not liveness.trains[position]:
            position -= 1
        if position not in possible:
            raise BpfxError(
                f"blocks: the graph cannot be cut in front of {name!r}: nothing that trains stands before it, "
                "or memory is overwritten across that place"
            )
        cuts.append(position)
    return sorted(set(cuts))


def most_blocks(liveness: Liveness, points: list[CutPoint]) -> int:
    """The largest possible number of blocks with a trainable parameter each."""
    count, previous = 0, -1
    for point in points:
        if any(liveness.trains[previous + 1 : point.position + 1]):
            count, previous = count + 1, point.position
    return count + 1


def balanced(liveness: Liveness, points: list[CutPoint], count: int) -> list[int] | None:
    """``count - 1`` cuts that make the largest block smallest; ``None`` when there are not enough places."""
    if count == 1:
        return []
    natural = [p for p in points if p.natural]
    for pool in (natural, points):
        cuts = _balance(liveness, _thin(pool), count)
        if cuts is None and len(pool) > MAX_CANDIDATES:
            cuts = _balance(liveness, pool, count)
        if cuts is not None:
            return cuts
    return None


def _thin(points: list[CutPoint]) -> list[CutPoint]:
    """At most ``MAX_CANDIDATES`` points: of neighbours, the one where the fewest bytes cross."""
    if len(points) <= MAX_CANDIDATES:
        return points
    step = len(points) / MAX_CANDIDATES
    groups: dict[int, list[CutPoint]] = {}
    for i, point in enumerate(points):
        groups.setdefault(int(i / step), []).append(point)
    return [min(group, key=lambda p: p.crossing_bytes) for group in groups.values()]


def _balance(liveness: Liveness, points: list[CutPoint], count: int) -> list[int] | None:
    ends = [-1, *(p.position for p in points), len(liveness.nodes) - 1]
    crossing = [0, *(p.crossing_bytes for p in points), 0]
    cost = _costs(liveness, ends, crossing)
    m = len(ends)
    infinite = float("inf")

    def solve(weigh: Callable[[int, int], float], join: Callable[[float, float], float]) -> tuple[float, list[int]]:
        best = [[infinite] * m for _ in range(count + 1)]
        back = [[0] * m for _ in range(count + 1)]
        best[0][0] = 0.0
        for k in range(1, count + 1):
            for j in range(k, m):
                for i in range(k - 1, j):
                    if best[k - 1][i] == infinite:
                        continue
                    total = join(best[k - 1][i], weigh(i, j))
                    if total < best[k][j]:
                        best[k][j], back[k][j] = total, i
        chain, j = [], m - 1
        for k in range(count, 0, -1):
            j = back[k][j]
            chain.append(j)
        return best[count][m - 1], chain[::-1]

    bottleneck, _ = solve(lambda i, j: cost[i][j], max)
    if bottleneck == infinite:
        return None
    allowed = bottleneck * 1.05
    # Of the cuts that are as good, take those that store the fewest bytes between blocks.
    _, chain = solve(
        lambda i, j: crossing[i] + 1e-3 * cost[i][j] if cost[i][j] <= allowed else infinite, lambda a, b: a + b
    )
    return [ends[i] for i in chain[1:]]


def _costs(liveness: Liveness, ends: list[int], crossing: list[int]) -> list[list[float]]:
    """Memory of the block between each pair of ends: what it reads, what it saves, and its backward's transients."""
    infinite = float("inf")
    sizes = [_bytes(n) for n in liveness.nodes]
    m = len(ends)
    cost = [[infinite] * m for _ in range(m)]
    for i in range(m):
        saved, biggest, trains = 0, 0, False
        for j in range(i + 1, m):
            for p in range(ends[j - 1] + 1, ends[j] + 1):
                saved += liveness.saved[p] + liveness.gradients[p]
                biggest = max(biggest, sizes[p])
                trains = trains or liveness.trains[p]
            if trains:
                cost[i][j] = crossing[i] + saved + 2 * biggest
    return cost


def _bytes(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return sum(tensor_bytes(v) for v in value) if isinstance(value, (list, tuple)) else tensor_bytes(value)


def _auto(liveness: Liveness, points: list[CutPoint], peak: Peak | None, limit: float, thorough: bool) -> list[int]:
    """The fewest blocks whose peak is inside the limit; where none are, the fewest within 2 % of the smallest."""
    tried: list[tuple[float, list[int]]] = []
    for count in range(1, min(MAX_AUTO, most_blocks(liveness, points)) + 1):
        cuts = balanced(liveness, points, count)
        if cuts is None:
            break
        estimate = largest(liveness, cuts)
        # Where the largest block alone is too large, the whole step needs no prediction.
        size = estimate if peak is None or (estimate > limit and not thorough) else peak(cuts)
        if size <= limit:
            return cuts
        tried.append((size, cuts))
    smallest = min(size for size, _ in tried)
    return next(cuts for size, cuts in tried if size <= 1.02 * smallest)


def largest(liveness: Liveness, cuts: Sequence[int]) -> float:
    """Estimated memory of the largest block between these cuts, in bytes."""
    ends = [-1, *cuts, len(liveness.nodes) - 1]
    crossing = [0] + [sum(_bytes(n) for n in liveness.crossing(c)) for c in cuts] + [0]
    cost = _costs(liveness, ends, crossing)
    return max(cost[i][i + 1] for i in range(len(ends) - 1))
