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
    """The way that Δ turns on the whole, and its norm when that became negative.

    With momentum the weights swing around the minimum over more than one period: Δ then turns against its predecessor
    at some refreshes only, and grows all the same.
    """

    mean: float | None = None
    least: float = math.inf

    def take(self, cosine: float, norm: float) -> float:
        """How many times as large Δ has become since the mean is negative."""
        self.mean = cosine if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * cosine
        self.least = min(self.least, norm) if self.mean < 0 else norm
        return norm / self.least if self.least > 0 else 1.0

    def beyond(self, limits: tuple[float, float], growth: float) -> bool:
        return self.mean is not None and self.mean < limits[0] and growth > limits[1]


class Stability:
    """Watches every block's Δ from refresh to refresh."""

    def __init__(self) -> None:
        self._opposed = 0
        self._all = Lean()
        self._blocks: dict[int, Lean] = {}

    def complaint(
        self, cosines: Mapping[int, float], before: Mapping[int, float], now: Mapping[int, float]
    ) -> str | None:
        """What is wrong, in words, where Δ overshoots.

        Args:
            cosines: of the new and the old Δ, of the blocks that have an old one.
            before, now: norms of the old and the new Δ by block.
        """
        if not cosines:
            return None
        mean = sum(cosines.values()) / len(cosines)
        old, new = (math.sqrt(sum(norms.get(k, 0.0) ** 2 for k in now)) for norms in (before, now))
        grown = old > 0 and new > AT_ONCE * old
        self._opposed = self._opposed + 1 if mean < (OPPOSED / 2 if grown else OPPOSED) else 0
        growth = self._all.take(mean, new)
        ones = {k: self._blocks.setdefault(k, Lean()) for k in cosines}
        growths = {k: one.take(cosines[k], now[k]) for k, one in ones.items()}
        # Twice in a row, or at once where it grows as well: the next one may be NaN.
        if self._opposed and (self._opposed == 2 or grown):
            times = new / old if old else math.inf
            return f"the new offset points against the old one (cosine {mean:.2f}) and is {times:.1f} times as large"
        if self._all.beyond(SLOWLY, growth):
            self._all = Lean()
            return f"offsets turn against the ones before them, and have become {growth:.0f} times as large"
        for k, one in ones.items():
            if one.beyond(ONE_BLOCK, growths[k]):
                self._blocks[k] = Lean()
                return f"block {k}'s offsets turn against the ones before, and are {growths[k]:.0f} times as large now"
        return None

    def state(self) -> dict[str, Any]:
        blocks = {k: dataclasses.astuple(one) for k, one in self._blocks.items()}
        return {"opposed": self._opposed, "all": dataclasses.astuple(self._all), "blocks": blocks}

    def load(self, state: Mapping[str, Any]) -> None:
        self._opposed, self._all = state["opposed"], Lean(*state["all"])
        self._blocks = {int(k): Lean(*one) for k, one in state["blocks"].items()}
