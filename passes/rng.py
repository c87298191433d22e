"""Random state as a value: the recomputed forward of a block must draw what its first forward drew."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode

from bpfx.passes.graph import Weights

RngState = tuple[Any, ...]


def get_rng_state() -> RngState:
    """State of every generator a model may draw from: torch on the CPU and on each CUDA device, Python's, NumPy's."""
    if detect_fake_mode() is not None:  # a prediction draws nothing
        return ()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    return (torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state() if numpy else None)


def set_rng_state(state: RngState) -> None:
    """Put a state from :func:`get_rng_state` back."""
    if not state:
        return
    cpu, cuda, python, numpy_state = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    random.setstate(python)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


@contextmanager
def preserved(seed: int | None = None) -> Iterator[None]:
    """Run with the generators as they are (or seeded) and put them back afterwards."""
    state = get_rng_state()
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)
        yield
    finally:
        set_rng_state(state)


@contextmanager
def preserve(weights: Weights) -> Iterator[None]:
    """Run the plain model or a capture of it: buffers, gradients and random state are put back afterwards."""
    buffers = {name: weights[name].detach().clone() for name in (*weights.buffer_names, *weights.rewritten)}
    grads = {name: weights[name].grad for name in weights.parameter_names}
    with preserved():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in buffers.items():
                    weights[name].copy_(value)
            for name, grad in grads.items():
                weights[name].grad = grad
