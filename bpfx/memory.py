"""Measuring the peak memory of a call or of every kind of step, on the CPU and on CUDA, with the same answer object.

On the CPU the allocator itself is listened to: the profiler records every allocation and release with its address,
also those inside oneDNN operators, which trackers built on dispatch modes do not see. On CUDA the caching allocator
keeps the peak. Sizes are bytes unless a name says MiB.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from bpfx import _timeline
from bpfx._period import LOCAL, REFRESH
from bpfx.errors import BpfxError

if TYPE_CHECKING:
    from bpfx.step import Step
    from bpfx.trainer import BlockTrainer

T = TypeVar("T")

# Kineto greets every profiler start on stderr; it reads this the first time a profiler starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_FREED = "bpfx::freed "  # name of the marker that stands for the release of a buffer older than the measurement
_CPU, _CUDA = 0, 1  # c10::DeviceType, as written in the trace


@dataclass(frozen=True)
class Peak(Generic[T]):
    """What one call needed.

    Attributes:
        result: what the call returned.
        peak_bytes: highest number of live bytes during the call, minus the bytes live before it; never below 0.
        timeline: ``(seconds since the start, live bytes above the start)`` after every allocation and release,
            beginning with ``(0.0, 0)``. Negative where the call has released more than it allocated.
        device: where the memory was measured.
        active_bytes: CUDA only: peak of blocks in use, the allocator's rounding included, above the start.
        reserved_bytes: CUDA only: peak of what the caching allocator holds from the driver, above the start.
    """

    result: T
    peak_bytes: int
    timeline: list[tuple[float, int]]
    device: torch.device
    active_bytes: int | None = None
    reserved_bytes: int | None = None

    def __str__(self) -> str:
        return f"peak {format_bytes(self.peak_bytes)} on {self.device}"


def mib(count: float) -> float:
    """Bytes as MiB (2**20 bytes).

    >>> mib(3 * 2**20)
    3.0
    """
    return count / 2**20


def format_bytes(count: float) -> str:
    """Bytes for people, in binary units.

    >>> format_bytes(2645 * 2**20), format_bytes(1536), format_bytes(-10)
    ('2.58 GiB', '1.5 KiB', '-10 B')
    """
    size = float(count)
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1), ("GiB", 2)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def measure_peak(fn: Callable[[], T], *, warmup: int = 1, device: str | torch.device | None = None) -> Peak[T]:
    """Call ``fn`` and report the highest memory it held above what was live before.

    Args:
        fn: takes nothing. It is called ``warmup + 1`` times, so it should leave things as it found them.
        warmup: unmeasured calls before, for what is allocated once and kept: optimizer state, gradients, caches.
        device: ``"cpu"``, or a CUDA device. None: the current CUDA device once CUDA is in use in this process,
            else the CPU.

    Returns:
        A :class:`Peak`. On the CPU it counts what goes through torch's allocator (not NumPy's, nor MKL's
        packing buffers).

    Raises:
        ValueError: negative ``warmup``, or a device of another kind.
        RuntimeError: a profiler already runs in this process.

    On the CPU, a buffer that existed before the call and is released during it counts as negative if it was reachable
    from a Python tensor before the call; one that only an autograd graph holds is not seen, so measure a step as a
    whole, not a lone ``loss.backward()``.

    >>> import torch
    >>> peak = measure_peak(lambda: torch.ones(1024).cumsum(0).sum())
    >>> peak.peak_bytes >= 2 * 4096, peak.result.item()
    (True, 524800.0)
    """
    if warmup < 0:
        raise ValueError(f"warmup must be 0 or more; got {warmup}")
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"peak memory can be measured on 'cpu' and 'cuda'; got device {str(where)!r}")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    for _ in range(warmup):
        fn()
    gc.collect()  # garbage in reference cycles would otherwise be released at some random point of the call
    return _measure_cpu(fn) if where.type == "cpu" else _measure_cuda(fn, where)


def measure_steps(target: Step | BlockTrainer, *args: Any, **kwargs: Any) -> dict[str, Peak[Tensor]]:
    """Measure every kind of training step on one batch, and leave everything as it was.

    Args:
        target: what :func:`bpfx.convert` returned, or a :class:`bpfx.BlockTrainer`.
        args, kwargs: a batch, given as to ``target`` itself.

    Returns:
        A :class:`Peak` by kind, its ``result`` the task loss. Of a step: ``"local"`` and ``"bp_blocks"``
        (``run_local``, ``run_bp``), ``"drop_in"`` (call, backward and the gradients it leaves) and ``"refresh"`` (the
        same at an iteration that refreshes). Of a trainer, each a whole step with optimizer: ``"local_serial"`` and
        ``"refresh_serial"`` (the refresh and the local or exact step after it: the larger of the two counts), or in
        mode ``"bp"`` ``"bp_serial"``. Refreshes only where there is an offset. With a period of 1 the steps between two
        refreshes are measured all the same, though no training takes one.

    Raises:
        BpfxError: another target; one in eval mode; what a step on this batch raises.

    Every kind runs twice, the second time measured: optimizer state and offsets exist by then and are not counted, no
    gradient does. Afterwards parameters, buffers, heads, optimizers, schedulers, offsets, iteration, diagnostics,
    gradients and random state are what they were, bit for bit, also after an exception. The copies that this takes
    are in host memory. Where a CUDA device takes part it is the one that is measured.

    >>> import torch, bpfx
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> x, y = torch.randn(500, 64), torch.randint(0, 2, (500,))
    >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, (x, y), blocks=2)
    >>> peaks = measure_steps(step, x, y)
    >>> list(peaks), step.iteration
    (['local', 'bp_blocks', 'drop_in', 'refresh'], 0)
    >>> peaks["local"].peak_bytes < peaks["refresh"].peak_bytes
    True
    """
    from bpfx._snapshot import Replay, unchanged  # they import modules that import this one
    from bpfx.passes.batch import loss_of
    from bpfx.step import Step
    from bpfx.trainer import BlockTrainer

    trainer = target if isinstance(target, BlockTrainer) else None
    step = target.converted if isinstance(target, BlockTrainer) else target
    if not isinstance(step, Step):
        raise BpfxError(
            f"measure_steps takes what bpfx.convert returned or a bpfx.BlockTrainer; got a {type(target).__name__}; "
            "measure_peak measures any other call"
        )
    if not step.training:
        raise BpfxError("the step is in eval mode; call step.train() before measuring its steps")
    tensors = [*step._compiler.spec.flatten(args, kwargs), *step.parameters()]
    device = next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))

    def drop_in() -> Tensor:
        loss: Tensor = loss_of(step(*args, **kwargs))
        loss.backward()
        for parameter in step.parameters():
            parameter.grad = None
        return loss.detach()

    # Iterations of a run under way: the first three do more, such as looking at the heads.
    iterations = itertools.count(max(step.iteration, 3))

    def measured(call: Callable[[], Tensor], kind: str) -> Peak[Tensor]:
        def run() -> Tensor:
            step.iteration, step._forced = next(iterations), kind
            if isinstance(step._refresh_data, Replay):
                step._refresh_data.position = 0
            return call()

        return measure_peak(run, device=device)

    with unchanged(step, trainer), torch.enable_grad():
        offset = step.offset
        found: dict[str, Peak[Tensor]] = {}
        if trainer is None:
            calls = {
                "local": lambda: step.run_local(*args, **kwargs).loss.detach(),
                "bp_blocks": lambda: step.run_bp(*args, **kwargs).loss.detach(),
                "drop_in": drop_in,
            }
            whole, refresh = drop_in, "refresh"
        else:
            serial = trainer
            whole, refresh = (lambda: serial.step(*args, **kwargs)), "refresh_serial"
            calls = {f"{trainer.mode}_serial": whole}
        refreshes = offset is not None and (trainer is None or trainer.mode == "local")
        # First, so that the others find offsets; and last in the answer.
        last = {refresh: measured(whole, REFRESH)} if refreshes else {}
        for kind, call in calls.items():
            found[kind] = measured(call, LOCAL)
        return found | last


def plot_timelines(
    peaks: Mapping[str, Peak[Any]], path: str | Path, *, title: str = "", base: str | None = None
) -> Path:
    """Draw live memory over the share of a step's time, one line per row, its peak marked.

    Args:
        peaks: from :func:`measure_peak` or :func:`measure_steps`, by the names they are to have in the picture.
        path: ends in ``.png`` or ``.svg``.
        title: above the picture.
        base: a row; the others' peaks are given as shares of its own as well.

    Returns:
        The path. Rows are listed from the largest peak to the smallest. Times are shares of a step because measuring
        slows steps down unequally.

    Raises:
        BpfxError: nothing to draw, another ending, an unknown ``base``, or matplotlib is not installed
            (``pip install 'bpfx[plot]'``).

    >>> import tempfile, torch
    >>> peaks = {n: measure_peak(lambda n=n: torch.ones(n * 2**20).exp().sum()) for n in (1, 2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     named = {f"{n} Mi numbers": peak for n, peak in peaks.items()}
    ...     plot_timelines(named, f"{folder}/timelines.svg", base="2 Mi numbers").stat().st_size > 1000
    True
    """
    return _timeline.draw(peaks, path, title, base)


def _measure_cpu(fn: Callable[[], T]) -> Peak[T]:
    finalizers = [weakref.finalize(storage, _mark_freed, storage.nbytes()) for storage in _python_storages()]
    try:
        result, timeline = _profiled(fn, _CPU)
    finally:
        for finalizer in finalizers:
            finalizer.detach()
    return Peak(result, max(live for _, live in timeline), timeline, torch.device("cpu"))


def _measure_cuda(fn: Callable[[], T], device: torch.device) -> Peak[T]:
    def now(key: str) -> int:
        return int(torch.cuda.memory_stats(device).get(key, 0))

    keys = {name: f"{name}_bytes.all" for name in ("allocated", "active", "reserved")}
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # so that the reserved peak is this call's
    torch.cuda.reset_peak_memory_stats(device)
    before = {name: now(f"{key}.current") for name, key in keys.items()}
    result, timeline = _profiled(fn, _CUDA, device.index)
    torch.cuda.synchronize(device)
    peak = {name: now(f"{key}.peak") - before[name] for name, key in keys.items()}
    return Peak(result, peak["allocated"], timeline, device, peak["active"], peak["reserved"])


def _mark_freed(nbytes: int) -> None:
    with torch.profiler.record_function(f"{_FREED}{nbytes}"):
        pass


def _python_storages() -> Iterator[torch.UntypedStorage]:
    """Every CPU storage that a Python tensor, or its ``.grad``, holds at this moment, once."""
    seen: set[int] = set()
    for candidate in gc.get_objects():
        if not issubclass(type(candidate), torch.Tensor):  # isinstance would ask lazy proxies for their __class__
            continue
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is None or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
                continue  # subclasses wrap plain tensors, which are found by themselves
            if tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() not in seen:
                storage = tensor.untyped_storage()
                seen.add(storage.data_ptr())
                yield storage


def _profiled(fn: Callable[[], T], device_type: int, index: int | None = None) -> tuple[T, list[tuple[float, int]]]:
    """Run ``fn`` under the profiler; the result, and the live bytes over time."""
    activities = [torch.profiler.ProfilerActivity.CPU]  # both allocators report from the host
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        with torch.profiler.record_function("bpfx::call"):
            result = fn()
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        # The exported trace is the public way to the addresses: they tell this call's buffers from older ones.
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = _memory_events(file.read(), device_type, index)
    finally:
        os.unlink(path)
    return result, _live_bytes(events)


def _memory_events(trace: str, device_type: int, index: int | None) -> list[tuple[float, int, int]]:
    """``(microseconds, address, bytes)`` of every allocator event of the device; address -1: a marked release."""
    found: list[tuple[float, int, int]] = []

    def keep(item: dict[str, Any]) -> dict[str, Any] | None:
        name = item.get("name")
        if name == "[memory]":
            args = item["args"]
            if args["Device Type"] == device_type and index in (None, args["Device Id"]):
                found.append((item["ts"], args["Addr"], args["Bytes"]))
        elif isinstance(name, str) and name.startswith(_FREED):
            if device_type == _CPU:
                found.append((item["ts"], -1, -int(name.removeprefix(_FREED))))
        elif name == "bpfx::call":
            found.append((item["ts"], -1, 0))
        else:
            return item if "ts" not in item else None  # dropped while parsing: traces of large steps stay small
        return None

    json.loads(trace, object_hook=keep)
    found.sort(key=lambda event: event[0])  # stable: the trace keeps the order of events in the same nanosecond
    return found


def _live_bytes(events: list[tuple[float, int, int]]) -> list[tuple[float, int]]:
    start = events[0][0] if events else 0.0
    timeline, live = [(0.0, 0)], 0
    held: dict[int, int] = {}
    for moment, address, change in events:
        if address == -1:
            live += change
        elif change > 0:
            held[address] = change
            live += change
        else:
            # A release of something allocated before: the profiler knows its size only by accident (the table it keeps
            # outlives a session), so older buffers are counted by their markers alone.
            live -= held.pop(address, 0)
        timeline.append(((moment - start) * 1e-6, live))
    return timeline
