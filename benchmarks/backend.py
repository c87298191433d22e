"""The `torch.compile` backend beside `bpfx.convert`: peak memory and time of one training step.

    python benchmarks/backend.py                                                       # ResNet-50 and ViT-B/16 + LoRA
    python benchmarks/backend.py --image-size 64 --batch 2 --rounds 2 --out /tmp/backend       # a try-out

Both routes take the same local step (no offset) over the same blocks, and both train their heads with Adam, since the
backend does so in its backward. BP and BP + checkpointing stand beside them. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from step import CheckpointedResNet, CheckpointedViT, build
from torch import Tensor
from torch.nn import functional as F

import bpfx
import bpfx.backend
from bpfx.memory import measure_peak, mib

RESULTS = Path(__file__).parent / "results"
MODELS = {"resnet50": "ResNet-50, all parameters", "vit_b_16": "ViT-B/16, LoRA on its MLPs"}
ROWS = {"bp": "BP", "checkpointing": "BP + checkpointing", "convert": "`bpfx.convert`", "backend": 'backend="bpfx"'}


def measure(name: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Peaks in bytes, and the time of each row as a multiple of BP's in the same round."""
    torch.manual_seed(0)
    model = build(name, size)
    x, y = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    recomputing = (CheckpointedViT if name == "vit_b_16" else CheckpointedResNet)(model)
    step = bpfx.convert(model, F.cross_entropy, (x, y), offset=None)
    optimizer = torch.optim.Adam(step.heads.parameters(), lr=bpfx.backend.HEAD_LR)
    starts = [b.modules[0] for b in step.plan.blocks[1:]]

    def train_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    compiled = torch.compile(train_loss, backend="bpfx", options={"offset": None, "blocks": starts})

    def converted() -> None:
        step(x, y).backward()
        optimizer.step()
        step.heads.zero_grad()

    calls: dict[str, Callable[[], object]] = {
        "bp": lambda: train_loss(x, y).backward(),
        "checkpointing": lambda: F.cross_entropy(recomputing(x), y).backward(),
        "convert": converted,
        "backend": lambda: compiled(x, y).backward(),
    }

    def cleared(call: Callable[[], object]) -> None:
        model.zero_grad()
        call()

    found: dict[str, Any] = {
        "batch": batch,
        "image_size": size,
        "peak_bytes": {},
        "time_ratios": {n: [] for n in calls},
    }
    for row, call in calls.items():
        cleared(call)
        model.zero_grad()
        found["peak_bytes"][row] = measure_peak(call, warmup=0).peak_bytes
    (made,) = bpfx.backend.steps(model)
    found["blocks"] = [len(step.plan.blocks), len(made.plan.blocks)]
    for _ in range(rounds):
        seconds = {}
        for row, call in calls.items():
            start = time.perf_counter()
            cleared(call)
            seconds[row] = time.perf_counter() - start
        for row, value in seconds.items():
            found["time_ratios"][row].append(round(value / seconds["bp"], 4))
    return found


def markdown(results: dict[str, Any], command: str) -> str:
    """The tables."""
    lines = ["# The torch.compile backend beside bpfx.convert", "", f"`{command}`", ""]
    for name, found in results.items():
        convert = found["peak_bytes"]["convert"]
        lines += [
            f"## {MODELS[name]}, batch {found['batch']}, {found['image_size']} px, {found['blocks'][0]} blocks",
            "",
        ]
        lines += ["| | peak MiB | of convert's | time / BP, median of rounds |", "|---|--:|--:|--:|"]
        for row, label in ROWS.items():
            peak, ratios = found["peak_bytes"][row], found["time_ratios"][row]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
            lines.append(f"| {label} | {mib(peak):.0f} | {peak / convert:.3f} | {ratio} |")
        lines.append("")
    lines += [
        "The optimizer of the model is left out, the same for all; gradients are cleared before each call and alive "
        "at its end. The heads' step is inside of both bpfx rows. "
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 for its default")
    parser.add_argument("--out", type=Path, default=RESULTS / "backend")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    path = given.out.with_suffix(".json")
    results = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in given.only.split(","):
        print(f"{name} …", flush=True)
        results[name] = measure(name, given.batch, given.image_size, given.rounds)
        torch._dynamo.reset()
    shown = {k: v for k, v in vars(given).items() if v != parser.get_default(k)}
    command = " ".join(["python benchmarks/backend.py", *(f"--{k.replace('_', '-')} {v}" for k, v in shown.items())])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "torch": torch.__version__, "models": results}, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(markdown(results, command))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
