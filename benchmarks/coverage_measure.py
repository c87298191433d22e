"""How `coverage.py` judges one conversion: against plain autograd on the same model, before bpfx has seen it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import resource
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from coverage_models import Case, Job, NotBuilt, case_of, trained
from torch import Tensor, nn

import bpfx

SEED = 7
TOLERANCE = 1e-4
# Of all gradients' norm: a tensor whose gradient is far smaller is rounding alone.
FLOOR = 1e-2
LONG = 1500  # characters of an error message


def seed_all() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, and its name: the norm of the difference over the norm of the tensor and a
    hundredth of all gradients' norm. An absent gradient counts as zero, NaN where plain BP has none as infinite."""
    total = math.sqrt(sum(float(t.double().square().nansum()) for t in expected.values()))
    worst, where = 0.0, ""
    for name in actual.keys() | expected.keys():
        a, e = actual.get(name), expected.get(name)
        a = torch.zeros_like(e) if a is None and e is not None else a
        e = torch.zeros_like(a) if e is None and a is not None else e
        assert a is not None and e is not None
        if torch.equal(a.isfinite(), e.isfinite()):
            a, e = a[e.isfinite()].double(), e[e.isfinite()].double()
            error = float((a - e).norm()) / max(float(e.norm()) + FLOOR * total, 1e-300)
        else:
            error = math.inf
        if error > worst:
            worst, where = error, name
    return worst, where


def rung_of(capture: list[str]) -> str:
    """How the model was captured, from the plan's last line."""
    if "opaque module" in capture[-1]:
        return "export with opaque modules"
    return capture[-1].split(":")[0].replace("non-strict export", "export")


def judged(case: Case) -> dict[str, Any]:
    """Convert, run both steps, compare."""
    model = case.model
    before = {n: b.detach().clone() for n, b in model.named_buffers()}
    seed_all()
    try:
        loss, grads = trained(model, case.loss_fn, case.batch)
    except Exception as error:
        raise NotBuilt(f"plain BP fails: {type(error).__name__}: {error}") from error
    after = {n: b.detach().clone() for n, b in model.named_buffers()}
    put_back(model, before)
    began = time.perf_counter()
    step = bpfx.convert(model, case.loss_fn, case.batch, offset=None)
    seconds = time.perf_counter() - began
    arguments: dict[str, Any] = {"args": (), "kwargs": case.batch}
    if case.loss_fn is not None:
        arguments = {"args": case.batch, "kwargs": {}}
    result: dict[str, Any] = {
        "rung": rung_of(step.plan.capture),
        "opaque": len({path for block in step.plan.blocks for path in block.opaque}),
        "capture": step.plan.capture,
        "blocks": len(step.plan.blocks),
        "unreached": len(step.plan.unreached),
        "convert_seconds": round(seconds, 2),
    }
    len(step.plan.predicted)  # asking may add a note
    result["notes"] = list(step.plan.notes)
    seed_all()
    found = step.run_bp(*arguments["args"], **arguments["kwargs"])
    error, where = largest_error(found.grads, grads)
    loss_error = float((found.loss - loss).abs() / loss.abs().clamp_min(1e-12)) if bool(loss.isfinite()) else 0.0
    buffers = {n: b for n, b in model.named_buffers() if n in after and b.is_floating_point()}
    buffer_error, buffer = largest_error(buffers, {n: after[n] for n in buffers})
    result |= {"error": error, "worst": where, "loss_error": loss_error, "buffer_error": buffer_error}
    result["finite"] = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads.values())
    put_back(model, before)
    if max(error, loss_error) <= TOLERANCE and buffer_error <= TOLERANCE:
        result["status"] = "exact"
    else:
        result["status"] = "differs"
        what = f"buffer {buffer}" if buffer_error > TOLERANCE else f"gradient of {where}"
        result["reason"] = f"{what} differs by {max(error, buffer_error):.2g}; loss by {loss_error:.2g}"
        seed_all()
        _, again = trained(model, case.loss_fn, case.batch)
        put_back(model, before)
        if (own := largest_error(again, grads)[0]) > TOLERANCE:
            result["reason"] += f"; plain BP itself differs by {own:.2g} between two runs"
    seed_all()
    local = step.run_local(*arguments["args"], **arguments["kwargs"])
    bad = [n for n, g in local.grads.items() if not bool(g.isfinite().all())]
    result["local"] = "finite" if not bad else f"not finite: {bad[0]}"
    put_back(model, before)
    return result


def put_back(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Buffers as they were; those that a step has made are left alone."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])


def in_double(case: Case) -> Case:
    """The same in double precision, in which a difference by rounding is gone and a mistake is not."""
    batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, case.batch)
    return Case(case.model.double(), case.loss_fn, batch, case.words)


def measure(job: Job) -> dict[str, Any]:
    """Everything about one model: ``status`` is exact, differs, failed (with a reason), or not built."""
    began = time.perf_counter()
    result: dict[str, Any] = {"status": "failed"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_all()
        try:
            case = case_of(job)
            result["input"] = case.words
            result["parameters"] = sum(p.numel() for p in case.model.parameters())
            result |= judged(case)
            if result["status"] == "differs":
                with contextlib.suppress(Exception):
                    result["double"] = judged(in_double(case))["error"]
        except NotBuilt as error:
            result |= {"status": "not built", "reason": str(error)[:LONG]}
        except bpfx.BpfxError as error:
            result["reason"] = f"BpfxError: {error}"[:LONG]
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(last.filename)}:{last.lineno}"
            result["reason"] = f"{type(error).__name__}: {error} (at {where})"[:LONG]
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def serve(connection: Connection, threads: int, quiet: bool, memory: float | None) -> None:
    """What a worker does: measure one job after another, until it is told ``None``."""
    torch.set_num_threads(threads)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    if quiet:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        logging.disable(logging.WARNING)
    while (job := connection.recv()) is not None:
        result = measure(job)
        # Bytes on macOS, KiB elsewhere.
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        connection.send((result, held))
