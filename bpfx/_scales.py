"""α and λ of one block, learnt from what its refreshes measure."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MEMORY = 0.8  # of the running means over refreshes
STEADY = 0.9  # of those that λ is learnt from
SLOW = 0.95  # of the sums whose ratios it needs
LEAST = 0.05  # of what an estimate is divided by
LONGEST = 0.95  # of κ and κt: beyond 1 nothing is stable
GRID = [i / 200 for i in range(1, 201)]  # of λ: at 0 no weight would answer to Δ, and nothing be learnt any more
SAMPLE = 512  # numbers of a parameter's gradient by which two refreshes are compared

Anchor = dict[str, tuple[Tensor, Tensor]]  # by parameter, samples of BP and local gradient at one refresh


def sample(name: str, gradient: Tensor, most: int = SAMPLE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of a gradient, at the same places every time, scaled so that products are those of the whole in the mean.

    Args:
        name: of the parameter; the places depend on it.
        gradient: any shape. With up to ``most`` numbers all of them are taken.
        most: how many.
        dtype: of the result, which is on the CPU.
    """
    count = gradient.numel()
    if count > most:
        places = torch.randint(count, (most,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        chosen = torch.take(gradient, places.to(gradient.device)) * math.sqrt(count / most)
    else:
        chosen = gradient.flatten().resolve_conj()
    real = torch.view_as_real(chosen).flatten() if chosen.is_complex() else chosen
    return real.detach().cpu().to(dtype, copy=True)


@dataclasses.dataclass
class Products:
    """What a refresh knows of one block: products of vectors over its parameters, in the loss's units squared.

    g and ℓ are BP and local gradient, Δ the new offset (g − ℓ, in form "B" g − α·ℓ), Δ' the old one.

    Attributes:
        square: ‖Δ‖².
        noise: share of it that is sampling noise, estimated from the pieces; ``None`` with a single piece.
        behind: ⟨g, Δ'⟩ of the first piece; ``None`` without an old offset.
        ahead: ⟨g, Δ⟩ with g from another piece than Δ; ``None`` with a single piece.
        stale: ⟨Δ, Δ'⟩ of the first piece; ``None`` without an old offset.
        anchor: samples of g and ℓ of the first piece; ``None`` where α is not learnt.
    """

    square: float
    noise: float | None
    behind: float | None
    ahead: float | None
    stale: float | None = None
    anchor: Anchor | None = None


class AutoAlpha:
    """α that would have predicted the next BP gradient best (form "B").

    The control variate's error (g_t − g₀) − α(ℓ_t − ℓ₀) is smallest in the mean square at
    α* = ⟨g_t − g₀, ℓ_t − ℓ₀⟩ / ‖ℓ_t − ℓ₀‖². Both are means over refreshes, of a sample of every parameter: neither g₀
    nor ℓ₀ is kept whole.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._sums = [0.0, 0.0]
        self._before: Anchor = {}

    def take(self, found: Products) -> None:
        if found.anchor is None:
            return
        before, self._before = self._before, found.anchor
        if before.keys() != self._before.keys():
            return
        for i, change in enumerate(_changes(before, self._before)):
            self._sums[i] = MEMORY * self._sums[i] + (1 - MEMORY) * change
        if self._sums[1] > 0:
            self.value = min(max(self._sums[0] / self._sums[1], 0.0), 1.0)

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "sums": list(self._sums), "before": dict(self._before)}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self._before = state["value"], dict(state.get("before", {}))
        self._sums = list(state["sums"]) if "before" in state else [0.0, 0.0]  # other sums in earlier versions


def _changes(before: Mapping[str, tuple[Tensor, Tensor]], now: Anchor) -> tuple[float, float]:
    """⟨g_t − g₀, ℓ_t − ℓ₀⟩ and ‖ℓ_t − ℓ₀‖²."""
    across = square = 0.0
    for name, (bp, local) in now.items():
        moved = local - before[name][1]
        across += float(torch.dot(bp - before[name][0], moved))
        square += float(torch.dot(moved, moved))
    return across, square


class AutoLambda:
    """λ with the smallest mean square error in the linear model of :mod:`bpfx.theory`, from what refreshes measure.

    With d = μ − a, r = d/μ, t = m/μ = 1 − (1−λ)r, S the sum of ρ^j over a period, κ = ημS/2, s the noise in ‖Δ‖², P the
    squared mean of Δ (b²/t²) and W = μ·d times the variance of θ at refreshes. None of μ, a, b, η is known here, but
    refreshes show their effect. In the mean,

        ⟨Δ, Δ⟩ − s            = P + rW
        ⟨g, Δ⟩                = (1−λ)P + W                (``ahead``)
        ⟨g, Δ⟩ − ⟨g, Δ'⟩      = 2κ·(λs + tW)              (``ahead − behind``: how strongly the weights answer)
        ⟨Δ, Δ⟩ − s − ⟨Δ, Δ'⟩  = r · (⟨g, Δ⟩ − ⟨g, Δ'⟩)    (``square``, ``stale``)

    Four equations for P, W, κ and r, and all four are exact. κ and r are ratios of sums over refreshes, in which a
    refresh weighs by λs, the noise that is known to have gone into the weights: after a small λ the answer is mostly
    chance, and the weight must not depend on that chance. :meth:`_best` then looks for the smallest error. Without
    ``stale`` r is unknown, and 0 stands in for it. Within 0.05 of the best constant in the model
    (tests/test_bias_variance.py). Source: derived for bpfx, docs/offset.md.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._means: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, float] = {}

    def take(self, found: Products) -> None:
        if found.noise is None:
            return
        before = self.value
        noise = self._mean("noise", found.noise * found.square)
        steady = max(self._mean("square", found.square) - noise, 0.0)  # P + rW
        if found.ahead is None:  # nothing is known of κ; 1 is the cautious end
            self.value = steady / (steady + noise) if noise > 0 else 1.0
            return
        ahead, scale = self._mean("ahead", found.ahead), self._mean("scale", before)
        answer = found.ahead - found.behind if found.behind is not None else None
        weight, ratio, kappa = before * noise, 0.0, 1.0  # before anything is known the cautious end: κ is below 1
        if answer is not None and found.stale is not None:
            change = found.square * (1 - found.noise) - found.stale
            ratio = min(max(self._ratio("ratio", weight * change, weight * answer, 0.0), -1.0), 1.0)
        lasting = (steady - ratio * ahead) / max(1 - ratio * (1 - scale), LEAST)
        lasting = min(max(lasting, 0.0), max(1.0, 1 - ratio) * steady)
        wander = ahead - (1 - scale) * lasting
        wander = max(wander, 0.0) if ratio >= 0 else min(wander, 0.0)  # W has the sign of r
        if answer is not None:
            expected = 2 * (before * noise + (1 - (1 - before) * ratio) * wander)
            kappa = min(max(self._ratio("kappa", weight * answer, weight * expected, 1.0), 0.0), 1.0)
        self.value = self._best(lasting, wander, noise, kappa, ratio, scale)

    @staticmethod
    def _best(lasting: float, wander: float, noise: float, kappa: float, ratio: float, scale: float) -> float:
        """λ' with the smallest error, up to the factor μ², where P and W were measured under a λ of ``scale``.

        The bias is (1−λ')²·Pt²/t'². With h = 2κt', a period's shrinking, A what local noise adds in a period and
        F = (2κλ')²·s what frozen noise adds, the variance at refreshes is V = (A + F) / (h(2−h)), and its mean over a
        period, in which local noise adds up evenly and frozen noise by squares, (1 − h + h²/3)·V + A/2 + F/3.
        """
        kappa = min(kappa, LONGEST)
        here = 1 - (1 - scale) * ratio
        shrinking = 2 * min(kappa * here, LONGEST)
        spread = wander / ratio if abs(ratio) > LEAST else 0.0
        added = max(spread * shrinking * (2 - shrinking) - (2 * kappa * scale) ** 2 * noise, 0.0)

        def error(lam: float) -> float:
            there = 1 - (1 - lam) * ratio
            h = 2 * kappa * there
            if there <= 0 or h >= 2:
                return math.inf
            frozen = (2 * kappa * lam) ** 2 * noise
            at_refreshes = (added + frozen) / (h * (2 - h)) if h > 0 else 0.0
            variance = (1 - h + h * h / 3) * at_refreshes + added / 2 + frozen / 3
            return ((1 - lam) * here / there) ** 2 * lasting + variance

        # The larger one of equals: without noise nothing speaks against the whole of Δ.
        return min(reversed(GRID), key=error)

    def _mean(self, name: str, value: float) -> float:
        # A plain mean at first, so that one unlucky refresh does not begin it.
        count = self._counts[name] = self._counts.get(name, 0) + 1
        share = max(1.0 / count, 1 - STEADY)
        old = self._means.get(name, 0.0)
        self._means[name] = old + share * (value - old)
        return self._means[name]

    def _ratio(self, name: str, above: float, below: float, otherwise: float) -> float:
        """Of two sums over refreshes."""
        sums = [
            SLOW * self._sums.get(f"{name} {part}", 0.0) + new for part, new in (("above", above), ("below", below))
        ]
        self._sums |= {f"{name} above": sums[0], f"{name} below": sums[1]}
        return sums[0] / sums[1] if sums[1] > 0 else otherwise

    def state(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "means": dict(self._means),
            "counts": dict(self._counts),
            "sums": dict(self._sums),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self._means, self._counts, self._sums = dict(state["means"]), dict(state["counts"]), dict(state["sums"])
