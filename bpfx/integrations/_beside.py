"""The part of a step's state that is not the model's: heads, offsets, position in the schedule."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bpfx.errors import BpfxError
from bpfx.step import Step

MODEL = "model."


def beside(step: Step) -> dict[str, Any]:
    """``step.state_dict()`` without the model: tensors and plain values."""
    return {name: value for name, value in step.state_dict().items() if not name.startswith(MODEL)}


def restore(step: Step, state: Mapping[str, Any], origin: str) -> None:
    """Take over what :func:`beside` gave; the model is left alone.

    Raises:
        BpfxError: the state belongs to other blocks or other heads.
    """
    check(step, state, origin)
    step.load_state_dict(dict(state), strict=False)


def check(step: Step, state: Any, origin: str) -> None:
    """Raise unless ``state`` is what :func:`beside` gives for this step."""
    wanted = set(beside(step))
    if not isinstance(state, Mapping) or "_extra_state" not in state:
        raise BpfxError(f"{origin} is no state of a step; resume from a checkpoint that this integration has saved")
    step._check_blocks(state["_extra_state"])
    if wrong := sorted(wanted ^ set(state)):
        where = "the step" if wrong[0] in wanted else "the checkpoint"
        raise BpfxError(f"{wrong[0]!r} is in {where} only ({origin}); convert with the same local losses and loss_fn")


def save(step: Step, path: Path) -> None:
    """Write :func:`beside` to a file that is whole or not there."""
    written = path.with_name(path.name + ".part")
    torch.save(beside(step), written)
    os.replace(written, path)


def load(step: Step, path: Path) -> None:
    """Read what :func:`save` wrote.

    Raises:
        BpfxError: no such file, a broken one, or one of another step.
    """
    if not path.is_file():
        raise BpfxError(
            f"{path} does not exist, so heads and offsets cannot be restored; resume from a checkpoint that was saved "
            "with bpfx, or load its weights into the model and start anew"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BpfxError(f"{path} cannot be read ({str(error).splitlines()[0][:120]}); use another checkpoint") from None
    restore(step, state, str(path))
