"""The one exception class of bpfx."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BpfxError(Exception):
    """Something the caller can put right: what was wrong, with which value, and what would work."""


class BpfxWarning(UserWarning):
    """Something the caller should know, while training goes on."""


def suggest(name: str, known: Iterable[str], limit: int = 5) -> str:
    """Return a half sentence that names the nearest known names.

    Example:
        >>> suggest("layr1", ["layer1", "layer2", "fc"])
        "did you mean 'layer1', 'layer2'?"
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.5)
    if near:
        return "did you mean " + ", ".join(repr(n) for n in near) + "?"
    shown = ", ".join(repr(n) for n in names[:limit])
    return f"known names: {shown}" + (f" and {len(names) - limit} more" if len(names) > limit else "")
