"""Train one model three ways on the same data, in the same order, from the same weights: what `bpfx train` does.

    bp      plain back-propagation
    local   every block on its own local loss
    offset  local losses corrected by the BP offset

A run lives in a folder: its settings (config.json), the curves (metrics.csv), what every refresh of the offset measured
(refreshes.csv), a checkpoint that is written atomically, the trained weights of each method (bp.pt, …) and at the end
the report. A run that was stopped, in whatever way,
continues from its checkpoint and on the CPU ends with the very numbers of one that was not.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import math
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import bpfx
from bpfx import _measure, checkpoint, data, logs, report
from bpfx._config import CONFIG_FILE, METHODS, Config, build, example_batch, prepare
from bpfx._files import make_folder
from bpfx._ranks import is_rank_zero
from bpfx._runs import Interrupted, Stop, batches, random_state, replace, restore_random
from bpfx.errors import BpfxError
from bpfx.step import Step

__all__ = ["METHODS", "Config", "Interrupted", "Trainee", "resume", "start"]

_METRICS = ("method", "iteration", "lr", "train_loss", "test_accuracy", "seconds")
_CHECKPOINT, _REFRESHES = "checkpoint.pt", "refreshes.csv"
_TENSORBOARD = "tensorboard"  # a folder; where a run has it, --resume writes on


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
        """Mean cosine between local and BP gradient, of every refresh of this process since the last call.

        Of the latest 2000 at most, which is what diagnostics keep.
        """
        if self.step is None:
            return []
        diagnostics = self.step.diagnostics
        new, self._refreshes_seen = diagnostics.measured - self._refreshes_seen, diagnostics.measured
        return [float(refresh["cosine"]) for refresh in diagnostics.refreshes[-new:]] if new > 0 else []


def start(config: Config, folder: Path, console: Console, tensorboard: bool = False) -> report.Report:
    """Run every method of `config` from the beginning.

    Args:
        config: the settings.
        folder: created; must not hold a run yet.
        console: where progress and the report are printed.
        tensorboard: write TensorBoard events as well, under `folder`/tensorboard.

    Raises:
        BpfxError: the folder holds a run already, a setting does not work for the model or the data, or tensorboard is
            wanted and not installed.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    if (folder / CONFIG_FILE).exists():
        raise BpfxError(f"{folder} already holds a run; continue it with --resume {folder}, or choose another folder.")
    return _Run(config, folder, console, tensorboard).execute()


