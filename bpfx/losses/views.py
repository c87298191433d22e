"""Two views of every sample, next to each other in the batch: rows 2i and 2i+1 belong to sample i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpfx.errors import BpfxError


class Views:
    """Two views of the same samples, in the place of the one tensor that the model takes.

    Args:
        first, second: tensors of the same shape and dtype, samples first.

    Raises:
        BpfxError: they differ in shape or dtype.

    Example:
        >>> Views(torch.zeros(2, 3), torch.ones(2, 3)).rows[:, 0]
        tensor([0., 1., 0., 1.])
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        for name, view in (("first", first), ("second", second)):
            if not isinstance(view, Tensor):
                raise BpfxError(f"Views: the {name} view is a {type(view).__name__}; pass two tensors")
        if first.shape != second.shape or first.dtype != second.dtype:
            raise BpfxError(
                f"the two views differ: {tuple(first.shape)} {first.dtype} and {tuple(second.shape)} {second.dtype}; "
                "both must have one shape and dtype"
            )
        self.first, self.second = first, second

    @property
    def rows(self) -> Tensor:
        """Both views, sample by sample."""
        return interleave([self.first, self.second])


def interleave(parts: Sequence[Tensor]) -> Tensor:
    """One tensor in which the parts' entries of one sample are next to each other."""
    return torch.stack(list(parts), 1).flatten(0, 1)


def parts_of(value: Tensor, rows: int) -> list[Tensor]:
    """The parts that :func:`interleave` joined."""
    return [value[i::rows] for i in range(rows)]
