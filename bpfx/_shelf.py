"""Where tensors wait that are not needed now: in the memory of another device, fetched a moment before they are.

On CUDA the copies run on a stream of their own, out of pinned memory, so that they overlap with the computation. Where
home is the device itself (the CPU of a machine without another) nothing is copied and the same calls are made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_streams: dict[torch.device, torch.cuda.Stream] = {}


class Parked:
    """One tensor, at home. ``fetch()`` brings it to its device, ``put_back()`` takes it home again.

    Args:
        tensor: a tensor on the device that computes with it. It is not kept alive where home is another device.
        home: where it waits; ``None`` for where it is.
    """

    def __init__(self, tensor: Tensor, home: torch.device | None) -> None:
        self.device = tensor.device
        self.away = home is not None and moves(self.device, home)
        self.fetched: Tensor | None = None
        if not self.away:
            self.home = tensor
            return
        pin = self.device.type == "cuda"
        self.home = torch.empty_like(tensor, device=home, pin_memory=pin, requires_grad=False)
        self._copy(self.home, tensor)

    def prefetch(self) -> None:
        """Begin to fetch; the computation goes on meanwhile."""
        if self.away and self.fetched is None:
            with _beside(self.device):
                self.fetched = self.home.to(self.device, non_blocking=True, copy=True)

    def fetch(self) -> Tensor:
        """The tensor on its device; it stays fetched until :meth:`put_back` or :meth:`release`."""
        if not self.away:
            return self.home
        self.prefetch()
        assert self.fetched is not None
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(_streams[self.device])
            self.fetched.record_stream(current)
        return self.fetched

    def put_back(self) -> None:
        """Take the fetched tensor home, with what was written into it."""
        if self.fetched is not None:
            self._copy(self.home, self.fetched)
            self.fetched = None

    def release(self) -> None:
        """Forget the fetched copy; nothing was written into it."""
        self.fetched = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, here or at home."""
        own = (self.home, self.fetched)
        return any(t is not None and t.device == tensor.device and t.data_ptr() == tensor.data_ptr() for t in own)

    def settled(self) -> Tensor:
        """The tensor at home, after all copies: what a checkpoint saves."""
        if self.away and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.home

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.no_grad(), _beside(self.device):
            target.copy_(source.detach(), non_blocking=True)
            if self.device.type == "cuda":
                source.record_stream(torch.cuda.current_stream(self.device))


def moves(device: torch.device, home: torch.device) -> bool:
    """Whether a tensor of ``device`` has to be copied to wait at ``home``."""
    return device.type != home.type or (home.index is not None and device.index != home.index)


def _beside(device: torch.device) -> AbstractContextManager[object]:
    """The device's copying stream, which first waits for what the computation has done so far."""
    if device.type != "cuda":
        return nullcontext()
    stream = _streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
