"""Stop-gradients: the nodes of the emitted local step at which values pass and gradients do not."""

from __future__ import annotations

from torch import Tensor


def stop_gradient(value: Tensor) -> Tensor:
    """The same values, cut off from the block that made them.

    A cut inside one exported graph would not last: ``run_decompositions`` turns ``detach`` into ``alias`` and the
    gradient flows again. Blocks are therefore programs of their own, and this node stands between two of them.
    """
    return value.detach()


def accumulate(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Sum of two cotangents of one value, either of which may be absent."""
    if first is None:
        return second
    return first if second is None else first + second


def hand_over(*values: object) -> list[object]:
    """Values in a list that the receiving program empties, so that a boundary dies with its last reader.

    As plain arguments they would live in the caller's frame until the block's backward is done.
    """
    return list(values)
