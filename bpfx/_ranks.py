"""Whether this process is one of several, and whether it is the one that speaks for them."""

from __future__ import annotations

import os

import torch.distributed as dist


def several() -> bool:
    """Whether this process is one of several that torch.distributed knows of."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this process is the one that shows progress: the first of several, or the only one.

    Example:
        >>> is_rank_zero()
        True
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not launched_with_others() or os.environ.get("RANK", "0") == "0"


def launched_with_others() -> bool:
    """Whether torchrun started this process as one of several."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return launched and int(os.environ.get("WORLD_SIZE", "1")) > 1
