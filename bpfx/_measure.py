"""What one training step costs, measured: peak memory, seconds, state, and how far local gradients agree with BP's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpfx._period import REFRESH
from bpfx.memory import measure_peak
from bpfx.step import Step

__all__ = ["checkpoint_parts", "checkpointing", "cosine", "seconds_per_step", "state_bytes", "step_memory"]

_TIMELINE_POINTS = 400


def step_memory(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, period: int = 1, iteration: int = 0
) -> dict[str, Any]:
    """Peak memory of forward and backward of one step, above the state before it.

    Parameters, buffers, optimizer state and offsets exist before and are not counted; gradients are made anew and are.
    The optimizer's own temporaries, which are the same for every method, are left out.

    Args:
        loss: runs the forward part and returns the loss.
        optimizer: clears the gradients between steps; its `step` is not called.
        period: iterations between two refreshes; the most expensive step, the refresh, is what is measured.
        iteration: steps made so far.

    Returns:
        `peak_bytes`, and `timeline`: pairs of milliseconds and bytes, at most 400.
    """

    def step() -> None:
        loss().backward()
        optimizer.zero_grad()

    optimizer.zero_grad()
    # One full period is the warm-up; then on to the next multiple of the period.
    for _ in range(period + (-iteration) % period):
        step()
    peak = measure_peak(step, warmup=0)
    return {"peak_bytes": peak.peak_bytes, "timeline": _thin(peak.timeline)}


def refresh_memory(step: Step, loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As :func:`step_memory`, of a step that measures its offsets, whatever the schedule says."""
    step._forced = REFRESH
    try:
        return step_memory(loss, optimizer)
    finally:
        step._forced = None


def _thin(timeline: list[tuple[float, int]]) -> list[list[float]]:
    """At most 400 points, the highest and the last of each stretch, in milliseconds."""
    stretch = max(1, -(-2 * len(timeline) // _TIMELINE_POINTS))
    kept: list[list[float]] = []
    for start in range(0, len(timeline), stretch):
        part = timeline[start : start + stretch]
        top = max(range(len(part)), key=lambda index: part[index][1])
        for index in sorted({top, len(part) - 1}):
            kept.append([1e3 * part[index][0], part[index][1]])
    return kept


def seconds_per_step(seconds: list[float], period: int = 1) -> float:
    """Median over windows of one period of the mean step in each: a lone median would hide the refreshes.

    Example:
        >>> from bpfx._measure import seconds_per_step
        >>> seconds_per_step([9.0, 1.0, 3.0, 1.0, 3.0, 1.0], period=2)
        2.0
    """
    # The first window pays for caches and compilation.
    usable = seconds[period:] if len(seconds) >= 2 * period else seconds
    windows = [usable[i : i + period] for i in range(0, len(usable) - period + 1, period)] or [usable]
    return statistics.median(statistics.fmean(window) for window in windows)


def state_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that live between steps: everything in the module's state (heads and offsets too) and the optimizer's."""
    tensors = [*_tensors(module.state_dict()), *_tensors(optimizer.state_dict()["state"])]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def cosine(step: Step, x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over blocks, the last one aside, of the cosine between local and BP gradient at the present weights.

    What `step.diagnostics` reports for every refresh, for steps that have none. Weights, buffers, gradients and random
    state stay as they were. The last block's local loss is the task loss, so its cosine is 1 and says nothing.

    Args:
        step: made by `bpfx.convert`.
        x: images.
        y: labels.
    """
    buffers = {name: buffer.clone() for name, buffer in step.named_buffers()}
    random_state = torch.get_rng_state()
    try:
        local = step.run_local(x, y).grads
        torch.set_rng_state(random_state)
        exact = step.run_bp(x, y).grads
    finally:
        torch.set_rng_state(random_state)
        with torch.no_grad():
            for name, buffer in step.named_buffers():
                buffer.copy_(buffers[name])
    cosines = []
    for block in step.plan.blocks[:-1]:
        names = [name for name in block.parameter_names if name in exact and name in local]
        if names:
            one, other = (torch.cat([side[name].flatten().double() for name in names]) for side in (local, exact))
            cosines.append(F.cosine_similarity(one, other, dim=0).item())
    return statistics.fmean(cosines) if cosines else math.nan


def checkpointing(
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    repeats: int = 7,
) -> dict[str, Any] | None:
    """Memory and time of plain BP with activation checkpointing of every repeated part of the model.

    The parts are the entries of the model's `nn.Sequential` and `nn.ModuleList` containers, as deep as they still hold
    modules with modules of their own: residual blocks, transformer layers.

    Returns:
        `peak_bytes`, `timeline`, `seconds_per_step`, `parts`; None where the model has no such container.
    """
    parts = checkpoint_parts(model)
    if not parts:
        return None
    x, y = batch
    optimizer = torch.optim.AdamW(model.parameters())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    memory = step_memory(lambda: loss_fn(model(x), y), optimizer)
    return {"seconds_per_step": seconds_per_step(seconds), "parts": parts, **memory}


def checkpoint_parts(model: nn.Module) -> int:
    """Let every repeated part of `model` store its input alone and compute its inside again; the number of parts.

    What a part is: see `checkpointing`.
    """
    parts = _repeated_parts(model)
    for part in parts:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    return len(parts)


def _repeated_parts(module: nn.Module) -> list[nn.Module]:
    parts = []
    for child in module.children():
        grandchildren = list(child.children())
        if isinstance(child, nn.Sequential | nn.ModuleList):
            if any(list(entry.children()) for entry in grandchildren):
                # A container of containers is a list of stages: look inside them.
                for entry in grandchildren:
                    stage = isinstance(entry, nn.Sequential | nn.ModuleList)
                    nested = _repeated_parts(nn.ModuleList([entry])) if stage else []
                    parts += nested or ([entry] if list(entry.children()) else [])
            elif isinstance(child, nn.Sequential) and len(grandchildren) > 1:
                parts.append(child)
        elif grandchildren:
            parts += _repeated_parts(child)
    return parts
