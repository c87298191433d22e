"""The block-serial schedules, run on the costs of their programs instead of on tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bpfx._costs import Categories, Cost, StageCosts

# Of two orders of a BP step, the other one has to be that much smaller: draws come in another order in it, and should
# not depend on roundings of a prediction.
MARGIN = 0.98


@dataclasses.dataclass
class Simulation:
    """Peak bytes of a schedule, those bytes by category, its FLOPs, and the block and program that set the peak."""

    peak: int = 0
    categories: Categories = dataclasses.field(default_factory=dict)
    flops: int = 0
    block: int = 0
    program: str = ""


class _Live:
    """What is alive, by category, and the highest moment so far."""

    def __init__(self, sizes: Sequence[float] | None = None) -> None:
        self.sizes = sizes
        self.now: Categories = {"gradients": 0, "boundaries": 0, "activations": 0, "heads": 0}
        self.best = Simulation()
        self.values: dict[tuple[int, str], int] = {}

    def run(self, cost: Cost, block: int, program: str) -> None:
        self.best.flops += cost.flops
        self.moment(cost.categories, block, program)

    def moment(self, extra: Categories, block: int, program: str) -> None:
        total = sum(self.now.values()) + sum(extra.values())
        if total > self.best.peak:
            categories = {n: self.now.get(n, 0) + extra.get(n, 0) for n in {**self.now, **extra}}
            self.best = Simulation(total, categories, self.best.flops, block, program)

    def put(self, piece: int, name: str, size: int) -> None:
        if (piece, name) not in self.values:
            size = size if self.sizes is None else int(size * self.sizes[piece])
            self.values[piece, name] = size
            self.now["boundaries"] += size

    def drop(self, piece: int, names: Sequence[str]) -> None:
        for name in names:
            self.now["boundaries"] -= self.values.pop((piece, name), 0)

    def forget(self, pieces: range) -> None:
        """Drop what is left of these pieces."""
        for piece, name in [key for key in self.values if key[0] in pieces]:
            self.drop(piece, [name])

    def grads(self, size: int) -> None:
        self.now["gradients"] += size


def local_serial(
    costs: Sequence[StageCosts],
    pieces: int,
    groups: Sequence[range] | None = None,
    sizes: Sequence[float] | None = None,
) -> Simulation:
    """One local step of the block-serial trainer.

    Args:
        costs: of the largest micro-batch.
        pieces: how many micro-batches there are.
        groups: blocks that a micro-batch passes in one go; ``None`` for one block at a time.
        sizes: of the micro-batches, relative to the largest; ``None`` for equal ones.
    """
    live = _Live(sizes)
    read = {n for c in costs for n in c.stage.dead_after_local}
    for group in groups if groups is not None else singly(len(costs)):
        # From the second piece on, every gradient is added to the sum as it comes.
        found = {k: costs[k].local(keep=pieces == 1) for k in group}
        held = 0
        for i in range(pieces):
            for k in group:
                c, cost = costs[k], found[k]
                live.run(cost if cost.peak else c.forward, k, "local step")
                for name, size in c.outputs.items():
                    if name in read:
                        live.put(i, name, size)
                live.drop(i, c.stage.dead_after_local)
                if i == 0:
                    live.grads(cost.gradients)
                    held += cost.gradients
        for k in group:
            _optimizer(live, costs[k], k)
        live.grads(-held)
    return live.best


def singly(count: int) -> list[range]:
    """One at a time."""
    return [range(k, k + 1) for k in range(count)]


def best_groups(costs: Sequence[StageCosts], pieces: int) -> list[range]:
    """Groups of blocks that a micro-batch passes in one go, so that the local step's peak is smallest.

    Between groups the boundaries of all micro-batches wait, inside a group the gradients of all its blocks. Early
    layers of a convolutional network have large boundaries and small gradients and belong together; the layers of a
    transformer, with gradients as large as their boundaries, are best alone.
    """
    count = len(costs)
    if pieces == 1 or count == 1:
        return singly(count)
    read = {n for c in costs for n in c.stage.dead_after_local}
    alive, waiting = [0], 0
    sizes = {n: size for c in costs for n, size in c.outputs.items() if n in read}
    for c in costs:
        waiting += sum(sizes[n] for n in c.outputs if n in read) - sum(sizes[n] for n in c.stage.dead_after_local)
        alive.append(waiting)
    found = [c.local(keep=False) for c in costs]
    working = [(cost.peak or c.forward.peak) + alive[k] for k, (c, cost) in enumerate(zip(costs, found, strict=True))]
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # of the first blocks: the smallest peak, and where its last group begins
    for end in range(1, count + 1):
        options = []
        grads, most = 0, 0
        for begin in range(end - 1, -1, -1):
            grads += found[begin].gradients
            most = max(most, working[begin])
            peak = grads + most + (pieces - 1) * max(alive[begin], alive[end])
            options.append((max(best[begin][0], peak), -begin))
        smallest = min(options)
        best.append((smallest[0], -smallest[1]))
    groups, end = [], count
    while end:
        groups.append(range(best[end][1], end))
        end = best[end][1]
    groups.reverse()
    alone = local_serial(costs, pieces).peak
    return groups if local_serial(costs, pieces, groups).peak < alone else singly(count)


def bp_serial(
    costs: Sequence[StageCosts],
    pieces: int,
    sizes: Sequence[float] | None = None,
    one_by_one: bool = False,
    heads: bool = False,
) -> Simulation:
    """One BP step of the block-serial trainer: the boundaries of all micro-batches wait for the reverse sweep.

    Args:
        costs, pieces, sizes: as for :func:`local_serial`.
        one_by_one: every micro-batch makes both sweeps before the next one, the gradients of all blocks are kept.
        heads: whether the heads go on learning, as in the exact steps of an offset.
    """
    live = _Live(sizes)
    held: dict[int, Categories] = {}
    late = _Late(costs, heads)
    parts = singly(pieces) if one_by_one else [range(pieces)]
    for part in parts:
        _forward(live, costs, part, held if heads else None)
        for k in range(len(costs) - 1, -1, -1):
            c = costs[k]
            if c.stage.vjp is not None:
                cost = c.vjp(keep=pieces == 1)
                for i in part:
                    _pull(live, c, cost, k, i)
                    _hold(live, held, k, "gradients", cost.gradients)
            if part is parts[-1]:
                late.stepped(live, held, k)
        if one_by_one:
            live.forget(part)
    return live.best


def best_bp(
    costs: Sequence[StageCosts],
    pieces: int,
    sizes: Sequence[float] | None = None,
    heads: bool = False,
    together: bool = False,
) -> tuple[Simulation, bool]:
    """The BP step with the smaller peak, and whether it takes the micro-batches one by one.

    Where boundaries outweigh gradients, as in a convolutional network, one by one is smaller, and for most transformers
    all of them together.

    Args:
        costs, pieces, sizes, heads: as for :func:`bp_serial`.
        together: there is no choice.
    """
    found = bp_serial(costs, pieces, sizes, heads=heads)
    if together or pieces == 1:
        return found, False
    single = bp_serial(costs, pieces, sizes, one_by_one=True, heads=heads)
    return (single, True) if single.peak < MARGIN * found.peak else (found, False)


def refresh(costs: Sequence[StageCosts], pieces: int) -> Simulation:
    """One refresh of the block-serial trainer; the stored offsets are state and not counted.

    Args:
        costs: of one piece.
        pieces: how many; they follow one another, so they cost time and no memory.
    """
    live = _Live()
    _forward(live, costs, range(1))
    for k in range(len(costs) - 1, -1, -1):
        c = costs[k]
        if c.stage.vjp is None:
            continue
        if k == len(costs) - 1:
            _pull(live, c, c.vjp(keep=True), k, 0)
            continue
        local = c.local(keep=True)
        if local.peak:
            live.run(local, k, "local gradient in the refresh")
        # A BP gradient takes the place of the local one as it comes.
        live.grads(local.gradients)
        _pull(live, c, c.vjp(keep=False), k, 0)
        # One parameter at a time, the old offset is taken out and the new one encoded.
        live.moment({"offsets": 3 * c.largest_parameter}, k, "difference")
        live.grads(-local.gradients)
    live.best.flops *= pieces
    return live.best


def _forward(
    live: _Live, costs: Sequence[StageCosts], pieces: range, held: dict[int, Categories] | None = None
) -> None:
    """The forward sweep; with ``held``, heads learn from what passes by, and their gradients are noted there."""
    read = {n for c in costs for n in c.stage.dead_after_reverse}
    for k, c in enumerate(costs[:-1]):
        for i in pieces:
            live.run(c.forward, k, "forward sweep")
            for name, size in c.outputs.items():
                if name in read:
                    live.put(i, name, size)
            if held is not None and c.head is not None:
                live.run(c.head, k, "head")
                _hold(live, held, k, "heads", c.head_bytes)


def _hold(live: _Live, held: dict[int, Categories], k: int, category: str, size: int) -> None:
    """Gradients of block k that wait for its optimizer step; there is one set of them."""
    if category not in held.setdefault(k, {}):
        held[k][category] = size
        live.now[category] += size


class _Late:
    """Frees gradients when the optimizer has used them: those of a parameter that several blocks read, at the last one.

    Args:
        costs: of all blocks.
        heads: whether the optimizers are those of a local run, where all of a block waits for such a parameter.
    """

    def __init__(self, costs: Sequence[StageCosts], heads: bool) -> None:
        self.costs, self.heads = costs, heads
        self.first: dict[str, int] = {}
        for c in reversed(costs):
            self.first |= dict.fromkeys(c.trainable, c.stage.index)
        self.waiting: dict[int, Categories] = {}  # by the block that is the last to give a gradient

    def stepped(self, live: _Live, held: dict[int, Categories], k: int) -> None:
        c = self.costs[k]
        found = held.pop(k, {})
        tied = {n: size for n, size in c.trainable.items() if self.first[n] < k}
        if tied:
            last = min(self.first[n] for n in tied)
            later = found if self.heads else {"gradients": min(sum(tied.values()), found.get("gradients", 0))}
            found = {name: size - later.get(name, 0) for name, size in found.items()}
            into = self.waiting.setdefault(last, {})
            for name, size in later.items():
                into[name] = into.get(name, 0) + size
        _optimizer(live, c, k)
        for categories in (found, self.waiting.pop(k, {})):
            for name, size in categories.items():
                live.now[name] -= size


def _pull(live: _Live, c: StageCosts, cost: Cost, k: int, piece: int) -> None:
    live.run(cost, k, "recomputation and backward")
    live.drop(piece, c.stage.dead_after_reverse)
    live.drop(piece, [f"cotangent of {n}" for n in c.outputs])
    for name, size in c.cotangents.items():
        live.put(piece, f"cotangent of {name}", size)


def _optimizer(live: _Live, c: StageCosts, k: int) -> None:
    # AdamW, one parameter at a time, makes two temporaries of its size.
    live.moment({"optimizer": 2 * c.largest_parameter}, k, "optimizer step")
