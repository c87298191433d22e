"""The offset Δ = BP gradient − local gradient: when it is measured, on what, and how it enters the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bpfx.errors import BpfxError

Schedule = float | Callable[[int], float]
Grads = dict[str, Tensor]


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
        micro_batches: the refresh's samples are split into so many pieces and the gradients averaged, weighted by their
            numbers of samples, which keeps the refresh inside the memory of one piece. Right for a loss that is a mean
            over samples; not for a sum, nor where padding makes samples count differently.
        alpha: scale of the local gradient (α), a number or a function of the iteration. Heads are not scaled.
        lam: scale of Δ (λ), a number, a function of the iteration, or ``"auto"``: per block the share of ‖Δ‖² that
            the refresh's micro-batches agree on, ``1 − spread/‖Δ‖²``, at least 0 (two micro-batches or more).
        data: an iterable of batches (a DataLoader, say) from which a refresh takes its samples where ``batch`` is
            larger than the current batch; it is begun again when it ends.

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

    def next(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self.data)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        raise BpfxError("Offset(data=…) holds no batches")


class RefreshSum:
    """Accumulates the micro-batches of a refresh: Δ, and per block what the diagnostics need.

    Besides Δ it holds the local gradients, which with a single micro-batch are those of the training step itself, so
    that a refresh needs no third set of gradients.
    """

    def __init__(self, block_of: Mapping[str, int]) -> None:
        self.block_of = block_of
        self.offset: Grads = {}
        self.local: Grads = {}
        self.bad: list[str] = []  # parameters whose Δ is NaN or infinite
        self._squares: dict[int, float] = {}
        self._weights: list[float] = []

    def add(self, bp: Grads, local: Grads, weight: float) -> None:
        """Add one micro-batch's gradients, ``weight`` being its share of the samples. ``bp`` is consumed."""
        self._weights.append(weight)
        for name in dict.fromkeys([*bp, *local]):
            if name.startswith("heads."):
                continue
            g, ell = bp.pop(name, None), local.get(name)
            delta = _difference(g, ell)
            block = self.block_of[name]
            square = _dot([delta], [delta])
            if not math.isfinite(square):  # one number shows it without another tensor of that size
                self.bad.append(name)
            self._squares[block] = self._squares.get(block, 0.0) + weight * square
            _sum(self.offset, name, delta, weight)
            if ell is not None:
                _sum(self.local, name, ell, weight)

    def finish(self, old: Mapping[str, Tensor]) -> tuple[Grads, dict[int, dict[str, float | None]]]:
        """Return Δ and the statistics per block: cosine, ratio, staleness, spread."""
        statistics: dict[int, dict[str, float | None]] = {}
        for block in sorted(set(self.block_of.values())):
            names = [n for n in self.offset if self.block_of[n] == block]
            if not names:
                continue
            delta = [self.offset[n] for n in names]
            both = [(self.offset[n], self.local[n]) for n in names if n in self.local]
            # g_BP = Δ + g_local, so its products follow from those of Δ and g_local.
            square, across = _dot(delta, delta), _dot([d for d, _ in both], [ell for _, ell in both])
            local = _dot([ell for _, ell in both], [ell for _, ell in both])
            bp = square + 2 * across + local
            previous = [old[n] for n in names if n in old]
            known = len(previous) == len(delta)
            statistics[block] = {
                "cosine": _cosine(across + local, bp, local),
                "ratio": math.sqrt(square / bp) if bp > 0 else None,
                "staleness": _cosine(_dot(delta, previous), square, _dot(previous, previous)) if known else None,
                "spread": self._spread(block, square),
            }
        return self.offset, statistics

    def _spread(self, block: int, square: float) -> float | None:
        """Share of ‖Δ‖² that is noise: the estimated squared error of the mean over ‖Δ‖²."""
        effective = 1 / sum(w * w for w in self._weights)
        if effective <= 1 or square == 0:
            return None
        variance = max(self._squares[block] - square, 0.0)  # of one piece around the mean, biased
        return variance / (effective - 1) / square


def _difference(g: Tensor | None, ell: Tensor | None) -> Tensor:
    """g − ℓ, in the memory of g; an absent gradient is zero."""
    if g is None:
        assert ell is not None
        return -ell
    return g if ell is None else g.sub_(ell)


def _sum(total: Grads, name: str, value: Tensor, weight: float) -> None:
    if name in total:
        total[name].add_(value, alpha=weight)
    else:
        total[name] = value if weight == 1.0 else value * weight


def _dot(first: list[Tensor], second: list[Tensor]) -> float:
    total = 0.0
    for a, b in zip(first, second, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        precise = torch.promote_types(a.dtype, torch.float32)
        total += float(torch.dot(a.flatten().to(precise), b.flatten().to(precise)))
    return total


def _cosine(product: float, first: float, second: float) -> float | None:
    norms = math.sqrt(max(first, 0.0) * max(second, 0.0))
    return product / norms if norms > 0 else None
