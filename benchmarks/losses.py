"""Every local loss on one task, in several numbers of blocks, with and without the offset.

    python benchmarks/losses.py                                         # whatever is missing, on the bundled subset
    python benchmarks/losses.py --data-root DATA                        # all of Fashion-MNIST, torchvision's layout
    python benchmarks/losses.py --losses dgl,predsim --blocks 8         # in pieces: results are written after every run
    python benchmarks/losses.py --only 'dgl/*/offset' --again           # some runs once more
    python benchmarks/losses.py --report-only                           # table and plot from what is there
    python benchmarks/losses.py --losses supervised --blocks 4 --seeds 1 --iterations 3 --out /tmp/losses   # a try-out

A ResNet-20 (three stages of three residual blocks, 16, 32 and 64 channels) is trained from random weights by BP and by
every loss. A row holds accuracy, memory and time against BP's, and the cosine of local and BP gradient. All rows have
one configuration: AdamW, one-cycle learning rate, no augmentation. A run is named LOSS/BLOCKS/local/SEED,
LOSS/BLOCKS/offset/SEED or bp/SEED. Writes OUT.json, OUT.md and OUT.png, and README's table where OUT is the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait without spinning; read when torch starts
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import accuracy
import torch
from losses_report import finished, markdown, newest, plot, spoken, write_readme
from parts import as_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import functional as F

import bpfx
from bpfx import _measure, data, losses, train
from bpfx._config import Config
from bpfx.models.resnet import SmallResNet
from bpfx.train import Trainee

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
PERIOD = 4  # of the rows with the offset: a fixed one, so that losses are compared and not the choice of a period
WIDTH, DEPTHS = 16, (3, 3, 3)
# Modules that begin a block, the same for every loss. bpfx's own choice would be close, but some losses cannot work
# with a last block that is the classifier alone, nor inside a residual block, where two values cross. For 16 blocks
# there are not enough whole ones.
BEGIN = {
    4: "0.1 0.2 1.1",
    8: "0.0 0.1 0.2 1.0 1.1 2.0 2.1",
    16: "0.0 0.0.conv2 0.1 0.1.conv2 0.2 0.2.conv2 1.0 1.1 1.1.conv2 1.2 1.2.conv2 2.0 2.1 2.1.conv2 2.2",
}
PROBES = 3  # batches for the cosine at the end
ROUNDS = 3  # of timing, a period of steps each

Run = dict[str, Any]
Batches = Iterator[tuple[Tensor, Tensor]]


# --- the losses -------------------------------------------------------------------------------------------------------


def crop_and_flip(x: Tensor, padding: int = 3) -> Tensor:
    """Every image moved by up to ``padding`` pixels, its edge repeated, and every second one mirrored.

    Args:
        x: images ``(B, C, H, W)``.
        padding: pixels.
    """
    count, _, height, width = x.shape
    down, right = torch.randint(2 * padding + 1, (2, count, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    wide = F.pad(x, (padding,) * 4, mode="replicate")
    sample = torch.arange(count)[:, None, None]
    return wide[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A loss with other than its default arguments: its registered name, the arguments, and the same in words."""

    loss: str
    arguments: dict[str, Any]
    words: str


# The only place for arguments; a loss that is not here is made without any.
ENTRIES = {
    "loco": Entry(
        "loco", {"augment": crop_and_flip}, "two views of each image: moved by up to 3 pixels, half of them mirrored"
    ),
    "forward_forward-channels": Entry(
        "forward_forward", {"variant": "channels"}, "a group of channels for every class"
    ),
}


def known() -> list[str]:
    """Every registered loss, and further entries of the table above."""
    names = losses.names()
    return [*names, *(name for name, entry in ENTRIES.items() if entry.loss in names and name not in names)]


