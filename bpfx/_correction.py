"""The offsets of a step at work: when they are measured, how they enter the gradient, what refreshes teach."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bpfx._gradients import Grads, dot
from bpfx._offset_state import OffsetState
from bpfx._period import EXACT, LOCAL, REFRESH, Pace, PeriodRule
from bpfx._refresh import BlockFound
from bpfx._scales import AutoAlpha, AutoLambda
from bpfx.errors import BpfxWarning
from bpfx.offset import Offset
from bpfx.passes.graph import HEADS

__all__ = ["EXACT", "LOCAL", "REFRESH", "Correction"]

OPPOSED = -0.5  # cosine of new and old Δ, mean over the blocks, from where on Δ overshoots
GROWTH = 4.0  # of the norm of all Δ from one refresh to the next, that goes with it


class Correction:
    """g̃ = α · g_local + λ · Δ, with the scales that are in force.

    Args:
        offset: the settings.
        block_of: the block of every parameter that trains.
        last: index of the last block, whose local loss is the task loss.
        parameters: of the model, to see how far they move.
    """

    def __init__(
        self, offset: Offset, block_of: Mapping[str, int], last: int, parameters: Sequence[Tensor] = ()
    ) -> None:
        self.offset, self.block_of, self.last = offset, block_of, last
        self.state = OffsetState(offset.dtype, offset.device)
        self.rule = PeriodRule(offset)
        self._pace = Pace([p for p in parameters if p.numel()])
        self._alpha: dict[int, AutoAlpha] = {}
        self._lam: dict[int, AutoLambda] = {}
        self._norms: dict[int, float] = {}
        self._measured = 0
        self._opposed = 0
        self.matching: Grads = {}  # gradients of heads, for the iteration of the refresh

    @property
    def compares(self) -> bool:
        """Whether a refresh is to compare its pieces with each other."""
        return self.offset.lam == "auto"

    # --- scales -------------------------------------------------------------------------------------------------------

    def alpha(self, block: int, iteration: int) -> float:
        """α of a block. The last block's local gradient is BP's: form "B" has nothing to scale there."""
        if self.offset.form == "B" and block == self.last:
            return 1.0
        if self.offset.alpha == "auto":
            return self._alpha[block].value if block in self._alpha else 1.0
        return self.offset.scale_of("alpha", iteration)

    def inside(self, block: int, iteration: int) -> float:
        """Scale of the local gradient inside Δ: 1 in form "A", α in form "B"."""
        return self.alpha(block, iteration) if self.offset.form == "B" else 1.0

    def lam(self, block: int, iteration: int) -> float:
        """λ of a block, decayed since the last refresh."""
        if self.offset.lam == "auto":
            value = self._lam[block].value if block in self._lam else 1.0
        else:
            value = self.offset.scale_of("lam", iteration)
        age = iteration - self._measured
        return value * self.offset.decay**age if age and self.offset.decay != 1.0 else value

    def check(self, iteration: int) -> None:
        """Raise where a schedule has no value for this iteration, before anything is changed."""
        for name in ("alpha", "lam"):
            if getattr(self.offset, name) != "auto":
                self.offset.scale_of(name, iteration)

    def apply(self, local: Grads, iteration: int, names: Sequence[str] | None = None) -> Grads:
        """g̃ in the memory of the local gradients; heads keep their own.

        Args:
            local: gradients by name.
            iteration: now.
            names: the parameters it is about (those of one block); ``None`` for all.
        """
        matched = [n for n in (list(self.matching) if names is None else names) if n in self.matching]
        for name in matched if self._measured == iteration else ():
            if name in local:
                local[name].add_(self.matching[name], alpha=self.offset.match)
        for name, grad in local.items():
            alpha = 1.0 if name.startswith(HEADS) else self.alpha(self.block_of[name], iteration)
            if alpha != 1.0:
                grad.mul_(alpha)
        corrected = [n for n in (self.state if names is None else names) if n in self.state]
        scales = {k: self.lam(k, iteration) for k in {self.block_of[n] for n in corrected}}
        if self.offset.clip is not None:
            scales = self._clipped(scales, local)
        for name in corrected:
            scale = scales[self.block_of[name]]
            if name in local:
                if scale:
                    local[name].add_(self.state[name], alpha=scale)
            elif scale:
                local[name] = self.state[name] * scale
        return local

    def _clipped(self, scales: Mapping[int, float], local: Grads) -> dict[int, float]:
        assert self.offset.clip is not None
        squares = dict.fromkeys(scales, 0.0)
        for name, grad in local.items():
            k = self.block_of.get(name)
            if k in squares:
                squares[k] += dot([grad], [grad])
        limits = {k: self.offset.clip * math.sqrt(squares[k]) for k in scales}
        return {
            k: min(scale, limits[k] / self._norms[k]) if self._norms.get(k) else scale for k, scale in scales.items()
        }

    # --- schedule -----------------------------------------------------------------------------------------------------

    def kind(self, iteration: int) -> str:
        """What this iteration is: ``"refresh"``, ``"exact"`` or ``"local"``."""
        return self.rule.kind(iteration)

    def watch(self, iteration: int) -> None:
        """Look, once per step, whether the weights have begun to move much further; Δ would not last then."""
        if iteration != self._measured:
            self.matching = {}
        factor = self._pace.jumped(iteration)
        if factor is None:
            return
        if self.rule.auto:
            what = "the offset is measured anew, and exact steps are taken until it lasts"
            self.rule.alarm(iteration)
        elif self.rule.period > 1:
            what = (
                f"the offset is kept for period={self.rule.period} iterations all the same and may lead away; lower "
                "the period by that factor, or pass period='auto'"
            )
        else:
            return
        warnings.warn(
            f"iteration {iteration}: the weights moved {factor:.0f} times as far in the last steps as before (a jump "
            f"of the learning rate?); {what}",
            BpfxWarning,
            stacklevel=4,
        )

    # --- what a refresh teaches ---------------------------------------------------------------------------------------

    def settle(
        self, iteration: int, found: Mapping[int, BlockFound], matching: Grads | None = None
    ) -> list[dict[str, Any]]:
        """Take what a refresh found, and give its record by block. Warns where Δ overshoots.

        Args:
            iteration: of the refresh.
            found: by block.
            matching: gradients of heads that go into this iteration's step.
        """
        self._measured = iteration
        self.matching = matching or {}
        period = self.rule.period
        before = dict(self._norms)
        for k, block in found.items():
            self._norms[k] = math.sqrt(max(block.products.square, 0.0))
            if self.offset.alpha == "auto":
                self._alpha.setdefault(k, AutoAlpha()).take(block.products)
            if self.offset.lam == "auto":
                self._lam.setdefault(k, AutoLambda()).take(block.products)
        self._warn(iteration, found, before)
        self.rule.measured(iteration, [b.descent for b in found.values() if b.descent is not None])
        if (period == 1) != (self.rule.period == 1):
            self._pace.restart()
        return [
            {
                "block": k,
                **block.record(),
                "norm": self._norms[k],
                "alpha": self.alpha(k, iteration),
                "lam": self.lam(k, iteration),
                "period": period,
            }
            for k, block in found.items()
        ]

    def failed(self, iteration: int) -> None:
        """A refresh of which nothing could be used."""
        self.rule.measured(iteration, ())

    def _warn(self, iteration: int, found: Mapping[int, BlockFound], before: Mapping[int, float]) -> None:
        known = [b.staleness for b in found.values() if b.staleness is not None]
        if not known:
            return
        mean = sum(known) / len(known)
        old, new = (math.sqrt(sum(norms.get(k, 0.0) ** 2 for k in found)) for norms in (before, self._norms))
        grown = old > 0 and new > GROWTH * old
        self._opposed = self._opposed + 1 if mean < (OPPOSED / 2 if grown else OPPOSED) else 0
        # Twice in a row, or at once where it grows as well: the next one may be NaN.
        if self._opposed == 0 or (self._opposed != 2 and not grown):
            return
        advice = "pass a smaller period, lam or learning rate, or period='auto'"
        if self.rule.auto:
            advice = "exact BP steps follow"
            self.rule.alarm(iteration + 1)
        warnings.warn(
            f"unstable offset at the refresh of iteration {iteration}: the new offset points against the old one "
            f"(cosine {mean:.2f}) and is {new / old if old else math.inf:.1f} times as large, so that "
            f"period={self.rule.period} is too long for this learning rate; {advice}",
            BpfxWarning,
            stacklevel=7,
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Everything but the offsets themselves."""
        return {
            "pace": self._pace.state(),
            "rule": self.rule.state(),
            "alpha": {k: a.state() for k, a in self._alpha.items()},
            "lam": {k: a.state() for k, a in self._lam.items()},
            "norms": dict(self._norms),
            "measured": self._measured,
            "opposed": self._opposed,
        }

    def load_progress(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`progress` gave."""
        self._pace.load(state["pace"])
        self.rule.load(state["rule"])
        for name, kind in (("alpha", AutoAlpha), ("lam", AutoLambda)):
            made: dict[int, Any] = {}
            for k, one in state[name].items():
                made[int(k)] = kind()
                made[int(k)].load(one)
            setattr(self, f"_{name}", made)
        self._norms = {int(k): v for k, v in state["norms"].items()}
        self._measured, self._opposed = state["measured"], state["opposed"]

    def forget(self) -> None:
        """Drop every offset; the next call measures."""
        self.state.keep(lambda name: False)
