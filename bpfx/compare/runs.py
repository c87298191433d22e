"""One run: train a row with a seed for so many iterations and test it; and what a step of it costs beside one of BP."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bpfx import _measure
from bpfx import train as training
from bpfx._config import example_batch
from bpfx._runs import batches, random_state, restore_random
from bpfx.compare.methods import Case, Method, plain
from bpfx.compare.rows import Row
from bpfx.errors import BpfxError
from bpfx.memory import measure_peak

__all__ = ["Refused", "Stopped", "Watch", "costs", "reference", "train"]

Batch = tuple[torch.Tensor, torch.Tensor]
_WINDOWS = 5  # of timing
_LEAST = 4  # steps in one window
_SEARCH = 40  # steps in which a method that decides itself is given the chance of a refresh
_REFERENCES = 40  # BP steps timed in between during a whole run


class Stopped(Exception):
    """The run was asked to stop; carries what it continues from."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__("stopped")
        self.state = state


@dataclasses.dataclass
class Watch:
    """How a run is looked at from outside.

    Attributes:
        progress: told the iteration and the loss after every step.
        stop: asked after every step whether to save and stop.
        save: given the run's state every `seconds`.
        seconds: see `save`.
    """

    progress: Callable[[int, float], None] = lambda iteration, loss: None
    stop: Callable[[], bool] = lambda: False
    save: Callable[[dict[str, Any]], None] = lambda state: None
    seconds: float = math.inf


class Refused(BpfxError):
    """A row does not work for a model, now or ever; other errors (data that cannot be read) may pass."""


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except BpfxError as error:
        raise Refused(str(error)) from error


def reference(case: Case) -> Method:
    """BP on a model of its own, to time steps beside: the time of a step does not depend on its weights."""
    return Method(plain(case), case)


