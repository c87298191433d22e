"""Heads that are trained on where BP's gradient points turn towards it, and nothing else changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import zoo
from oracles import assert_buffers, assert_gradients, buffers, clear_gradients, drop_in
from test_exactness import convert, of_heads, of_model, setting
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx
from bpfx import losses


class Small(losses.Head):
    """A head without parameters."""

    def forward(self, given: losses.Given) -> Tensor:
        return given.feature.square().mean()


class Silent(losses.LocalLoss):
    name, label_free = "silent", True

    def head(self, boundary: losses.Boundary) -> losses.Head:
        return Small()


def boundary_cosine(step: Any, net: nn.Sequential, batch: Any) -> float:
    """Mean cosine, over the heads, of the head's and BP's gradient at its boundary."""
    x, y = batch
    values = [x]
    for layer in net:
        values.append(layer(values[-1]))
        values[-1].retain_grad()
    F.cross_entropy(values[-1], y).backward()
    found = []
    for k, head in enumerate(step.heads):
        h = values[k + 1].detach().requires_grad_()
        (own,) = torch.autograd.grad(F.cross_entropy(head.predict(h), y), h)
        found.append(float(F.cosine_similarity(own.flatten(), values[k + 1].grad.flatten(), dim=0)))
    net.zero_grad()
    return sum(found) / len(found)


@pytest.mark.parametrize("trainer", [False, True])
def test_matching_turns_the_heads_towards_bp(trainer: bool) -> None:
    cosines = {}
    for match in (0.0, 5.0):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)], nn.Linear(8, 3))
        batch = torch.randn(64, 8), torch.randint(0, 3, (64,))
        step = bpfx.convert(
            net, F.cross_entropy, batch, blocks=["1", "2", "3"], offset=bpfx.Offset(period=1, match=match)
        )
        for p in net.parameters():
            p.requires_grad_(True)
        sgd = functools.partial(torch.optim.SGD, lr=0.05)
        serial = bpfx.BlockTrainer(step, sgd) if trainer else None
        optimizer = torch.optim.SGD(step.heads.parameters(), lr=0.5)
        for _ in range(60):
            if serial is not None:
                serial.step(*batch)
            else:
                step(*batch).backward()
                optimizer.step()
                clear_gradients(step)
        cosines[match] = boundary_cosine(step, net, batch)
    assert cosines[5.0] > cosines[0.0] + 0.05


def test_matching_works_with_compiled_heads() -> None:
    case = zoo.mlp(4, dtype=torch.float64)
    step = convert(case, zoo.MLP_CUTS, "inductor", offset=bpfx.Offset(period=1, match=1.0))
    drop_in(step, case.batch)
    assert step._correction.matching


def test_matching_leaves_the_gradients_of_the_model_and_the_statistics_alone() -> None:
    found = []
    for match in (0.0, 1.0):
        torch.manual_seed(0)
        case, cuts = setting("eager")
        step = convert(case, cuts, offset=bpfx.Offset(period=2, match=match))
        results = [drop_in(step, case.batch, seed=t) for t in range(2)]
        found.append((results, {n: b.clone() for n, b in step.heads.named_buffers()}, buffers(case.model)))
    (plain, heads, own), (matched, matched_heads, matched_own) = found
    for a, b in zip(plain, matched, strict=True):
        assert_gradients(of_model(b), of_model(a))
    assert_gradients(of_heads(matched[1]), of_heads(plain[1]))  # only the refresh's step has the term
    assert any(not torch.equal(of_heads(matched[0])[n], g) for n, g in of_heads(plain[0]).items())
    assert_buffers(matched_own, own)
    assert_buffers(matched_heads, heads)


def test_matching_needs_horizon_one() -> None:
    with pytest.raises(bpfx.BpfxError, match="horizon 1"):
        convert(zoo.mlp(4), zoo.MLP_CUTS, horizon=2, offset=bpfx.Offset(match=1.0))


def test_matching_without_anything_to_train_is_said() -> None:
    with pytest.warns(bpfx.BpfxWarning, match="does nothing.* no local loss here has one with parameters"):
        convert(zoo.mlp(4), zoo.MLP_CUTS, local_loss=Silent(), offset=bpfx.Offset(match=1.0))
