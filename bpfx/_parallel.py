"""Data parallel: several processes (*ranks*), each with a part of every batch, take the step of the whole batch.

Whatever a rank decides from is a sum over all ranks: the gradients of a refresh before they are subtracted, measured
and stored, and the gradients of a block before they are corrected, clipped and stepped. A sum is the same on every
rank, bit for bit, so offsets, scales, periods and weights are, too. No decision has to travel, and the state of one
rank is that of all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bpfx._gradients import Grads
from bpfx._ranks import several
from bpfx.errors import BpfxError, BpfxWarning
from bpfx.passes.graph import HEADS
from bpfx.passes.programs import LocalGradient
from bpfx.passes.stages import Stage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as Group

    from bpfx.step import Step

Layout = Sequence[tuple[str, Tensor]]
Blocks = Generator[tuple[int, Grads, Any], None, None]
Pieces = Sequence[Sequence[Tensor]]
_KINDS = ("local", "refresh", "exact")


@dataclasses.dataclass
class _Flat:
    """Gradients of one dtype and device in a row; behind them, one number each, which of them there are."""

    pairs: list[tuple[str, Tensor]]
    buffer: Tensor
    full: bool
    work: Any = None


class Pending:
    """A sum of gradients over the ranks, under way: one all-reduce for each dtype.

    Args:
        group: the process group.
        layout: every gradient that there may be on any rank, by key, with a tensor of its shape, dtype and device. The
            same on every rank.
        grads: this rank's, by key; taken out one by one. What is missing here counts as zero, and what is missing on
            every rank stays missing.
        factor: of this rank's gradients in the sum.
    """

    def __init__(self, group: Group, layout: Layout, grads: Grads, factor: float = 1.0) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = {}
        for key, like in layout:
            by_kind.setdefault((like.dtype, like.device), []).append((key, like))
        self._flats = [_flat(pairs, grads, factor) for pairs in by_kind.values()]
        for flat in self._flats:
            flat.work = dist.all_reduce(flat.buffer, group=group, async_op=True)

    def wait(self) -> Grads:
        """The sums; views of one buffer for each dtype."""
        found: Grads = {}
        while self._flats:
            flat = self._flats.pop(0)
            flat.work.wait()
            count = len(flat.pairs)
            # Reading a number waits for the device, so only where it is not known already.
            there = [True] * count if flat.full else (flat.buffer[-count:] > 0).tolist()
            start = 0
            for (key, like), known in zip(flat.pairs, there, strict=True):
                if known:
                    found[key] = flat.buffer.narrow(0, start, like.numel()).view(like.shape)
                start += like.numel()
        return found


def _flat(pairs: list[tuple[str, Tensor]], grads: Grads, factor: float) -> _Flat:
    like = pairs[0][1]
    buffer = torch.zeros(sum(t.numel() for _, t in pairs) + len(pairs), dtype=like.dtype, device=like.device)
    full, start = True, 0
    for i, (key, tensor) in enumerate(pairs):
        if key not in grads:
            full = False
        else:
            grad = grads.pop(key)
            if grad.layout is not torch.strided:
                raise BpfxError(
                    f"the gradient of {key} is sparse, which cannot be summed over processes; use a dense one"
                )
            place = buffer.narrow(0, start, tensor.numel())
            place.copy_(grad.reshape(-1))
            if factor != 1.0:
                place.mul_(factor)
            buffer[i - len(pairs)] = 1
            del grad
        start += tensor.numel()
    return _Flat(pairs, buffer, full)


class Ranks:
    """The processes that train one step together.

    Args:
        step: this process's own.
        group: the process group.
        by_rank: every rank counts the same, as in DistributedDataParallel; otherwise by its share of the loss of the
            whole batch (samples, labels that count, or in full where the loss is a sum).
    """

    def __init__(self, step: Step, group: Group, by_rank: bool) -> None:
        self.group, self.by_rank = group, by_rank
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._step = weakref.ref(step)
        self._reference: list[Tensor] | None = None
        synced = [n for n, m in step.model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
        if synced:
            raise BpfxError(
                f"{synced[0]} is a SyncBatchNorm, whose own communication the recomputation of a block would repeat; "
                "train with BatchNorm, or with a norm that knows no batch"
            )

    @property
    def step(self) -> Step:
        step = self._step()
        assert step is not None
        return step

    # --- numbers ------------------------------------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers from every rank, by rank."""
        own = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return torch.stack(found).tolist()

    def total(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums of 0-dim tensors over the ranks, in their own dtypes."""
        summed = torch.stack([v.detach().to(self.device, torch.float64) for v in values])
        dist.all_reduce(summed, group=self.group)
        return [s.to(v) for s, v in zip(summed, values, strict=True)]

    @property
    def device(self) -> torch.device:
        return next(iter(self.step.parameters())).device

    # --- agreement ----------------------------------------------------------------------------------------------------

    def check_alike(self, *more: object) -> None:
        """Raise, on every rank, unless all have the same blocks, parameters, settings and iteration."""
        step = self.step
        heads = [(n, p.shape) for n, p in step.heads.named_parameters()]
        shapes = [(n, step._compiler.weights[n].shape) for n in step._trainable]
        plain = (int, float, str, tuple, torch.dtype, type(None))
        fields = vars(step.offset).items() if step.offset is not None else ()
        # The samples of a refresh are a rank's own affair.
        offset = [(n, v) for n, v in fields if isinstance(v, plain) and n not in ("batch", "micro_batches", "device")]
        what = {
            "blocks": [b.name for b in step.plan.blocks],
            "parameters that train": (shapes, heads),
            "offset settings": offset,
            "trainer settings": more,
        }
        own = [int(hashlib.sha256(repr(v).encode()).hexdigest()[:12], 16) for v in what.values()]
        rows = self.gather([*own, step.iteration])
        for i, name in enumerate(what):
            other = next((r for r, row in enumerate(rows) if row[i] != rows[0][i]), None)
            if other is not None:
                raise BpfxError(
                    f"data parallel: the {name} of rank {other} are not those of rank 0; make model, step and trainer "
                    "with the same arguments on every rank, from example batches of the same shape"
                )
        self._same_iteration([int(row[-1]) for row in rows])

    def together(self, iteration: int, kind: str, *numbers: float) -> list[list[float]]:
        """Numbers from every rank, after a check that all of them are at the same step.

        Raises:
            BpfxError: on every rank, where they are not.
        """
        rows = self.gather([iteration, _KINDS.index(kind), *numbers])
        self._same_iteration([int(row[0]) for row in rows])
        kinds = [_KINDS[int(row[1])] for row in rows]
        if len(set(kinds)) > 1:
            other = next(r for r, k in enumerate(kinds) if k != kinds[0])
            raise BpfxError(
                f"data parallel: at iteration {iteration} rank 0 is to take a {kinds[0]} step and rank {other} a "
                f"{kinds[other]} one; load the same state on every rank, and use the same Offset"
            )
        return [row[2:] for row in rows]

    def _same_iteration(self, iterations: list[int]) -> None:
        other = next((r for r, i in enumerate(iterations) if i != iterations[0]), None)
        if other is not None:
            raise BpfxError(
                f"data parallel: rank 0 is at iteration {iterations[0]} and rank {other} at {iterations[other]}; load "
                "the same state on every rank, and call the step equally often on each"
            )

    def broadcast(self) -> None:
        """Rank 0's parameters, heads and buffers for everyone."""
        for tensor in (*self.step.parameters(), *self.step.buffers()):
            dist.broadcast(tensor.detach(), group=self.group, group_src=0)

    def broadcast_statistics(self) -> None:
        """Rank 0's running statistics for everyone, as DistributedDataParallel has it."""
        step = self.step
        weights = step._compiler.weights
        mutated = [weights[n] for n in sorted(step._compiler.main.captured.mutated_buffers)]
        for tensor in (*mutated, *step.heads.buffers()):
            dist.broadcast(tensor.detach(), group=self.group, group_src=0)

    def settle(self, loss: Tensor, local_losses: dict[int, Tensor]) -> Tensor:
        """The end of a trainer's step: the batch's loss and local losses from the ranks' parts, and one set of buffers.

        Args:
            loss: this rank's part.
            local_losses: its parts of the local losses, by block; replaced by the batch's.
        """
        self.broadcast_statistics()
        names = sorted(local_losses)
        whole, *local = self.total([loss, *(local_losses[k] for k in names)])
        local_losses.update(zip(names, local, strict=True))
        return whole

    # --- weights of ranks ---------------------------------------------------------------------------------------------

    def weighted(
        self, pieces: Pieces, shares: Sequence[float], told: str | None, iteration: int, kind: str
    ) -> list[float]:
        """Shares of this rank's pieces in the batch of all ranks, from those in its own part of it.

        Args:
            pieces: this rank's, perhaps none.
            shares: of each in the loss of these.
            told: whether the loss is a mean or a sum, where the caller knows better.
            iteration, kind: of this step, which every rank has to agree on.
        """
        if self.by_rank:
            self.together(iteration, kind)
            return [share / self.size for share in shares]
        compiler = self.step._compiler
        samples = sum(compiler.spec.samples(p) for p in pieces)
        counted = told is None and compiler.reduction.kind == "counted"
        count = self._count(pieces) if counted else float(samples)
        rows = self.together(iteration, kind, count, samples)
        if not sum(n for _, n in rows):
            raise BpfxError("this batch has no samples on any rank; skip it")
        if (told or compiler.reduction.kind) == "sum":
            return list(shares)
        # Where no label counts at all the loss is what it plainly is, by samples.
        whole = sum(c for c, _ in rows)
        part = count / whole if whole else samples / sum(n for _, n in rows)
        return [share * part for share in shares]

    def _count(self, pieces: Pieces) -> float:
        """What the loss divides by, of these pieces, in units of that of a few samples that all ranks have."""
        if self._reference is None:
            found = [[t.cpu() for t in self.step._compiler.example] if self.rank == 0 else None]
            dist.broadcast_object_list(found, group=self.group, group_src=0, device=self.device)
            assert found[0] is not None
            own = self.step._compiler.example
            self._reference = [t.to(like.device) for t, like in zip(found[0], own, strict=True)]
        if not pieces:
            return 0.0
        try:
            share = self.step._compiler.shares([*pieces, self._reference])[-1]
        except RuntimeError as error:  # masks of other lengths than the example's cannot be counted together
            raise BpfxError(
                "data parallel: what the loss divides by cannot be counted for inputs of other lengths than the "
                f"example's ({str(error).splitlines()[0]}); pad to one length, or pass reduction='mean'"
            ) from error
        if not share:
            raise BpfxError(
                "data parallel: in the first samples of the example batch no label counts; convert with another batch"
            )
        # Not the sum of the pieces' own counts: a count may be clamped from below.
        return 1 / share - 1

    # --- gradients ----------------------------------------------------------------------------------------------------

    def like(self, name: str) -> Tensor:
        """The parameter of this name."""
        heads = dict(self.step.heads.named_parameters()) if name.startswith(HEADS) else {}
        return heads[name.removeprefix(HEADS)] if heads else self.step._compiler.weights[name]

    def begin(self, named: Layout, grads: Grads) -> Pending:
        """Begin to sum the gradients of these parameters; ``grads`` is emptied."""
        return Pending(self.group, named, grads)

    def matching(self, grads: Grads) -> Grads:
        """Sums of gradients of heads."""
        heads = [(f"{HEADS}{n}", p) for n, p in self.step.heads.named_parameters()]
        return self.begin(heads, grads).wait()

    def mean(self, grads: Grads) -> Grads:
        """Means over the ranks of the gradients of all parameters, the heads' included."""
        step = self.step
        named = [(n, self.step._compiler.weights[n]) for n in step._trainable]
        named += [(f"{HEADS}{n}", p) for n, p in step.heads.named_parameters()]
        return Pending(self.group, named, grads, 1 / self.size).wait()

    def both(self, names: Sequence[str], theirs: Grads, own: Grads, part: float) -> tuple[Grads, Grads]:
        """BP and local gradients of a block, each the sum over the ranks.

        Args:
            names: the block's parameters.
            theirs: this rank's BP gradients; emptied.
            own: its local ones, which stay; those of the head do not travel.
            part: of this rank's in the sum.
        """
        layout = [(f"{kind}{n}", self.like(n)) for kind in "gl" for n in names]
        given = {f"g{n}": theirs.pop(n) for n in list(theirs)} | {f"l{n}": own[n] for n in names if n in own}
        found = Pending(self.group, layout, given, part).wait()
        return (
            {n: found[f"g{n}"] for n in names if f"g{n}" in found},
            {n: found[f"l{n}"] for n in names if f"l{n}" in found},
        )


def rounds_of(
    ranks: Ranks | None, pieces: Pieces, shares: Sequence[float], told: str | None, iteration: int
) -> list[tuple[Sequence[Tensor], float, float]]:
    """The pieces of a refresh as all ranks go through them together.

    Args:
        ranks: ``None`` for one process alone.
        pieces, shares, told, iteration: as for :meth:`Ranks.weighted`.

    Returns:
        For every round: this rank's piece (empty where it has none left, or one that does not count), the share of all
        ranks' pieces in the refresh, and this rank's part of that.
    """
    if ranks is None:
        return [(piece, share, 1.0) for piece, share in zip(pieces, shares, strict=True) if share]
    own = ranks.weighted(pieces, shares, told, iteration, "refresh")
    count = max(int(n) for (n,) in ranks.gather([len(own)]))
    own += [0.0] * (count - len(own))
    totals = [sum(column) for column in zip(*ranks.gather(own), strict=True)]
    return [(pieces[i] if own[i] else (), totals[i], own[i] / totals[i]) for i in range(count) if totals[i]]


def summed(blocks: Blocks, ranks: Ranks, named: dict[int, list[tuple[str, Tensor]]]) -> Blocks:
    """Every block's gradient summed over the ranks, while the next block is computed.

    A block is handed on, to be stepped, after the next one has run. None of the blocks that run later in a sweep reads
    what it trains, which is how parameters are assigned to blocks; what it costs is one more block's gradient.
    """
    with closing(blocks):
        before: tuple[int, Pending | None, Any] | None = None
        for k, grads, extra in blocks:
            pending = ranks.begin(named[k], grads) if k in named else None
            if before is not None:
                yield before[0], _waited(before[1]), before[2]
            before = (k, pending, extra)
        if before is not None:
            yield before[0], _waited(before[1]), before[2]


def _waited(pending: Pending | None) -> Grads:
    return pending.wait() if pending is not None else {}


def idle_sweep(stages: Sequence[Stage], kind: str, local: bool, loss: Tensor) -> Iterator[tuple[int, Grads, Any]]:
    """The sweep of a rank without samples: the blocks in the order of the others', and no gradient.

    Args:
        stages: the blocks.
        kind: of step.
        local: whether heads train.
        loss: the graph's, for its dtype and device.
    """
    zero = torch.zeros((), dtype=loss.dtype, device=loss.device)
    if local and kind != "exact":
        for stage in stages:
            yield stage.index, {}, zero if isinstance(stage.local, LocalGradient) else None
    else:
        for stage in reversed(stages):
            if stage.vjp is not None:
                seen = isinstance(stage.local, LocalGradient) and stage.local.local_loss is not None
                yield stage.index, {}, zero if seen and local else None
    yield -1, {}, zero


# --- BlockTrainer -----------------------------------------------------------------------------------------------------


def ranks_of_trainer(
    step: Step, data_parallel: bool | Group | None, reduction: str | None, *settings: object
) -> Ranks | None:
    """The ranks of a trainer, all with rank 0's weights; ``None`` for one process alone.

    Args:
        step: what is trained.
        data_parallel: as :class:`bpfx.BlockTrainer` was given it.
        reduction: the same.
        settings: of the trainer; to be the same on every rank.

    Raises:
        BpfxError: no group, or a loss or a model that cannot be trained so; on every rank.
    """
    if data_parallel is None and several():
        warnings.warn(
            "torch.distributed has several processes, and this trainer trains alone in its own; pass "
            "data_parallel=True to train together, or data_parallel=False if this is what you want",
            BpfxWarning,
            stacklevel=3,
        )
    if data_parallel is None or data_parallel is False:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise BpfxError(
            f"data_parallel={data_parallel!r} needs torch.distributed: call torch.distributed.init_process_group() "
            "first, and start the script with torchrun"
        )
    if data_parallel is not True and not isinstance(data_parallel, dist.ProcessGroup):
        raise BpfxError(f"data_parallel={data_parallel!r}: pass True, False, or a process group of torch.distributed")
    group = dist.group.WORLD if data_parallel is True else data_parallel
    assert group is not None
    if dist.get_rank(group) < 0:
        raise BpfxError("data_parallel: this process is not in the group that it was given")
    if dist.get_world_size(group) == 1:
        return None
    compiler = step._compiler
    compiler.check_reduction(reduction)
    ranks = Ranks(step, group, by_rank=False)
    ranks.check_alike(reduction, reduction is None and compiler.reduction.kind, *settings)
    ranks.broadcast()
    return ranks
