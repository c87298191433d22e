"""Loss scaling inside a step: under float16 autocast, blocks differentiate a loss that is scaled as the caller's is.

A step's gradients are there before ``scaler.scale(loss).backward()`` multiplies anything, so the scaler alone would
come too late to keep small activation gradients from vanishing in float16. The step takes over, for the next step, the
factor that arrived in the last backward; parameters' gradients are divided by it again at once, so offsets, norms and
clips never see it. It is a power of two, which changes no bit of what does not underflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bpfx.errors import BpfxError
from bpfx.passes.precision import autocast_state


class LossScale:
    """The factor of one step.

    Example:
        >>> scale = LossScale()
        >>> with torch.autocast("cpu", torch.float16):
        ...     scale.saw(torch.tensor(65536.0))
        ...     scale.now()
        65536.0
        >>> scale.now()
        1.0
    """

    def __init__(self) -> None:
        self._seen: Tensor | float | None = None
        self.current = 1.0

    def saw(self, factor: Tensor) -> None:
        """Note what a backward brought; read only where it is needed, since a GPU would have to be waited for."""
        self._seen = factor.detach()

    def now(self) -> float:
        """What to multiply losses by: 1 outside float16 autocast, and before the first backward. Stays ``current``."""
        factor = float(self._seen) if self._seen is not None and halves() else 1.0
        usable = math.isfinite(factor) and factor > 0
        self.current = 2.0 ** math.floor(math.log2(factor)) if usable else 1.0
        return self.current

    def state(self) -> float | None:
        """The factor for the next step; ``None`` for 1, which every step without a scaler has."""
        factor = 1.0 if self._seen is None else float(self._seen)
        return None if factor == 1.0 else factor

    def load(self, state: float | None) -> None:
        self._seen = state


def halves() -> bool:
    """Whether autocast computes in float16 now."""
    return any(dtype is torch.float16 for _, dtype in autocast_state())


def refuse_halves() -> None:
    """Raise under float16 autocast, for who steps the optimizers itself and has no scaler.

    Raises:
        BpfxError: autocast is on, with float16.
    """
    if halves():
        raise BpfxError(
            "bpfx.BlockTrainer steps its optimizers itself and knows no GradScaler, which float16 needs; "
            "use torch.autocast with torch.bfloat16, or the drop-in step with torch.amp.GradScaler"
        )