def make(name: str) -> losses.LocalLoss:
    """The loss of that name, with its arguments from the table."""
    entry = ENTRIES.get(name, Entry(name, {}, ""))
    return type(losses.get(entry.loss))(**entry.arguments)


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A loss in a number of blocks with or without the offset, and a seed; ``loss`` is "bp" for plain BP."""

    loss: str
    blocks: int
    offset: bool
    seed: int

    @property
    def key(self) -> tuple[str, int, bool]:
        return self.loss, self.blocks, self.offset

    @property
    def row(self) -> str:
        return "bp" if self.loss == "bp" else f"{self.loss}/{self.blocks}/{'offset' if self.offset else 'local'}"

    @property
    def name(self) -> str:
        return f"{self.row}/{self.seed}"


def measure(job: Job, settings: dict[str, Any], splits: data.Splits, watch: Callable[[Batches], Batches]) -> Run:
    """Convert, train, test, then measure what a step costs.

    Raises:
        BpfxError: the loss does not fit the model in so many blocks.
    """
    config = Config(
        iterations=settings["iterations"],
        batch_size=settings["batch_size"],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        seed=job.seed,
    )
    torch.manual_seed(job.seed)
    model = SmallResNet(splits.num_classes, splits.channels, settings["width"], settings["depths"]).train()
    x, y = next(data.batches(splits.train, config.batch_size, job.seed))
    if job.loss == "bp":
        trainee, about = Trainee(model, model), {}
    else:
        loss = make(job.loss)
        step = bpfx.convert(
            model,
            F.cross_entropy,
            (x, y),
            blocks=[f"stages.{m}" for m in BEGIN[job.blocks].split()] if job.blocks in BEGIN else job.blocks,
            local_loss=loss,
            offset=bpfx.Offset(period=settings["period"]) if job.offset else None,
        )
        trainee = Trainee(step, model, step)
        about = {
            "label_free": loss.label_free,
            "arguments": ENTRIES[job.loss].words if job.loss in ENTRIES else "",
            "head_parameters": sum(p.numel() for p in step.heads.parameters()),
            "begin": [b.modules[0] for b in step.plan.blocks],
            "heads": list(dict.fromkeys(b.head for b in step.plan.blocks if b.head is not None)),
        }
    began = time.perf_counter()
    diverged = accuracy.fit(trainee, config, watch(accuracy.endless(splits.train, config)))
    seconds = time.perf_counter() - began
    right = train.evaluate(trainee, splits.test, 500, "cpu")
    return about | {
        "accuracy_percent": round(100 * right, 2),
        "diverged_at": diverged,
        "cosine_refreshes": mean(trainee.new_cosines()),
        "cosine_end": cosine(trainee, splits.train, config),
        **costs(trainee, x, y, settings["period"]),
        "train_seconds": round(seconds, 1),
    }


def mean(values: list[float]) -> float | None:
    """Of those that are finite."""
    kept = [value for value in values if math.isfinite(value)]
    return round(statistics.fmean(kept), 4) if kept else None


def cosine(trainee: Trainee, split: data.Split, config: Config) -> float | None:
    """Mean cosine of local and BP gradient over a few batches in another order than the training's."""
    if trainee.step is None:
        return None
    batches = data.batches(split, min(config.batch_size, len(split)), config.seed + 10_000, drop_last=True)
    return mean([_measure.cosine(trainee.step, x, y) for (x, y), _ in zip(batches, range(PROBES), strict=False)])


def costs(trainee: Trainee, x: Tensor, y: Tensor, period: int) -> Run:
    """Peak memory and time of forward, loss and backward, BP's beside it on the same model."""
    model, step = trainee.model, trainee.step
    optimizer = torch.optim.SGD(trainee.module.parameters())  # only to clear the gradients

    def bp() -> Tensor:
        return F.cross_entropy(model(x), y)

    peaks = {"bp": _measure.step_memory(bp, optimizer)["peak_bytes"]}
    if step is None:
        return {"peak_bytes": peaks}
    if step.offset is not None:
        # Leaves the schedule right behind a refresh, so that the next steps are local ones.
        made = _measure.step_memory(lambda: trainee(x, y), optimizer, period, step.iteration)
        peaks["refresh"] = made["peak_bytes"]
    peaks["local"] = _measure.step_memory(lambda: trainee(x, y), optimizer)["peak_bytes"]

    def timed(loss: Callable[[], Tensor]) -> float:
        began = time.perf_counter()
        loss().backward()
        took = time.perf_counter() - began
        optimizer.zero_grad()
        return took

    # In turn, and in windows of one period, so that each has one refresh and a slow minute slows both sides.
    pairs = [(timed(bp), timed(lambda: trainee(x, y))) for _ in range(ROUNDS * period)]
    windows = [pairs[i : i + period] for i in range(0, len(pairs), period)]
    return {
        "peak_bytes": peaks,
        "time_ratios": [round(sum(b for _, b in w) / sum(a for a, _ in w), 4) for w in windows],
        "seconds_per_step": {
            "bp": round(statistics.median(a for a, _ in pairs), 4),
            "loss": round(statistics.median(statistics.fmean(b for _, b in w) for w in windows), 4),
        },
    }


def attempt(job: Job, settings: dict[str, Any], splits: data.Splits, watch: Callable[[Batches], Batches]) -> Run:
    """One run, whatever becomes of it: ``status`` is "finished", "refused" (by bpfx, with its reason) or "failed"."""
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bpfx.BpfxWarning)
        try:
            result = {"status": "finished", **measure(job, settings, splits, watch)}
        except bpfx.BpfxError as error:
            result = {"status": "refused", "reason": str(error)}
        except Exception as error:  # one loss's mistake must not cost the others their hours
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    said = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, bpfx.BpfxWarning)))
    return {
        **dataclasses.asdict(job),
        **result,
        "warnings": said,
        "seconds": round(time.perf_counter() - began, 1),
        "settings": settings,
    }


