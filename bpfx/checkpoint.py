"""Files that are whole or not there, and that no program can hide in: what runs of any length save and load."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bpfx.errors import BpfxError


def save(state: Any, path: str | Path) -> None:
    """Write a state so that the file is the old one or the new one at every moment, whenever the process is killed.

    It is written beside ``path`` (as ``NAME.new``), flushed to the disk, and renamed.

    Args:
        state: tensors and plain values in dicts, lists and tuples, as ``state_dict()`` gives.
        path: where to; its folder exists.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"weight": torch.ones(2), "iteration": 7}, f"{folder}/state.pt")
        ...     load(f"{folder}/state.pt")["iteration"]
        7
    """
    replace(Path(path), lambda beside: torch.save(state, beside))


def load(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """Read what :func:`save` (or ``torch.save`` of tensors and plain values) wrote; no code in the file is run.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        BpfxError: no such file, an empty or truncated one, one of another kind, or one that holds more than tensors
            and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise BpfxError(f"there is no checkpoint {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever such a file makes the reader raise
        raise BpfxError(f"The checkpoint {path} cannot be read: {_reason(path, error)}; use another one") from None


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside `path`, then rename: a reader, or a run killed here, finds the old file or the new, never a half."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def _reason(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "it is empty"
    if not zipfile.is_zipfile(path):  # the table of contents stands at the end of such a file
        with path.open("rb") as file:
            torn = file.read(2) == b"PK"
        return "it is cut off" if torn else "torch.save did not write it"
    if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
        return "it holds more than tensors and plain values, which could run a program"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"it is damaged ({first[:120]})"
