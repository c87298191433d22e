"""One training step, side by side: BP, BP + checkpointing, and bpfx's local step, BP step and refresh.

    python benchmarks/step.py                                        # everything
    python benchmarks/step.py --only resnet50-memory,vit-memory      # some parts; the others keep their last results
    python benchmarks/step.py --image-size 64 --memory-batch 4 --time-batch 4 --rounds 2 --out /tmp/step   # a try-out

Every part runs in a process of its own. Writes OUT.json (everything measured), OUT.md (tables) and OUT.png (memory over
one step). A step is forward, loss and backward with all gradients kept at its end, heads' included; no optimizer.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Both are read when torch starts: threads that wait without spinning, and a profiler that does not greet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from parts import measure_parts
from step_report import PARTS, Part, markdown, plot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bpfx
from bpfx.memory import measure_peak, mib
from bpfx.passes.liveness import LivenessError, predict_peak

RESULTS = Path(__file__).parent / "results"
IMAGE_SIZE = 224


# --- models -----------------------------------------------------------------------------------------------------------


def build(name: str, image_size: int) -> nn.Module:
    """A torchvision model in training mode; the ViT with LoRA on its MLPs, the rest frozen except the classifier."""
    import torchvision

    if name != "vit_b_16":
        return getattr(torchvision.models, name)(weights=None).train()
    import peft

    vit = torchvision.models.vit_b_16(weights=None, image_size=image_size)
    adapters = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*mlp\.[03]", modules_to_save=["head"])
    return peft.get_peft_model(vit, adapters).train()


class CheckpointedResNet(nn.Module):
    """The same network, its stem and every residual block under activation checkpointing."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def stem(self, x: Tensor) -> Tensor:
        return self.net.maxpool(self.net.relu(self.net.bn1(self.net.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.stem, x, use_reentrant=False)
        for layer in (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4):
            for block in layer:
                x = checkpoint(block, x, use_reentrant=False)
        return self.net.fc(torch.flatten(self.net.avgpool(x), 1))


class CheckpointedViT(nn.Module):
    """The same PEFT model, every encoder layer under activation checkpointing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model.base_model.model

    def forward(self, x: Tensor) -> Tensor:
        encoder = self.net.encoder
        x = self.net._process_input(x)
        x = torch.cat([self.net.class_token.expand(len(x), -1, -1), x], 1)
        x = encoder.dropout(x + encoder.pos_embedding)
        for layer in encoder.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.net.heads(encoder.ln(x)[:, 0])


class Gradients(nn.Module):
    """Loss and gradients in one call: checkpoints recompute in the backward pass, which has to see the same tensors."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> object:
        loss = F.cross_entropy(self.net(x), y)
        return loss, torch.autograd.grad(loss, [p for p in self.parameters() if p.requires_grad])


class Bench:
    """One model, one batch, and the rows as calls that leave the gradients alive: in `.grad`, or in what they return.

    All rows share the same parameters, so that none pays for another's.
    """

    def __init__(self, part: Part, batch: int, image_size: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = build(part.model, image_size).to(device)
        self.x = torch.randn(batch, 3, image_size, image_size, device=device)
        self.y = torch.randint(0, 1000, (batch,), device=device)
        kind = CheckpointedViT if part.model == "vit_b_16" else CheckpointedResNet
        self.checkpointed: nn.Module = kind(self.model)
        self.step = bpfx.convert(self.model, F.cross_entropy, (self.x, self.y), offset=None, compile=part.compile)
        inductor = part.compile == "inductor"
        plain, checkpointed = (torch.compile(m) if inductor else m for m in (self.model, self.checkpointed))
        self.calls: dict[str, Callable[[], object]] = {
            "bp": lambda: self._backward(plain),
            "checkpointing": lambda: self._backward(checkpointed),
            "local": lambda: self.step.run_local(self.x, self.y),
            "drop_in": lambda: self._drop_in(None),
            "bp_step": lambda: self.step.run_bp(self.x, self.y),
            "refresh": lambda: self._drop_in(bpfx.Offset(period=1)),
        }

    def _backward(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        loss = F.cross_entropy(model(self.x), self.y)
        loss.backward()
        return loss

    def _drop_in(self, offset: bpfx.Offset | None) -> Tensor:
        self.step.offset = offset
        loss = self.step(self.x, self.y)
        loss.backward()
        return loss

    def clear(self) -> None:
        """Gradients away, so that the next call makes them anew; pending work on the device done."""
        for parameter in self.step.parameters():
            parameter.grad = None
        self.wait()

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def predicted(self) -> dict[str, int | None]:
        """Predicted peak bytes by row; None where bpfx predicts nothing."""
        net = Gradients(self.checkpointed)

        def run(state: dict[str, Tensor], x: Tensor, y: Tensor) -> object:
            return torch.func.functional_call(net, state, (x, y))

        state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        try:
            checkpointing: int | None = predict_peak(run, state, self.x, self.y).peak_bytes
        except LivenessError:
            checkpointing = None
        kinds = {"bp": "bp", "local": "local", "drop_in": "local", "bp_step": "bp_blocks", "refresh": "refresh"}
        return {n: self.step.plan.predicted.get(k) for n, k in kinds.items()} | {"checkpointing": checkpointing}


# --- measuring, in a process of its own -------------------------------------------------------------------------------


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Peak bytes and timeline of every row, above the state before the step; the refresh comes last."""
    predicted = bench.predicted()
    rows = {}
    for name, call in bench.calls.items():
        call()  # what is allocated once and kept: the offset, caches
        bench.clear()
        peak = measure_peak(call, warmup=0, device=bench.device)
        timeline = thin(peak.timeline)
        rows[name] = {"peak_bytes": peak.peak_bytes, "predicted_bytes": predicted[name], "timeline": timeline}
        del peak
        bench.clear()
    return {"rows": rows, "blocks": len(bench.step.plan.blocks), "plan": str(bench.step.plan)}


def thin(timeline: list[tuple[float, int]], points: int = 300) -> list[list[float]]:
    """The highest moment of each of so many stretches: share of the step, MiB."""
    end = timeline[-1][0] or 1.0
    size = max(1, -(-len(timeline) // points))
    tops = (max(timeline[i : i + size], key=lambda entry: entry[1]) for i in range(0, len(timeline), size))
    return [[round(moment / end, 4), round(mib(live), 2)] for moment, live in tops]


def measure_time(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds of every row in every round; in a round each row runs once, one after the other."""
    rows: dict[str, Any] = {}
    for name, call in bench.calls.items():
        try:
            call()  # warm-up, and with Inductor the compilation
            bench.clear()
            call()
            rows[name] = {"seconds": []}
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        bench.clear()
    for _ in range(rounds):
        for name, row in rows.items():
            if "seconds" in row:
                began = time.perf_counter()
                kept = bench.calls[name]()
                bench.wait()
                row["seconds"].append(time.perf_counter() - began)
                del kept
                bench.clear()
    return {"rows": rows, "blocks": len(bench.step.plan.blocks)}


def measure_conversion(part: Part, batch: int, image_size: int, device: str) -> dict[str, Any]:
    """Seconds of three conversions, the first one cold: it pays for torch's lazy imports too."""
    import torchvision  # noqa: F401  (its import is not part of a conversion)

    seconds = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = build(part.model, image_size).to(device)
        x = torch.randn(batch, 3, image_size, image_size, device=device)
        y = torch.randint(0, 1000, (batch,), device=device)
        began = time.perf_counter()
        step = bpfx.convert(model, F.cross_entropy, (x, y), compile=part.compile)
        seconds.append(time.perf_counter() - began)
    return {"rows": {"convert": {"seconds": seconds}}, "blocks": len(step.plan.blocks), "capture": step.plan.capture}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one part, with the settings and versions it was measured with."""
    part = PARTS[name]
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    wanted = arguments.time_batch if part.kind == "time" else arguments.memory_batch
    batch, size, device = wanted or part.batch, arguments.image_size, arguments.device
    if part.kind == "conversion":
        measured = measure_conversion(part, batch, size, device)
    else:
        bench = Bench(part, batch, size, device)
        measured = measure_memory(bench) if part.kind == "memory" else measure_time(bench, arguments.rounds)
    settings = {
        "batch": batch,
        "image_size": size,
        "dtype": "float32",
        "device": device,
        "threads": arguments.threads,
        "rounds": arguments.rounds if part.kind == "time" else None,
        "compile": part.compile,
    }
    packages = ["bpfx", "torch", "torchvision", *(["peft"] if part.model == "vit_b_16" else [])]
    where = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        where += f", {torch.cuda.get_device_name()}"
    return {
        "title": part.title,
        "kind": part.kind,
        "settings": settings,
        "as_specified": batch == part.batch and size == IMAGE_SIZE and device == "cpu",
        "versions": {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()},
        "machine": where,
        "load_before": round(load, 2),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "took_seconds": round(time.perf_counter() - began, 1),
        **measured,
    }


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing after the warm-up (default: 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "step", help="where results go, without an ending")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels (default: 224)")
    parser.add_argument("--memory-batch", type=int, help="batch of the memory and conversion parts")
    parser.add_argument("--time-batch", type=int, help="batch of the time parts")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if min(parsed.rounds, parsed.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    if parsed.measure:
        parsed.into.write_text(json.dumps(measure(parsed.measure, parsed)), "utf-8")
        return 0
    parts, failed, _ = measure_parts(__file__, tuple(PARTS), parsed.only, parsed.out, arguments, markdown)
    picture = parsed.out.with_name(parsed.out.name + ".png")
    if plot(parts, picture):
        print(f"Wrote {picture}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
