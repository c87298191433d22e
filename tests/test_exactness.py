"""The method's exactness facts, for both compilers: what the offset must reproduce, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import (
    Reference,
    assert_buffers,
    assert_gradients,
    bp_oracle,
    buffers,
    check_bp,
    check_local,
    clear_gradients,
    detached_oracle,
    drop_in,
    run,
    seed_all,
)
from torch import Tensor
from zoo import Case

import bpfx

COMPILERS = ["eager", "inductor"]


def setting(compiler: str, size: int = 4, seed: int = 0) -> tuple[Case, tuple[str, ...]]:
    """fp64, so that nothing hides in rounding; under Inductor no dropout, whose masks are Inductor's own."""
    if compiler == "eager":
        return zoo.convnet(size, seed, torch.float64), zoo.CONVNET_CUTS
    return zoo.mlp(size, seed, torch.float64), zoo.MLP_CUTS


def convert(case: Case, cuts: tuple[str, ...], compiler: str = "eager", **options: Any) -> Any:
    return bpfx.convert(case.model, case.loss_fn, case.batch, blocks=list(cuts), compile=compiler, **options)


def of_model(reference: Reference) -> dict[str, Tensor]:
    return {name: grad for name, grad in reference.grads.items() if not name.startswith("bpfx.heads.")}


def of_heads(reference: Reference) -> dict[str, Tensor]:
    return {name: grad for name, grad in reference.grads.items() if name.startswith("bpfx.heads.")}


def combine(rule: Callable[..., Tensor], *references: dict[str, Tensor]) -> dict[str, Tensor]:
    """One gradient from several, name by name."""
    return {name: rule(*(reference[name] for reference in references)) for name in references[0]}


# --- the four facts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", COMPILERS)
def test_refresh_at_every_step_is_bp(compiler: str) -> None:
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0))
    for seed in range(3):
        bp, local = bp_oracle(case, seed), detached_oracle(case, step.heads, cuts, seed)
        found = drop_in(step, case.batch, seed)
        assert_gradients(of_model(found), bp.grads)
        assert_gradients(of_heads(found), of_heads(local))  # heads have no BP gradient to be corrected by
        assert_buffers(found.buffers, bp.buffers)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("period", [1, 2])
def test_lambda_zero_is_the_local_gradient(compiler: str, period: int) -> None:
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=bpfx.Offset(period=period, alpha=1.0, lam=0.0))
    for seed in range(3):
        local = detached_oracle(case, step.heads, cuts, seed)
        found = drop_in(step, case.batch, seed)
        assert_gradients(found.grads, local.grads)
        assert_buffers(found.buffers, local.buffers)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_last_block_has_no_offset(compiler: str) -> None:
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0))
    with torch.no_grad():  # a head that begins as a copy of the last block gives the BP gradient itself, and no offset
        for parameter in step.heads.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    drop_in(step, case.batch)
    last = set(step.plan.blocks[-1].parameter_names)
    assert last
    bp = bp_oracle(case)
    for name in last & step.offset_state.keys():
        assert step.offset_state[name].norm() <= 1e-9 * bp.grads[name].norm(), name
    # and the other blocks do: a state that is zero everywhere would pass the lines above
    for block in step.plan.blocks[:-1]:
        assert any(step.offset_state[name].norm() > 1e-3 * bp.grads[name].norm() for name in block.parameter_names)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_full_horizon_is_bp(compiler: str) -> None:
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=None, horizon=len(cuts) + 1)
    for seed in range(2):
        bp = bp_oracle(case, seed)
        found = drop_in(step, case.batch, seed)
        assert_gradients(of_model(found), bp.grads)
        assert_buffers(found.buffers, bp.buffers)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_both_steps_under_both_compilers(compiler: str) -> None:
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=None)
    check_bp(step, case)
    check_local(step, case, cuts)


# --- the update rule -------------------------------------------------------------------------------------------------


def test_offset_is_bp_minus_local() -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0))
    bp, local = bp_oracle(case), detached_oracle(case, step.heads, cuts)
    drop_in(step, case.batch)
    expected = combine(torch.sub, bp.grads, of_model(local))
    assert not {name for name in step.offset_state if name.startswith("bpfx.heads.")}
    assert_gradients(step.offset_state, expected)


@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 0.0), (0.0, 1.0), (0.3, 0.7), (2.0, 1.0)])
def test_alpha_and_lambda_scale_the_two_parts(alpha: float, lam: float) -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=1, alpha=alpha, lam=lam))
    bp, local = bp_oracle(case), detached_oracle(case, step.heads, cuts)
    found = drop_in(step, case.batch)
    expected = combine(lambda g, own: alpha * own + lam * (g - own), bp.grads, of_model(local))
    assert_gradients(of_model(found), expected)
    assert_gradients(of_heads(found), of_heads(local))  # α scales the model's gradients; heads keep their own


