"""An offset that is too old for the learning rate is noticed before it does harm, and only then."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx._refresh import BlockFound
from bpfx._scales import Products
from bpfx._stability import Stability


@dataclasses.dataclass
class Run:
    losses: list[float]
    warned: list[tuple[int, str]]  # iteration and text of every bpfx.BpfxWarning

    def first(self, words: str) -> int | None:
        return next((t for t, text in self.warned if words in text), None)

    @property
    def broken(self) -> int | None:
        """The first iteration whose loss is NaN or infinite."""
        return next((t for t, loss in enumerate(self.losses) if not math.isfinite(loss)), None)


def quadratic() -> nn.Module:
    """Frozen weights in the last layer: a quadratic task loss, as in the linear model."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    net[1].weight.requires_grad_(False)
    return net


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 4))


def tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


NETS = {"quadratic": (quadratic, ["1"]), "linear": (linear, ["2", "4"]), "tanh": (tanh, ["2", "4"])}


def train(
    net: str,
    period: int | str,
    rate: float,
    iterations: int,
    *,
    weight: float = 1.0,
    momentum: float = 0.0,
    jump: int | None = None,
    until: str | None = None,
) -> Run:
    """SGD on noisy regression data.

    Args:
        weight: of the local losses; with a small one Δ has nearly all of the curvature.
        jump: the iteration from which on the learning rate is 20 times as large.
        until: words of a warning after which nothing more is of interest.
    """
    make, blocks = NETS[net]
    model, target = make(), torch.randn(8, 4)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 8)
        return x, x @ target + 0.3 * torch.randn(32, 4)

    offset = bpfx.Offset(period=period)
    step = bpfx.convert(model, F.mse_loss, batch(), blocks=blocks, offset=offset, local_loss=("supervised", weight))
    optimizer = torch.optim.SGD(step.parameters(), lr=rate, momentum=momentum)
    run = Run([], [])
    for t in range(iterations):
        if t == jump:
            optimizer.param_groups[0]["lr"] *= 20
        x, y = batch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = step(x, y)
        run.warned += [(t, str(w.message)) for w in caught if issubclass(w.category, bpfx.BpfxWarning)]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            run.losses.append(float(F.mse_loss(model(x), y)))
        if run.broken is not None or (until is not None and run.first(until) is not None):
            break
    return run


# Plain BP is stable at all of these learning rates.
TOO_OLD = [("quadratic", 16, 0.5), ("quadratic", 8, 1.0), ("linear", 8, 0.1), ("linear", 4, 0.1), ("tanh", 8, 0.1)]


@pytest.mark.parametrize(("net", "period", "rate"), TOO_OLD)
def test_an_unstable_offset_is_named_before_the_loss_breaks(net: str, period: int, rate: float) -> None:
    run = train(net, period, rate, 30 * period, weight=0.1, until="unstable offset")
    assert run.first("unstable offset") is not None
    assert run.broken is None


@pytest.mark.parametrize(("net", "period", "rate"), TOO_OLD)
def test_an_automatic_period_stays_finite_where_a_fixed_one_does_not(net: str, period: int, rate: float) -> None:
    run = train(net, "auto", rate, 120, weight=0.1)
    assert run.broken is None
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(("net", "period", "rate"), [("quadratic", 16, 0.1), ("linear", 8, 0.02), ("linear", 4, 0.03)])
def test_with_momentum_it_is_named_well_before_the_loss_breaks(net: str, period: int, rate: float) -> None:
    run = train(net, period, rate, 300, weight=0.1, momentum=0.9)
    warned = run.first("unstable offset")
    assert run.broken is not None, "the setting has to diverge"
    assert warned is not None and warned <= run.broken - 2 * period


Refreshes = list[tuple[dict[int, float], dict[int, float]]]  # by block: cosine to the old Δ, norm of the new one


def complaints(refreshes: Refreshes) -> list[str]:
    """What is said at each, from norms of 1 on."""
    watch, found = Stability(), []
    before = {k: 1.0 for cosines, _ in refreshes for k in cosines}
    for cosines, changed in refreshes:
        now, again = before | changed, Stability()
        again.load(watch.state())
        found.append(watch.complaint(cosines, before, now) or "")
        assert (again.complaint(cosines, before, now) or "") == found[-1], "a saved one goes on"
        before = now
    return found


