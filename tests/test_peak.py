"""Each block's backward runs right after its forward: the peak of a local step does not grow with depth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import run
from torch import Tensor, nn

import bpfx
from bpfx.memory import measure_peak

WIDTH, SAMPLES = 64, 4096


def stack(depth: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Activations of 1 MiB a layer, parameters of 16 KiB: what counts is what is alive at once."""
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)]
    batch = torch.randn(SAMPLES, WIDTH), torch.randint(0, 4, (SAMPLES,))
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4)), batch


def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    def bp() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))

    return measure_peak(bp).peak_bytes


def local(model: nn.Module, batch: tuple[Tensor, Tensor], depth: int) -> tuple[bpfx.Step, int]:
    names = [str(k) for k in range(1, depth)]
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=names, offset=None)
    return step, measure_peak(lambda: step.run_local(*batch)).peak_bytes


def test_local_peak_is_flat_in_depth() -> None:
    shallow, deep = (local(*stack(depth), depth)[1] for depth in (4, 16))
    assert deep <= 1.15 * shallow
    bp_shallow, bp_deep = (plain(*stack(depth)) for depth in (4, 16))
    assert bp_deep > 2.5 * bp_shallow, "the stack does not show what it is to show"
    assert deep < 0.4 * bp_deep


@pytest.mark.parametrize("kind", ["local", "bp_blocks", "refresh"])
def test_predicted_peak_is_the_measured_one(kind: str) -> None:
    model, batch = stack(6)
    offset = bpfx.Offset(period=1) if kind == "refresh" else None
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=4, offset=offset)
    call = {"local": step.run_local, "bp_blocks": step.run_bp, "refresh": step.forward}[kind]
    assert measure_peak(lambda: call(*batch)).peak_bytes == pytest.approx(step.plan.predicted[kind], rel=0.1)


def test_peak_grows_with_the_horizon_as_predicted() -> None:
    model, batch = stack(6)
    peaks = []
    for horizon in (1, 2, 3, 7):
        step = bpfx.convert(
            model, F.cross_entropy, batch, blocks=[str(k) for k in range(1, 7)], horizon=horizon, offset=None
        )
        peak = measure_peak(lambda step=step: step.run_local(*batch)).peak_bytes
        assert peak == pytest.approx(step.plan.predicted["local"], rel=0.1)
        peaks.append(peak)
    assert peaks == sorted(peaks) and peaks[2] > 1.2 * peaks[0]


def test_drop_in_loop_needs_no_second_set_of_gradients() -> None:
    """`loss.backward()` hands the gradients over; it does not copy them."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 4))
    batch = torch.randn(4, 512), torch.randint(0, 4, (4,))
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=["2", "4"], offset=None)

    def loop() -> None:
        step.zero_grad()
        run(step, batch).backward()

    gradients = sum(p.numel() * p.element_size() for p in step.parameters())
    loop()
    step.zero_grad()
    assert measure_peak(loop, warmup=0).peak_bytes < 1.5 * gradients
