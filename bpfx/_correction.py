"""The offsets of a step at work: when they are measured, how they enter the gradient, what refreshes teach."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bpfx._gradients import Grads, dot
from bpfx._offset_state import OffsetState
from bpfx._period import EXACT, LOCAL, REFRESH, Pace, PeriodRule
from bpfx._refresh import BlockFound
from bpfx._scales import AutoAlpha, AutoLambda
from bpfx._stability import Stability
from bpfx.errors import BpfxError, BpfxWarning
from bpfx.offset import Offset
from bpfx.passes.graph import HEADS

if TYPE_CHECKING:
    from bpfx.diagnostics import Diagnostics

__all__ = ["EXACT", "LOCAL", "REFRESH", "Correction"]

# Of the progress: states that were saved before these were kept lack them, and do without.
NEWER = frozenset({"inside", "was_exact", "since", "stability", "largest"})


class Correction:
    """g̃ = α · g_local + λ · Δ, with the scales that are in force.

    Args:
        offset: the settings.
        block_of: the block of every parameter that trains.
        shared: parameters that several blocks train. Their gradient is one sum, so form "B" takes α = 1 for them.
        last: index of the last block, whose local loss is the task loss.
        parameters: gives those of the model, to see how far they move.
    """

    def __init__(
        self,
        offset: Offset,
        block_of: Mapping[str, int],
        last: int,
        shared: frozenset[str] = frozenset(),
        parameters: Callable[[], Sequence[Tensor]] = list,
    ) -> None:
        self.offset, self.block_of, self.last, self.shared = offset, block_of, last, shared
        self.state = OffsetState(offset.dtype, offset.device)
        self.rule = PeriodRule(offset)
        self._pace = Pace(parameters)
        self._alpha: dict[int, AutoAlpha] = {}
        self._lam: dict[int, AutoLambda] = {}
        self._norms: dict[int, float] = {}
        self._inside: dict[int, float] = {}  # α of the local gradient inside the stored Δ, by block (form "B")
        self._was_exact = False  # whether the last refresh was in a phase of exact steps
        self._measured = 0  # iteration of the last refresh
        self._since: dict[int, int] = {}  # the refresh that a block's Δ comes from; it may have failed since
        self._stability = Stability()
        self._largest = 0  # samples of a batch so far
        self.matching: Grads = {}  # gradients of heads, for the iteration of the refresh
        self._beginning = copy.deepcopy(self.progress())

    # --- scales -------------------------------------------------------------------------------------------------------

    def alpha(self, block: int, iteration: int) -> float:
        """α of a block. In form "B" the one that its Δ was made with holds until the next refresh.

        The last block's local gradient is BP's: form "B" has nothing to scale there.
        """
        if self.offset.form == "B":
            return self._inside[block] if block in self._inside else self.inside(block, iteration)
        return 1.0 if self.in_exact_phase(iteration) else self.offset.scale_of("alpha", iteration)

    def inside(self, block: int, iteration: int) -> float:
        """Scale of the local gradient inside a Δ that is measured now: 1 in form "A", α in form "B"."""
        if self.offset.form == "A" or block == self.last:
            return 1.0
        if self.offset.alpha == "auto":
            return self._alpha[block].value if block in self._alpha else 1.0
        return self.offset.scale_of("alpha", iteration)

    def lam(self, block: int, iteration: int) -> float:
        """λ of a block, decayed since the last refresh."""
        if self.in_exact_phase(iteration):
            return 1.0
        if self.offset.lam == "auto":
            value = self._lam[block].value if block in self._lam else 1.0
        else:
            value = self.offset.scale_of("lam", iteration)
        age = iteration - self._since.get(block, self._measured)
        return value * self.offset.decay**age if age and self.offset.decay != 1.0 else value

    def in_exact_phase(self, iteration: int) -> bool:
        """Whether this is a refresh among exact steps, and so one of them."""
        return self._was_exact and iteration == self._measured

    def available(self, samples: int, wanted: int | None = None) -> int:
        """Samples of a refresh that is to have ``wanted``: all of a batch that is smaller than earlier ones."""
        self._largest = max(self._largest, samples)
        return samples if wanted is None or samples < wanted <= self._largest else wanted

    def check(self, iteration: int) -> None:
        """Raise where a schedule has no value for this iteration, before anything is changed."""
        for name in ("alpha", "lam"):
            if getattr(self.offset, name) != "auto":
                self.offset.scale_of(name, iteration)

    def apply(self, local: Grads, iteration: int, names: Sequence[str] | None = None, exact: bool = False) -> Grads:
        """g̃ in the memory of the local gradients; heads keep their own.

        Args:
            local: gradients by name.
            iteration: now.
            names: the parameters it is about (those of one block); ``None`` for all.
            exact: the gradients are BP's already, and only the heads may be taught.
        """
        matched = [n for n in (list(self.matching) if names is None else names) if n in self.matching]
        for name in matched if self._measured == iteration else ():
            if name in local:
                local[name].add_(self.matching[name], alpha=self.offset.match)
        if exact:
            return local
        corrected = [n for n in (self.state if names is None else names) if n in self.state]
        by_block = {k: self.lam(k, iteration) for k in {self.block_of[n] for n in corrected}}
        scales = {n: by_block[self.block_of[n]] for n in corrected}
        if self.offset.clip is not None and not self.in_exact_phase(iteration):
            scales = self._clipped(scales, by_block, local)
        for name, grad in local.items():
            plain = name.startswith(HEADS) or (self.offset.form == "B" and name in self.shared)
            alpha = 1.0 if plain else self.alpha(self.block_of[name], iteration)
            if alpha != 1.0:
                grad.mul_(alpha)
        for name in corrected:
            scale = scales[name]
            if name in local:
                if scale:
                    local[name].add_(self.state[name], alpha=scale)
            elif scale:
                local[name] = self.state[name] * scale
        return local

    def _clipped(self, scales: Mapping[str, float], by_block: Mapping[int, float], local: Grads) -> dict[str, float]:
        """λ by parameter as ``clip`` leaves it: decided block by block, and for a shared parameter alone.

        A shared parameter is corrected once its gradient is complete: with all blocks in one loop, with the last one
        that reads it in another.
        """
        squares = dict.fromkeys(by_block, 0.0)
        alone: dict[str, float] = {}
        for name, grad in local.items():
            if name in self.shared and name in scales:
                alone[name] = self._limited(self._norm(name), scales[name], math.sqrt(dot([grad], [grad])))
            elif self.block_of.get(name) in squares and name not in self.shared:
                squares[self.block_of[name]] += dot([grad], [grad])
        whole = {
            k: self._limited(self._norm_beside_shared(k), scale, math.sqrt(squares[k])) for k, scale in by_block.items()
        }
        return {n: alone.get(n, 0.0) if n in self.shared else whole[self.block_of[n]] for n in scales}

    def _limited(self, norm: float, scale: float, local: float) -> float:
        """λ as ``clip`` leaves it for a Δ of that norm beside a local gradient of that norm."""
        if self.offset.clip is None or norm == 0:
            return scale
        return min(scale, self.offset.clip * local / norm)

    def _norm(self, *names: str) -> float:
        return math.sqrt(sum(dot([delta], [delta]) for delta in (self.state[n] for n in names)))

    def _norm_beside_shared(self, block: int) -> float:
        """‖Δ‖ of a block without what it shares."""
        if not any(self.block_of[n] == block for n in self.shared):
            return self._norms.get(block, 0.0)
        return self._norm(*(n for n in self.state if self.block_of[n] == block and n not in self.shared))

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
        if self.rule.period == 1:
            self.rule.alarm(iteration)
            return  # every step is exact, or measured anew
        what = (
            f"period={self.rule.period} (K) was stable with the steps before and need not be with these: Δ is kept for "
            f"{self.rule.period} iterations all the same; lower the period or the rate, or pass period='auto'"
        )
        if self.rule.auto:
            what = "the offset is measured anew" + (
                ", and exact steps are taken until it lasts" if self.rule.exact else ""
            )
            self.rule.alarm(iteration)
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
        period, before = self.rule.period, dict(self._norms)
        self._was_exact = self.rule.auto and period == 1
        for k, block in found.items():
            self._norms[k], self._since[k] = block.norm, iteration
            self._inside[k] = self.inside(k, iteration)  # before anything is learnt: Δ was made with it
            if self.offset.alpha == "auto":
                self._alpha.setdefault(k, AutoAlpha()).take(block.products)
            if self.offset.lam == "auto" and not self._was_exact:  # what it learns from is weights that followed Δ
                self._lam.setdefault(k, AutoLambda()).take(block.products)
        self.rule.measured(iteration, {k: b.descent for k, b in found.items() if b.descent is not None})
        if self._was_exact:  # nobody follows Δ there
            self._stability = Stability()
        else:
            self._warn(iteration, period, found, before)
        if (period == 1) != (self.rule.period == 1):
            self._pace.restart()
        return [
            {
                "block": k,
                **block.record(),
                "norm": block.norm,
                "alpha": self.alpha(k, iteration),
                "lam": 1.0 if self._was_exact else self._limited(block.norm, self.lam(k, iteration), block.local),
                "period": period,
            }
            for k, block in found.items()
        ]

    def failed(self, iteration: int) -> None:
        """A refresh of which nothing could be used."""
        self.rule.measured(iteration, {})

    def _warn(self, iteration: int, period: int, found: Mapping[int, BlockFound], before: Mapping[int, float]) -> None:
        cosines = {k: block.staleness for k, block in found.items() if block.staleness is not None}
        complaint = self._stability.complaint(cosines, before, self._norms)
        if complaint is None:
            return
        advice = "pass a smaller period, lam or learning rate, or period='auto'"
        if self.rule.exact:
            advice = "exact BP steps follow"
        elif self.rule.auto:
            advice = "pass a smaller lam or learning rate, or bounds that begin with 1"
        if self.rule.auto:
            self.rule.alarm(iteration + 1)
        warnings.warn(
            f"unstable offset at the refresh of iteration {iteration}: {complaint}, so that period={period} is too "
            f"long for this learning rate; {advice}",
            BpfxWarning,
            stacklevel=7,
        )

    @contextmanager
    def as_one(self, diagnostics: Diagnostics, iteration: int) -> Iterator[None]:
        """Around a refresh and the step after it: where that fails, the next step measures again, once."""
        learnt, measured = self.progress(), diagnostics.measured
        try:
            yield
        except BaseException:
            if diagnostics.measured > measured:
                self.forget()
                diagnostics.retract(iteration)
                self.load_progress(learnt)
            raise

    # --- state --------------------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """Everything but the offsets themselves."""
        return {
            "pace": self._pace.state(),
            "rule": self.rule.state(),
            "alpha": {k: a.state() for k, a in self._alpha.items()},
            "lam": {k: a.state() for k, a in self._lam.items()},
            "norms": dict(self._norms),
            "inside": dict(self._inside),
            "was_exact": self._was_exact,
            "measured": self._measured,
            "since": dict(self._since),
            "stability": self._stability.state(),
            "largest": self._largest,
        }

    def check_progress(self, state: Mapping[str, Any] | None) -> None:
        """Raise where :meth:`load_progress` could not take it over."""
        missing = sorted(self._beginning.keys() - state.keys() - NEWER) if state is not None else []
        if missing:
            raise BpfxError(
                f"this state of an offset lacks {', '.join(missing)}: another version of bpfx saved it; load the "
                "entries of the model alone, and begin without offsets"
            )

    def load_progress(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`progress` gave; ``None`` (of a step without an offset) for the beginning."""
        state = self._beginning if state is None else state
        self._pace.load(state["pace"])
        self.rule.load(state["rule"])
        for name, kind in (("alpha", AutoAlpha), ("lam", AutoLambda)):
            made: dict[int, Any] = {}
            for k, one in state[name].items():
                made[int(k)] = kind()
                made[int(k)].load(one)
            setattr(self, f"_{name}", made)
        self._norms = {int(k): v for k, v in state["norms"].items()}
        self._inside = {int(k): v for k, v in state.get("inside", {}).items()}
        self._since = {int(k): v for k, v in state.get("since", {}).items()}
        self._was_exact = state.get("was_exact", False)
        self._measured, self._largest = state["measured"], state.get("largest", 0)
        self._stability = Stability()
        if "stability" in state:
            self._stability.load(state["stability"])

    def forget(self) -> None:
        """Drop every offset."""
        self.state.keep(lambda name: False)
