"""The block trainer and its twin: the same model, trained by `BlockTrainer` and by the loop that one writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import zoo
from oracles import call, run, seed_all
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_leaves, tree_map
from zoo import Batch, Case

import bpfx

adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def calm(model: nn.Module) -> nn.Module:
    """Without dropout: micro-batches draw block by block, a loop draws batch by batch."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    return model


def case_of(name: str, size: int | None = None, quiet: bool = False, dtype: torch.dtype | None = None) -> Case:
    """A case of the zoo, or one of its two small ones, by name."""
    if name == "mlp":
        case = zoo.mlp(size or 4, dtype=dtype or torch.float32)
    elif name == "convnet":
        case = zoo.convnet(size or 4, dtype=dtype or torch.float32)
    else:
        case = zoo.ZOO[name].case(size)
        if dtype is not None:
            case.model.to(dtype)
            case.batch = tree_map(
                lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, case.batch
            )
    if quiet:
        calm(case.model)
    return case


def cuts_of(name: str) -> list[str]:
    return list({"mlp": zoo.MLP_CUTS, "convnet": zoo.CONVNET_CUTS}.get(name) or zoo.ZOO[name].cuts)


def part(batch: Batch, start: int, length: int, whole: int) -> Batch:
    """Some samples of a batch of `whole`."""
    cut = lambda t: t[start : start + length] if isinstance(t, Tensor) and t.dim() and len(t) == whole else t  # noqa: E731
    return tree_map(cut, batch)


def batches_of(name: str, size: int, count: int, dtype: torch.dtype | None = None) -> list[Batch]:
    """As many different batches of one size."""
    pool = case_of(name, size * count, dtype=dtype).batch
    return [part(pool, size * i, size, size * count) for i in range(count)]


def pieces_of(batch: Batch, size: int, count: int) -> Iterator[tuple[Batch, float]]:
    """Micro-batches and their shares, sizes as equal as can be, the smaller first: 10 into 2, 3, 2, 3."""
    starts = [size * i // count for i in range(count + 1)]
    for a, b in zip(starts, starts[1:], strict=False):
        yield part(batch, a, b - a, size), (b - a) / size


def convert(case: Case, blocks: Any, offset: Any = None, **options: Any) -> bpfx.Step:
    seed_all(5)  # heads draw their weights
    return bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, offset=offset, **options)


@cache
def _converted(
    name: str, size: int, quiet: bool, dtype: torch.dtype | None, horizon: int
) -> tuple[bpfx.Step, dict[str, Any]]:
    step = convert(case_of(name, size, quiet, dtype), cuts_of(name), horizon=horizon)
    return step, snapshot(step)


def fresh(
    name: str,
    size: int = 4,
    offset: Any = None,
    quiet: bool = False,
    dtype: torch.dtype | None = None,
    horizon: int = 1,
) -> bpfx.Step:
    """A step at the start. Conversion is what takes the time, so all steps of one model share one, and its weights."""
    first, state = _converted(name, size, quiet, dtype, horizon)
    step = bpfx.Step(first._compiler, offset)
    step.load_state_dict(state)
    step.zero_grad()  # what an earlier test left
    return step


def loss_of(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.loss


def train_drop_in(step: bpfx.Step, batches: Sequence[Batch], *arguments: Any, **options: Any) -> list[Tensor]:
    """The drop-in loop, with accumulation and clipping as one writes them."""
    loss_of_batch = lambda batch: loss_of(step(**batch) if isinstance(batch, dict) else step(*batch))  # noqa: E731
    return _train(loss_of_batch, list(step.parameters()), batches, *arguments, **options)


def train_plain(case: Case, batches: Sequence[Batch], *arguments: Any, **options: Any) -> list[Tensor]:
    """Plain back-propagation on the untouched model, in the same loop."""
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    return _train(lambda batch: call(case.model, batch, case.loss_fn), parameters, batches, *arguments, **options)


def _train(
    loss_of_batch: Callable[[Batch], Tensor],
    parameters: list[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    micro_batches: int = 1,
    clip_norm: float | None = None,
    scheduler: Callable[..., Any] | None = None,
    seed: int = 100,
) -> list[Tensor]:
    made = optimizer(parameters)
    schedule = scheduler(made) if scheduler else None
    losses = []
    for t, batch in enumerate(batches):
        made.zero_grad()
        size = samples(batch)
        seed_all(seed + t)
        total = []
        for piece, share in pieces_of(batch, size, min(micro_batches, size)):
            loss = loss_of_batch(piece)
            (loss * share).backward()
            total.append(loss.detach() * share)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        made.step()
        losses.append(torch.stack(total).sum())
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(float(losses[-1]))
        elif schedule is not None:
            schedule.step()
    return losses


def train_blocks(trainer: bpfx.BlockTrainer, batches: Sequence[Batch], seed: int = 100) -> list[Tensor]:
    return [run(trainer.step, batch, seed + t) for t, batch in enumerate(batches)]


def samples(batch: Batch) -> int:
    return next(len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim())


def assert_close(step: nn.Module, twin: nn.Module, rtol: float = 1e-7) -> None:
    """Every parameter and buffer, each against its own norm."""
    expected = dict(twin.named_parameters()) | dict(twin.named_buffers())
    found = dict(step.named_parameters()) | dict(step.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm()
        assert error <= rtol * value.double().norm() + 1e-12, f"{name}: off by {error:.3g} of {value.norm():.3g}"


def snapshot(step: bpfx.Step) -> dict[str, Any]:
    return copy.deepcopy(dict(step.state_dict()))
