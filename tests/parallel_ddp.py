"""Cases of DistributedDataParallel and of fully_shard, see parallel_worker.py."""

from __future__ import annotations

import contextlib
import copy
import io
import runpy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_cases import (
    CASES,
    LOSSES,
    OFFSETS,
    RANK,
    ROOT,
    Batch,
    Partly,
    alone,
    batches,
    case,
    close,
    everywhere,
    mean,
    mine,
    mlp,
    refused,
    same,
    sgd,
    together,
)
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import bpfx


@case
def example_trains() -> None:
    """examples/data_parallel.py, in the process group that is there: a second one would take a second start."""
    printed = io.StringIO()
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *a: None
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(ROOT / "examples" / "data_parallel.py"), run_name="__main__")
    finally:
        dist.init_process_group, dist.destroy_process_group = begin, end
    lines = printed.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["BlockTrainer", "DistributedDataParallel"] * (RANK == 0)
    assert all(float(line.split("loss ")[1].split(",")[0]) < 0.9 for line in lines), lines


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


def train(step: Any, given: Sequence[Batch], scale: float = 1.0) -> list[float]:
    made = sgd(step.parameters())
    losses = []
    for x, y in given:
        loss = step(x, y)
        (loss * scale).backward()
        made.step()
        made.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def interleaved(batch: Batch, pieces: int) -> Batch:
    """The samples so that piece i of the whole is made of piece i of every rank's part."""
    x, y = batch
    half, per = len(x) // 2, len(x) // 2 // pieces
    order = [r * half + i * per + j for i in range(pieces) for r in range(2) for j in range(per)]
    return x[order], y[order]


def ddp_is_one_process(name: str, count: int = 9, horizon: int = 1, **options: Any) -> None:
    given, offset = batches(count), OFFSETS[name]()
    single = alone(offset, horizon=horizon)
    losses = train(single, [interleaved(b, offset.micro_batches if offset else 1) for b in given])
    step = together(OFFSETS[name](), horizon=horizon)
    found = train(DDP(step, **options), [mine(b) for b in given])
    close(step, single, 1e-2 if name == "bf16" else 1e-8)  # what is stored in bf16 may round to the other side
    same("losses", mean(found), losses, 1e-3 if name == "bf16" else 1e-8)
    assert not offset or len(step.offset_state) > 0


for _name in OFFSETS:
    CASES[f"ddp_{_name}"] = partial(ddp_is_one_process, _name)
CASES["ddp_exact_for_long"] = partial(ddp_is_one_process, "exact", 22)
CASES["ddp_static_graph"] = partial(ddp_is_one_process, "exact", static_graph=True)
CASES["ddp_bucket_views"] = partial(ddp_is_one_process, "fixed", gradient_as_bucket_view=True)
CASES["ddp_find_unused"] = partial(ddp_is_one_process, "fixed", find_unused_parameters=True)


@case
def ddp_accumulates_without_sync() -> None:
    """Two batches to a step, the first under no_sync; also two losses in one backward."""
    for at_once in (False, True):
        single, step = alone(bpfx.Offset(period=3)), together(bpfx.Offset(period=3))
        wrapped = DDP(step)
        for owner, call, cut in ((single, single, lambda b: b), (step, wrapped, mine)):
            made = sgd(owner.parameters())
            given = [cut(b) for b in batches(8)]
            for first, second in zip(given[::2], given[1::2], strict=True):
                if at_once:
                    (call(*first) + call(*second)).backward()
                else:
                    with wrapped.no_sync() if owner is step else contextlib.nullcontext():
                        (call(*first) / 2).backward()
                    (call(*second) / 2).backward()
                made.step()
                made.zero_grad()
        close(step, single)


@case
def ddp_trains_what_some_steps_leave_out() -> None:
    """A model that returns its loss, with parameters that never have a gradient."""
    single, step = (make(bpfx.Offset(period=2), "partly", "inside") for make in (alone, together))
    wrapped = DDP(step)
    for owner, call, cut in ((single, single, lambda b: b), (step, wrapped, mine)):
        made = torch.optim.SGD(owner.parameters(), lr=0.05)
        for batch in batches(5):
            x, y = cut(batch)
            out = call(x=x, labels=y)
            assert out["logits"].shape == (len(x), 3)
            out["loss"].backward()
            made.step()
            made.zero_grad()
    close(step, single)


