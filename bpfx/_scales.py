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
SLOW = 0.95  # of the sums of its least squares
LEAST = 0.05  # of what an estimate is divided by
SAMPLE = 512  # numbers of a parameter's gradient by which two refreshes are compared

Anchor = dict[str, tuple[Tensor, Tensor]]  # by parameter, samples of BP and local gradient at one refresh


def sample(name: str, gradient: Tensor) -> Tensor:
    """Numbers of a gradient, at the same places every time, scaled so that products are those of the whole in the mean.

    Args:
        name: of the parameter; the places depend on it.
        gradient: any shape. With up to 512 numbers all of them are taken.
    """
    count = gradient.numel()
    if count > SAMPLE:
        places = torch.randint(count, (SAMPLE,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        chosen = torch.take(gradient, places.to(gradient.device)) * math.sqrt(count / SAMPLE)
    else:
        chosen = gradient.flatten().resolve_conj()
    real = torch.view_as_real(chosen).flatten() if chosen.is_complex() else chosen
    return real.detach().cpu().to(torch.float64, copy=True)


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
        self.value, self._sums, self._before = state["value"], list(state["sums"]), dict(state.get("before", {}))


def _changes(before: Mapping[str, tuple[Tensor, Tensor]], now: Anchor) -> tuple[float, float]:
    """⟨g_t − g₀, ℓ_t − ℓ₀⟩ and ‖ℓ_t − ℓ₀‖²."""
    across = square = 0.0
    for name, (bp, local) in now.items():
        moved = local - before[name][1]
        across += float(torch.dot(bp - before[name][0], moved))
        square += float(torch.dot(moved, moved))
    return across, square


class AutoLambda:
    """λ that balances what local gradients miss against the noise frozen into Δ.

    In the linear model of :mod:`bpfx.theory`, with d = μ − a, s the noise in ‖Δ‖², P the squared mean of Δ (b²μ²/m²),
    V the variance of θ, W = μdV and κ = ημK/2, the derivative of the stationary mean square error by λ is zero where

        (1−λ)·P + W/2 = κ·λ·s        so that        λ* = (P + W/2) / (P + κs)

    P is what λ < 1 leaves of the bias. W is there because a larger λ also pulls harder towards the minimum. None of
    μ, a, η is known here, but refreshes show their effect. In the mean, for small ημK, with r = d/μ:

        ⟨Δ, Δ⟩ − s            = P + rW
        ⟨g, Δ⟩                = (1−λ)P + W                      (``ahead``)
        ⟨g, Δ⟩ − ⟨g, Δ'⟩      = 2κ·(λs + (1 − (1−λ)r)·W)        (``ahead − behind``: how strongly the weights answer)
        ⟨Δ, Δ⟩ − s − ⟨Δ, Δ'⟩  = r · (⟨g, Δ⟩ − ⟨g, Δ'⟩)          (``square``, ``stale``)

    These are four equations for P, W, κ and r. κ and r come from least squares over refreshes, in which a refresh
    weighs by how much it can say: after a small λ the answer is mostly chance. Without ``stale`` r is unknown, and
    W = 0 stands in for it, which costs up to 0.1 of λ where heads have little of the curvature and local noise is
    large. Within 0.1 of the best constant in the model (tests/test_bias_variance.py).
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
        if found.ahead is None:
            kappa, missed, pull = 1.0, steady, 0.0
        else:
            ahead, scale = self._mean("ahead", found.ahead), self._mean("scale", before)
            answer = found.ahead - found.behind if found.behind is not None else None
            ratio = 0.0
            missed, pull = steady, 0.0
            if answer is not None and found.stale is not None:
                change = found.square * (1 - found.noise) - found.stale
                ratio = self._slope("ratio", before * answer, before * change)
                missed = (steady - ratio * ahead) / max(1 - ratio * (1 - scale), LEAST)
                missed = min(max(missed, 0.0), steady)
                pull = max(ahead - (1 - scale) * missed, 0.0)
            if answer is None:
                kappa = 1.0  # stable training has κ below 1; before anything is known the cautious end is taken
            else:
                kappa = self._slope("kappa", 2 * (before * noise + (1 - (1 - before) * ratio) * pull), answer)
        full = missed + kappa * noise
        self.value = min((missed + pull / 2) / full, 1.0) if full > 0 else 1.0

    def _mean(self, name: str, value: float) -> float:
        # A plain mean at first, so that one unlucky refresh does not begin it.
        count = self._counts[name] = self._counts.get(name, 0) + 1
        share = max(1.0 / count, 1 - STEADY)
        old = self._means.get(name, 0.0)
        self._means[name] = old + share * (value - old)
        return self._means[name]

    def _slope(self, name: str, x: float, y: float) -> float:
        """Of y over x by least squares, kept within [0, 1]."""
        squares = self._sums[f"{name} squares"] = SLOW * self._sums.get(f"{name} squares", 0.0) + x * x
        product = self._sums[name] = SLOW * self._sums.get(name, 0.0) + x * y
        return min(max(product / squares, 0.0), 1.0) if squares > 0 else 1.0

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
