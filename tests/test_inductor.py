"""Compiled blocks with dropout and BatchNorm: the recomputation draws what the first forward drew."""

from __future__ import annotations

import warnings

import pytest
import torch
import zoo
from oracles import run
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx
from bpfx.passes.joint import JointGradient
from bpfx.passes.programs import Forward, LocalGradient, VectorJacobian


@pytest.fixture(scope="module")
def step() -> bpfx.Step:
    case = zoo.convnet(8)
    return bpfx.convert(
        case.model, case.loss_fn, case.batch, blocks=["1", "2"], offset=bpfx.Offset(period=1), compile="inductor"
    )


def test_recomputed_values_are_the_first_ones(step: bpfx.Step) -> None:
    batch = zoo.convnet(8).batch
    forward = step.bp_step.get_submodule("block_0_forward")
    vjp = step.bp_step.get_submodule("block_0_vjp")
    local = step.local_step.get_submodule("block_0_local")
    assert isinstance(forward, Forward) and isinstance(vjp, VectorJacobian) and isinstance(local, LocalGradient)
    values: list[Tensor] = []
    for program in (lambda: forward(batch[0])[0], lambda: vjp.evaluate([batch[0]])[0], lambda: local(list(batch))[0]):
        torch.manual_seed(3)
        values.append(program().detach())
    assert (values[0] == 0).any(), "no dropout, nothing to compare"
    assert torch.equal(values[0], values[1])
    torch.testing.assert_close(values[2], values[0], rtol=1e-4, atol=1e-5)
    torch.manual_seed(4)
    assert not torch.equal(forward(batch[0])[0], values[0])


def test_bp_step_is_the_derivative_of_its_own_loss(step: bpfx.Step) -> None:
    """Central differences along the gradient, with the same draws: wrong masks in the recomputation would show."""
    batch = zoo.convnet(8).batch
    gradient = run(step.run_bp, batch, 7).grads
    weight = step.model.get_parameter("0.conv.weight")
    direction = gradient["0.conv.weight"] / gradient["0.conv.weight"].norm()
    original, losses = weight.detach().clone(), []
    for side in (1, -1):
        with torch.no_grad():
            weight.copy_(original + side * 1e-2 * direction)
        losses.append(float(run(step.run_bp, batch, 7).loss))
    with torch.no_grad():
        weight.copy_(original)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(gradient["0.conv.weight"].norm()), rel=0.1)


def test_a_block_without_random_draws_is_one_program() -> None:
    """Gradients, running statistics and values of the joint graph equal the eager ones; another batch size works."""
    batch = torch.randn(8, 3, 12, 12), torch.randint(0, 4, (8,))
    results = {}
    for compiler in ("eager", "inductor"):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Conv2d(3 if k == 0 else 8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for k in range(2)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4))
        torch.manual_seed(1)
        step = bpfx.convert(model, F.cross_entropy, batch, blocks=["1"], offset=None, compile=compiler)
        with warnings.catch_warnings():
            warnings.simplefilter("error", bpfx.BpfxWarning)  # a block that is not compiled as one program says so
            found = [step.run_local(*batch).grads, step.run_local(batch[0][:5], batch[1][:5]).grads]
        results[compiler] = [*found, dict(model.named_buffers())]
        if compiler == "inductor":
            programs = [p for p in step.local_step.children() if isinstance(p, LocalGradient)]
            assert len(programs) == 2
            assert all(isinstance(p.joint, JointGradient) and p.joint.run is not None for p in programs)
    torch.testing.assert_close(results["inductor"], results["eager"], rtol=1e-3, atol=1e-4)