@case
def ddp_uneven_counts_by_rank_or_by_samples() -> None:
    """As for any model: the mean over ranks, or over samples where the loss is scaled so."""
    for weighted in (False, True):
        for name in ("none", "exact"):
            batch = batches(1, 5)[0]
            parts = (batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])
            single, step = alone(OFFSETS[name]()), together(OFFSETS[name]())
            wrapped = DDP(step)
            scale = len(mine(batch)[0]) * 2 / 5 if weighted else 1.0
            train(wrapped, [mine(b) for b in batches(2)])  # past the refresh, into the exact steps
            train(single, batches(2))
            step.zero_grad(), single.zero_grad()
            (wrapped(*mine(batch)) * scale).backward()
            if weighted:
                single(*batch).backward()
            else:
                at = single.iteration
                for part in parts:
                    single.iteration = at
                    (single(*part) / 2).backward()
            for (n, p), q in zip(step.named_parameters(), single.parameters(), strict=True):
                same(n, p.grad, q.grad)


@case
def ddp_keeps_running_statistics_of_rank_zero() -> None:
    """And they are those of a plain model: once per step, refresh or not."""
    step = together(bpfx.Offset(period=2), "norm")
    plain = copy.deepcopy(step.model)
    for tensor in (*plain.parameters(), *plain.buffers()):
        dist.broadcast(tensor.detach(), 0)
    wrapped = DDP(step)
    for x, y in map(mine, batches(3)):
        wrapped(x, y).backward()  # the weights stay
        plain(x)
    with torch.no_grad():
        wrapped.eval()(*mine(batches(1)[0]))  # buffers travel at the beginning of a training step
    wrapped.train()
    if dist.get_rank() == 0:
        for name, value in plain.named_buffers():
            same(name, step.model.get_buffer(name), value)


@case
def ddp_resumes_from_rank_zero() -> None:
    given = [mine(b) for b in batches(9)]
    through = together(bpfx.Offset())
    train(DDP(through), given)
    first = together(bpfx.Offset())
    wrapped = DDP(first)
    optimizer = sgd(first.parameters())

    def go(call: Any, made: Any, part: Sequence[Batch]) -> None:
        for x, y in part:
            call(x, y).backward()
            made.step()
            made.zero_grad()

    go(wrapped, optimizer, given[:5])
    saved = [copy.deepcopy([dict(first.state_dict()), optimizer.state_dict()])]
    dist.broadcast_object_list(saved, 0)
    second = together(bpfx.Offset())
    optimizer = sgd(second.parameters())
    second.load_state_dict(saved[0][0])
    optimizer.load_state_dict(saved[0][1])
    go(DDP(second), optimizer, given[5:])
    for (n, p), q in zip(second.named_parameters(), through.parameters(), strict=True):
        assert torch.equal(p, q), n


@case
def ddp_with_matching_heads_agrees() -> None:
    """Heads that learn from the BP gradient at their boundary learn from the mean of what the ranks' parts say."""
    step = together(bpfx.Offset(period=2, match=0.5))
    train(DDP(step), [mine(b) for b in batches(5)])
    everywhere(step)


@case
def ddp_of_halves_of_the_precision() -> None:
    """In bf16, as parameters and as autocast."""
    x, y = batches(1)[0]
    for cast in (False, True):
        torch.manual_seed(1)
        model = mlp().float() if cast else mlp().bfloat16()
        inputs = x.float() if cast else x.bfloat16()
        step = bpfx.convert(model, F.cross_entropy, (inputs, y), blocks=["2"], offset=bpfx.Offset(period=2))
        wrapped = DDP(step)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = wrapped(*mine((inputs, y)))
            loss.backward()
            with torch.no_grad():
                for p in step.parameters():
                    p.sub_(p.grad, alpha=0.05)
                    p.grad = None
        everywhere(step)


