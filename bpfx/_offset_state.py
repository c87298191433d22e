"""The stored offsets: in the parameters' dtype, in a smaller one, or in 8 bits; on their device, or on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bpfx._shelf import Parked

GROUP = 128  # numbers that share one scale in 8 bits: 3 % more bytes, and one outlier spoils no more than these


@dataclasses.dataclass
class _Stored:
    """One offset: its tensors (values, and with 8 bits their scales), and what it is when it is taken out."""

    parts: list[Parked]
    shape: torch.Size
    dtype: torch.dtype


class OffsetState(Mapping[str, Tensor]):
    """Δ by parameter name: ``state[name]`` is a tensor like the parameter, decoded and on its device.

    Args:
        dtype: ``None`` (the parameter's own), one of :data:`bpfx.offset.STORED`, or ``"int8"``: symmetric 8-bit codes
            with one fp32 scale per 128 numbers, at most half a 127th of the group's largest magnitude off.
        device: where they are kept; ``None`` for the parameter's own device.

    Example:
        >>> state = OffsetState("int8")
        >>> state.put("w", torch.linspace(-1, 1, 512))
        >>> round(float((state["w"] - torch.linspace(-1, 1, 512)).abs().max()), 4), state.nbytes
        (0.0039, 528)
    """

    def __init__(self, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None) -> None:
        self.dtype = dtype
        self.home = torch.device(device) if device is not None else None
        self._stored: dict[str, _Stored] = {}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        parts = [part.fetch() for part in stored.parts]
        value = parts[0] if len(parts) == 1 else _decode8(parts[0], parts[1])
        if stored.dtype.is_complex:
            value = torch.view_as_complex(value.to(stored.dtype.to_real()).view(*stored.shape, 2))
        for part in stored.parts:
            part.release()
        return value.to(stored.dtype).view(stored.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def prefetch(self, name: str) -> None:
        """Begin to bring one offset to its device."""
        for part in self._stored[name].parts if name in self._stored else ():
            part.prefetch()

    def put(self, name: str, value: Tensor) -> None:
        """Store Δ of one parameter. Where nothing is to be converted or moved, ``value`` itself is kept."""
        plain = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        if self.dtype == "int8":
            tensors = _encode8(plain)
        else:
            tensors = [plain.to(self.dtype) if isinstance(self.dtype, torch.dtype) else plain]
        self._stored[name] = _Stored([Parked(t, self.home) for t in tensors], value.shape, value.dtype)

    def move(self, device: torch.device) -> None:
        """Keep them on another device from now on."""
        self.home = device
        for stored in self._stored.values():
            stored.parts = [Parked(part.fetch(), device) for part in stored.parts]

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Drop every offset that is not wanted."""
        self._stored = {n: s for n, s in self._stored.items() if wanted(n)}

    @property
    def nbytes(self) -> int:
        """Bytes they take where they are kept."""
        return sum(part.home.nbytes for stored in self._stored.values() for part in stored.parts)

    def bytes_for(self, tensors: Iterator[Tensor]) -> int:
        """Bytes that offsets of these parameters will take."""
        total = 0
        for tensor in tensors:
            count = tensor.numel() * (2 if tensor.is_complex() else 1)
            if self.dtype == "int8":
                total += count + 4 * -(-count // GROUP)
            elif isinstance(self.dtype, torch.dtype):
                total += count * self.dtype.itemsize
            else:
                total += tensor.nbytes
        return total

    def state(self) -> dict[str, Any]:
        """Tensors as they are stored, for a checkpoint."""
        return {
            name: {"parts": [p.settled() for p in s.parts], "shape": list(s.shape), "dtype": str(s.dtype)}
            for name, s in self._stored.items()
        }

    def load(self, state: Mapping[str, Any], device_of: Callable[[str], torch.device]) -> None:
        """Take over what :meth:`state` gave; one that was stored in another dtype is converted."""
        other = OffsetState()
        self._stored = {}
        for name, entry in state.items():
            parts = [Parked(t.to(device_of(name), copy=True), self.home) for t in entry["parts"]]
            dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
            stored = _Stored(parts, torch.Size(entry["shape"]), dtype)
            if self._fits(entry["parts"], dtype):
                self._stored[name] = stored
                continue
            other._stored = {name: stored}
            self.put(name, other[name])

    def _fits(self, parts: list[Tensor], dtype: torch.dtype) -> bool:
        if self.dtype == "int8" or len(parts) == 2:
            return self.dtype == "int8" and len(parts) == 2
        real = dtype.to_real() if dtype.is_complex else dtype
        return parts[0].dtype == (self.dtype or real)


def _encode8(value: Tensor) -> list[Tensor]:
    flat = value.detach().reshape(-1).float()
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % GROUP)).view(-1, GROUP)
    scales = padded.abs().amax(1).div_(127.0)
    # A group of zeros has no scale; any will do.
    codes = padded.div(scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return [codes.to(torch.int8).view(-1)[:count].clone(), scales]


def _decode8(codes: Tensor, scales: Tensor) -> Tensor:
    count = codes.numel()
    padded = torch.nn.functional.pad(codes, (0, -count % GROUP)).view(-1, GROUP)
    return (padded.float() * scales[:, None]).view(-1)[:count]