def train(row: Row, case: Case, watch: Watch, state: dict[str, Any] | None = None) -> tuple[dict[str, Any], Method]:
    """Train from the same weights and on the same data as any row with this seed, and test.

    Args:
        row: what is trained.
        case: settings; its `iterations` are made.
        watch: progress and stopping.
        state: of a run that was stopped.

    Returns:
        `iterations`, `accuracy` (a share), `curve` (pairs of iteration and accuracy), `cosine`, `diverged` (None, or
        the iteration at which the loss was not finite), `seconds`, and `ratios` of time where the method itself decides
        about its steps; and the trained method.

    Raises:
        Refused: the row does not work for this model.
        Stopped: `watch` asked for it.
    """
    config = case.config
    with _refusing():
        method = (row.trained or row.make)(case)
    beside = reference(case) if method.cycle is None else None
    torch.manual_seed(config.seed + 1)
    run: dict[str, Any] = {"curve": [], "cosines": [], "diverged": None, "seconds": [], "bp_seconds": []}
    if state is not None:
        run = dict(state["run"])
        method.load_state_dict(state["method"])
        method.trainee.new_cosines()  # those before the stop are in the state already
        restore_random(state["random"])

    def freeze() -> dict[str, Any]:
        return {"run": run, "method": method.state_dict(), "random": random_state()}

    probe = example_batch(config, case.splits)
    every = config.eval_every or max(1, case.iterations // 8)
    apart = max(1, case.iterations // _REFERENCES)
    saved = time.monotonic()
    source = batches(case.splits.train, config, method.iteration)
    while method.iteration < case.iterations and run["diverged"] is None:
        x, y = next(source)
        began = time.perf_counter()
        with _refusing():
            loss = method.advance(x, y)
        run["seconds"].append(time.perf_counter() - began)
        if beside is not None and method.iteration % apart == 0:
            with torch.random.fork_rng():
                run["bp_seconds"].append([method.iteration, _timed(beside, (x, y))])
        if not math.isfinite(loss):
            run["diverged"] = method.iteration
        run["cosines"] += method.trainee.new_cosines()
        last = method.iteration == case.iterations or run["diverged"] is not None
        if last or method.iteration % every == 0:
            accuracy = training.evaluate(method.trainee, case.splits.test, config.batch_size, config.device)
            run["curve"].append([method.iteration, accuracy])
            step = method.trainee.step
            if step is not None and step.offset is None and not row.exact and run["diverged"] is None:
                run["cosines"].append(_measure.cosine(step, *probe))
        watch.progress(method.iteration, loss)
        if watch.stop():
            raise Stopped(freeze())
        if time.monotonic() - saved >= watch.seconds:
            watch.save(freeze())
            saved = time.monotonic()
    # A block whose gradient is exactly zero has no direction, hence no cosine.
    cosines = [value for value in run["cosines"] if math.isfinite(value)]
    result = {
        "iterations": case.iterations,
        "accuracy": run["curve"][-1][1],
        "curve": run["curve"],
        "cosine": statistics.fmean(cosines) if cosines else None,
        "diverged": run["diverged"],
        "seconds": sum(run["seconds"]),
    }
    if run["bp_seconds"]:
        result["ratios"] = _ratios(run["seconds"], run["bp_seconds"])
    return result, method


def _ratios(seconds: list[float], beside: list[list[float]]) -> list[float]:
    """Mean step over mean BP step in windows of a run, beginning with the second step where there are more."""
    stretch = max(1, math.ceil(len(beside) / _WINDOWS))
    ratios, start = [], min(1, len(seconds) - 1)
    for first in range(0, len(beside), stretch):
        part = beside[first : first + stretch]
        own = seconds[start : int(part[-1][0])]
        if own:
            ratios.append(statistics.fmean(own) / statistics.fmean(took for _, took in part))
        start = int(part[-1][0])
    return ratios


def _timed(method: Method, batch: Batch) -> float:
    began = time.perf_counter()
    method.advance(*batch)  # ends with the loss as a number, which waits for the device
    return time.perf_counter() - began


def costs(row: Row, case: Case, trained: Method | None, ratios: list[float] | None) -> dict[str, Any]:
    """Time and memory of whole training steps, optimizer included, beside those of BP on the same batch.

    Args:
        row: what is measured.
        case: settings.
        trained: the method as its training has left it; None: one that has not been trained.
        ratios: of time, where the training has them already.

    Returns:
        `ratio` (median over windows; over a whole run: the mean), `ratios` of the windows, `over` ("windows" or "run"),
        `bp_seconds` and `bp_peak_bytes` of a BP step, `peak_bytes` of the most expensive step.

    Raises:
        Refused: the row does not work for this model.
    """
    batch = example_batch(case.config, case.splits)
    with _refusing():
        method = trained if trained is not None and row.trained is None else row.make(case)
    beside = reference(case)
    for one in (beside, method):  # caches, and the optimizer's state where nothing has been trained
        one.advance(*batch)
    over = "windows" if ratios is None else "run"
    pairs: list[tuple[float, float]] = []
    window = _window(method.cycle)
    for turn in range(_WINDOWS * window if ratios is None else _LEAST):
        # In turn, so that a slow minute slows both sides; and each first as often, since the first finds cold caches.
        order = (beside, method) if turn % 2 else (method, beside)
        took = {id(one): _timed(one, batch) for one in order}
        pairs.append((took[id(beside)], took[id(method)]))
    if ratios is None:
        parts = [pairs[i : i + window] for i in range(0, len(pairs), window)]
        ratios = [sum(own for _, own in part) / sum(bp for bp, _ in part) for part in parts]
    return {
        "ratio": statistics.fmean(ratios) if over == "run" else statistics.median(ratios),
        "ratios": ratios,
        "over": over,
        "bp_seconds": statistics.median(bp for bp, _ in pairs),
        "bp_peak_bytes": _peak(beside, batch),
        "peak_bytes": _peak(method, batch),
    }


def _window(cycle: int | None) -> int:
    """Steps in a window: whole cycles, and not too few."""
    cycle = cycle or _LEAST
    return cycle * math.ceil(_LEAST / cycle)


def _peak(method: Method, batch: Batch) -> int:
    """Bytes of the most expensive step above what lives between steps: of a whole cycle, or up to a refresh."""
    highest, before = 0, method.refreshes
    for _ in range(method.cycle or _SEARCH):
        highest = max(highest, measure_peak(lambda: method.advance(*batch), warmup=0).peak_bytes)
        if method.refreshes > before:  # no step is more expensive than one that refreshes
            break
    return highest
