"""Gradient matching: a head learns to send the gradient into its block that back-propagation sends there.

At a refresh the true gradient at every boundary is at hand. A head with parameters φ that gives the gradient
c(φ) = ∂ℓ/∂h there is trained, besides on its own loss, on

    1 − cos(c(φ), ∂L/∂h)

which reaches φ alone, through the head's own backward, and costs no pass over the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bpfx._gradients import Grads
from bpfx.errors import BpfxError, BpfxWarning
from bpfx.passes.precision import outside_autocast
from bpfx.passes.programs import BoundaryLoss, LocalGradient


def check_matching(weight: float, programs: Iterable[object]) -> None:
    """Raise where heads cannot match the gradient at their block's own boundary, and warn where none learns to.

    Args:
        weight: ``Offset(match=…)``.
        programs: the local steps of all blocks.

    Raises:
        BpfxError: a local loss looks further than its block.
    """
    local = [p for p in programs if isinstance(p, LocalGradient)]
    far = next((p for p in local if p.ahead), None)
    if far is not None:
        raise BpfxError(
            f"Offset(match={weight}) needs horizon 1, since a head is to match the gradient at its own block's "
            f"boundary; the local loss of block {far.block.index} looks {len(far.ahead)} further"
        )
    if not any(p.local_loss is not None and p.local_loss.parameter_names for p in local):
        warnings.warn(
            f"Offset(match={weight}) does nothing: it trains the heads, and no local loss here has one with parameters",
            BpfxWarning,
            stacklevel=4,
        )


def matching_gradient(
    program: LocalGradient,
    outputs: Mapping[str, Any],
    arguments: Mapping[str, Any],
    cotangents: Mapping[str, Tensor | None],
) -> Grads:
    """Gradient of 1 − cos over all boundary tensors together, by parameter of the head; empty where there is nothing.

    Args:
        program: the block's local step.
        outputs: the block's outputs by name.
        arguments: what the head reads besides, by name: the caller's tensors and what enters the block.
        cotangents: the BP gradient of the outputs, by name.

    Raises:
        BpfxError: the head's backward cannot be differentiated.
    """
    loss = program.local_loss
    if loss is None or not loss.parameter_names:
        return {}
    features = [outputs[n] for n in program.feature_names]
    wanted = [i for i, n in enumerate(program.feature_names) if cotangents.get(n) is not None]
    if not wanted:
        return {}
    given = [cotangents[program.feature_names[i]] for i in wanted]
    buffers = [b.clone() for b in loss.head.buffers()]  # its running statistics move once per step
    leaves = [f.detach().requires_grad_() if i in wanted else f for i, f in enumerate(features)]
    try:
        with torch.enable_grad():
            value = loss.plain(
                leaves,
                [arguments.get(n) for n in program.user_inputs],
                [arguments[n] for n in program.entering_names],
            )
            with outside_autocast():
                own = torch.autograd.grad(value, [leaves[i] for i in wanted], create_graph=True, allow_unused=True)
            distance = _distance(own, given)
            if distance is None or not distance.requires_grad:
                return {}
            return _gradients(distance, loss)
    except RuntimeError as error:
        if "derivative" not in str(error) and "double backward" not in str(error):
            raise
        raise BpfxError(
            f"Offset(match=…): the backward of the local loss {loss.name!r} of block {loss.block} cannot be "
            f"differentiated ({str(error).splitlines()[0]}); pass match=0, or another local loss there"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, before in zip(loss.head.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _distance(own: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> Tensor | None:
    pairs = [(a, b.detach()) for a, b in zip(own, given, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    precise = torch.promote_types(pairs[0][0].dtype, torch.float32)
    flat = [(a.flatten().to(precise), b.flatten().to(precise)) for a, b in pairs]
    product = torch.stack([torch.dot(a, b) for a, b in flat]).sum()
    squares = [torch.stack([v[side].square().sum() for v in flat]).sum() for side in (0, 1)]
    if not all(0 < float(s.detach()) < float("inf") for s in squares):  # also a piece that is not finite
        return None
    return 1 - product / (squares[0].sqrt() * squares[1].sqrt())


def _gradients(distance: Tensor, loss: BoundaryLoss) -> Grads:
    with outside_autocast():
        found = torch.autograd.grad(distance, loss.parameters_now(), allow_unused=True)
    return {n: g for n, g in zip(loss.parameter_names, found, strict=True) if g is not None}
