"""Folders and JSON for results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bpfx.errors import BpfxError


def make_folder(folder: Path) -> Path:
    """The folder, made with those above it where it is not there.

    Raises:
        BpfxError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BpfxError(f"Cannot make the folder {folder}: {error.strerror or error}; choose another.") from None
    return folder


def finite(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null.

    Example:
        >>> finite({"loss": [1.0, math.nan]})
        {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
