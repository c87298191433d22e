"""Test accuracy of BP, local losses, and local losses with the BP offset, mean over seeds.

    python benchmarks/accuracy.py                                    # every row that is not finished yet
    python benchmarks/accuracy.py --rows bp,local --seeds 0          # in pieces: results are written after every run
    python benchmarks/accuracy.py --iterations 8 --seeds 0 --out /tmp/accuracy     # a try-out

"From scratch" is `bpfx train` itself with its defaults, on the bundled Fashion-MNIST subset. "Fine-tuning" first trains
with BP on half of the classes, then by each method on all of them at a small learning rate. Writes OUT.json and OUT.md.
A run that was made before with the same settings is not made again; one that was stopped continues.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait without spinning; read when torch starts
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn import functional as F

import bpfx
from bpfx import _measure, data, train
from bpfx._config import CONFIG_FILE, Config, build, example_batch, prepare
from bpfx.train import Trainee

RESULTS = Path(__file__).parent / "results"
PERIODS = (1, 2, 4, 8)
FINE_TUNING_LR = 5e-4
OFFSET_SETTINGS = ("period", "form", "decay", "clip", "match", "offset_batch", "micro_batches", "alpha", "lam")

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a method with a period, in one of the two regimes."""

    regime: str
    method: str
    period: int | str | None = None

    @property
    def label(self) -> str:
        """As it stands in the table."""
        if self.period is None:
            return {"bp": "BP", "local": "local"}[self.method]
        return "local + offset (default)" if self.period == "auto" else f"local + offset, K={self.period}"


METHODS: dict[str, tuple[str, int | str | None]]
METHODS = {"bp": ("bp", None), "local": ("local", None)} | {"offset": ("offset", "auto")}
METHODS |= {f"offset-k{k}": ("offset", k) for k in PERIODS}
ROWS = {name: Row("from scratch", *method) for name, method in METHODS.items()}
ROWS |= {f"tuning-{name}": Row("fine-tuning", *method) for name, method in METHODS.items()}

ABOUT = {
    "from scratch": "What `bpfx train` does with its defaults.",
    "fine-tuning": f"First as many iterations of BP on the first half of the classes, at lr {Config.lr:g}; the same "
    "weights then go to every method, with new heads, to learn all classes at the lr below.",
}


# --- from scratch: `bpfx train` ---------------------------------------------------------------------------------------


