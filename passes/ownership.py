"""Whether a gradient may be changed in place while autograd still runs.

Autograd hands a parameter a gradient that may be a view of another one: of the gradient that still flows towards the
block's input, or of another parameter's. Changing it there and then would change the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# The tensor, and the storage object that the question itself makes.
_ALONE = 2


def owned(tensor: Tensor) -> Tensor:
    """The tensor itself if nothing else holds its memory, otherwise a copy.

    Example:
        >>> base = torch.zeros(4)
        >>> owned(base) is base, owned(base.view(2, 2)) is base
        (True, False)
        >>> view = base.view(2, 2)
        >>> owned(view).add_(1).sum().item(), base.sum().item()
        (4.0, 0.0)
    """
    if isinstance(tensor, FakeTensor):
        return tensor  # a prediction changes nothing
    # There is no public way to ask. One holder too many costs a copy; one too few cannot be counted.
    if 0 in tensor.stride() or torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > _ALONE:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor
