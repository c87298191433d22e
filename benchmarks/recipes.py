"""The recipes of `bpfx.models.recipes`, one training step of every method: peak memory and time beside BP's.

    python benchmarks/recipes.py --device cuda             # batch 128, 224 px, fp32 and bf16
    python benchmarks/recipes.py                           # without a GPU: batch 4, 64 px, fp32; says nothing about one
    python benchmarks/recipes.py --only vit_b16_lora-fp32 --rounds 9 --out /tmp/recipes        # a try-out

Every part (a recipe in one precision) runs in a process of its own. Writes OUT.json (everything measured) and OUT.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

# Both are read when torch starts: threads that wait without spinning, and a profiler that does not greet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from parts import measure_parts
from step_report import ratios, spread
from torch import Tensor

from bpfx.memory import measure_peak, mib
from bpfx.models.recipes import NAMES, common

RESULTS = Path(__file__).parent / "results"
CLASSES = 100  # CIFAR-100's
PERIOD = 4
TITLES = {
    "resnet50_full": "ResNet-50, every parameter",
    "resnet50_lokr": "ResNet-50 with LoKr",
    "vit_b16_lora": "ViT-B/16 with LoRA",
}
PARTS = [f"{name}-{dtype}" for name in NAMES for dtype in ("fp32", "bf16")]
ROWS = {
    "bp": "BP",
    "checkpointing": "BP + checkpointing",
    "local": "bpfx local",
    "offset": f"bpfx local + offset, K = {PERIOD}",
    "serial": "bpfx exact BP, block by block",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a try-out may shrink; the first is what the recipes train with."""

    batch: int = 128
    image_size: int = 224


SMALL = Sizes(4, 64)  # where there is no GPU


class Row:
    """One method on a model of its own; a call is one whole training step, optimizer included."""

    def __init__(self, name: str, method: str, sizes: Sizes, bf16: bool, device: str) -> None:
        recipe: common.Recipe = importlib.import_module(f"bpfx.models.recipes.{name}").RECIPE
        torch.manual_seed(0)
        model = recipe.build(CLASSES, sizes.image_size, common.RANDOM).to(device)
        self.x = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size, device=device)
        self.y = torch.randint(0, CLASSES, (sizes.batch,), device=device)
        self.device, self.method = device, method
        self.period = PERIOD if method == "offset" else 1
        settings = argparse.Namespace(method=method, blocks=None, period=PERIOD, bf16=bf16, device=device)
        # The schedule is as long as any measurement, or OneCycleLR would refuse to go on.
        self.update = common.updater(recipe, model, (self.x, self.y), 10_000, settings)
        self.blocks = len(recipe.blocks) + 1

    def __call__(self) -> Tensor:
        return self.update(self.x, self.y)

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def period_seconds(self) -> float:
        """Mean seconds of a step over one period, its refresh included."""
        self.wait()
        began = time.perf_counter()
        for _ in range(self.period):
            self()
        self.wait()
        return (time.perf_counter() - began) / self.period

    def memory(self) -> dict[str, Any]:
        """Peak bytes above the state; with the offset of the refresh, and beside it of a step between two of them."""
        for _ in range(PERIOD):  # a whole period: optimizer state, offsets, what is allocated once and kept
            self()
        peak = measure_peak(self, warmup=0, device=self.device)
        found = {"peak_bytes": peak.peak_bytes, "active_bytes": peak.active_bytes, "loss": float(peak.result)}
        if self.method == "offset":
            found["between_bytes"] = measure_peak(self, warmup=0, device=self.device).peak_bytes
            for _ in range(PERIOD - 2):  # on to the next refresh, so that times are of whole periods
                self()
        return found


# --- measuring, in a process of its own -------------------------------------------------------------------------------


