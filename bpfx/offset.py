"""The offset Δ = BP gradient − local gradient: when it is measured, on what, and how it enters the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bpfx.errors import BpfxError

Schedule = float | Callable[[int], float]


@dataclasses.dataclass
class Offset:
    """How local gradients are corrected: g̃ = α · g_local + λ · Δ (Ren & Li, ICLR 2025).

    At iterations t with t mod ``period`` = 0 (a *refresh*) Δ is measured anew: BP gradient minus local gradient at the
    same weights, on the same samples, with the same random draws. In between the stored Δ is used.

    Args:
        period: iterations between refreshes (K), at least 1. A stale Δ can diverge where weights move far between two
            refreshes, so K cannot be chosen without the learning rate; docs/offset.md has the limit.
        batch: samples used for a refresh (B′). ``None``: the current batch. Fewer: its first samples. More need
            ``data``.
        micro_batches: the refresh's samples are split into so many pieces and the gradients averaged, each weighted by
            its share of the loss (samples, or targets that count), which keeps the refresh inside the memory of one
            piece.
        alpha: scale of the local gradient (α), a number or a function of the iteration. Heads are not scaled.
        lam: scale of Δ (λ), a number, a function of the iteration, or ``"auto"``: per block the share of ‖Δ‖² that
            the refresh's micro-batches agree on, ``1 − spread/‖Δ‖²``, at least 0 (two micro-batches or more).
        data: an iterable of batches (a DataLoader, say) from which a refresh takes its samples where ``batch`` is
            larger than the current batch; it is begun again when it ends.
        dtype: how Δ is stored: ``None`` for the parameters' own dtype, a floating dtype such as ``torch.bfloat16``, or
            ``"int8"`` (symmetric codes, one scale per 128 numbers; a quarter of fp32's memory).
        device: where Δ is stored, ``"cpu"`` to keep it out of an accelerator's memory; ``None`` for the parameters'
            own device.

    Raises:
        BpfxError: a value outside its range.

    Example:
        >>> Offset(period=4, lam=lambda t: 0.5 ** (t / 1000)).scale_of("lam", 1000)
        0.5
    """

    period: int = 4
    batch: int | None = None
    micro_batches: int = 1
    alpha: Schedule = 1.0
    lam: Schedule | str = 1.0
    data: Iterable[Any] | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        for name in ("period", "micro_batches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BpfxError(f"Offset({name}={value!r}): pass a whole number of at least 1")
        if self.batch is not None and (
            isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1
        ):
            raise BpfxError(f"Offset(batch={self.batch!r}): pass a number of samples of at least 1, or None")
        for name in ("alpha", "lam"):
            value = getattr(self, name)
            if name == "lam" and value == "auto":
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not callable(value) and not (number and math.isfinite(value) and value >= 0):
                words = "a number of at least 0 or a function of the iteration" + (
                    ", or 'auto'" if name == "lam" else ""
                )
                raise BpfxError(f"Offset({name}={value!r}): pass {words}")
        known = self.dtype is None or self.dtype == "int8"
        if not known and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise BpfxError(
                f"Offset(dtype={self.dtype!r}): pass a floating dtype such as torch.bfloat16, 'int8', or None"
            )
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                raise BpfxError(
                    f"Offset(device={self.device!r}): pass a device such as 'cpu' or 'cuda:0', or None"
                ) from None
        if self.lam == "auto" and self.micro_batches < 2:
            self.micro_batches = 2

    def scale_of(self, name: str, iteration: int) -> float:
        """α or λ at an iteration.

        Raises:
            BpfxError: the schedule returned no finite number.
        """
        value = getattr(self, name)
        if callable(value):
            result = value(iteration)
            if not isinstance(result, (int, float)) or not math.isfinite(result):
                raise BpfxError(f"Offset: the schedule for {name} returned {result!r} at iteration {iteration}")
            return float(result)
        return float(value)


class RefreshData:
    """Draws batches for refreshes from the caller's iterable, beginning again when it ends."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self._iterator: Iterator[Any] | None = None
        self._had_some = False

    def next(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.data)
            try:
                drawn = next(self._iterator)
                self._had_some = True
                return drawn
            except StopIteration:
                self._iterator = None
        if self._had_some:
            raise BpfxError(
                "Offset(data=…) is used up; pass what can be iterated again, such as a DataLoader or a list"
            )
        raise BpfxError("Offset(data=…) holds no batches")
