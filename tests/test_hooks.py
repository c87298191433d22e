"""Hooks of parameters see the gradient that a step delivers, once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx

OFFSETS = {"none": None, "refresh": bpfx.Offset(period=1), "exact": bpfx.Offset()}


def converted(offset: Any) -> tuple[bpfx.Step, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    batch = torch.randn(8, 5), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    return bpfx.convert(model, F.cross_entropy, batch, blocks=["2", "4"], offset=offset), batch


@pytest.mark.parametrize("name", OFFSETS)
def test_a_hook_that_scales_scales_once(name: str) -> None:
    grads = []
    for factor in (1.0, 2.0):
        step, batch = converted(OFFSETS[name])
        seen: list[Tensor] = []
        step.model[2].weight.register_hook(lambda g, factor=factor, seen=seen: seen.append(g) or g * factor)
        for _ in range(2):
            step.zero_grad()
            step(*batch).backward()
        assert len(seen) == 2
        grads.append(step.model[2].weight.grad)
    torch.testing.assert_close(grads[1], 2 * grads[0])


@pytest.mark.parametrize("name", OFFSETS)
def test_an_optimizer_in_the_backward_is_one_behind_it(name: str) -> None:
    ends = []
    for inside in (True, False):
        step, batch = converted(OFFSETS[name])
        optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in step.parameters()}

        def act(parameter: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        if inside:
            for parameter in optimizers:
                parameter.register_post_accumulate_grad_hook(act)
        for _ in range(3):
            step(*batch).backward()
            if not inside:
                for parameter in optimizers:
                    act(parameter)
        ends.append([p.detach().clone() for p in step.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_step_that_fails_gives_the_hooks_back() -> None:
    step, (x, y) = converted(bpfx.Offset())
    calls: list[Tensor] = []
    step.model[0].weight.register_hook(calls.append)
    with pytest.raises(IndexError):
        step(x, y + 7)
    step(x, y).backward()
    assert len(calls) == 1


def test_a_trainer_refuses_what_would_step_twice() -> None:
    step, batch = converted(None)
    trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1))
    handle = step.model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(bpfx.BpfxError, match="'0.weight' has a register_post_accumulate_grad_hook"):
        trainer.step(*batch)
    handle.remove()
    trainer.step(*batch)
