"""Which models `bpfx.convert` takes as they are, and whether its BP gradients equal autograd's.

    python benchmarks/coverage.py                                        # whatever is missing or has failed
    python benchmarks/coverage.py --library timm --only 'res*,vit*'      # some of one library
    python benchmarks/coverage.py --library transformers --limit 20      # the first 20
    python benchmarks/coverage.py --only llama --again                   # one once more
    python benchmarks/coverage.py --report-only                          # tables from what is there

Every classification and segmentation model of torchvision (and its detectors), of timm the smallest model of every
architecture family, and every transformers architecture that trains on text, images or audio and of which a tiny random
configuration can be made by setting sizes. Nothing is downloaded. Each is converted with `bpfx.convert(model, loss_fn,
batch, offset=None)`, no other argument, in float32; then one BP step and one local step run. A second
process works the models off; it is replaced when it dies or a model takes too long. Writes OUT.json and OUT.md, and the
tables of docs/coverage.md where OUT is the default.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait without spinning; read when torch starts
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be downloaded
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from coverage_measure import serve
from coverage_models import LIBRARIES, Job, jobs, smallest, timm_families
from coverage_report import markdown, summary, write_docs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "coverage.md"
SHORT, LONG = 25, 6 * 2**30  # models, and bytes, after which a worker is replaced: captures leave caches behind

Run = dict[str, Any]


class Worker:
    """A process that measures, replaced when it dies, is late, or has grown."""

    def __init__(self, limit: float, *settings: Any) -> None:
        self.limit, self.settings = limit, settings
        self.process: Any = None
        self.done = 0

    def measure(self, job: Job) -> Run:
        """The result of one model, or how it ended without one."""
        if self.process is None or not self.process.is_alive():
            self._start()
        began = time.perf_counter()
        self.connection.send(job)
        try:
            if not self.connection.poll(self.limit):
                self.stop(kill=True)
                result = {"status": "failed", "reason": f"no result within {self.limit:.0f} s"}
                return result | {"seconds": round(time.perf_counter() - began, 1)}
            result, held = self.connection.recv()
        except EOFError:
            self.process.join()
            code, self.process = self.process.exitcode, None
            result = {"status": "failed", "reason": f"the process died (exit code {code})"}
            return result | {"seconds": round(time.perf_counter() - began, 1)}
        self.done += 1
        if self.done >= SHORT or held > LONG:
            self.stop()
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.settings), daemon=True)
        self.process.start()
        theirs.close()
        self.done = 0

    def stop(self, kill: bool = False) -> None:
        """End the process, at once or after what it does."""
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.connection.send(None)
        self.process.join()
        self.connection.close()
        self.process = None


# --- which ------------------------------------------------------------------------------------------------------------


def families(stored: dict[str, Any]) -> dict[str, str]:
    """The smallest model of every timm family: counted once per version of timm, which takes minutes."""
    version = importlib.metadata.version("timm")
    known = stored.get("timm_families", {})
    if known.get("version") == version:
        return dict(known["smallest"])
    print("counting the parameters of all timm models …", file=sys.stderr, flush=True)
    found = {family: smallest(names) for family, names in timm_families().items()}
    stored["timm_families"] = {"version": version, "smallest": found}
    return found


def chosen(parsed: argparse.Namespace, stored: dict[str, Any]) -> list[Job]:
    """The models that are asked for."""
    asked = []
    for library in parsed.library:
        found = jobs(library, families(stored) if library == "timm" else {})
        if parsed.only is not None:
            patterns = parsed.only.split(",")
            found = [j for j in found if any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (j.key, j.name))]
        asked += found[: parsed.limit]
    return asked


def missing(asked: list[Job], parsed: argparse.Namespace, parts: dict[str, Run]) -> Iterator[Job]:
    """Those without a result, and those that have failed; all of them with --again."""
    for job in asked:
        if parsed.again or not settled(parts.get(job.key)):
            yield job


def settled(run: Run | None) -> bool:
    """Whether there is a result that needs no second try."""
    return run is not None and run["status"] in ("exact", "not built")


# --- the command line -------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default=",".join(LIBRARIES), help="separated by commas (default: all three)")
    parser.add_argument("--only", metavar="MODELS", help="names or patterns separated by commas, such as 'res*,vit*'")
    parser.add_argument("--limit", type=int, help="at most so many models of each library (default: all)")
    parser.add_argument("--again", action="store_true", help="repeat models that have a result")
    parser.add_argument("--report-only", action="store_true", help="convert nothing; tables from what is there")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one model (default: 600)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--memory", type=float, help="GiB of address space for one process (default: no limit)")
    parser.add_argument("--verbose", action="store_true", help="show what the models print")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage", help="where results go, without an ending")
    parsed = parser.parse_args(arguments)
    parsed.library = parsed.library.split(",")
    unknown = [name for name in parsed.library if name not in LIBRARIES]
    if unknown:
        parser.error(f"--library: unknown library {unknown[0]!r}; known are {', '.join(LIBRARIES)}")
    for name in ("limit", "timeout", "threads", "memory"):
        value = getattr(parsed, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: expected a number above 0, got {value}")
    return parsed


def main(arguments: list[str]) -> int:
    parsed = parse(arguments)
    path = parsed.out.with_name(parsed.out.name + ".json")
    stored = load(path)
    parts: dict[str, Run] = stored["parts"]
    if parsed.report_only:
        if not parts:
            print(f"{path} holds no results; run without --report-only first.", file=sys.stderr)
            return 2
        return report(stored, parsed.out)
    asked = chosen(parsed, stored)
    if not asked:
        print(f"error: --only {parsed.only!r} matches no model; one is 'torchvision/resnet18'", file=sys.stderr)
        return 2
    todo = list(missing(asked, parsed, parts))
    versions = {name: importlib.metadata.version(name) for name in ("bpfx", "torch", *LIBRARIES)}
    made_with = versions | {"python": platform.python_version(), "threads": parsed.threads}
    console = Console(stderr=True)
    console.print(f"{len(asked) - len(todo)} of {len(asked)} models are there, {len(todo)} to go", highlight=False)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    worker = Worker(parsed.timeout, parsed.threads, not parsed.verbose, parsed.memory)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(todo))
        try:
            for job in todo:
                progress.update(bar, description=job.key)
                if not parsed.again and settled(load(path)["parts"].get(job.key)):  # another process was faster
                    progress.advance(bar)
                    continue
                run = worker.measure(job)
                date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                command = f"python benchmarks/coverage.py --library {job.library} --only {job.name} --again"
                own = {"library": job.library, "name": job.name, "task": job.task, "family": job.family}
                run = own | run | {"made_with": made_with, "command": command, "date": date}
                save(path, stored, {job.key: run})
                progress.advance(bar)
                said = run.get("reason") or f"{run['rung']}, {run['blocks']} blocks, error {run['error']:.1g}"
                text = f"{job.key}: {run['status']}: {said[:150]} ({run['seconds']} s)"
                console.print(text, soft_wrap=True, markup=False, highlight=False)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from there.", file=sys.stderr)
            return 130
        finally:
            worker.stop(kill=True)
    return report(stored, parsed.out)


def load(path: Path) -> dict[str, Any]:
    """What is stored, by the keys ``parts`` and ``timm_families``."""
    return {"parts": {}, **(json.loads(path.read_text("utf-8")) if path.exists() else {})}


def save(path: Path, stored: dict[str, Any], new: dict[str, Run]) -> None:
    """Add results, whole or not at all: a sweep may be stopped while it writes, and two may share the work."""
    stored["parts"] |= load(path)["parts"] | new
    stored["parts"] = dict(sorted(stored["parts"].items(), key=lambda item: LIBRARIES.index(item[1]["library"])))
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)


def report(stored: dict[str, Any], out: Path) -> int:
    """Write the tables; 1 where a model could not be converted with equal gradients."""
    parts = stored["parts"]
    table = out.with_name(out.name + ".md")
    table.write_text(markdown(parts), "utf-8")
    written = [str(table)]
    if out == RESULTS / "coverage" and DOCS.exists():
        DOCS.write_text(write_docs(DOCS.read_text("utf-8"), parts), "utf-8")
        written.append(str(DOCS))
    print(summary(parts))
    print(f"Wrote {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
