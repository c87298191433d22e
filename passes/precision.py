"""Autocast: programs run under the caller's, without its cache, and differentiate outside it.

A graph is recorded above autocast, so the same program serves every precision: which kernels cast is decided when it
runs. Two of autocast's habits do not fit a block that is differentiated in the middle of a step. Its cache hands a cast
weight to the next reader, which may have been made without an autograd graph or before the optimizer moved the weight;
and a backward pass belongs outside autocast (https://docs.pytorch.org/docs/stable/amp.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOW = (torch.float16, torch.bfloat16)
State = tuple[tuple[str, torch.dtype], ...]


def autocast_state() -> State:
    """Device types under autocast, with their dtype; empty outside.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_state()
        (('cpu', torch.bfloat16),)
    """
    return tuple((d, torch.get_autocast_dtype(d)) for d in _devices() if torch.is_autocast_enabled(d))


@contextmanager
def uncached() -> Iterator[None]:
    """Run forward code under the caller's autocast, without its cache."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Run backward code."""
    state = autocast_state()
    for device, _ in state:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, _ in state:
            torch.set_autocast_enabled(device, True)


def parameter_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for the parameters of a head that reads a value of ``dtype``: under autocast that of full precision."""
    return torch.float32 if dtype in LOW and torch.is_autocast_enabled(device.type) else dtype


def _devices() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