# --- all runs ---------------------------------------------------------------------------------------------------------


def chosen(parsed: argparse.Namespace) -> list[Job]:
    """The runs that are asked for; seeds outside, so that a part of them is a fair table already."""
    jobs = []
    for seed in range(parsed.seeds):
        jobs.append(Job("bp", 1, False, seed))
        jobs += [
            Job(loss, blocks, offset, seed)
            for loss in parsed.losses
            for blocks in parsed.blocks
            for offset in (False, True)
        ]
    if parsed.only is None:
        return jobs
    patterns = parsed.only.split(",")
    return [j for j in jobs if any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (j.name, j.row))]


def done(job: Job, runs: dict[str, Run], settings: dict[str, Any]) -> bool:
    """Whether this run has finished with these settings, or bpfx has refused another seed's."""
    own = runs.get(job.name)
    if own is not None and own["settings"] == settings and own["status"] != "failed":
        return True
    others = (r for r in runs.values() if (r["loss"], r["blocks"], r["offset"]) == job.key)
    return any(run["status"] == "refused" and run["settings"] == settings for run in others)


def seconds_of(job: Job, runs: dict[str, Run], settings: dict[str, Any], step: float) -> float:
    """How long a run will take: what the same row took with another seed, else so many BP steps."""
    took = [r["seconds"] for r in finished(runs, settings) if (r["loss"], r["blocks"], r["offset"]) == job.key]
    if took:
        return statistics.fmean(took)
    if job.loss == "bp":
        return step * (settings["iterations"] + 10)
    # A head, rows and blocks passed more than once; two sweeps in one of `period` steps; then probes and costs.
    loss = make(job.loss)
    factor = 1.2 * loss.rows * (0.5 + 0.5 * loss.horizon) + (1.6 / settings["period"] if job.offset else 0)
    further = 10 + 2 * PROBES + ROUNDS * settings["period"]
    return step * ((settings["iterations"] + further) * factor + further) + 5


def bp_step_seconds(settings: dict[str, Any], splits: data.Splits) -> float:
    """One BP step on this machine, the better of two after a warm-up."""
    model = SmallResNet(splits.num_classes, splits.channels, settings["width"], settings["depths"])
    x, y = next(data.batches(splits.train, settings["batch_size"]))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        took.append(time.perf_counter() - began)
    return min(took[1:])


