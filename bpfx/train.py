"""Train one model three ways on the same data, in the same order, from the same weights: what `bpfx train` does.

    bp      plain back-propagation
    local   every block on its own local loss
    offset  local losses corrected by the BP offset

A run lives in a folder: its settings (config.json), the curves (metrics.csv), a checkpoint that is written atomically,
the trained weights of each method (bp.pt, …) and at the end the report. A run that was stopped, in whatever way,
continues from its checkpoint and on the CPU ends with the very numbers of one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import bpfx
from bpfx import _measure, data, report
from bpfx._config import CONFIG_FILE, METHODS, Config, build, example_batch, prepare
from bpfx.errors import BpfxError
from bpfx.step import Step

__all__ = ["METHODS", "Config", "Interrupted", "Trainee", "resume", "start"]

_METRICS = ("method", "iteration", "lr", "train_loss", "test_accuracy", "seconds")
_CHECKPOINT = "checkpoint.pt"


class Interrupted(Exception):
    """The run was asked to stop and has saved where it was; carries the run's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


@dataclasses.dataclass
class Trainee:
    """What is trained: `module` owns the state and the parameters, `model` is what is tested.

    Calling it with a batch gives the loss, ready for `backward()`. `step` is the converted step, None for plain BP.
    """

    module: nn.Module
    model: nn.Module
    step: Step | None = None
    _refreshes_seen: int = 0

    @staticmethod
    def make(config: Config, splits: data.Splits, method: str) -> Trainee:
        """Build the model of `config` and, unless `method` is "bp", convert it."""
        model = build(config, splits)
        if method == "bp":
            return Trainee(model, model)
        step = bpfx.convert(
            model,
            F.cross_entropy,
            example_batch(config, splits),
            blocks=config.blocks_argument(),
            local_loss=config.local_losses(),
            horizon=config.horizon,
            offset=config.offset() if method == "offset" else None,
            compile=config.compile,
        )
        return Trainee(step, model, step)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), y) if self.step is None else self.step(x, y)

    def new_cosines(self) -> list[float]:
        """Mean cosine between local and BP gradient, of every refresh since the last call."""
        if self.step is None:
            return []
        refreshes = self.step.diagnostics.refreshes
        new, self._refreshes_seen = refreshes[self._refreshes_seen :], len(refreshes)
        return [float(refresh["cosine"]) for refresh in new]


def start(config: Config, folder: Path, console: Console) -> report.Report:
    """Run every method of `config` from the beginning.

    Args:
        config: the settings.
        folder: created; must not hold a run yet.
        console: where progress and the report are printed.

    Raises:
        BpfxError: the folder holds a run already, or a setting does not work for the model or the data.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    if (folder / CONFIG_FILE).exists():
        raise BpfxError(f"{folder} already holds a run; continue it with --resume {folder}, or choose another folder.")
    return _Run(config, folder, console).execute()


def resume(folder: Path, console: Console) -> report.Report:
    """Continue the run in `folder` from its last checkpoint; its report, if it is complete.

    Raises:
        BpfxError: the folder holds no run, or its checkpoint is damaged.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    return _Run(Config.read(folder), folder, console).execute()


