"""Arithmetic on gradients by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grads = dict[str, Tensor]


def merged(parts: Sequence[Grads]) -> Grads:
    """Gradients of all blocks, each in memory of its own; a parameter that two blocks share gets the sum."""
    total: Grads = {}
    seen: set[tuple[int, int]] = set()
    for part in parts:
        for name, grad in part.items():
            if name in total:
                total[name] = total[name] + grad
                continue
            # Autograd may hand out one tensor twice (w1 + w2) or an expanded view (w.sum()); Δ is added in place.
            if _place(grad) in seen or 0 in grad.stride():
                grad = grad.clone(memory_format=torch.contiguous_format)
            seen.add(_place(grad))
            total[name] = grad
    return total


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins; predictions ask it of tensors that have none."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def adder(total: Grads, share: float) -> Callable[[str, Tensor], None]:
    """A sink that adds ``share * gradient`` to a sum, rounded as ``(share * loss).backward()`` rounds at its end."""

    def add(name: str, grad: Tensor) -> None:
        if share != 1.0:
            grad.mul_(share)
        if name in total:
            total[name].add_(grad)
        else:
            total[name] = grad

    return add


def difference(first: Tensor | None, second: Tensor | None, scale: float = 1.0) -> Tensor:
    """``first - scale * second`` in the memory of ``first``; an absent gradient is zero."""
    if first is None:
        assert second is not None
        return second * -scale
    return first if second is None else first.sub_(second, alpha=scale)


def dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Sum of products over pairs of tensors of equal shapes, in fp32 at least."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        precise = torch.promote_types(a.dtype, torch.float32)
        total += float(torch.dot(a.flatten().to(precise), b.flatten().to(precise)))
    return total


def cosine(product: float, first: float, second: float) -> float | None:
    """From a product and two squared norms; ``None`` where a vector is zero."""
    norms = math.sqrt(max(first, 0.0) * max(second, 0.0))
    return product / norms if norms > 0 else None
