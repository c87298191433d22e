"""A run that is stopped and resumed at any iteration is, bit for bit, the run that was not."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_same_bits, seed_all
from zoo import Batch, Case

import bpfx

STEPS = 8
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}
OFFSETS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "every step": lambda: bpfx.Offset(period=1, alpha=1.0, lam=1.0),
    "every third": lambda: bpfx.Offset(period=3, alpha=1.0, lam=0.8),
    "auto": lambda: bpfx.Offset(period=3, alpha=1.0, lam="auto"),
    "schedule": lambda: bpfx.Offset(period=2, alpha=1.0, lam=lambda iteration: 0.9**iteration),
}


def batch_at(iteration: int) -> Batch:
    """Another batch at every iteration, the fourth smaller, as the last of an epoch is."""
    draw = torch.Generator().manual_seed(iteration)
    size = 3 if iteration == 4 else 5
    return torch.randn(size, 3, 16, 16, generator=draw), torch.randint(5, (size,), generator=draw)


class Run:
    """Model with dropout and BatchNorm, step and optimizer, and what a checkpoint of them holds."""

    def __init__(self, offset: str, optimizer: str, seed: int) -> None:
        case: Case = zoo.convnet(5, seed)
        seed_all(seed)
        blocks = list(zoo.CONVNET_CUTS)
        settings = {"blocks": blocks, "offset": OFFSETS[offset](), "compile": "eager"}
        self.step = bpfx.convert(case.model, case.loss_fn, batch_at(0), **settings)
        self.optimizer = OPTIMIZERS[optimizer](self.step.parameters())
        self.losses: list[torch.Tensor] = []

    def train(self, start: int, stop: int) -> None:
        for iteration in range(start, stop):
            self.optimizer.zero_grad()
            loss = self.step(*batch_at(iteration))
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())

    def state(self) -> dict[str, Any]:
        return {
            "model": self.step.model.state_dict(),
            "step": self.step.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def checkpoint(self) -> bytes:
        stream = io.BytesIO()
        generators = {"torch": torch.get_rng_state(), "python": random.getstate()}
        torch.save({**self.state(), "generators": generators}, stream)
        return stream.getvalue()

    def restore(self, checkpoint: bytes) -> None:
        saved = torch.load(io.BytesIO(checkpoint), weights_only=False)
        self.step.model.load_state_dict(saved["model"])
        self.step.load_state_dict(saved["step"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["generators"]["torch"])
        random.setstate(saved["generators"]["python"])
        self.losses = []


@cache
def uninterrupted(offset: str, optimizer: str) -> tuple[list[bytes], list[torch.Tensor], bytes]:
    """The checkpoints before every iteration of one run, its losses, and where it ended."""
    whole = Run(offset, optimizer, seed=0)
    seed_all(99)
    checkpoints = []
    for iteration in range(STEPS):
        checkpoints.append(whole.checkpoint())
        whole.train(iteration, iteration + 1)
    return checkpoints, whole.losses, whole.checkpoint()


@cache
def resumed_run(offset: str, optimizer: str) -> Run:
    """A run that began with other weights, other heads and other draws; used again and again, as nothing may stick."""
    return Run(offset, optimizer, seed=7)


def check_resume(offset: str, optimizer: str, stop: int) -> None:
    checkpoints, losses, end = uninterrupted(offset, optimizer)
    resumed = resumed_run(offset, optimizer)
    seed_all(stop)
    resumed.restore(checkpoints[stop])
    resumed.train(stop, STEPS)
    assert_same_bits(resumed.losses, losses[stop:], "losses")
    expected = torch.load(io.BytesIO(end), weights_only=False)
    expected.pop("generators")
    assert_same_bits(resumed.state(), expected)


@pytest.mark.parametrize("stop", range(STEPS))
def test_resume_before_at_and_after_a_refresh(stop: int) -> None:
    """Refreshes are at 0, 3 and 6: every stop is one step before, at, or after one."""
    check_resume("every third", "adamw", stop)


@settings(max_examples=4, deadline=None)
@given(offset=st.sampled_from(sorted(OFFSETS)), optimizer=st.sampled_from(sorted(OPTIMIZERS)), stop=st.integers(0, 7))
def test_resume_anywhere(offset: str, optimizer: str, stop: int) -> None:
    check_resume(offset, optimizer, stop)


def test_resume_in_a_fresh_step() -> None:
    """As after a crash: a step that has not run yet."""
    checkpoints, losses, _ = uninterrupted("every third", "sgd")
    fresh = Run("every third", "sgd", seed=21)
    fresh.restore(checkpoints[5])
    fresh.train(5, STEPS)
    assert_same_bits(fresh.losses, losses[5:])


def test_two_runs_are_equal_and_two_seeds_are_not() -> None:
    """Without this the tests above could pass on a step that ignores its random draws."""
    losses = uninterrupted("every third", "sgd")[1]
    again, other = Run("every third", "sgd", seed=0), Run("every third", "sgd", seed=0)
    seed_all(99)
    again.train(0, STEPS)
    seed_all(98)
    other.train(0, STEPS)
    assert_same_bits(again.losses, losses)
    assert not torch.equal(torch.stack(other.losses), torch.stack(losses))


@pytest.mark.parametrize("forgotten", ["step", "optimizer", "generators"])
def test_each_part_of_the_checkpoint_matters(forgotten: str) -> None:
    checkpoints, losses, _ = uninterrupted("every third", "adamw")
    resumed = Run("every third", "adamw", seed=0)
    seed_all(5)
    saved = torch.load(io.BytesIO(checkpoints[4]), weights_only=False)
    resumed.step.model.load_state_dict(saved["model"])
    if forgotten != "step":
        resumed.step.load_state_dict(saved["step"])
    if forgotten != "optimizer":
        resumed.optimizer.load_state_dict(saved["optimizer"])
    if forgotten != "generators":
        torch.set_rng_state(saved["generators"]["torch"])
        random.setstate(saved["generators"]["python"])
    resumed.train(4, STEPS)
    assert not torch.equal(torch.stack(resumed.losses), torch.stack(losses[4:]))


def test_an_earlier_state_loads_over_a_later_one() -> None:
    run = Run("every third", "sgd", seed=0)
    run.train(0, 1)
    earlier = run.checkpoint()
    run.train(1, 4)
    run.restore(earlier)
    saved = torch.load(io.BytesIO(earlier), weights_only=False)
    assert_same_bits(run.state(), {key: saved[key] for key in ("model", "step", "optimizer")})


def test_state_loads_with_weights_only() -> None:
    """Tensors and plain values only: a checkpoint that needs pickle cannot be shared safely."""
    run = Run("every third", "sgd", seed=0)
    run.train(0, 2)
    stream = io.BytesIO()
    torch.save(run.step.state_dict(), stream)
    assert_same_bits(torch.load(io.BytesIO(stream.getvalue()), weights_only=True), run.step.state_dict())


def test_state_of_another_partition_is_refused() -> None:
    state = Run("every third", "sgd", seed=0).step.state_dict()
    case = zoo.convnet(5)
    offset = OFFSETS["every third"]()
    other = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=["2"], offset=offset, compile="eager")
    with pytest.raises(bpfx.BpfxError, match=r"block"):
        other.load_state_dict(state)
