"""The offset Δ = BP gradient − local gradient: when it is measured, on what, and how it enters the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bpfx.errors import BpfxError
from bpfx.passes.batch import BatchSpec, as_call

Schedule = float | Sequence[float] | Callable[[int], float]
FORMS = ("A", "B")
BOUNDS = (1, 4)  # up to K = 4: the longest whose accuracy was measured
STORED = (torch.float64, torch.float32, torch.bfloat16)


@dataclasses.dataclass
class Offset:
    """How local gradients are corrected by the difference to the BP gradient (Ren & Li, ICLR 2025).

    At some iterations (*refreshes*) BP gradient g₀ and local gradient ℓ₀ are measured at the same weights, on the same
    samples, with the same random draws. Until the next refresh the optimizer gets

        form "A":  α·ℓ_t + λ·(g₀ − ℓ₀)
        form "B":  α·ℓ_t + λ·(g₀ − α·ℓ₀)        a control variate: α=0 is the stale BP gradient, α=1 form A

    Args:
        period: iterations between refreshes (K), at least 1; or ``"auto"``: exact BP steps, block by block, for as long
            as an offset that is a few iterations old would lead away from the minimum, and a period of 4 iterations or
            more while it does not (docs/offset.md has the rule). A stale Δ can diverge where weights move far between
            two refreshes, so a fixed K cannot be chosen without the learning rate.
        batch: samples used for a refresh (B′). ``None``: the current batch. Fewer: its first samples (all of a batch
            that is smaller still, such as the last of an epoch). More need ``data``.
        micro_batches: the refresh's samples are split into so many pieces and the gradients averaged, each weighted by
            its share of the loss (samples, or targets that count), which keeps the refresh inside the memory of one
            piece.
        alpha: scale of the local gradient (α): a number, values by iteration, a function of the iteration, or
            ``"auto"`` (form "B"): per block, what would have predicted the next refresh's BP gradient best. Heads are
            not scaled.
        lam: scale of Δ (λ): a number, values by iteration, a function of the iteration, or ``"auto"``: per block, from
            how far the refresh's micro-batches agree and how strongly the weights answer to Δ's noise (two
            micro-batches or more).
        data: an iterable of batches (a DataLoader, say) from which a refresh takes its samples where ``batch`` is
            larger than the current batch, at least as many as that; it is begun again when it ends.
        dtype: how Δ is stored: ``None`` for the parameters' own dtype, ``torch.float64``, ``torch.float32``
            or ``torch.bfloat16``, or ``"int8"`` (symmetric codes, one scale per 128 numbers; a quarter of fp32's
            memory).
        device: where Δ is stored, ``"cpu"`` to keep it out of an accelerator's memory; ``None`` for the parameters'
            own device.
        form: ``"A"`` or ``"B"``, see above.
        decay: λ is multiplied by this at every iteration after a refresh; 1 holds Δ, 0 uses it at the refresh only.
        clip: largest ‖λΔ‖ as a multiple of ‖ℓ_t‖, block by block; ``None`` for no limit.
        bounds: smallest and largest period that ``"auto"`` may choose; from 2 on it takes no exact BP steps.
        match: weight of a term on the heads that turns their gradient at the boundary towards BP's, at refreshes only;
            0 for none. Needs horizon 1.

    Raises:
        BpfxError: a value outside its range.

    Example:
        >>> Offset(period=4, lam=lambda t: 0.5 ** (t / 1000)).scale_of("lam", 1000)
        0.5
    """

    period: int | str = "auto"
    batch: int | None = None
    micro_batches: int = 1
    alpha: Schedule | str = 1.0
    lam: Schedule | str = 1.0
    data: Iterable[Any] | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    form: str = "A"
    decay: float = 1.0
    clip: float | None = None
    bounds: tuple[int, int] = BOUNDS
    match: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "data" and hasattr(value, "tolist") and not isinstance(value, type):
                setattr(self, field.name, value.tolist())  # numbers and arrays of NumPy, tensors
        if self.period != "auto" and not _whole(self.period):
            raise BpfxError(f"Offset(period={self.period!r}): pass a whole number of at least 1, or 'auto'")
        if not _whole(self.micro_batches):
            raise BpfxError(f"Offset(micro_batches={self.micro_batches!r}): pass a whole number of at least 1")
        if self.batch is not None and not _whole(self.batch):
            raise BpfxError(f"Offset(batch={self.batch!r}): pass a number of samples of at least 1, or None")
        for name in ("alpha", "lam"):
            self._check_scale(name)
        if self.form not in FORMS:
            raise BpfxError(f"Offset(form={self.form!r}): pass 'A' or 'B'")
        if self.alpha == "auto" and self.form != "B":
            raise BpfxError(
                "Offset(alpha='auto'): form 'A' is right in the mean for alpha=1 only; pass form='B' or a number"
            )
        if not _number(self.decay) or not 0 <= self.decay <= 1:
            raise BpfxError(f"Offset(decay={self.decay!r}): pass a number between 0 and 1")
        if self.clip is not None and not (_number(self.clip) and self.clip > 0):
            raise BpfxError(f"Offset(clip={self.clip!r}): pass a number above 0, or None for no limit")
        pair = isinstance(self.bounds, (tuple, list)) and len(self.bounds) == 2 and all(map(_whole, self.bounds))
        if not pair or self.bounds[0] > self.bounds[1]:
            raise BpfxError(f"Offset(bounds={self.bounds!r}): pass two periods, the smaller first, such as (1, 4)")
        self.bounds = (self.bounds[0], self.bounds[1])  # processes compare it with each other's
        if self.period != "auto" and self.bounds != BOUNDS:
            raise BpfxError(
                f"Offset(period={self.period}, bounds={self.bounds!r}): bounds are those of period='auto'; pass one of "
                "the two"
            )
        if not (_number(self.match) and self.match >= 0):
            raise BpfxError(f"Offset(match={self.match!r}): pass a number of at least 0")
        if self.data is not None and not hasattr(self.data, "__iter__") and not hasattr(self.data, "__getitem__"):
            raise BpfxError(f"Offset(data={self.data!r}): pass an iterable of batches, such as a DataLoader, or None")
        if self.data is not None and self.batch is None:
            raise BpfxError(
                "Offset(data=…) is read for refreshes of more samples than a batch has; pass batch= as well"
            )
        self._check_storage()
        if self.lam == "auto" and self.micro_batches < 2:
            self.micro_batches = 2

    def _check_scale(self, name: str) -> None:
        value = getattr(self, name)
        if value == "auto" or callable(value):
            return
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not all(_number(v) and v >= 0 for v in (value if listed else [value])) or (listed and not value):
            raise BpfxError(
                f"Offset({name}={value!r}): pass a number of at least 0, a list of such numbers, a function of the "
                "iteration, or 'auto'"
            )

    def _check_storage(self) -> None:
        known = self.dtype is None or isinstance(self.dtype, torch.dtype) or self.dtype == "int8"
        if not known or (isinstance(self.dtype, torch.dtype) and self.dtype not in STORED):
            raise BpfxError(
                f"Offset(dtype={self.dtype!r}): pass {', '.join(map(str, STORED))}, 'int8', or None; other floats "
                "have too small a range for gradients, where 'int8' has a scale per 128 numbers"
            )
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
                known = torch.device(self.device).type != "meta"
            # Every backend that is not there says so in its own way.
            except (RuntimeError, TypeError, AssertionError, NotImplementedError, ImportError):
                known = False
            if not known:
                raise BpfxError(
                    f"Offset(device={self.device!r}): pass a device of this machine, such as 'cpu' or 'cuda:0', or None"
                )

    def scale_of(self, name: str, iteration: int) -> float:
        """α or λ at an iteration, where it is no ``"auto"``.

        Raises:
            BpfxError: the schedule returned no finite number of at least 0, or has ended.
        """
        value = getattr(self, name)
        if not callable(value) and not isinstance(value, Sequence):
            return float(value)
        try:
            result = value(iteration) if callable(value) else value[iteration]
        except LookupError as error:
            length = "" if callable(value) else f" (it has {len(value)} values)"
            raise BpfxError(
                f"Offset: the schedule for {name} has no value for iteration {iteration}{length}; "
                "it has to cover the whole run"
            ) from error
        except Exception as error:
            raise BpfxError(
                f"Offset: the schedule for {name} failed at iteration {iteration}: {type(error).__name__}: {error}; "
                "it is called with the iteration, from 0 on"
            ) from error
        if not _number(result) or result < 0:
            raise BpfxError(
                f"Offset: the schedule for {name} returned {result!r} at iteration {iteration}; "
                "it has to return a number of at least 0"
            )
        return float(result)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class RefreshData:
    """Draws batches for refreshes from the caller's iterable, beginning again when it ends."""

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self._iterator: Iterator[Any] | None = None
        self._had_some, self._passes = False, 0

    def draw(self, spec: BatchSpec, wanted: int) -> list[tuple[list[Tensor], int]]:
        """Batches for one refresh, and how many samples of each count.

        Args:
            spec: of the training batches.
            wanted: samples.

        Raises:
            BpfxError: there are fewer, so that some would count twice; or there is no batch left at all.
        """
        found: list[tuple[list[Tensor], int]] = []
        have, passes = 0, self._passes + (self._iterator is not None)
        while have < wanted:
            drawn = spec.flatten(*as_call(self.next()))
            if self._passes > passes:
                raise BpfxError(
                    f"Offset(batch={wanted // spec.rows}) is larger than Offset(data=…), whose {have // spec.rows} "
                    "samples are all drawn by then; pass a smaller batch, or more data"
                )
            found.append((drawn, min(spec.samples(drawn), wanted - have)))
            have += found[-1][1]
        return found

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
                self._passes += 1
        if self._had_some:
            raise BpfxError(
                "Offset(data=…) is used up; pass what can be iterated again, such as a DataLoader or a list"
            )
        raise BpfxError("Offset(data=…) holds no batches")
