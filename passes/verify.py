"""Verification: one step of the captured graph against one step of the untouched model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from bpfx.passes.graph import ModelGraph, Weights
from bpfx.passes.precision import outside_autocast, uncached
from bpfx.passes.reference import SEED, Reference
from bpfx.passes.rng import preserve, preserved

# Equal programs agree to the last bit; the allowance is for a kernel that sums in another order.
RTOL = 1e-4


@dataclasses.dataclass
class Mismatch:
    """What differed from the plain model, in words."""

    reason: str


def verify(graph: ModelGraph, weights: Weights, reference: Reference, tensors: Sequence[Tensor]) -> Mismatch | None:
    """Return ``None`` when loss, every gradient and every buffer equal the reference's; otherwise what differs."""
    names = list(reference.grads)
    gm = fx.GraphModule(graph.root, graph.graph)
    values = []
    queue = iter(tensors)  # copied below: a model may write into its inputs
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values.append(weights[graph.weight_of[node]] if node in graph.weight_of else next(queue).clone())
    with preserve(weights), preserved(SEED), torch.enable_grad():
        with uncached():
            loss, *_ = gm(*values)
        if not loss.requires_grad:
            return Mismatch("the captured loss carries no gradient")
        with outside_autocast():
            found = torch.autograd.grad(loss, [weights[n] for n in names], allow_unused=True)
        buffers = {name: weights[name].detach().clone() for name in weights.buffer_names}
    if not close(loss.detach(), reference.loss):
        return Mismatch(f"loss {float(loss):.6g} instead of {float(reference.loss):.6g}")
    for name, got in zip(names, found, strict=True):
        expected = reference.grads[name]
        if (got is None) != (expected is None):
            zero = expected if got is None else got
            if zero is not None and bool(zero.any()):
                return Mismatch(f"gradient of {name} is {'missing' if got is None else 'there, plainly there is none'}")
        elif got is not None and expected is not None and not close(got, expected):
            return Mismatch(f"gradient of {name} differs by {difference(got, expected):.2g} of its norm")
    for name, expected in reference.buffers.items():
        if not close(buffers[name], expected):
            return Mismatch(f"buffer {name} differs after the step")
    return None


def difference(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding, measured over the whole tensor; NaN equals NaN."""
    if got.shape != expected.shape:
        return False
    if got.is_complex():
        return close(torch.view_as_real(got.resolve_conj()), torch.view_as_real(expected.resolve_conj()))
    if not got.is_floating_point():
        return bool(torch.equal(got, expected))
    if torch.equal(got, expected):
        return True
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite):
        return False
    got, expected = got[finite].detach(), expected[finite].detach()
    scale = expected.double().norm()
    return bool((got.double() - expected.double()).norm() <= RTOL * scale + 1e-7 * got.numel() ** 0.5)
