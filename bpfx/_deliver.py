"""How gradients that are there already leave through ``loss.backward()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bpfx._loss_scale import LossScale
from bpfx.errors import BpfxError


class Deliver(torch.autograd.Function):
    """Carries gradients that are computed already out of ``loss.backward()``, so that hooks and accumulation work."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], scale: LossScale, *parameters: Tensor) -> Tensor:
        ctx.grads, ctx.loss_scale = grads, scale
        return loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        if ctx.grads is None:
            raise BpfxError(
                "this loss was differentiated already; its gradients are computed once per call of the step"
            )
        ctx.loss_scale.saw(scale)
        grads, ctx.grads = ctx.grads, None
        # In place: a second set of gradients would double what the local step saves. Times 1 changes no bit.
        scaled = (g.mul_(scale) if (g := grads.pop(0)) is not None else None for _ in range(len(grads)))
        return None, None, None, *scaled
