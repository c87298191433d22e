"""Whole training steps, optimizer included, side by side: peak memory and time of exact recipes and of bpfx.

    python benchmarks/memory.py                                      # everything
    python benchmarks/memory.py --only stack-64,resnet50 --rounds 0  # some parts, memory only; the others stay
    python benchmarks/memory.py --width 32 --tokens 16 --image-size 64 --batch 8 --out /tmp/memory   # a try-out

Every part runs in a process of its own. Writes OUT.json (everything measured), OUT.md (tables), OUT.png (peak against
depth) and OUT-models.png (bars per image model).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Both are read when torch starts: threads that wait without spinning, and a profiler that does not greet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from memory_models import Optimizer, SharedAdamW, Sizes, block_starts, build, data, exact
from memory_report import PARTS, ROWS, Part, Row, markdown, plot_depths, plot_models
from parts import measure_parts
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx
from bpfx.memory import measure_peak

RESULTS = Path(__file__).parent / "results"
LEARNING_RATE = 1e-4
OFFSET_DTYPE = "int8"


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ready:
    """A row that can run: a call is one whole training step. `step` and `trainer` are there for rows of bpfx's."""

    call: Callable[[], Tensor]
    step: Any = None
    trainer: Any = None


def convert(part: Part, row: Row, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """bpfx's step of a row; a refresh is one at every iteration, so that each measured one is."""
    offset = bpfx.Offset(period=1, dtype=OFFSET_DTYPE) if row.recipe == "refresh" else None
    if str(part.blocks).endswith("MiB"):
        return bpfx.convert(model, F.cross_entropy, (x, y), memory_budget=part.blocks, offset=offset)
    blocks = block_starts(part, model) if part.blocks == "layers" else part.blocks
    return bpfx.convert(model, F.cross_entropy, (x, y), blocks=blocks, offset=offset)


def ready(
    part: Part, row: Row, model: nn.Module, x: Tensor, y: Tensor, optimizer: Optimizer, step: Any = None
) -> Ready:
    """A row on a model; the model is converted unless a step is given."""
    if not row.ours:
        return Ready(exact(part, row, model, x, y, optimizer))
    step = convert(part, row, model, x, y) if step is None else step
    mode = "bp" if row.recipe == "bp_serial" else "local"
    trainer = bpfx.BlockTrainer(step, optimizer=optimizer, micro_batches=row.micro_batches, mode=mode)
    return Ready(lambda: trainer.step(x, y), step, trainer)


def predicted(prepared: Ready, x: Tensor, y: Tensor) -> int | None:
    """Predicted peak bytes of a row; None where bpfx predicts nothing."""
    try:
        found = prepared.trainer.predict(x, y)
    except bpfx.BpfxError:
        return None
    if prepared.trainer.mode == "bp":
        return found["bp_serial"].peak_bytes
    refreshes = prepared.step.offset is not None  # such a step is a refresh, and a local step after it
    kinds = ("local_serial", "refresh_serial") if refreshes else ("local_serial",)
    return max(found[kind].peak_bytes for kind in kinds)


# --- bytes ------------------------------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def live_bytes() -> int:
    """Bytes behind every tensor that Python holds at this moment: whatever a row keeps between steps shows."""
    gc.collect()
    return storage_bytes(t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter))


# --- measuring, in a process of its own -------------------------------------------------------------------------------


def failure(error: Exception) -> dict[str, Any]:
    text = str(error).strip().splitlines() or [""]
    return {"error": f"{type(error).__name__}: {text[0]}"}


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def measure_memory(part: Part, row: Row, sizes: Sizes) -> dict[str, Any]:
    """Peak and state of one row, on a model and an optimizer of its own, once both are warm."""
    before = live_bytes()
    torch.manual_seed(0)
    model = build(part, sizes)
    x, y = data(part, sizes)
    prepared = ready(part, row, model, x, y, functools.partial(torch.optim.AdamW, lr=LEARNING_RATE))
    prepared.call()  # optimizer state, offsets, whatever is allocated once and kept
    clear(model)
    state = live_bytes() - before - storage_bytes((x, y))
    result = measure_peak(prepared.call, warmup=0)
    plan = prepared.step.plan.blocks if row.ours else []
    return {
        "peak_bytes": result.peak_bytes,
        "offset_bytes": prepared.step.offset_state.nbytes if row.ours else 0,
        "state_bytes": state,
        "predicted_bytes": predicted(prepared, x, y) if row.ours else None,
        "loss": float(result.result),
        "blocks": len(plan),
        "boundary_bytes": sum(value.bytes for block in plan[:-1] for value in block.outputs),
    }