@case
def ddp_refuses_what_it_cannot_do() -> None:
    step = together(bpfx.Offset())
    step.iteration = dist.get_rank()
    refused("load the same state on every rank", partial(DDP(step), *mine(batches(1)[0])))
    step = together(bpfx.Offset(period=2 + dist.get_rank()))
    refused("the offset settings of rank 1 are not those of rank 0", partial(DDP(step), *mine(batches(1)[0])))
    step = together(bpfx.Offset())
    wrapped = DDP(step)
    with Join([wrapped]):
        refused("convert with offset=None", partial(wrapped, *mine(batches(1)[0])))
    refused("pass what is inside", lambda: bpfx.BlockTrainer(wrapped, sgd))


@case
def ddp_joins_without_offsets() -> None:
    """Ranks with other numbers of batches, in DistributedDataParallel's own way."""
    step = together(None)
    wrapped = DDP(step)
    made = sgd(step.parameters())
    with Join([wrapped]):
        for x, y in map(mine, batches(2 + dist.get_rank())):
            wrapped(x, y).backward()
            made.step()
            made.zero_grad()
    everywhere(step)


# --- fully_shard ------------------------------------------------------------------------------------------------------


def divided(model: nn.Module) -> None:
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)


def shards_are_one_process(model: str, loss: str, horizon: int = 1) -> None:
    """Local steps, their gradients divided as the parameters are; three layers of 6 and one of 3 rows."""
    single = alone(None, model, loss, horizon)
    torch.manual_seed(1)
    made = {"mlp": mlp, "partly": Partly}[model]()
    x, y = batches(1)[0]
    batch = {"x": x, "labels": y} if model == "partly" else (x, y)
    blocks = ["second", "last"] if model == "partly" else ["1", "2", "3"]
    torch.manual_seed(RANK)  # heads of their own
    step = bpfx.convert(made, LOSSES[loss], batch, blocks=blocks, horizon=horizon, offset=None)
    start = dict(single.state_dict()) if RANK == 0 else {}
    step.model.load_state_dict({n.removeprefix("model."): t for n, t in single.state_dict().items() if "model." in n})
    if RANK == 0:
        step.heads.load_state_dict({n.removeprefix("heads."): t for n, t in start.items() if n.startswith("heads.")})
    divided(step.model)
    optimizers = [sgd(s.parameters()) for s in (single, step)]
    for b in batches(4):
        for owner, optimizer, (x, y) in zip((single, step), optimizers, (b, mine(b)), strict=True):
            out = owner(x=x, labels=y)["loss"] if model == "partly" else owner(x, y)
            out.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(step.named_parameters(), single.parameters(), strict=True):
        assert isinstance(p, DTensor) == name.startswith("model."), name
        same(name, p.detach().full_tensor() if isinstance(p, DTensor) else p.detach(), q.detach())
    with torch.no_grad():
        step.eval(), single.eval()
        given = {"x": x, "labels": y} if model == "partly" else {}
        found, expected = (s(**given) if given else s(x, y) for s in (step, single))
        same("evaluated", *((v["loss"] if given else v) for v in (found, expected)))
    step.train(), single.train()


CASES["shards"] = partial(shards_are_one_process, "mlp", "mean")
CASES["shards_own_loss_partly_seen"] = partial(shards_are_one_process, "partly", "inside")


@case
def shards_refuse_what_is_not_built() -> None:
    torch.manual_seed(1)
    batch = batches(1)[0]
    small = lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()  # noqa: E731
    convert = partial(bpfx.convert, loss_fn=F.cross_entropy, batch=batch, blocks=["1"])
    step = convert(small())
    divided(step.model)
    refused("convert with offset=None", lambda: step(*batch))
    refused("BlockTrainer is not built for it", lambda: bpfx.BlockTrainer(step, sgd, data_parallel=True))
    for options, words in (
        ({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}, "use torch.autocast"),
        ({"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))}, "no hybrid sharding"),
    ):
        step = convert(small(), offset=None)
        fully_shard(step.model, **options)
        refused(words, lambda step=step: step(*batch))
    step = convert(small(), offset=None)
    parallelize_module(step.model[0], init_device_mesh("cpu", (2,)), ColwiseParallel())
    refused("no tensor parallel", lambda: step(*batch))
    step = convert(small(), offset=None)
    fully_shard(step)
    refused("modules of step.model only", lambda: step(*batch))
