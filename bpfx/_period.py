"""When the offset is measured: at a fixed period, or at one that follows how the offsets age."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bpfx.offset import Offset

REFRESH, EXACT, LOCAL = "refresh", "exact", "local"
# A refresh and K−1 local steps cost as much as K exact BP steps at K of 2 to 3: a period is 4 at least, or 1.
SHORTEST = 4
MEMORY = 0.75  # of the running mean over refreshes
ENOUGH = 4  # refreshes under one period before it is changed
REST = 12  # exact steps before the next pair of refreshes, once these few have not shown that offsets would last
RISE = 0.1  # of the mean from where on a longer period is tried; exact steps lose nothing but time, so not at 0
FALL = -0.1  # of one refresh at which a period that is on trial is given up
UPHILL = -0.5  # of one block, twice in a row: there Δ overshoots, whatever the others do
JUMP = 4.0  # times as far as before, in two steps one after the other


class PeriodRule:
    """The iterations of a run, each a refresh, an exact BP step or a local step.

    With ``period="auto"`` the rule asks at every refresh: is the old offset still a way down? That is the sign of the
    cosine of the new BP gradient and the old Δ, mean over the blocks. Noise that was frozen into Δ and followed too far
    makes it negative, as does a Δ that has gone out of date. It begins with exact steps, goes over to a period of 4
    and on to doubled ones where the running mean is clearly positive, and goes back step by step where it is negative.
    Under exact steps it measures in pairs, 4 iterations apart.

    Attributes:
        period: K in force; 1 stands for exact BP steps.
    """

    def __init__(self, offset: Offset) -> None:
        self._fixed = offset.period if isinstance(offset.period, int) else None
        low, high = offset.bounds
        self._periods = [] if low > 1 else [1]
        period = low if low > 1 else SHORTEST
        while period <= high:
            self._periods.append(period)
            period *= 2
        self.period = self._fixed or self._periods[0]
        self._next = 0
        self._last: int | None = None  # iteration of the last refresh
        self._trend = 0.0
        self._count = 0
        self._uphill: set[int] = set()  # blocks whose Δ led clearly up when it was last measured
        self._again = False  # whether one of them did the time before as well

    @property
    def auto(self) -> bool:
        return self._fixed is None

    @property
    def exact(self) -> bool:
        """Whether this rule may take exact steps."""
        return self.auto and self._periods[0] == 1

    def never_exact(self) -> None:
        """Take no exact steps: their memory is not there."""
        self._periods = [k for k in self._periods if k > 1] or [SHORTEST]
        self.period = max(self.period, self._periods[0])

    def kind(self, iteration: int) -> str:
        """What an iteration is: ``"refresh"``, ``"exact"`` or ``"local"``."""
        if self._fixed is not None:
            return REFRESH if iteration % self._fixed == 0 else LOCAL
        if iteration >= self._next:
            return REFRESH
        return EXACT if self.period == 1 else LOCAL

    def measured(self, iteration: int, descents: Mapping[int, float]) -> None:
        """Take the cosines of new BP gradients and old Δ that a refresh found, by block; none where it failed."""
        if self._fixed is not None:
            return
        age, self._last = (iteration - self._last if self._last is not None else None), iteration
        lag = self.period if self.period > 1 else SHORTEST
        level, move = self._periods.index(self.period), 0
        if descents and age == lag:
            descent = sum(descents.values()) / len(descents)
            self._count += 1
            share = max(1 / self._count, 1 - MEMORY)
            self._trend += share * (descent - self._trend)
            uphill = {block for block, cosine in descents.items() if cosine < UPHILL}
            self._again, self._uphill = bool(self._uphill & uphill), uphill
            if self._count < ENOUGH and descent < FALL:
                move = -1
        if self._count >= ENOUGH:
            move = 1 if self._trend > RISE else -1 if self._trend < 0 else 0
        if self._again:
            move = min(move, 0 if self.period == 1 else -1)
        level = min(max(level + move, 0), len(self._periods) - 1)
        if self._periods[level] != self.period:
            self.period, self._count = self._periods[level], 0
            self._uphill, self._again = set(), False
        rests = self.period == 1 and self._count >= ENOUGH and age == lag
        self._next = iteration + (REST if rests else self.period if self.period > 1 else SHORTEST)

    def alarm(self, iteration: int) -> None:
        """The weights have begun to move much further: measure now, and trust nothing that was measured before."""
        if self._fixed is None:
            self.period, self._next, self._trend, self._count = self._periods[0], iteration, 0.0, 0
            self._last, self._uphill, self._again = None, set(), False

    def state(self) -> dict[str, Any]:
        return {
            "period": self.period,
            "next": self._next,
            "last": self._last,
            "trend": self._trend,
            "count": self._count,
            "uphill": sorted(self._uphill),
            "again": self._again,
        }

    def load(self, state: dict[str, Any]) -> None:
        known = self._fixed is None and state["period"] in self._periods
        self.period = state["period"] if known else self._fixed or self._periods[0]
        self._next, self._last = state["next"], state.get("last")
        self._trend, self._count = state["trend"], state["count"]
        self._uphill, self._again = set(state.get("uphill", ())), state.get("again", False)


class Pace:
    """How far the weights move in a step, from a sample of them: learning rate and optimizer as the weights feel it.

    Args:
        parameters: gives those of which up to 8 are looked at, 64 numbers each.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._before: Tensor | None = None
        self._pending: Tensor | None = None
        self._most: float | None = None  # of the running mean since the last jump
        self._usual: float | None = None
        self._steps = self._high = 0
        self._iteration = -1

    def jumped(self, iteration: int) -> float | None:
        """How many times further the weights went than ever before, where that is news; asked in every iteration.

        The answer is one step late, since reading a number at once would wait for the device. Iterations in which no
        optimizer stepped do not count.
        """
        if iteration == self._iteration:
            return None  # the iteration is tried again
        self._iteration = iteration
        moved = float(self._pending) if self._pending is not None else 0.0
        now, before = self._sample(), self._before
        self._before, self._pending = now, None
        if now is not None and before is not None and now.shape == before.shape:
            self._pending = (now - before.to(now.device)).norm()
        if moved == 0 or not math.isfinite(moved):
            return None
        self._steps += 1
        most = self._most
        high = most is not None and self._steps > 8 and moved > JUMP * most
        self._high = self._high + 1 if high else 0
        if high and self._high < 2:
            return None  # one step alone may be an unlucky batch
        self._usual = moved if self._usual is None or high else 0.8 * self._usual + 0.2 * moved
        self._most = max(self._usual, most or 0.0)
        self._high = 0
        return moved / most if high and most else None

    def _sample(self) -> Tensor | None:
        parameters = [p for p in self._parameters() if p.numel()]
        chosen = parameters[:: max(1, -(-len(parameters) // 8))]
        parts = [_first(p.detach()) for p in chosen]
        return torch.cat([p.to(parts[0].device, torch.float32) for p in parts]) if parts else None

    def restart(self) -> None:
        """Learn anew how far a step goes; between exact and corrected steps that changes by itself."""
        self._most, self._usual, self._steps, self._high = None, None, 0, 0

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        names = ("before", "pending", "most", "usual", "steps", "high", "iteration")
        return {name: getattr(self, f"_{name}") for name in names}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def _first(tensor: Tensor) -> Tensor:
    """64 of its numbers or a few more, without a copy of the others."""
    while tensor.dim() > 1:
        tensor = tensor[: -(-64 // tensor[0].numel())].flatten(0, 1)
    tensor = tensor.flatten()[:64]
    return torch.view_as_real(tensor.resolve_conj()).flatten() if tensor.is_complex() else tensor
