"""The hooks of parameters, which are for the gradient that a training step delivers and for no other.

A step differentiates blocks by themselves, with the parameters as leaves, so that hooks would see local gradients, BP
gradients and differences; and once more what ``loss.backward()`` delivers. Private API of torch: the two dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bpfx.errors import BpfxError


@contextmanager
def hooks_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No hook of these parameters runs inside; afterwards they are as before.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> _ = weight.register_hook(lambda grad: grad * 2)
        >>> with hooks_aside([weight]):
        ...     torch.autograd.grad((3 * weight).sum(), weight)
        (tensor([3.]),)
        >>> torch.autograd.grad((3 * weight).sum(), weight)
        (tensor([6.]),)
    """
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in parameters:
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if hooks:
                kept.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)


def refuse_steps_in_backward(name: str, parameter: Tensor) -> None:
    """Raise where a parameter is stepped by a hook, for who steps it already.

    Raises:
        BpfxError: it has a hook that runs after its gradient is accumulated.
    """
    if parameter._post_accumulate_grad_hooks:
        raise BpfxError(
            f"the parameter {name!r} has a register_post_accumulate_grad_hook, and bpfx.BlockTrainer steps its "
            "optimizers block by block without accumulating .grad; remove the hook, or use the drop-in step"
        )