class _Run:
    """One run: its state on disk and in memory, and the loop."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.rows: list[dict[str, Any]] = []
        self.finished: dict[str, dict[str, Any] | None] = {}
        self.current: dict[str, Any] | None = None
        self.stop = False

    def execute(self) -> report.Report:
        # Everything that can be wrong with the settings shows before a folder is made.
        splits = prepare(self.config)
        plan = bpfx.plan(
            build(self.config, splits),
            F.cross_entropy,
            example_batch(self.config, splits),
            blocks=self.config.blocks_argument(),
            local_loss=self.config.local_losses(),
            horizon=self.config.horizon,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._load()
        self._write_config()
        self.console.print(
            f"{self.config.model} on {splits.name}: {len(splits.train):,} training and {len(splits.test):,} test "
            f"images, {len(plan.blocks)} blocks; writing to {self.folder}",
            soft_wrap=True,
        )
        with self._interrupts(), self._progress() as progress:
            for method in self.config.methods:
                if method not in self.finished:
                    self.finished[method] = self._method(method, splits, progress)
                    self.current = None
                    self._save()
            if "bp" in self.config.methods and "checkpointing" not in self.finished:
                self._note("bp + checkpointing: measuring memory and time")
                model, batch = build(self.config, splits), example_batch(self.config, splits)
                self.finished["checkpointing"] = _measure.checkpointing(F.cross_entropy, model, batch)
                self._save()
        return report.make(self.config, self.folder, self.finished, self.rows, plan, self.console)

    def _method(self, method: str, splits: data.Splits, progress: Progress) -> dict[str, Any]:
        """Train one method to its end, from its checkpoint if there is one, and measure it."""
        config = self.config
        trainee = Trainee.make(config, splits, method)
        optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        # OneCycleLR divides by the length of its phases, which a run of one or two iterations would make zero.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=max(config.iterations, 4), cycle_momentum=False
        )
        torch.manual_seed(config.seed + 1)
        state: dict[str, Any] = {"method": method, "iteration": 0, "seconds": [], "cosines": [], "diverged": None}
        if self.current is not None and self.current["method"] == method:
            state = self.current
            trainee.module.load_state_dict(state.pop("module"))
            optimizer.load_state_dict(state.pop("optimizer"))
            schedule.load_state_dict(state.pop("schedule"))
            _restore_random(state.pop("random"))
            trainee.new_cosines()  # those before the checkpoint are in it already
        probe = example_batch(config, splits)

        def freeze() -> dict[str, Any]:
            return state | {
                "module": trainee.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": _random_state(),
            }

        label = report.LABELS[method]
        task = progress.add_task(label, total=config.iterations, completed=state["iteration"], status="")
        eval_every = config.eval_every or max(1, config.iterations // 8)
        log_every = max(1, config.iterations // 200)
        saved_at = time.monotonic()
        batches = self._batches(splits.train, state["iteration"])
        while state["iteration"] < config.iterations and state["diverged"] is None:
            x, y = next(batches)
            began = time.perf_counter()
            loss = trainee(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()
            state["seconds"].append(time.perf_counter() - began)
            rate = schedule.get_last_lr()[0]
            schedule.step()
            iteration = state["iteration"] = state["iteration"] + 1
            if not math.isfinite(value):
                state["diverged"] = iteration
            state["cosines"] += trainee.new_cosines()
            last = iteration == config.iterations or state["diverged"] is not None
            tested = last or iteration % eval_every == 0
            accuracy = evaluate(trainee, splits.test, config.batch_size, config.device) if tested else None
            if tested and method == "local" and trainee.step is not None and state["diverged"] is None:
                state["cosines"].append(_measure.cosine(trainee.step, *probe))
            if tested or iteration % log_every == 0:
                elapsed = sum(state["seconds"])
                self.rows.append(dict(zip(_METRICS, (method, iteration, rate, value, accuracy, elapsed), strict=True)))
            if accuracy is not None:
                self._note(f"{label}: iteration {iteration}, test accuracy {100 * accuracy:.1f} %")
            progress.update(task, completed=iteration, status=f"loss {value:.2f}")
            due = config.checkpoint_every is not None and iteration % config.checkpoint_every == 0
            if self.stop or due or time.monotonic() - saved_at >= config.checkpoint_seconds:
                self.current = freeze()
                self._save()
                saved_at = time.monotonic()
            if self.stop:
                raise Interrupted(self.folder)
        progress.update(task, completed=config.iterations, status="measuring memory")
        weights = trainee.model.state_dict()
        _replace(self.folder / f"{method}.pt", lambda path: torch.save(weights, path))
        period = config.period if method == "offset" else 1
        result = {
            "accuracy": next(r["test_accuracy"] for r in reversed(self.rows) if r["method"] == method),
            "cosines": state["cosines"],
            "diverged": state["diverged"],
            "seconds_per_step": _measure.seconds_per_step(state["seconds"], period),
            "state_bytes": _measure.state_bytes(trainee.module, optimizer),
            **_measure.step_memory(lambda: trainee(*probe), optimizer, period, state["iteration"]),
        }
        progress.update(task, status="done")
        return result

    def _batches(self, train: data.Split, iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches from `iteration` on, epoch after epoch, without the smaller last one of each."""
        # BatchNorm cannot train on a single sample, which the last batch may be.
        size = min(self.config.batch_size, len(train))
        per_epoch = data.batch_count(train, size, drop_last=True)
        epoch, skip = divmod(iteration, per_epoch)
        while True:
            for x, y in data.batches(train, size, self.config.seed, epoch, skip, drop_last=True):
                yield x.to(self.config.device), y.to(self.config.device)
            epoch, skip = epoch + 1, 0

    def _write_config(self) -> None:
        versions = {"bpfx": importlib.metadata.version("bpfx"), "torch": torch.__version__}
        content = {
            "settings": dataclasses.asdict(self.config),
            "made_with": versions | {"threads": torch.get_num_threads()},
        }
        text = json.dumps(content, indent=2) + "\n"
        _replace(self.folder / CONFIG_FILE, lambda path: path.write_text(text, "utf-8"))

    def _save(self) -> None:
        state = {"rows": self.rows, "finished": self.finished, "current": self.current}
        _replace(self.folder / _CHECKPOINT, lambda path: torch.save(state, path))
        _replace(self.folder / "metrics.csv", self._write_metrics)

    def _write_metrics(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _METRICS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _load(self) -> None:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.config.device, weights_only=True)
            self.rows, self.finished, self.current = state["rows"], state["finished"], state["current"]
        except Exception as error:  # whatever a damaged file makes the unpickler raise
            raise BpfxError(f"The checkpoint {path} cannot be read: {type(error).__name__}: {error}") from None
        if self.current is not None:
            self._note(f"continuing {self.current['method']} after iteration {self.current['iteration']}", always=True)

    def _note(self, text: str, always: bool = False) -> None:
        # The progress bar says it on a terminal; a log file gets lines instead.
        if always or not self.console.is_terminal:
            self.console.print(text)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]:<16}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """The first Ctrl-C ends the step, saves and stops; the second one stops at once."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(self.folder) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def evaluate(trainee: Trainee, test: data.Split, batch_size: int, device: str) -> float:
    """Share of `test` that the model gets right, between 0 and 1; leaves it in training mode."""
    trainee.model.eval()
    correct = 0
    with torch.no_grad():
        for x, y in data.batches(test, batch_size):
            correct += int((trainee.model(x.to(device)).argmax(dim=1) == y.to(device)).sum())
    trainee.module.train()
    trainee.model.train()
    return correct / len(test)


def _random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in state["cuda"]])


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a reader, or a run killed here, finds the old file or the new, never a half."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
