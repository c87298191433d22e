"""Does the offset with its defaults serve every regime? From scratch, fine-tuning, and adapters on pretrained models.

    python benchmarks/offset.py                                           # scratch and tuning, on the bundled subset
    python benchmarks/offset.py --data-root DATA                          # all of Fashion-MNIST, torchvision's layout
    python benchmarks/offset.py --parts lokr,lora --weights-module FILE.py --images FILE.npz
    python benchmarks/offset.py --only 'scratch/offset*,*/bp/0' --again   # some runs once more, by name or pattern
    python benchmarks/offset.py --report-only                             # table and plot from what is there
    python benchmarks/offset.py --seeds 1 --iterations 4 --train-size 400 --test-size 200 --out /tmp/offset  # a try-out

A run is named PART/ROW/SEED. FILE.py has functions mobilenet_v2(), efficientnet_lite0() and dinov2_vits14(img_size=…)
that return modules with pretrained weights; FILE.npz holds `x` (uint8, N×S×S×3), `y` and `classes`. Each run has a BP
step of a twin timed beside its own ones. Results are written after every run; two processes may share one --out.
Writes OUT.json, OUT.md and OUT.png, and the tables of docs/choosing.md where OUT is the default.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import fnmatch
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait without spinning; read when torch starts
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import accuracy
import torch
from losses_report import spoken
from offset_parts import NEEDS_WEIGHTS, PARTS, ROWS, Ground, Unusable
from offset_report import markdown, plot, write_guide
from parts import as_json
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx
from bpfx import losses, train
from bpfx._config import Config
from bpfx._correction import EXACT, LOCAL, REFRESH
from bpfx.memory import measure_peak
from bpfx.train import Trainee

RESULTS = Path(__file__).parent / "results"
GUIDE = Path(__file__).parent.parent / "docs" / "choosing.md"
MICRO_BATCHES = 4  # of the block-serial trainer, whose memory is measured beside the drop-in loop's
EVERY = 5  # iterations from one timed BP step to the next

Run = dict[str, Any]
Batch = tuple[Tensor, Tensor]


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """One run."""

    part: str
    row: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.part}/{self.row}/{self.seed}"


def optimizer_for(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)


class Clock:
    """Seconds on the wall and of the processor: the first is what a user waits for, the second ignores other work."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, call: Callable[[], Tensor]) -> Tensor:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result


