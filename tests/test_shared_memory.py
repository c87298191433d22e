"""Gradients that share memory: autograd hands a parameter a view of another gradient, and nothing may change both."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx.passes.ownership import owned

SGD = functools.partial(torch.optim.SGD, lr=0.1)


class Reshaped(nn.Module):
    """Two parameters whose gradients are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
        self.a, self.w = nn.Parameter(0.1 * torch.randn(64)), nn.Parameter(0.1 * torch.randn(1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.w.squeeze(0) + self.a.view(8, 8)))
        return self.out(torch.tanh(self.hidden(x)))


class Positions(nn.Module):
    """With one sample, the gradient of the positions is a view of the one that flows on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).unsqueeze(1) + self.positions.unsqueeze(0)
        return self.out((x + torch.tanh(self.hidden(x))).mean(1))


class Summed(nn.Module):
    """Two parameters with one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ (self.u + self.v)))


@pytest.mark.parametrize("kind", ["bp", "local", "drop_in"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("net", [Reshaped, Positions, Summed])
def test_training_is_plain_training(net: type[nn.Module], pieces: int, kind: str) -> None:
    """Exact BP, and an offset refreshed at every step, with views among the gradients."""
    torch.manual_seed(0)
    plain = net().double()
    model = copy.deepcopy(plain)
    x, y = torch.randn(3, 8, dtype=torch.float64), torch.randint(0, 3, (3,))
    offset = None if kind == "bp" else bpfx.Offset(period=1, micro_batches=pieces)
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=2, offset=offset)
    reference = SGD(plain.parameters())
    optimizer = SGD(step.parameters())
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=pieces, mode="bp" if kind == "bp" else "local")
    for _ in range(3):
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
        if kind == "drop_in":
            optimizer.zero_grad()
            step(x, y).backward()
            optimizer.step()
        else:
            trainer.step(x, y)
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_only_memory_of_its_own_is_kept() -> None:
    base = torch.arange(6.0)
    assert owned(base) is base
    for view in (base.view(2, 3), base[1:3], base.detach(), base[:1].expand(4)):
        copied = owned(view)
        assert torch.equal(copied, view)
        copied.add_(1)
        assert torch.equal(base, torch.arange(6.0))


@pytest.mark.parametrize("where", ["model", "heads"])
def test_a_replaced_parameter_is_refused(where: str) -> None:
    """Its optimizer would step the old one with the new one's gradient."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(4, 8), torch.randint(0, 3, (4,))
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=2, offset=None)
    trainer = bpfx.BlockTrainer(step, SGD)
    trainer.step(x, y)
    owner, key = next(
        (m, n) for m in getattr(step, where).modules() for n, p in m.named_parameters(recurse=False) if p.dim() == 2
    )
    setattr(owner, key, nn.Parameter(getattr(owner, key).detach().clone()))
    with pytest.raises(bpfx.BpfxError, match="replaced"):
        trainer.step(x, y)
