"""What bpfx.theory says of the linear model is what a simulation of it does, and lam="auto" finds the best λ there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bpfx import BpfxError, theory
from bpfx._scales import AutoLambda, Products

Setting = dict[str, Any]
COORDINATES = 1024


def setting(**changes: float) -> Setting:
    model = {"mu": 1.0, "a": 0.5, "b": 0.1, "local_noise": 1.0, "offset_noise": 1.0}
    return model | {"batch": 8, "offset_batch": 8, "rate": 0.05, "period": 4} | changes


class Model:
    """θ ← θ − η(aθ + b + noise + λΔ) in many coordinates at once, one row for every λ."""

    def __init__(self, at: Setting, lams: Sequence[float], pieces: int = 2) -> None:
        self.at, self.pieces = at, pieces
        self.lam = torch.tensor(lams, dtype=torch.float64)[:, None]
        # From the mean on: only the variance has to settle.
        m = at["a"] + self.lam * (at["mu"] - at["a"])
        self.theta = (-(1 - self.lam) * at["b"] / m).expand(-1, COORDINATES)
        self.offset: Tensor | None = None
        self._draw = torch.Generator().manual_seed(0)

    def noise(self, variance: float) -> Tensor:
        drawn = torch.randn(COORDINATES, dtype=torch.float64, generator=self._draw)
        return math.sqrt(variance) * drawn

    def refresh(self) -> Products:
        """Measure Δ on pieces; the products are those of the first row, estimated as a refresh estimates them."""
        at, old = self.at, self.offset
        share = at["offset_batch"] / self.pieces
        locals_, deltas = [], []
        for _ in range(self.pieces):
            locals_.append(at["a"] * self.theta + at["b"] + self.noise(at["local_noise"] / share))
            deltas.append((at["mu"] - at["a"]) * self.theta - at["b"] + self.noise(at["offset_noise"] / share))
        self.offset = sum(deltas, torch.zeros(())) / self.pieces
        first = deltas[0][0]
        square = dot(self.offset[0], self.offset[0])
        mean_square = sum(dot(d[0], d[0]) for d in deltas) / self.pieces
        ahead = [dot(sum(d[0] for d in deltas[:i]) / i, locals_[i][0] + deltas[i][0]) for i in range(1, self.pieces)]
        return Products(
            square=square,
            noise=max(mean_square - square, 0.0) / (self.pieces - 1) / square if self.pieces > 1 and square else None,
            behind=dot(old[0], locals_[0][0] + first) if old is not None else None,
            ahead=sum(ahead) / len(ahead) if ahead else None,
            stale=dot(first, old[0]) if old is not None else None,
        )

    def walk(self) -> Tensor:
        """One period; the mean of θ² over its iterations, by row."""
        assert self.offset is not None
        at = self.at
        total = torch.zeros(len(self.lam), dtype=torch.float64)
        for _ in range(at["period"]):
            total += self.theta.square().mean(1)
            local = at["a"] * self.theta + at["b"] + self.noise(at["local_noise"] / at["batch"])
            self.theta = self.theta - at["rate"] * (local + self.lam * self.offset)
        return total / at["period"]


def dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first, second))


def settling(at: Setting, lam: float) -> int:
    """Refreshes until what was at the beginning has shrunk to a hundredth, as squares go."""
    factor = abs(theory.period_factor(at["mu"], at["a"], at["rate"], at["period"], lam))
    return math.ceil(math.log(0.1) / math.log(max(factor, 0.1)))


def simulated(at: Setting, lams: Sequence[float]) -> list[float]:
    model = Model(at, lams, pieces=1)
    burn = max(settling(at, lam) for lam in lams)
    total = torch.zeros(len(lams), dtype=torch.float64)
    for i in range(burn + max(30, burn)):
        model.refresh()
        found = model.walk()
        total += found if i >= burn else 0
    return (total / max(30, burn)).tolist()


# --- the error of a constant λ ----------------------------------------------------------------------------------------

SETTINGS = {
    "usual": setting(),
    "no bias": setting(b=0.0),
    "large bias": setting(b=1.0),
    "heads with little curvature": setting(a=0.1, rate=0.1),
    "heads with all of it": setting(a=1.0),
    "heads with too much": setting(a=1.5),
    "a local loss without curvature": setting(a=0.0, b=0.0),
    "period of 1": setting(period=1),
    "long period": setting(period=16, rate=0.03),
    "near the limit": setting(period=16, rate=0.1, a=0.2),
    "large offset batch": setting(offset_batch=64),
    "small offset batch": setting(offset_batch=1),
    "local noise only": setting(offset_noise=0.0, b=0.0),
    "offset noise only": setting(local_noise=0.0, b=0.0),
    "another curvature": setting(mu=20.0, a=4.0, rate=0.004),
}


@pytest.mark.parametrize("at", SETTINGS.values(), ids=SETTINGS)
def test_the_error_that_theory_predicts_is_that_of_a_simulation(at: Setting) -> None:
    lams = [0.3, 0.6, 1.0] if at["a"] == 0 else [0.0, 0.3, 0.6, 1.0]
    for lam, found in zip(lams, simulated(at, lams), strict=True):
        assert found == pytest.approx(theory.stationary_error(**at, lam=lam), rel=0.1), lam


@pytest.mark.parametrize("at", [setting(rate=0.1 / k, period=k, a=a) for k in (1, 4, 16) for a in (0.1, 0.5, 0.9)])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.1, 10.0])
def test_the_short_formula_holds_for_short_periods(at: Setting, lam: float, noise: float) -> None:
    at = at | {"offset_noise": noise}
    assert theory.first_order_error(**at, lam=lam) == pytest.approx(theory.stationary_error(**at, lam=lam), rel=0.1)


def test_the_short_formula_fails_for_long_ones() -> None:
    at = setting(a=0.1, b=0.0, offset_noise=0.0, rate=0.5 / 16, period=16, lam=1.0)
    assert theory.first_order_error(**at) < 0.85 * theory.stationary_error(**at)


# --- stability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [-0.2, 0.0, 1e-9, 0.1, 0.3, 0.49, 0.6, 1.3])
@pytest.mark.parametrize("rate", [0.03, 0.2, 1.2])
@pytest.mark.parametrize("lam", [0.5, 1.0])
def test_the_longest_stable_period_is_where_the_factor_leaves_one(a: float, rate: float, lam: float) -> None:
    stable = [abs(theory.period_factor(1.0, a, rate, k, lam)) < 1 for k in range(1, 300)]
    found = theory.longest_stable_period(1.0, a, rate, lam)
    if found is None:
        assert all(stable)
    else:
        assert found == (stable.index(False) if False in stable else found)
        setting_ = setting(a=a, rate=rate, lam=lam)
        assert math.isinf(theory.stationary_error(**setting_ | {"period": found + 1}))
        if found:
            assert math.isfinite(theory.stationary_error(**setting_ | {"period": found}))


@pytest.mark.parametrize("rate", [1e-3, 1e-9, 1e-300])
@pytest.mark.parametrize("a", [0.0, 0.2, -0.2])
def test_a_tiny_rate_is_no_more_work(rate: float, a: float) -> None:
    found = theory.longest_stable_period(1.0, a, rate)
    assert found is not None
    assert abs(theory.period_factor(1.0, a, rate, found)) < 1.0 + 1e-12
    assert abs(theory.period_factor(1.0, a, rate, found + max(found // 1000, 2))) > 1.0
    by_limit = 2 / rate if a == 0 else math.log1p(2 / ((1 - a) / a - 1)) / (rate * a)
    assert found == pytest.approx(by_limit, rel=2e-3)


@pytest.mark.parametrize(
    ("mu", "a", "rate", "period", "expected"),
    [(1.0, -0.2, 0.1, 10**6, -math.inf), (1.0, 30.0, 0.1, 10**6, math.inf), (1.0, 30.0, 0.1, 10**6 + 1, -math.inf)],
)
def test_a_factor_beyond_any_number_keeps_its_sign(
    mu: float, a: float, rate: float, period: int, expected: float
) -> None:
    assert theory.period_factor(mu, a, rate, period) == expected
    near = theory.period_factor(mu, a, rate, 200 + period % 2)
    assert math.copysign(1, near) == math.copysign(1, expected)


@pytest.mark.parametrize(("mu", "a", "rate"), [(1.0, 0.2, 1e-320), (1e-10, 0.0, 1e-300), (2.3e-16, -1.0, 0.1)])
def test_a_longest_period_beyond_any_number_is_none(mu: float, a: float, rate: float) -> None:
    assert theory.longest_stable_period(mu, a, rate) is None


@pytest.mark.parametrize("a", [-0.5, 0.0, 1e-9, 0.3, 1.0, 25.0])
def test_the_factor_is_that_of_steps_one_by_one(a: float) -> None:
    rate, lam, theta = 0.06, 0.8, 1.0
    for period in range(1, 12):
        theta -= rate * (a * theta + lam * (1.0 - a))  # Δ was measured at 1
        assert theory.period_factor(1.0, a, rate, period, lam) == pytest.approx(theta, rel=1e-9, abs=1e-9)


# --- the best λ -------------------------------------------------------------------------------------------------------


def bias_for(at: Setting, lam: float) -> Setting:
    """The setting with the bias for which that λ is the best."""
    low, high = 0.0, 5.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if theory.best_lambda(**at | {"b": middle}) < lam else (low, middle)
    return at | {"b": high}


BEST = {
    f"{name}, {lam}": (bias_for(at, lam), lam)
    for name, at in {
        "little curvature": setting(a=0.2, local_noise=0.2, rate=0.1),
        "half of it": setting(local_noise=0.2, rate=0.1, period=4),
        "half of it, noisy": setting(local_noise=1.0, rate=0.03, period=16),
        "most of it": setting(a=0.8, local_noise=0.5, rate=0.04, period=8),
    }.items()
    for lam in (0.2, 0.45, 0.7, 0.95)
}


@pytest.mark.parametrize(("at", "lam"), BEST.values(), ids=BEST)
def test_the_best_lambda_of_theory_is_that_of_a_simulation(at: Setting, lam: float) -> None:
    lams = [lam + i / 20 for i in range(-3, 4) if lam + i / 20 <= 1]
    errors = simulated(at, lams)
    assert theory.best_lambda(**at) == pytest.approx(lam, abs=0.01)
    assert lams[errors.index(min(errors))] == pytest.approx(lam, abs=0.1)


@pytest.mark.parametrize(("at", "lam"), BEST.values(), ids=BEST)
def test_auto_lambda_finds_the_best_constant(at: Setting, lam: float) -> None:
    assert learnt(at) == pytest.approx(lam, abs=0.05)


# Without noise in Δ and without bias every λ is as good as another, but for what the local noise does.
NOISY = {name: at for name, at in SETTINGS.items() if at["offset_noise"] > 0}


@pytest.mark.parametrize("at", NOISY.values(), ids=NOISY)
def test_auto_lambda_finds_it_wherever_the_theory_was_tested(at: Setting) -> None:
    assert learnt(at) == pytest.approx(theory.best_lambda(**at), abs=0.05)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 1.0), (1e3, 0.0)], ids=["no noise", "nothing but noise"])
def test_auto_lambda_goes_to_the_ends(noise: float, expected: float) -> None:
    at = setting(a=0.98, b=0.3 if noise == 0 else 0.0, offset_noise=noise, local_noise=1.0)
    assert learnt(at) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("lam", [0.3, 0.7])
def test_auto_lambda_does_not_depend_on_the_scale_of_gradients(lam: float) -> None:
    at = bias_for(setting(rate=0.1, local_noise=0.2), lam)
    big = at | {"mu": 1000.0, "a": 500.0, "b": 1000 * at["b"], "rate": at["rate"] / 1000}
    big |= {name: 1e6 * at[name] for name in ("local_noise", "offset_noise")}
    assert learnt(big) == pytest.approx(learnt(at), abs=1e-3)


def test_a_loaded_auto_lambda_goes_on_as_the_saved_one() -> None:
    model, first = Model(setting(), [1.0]), AutoLambda()
    other = AutoLambda()
    for i in range(12):
        products = model.refresh()
        first.take(products)
        if i == 6:
            other.load(first.state())
        elif i > 6:
            other.take(products)
            assert other.value == first.value
        model.walk()


def measured(noise: float, kappa: float, lam: float) -> Products:
    """Exact means at heads with half of the curvature, Δ's lasting part 1 and no wandering."""
    return Products(square=1 + noise, noise=noise / (1 + noise), behind=(1 - lam) - 2 * kappa * lam * noise,
                    ahead=1 - lam, stale=1 - kappa * lam * noise)  # fmt: skip


