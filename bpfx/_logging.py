"""Loggers under ``bpfx``, and ``BPFX_LOGS`` that switches them on as ``TORCH_LOGS`` does for torch.

``BPFX_LOGS="capture,+offset"``: a name shows a logger's INFO lines, ``+`` its DEBUG lines too, ``-`` only errors;
``all`` stands for every logger. Without the variable nothing is shown, and the loggers are there for whoever configures
:mod:`logging` himself.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from bpfx._ranks import is_rank_zero
from bpfx.errors import BpfxError, suggest

VARIABLE = "BPFX_LOGS"
NAMES = {
    "capture": "rungs that were tried, and captures anew for another shape",
    "partition": "the blocks that were chosen; +: the whole plan",
    "graphs": "the code of the two emitted steps",
    "offset": "every refresh; +: its measurements block by block",
}
_LEVELS = {"+": logging.DEBUG, "-": logging.ERROR}

logging.getLogger("bpfx").addHandler(logging.NullHandler())


def logger(name: str) -> logging.Logger:
    """The logger ``bpfx.<name>``."""
    assert name in NAMES, name
    return logging.getLogger(f"bpfx.{name}")


def configure(setting: str, stream: TextIO | None = None) -> None:
    """Show what ``setting`` names, on stderr, in the first process only.

    Args:
        setting: what the variable holds.
        stream: instead of stderr.

    Raises:
        BpfxError: an unknown name.

    Example:
        >>> configure("capture,+offset")
        >>> logger("offset").level == logging.DEBUG
        True
        >>> configure("-all")
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    root = logging.getLogger("bpfx")
    for old in [h for h in root.handlers if getattr(h, "of_bpfx", False)]:
        root.removeHandler(old)
    for part in filter(None, (p.strip() for p in setting.split(","))):
        sign, name = (part[0], part[1:]) if part[0] in _LEVELS else ("", part)
        if name != "all" and name not in NAMES:
            raise BpfxError(f"{VARIABLE}={setting!r}: no logger {name!r}; {suggest(name, [*NAMES, 'all'])}")
        for chosen in NAMES if name == "all" else [name]:
            logger(chosen).setLevel(_LEVELS.get(sign, logging.INFO))
    if is_rank_zero():
        handler.of_bpfx = True  # type: ignore[attr-defined]
        root.addHandler(handler)
