"""What theory says of an offset that is measured every K iterations: its error, the best λ, the longest period.

All of it is about one model, derived for bpfx (docs/offset.md): one dimension with the minimum at 0, plain gradient
descent with rate η. The true gradient is μθ, the local one aθ + b with noise of variance s_l/B, new in every iteration.
Every K iterations Δ = (μ−a)θ₀ − b is measured at the weights θ₀ of that moment, with noise of variance s_d/B′. It stays
as it is until the next refresh, and is independent of the local noise:

    θ ← θ − η (aθ + b + noise + λΔ)

A step's mean gradient is then (1−λ)b + mθ, with m = a + λ(μ−a), wherever θ stays near θ₀. Units: whatever θ has, u, and
a loss: μ, a, m in loss/u², b in loss/u, s_l and s_d in (loss/u)² times samples, η in u²/loss; K, B and B′ are counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bpfx.errors import BpfxError

__all__ = ["best_lambda", "first_order_error", "longest_stable_period", "period_factor", "stationary_error"]


def period_factor(mu: float, a: float, rate: float, period: int, lam: float = 1.0) -> float:
    """How far a distance to the minimum has shrunk from one refresh to the next, noise apart.

        f = ρ^K − ηλ(μ−a)·S,      ρ = 1 − ηa,      S = 1 + ρ + … + ρ^(K−1)

    It is 1 − ηmK for small η·K; training is stable where −1 < f < 1. Source: derived for bpfx, docs/offset.md.

    Args:
        mu: true curvature μ.
        a: curvature of the local loss.
        rate: learning rate η. With momentum β pass η/(1−β), an estimate.
        period: iterations between refreshes, K.
        lam: λ.

    Raises:
        BpfxError: a rate that is not above 0, a period below 1, or a number that is not finite.

    Example:
        >>> round(period_factor(mu=1.0, a=0.2, rate=0.1, period=26), 2)
        -1.04
    """
    _check(period=period, rate=rate, mu=mu, a=a, lam=lam)
    step = rate * a
    try:
        if step == 0:
            power, total = 1.0, float(period)
        elif step < 1:  # exact also where ρ^K is almost 1
            change = math.expm1(period * math.log1p(-step))
            power, total = 1 + change, -change / step
        else:
            power = (1 - step) ** period
            total = (1 - power) / step
    except OverflowError:  # ρ^K·m/a, up to its sign
        sign = -1 if step > 1 and period % 2 else 1
        return math.copysign(math.inf, sign * (a + lam * (mu - a)) / a)
    return power - rate * lam * (mu - a) * total


def longest_stable_period(mu: float, a: float, rate: float, lam: float = 1.0) -> int | None:
    """The longest K up to which every period is stable; ``None`` where there is no limit, 0 where no K is stable.

        K < ln((c+1)/(c−1)) / −ln(1−ηa),      c = λ(μ−a)/a

    which is about 2/(ηλ(μ−a)) for large c. There is no limit for 0 < c ≤ 1. Source: derived for bpfx from
    :func:`period_factor`, docs/offset.md.

    Args:
        mu: true curvature μ.
        a: curvature of the local loss; 0 or below is allowed.
        rate: learning rate η. With momentum β pass η/(1−β), an estimate.
        lam: λ.

    Raises:
        BpfxError: a rate that is not above 0, or a number that is not finite.

    Example:
        >>> longest_stable_period(mu=1.0, a=0.2, rate=0.1)
        25
        >>> longest_stable_period(mu=1.0, a=0.6, rate=0.1) is None
        True
    """
    _check(period=1, rate=rate, mu=mu, a=a, lam=lam)
    extra = lam * (mu - a)
    rho = 1 - rate * a

    def stable(period: int) -> bool:
        return abs(period_factor(mu, a, rate, period, lam)) < 1

    if not 0 < rate * (a + extra) < 2:
        return 0
    if rho <= 0:  # the local steps alone overshoot
        if rho <= -1:
            return next(period - 1 for period in range(2, 10**9) if not stable(period))
        # |f + c| = (1+c)|ρ|^K falls; whether the longest period is stable decides.
        tail = 1 - abs(extra / a)
        last = 1
        while tail <= 0 or (1 + extra / a) * abs(rho) ** last >= tail:
            if not stable(last + 1):
                return last
            last += 1
        return None
    if rate * a == 0:
        limit = 2 / (rate * extra)
    else:
        c = extra / a
        if -1 <= c <= 1:
            return None
        inside = 2 / (c - 1)
        limit = math.log1p(inside) / -math.log1p(-rate * a) if inside > -1 else math.inf
    if math.isinf(limit):  # beyond any number
        return None
    last = max(int(limit) - 1, 1)
    for _ in range(3):  # the limit is right but for its rounding
        last += stable(last + 1)
    return last


def stationary_error(
    mu: float,
    a: float,
    b: float,
    local_noise: float,
    offset_noise: float,
    batch: int,
    offset_batch: int,
    rate: float,
    period: int,
    lam: float,
) -> float:
    """Mean of θ² in the long run, over all iterations; infinite where the setting is unstable.

        E = ((1−λ)b/m)² + V̄

    V₀, the variance at refreshes, solves the balance of one period, and V̄ is the mean over the period of

        V_j = f_j² V₀ + η²·(s_l/B)·Σ_{i<j} ρ^(2i) + η²λ²S_j²·s_d/B′,      V_K = V₀

    with f_j and S_j those of :func:`period_factor` for j iterations. This is exact. :func:`first_order_error` is its
    limit for small η·m·K: within 10 % up to η·m·K = 0.2, off by 20 % either way at 0.5. Source: derived for bpfx,
    docs/offset.md; tests/test_bias_variance.py simulates it.

    Args:
        mu: true curvature μ.
        a: curvature of the local loss.
        b: local gradient at the true minimum.
        local_noise: variance of one sample's local gradient, s_l.
        offset_noise: variance of one sample's difference of BP and local gradient, s_d.
        batch: samples of a local step, B.
        offset_batch: samples of a refresh, B′.
        rate: learning rate η.
        period: K.
        lam: λ.

    Returns:
        In θ's units squared.

    Raises:
        BpfxError: a rate that is not above 0, a period or batch below 1, a negative variance, or a number that is not
            finite.

    Example:
        >>> setting = dict(mu=1.0, a=0.5, b=1.0, local_noise=1.0, offset_noise=1.0, batch=10, offset_batch=10)
        >>> round(stationary_error(**setting, rate=0.02, period=4, lam=0.0), 3)  # (b/a)² and a little noise
        4.002
        >>> round(stationary_error(**setting, rate=0.02, period=4, lam=1.0), 4)
        0.005
    """
    _check(period, rate, batch, offset_batch, local_noise, offset_noise, mu=mu, a=a, b=b, lam=lam)
    return _error(_Walk(a, rate, period), mu, a, b, local_noise / batch, offset_noise / offset_batch, lam)


def first_order_error(
    mu: float,
    a: float,
    b: float,
    local_noise: float,
    offset_noise: float,
    batch: int,
    offset_batch: int,
    rate: float,
    period: int,
    lam: float,
) -> float:
    """:func:`stationary_error` for small η·m·K, in a formula that shows what counts.

        E ≈ ((1−λ)b/m)² + (η/2m)·(s_l/B + λ²·K·s_d/B′)

    A frozen offset's noise counts K times. Source: derived for bpfx, docs/offset.md. Arguments, units and errors are
    those of :func:`stationary_error`; infinite for m ≤ 0.

    Example:
        >>> setting = dict(mu=1.0, a=0.5, b=1.0, local_noise=1.0, offset_noise=1.0, batch=10, offset_batch=10)
        >>> round(first_order_error(**setting, rate=0.02, period=4, lam=1.0), 4)
        0.005
    """
    _check(period, rate, batch, offset_batch, local_noise, offset_noise, mu=mu, a=a, b=b, lam=lam)
    m = a + lam * (mu - a)
    if m <= 0:
        return math.inf
    noise = local_noise / batch + lam**2 * period * offset_noise / offset_batch
    return ((1 - lam) * b / m) ** 2 + rate / (2 * m) * noise


def best_lambda(
    mu: float,
    a: float,
    b: float,
    local_noise: float,
    offset_noise: float,
    batch: int,
    offset_batch: int,
    rate: float,
    period: int,
) -> float:
    """The λ from 0 to 1 with the smallest :func:`stationary_error`, found numerically.

    For small η·m·K it solves λ = (P + W/2)/(P + κs) with P = (bμ/m)², the squared mean of Δ, W = μ(μ−a) times the
    variance of θ, κ = ημK/2 and s = s_d/B′. Without W, which is there because a larger λ also raises m, it comes out
    too small. Source: derived for bpfx, docs/offset.md. Arguments, units and errors are those of
    :func:`stationary_error`.

    Raises:
        BpfxError: as :func:`stationary_error`; also where no λ from 0 to 1 is stable.

    Example:
        >>> setting = dict(mu=1.0, a=0.5, b=0.1, local_noise=1.0, batch=10, offset_batch=10, rate=0.02, period=4)
        >>> best_lambda(**setting, offset_noise=0.0)
        1.0
        >>> best_lambda(**setting, offset_noise=10.0) < 0.6
        True
    """
    _check(period, rate, batch, offset_batch, local_noise, offset_noise, mu=mu, a=a, b=b)
    walk = _Walk(a, rate, period)

    def error(lam: float) -> float:
        return _error(walk, mu, a, b, local_noise / batch, offset_noise / offset_batch, lam)

    steps = 100
    best = min(range(steps + 1), key=lambda i: error(i / steps))
    if math.isinf(error(best / steps)):
        raise BpfxError(
            f"no lam from 0 to 1 is stable for mu={mu}, a={a}, rate={rate}, period={period}; lower the rate or the "
            "period"
        )
    return _smallest(error, max(best - 1, 0) / steps, min(best + 1, steps) / steps)


class _Walk:
    """Sums over the powers of ρ = 1 − ηa within one period."""

    def __init__(self, a: float, rate: float, period: int) -> None:
        self.rate, self.rho = rate, 1 - rate * a
        self.powers, self.sums, self.squares = [1.0], [0.0], [0.0]  # ρ^j, S_j, Σ ρ^(2i), for j = 0…K
        for _ in range(period):
            power = self.powers[-1]
            self.sums.append(self.sums[-1] + power)
            self.squares.append(self.squares[-1] + power * power)
            self.powers.append(power * self.rho)

    def factor(self, extra: float, j: int = -1) -> float:
        """f_j, with λ(μ−a) as ``extra``."""
        return self.powers[j] - self.rate * extra * self.sums[j]


def _error(walk: _Walk, mu: float, a: float, b: float, local: float, frozen: float, lam: float) -> float:
    extra = lam * (mu - a)
    m = a + extra
    f = walk.factor(extra)
    if not -1 < f < 1 or m <= 0:
        return math.inf
    added = [walk.rate**2 * (local * q + lam**2 * frozen * s * s) for q, s in zip(walk.squares, walk.sums, strict=True)]
    start = added[-1] / (1 - f * f)
    period = len(added) - 1
    variance = sum(walk.factor(extra, j) ** 2 * start + added[j] for j in range(period)) / period
    return ((1 - lam) * b / m) ** 2 + variance


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Ternary search; the ends count."""
    ends = (low, high)
    for _ in range(60):
        third = (high - low) / 3
        if function(low + third) <= function(high - third):
            high -= third
        else:
            low += third
    return min((*ends, (low + high) / 2), key=function)


def _check(
    period: int,
    rate: float,
    batch: int = 1,
    offset_batch: int = 1,
    local_noise: float = 0.0,
    offset_noise: float = 0.0,
    **numbers: float,
) -> None:
    for name, count in (("period", period), ("batch", batch), ("offset_batch", offset_batch)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise BpfxError(f"{name}={count!r}: pass a whole number of at least 1")
    numbers |= {"rate": rate, "local_noise": local_noise, "offset_noise": offset_noise}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BpfxError(f"{name}={value!r}: pass a finite number")
    if rate <= 0:
        raise BpfxError(f"rate={rate!r}: pass a learning rate above 0")
    for name, value in (("local_noise", local_noise), ("offset_noise", offset_noise)):
        if value < 0:
            raise BpfxError(f"{name}={value!r}: pass a variance of at least 0")