@pytest.mark.parametrize("compiler", COMPILERS)
def test_offset_is_kept_between_refreshes(compiler: str) -> None:
    """Period 3, a new batch and new weights at every iteration: each gradient against the anchor's offset."""
    case, cuts = setting(compiler)
    step = convert(case, cuts, compiler, offset=bpfx.Offset(period=3, alpha=1.0, lam=1.0))
    optimizer = torch.optim.SGD(step.parameters(), lr=0.05)
    delta: dict[str, Tensor] = {}
    for t in range(7):
        case.batch = setting(compiler, seed=0, size=4 + t % 2)[0].batch
        local = detached_oracle(case, step.heads, cuts, seed=t)
        bp = bp_oracle(case, seed=t)
        if t % 3 == 0:
            delta = combine(torch.sub, bp.grads, of_model(local))
        found = drop_in(step, case.batch, seed=t)
        assert_gradients(of_model(found), combine(torch.add, of_model(local), delta))
        assert_gradients(of_heads(found), of_heads(local))
        assert_buffers(found.buffers, local.buffers)
        optimizer.step()


def test_lambda_may_be_a_schedule() -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=1, alpha=1.0, lam=lambda iteration: 1.0 / (1 + iteration)))
    for t in range(3):
        bp, local = bp_oracle(case, t), detached_oracle(case, step.heads, cuts, t)
        found = drop_in(step, case.batch, t)
        expected = combine(lambda g, own, t=t: own + (g - own) / (1 + t), bp.grads, of_model(local))
        assert_gradients(of_model(found), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama_lora", "branch_inside", "checkpoint_reentrant", "lstm"])
def test_refresh_at_every_step_is_bp_on_the_zoo(name: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    step = convert(case, entry.cuts, offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0))
    bp = bp_oracle(case)
    found = drop_in(step, case.batch)
    assert_gradients(of_model(found), bp.grads)
    assert_buffers(found.buffers, bp.buffers)


def test_training_with_a_refresh_at_every_step_follows_plain_training() -> None:
    """Adam sees g̃, so its statistics must be BP's too; the random state moves as in plain training."""
    case, cuts = setting("eager")
    plain = copy.deepcopy(case)
    step = convert(case, cuts, offset=bpfx.Offset(period=1, alpha=1.0, lam=1.0))
    optimizers = torch.optim.Adam(case.model.parameters(), 1e-2), torch.optim.Adam(plain.model.parameters(), 1e-2)
    seed_all()
    for _ in range(6):
        clear_gradients(step)
        step(*case.batch).backward()
        optimizers[0].step()
    seed_all()
    for _ in range(6):
        x, y = plain.batch
        optimizers[1].zero_grad()
        plain.loss_fn(plain.model(x), y).backward()
        optimizers[1].step()
    for (name, found), expected in zip(case.model.named_parameters(), plain.model.parameters(), strict=True):
        # Adam's first steps divide by the gradient, which turns rounding in a gradient near zero into a real difference
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name
    assert_buffers(buffers(case.model), buffers(plain.model))


def test_offset_batch_is_measured_in_micro_batches() -> None:
    """B′ of two samples out of four, and of more than one micro-batch: same refresh from the same samples."""
    case = zoo.mlp(4, dtype=torch.float64)  # without BatchNorm a mean over micro-batches is the batch's own
    step = convert(case, zoo.MLP_CUTS, offset=bpfx.Offset(period=1, batch=2, alpha=1.0, lam=1.0))
    part = copy.deepcopy(case)
    part.batch = tuple(tensor[:2] for tensor in case.batch)
    bp, local = bp_oracle(part), detached_oracle(part, step.heads, zoo.MLP_CUTS)
    drop_in(step, case.batch)
    assert_gradients(step.offset_state, combine(torch.sub, bp.grads, of_model(local)))


def test_local_steps_between_refreshes_run_no_bp() -> None:
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=4, alpha=1.0, lam=1.0))
    drop_in(step, case.batch)
    before = {name: offset.clone() for name, offset in step.offset_state.items()}
    for t in range(3):
        drop_in(step, case.batch, seed=t)
        assert all(torch.equal(step.offset_state[name], offset) for name, offset in before.items())
    drop_in(step, case.batch, seed=9)
    assert any(not torch.equal(step.offset_state[name], offset) for name, offset in before.items())


def test_run_bp_of_a_step_with_offset_moves_no_schedule() -> None:
    """Looking at the BP gradient is no training iteration."""
    case, cuts = setting("eager")
    step = convert(case, cuts, offset=bpfx.Offset(period=2, alpha=1.0, lam=1.0))
    drop_in(step, case.batch)
    before = {name: offset.clone() for name, offset in step.offset_state.items()}
    run(step.run_bp, case.batch)
    run(step.run_local, case.batch)
    drop_in(step, case.batch, seed=3)
    assert all(torch.equal(step.offset_state[name], offset) for name, offset in before.items())
