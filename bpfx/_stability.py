"""Whether an offset overshoots: it turns against its predecessor, and grows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

OPPOSED = -0.5  # cosine of new and old Δ, mean over the blocks, from where on Δ overshoots
AT_ONCE = 4.0  # times as large as at the last refresh, where half of that cosine is enough
MEMORY = 0.5  # of a running mean of the cosine over refreshes
SLOWLY = (-0.1, 3.0)  # that mean, and how many times as large Δ is since it became negative; over all blocks
ONE_BLOCK = (-0.4, 10.0)  # the same of one block: the cosine of a few numbers says little


@dataclasses.dataclass
class Lean:
    """The way that Δ turns on the whole, and how much it has grown since that is against its predecessor.

    With momentum the weights swing around the minimum over more than one period: Δ then turns against its predecessor
    at some refreshes only, and grows all the same.
    """

    mean: float | None = None
    growth: float = 1.0  # over the smallest one since the mean is negative

    def beyond(self, cosine: float, times: float, limits: tuple[float, float]) -> bool:
        """Take the cosine of new and old Δ and the ratio of their norms; whether they overshoot."""
        self.mean = cosine if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * cosine
        self.growth = max(self.growth * times, 1.0) if self.mean < 0 else 1.0
        return cosine < 0 and self.mean < limits[0] and self.growth > limits[1]


class Stability:
    """Watches every block's Δ from refresh to refresh."""

    def __init__(self) -> None:
        self._opposed = 0
        self._all = Lean()
        self._blocks: dict[int, Lean] = {}

    def complaint(
        self, cosines: Mapping[int, float], before: Mapping[int, float], now: Mapping[int, float]
    ) -> str | None:
        """What is wrong, in words, where Δ overshoots. What led to it is forgotten then.

        Args:
            cosines: of the new and the old Δ, of the blocks that have an old one.
            before, now: norms of the old and the new Δ by block.
        """
        if not cosines:
            return None
        mean = sum(cosines.values()) / len(cosines)
        times = _times(*(math.sqrt(sum(norms.get(k, 0.0) ** 2 for k in cosines)) for norms in (before, now)))
        grown = times > AT_ONCE
        self._opposed = self._opposed + 1 if mean < (OPPOSED / 2 if grown else OPPOSED) else 0
        found = []
        # Twice in a row, or at once where it grows as well: the next one may be NaN.
        if self._opposed and (self._opposed == 2 or grown):
            found.append(
                f"the new offset points against the old one (cosine {mean:.2f}) and is {times:.1f} times as large"
            )
        if self._all.beyond(mean, times, SLOWLY):
            growth = f"{self._all.growth:.0f} times as large"
            found.append(f"offsets turn against the ones before them, and have become {growth}")
        for k, cosine in cosines.items():
            one = self._blocks.setdefault(k, Lean())
            if one.beyond(cosine, _times(before.get(k, 0.0), now.get(k, 0.0)), ONE_BLOCK):
                found.append(
                    f"block {k}'s offsets turn against the ones before, and are {one.growth:.0f} times as large now"
                )
        if found:
            self._opposed, self._all, self._blocks = 0, Lean(), {}
        return found[0] if found else None

    def state(self) -> dict[str, Any]:
        blocks = {k: dataclasses.astuple(one) for k, one in self._blocks.items()}
        return {"opposed": self._opposed, "all": dataclasses.astuple(self._all), "blocks": blocks}

    def load(self, state: Mapping[str, Any]) -> None:
        self._opposed, self._all = state["opposed"], Lean(*state["all"])
        self._blocks = {int(k): Lean(*one) for k, one in state["blocks"].items()}


def _times(before: float, now: float) -> float:
    return now / before if before > 0 else 1.0