def measure(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one part, with the settings and versions it was measured with."""
    torch.set_num_threads(arguments.threads)
    name, _, dtype = part.rpartition("-")
    sizes, device = Sizes(arguments.batch, arguments.image_size), arguments.device
    load, began = os.getloadavg()[0], time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Row] = {}
    for method in ROWS:
        print(f"    {method}", file=sys.stderr, flush=True)
        try:
            row = Row(name, method, sizes, dtype == "bf16", device)
            found[method] = row.memory() | {"seconds": []}
            ready[method] = row
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            found[method] = {"error": f"{type(error).__name__}: {text[0]}"}
        row = None  # type: ignore[assignment]
        gc.collect()
    for _ in range(arguments.rounds):
        for method, row in ready.items():
            found[method]["seconds"].append(row.period_seconds())
    where = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        where += f", {torch.cuda.get_device_name()}"
    settings = {
        "batch": sizes.batch,
        "image_size": sizes.image_size,
        "dtype": "float32" if dtype == "fp32" else "autocast to bfloat16",
        "device": device,
        "optimizer": "AdamW",
        "period": PERIOD,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    packages = ["bpfx", "torch", "torchvision", *(["peft"] if name != "resnet50_full" else [])]
    return {
        "title": f"{TITLES[name]}, {dtype}",
        "settings": settings,
        "as_specified": sizes == Sizes() and device.startswith("cuda"),
        "blocks": next((row.blocks for row in ready.values()), 0),
        "rows": found,
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "machine": where,
        "load_before": round(load, 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.perf_counter() - began, 1),
    }


# --- the report -------------------------------------------------------------------------------------------------------


def table(part: dict[str, Any]) -> list[str]:
    """One part as Markdown lines."""
    rows = part["rows"]
    base = rows["bp"].get("peak_bytes")
    lines = ["| step | peak MiB | of BP's | time of a step, × BP | × checkpointing |", "|---|--:|--:|--:|--:|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {ROWS[name]} | did not run: {row['error'].replace('|', '/')} | | | |")
            continue
        share = f"{100 * row['peak_bytes'] / base:.1f} %" if base else "–"
        between = f" ({mib(row['between_bytes']):.0f} between refreshes)" if "between_bytes" in row else ""
        times = " | ".join(spread(ratios(part, name, other)) for other in ("bp", "checkpointing"))
        lines.append(f"| {ROWS[name]} | {mib(row['peak_bytes']):.0f}{between} | {share} | {times} |")
    seconds = rows["bp"].get("seconds", [])
    if seconds:
        lines += ["", f"BP itself took {statistics.median(seconds):.3f} s ({min(seconds):.3f}–{max(seconds):.3f})."]
    return lines


def markdown(parts: dict[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# The three recipes, one training step",
        "",
        "A step is forward, loss, backward and AdamW, on noise, random weights. Peak: MiB above what lives before the "
        "step (parameters, buffers, batch, optimizer state, heads, offsets), after one period; with the offset that of "
        "the refresh. Time: mean over a period, refresh included; median over rounds of the ratio within a round, "
        "minimum and maximum in brackets. How to read them: `benchmarks/README.md`.",
    ]
    if not any(part["as_specified"] for part in parts.values()):
        lines += ["", "**Small sizes, no GPU:** this shows that every row runs, and nothing about batch 128 at 224 px."]
    for part in parts.values():
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in part["settings"].items())
        versions = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
        made = f"{part['machine']}, load {part['load_before']}; {part['date'][:10]}, `{part['command']}`."
        small = "" if part["as_specified"] else " Not the recipes' sizes, or not on a GPU."
        lines += ["", f"## {part['title']}", "", *table(part), ""]
        lines.append(f"{part['blocks']} blocks; {settings}. {versions}; {made}{small}")
    return "\n".join([*lines, ""])


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--only", help="parts, separated by commas (default: all; on the CPU those in fp32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing after the warm-up (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipes", help="where results go, without an ending")
    parser.add_argument("--batch", type=int, help=f"images (default: {Sizes.batch}, on the CPU {SMALL.batch})")
    pixels = f"pixels, a multiple of 16 (default: {Sizes.image_size}, on the CPU {SMALL.image_size})"
    parser.add_argument("--image-size", type=int, help=pixels)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda (default: cuda if there)")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    usual = Sizes() if parsed.device.startswith("cuda") else SMALL
    parsed.batch = usual.batch if parsed.batch is None else parsed.batch
    parsed.image_size = usual.image_size if parsed.image_size is None else parsed.image_size
    if parsed.only is None:
        kinds = ("fp32", "bf16") if parsed.device.startswith("cuda") else ("fp32",)
        parsed.only = ",".join(name for name in PARTS if name.endswith(kinds))
    unknown = [name for name in parsed.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if min(parsed.rounds, parsed.threads, parsed.batch) < 1:
        parser.error("--rounds, --threads and --batch must be at least 1")
    if parsed.image_size < 16 or parsed.image_size % 16:
        parser.error("--image-size must be a multiple of 16, the ViT's patch")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    if parsed.measure:
        parsed.into.write_text(json.dumps(measure(parsed.measure, parsed)), "utf-8")
        return 0
    _, failed, broken = measure_parts(__file__, tuple(PARTS), parsed.only, parsed.out, arguments, markdown)
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
