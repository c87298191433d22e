"""What may be passed to :func:`bpfx.convert`, refused in words where it cannot work."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from bpfx._sharded import refuse_divided
from bpfx.errors import BpfxError
from bpfx.passes.batch import LossFn

OWN = "local"  # as loss_fn: the local loss judges the model's output, too


def check_loss_fn(loss_fn: Any) -> LossFn | None:
    """Raise unless it can be a loss."""
    if isinstance(loss_fn, str) or not (loss_fn is None or callable(loss_fn)):
        raise BpfxError(
            f"loss_fn={loss_fn!r}: pass loss_fn(output, target), None for a model that returns its loss, "
            f"or {OWN!r} for a label-free local loss without targets"
        )
    return loss_fn


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a module that can be converted."""
    from bpfx.step import Step

    if isinstance(model, Step):
        raise BpfxError("this model is converted already; call the step, or convert step.model anew")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrapped):
        raise BpfxError(
            f"the model is wrapped in {type(model).__name__}; convert the model inside it, model.module, instead"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise BpfxError(
            "the model is wrapped by torch.compile; convert the original module and pass compile='inductor'"
        )
    if not isinstance(model, nn.Module):
        raise BpfxError(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    refuse_divided(model, "convert first, then call fully_shard on modules of step.model")


def parse_bytes(size: float | str) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number of bytes.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    text = f"{size:.0f}" if isinstance(size, float) and math.isfinite(size) else str(size)
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if isinstance(size, bool) or match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise BpfxError(f"memory_budget={size!r}: pass bytes as a number, or a size such as '2GiB' or '500MB'")
    return int(float(match[1]) * units[match[2].lower()])
