"""A comparison from its first run to its report: what is left to do, in which order, how long, and stopping."""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import bpfx
from bpfx import checkpoint, data
from bpfx._config import build, example_batch, prepare
from bpfx._files import make_folder
from bpfx._runs import Interrupted, Stop
from bpfx.compare import plots, report, runs
from bpfx.compare.methods import Case
from bpfx.compare.record import Record
from bpfx.compare.rows import ROWS
from bpfx.compare.settings import Settings
from bpfx.compare.table import Table
from bpfx.errors import BpfxError, BpfxWarning

__all__ = ["resume", "start"]

_CURRENT = "current.pt"
_GUESS = 1.2  # time of a step, in BP steps, of a row that has not been measured


@dataclasses.dataclass(frozen=True)
class _Job:
    key: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        return f"{ROWS[self.key].label}, equal {self.budget}, seed {self.seed}"


def start(settings: Settings, folder: Path, console: Console) -> Table:
    """Compare; continues what the folder holds, where that has the same settings.

    Args:
        settings: what is compared.
        folder: created; may hold a comparison with the same settings, and other rows and seeds.
        console: where progress and the table are printed.

    Returns:
        The table; compare.json, compare.md and report.html are in the folder.

    Raises:
        BpfxError: matplotlib is missing, the folder holds something else, or a setting does not work for the model or
            the data.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    plots.require()
    return _Session(Record.open(folder, settings), console).execute()


def resume(folder: Path, console: Console) -> Table:
    """Continue the comparison in `folder`; its table, if it is complete.

    Raises:
        BpfxError: matplotlib is missing, or the folder holds no comparison.
        Interrupted: Ctrl-C; the work so far is saved.
    """
    plots.require()
    return _Session(Record.load(folder), console).execute()


class _Session:
    def __init__(self, record: Record, console: Console) -> None:
        self.record, self.settings, self.console = record, record.settings, console
        self.folder = record.folder
        self.stop = Stop()
        self.failed: set[str] = set()  # in this session; the next one tries again
        self.bp_seconds = 0.0
        self.expected, self.took = 0.0, 0.0

    def execute(self) -> Table:
        # Everything that can be wrong with the settings shows before a folder is made.
        config = self.settings.config
        splits = prepare(config)
        plan = bpfx.plan(
            build(config, splits),
            F.cross_entropy,
            example_batch(config, splits),
            blocks=config.blocks_argument(),
            local_loss=config.local_losses(),
            horizon=config.horizon,
        )
        self.record.about = {
            "data": splits.name,
            "train_images": len(splits.train),
            "test_images": len(splits.test),
            "image_size": splits.image_size,
            "blocks": len(plan.blocks),
        }
        make_folder(self.folder)
        todo = self._todo()
        if todo:
            self.record.save()
        self.bp_seconds = self._bp_seconds(splits) if todo else 0.0
        self.console.print(
            f"{config.model} on {splits.name}: {len(splits.train):,} training and {len(splits.test):,} test images, "
            f"{len(plan.blocks)} blocks; {len(todo)} runs to go, {self._left(todo)}; writing to {self.folder}",
            soft_wrap=True,
        )
        with self.stop.listening(self.folder), self._progress() as progress:
            total = progress.add_task("all runs", total=len(todo), status="")
            inner = progress.add_task("", total=config.iterations, status="")
            try:
                while todo:
                    if self.stop.asked:
                        raise Interrupted(self.folder)
                    done = todo[0]
                    self._job(done, splits, progress, inner)
                    todo = self._todo()
                    progress.update(total, advance=1, total=len(todo) + 1, status=self._left(todo))
                    self._tell(done, len(todo), self._left(todo))
            except Interrupted:
                report.write(self.record)
                raise
        table = report.write(self.record)
        table.print(self.console)
        self.console.print(f"In {self.folder}: compare.json, compare.md, report.html", soft_wrap=True)
        return table

    # --- what is left -------------------------------------------------------------------------------------------------

    def _todo(self) -> list[_Job]:
        """Seeds outside, so that a part of the runs is a fair table already; time last, when it is known."""
        settings, first = self.settings, self.settings.seeds[0]
        # Time and memory are measured after a row's first run, so that one is made with any budget.
        seeds = (first,) if settings.budget == "time" else settings.seeds
        jobs = [_Job(key, "iterations", seed) for seed in seeds for key in settings.rows]
        if settings.budget != "iterations":
            jobs += [_Job(key, "time", seed) for seed in settings.seeds for key in settings.rows]
        return [job for job in jobs if not self._done(job)]

    def _done(self, job: _Job) -> bool:
        row = self.record.row(job.key)
        if "reason" in row and (not row["failed"] or job.key in self.failed):
            return True
        costly = job.budget == "iterations" and job.seed == self.settings.seeds[0]
        return self.record.run(job.key, job.budget, job.seed) is not None and not (costly and "costs" not in row)

    def _bp_seconds(self, splits: data.Splits) -> float:
        case = self._case(splits, self.settings.seeds[0], self.settings.config.iterations)
        method, batch = runs.reference(case), example_batch(case.config, splits)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            method.advance(*batch)
            took.append(time.perf_counter() - began)
        return min(took[1:])

    def _expected(self, job: _Job) -> float:
        """Seconds that a run should take, tests and measurements aside."""
        iterations = self.settings.config.iterations
        if job.budget == "time":
            return iterations * self.bp_seconds
        costs = self.record.row(job.key).get("costs")
        return iterations * self.bp_seconds * (_GUESS if costs is None else costs["ratio"])

    def _left(self, todo: list[_Job]) -> str:
        # What runs took beyond what their steps should take is put on those to come.
        factor = self.took / self.expected if self.expected else 1.2
        return f"about {_spoken(factor * sum(map(self._expected, todo)))} left" if todo else "done"

    # --- one run ------------------------------------------------------------------------------------------------------

    def _case(self, splits: data.Splits, seed: int, iterations: int) -> Case:
        config = dataclasses.replace(self.settings.config, seed=seed)
        return Case(config, splits, self.settings.period, self.settings.micro_batches, iterations)

    def _job(self, job: _Job, splits: data.Splits, progress: Progress, inner: TaskID) -> None:
        """Make one run, whatever becomes of it; a row that cannot run has the reason in its place."""
        row, expected, began = self.record.row(job.key), self._expected(job), time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BpfxWarning)
            try:
                self._run(job, splits, progress, inner)
                for name in ("reason", "failed"):
                    row.pop(name, None)
            except runs.Stopped as stopped:
                self._keep(job, stopped.state)
                raise Interrupted(self.folder) from None
            except runs.Refused as error:
                row |= {"reason": str(error), "failed": False}
            except Exception as error:  # one row's mistake must not cost the others their hours
                said = str(error).strip().splitlines()
                kind = "" if isinstance(error, BpfxError) else f"{type(error).__name__}: "
                row |= {"reason": f"{kind}{said[0]}" if said else type(error).__name__, "failed": True}
                self.failed.add(job.key)
            finally:  # a run that was stopped has been warned, too
                new = [str(w.message) for w in caught if issubclass(w.category, BpfxWarning)]
                if new:
                    row["warnings"] = list(dict.fromkeys([*row.get("warnings", []), *new]))[:20]
                self.record.save()
        if "reason" not in row:
            self.expected += expected
            self.took += time.monotonic() - began
        if not row.get("failed"):  # what failed is tried again, from where it was saved
            (self.folder / _CURRENT).unlink(missing_ok=True)

    def _run(self, job: _Job, splits: data.Splits, progress: Progress, inner: TaskID) -> None:
        record, row = self.record, ROWS[job.key]
        iterations = self.settings.config.iterations
        if job.budget == "time":
            iterations = record.time_iterations(job.key) or iterations
        case = self._case(splits, job.seed, iterations)
        progress.reset(inner, description=job.name, total=iterations, status="")
        measuring = job.budget == "iterations" and job.seed == self.settings.seeds[0]
        result = record.same(job.key, job.seed, iterations)
        method = None
        if result is None:
            watch = self._watch(job, progress, inner)
            result, method = runs.train(row, case, watch, self._state(job))
        if measuring and "costs" not in record.row(job.key):
            progress.update(inner, status="measuring")
            record.row(job.key)["costs"] = runs.costs(row, case, method, result.get("ratios"))
        record.row(job.key)["runs"][job.budget][str(job.seed)] = result

    def _watch(self, job: _Job, progress: Progress, inner: TaskID) -> runs.Watch:
        def show(iteration: int, loss: float) -> None:
            progress.update(inner, completed=iteration, status=f"loss {loss:.2f}")

        return runs.Watch(
            show, lambda: self.stop.asked, partial(self._keep, job), self.settings.config.checkpoint_seconds
        )

    def _keep(self, job: _Job, state: dict[str, Any]) -> None:
        content = {"job": dataclasses.asdict(job), "state": state}
        checkpoint.save(content, self.folder / _CURRENT)

    def _state(self, job: _Job) -> dict[str, Any] | None:
        """What this run was stopped with."""
        path = self.folder / _CURRENT
        if not path.exists():
            return None
        try:
            content = checkpoint.load(path, self.settings.config.device)
            state: dict[str, Any] | None = content["state"] if content["job"] == dataclasses.asdict(job) else None
        except (BpfxError, LookupError, TypeError):
            self.console.print(f"{path} cannot be read; the run begins again", soft_wrap=True)
            return None
        return state

    # --- what is seen -------------------------------------------------------------------------------------------------

    def _tell(self, job: _Job, runs_left: int, left: str) -> None:
        row = self.record.row(job.key)
        run = self.record.run(job.key, job.budget, job.seed)
        if "reason" in row:
            result = f"{'failed' if row['failed'] else 'refused'}: {row['reason']}"
        elif run is None:
            return
        else:
            result = f"{100 * run['accuracy']:.1f} % after {run['iterations']} iterations"
            result += f", diverged at {run['diverged']}" if run["diverged"] is not None else ""
        if not self.console.is_terminal or "reason" in row:
            self.console.print(f"{job.name}: {result} ({runs_left} to go, {left})", soft_wrap=True)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<46}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