def reproducing(job: Job, parsed: argparse.Namespace, settings: dict[str, Any]) -> str:
    """The command that makes this run again; DATA stands for the folder of the data."""
    words = ["python", "benchmarks/losses.py", "--only", job.name, "--again", "--seeds", str(job.seed + 1)]
    if job.loss != "bp":
        words += ["--losses", job.loss, "--blocks", str(job.blocks)]
    words += ["--iterations", str(settings["iterations"]), "--threads", str(parsed.threads)]
    for name in ("train_size", "test_size"):
        if getattr(parsed, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(parsed, name))]
    return shlex.join([*words, *(["--data-root", "DATA"] if parsed.data_root else [])])


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="folder that holds FashionMNIST/raw/ (default: the bundled subset)")
    parser.add_argument("--losses", help=f"separated by commas (default: all: {','.join(known())})")
    parser.add_argument("--blocks", default="4,8,16", help="numbers separated by commas (default: 4,8,16)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: 3)")
    parser.add_argument("--iterations", type=int, default=300, help="of each run (default: 300)")
    parser.add_argument("--train-size", type=int, help="training images, spread over the set (default: all)")
    parser.add_argument("--test-size", type=int, help="test images (default: all)")
    parser.add_argument("--only", metavar="RUNS", help="names or patterns separated by commas, such as 'dgl/8/*,bp'")
    parser.add_argument("--again", action="store_true", help="repeat runs that have finished")
    parser.add_argument("--report-only", action="store_true", help="run nothing; table and plot of the newest settings")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "losses", help="where results go, without an ending")
    parsed = parser.parse_args(arguments)
    parsed.losses = parsed.losses.split(",") if parsed.losses else known()
    unknown = [name for name in parsed.losses if name not in known()]
    if unknown:
        parser.error(f"--losses: unknown loss {unknown[0]!r}; known are {', '.join(known())}")
    blocks = parsed.blocks.split(",")
    if not all(n.isdecimal() and int(n) > 1 for n in blocks):
        parser.error(
            f"--blocks: expected numbers of at least 2 separated by commas, such as 4,8; got {parsed.blocks!r}"
        )
    parsed.blocks = [int(n) for n in blocks]
    for name in ("seeds", "iterations", "train_size", "test_size", "threads"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    stored = parsed.out.with_name(parsed.out.name + ".json")
    runs = load(stored)
    if parsed.report_only:
        if not runs:
            print(f"{stored} holds no runs to report; run without --report-only first.", file=sys.stderr)
            return 2
        return report(runs, newest(runs), parsed.out)
    try:
        name = "FashionMNIST" if parsed.data_root else data.BUNDLED
        splits = data.load(name, parsed.data_root)
    except bpfx.BpfxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    splits = dataclasses.replace(
        splits, train=splits.train.take(parsed.train_size), test=splits.test.take(parsed.test_size)
    )
    settings = {
        "model": "SmallResNet",
        "width": WIDTH,
        "depths": list(DEPTHS),
        "data": splits.name,
        "train_images": len(splits.train),
        "test_images": len(splits.test),
        "image_size": splits.image_size,
        "iterations": parsed.iterations,
        "batch_size": min(100, len(splits.train)),
        "optimizer": "AdamW with a one-cycle rate",
        "lr": Config.lr,
        "weight_decay": Config.weight_decay,
        "augmentation": "none",
        "period": PERIOD,
    }
    made_with = {
        "bpfx": importlib.metadata.version("bpfx"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": parsed.threads,
    }
    asked = chosen(parsed)
    if not asked:
        example = Job(parsed.losses[0], parsed.blocks[0], True, 0).name
        print(f"error: --only {parsed.only!r} matches no run; one is {example!r}", file=sys.stderr)
        return 2
    jobs = [job for job in asked if parsed.again or not done(job, runs, settings)]
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    step = bp_step_seconds(settings, splits) if jobs else 0.0
    left = {job.name: seconds_of(job, runs, settings, step) for job in jobs}
    console.print(
        f"{len(asked) - len(jobs)} of {len(asked)} runs are there, {len(jobs)} to go: about "
        f"{spoken(sum(left.values()))} (a BP step takes {step:.2f} s here)",
        soft_wrap=True,
        highlight=False,
    )
    columns = (
        TextColumn("{task.description:<38}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = progress.add_task("runs", total=len(jobs), status="")
        inner = progress.add_task("", total=parsed.iterations, status="")

        def watch(batches: Batches) -> Batches:
            for batch in batches:
                yield batch
                progress.advance(inner)

        for job in jobs:
            progress.reset(inner, description=job.name)
            progress.update(total, status=f"about {spoken(sum(left.values()))} left")
            if not parsed.again and done(job, runs, settings):  # refused by now, with another seed
                left.pop(job.name)
                progress.advance(total)
                continue
            try:
                run = attempt(job, settings, splits, watch)
            except KeyboardInterrupt:
                print(f"Stopped in {job.name}; the same command goes on from there.", file=sys.stderr)
                return 130
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            command = reproducing(job, parsed, settings)
            runs |= load(stored)  # two processes may share the work
            runs[job.name] = run | {"made_with": made_with, "command": command, "date": date}
            accuracy._write(stored, as_json(runs))
            accuracy._write(parsed.out.with_name(parsed.out.name + ".md"), markdown(runs, settings))
            left.pop(job.name)
            progress.advance(total)
            result = f"{run['accuracy_percent']:.1f} %" if run["status"] == "finished" else run["reason"]
            console.print(
                f"{job.name}: {result} ({run['seconds']:.0f} s; about {spoken(sum(left.values()))} left)",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )
    return report(runs, settings, parsed.out)


def load(stored: Path) -> dict[str, Run]:
    """The runs in a file of results, by name."""
    found: dict[str, Run] = json.loads(stored.read_text("utf-8"))["parts"] if stored.exists() else {}
    return found


def report(runs: dict[str, Run], settings: dict[str, Any], out: Path) -> int:
    """Table and plot; 1 where a run has failed otherwise than by being refused."""
    table, picture = (out.with_name(out.name + ending) for ending in (".md", ".png"))
    text = markdown(runs, settings)
    accuracy._write(table, text)
    drawn = plot(runs, settings, picture)
    if out == RESULTS / "losses":
        accuracy._write(README, write_readme(README.read_text("utf-8"), runs, settings))
    print(text)
    print(f"Wrote {table}" + (f", {picture}" if drawn else "; no plot: nothing to draw, or no matplotlib"))
    failed = [name for name, run in runs.items() if run["status"] == "failed" and run["settings"] == settings]
    if failed:
        print(f"Failed, and tried again by the same command: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
