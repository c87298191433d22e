"""alpha="auto" finds the α that would have predicted the next BP gradient best, also in a run that drifts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx._scales import SAMPLE, AutoAlpha, Products, sample

Gradients = dict[str, Tensor]


def products(bp: Gradients, local: Gradients) -> Products:
    anchor = {name: (sample(name, bp[name]), sample(name, local[name])) for name in bp}
    return Products(square=1.0, noise=None, behind=None, ahead=None, anchor=anchor)


def best(before: tuple[Gradients, Gradients], now: tuple[Gradients, Gradients], names: list[str]) -> float:
    """⟨g_t − g₀, ℓ_t − ℓ₀⟩ / ‖ℓ_t − ℓ₀‖², over whole gradients."""
    bp = torch.cat([(now[0][n] - before[0][n]).flatten() for n in names])
    local = torch.cat([(now[1][n] - before[1][n]).flatten() for n in names])
    return float(bp @ local / (local @ local))


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("size", [SAMPLE // 2, 100 * SAMPLE])
def test_a_drift_that_both_gradients_share_in_part(share: float, size: int) -> None:
    # The same way at every refresh: nothing here is stationary.
    torch.manual_seed(0)
    drift, start = torch.randn(size), torch.randn(size)
    auto = AutoAlpha()
    for t in range(12):
        noise = 0.1 * torch.randn(2, size)
        bp, local = share * t * drift + noise[0], 5 * start + t * drift + noise[1]
        auto.take(products({"w": bp}, {"w": local}))
    assert auto.value == pytest.approx(share, abs=0.05)


@pytest.mark.filterwarnings("ignore:the model's parameters were stepped but the heads'")
def test_alpha_is_the_formula_over_two_refreshes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(32, 8).double(), torch.randint(0, 3, (32,))
    blocks = ["2", "4"]
    offset = bpfx.Offset(period=2, form="B", alpha="auto")
    step, local_step = (
        bpfx.convert(net, F.cross_entropy, (x, y), blocks=blocks, offset=o, local_loss=("supervised", 3.0))
        for o in (offset, None)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)  # heads stand still: both steps have the same ones
    local_step.heads.load_state_dict(step.heads.state_dict())

    anchors = []
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        bp = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        local_step(x, y).backward()
        anchors.append((bp, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}))
        for _ in range(2):
            net.zero_grad()
            step(x, y).backward()
            optimizer.step()
    used = [{b["block"]: b["alpha"] for b in refresh["blocks"]} for refresh in step.diagnostics.refreshes]
    assert used[0] == used[1] == {0: 1.0, 1: 1.0}  # nothing is known before the second refresh is over
    for block, names in enumerate([["0.weight", "0.bias"], ["2.weight", "2.bias"]]):
        found = best(anchors[0], anchors[1], names)
        assert 0 < found < 1, "the case has to lie within the range"
        assert used[2][block] == pytest.approx(found, rel=1e-6)


def test_alpha_stays_within_its_range() -> None:
    for sign, expected in ((-1.0, 0.0), (3.0, 1.0)):
        auto = AutoAlpha()
        for t in range(2):
            auto.take(products({"w": sign * t * torch.ones(4)}, {"w": t * torch.ones(4)}))
        assert auto.value == expected


def test_a_block_whose_parameters_changed_begins_anew() -> None:
    auto = AutoAlpha()
    for name in ("w", "v"):
        auto.take(products({name: torch.ones(4)}, {name: torch.ones(4)}))
    assert auto.value == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (40, 50), (8, 16, 5, 5)], ids=str)
def test_products_of_samples_are_those_of_the_whole(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    first = torch.randn(shape, dtype=dtype)
    second = first + torch.randn(shape, dtype=dtype)
    whole = sum(
        float((a.double() * b.double()).sum())
        for a, b in zip(
            *(torch.view_as_real(t).unbind(-1) if dtype.is_complex else (t,) for t in (first, second)), strict=True
        )
    )
    found = float(torch.dot(sample("w", first), sample("w", second)))
    assert found == pytest.approx(whole, rel=0.25 if first.numel() > SAMPLE else 1e-6)


def test_a_loaded_alpha_goes_on_as_the_saved_one() -> None:
    torch.manual_seed(0)
    first, other = AutoAlpha(), AutoAlpha()
    for i in range(6):
        found = products({"w": torch.randn(20)}, {"w": torch.randn(20)})
        first.take(found)
        if i == 3:
            other.load(first.state())
        elif i > 3:
            other.take(found)
            assert other.value == first.value


def test_sums_of_an_earlier_version_are_left_behind() -> None:
    auto = AutoAlpha()
    auto.load({"value": 0.9, "sums": [0.0, 100.0]})
    for t in range(2):
        auto.take(products({"w": 0.5 * t * torch.ones(4)}, {"w": t * torch.ones(4)}))
    assert auto.value == pytest.approx(0.5)
