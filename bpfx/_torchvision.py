"""Keep ``import torchvision`` alive when its wheel and torch were built for different devices.

torchvision declares its operators in a compiled library. When the wheel is built for CUDA and torch for the CPU, that
library does not load, and torchvision then fails while it registers fake kernels for operators nobody declared
(``operator torchvision::nms does not exist``). timm, transformers and peft import torchvision and fail with it.
Declaring the two schemas first is enough: only non-maximum suppression itself stays unavailable.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["ensure"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Declarations live only as long as the Library that made them.
_declared: list[torch.library.Library] = []


def ensure() -> bool:
    """Declare torchvision's two missing operators if, and only if, its own library does not load.

    Safe to call any number of times, and cheap: torchvision itself is never imported. Must run before anything imports
    torchvision, timm, peft or transformers; ``import bpfx`` does so.

    Returns:
        True if the schemas are declared by bpfx, False if there was nothing to do.

    Example:
        >>> from bpfx import _torchvision
        >>> _torchvision.ensure() == _torchvision.ensure()
        True
    """
    if _declared:
        return True
    # Imported already: it works, or its failure has been seen.
    if sys.modules.get("torchvision") is not None or hasattr(torch.ops.torchvision, "nms"):
        return False
    library = _own_library()
    if library is None:
        return False
    try:
        # What torchvision does itself on import; loading twice is harmless.
        torch.ops.load_library(str(library))
    except OSError:
        declaration = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            declaration.define(schema)
        _declared.append(declaration)
        return True
    return False


def _own_library() -> Path | None:
    """Path of torchvision's compiled library; None where torchvision is not installed or has none."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    candidates = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)