def measure_time(part: Part, sizes: Sizes, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of every row in every round; in a round each row runs once, one after the other.

    All rows train one model, and AdamW's state is common too, so that everything fits beside everything else.
    """
    torch.manual_seed(0)
    model = build(part, sizes)
    x, y = data(part, sizes)
    optimizer = functools.partial(SharedAdamW, shared={}, lr=LEARNING_RATE)
    steps: dict[bool, Any] = {}  # by whether the step refreshes
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        row = ROWS[name]
        refreshes = row.recipe == "refresh"
        if row.ours and refreshes not in steps:
            steps[refreshes] = convert(part, row, model, x, y)
        calls[name] = ready(part, row, model, x, y, optimizer, steps.get(refreshes)).call
        calls[name]()
        clear(model)
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
            clear(model)
    return seconds


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one part, with the settings and versions it was measured with."""
    part = PARTS[name]
    if arguments.blocks is not None:
        part = dataclasses.replace(part, blocks=arguments.blocks)
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    sizes = Sizes(arguments.batch or part.batch, arguments.tokens, arguments.width, arguments.image_size)
    rounds = part.rounds if arguments.rounds is None else arguments.rounds
    if arguments.times or arguments.peaks:
        return again(name, part, sizes, arguments, rounds)
    rows: dict[str, dict[str, Any]] = {}
    for row in part.rows():
        print(f"    {row}", file=sys.stderr, flush=True)
        try:
            rows[row] = measure_memory(part, ROWS[row], sizes)
        except Exception as error:
            rows[row] = failure(error)
    if rounds:
        print(f"    {rounds} rounds of times", file=sys.stderr, flush=True)
        timed = [n for n in rows if "error" not in rows[n]]
        for row, seconds in measure_time(part, sizes, timed, rounds).items():
            rows[row]["seconds"] = seconds
    settings = {
        "batch": sizes.batch,
        **({"tokens": sizes.tokens, "width": sizes.width} if part.depth else {"image_size": sizes.image_size}),
        "dtype": "float32",
        "optimizer": f"AdamW(lr={LEARNING_RATE})",
        "offsets": OFFSET_DTYPE,
        "cut": part.blocks,
        "threads": arguments.threads,
        "rounds": rounds,
    }
    packages = ["bpfx", "torch", *([] if part.depth else ["torchvision"]), *(["peft"] if "lora" in name else [])]
    return {
        "title": part.title,
        "settings": settings,
        "as_specified": sizes == Sizes(part.batch) and part == PARTS[name],
        # What a BP step has to keep that a local step has not: what all blocks but the last pass on.
        "boundary_bytes": max((row.pop("boundary_bytes", None) or 0 for row in rows.values()), default=0),
        "blocks": max((row.pop("blocks", None) or 0 for row in rows.values()), default=0),
        "rows": rows,
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "load_before": round(load, 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.perf_counter() - began, 1),
    }


def again(name: str, part: Part, sizes: Sizes, arguments: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """What is stored of one part, with the times or the memory of some rows measured anew."""
    path = arguments.out.with_name(arguments.out.name + ".json")
    stored: dict[str, Any] = json.loads(path.read_text("utf-8"))["parts"][name]
    if arguments.times:
        for row, seconds in measure_time(part, sizes, arguments.times, rounds).items():
            stored["rows"][row]["seconds"] = seconds
        stored["settings"]["rounds"] = rounds
    for row in arguments.peaks:
        found = measure_memory(part, ROWS[row], sizes)
        stored["rows"].setdefault(row, {}).pop("error", None)
        stored["rows"][row] |= {key: found[key] for key in found.keys() - {"blocks", "boundary_bytes"}}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    what = {"times": arguments.times, "peaks": arguments.peaks}
    stored.setdefault("measured_later", []).append({"date": date, **what})
    return stored


# --- the command line -------------------------------------------------------------------------------------------------


def cut(text: str) -> str | int:
    """The value of --blocks."""
    if text in ("layers", "auto") or re.fullmatch(r"\d+MiB", text):
        return text
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not layers, auto, a count or a budget in MiB")


def rows(text: str) -> list[str]:
    """The value of --times and of --peaks."""
    unknown = [name for name in text.split(",") if name not in ROWS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown row {unknown[0]!r}; known are {', '.join(ROWS)}")
    return text.split(",")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of timing after the warm-up, 0 for none (default: 3 or 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory", help="where results go, without an ending")
    parser.add_argument("--batch", type=int, help="samples, a multiple of 4 (default: 8, 32 or 16)")
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="the stack's tokens per sample (default: 512)")
    parser.add_argument("--width", type=int, default=Sizes.width, help="the stack's width (default: 512)")
    parser.add_argument("--image-size", type=int, default=Sizes.image_size, help="pixels (default: 224)")
    cuts = "where bpfx cuts: layers, auto, a count, or a budget as 300MiB (default: the part's)"
    parser.add_argument("--blocks", type=cut, help=cuts)
    times = "measure the times of these rows only, and keep the memory that is stored (with bp,ac for the ratios)"
    parser.add_argument("--times", type=rows, default=[], metavar="ROWS", help=times)
    peaks = "measure the memory of these rows only, and keep the rest"
    parser.add_argument("--peaks", type=rows, default=[], metavar="ROWS", help=peaks)
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if parsed.threads < 1 or (parsed.rounds or 0) < 0:
        parser.error("--threads must be at least 1, --rounds at least 0")
    if parsed.batch is not None and (parsed.batch < 4 or parsed.batch % 4):
        parser.error("--batch must be a multiple of 4, which is the largest number of micro-batches")
    if parsed.width < 8 or parsed.width % 8:
        parser.error("--width must be a multiple of 8, the number of attention heads")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    if parsed.measure:
        parsed.into.write_text(json.dumps(measure(parsed.measure, parsed)), "utf-8")
        return 0
    parts, failed, broken = measure_parts(__file__, tuple(PARTS), parsed.only, parsed.out, arguments, markdown)
    pictures = (parsed.out.with_name(parsed.out.name + ending) for ending in (".png", "-models.png"))
    drawn = [path for path, plot in zip(pictures, (plot_depths, plot_models), strict=True) if plot(parts, path)]
    if drawn:
        print("Wrote " + ", ".join(map(str, drawn)))
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