def from_scratch(row: Row, config: Config, folder: Path) -> Result:
    """One run of `bpfx train`, in a folder of its own; continues the run that is in the folder."""
    quiet = Console(quiet=True)
    if (folder / CONFIG_FILE).exists() and Config.read(folder) == config:
        train.resume(folder, quiet)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        train.start(config, folder, quiet)
    result = json.loads((folder / "report.json").read_text("utf-8"))["results"][row.method]
    shutil.rmtree(folder)
    return result


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def fit(trainee: Trainee, config: Config, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> int | None:
    """Train as `bpfx train` does: AdamW, one cycle. The iteration at which the loss was not finite, or None."""
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = max(config.iterations, 4)  # OneCycleLR divides by the length of its phases
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, cycle_momentum=False)
    torch.manual_seed(config.seed + 1)
    for iteration in range(config.iterations):
        loss = trainee(*next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if not math.isfinite(loss.item()):
            return iteration + 1
    return None


def endless(split: data.Split, config: Config) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from data.batches(split, min(config.batch_size, len(split)), config.seed, epoch, drop_last=True)
        epoch += 1


@dataclasses.dataclass(frozen=True)
class Some(data.Split):
    """The samples of a split at `indices`."""

    split: data.Split
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split.fetch(self.indices[indices])

    def take(self, count: int | None) -> Some:
        return Some(self.split, self.indices[:count])


@functools.lru_cache(maxsize=1)
def pretrained(config: Config) -> torch.nn.Module:
    """The network after BP on the first half of the classes; its classifier has all classes from the start."""
    splits = prepare(config)
    everything = torch.arange(len(splits.train))
    labels = torch.cat([y for _, y in data.batches(splits.train, 1000)])
    half = Some(splits.train, everything[labels < splits.num_classes // 2])
    model = build(config, splits)
    fit(Trainee(model, model), config, endless(half, config))
    return model


def fine_tuning(row: Row, config: Config, folder: Path) -> Result:
    """Half of the default's iterations on half of the classes at its rate, as many on all at a small one."""
    begin = dataclasses.replace(config, lr=Config.lr, period=Config.period, methods=("bp",))
    splits, model = prepare(config), copy.deepcopy(pretrained(begin))
    trainee = Trainee(model, model)
    if row.method != "bp":
        torch.manual_seed(config.seed)  # the heads' first weights
        offset = config.offset() if row.method == "offset" else None
        step = bpfx.convert(model, F.cross_entropy, example_batch(config, splits), offset=offset)
        trainee = Trainee(step, model, step)
    began = time.perf_counter()
    diverged = fit(trainee, config, endless(splits.train, config))
    seconds = (time.perf_counter() - began) / config.iterations
    accuracy = train.evaluate(trainee, splits.test, config.batch_size, config.device)
    cosines = trainee.new_cosines()
    if row.method == "local" and trainee.step is not None:
        cosines = [_measure.cosine(trainee.step, *example_batch(config, splits))]  # at the end; it has no refreshes
    return {"accuracy": accuracy, "cosines": cosines, "diverged": diverged, "seconds_per_step": seconds}


# --- rows, and what is kept of them -----------------------------------------------------------------------------------


def settings(row: Row, seed: int, iterations: int | None) -> Config:
    """The demo's settings, except for what the row is about."""
    config = Config(methods=(row.method,), seed=seed, period=row.period or Config.period)
    if row.regime == "fine-tuning":
        config = dataclasses.replace(config, lr=FINE_TUNING_LR, iterations=config.iterations // 2)
    return dataclasses.replace(config, iterations=iterations) if iterations else config


def run(name: str, seed: int, config: Config, work: Path) -> Result:
    """One run, and what the table needs of it."""
    row = ROWS[name]
    method: Callable[[Row, Config, Path], Result] = from_scratch if row.regime == "from scratch" else fine_tuning
    result = method(row, config, work / f"{name}-{seed}")
    cosines = [value for value in result["cosines"] if math.isfinite(value)]
    return {
        "accuracy_percent": round(100 * result["accuracy"], 2),
        "cosine": round(statistics.fmean(cosines), 4) if cosines else None,
        "diverged_at": result["diverged"],
        "seconds_per_step": round(result["seconds_per_step"], 4),
    }


def content(config: Config) -> dict[str, Any]:
    """Settings as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def current(rows: dict[str, dict[str, Result]], iterations: int | None) -> dict[str, dict[str, Result]]:
    """The runs that today's settings would make again just so; others are not comparable, and are not shown."""
    kept: dict[str, dict[str, Result]] = {}
    for name, row in ROWS.items():
        for seed, done in rows.get(name, {}).items():
            # What a run of an earlier version did not know stood at its default; and without an offset nobody asks.
            ignored = () if row.method == "offset" else OFFSET_SETTINGS
            made = content(Config()) | done["settings"] | dict.fromkeys(ignored)
            if made == content(settings(row, int(seed), iterations)) | dict.fromkeys(ignored):
                kept.setdefault(name, {})[seed] = done
    return kept


def markdown(rows: dict[str, dict[str, Result]]) -> str:
    """The tables, a regime each; every row as it came out."""
    lines = ["# Test accuracy", "", "Mean ± standard deviation over seeds, percent of the test images.", ""]
    for regime in ("from scratch", "fine-tuning"):
        shown = {name: runs for name, runs in rows.items() if ROWS[name].regime == regime}
        if not shown:
            continue
        local = shown.get("local") or shown.get("tuning-local") or {}
        lines += [f"## {regime.capitalize()}", "", ABOUT[regime], "", _summary(regime, shown), ""]
        lines += ["| method | seeds | test accuracy % | points above local | each seed | cosine to BP | note |"]
        lines += ["|---|--:|--:|--:|--:|--:|---|"]
        for name, runs in shown.items():
            values = [r["accuracy_percent"] for r in runs.values()]
            gains = [r["accuracy_percent"] - local[s]["accuracy_percent"] for s, r in runs.items() if s in local]
            cosines = [r["cosine"] for r in runs.values() if r["cosine"] is not None]
            bad = [f"seed {s} diverged at {r['diverged_at']}" for s, r in runs.items() if r["diverged_at"] is not None]
            cells = [
                ROWS[name].label,
                str(len(values)),
                _mean(values),
                _mean(gains, "+") if gains and ROWS[name].method != "local" else "–",
                ", ".join(f"{v:.1f}" for v in values),
                f"{statistics.fmean(cosines):.2f}" if cosines else "–",
                "; ".join(bad),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_made_with(shown), ""]
    return "\n".join(lines)


def _mean(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _summary(regime: str, shown: dict[str, dict[str, Result]]) -> str:
    """Whether the default offset beats local losses, on the seeds that both have."""
    prefix = "tuning-" if regime == "fine-tuning" else ""
    bp, local, offset = (shown.get(prefix + n, {}) for n in ("bp", "local", "offset"))
    both = [seed for seed in offset if seed in local]
    if not both:
        return "Not all of local and local + offset have run yet."
    gain = statistics.fmean(offset[s]["accuracy_percent"] - local[s]["accuracy_percent"] for s in both)
    word = "level with" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
    text = f"Local + offset with its defaults is {word} local alone ({len(both)} seeds)"
    return f"{text}; BP reaches {_mean([r['accuracy_percent'] for r in bp.values()])} %." if bp else f"{text}."


def _made_with(shown: dict[str, dict[str, Result]]) -> list[str]:
    """Settings, versions and commands, each once."""
    runs = [run for row in shown.values() for run in row.values()]
    picked = ("model", "data", "iterations", "batch_size", "lr", "weight_decay", "blocks", "alpha", "lam")
    said = []
    for made in runs:
        chosen = ", ".join(f"{key.replace('_', ' ')} {made['settings'][key]}" for key in picked)
        versions = ", ".join(f"{key} {value}" for key, value in made["made_with"].items())
        said.append(f"{chosen}. {versions}. `{made['command']}`")
    return list(dict.fromkeys(said))


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, separated by commas (default: all)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas (default: 0,1,2)")
    parser.add_argument("--iterations", type=int, help="of each run (default: the demo's; half of it in fine-tuning)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy", help="where results go, without an ending")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.rows.split(",") if name not in ROWS]
    if unknown:
        parser.error(f"--rows: unknown row {unknown[0]!r}; known are {', '.join(ROWS)}")
    if not all(seed.isdecimal() for seed in parsed.seeds.split(",")):
        parser.error(f"--seeds: expected whole numbers separated by commas, such as 0,1,2; got {parsed.seeds!r}")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    torch.set_num_threads(parsed.threads)
    stored, tables = (parsed.out.with_name(parsed.out.name + ending) for ending in (".json", ".md"))
    stored.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Result]] = json.loads(stored.read_text("utf-8"))["rows"] if stored.exists() else {}
    made_with = {
        "bpfx": importlib.metadata.version("bpfx"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": parsed.threads,
    }
    # Seeds outside, so that pretraining is done once per seed, and a part of the runs is a fair table already.
    jobs = [(name, int(seed)) for seed in parsed.seeds.split(",") for name in ROWS if name in parsed.rows.split(",")]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs))
        for name, seed in jobs:
            config = settings(ROWS[name], seed, parsed.iterations)
            progress.update(task, description=f"{name}, seed {seed}")
            if str(seed) not in current(rows, parsed.iterations).get(name, {}):
                try:
                    measured = run(name, seed, config, parsed.out.with_name(parsed.out.name + ".running"))
                except (train.Interrupted, KeyboardInterrupt):
                    print(f"Stopped in {name}, seed {seed}; the same command goes on from there.", file=sys.stderr)
                    return 130
                command = shlex.join(["python", "benchmarks/accuracy.py", *arguments])
                rows.setdefault(name, {})[str(seed)] = measured | {
                    "settings": content(config),
                    "made_with": made_with,
                    "command": command,
                }
                _write(stored, json.dumps({"rows": rows}, indent=1) + "\n")
                _write(tables, markdown(current(rows, parsed.iterations)))
            progress.advance(task)
    shutil.rmtree(parsed.out.with_name(parsed.out.name + ".running"), ignore_errors=True)
    print(markdown(current(rows, parsed.iterations)))
    print(f"Wrote {stored}, {tables}")
    return 0


def _write(path: Path, text: str) -> None:
    """Beside it, then renamed: a run that is killed here leaves the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, "utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