def resume(folder: Path, console: Console) -> report.Report:
    """Continue the run in `folder` from its last checkpoint; its report, if it is complete.

    Raises:
        BpfxError: the folder holds no run, or its checkpoint is damaged.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    config = Config.read(folder)
    return _Run(config, folder, console, (folder / _TENSORBOARD).is_dir()).execute()


class _Run:
    """One run: its state on disk and in memory, and the loop."""

    def __init__(self, config: Config, folder: Path, console: Console, tensorboard: bool) -> None:
        self.config, self.folder, self.console, self.tensorboard = config, folder, console, tensorboard
        self.rows: list[dict[str, Any]] = []
        self.finished: dict[str, dict[str, Any] | None] = {}
        self.current: dict[str, Any] | None = None
        self.stop = Stop()

    def execute(self) -> report.Report:
        # Everything that can be wrong with the settings shows before a folder is made.
        self._load()
        if self.tensorboard:
            logs.summary_writer()
        splits = prepare(self.config)
        plan = bpfx.plan(
            build(self.config, splits),
            F.cross_entropy,
            example_batch(self.config, splits),
            blocks=self.config.blocks_argument(),
            local_loss=self.config.local_losses(),
            horizon=self.config.horizon,
        )
        make_folder(self.folder)
        if self.tensorboard:
            (self.folder / _TENSORBOARD).mkdir(exist_ok=True)
        self._write_config()
        self.console.print(
            f"{self.config.model} on {splits.name}: {len(splits.train):,} training and {len(splits.test):,} test "
            f"images, {len(plan.blocks)} blocks; writing to {self.folder}",
            soft_wrap=True,
        )
        if self.current is not None:
            self._note(f"continuing {self.current['method']} after iteration {self.current['iteration']}", always=True)
        with self.stop.listening(self.folder), self._progress() as progress:
            for method in self.config.methods:
                if method not in self.finished:
                    with ExitStack() as opened:
                        self.finished[method] = self._method(method, splits, progress, opened)
                    self.current = None
                    self._save()
            if "bp" in self.config.methods and "checkpointing" not in self.finished:
                self._note("bp + checkpointing: measuring memory and time")
                model, batch = build(self.config, splits), example_batch(self.config, splits)
                self.finished["checkpointing"] = _measure.checkpointing(F.cross_entropy, model, batch)
                self._save()
        return report.make(self.config, self.folder, self.finished, self.rows, plan, self.console)

    def _method(self, method: str, splits: data.Splits, progress: Progress, opened: ExitStack) -> dict[str, Any]:
        """Train one method to its end, from its checkpoint if there is one, and measure it.

        `opened` takes what is to be closed afterwards.
        """
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
            try:
                trainee.module.load_state_dict(state.pop("module"))
                optimizer.load_state_dict(state.pop("optimizer"))
                schedule.load_state_dict(state.pop("schedule"))
                restore_random(state.pop("random"))
            except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                path = self.folder / _CHECKPOINT
                raise BpfxError(f"The checkpoint {path} does not fit {CONFIG_FILE} beside it: {first}") from None
            trainee.new_cosines()  # those before the checkpoint are in it already
        probe = example_batch(config, splits)
        scalars = self._logs(method, trainee, state["iteration"], opened)

        def freeze() -> dict[str, Any]:
            return state | {
                "module": trainee.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": random_state(),
            }

        label = report.LABELS[method]
        task = progress.add_task(label, total=config.iterations, completed=state["iteration"], status="")
        eval_every = config.eval_every or max(1, config.iterations // 8)
        log_every = max(1, config.iterations // 200)
        saved_at = time.monotonic()
        source = batches(splits.train, config, state["iteration"])
        while state["iteration"] < config.iterations and state["diverged"] is None:
            x, y = next(source)
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
                scalars.tell({name: v for name, v in self.rows[-1].items() if isinstance(v, int | float)})
            if accuracy is not None:
                self._note(f"{label}: iteration {iteration}, test accuracy {100 * accuracy:.1f} %")
            progress.update(task, completed=iteration, status=f"loss {value:.2f}")
            due = config.checkpoint_every is not None and iteration % config.checkpoint_every == 0
            if self.stop.asked or due or time.monotonic() - saved_at >= config.checkpoint_seconds:
                self.current = freeze()
                self._save()
                saved_at = time.monotonic()
            if self.stop.asked:
                raise Interrupted(self.folder)
        progress.update(task, completed=config.iterations, status="measuring memory")
        weights = trainee.model.state_dict()
        checkpoint.save(weights, self.folder / f"{method}.pt")
        # Where the period is not fixed, windows long enough to hold refreshes.
        period = config.period if isinstance(config.period, int) else 16
        refreshes = method == "offset"
        step = trainee.step if refreshes else None
        measure = partial(_measure.refresh_memory, step) if step is not None else _measure.step_memory
        result = {
            "accuracy": next(r["test_accuracy"] for r in reversed(self.rows) if r["method"] == method),
            "cosines": state["cosines"],
            "diverged": state["diverged"],
            "seconds_per_step": _measure.seconds_per_step(state["seconds"], period if refreshes else 1),
            "state_bytes": _measure.state_bytes(trainee.module, optimizer),
        }
        with trainee.step.diagnostics.aside() if trainee.step is not None else nullcontext():
            result |= measure(lambda: trainee(*probe), optimizer)
        progress.update(task, status="done")
        return result

    def _logs(self, method: str, trainee: Trainee, iteration: int, opened: ExitStack) -> logs.Listeners:
        """Have the trainee's diagnostics written; whoever is told the rows of metrics.csv."""
        scalars = logs.Listeners()
        step = trainee.step
        if method == "offset" and step is not None:
            writer = logs.CsvWriter(self.folder / _REFRESHES)
            writer.resume(step)  # without a checkpoint: from the beginning
            step.diagnostics.listen(writer)
        if self.tensorboard:
            # + 1: the row of the iteration that ended with the checkpoint stays.
            start = iteration + 1 if iteration else 0
            events = logs.TensorBoardWriter(self.folder / _TENSORBOARD / method, start)
            opened.callback(events.close)
            scalars.add(events)
            if step is not None:
                step.diagnostics.listen(events)
        return scalars

    def _write_config(self) -> None:
        versions = {"bpfx": importlib.metadata.version("bpfx"), "torch": torch.__version__}
        content = {
            "settings": dataclasses.asdict(self.config),
            "made_with": versions | {"threads": torch.get_num_threads()},
        }
        text = json.dumps(content, indent=2) + "\n"
        replace(self.folder / CONFIG_FILE, lambda path: path.write_text(text, "utf-8"))

    def _save(self) -> None:
        state = {"rows": self.rows, "finished": self.finished, "current": self.current}
        checkpoint.save(state, self.folder / _CHECKPOINT)
        replace(self.folder / "metrics.csv", self._write_metrics)

    def _write_metrics(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _METRICS)
            writer.writeheader()
            writer.writerows(self.rows)

    def _load(self) -> None:
        path = self.folder / _CHECKPOINT
        if not path.exists():
            return
        state = checkpoint.load(path, self.config.device)
        if not isinstance(state, dict) or state.keys() != {"rows", "finished", "current"}:
            raise BpfxError(f"The checkpoint {path} is none of bpfx train; resume a folder that it has made")
        self.rows, self.finished, self.current = state["rows"], state["finished"], state["current"]

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
            disable=not (self.console.is_terminal and is_rank_zero()),
        )


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