def average_ratio(own: Sequence[float], kinds: Sequence[str], bp: Sequence[float]) -> dict[str, Any]:
    """Mean time of a step over a whole training as a multiple of a BP step's.

    Every step is divided by the median of the three BP steps nearest to it. The mean is taken over kinds of steps, each
    by its median and counted by its share, so that a hiccup of the machine does not enter and every refresh does.
    """
    ratios: dict[str, list[float]] = {}
    for i, (seconds, kind) in enumerate(zip(own, kinds, strict=True)):
        first = min(max(i // EVERY - 1, 0), max(len(bp) - 3, 0))
        ratios.setdefault(kind, []).append(seconds / statistics.median(bp[first : first + 3]))
    medians = {kind: statistics.median(values) for kind, values in ratios.items()}
    average = sum(len(ratios[kind]) * median for kind, median in medians.items()) / len(own)
    return {"average": round(average, 4), "kinds": {kind: round(m, 4) for kind, m in medians.items()}}


def measure(job: Job, ground: Ground, cache: Path, seconds: dict[str, float]) -> Run:
    """Train, test, and where the seed is 0 measure the memory of every kind of step."""
    row, config, splits = ROWS[job.row], ground.config(job.seed), ground.splits(job.seed)
    if row.kind == "probe":
        config = dataclasses.replace(config, lr=ground.settings["probe_lr"])
    model = ground.model(job.seed, cache, bare=row.kind == "probe")
    twin = ground.model(job.seed, cache) if row.kind == "probe" else copy.deepcopy(model)
    batches = accuracy.endless(splits.train, config)
    x, y = next(accuracy.endless(splits.train, config))
    kinds: list[str] = []
    module, step = model, None
    if row.kind == "blocks":
        torch.manual_seed(job.seed + 2)  # the heads' first weights
        offset = None if row.offset is None else bpfx.Offset(**row.offset)
        chosen = type(losses.get(row.loss))()
        step = module = bpfx.convert(
            model, F.cross_entropy, (x, y), blocks=ground.blocks, local_loss=chosen, offset=offset
        )
        asked = step._kind

        def noted() -> str:
            kinds.append(asked())
            return kinds[-1]

        step._kind = noted  # type: ignore[method-assign]
    optimizer, twins = optimizer_for(module, config), optimizer_for(twin, config)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=max(config.iterations, 4), cycle_momentum=False
    )

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if step is not None:
            return step(x, y)
        count = -(-len(x) // 4) if row.kind == "small" else len(x)
        return F.cross_entropy(model(x[:count]), y[:count])

    def stepping(loss: Callable[[Tensor, Tensor], Tensor], by: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
        value = loss(x, y)
        value.backward()
        by.step()
        by.zero_grad()
        return value.detach()

    def of_twin(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(twin(x), y)

    own, bp, diverged, began = Clock(), Clock(), None, time.perf_counter()
    with torch.random.fork_rng():
        stepping(of_twin, twins, x, y)  # the first one makes the optimizer's state
    torch.manual_seed(job.seed + 1)
    for iteration in range(config.iterations):
        batch = next(batches)
        if iteration % EVERY == 0:
            with torch.random.fork_rng():  # the training's own draws are those of a run without a twin
                bp(functools.partial(stepping, of_twin, twins, *batch))
        value = own(functools.partial(stepping, loss_of, optimizer, *batch))
        schedule.step()
        if not math.isfinite(value.item()):
            diverged = iteration + 1
            break
    seconds["training"] = time.perf_counter() - began
    trained = Trainee(module, model, step)
    right = train.evaluate(trained, splits.test, 100, "cpu")
    kinds = kinds or ["step"] * len(own.wall)
    found = {
        "accuracy_percent": round(100 * right, 2),
        "diverged_at": diverged,
        "shares": {kind: round(n / len(kinds), 4) for kind, n in Counter(kinds).items()},
        "refreshes": len(step.diagnostics.refreshes) if step is not None else 0,
        "cosine_refreshes": cosine(trained),
        "wall": average_ratio(own.wall, kinds, bp.wall),
        "cpu": average_ratio(own.cpu, kinds, bp.cpu),
        "bp_step_seconds": round(statistics.median(bp.wall), 4),
        "step_seconds": round(statistics.fmean(own.wall), 4),
    }
    if job.seed:
        return found  # bytes do not depend on the seed
    if row.kind == "probe":
        model.eval()

    def memory() -> Run:
        peaks: dict[str, Any] = {"bp": peak_of(lambda: stepping(of_twin, twins, x, y))}
        if step is None:
            peaks["drop_in"] = {"step": peak_of(lambda: stepping(loss_of, optimizer, x, y))}
            return {"peak_bytes": peaks}
        peaks["drop_in"] = by_kind(step, lambda: stepping(loss_of, optimizer, x, y))
        try:
            adamw = functools.partial(torch.optim.AdamW, lr=config.lr, weight_decay=config.weight_decay)
            serial = bpfx.BlockTrainer(step, adamw, micro_batches=MICRO_BATCHES)
            peaks["serial"] = by_kind(step, lambda: serial.step(x, y))
        except bpfx.BpfxError as error:  # a loss that compares samples cannot be split
            return {"peak_bytes": peaks, "serial_refused": str(error)}
        return {"peak_bytes": peaks}

    with warnings.catch_warnings():
        # Steps of a kind of our choosing, at rates of their own, are no training that anyone needs to be warned of.
        warnings.simplefilter("ignore", bpfx.BpfxWarning)
        return found | memory()


def peak_of(call: Callable[[], Tensor]) -> int:
    """Bytes above the state of one whole step, optimizer included."""
    return int(measure_peak(call, warmup=1).peak_bytes)


def by_kind(step: bpfx.Step, call: Callable[[], Tensor]) -> dict[str, int]:
    """Peak of every kind of step that a training with these settings can have, whatever is due now."""
    wanted = [LOCAL]
    if step.offset is not None:
        auto = step.offset.period == "auto"
        wanted = [REFRESH, *([EXACT] if auto else []), *([LOCAL] if auto or step.offset.period != 1 else [])]
    found = {}
    try:
        for kind in wanted:
            step._forced = kind
            found[kind] = peak_of(call)
    finally:
        step._forced = None
    return found


def cosine(trained: Trainee) -> float | None:
    values = [c for c in trained.new_cosines() if math.isfinite(c)]
    return round(statistics.fmean(values), 4) if values else None


def attempt(job: Job, ground: Ground, cache: Path) -> Run:
    """One run, whatever becomes of it: ``status`` is "finished", "refused" (by bpfx, with its reason) or "failed"."""
    began, seconds = time.perf_counter(), {"training": 0.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", bpfx.BpfxWarning)
        try:
            result = {"status": "finished", **measure(job, ground, cache, seconds)}
        except bpfx.BpfxError as error:
            result = {"status": "refused", "reason": str(error)}
        except Unusable:
            raise
        except Exception as error:  # one row's mistake must not cost the others their hours
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    said = [str(w.message) for w in caught if issubclass(w.category, bpfx.BpfxWarning)]
    return {
        **dataclasses.asdict(job),
        **result,
        "warnings": list(dict.fromkeys(said)),
        "train_seconds": round(seconds["training"], 1),
        "seconds": round(time.perf_counter() - began, 1),
        "settings": ground.settings,
    }


# --- all runs ---------------------------------------------------------------------------------------------------------


def chosen(parsed: argparse.Namespace) -> list[Job]:
    """The runs that are asked for; seeds outside, so that a piece of them is a fair table already."""
    jobs = [Job(p, row, seed) for p in parsed.parts for seed in range(parsed.seeds) for row in PARTS[p].rows]
    if parsed.only is None:
        return jobs
    patterns = parsed.only.split(",")
    return [j for j in jobs if any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (j.name, f"{j.part}/{j.row}"))]


def done(job: Job, runs: dict[str, Run], settings: dict[str, Any]) -> bool:
    own = runs.get(job.name)
    return own is not None and own["settings"] == settings and own["status"] != "failed"


def bp_step_seconds(ground: Ground, cache: Path) -> float:
    """One BP step on this machine, the best of three after a warm-up."""
    splits, config = ground.splits(0), ground.config(0)
    model = ground.model(0, cache, fresh=True)
    x, y = next(accuracy.endless(splits.train, config))
    took = []
    for _ in range(4):
        began = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        took.append(time.perf_counter() - began)
    return min(took[1:])


def seconds_of(job: Job, runs: dict[str, Run], ground: Ground, step: float) -> float:
    """How long a run will take: what the same row took with another seed, else so many BP steps."""
    for run in runs.values():
        same = (run["part"], run["row"]) == (job.part, job.row) and run["settings"] == ground.settings
        if same and (run["seed"] == 0) == (job.seed == 0):
            return float(run["seconds"])
    row, settings = ROWS[job.row], ground.settings
    factor = {"bp": 1.0, "small": 0.3, "probe": 0.35}.get(row.kind, 1.2 * losses.get(row.loss).rows)
    if row.offset is not None:
        factor += 0.7 if row.offset.get("period", 1) == 1 else 0.3
    testing = 0.35 * settings["test_images"] / settings["batch_size"]
    # Measuring memory: two steps each of up to three kinds in two loops, and the profiler.
    further = testing + (0 if job.seed else 30 if row.kind == "blocks" else 6)
    return step * (settings["iterations"] * (factor + 1 / EVERY) + further) + (12 if row.kind == "blocks" else 1)


def reproducing(job: Job, parsed: argparse.Namespace) -> str:
    """The command that makes this run again; DATA and FILE stand for the user's own."""
    words = ["python", "benchmarks/offset.py", "--parts", job.part, "--only", job.name, "--again"]
    words += ["--seeds", str(job.seed + 1), "--threads", str(parsed.threads)]
    for name in ("iterations", "train_size", "test_size"):
        if getattr(parsed, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(parsed, name))]
    if job.part in NEEDS_WEIGHTS:
        words += ["--weights-module", "FILE.py", "--images", "FILE.npz"]
        words += ["--lokr-model", parsed.lokr_model] if job.part == "lokr" else []
    return shlex.join([*words, *(["--data-root", "DATA"] if parsed.data_root else [])])


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", help=f"separated by commas (default: those whose files are given, of {','.join(PARTS)})")
    add("--data-root", help="folder that holds FashionMNIST/raw/ (default: the bundled subset)")
    add("--weights-module", type=Path, metavar="FILE.py", help="gives pretrained models; lokr and lora need it")
    add("--images", type=Path, metavar="FILE.npz", help="images for lokr and lora")
    models = ("mobilenet_v2", "efficientnet_lite0")
    add("--lokr-model", choices=models, default=models[0], help=f"which network (default: {models[0]})")
    add("--seeds", type=int, default=3, help="how many, from 0 on (default: 3)")
    add("--iterations", type=int, help="of each run (default: each part's own); then nothing is judged")
    add("--train-size", type=int, help="training images, spread over the set (default: all)")
    add("--test-size", type=int, help="test images (default: all)")
    add("--only", metavar="RUNS", help="names or patterns separated by commas, such as 'scratch/offset*,*/bp/0'")
    add("--again", action="store_true", help="repeat runs that have finished")
    add("--report-only", action="store_true", help="run nothing; table and plot of the newest settings")
    add("--threads", type=int, default=1, help="torch's threads (default: 1)")
    add("--out", type=Path, default=RESULTS / "offset", help="where results go, without an ending")
    parsed = parser.parse_args(arguments)
    given = parsed.weights_module is not None and parsed.images is not None
    usual = [name for name in PARTS if given or name not in NEEDS_WEIGHTS]
    parsed.parts = parsed.parts.split(",") if parsed.parts else usual
    unknown = [name for name in parsed.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts: unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    for name in parsed.parts:
        if name in NEEDS_WEIGHTS and not given and not parsed.report_only:
            parser.error(f"--parts {name} needs --weights-module FILE.py and --images FILE.npz")
    for name in ("seeds", "iterations", "train_size", "test_size", "threads"):
        value = getattr(parsed, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    return parsed


def load(stored: Path) -> dict[str, Run]:
    """The runs in a file of results, by name."""
    found: dict[str, Run] = json.loads(stored.read_text("utf-8"))["parts"] if stored.exists() else {}
    return found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Between reading and writing the results no other process does: its run would be lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    stored = parsed.out.with_name(parsed.out.name + ".json")
    runs = load(stored)
    if parsed.report_only:
        if not runs:
            print(f"{stored} holds no runs to report; run without --report-only first.", file=sys.stderr)
            return 2
        return report(runs, parsed.out)
    try:
        return work(parsed, stored, runs)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def work(parsed: argparse.Namespace, stored: Path, runs: dict[str, Run]) -> int:
    """Whatever is missing, one run after the other."""
    asked = chosen(parsed)
    if not asked:
        example = Job(parsed.parts[0], "offset", 0).name
        raise Unusable(f"--only {parsed.only!r} matches no run; one is {example!r}")
    made_with = {name: importlib.metadata.version(name) for name in ("bpfx", "torch")}
    if set(parsed.parts) & set(NEEDS_WEIGHTS):
        made_with |= {name: importlib.metadata.version(name) for name in ("peft", "timm")}
    made_with |= {"python": platform.python_version(), "threads": str(parsed.threads)}
    grounds = {name: Ground(name, parsed) for name in dict.fromkeys(job.part for job in asked)}
    jobs = [job for job in asked if parsed.again or not done(job, runs, grounds[job.part].settings)]
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    cache = parsed.out.with_name(parsed.out.name + ".running")
    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    steps = {name: bp_step_seconds(grounds[name], cache) for name in dict.fromkeys(job.part for job in jobs)}

    def left(jobs: Sequence[Job]) -> str:
        return spoken(sum(seconds_of(job, runs, grounds[job.part], steps[job.part]) for job in jobs))

    tell(f"{len(asked) - len(jobs)} of {len(asked)} runs are there, {len(jobs)} to go: about {left(jobs)}")
    for name, seconds in steps.items():
        mine = [job for job in jobs if job.part == name]
        tell(f"  {name}: {len(mine)} runs, about {left(mine)} (a BP step takes {seconds:.2f} s here)")
    for count, job in enumerate(jobs, 1):
        try:
            run = attempt(job, grounds[job.part], cache)
        except KeyboardInterrupt:
            print(f"Stopped in {job.name}; the same command goes on from there.", file=sys.stderr)
            return 130
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with alone(parsed.out.parent):
            runs |= load(stored)
            runs[job.name] = run | {"made_with": made_with, "command": reproducing(job, parsed), "date": date}
            accuracy._write(stored, as_json(runs))
            accuracy._write(parsed.out.with_name(parsed.out.name + ".md"), markdown(runs))
        tell(f"{job.name}: {line_of(run)} ({run['seconds']:.0f} s; about {left(jobs[count:])} left)")
    shutil.rmtree(cache, ignore_errors=True)  # another process makes what it still needs again
    return report(runs, parsed.out)


def line_of(run: Run) -> str:
    """A run in a few words."""
    if run["status"] != "finished":
        return f"{run['status']}: {run['reason']}"
    shares = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in run["shares"].items())
    return f"{run['accuracy_percent']:.1f} %, {run['wall']['average']:.2f} × BP's time, {shares}"


def report(runs: dict[str, Run], out: Path) -> int:
    """Table and plot; 1 where a run has failed otherwise than by being refused."""
    table, picture = (out.with_name(out.name + ending) for ending in (".md", ".png"))
    text = markdown(runs)
    accuracy._write(table, text)
    drawn = plot(runs, picture)
    if out == RESULTS / "offset":
        accuracy._write(GUIDE, write_guide(GUIDE.read_text("utf-8"), runs))
    print(text)
    print(f"Wrote {table}" + (f", {picture}" if drawn else "; no plot: nothing to draw, or no matplotlib"))
    failed = [name for name, run in runs.items() if run["status"] == "failed"]
    if failed:
        print(f"Failed, and tried again by the same command: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