AGAIN = "points against the old one"
TURNS: dict[str, tuple[Refreshes, list[str]]] = {
    "gradients grow and point where they did": ([({0: 0.5}, {0: 5.0}), ({0: 0.5}, {0: 30.0})], ["", ""]),
    "twice against the old one": ([({0: -0.6}, {}), ({0: -0.6}, {}), ({0: -0.6}, {})], ["", AGAIN, ""]),
    "once, and much larger": ([({0: -0.3}, {0: 5.0}), ({0: 0.1}, {0: 60.0})], [AGAIN, ""]),
    "on the whole": (
        [({0: -0.3, 1: -0.3}, {}), ({0: -0.3, 1: -0.3}, {0: 2.0, 1: 2.0}), ({0: -0.3, 1: -0.3}, {0: 4.0, 1: 4.0})],
        ["", "", "have become 4 times as large"],
    ),
    "not on the whole": ([({0: -0.3}, {}), ({0: 0.6}, {0: 2.0}), ({0: -0.3}, {0: 4.0})], ["", "", ""]),
    "one of eight": (
        [({**dict.fromkeys(range(7), 0.9), 7: -0.9}, {7: 5.0**i}) for i in range(1, 4)],
        ["", "block 7's offsets turn against the ones before", ""],
    ),
    "a block whose refresh failed once": (
        [({0: 0.5, 1: 0.5}, {0: 100.0}), ({0: -0.45, 1: -0.45}, {}), ({1: -0.45}, {}), ({0: -0.45, 1: -0.45}, {})],
        ["", "", "", ""],
    ),
}


@pytest.mark.parametrize(("refreshes", "expected"), TURNS.values(), ids=TURNS)
def test_an_offset_that_turns_and_grows_is_named(refreshes: Refreshes, expected: list[str]) -> None:
    for words, complaint in zip(expected, complaints(refreshes), strict=True):
        assert bool(words) == bool(complaint) and words in complaint


def test_what_was_before_a_phase_of_exact_steps_is_forgotten() -> None:
    """Back at a period of 4, a Δ that agrees with the one before it is no reason for a warning."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    step = bpfx.convert(net, F.mse_loss, (torch.randn(8, 4), torch.randn(8, 4)), blocks=["2"], offset=bpfx.Offset())
    correction = step._correction
    assert correction is not None
    correction.rule.period = 4
    first = BlockFound(
        cosine=0.5, ratio=1.0, staleness=None, spread=None, descent=None, bp=1.0, local=1.0, norm=1.0,
        products=Products(square=1.0, noise=None, behind=None, ahead=None),
    )  # fmt: skip
    correction.settle(0, {0: first})
    measured = dataclasses.replace(first, staleness=-0.4, descent=-0.3)
    correction.settle(4, {0: measured})
    assert correction.rule.period == 1, "given up on trial"
    correction.settle(8, {0: dataclasses.replace(measured, norm=5.0)})
    correction.rule.period = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correction.settle(12, {0: dataclasses.replace(measured, staleness=0.15, descent=0.3, norm=5.0)})


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("period", "weight"), [(4, 1.0), (4, 0.1), ("auto", 1.0)])
def test_calm_training_is_left_alone(net: str, weight: float, period: int | str) -> None:
    run = train(net, period, 0.01, 204, weight=weight)
    assert run.warned == []
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("net", ["quadratic", "tanh"])
@pytest.mark.parametrize(("period", "at"), [(4, 40), (4, 41), (4, 42), (4, 43), ("auto", 40), ("auto", 42)])
def test_a_jump_of_the_learning_rate_is_noticed_within_three_iterations(net: str, period: int | str, at: int) -> None:
    run = train(net, period, 0.002, at + 8, jump=at)
    warned = run.first("times as far")
    assert warned is not None and at <= warned <= at + 3
    assert len(run.warned) == 1
