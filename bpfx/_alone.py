"""One thread at a time.

Capturing a model patches PyTorch for the whole process (``torch.export`` replaces ``nn.Module.__call__`` while it
traces), and recomputing a block puts the process's random generators back to where they were. Neither can be done
while another thread captures or steps, so conversions and steps of all threads wait for each other.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()


def alone(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function while no other thread runs one that is marked like it; calls inside calls are fine.

    Example:
        >>> @alone
        ... def twice(x: int) -> int:
        ...     return 2 * x
        >>> twice(twice(3))
        12
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return function(*args, **kwargs)

    return run


def _unlock() -> None:
    """In a forked process the thread that held the lock does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