def test_noise_that_the_weights_overshoot_on_is_left_out() -> None:
    auto = AutoLambda()
    for _ in range(30):
        auto.take(Products(square=1.0, noise=1.0, behind=-2.0, ahead=0.0, stale=0.0))
    assert auto.value < 0.02


def test_a_small_lambda_is_not_for_ever() -> None:
    """The rate falls: the weights answer less, and noise does less harm."""
    auto = AutoLambda()
    for kappa, refreshes, low, high in ((0.9, 30, 0.0, 0.02), (1e-6, 400, 0.95, 1.0)):
        for _ in range(refreshes):
            auto.take(measured(1000.0, kappa, auto.value))
        assert low <= auto.value <= high


def learnt(at: Setting, refreshes: int = 150) -> float:
    """Mean λ in the second half of a run under ``lam="auto"``."""
    model, auto = Model(at, [1.0]), AutoLambda()
    values = []
    for _ in range(refreshes):
        auto.take(model.refresh())
        model.lam.fill_(auto.value)
        values.append(auto.value)
        model.walk()
    half = values[refreshes // 2 :]
    return sum(half) / len(half)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"period": 0}, "period"),
        ({"period": 2.5}, "period"),
        ({"batch": 0}, "batch"),
        ({"offset_batch": -1}, "offset_batch"),
        ({"local_noise": -1.0}, "local_noise"),
        ({"offset_noise": math.inf}, "offset_noise"),
        ({"mu": math.inf}, "mu"),
        ({"a": -1.0, "mu": -1.0}, "lower the rate or the period"),
    ],
)
def test_a_value_outside_its_range_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BpfxError, match=words):
        theory.best_lambda(**setting(**changes))
