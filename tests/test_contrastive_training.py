"""LoCo, Greedy InfoMax and Forward-Forward in converted models: they train, keep their rows together, and refuse."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx.losses import Given, Head, LocalLoss, Views
from bpfx.losses.forward_forward import ForwardForward, LengthNorm
from bpfx.losses.gim import GIM
from bpfx.losses.infopro import InfoPro
from bpfx.losses.loco import LoCo


class Net(nn.Module):
    """Three convolutions, nothing that draws or mixes samples; ``classes=0`` is the backbone alone."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3), nn.Conv2d(width, width, 3)
        self.out = nn.Linear(width, classes) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x))
        x = self.c(x)
        return x if self.out is None else self.out(torch.relu(x).mean((2, 3)))


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.rand(size, 1, 10, 10), torch.arange(size) % 3


def convert(model: nn.Module, loss_fn: Any, given: Any, loss: Any, **options: Any) -> bpfx.Step:
    options = {"blocks": ["b", "c"], "offset": None, **options}
    return bpfx.convert(model, loss_fn, given, local_loss=loss, **options)


def local_loss(step: bpfx.Step, *given: Any, seed: int = 0) -> float:
    torch.manual_seed(seed)
    return sum(float(v) for v in step.run_local(*given).local_losses)


def train(step: bpfx.Step, given: Sequence[Any], steps: int = 20, lr: float = 3e-3) -> None:
    optimizer = torch.optim.Adam(step.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        step(*given).backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in step.parameters())
        optimizer.step()


IN_A_MODEL: dict[str, Callable[[], LocalLoss]] = {
    "loco": lambda: LoCo(noisy, hidden=32, out=16),
    "loco, supervised": lambda: LoCo(supervised=True, hidden=32),
    "gim": lambda: GIM(steps=2),
    "goodness": lambda: ForwardForward(theta=0.1, classes=3),
    "symba": lambda: ForwardForward("symba", classes=3),
    "channels": lambda: ForwardForward("channels"),
}


@pytest.mark.parametrize("name", IN_A_MODEL)
def test_trains_a_model(name: str) -> None:
    loss = IN_A_MODEL[name]()
    x, y = batch()
    model = Net()
    torch.manual_seed(0)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    step = convert(model, F.cross_entropy, (x, y), loss)
    assert step._compiler.horizon == loss.horizon
    assert bpfx.audit(step).ok and not bpfx.audit(step, cut=False).ok
    if name != "loco":  # which trains on other images
        result = step.run_bp(x, y)
        torch.testing.assert_close(result.loss, F.cross_entropy(model(x), y).detach())
        for (parameter, _), grad in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(result.grads[parameter], grad, rtol=1e-4, atol=1e-6)
    scores = step.evaluate_blocks(x, y)
    assert (scores[0].accuracy is not None) == (name in ("loco, supervised", "channels")), "they tell classes apart"
    before = local_loss(step, x, y)
    train(step, (x, y))
    assert local_loss(step, x, y) < before
    assert math.isfinite(step(*batch(5)).item())


@pytest.mark.parametrize("name", ["loco", "gim", "infopro"])
def test_trains_without_labels(name: str) -> None:
    (x, _), loss = batch(), IN_A_MODEL[name]() if name in IN_A_MODEL else InfoPro(task=(0, 0))
    step = convert(Net(classes=0), "local", (x,), loss)
    assert bpfx.audit(step).ok and not bpfx.audit(step, cut=False).ok
    before = local_loss(step, x)
    train(step, (x,))
    assert local_loss(step, x) < before
    assert math.isfinite(step(torch.rand(5, 1, 10, 10)).item())
    with torch.no_grad():
        assert step(x).shape == (8, 8, 4, 4)


def test_loco_with_views_and_offsets() -> None:
    """Views in the place of the images, no augmentation; the last block's loss sees both."""
    first, second = batch()[0], batch()[0]
    step = convert(Net(), F.cross_entropy, (Views(first, second), batch()[1]), LoCo(hidden=32), offset=bpfx.Offset())
    result = step.run_local(Views(first, second), batch()[1])
    model = step.model
    both = torch.stack([first, second], 1).flatten(0, 1)
    torch.testing.assert_close(result.loss, F.cross_entropy(model(both), batch()[1].repeat_interleave(2)).detach())
    head = next(h for h in step.heads if list(h.parameters()))
    assert isinstance(head, Head)
    with torch.no_grad():
        feature = torch.relu(model.b(torch.relu(model.a(both))))  # type: ignore[operator]
        torch.testing.assert_close(result.local_losses[0], head(Given.of(feature)))
    train(step, (Views(first, second), batch()[1]), steps=3)
    with pytest.raises(bpfx.BpfxError, match="Views"):
        step(first, batch()[1])


def test_loco_keeps_pairs_together_in_micro_batches() -> None:
    """Two pieces of two samples: the local loss is the mean of the losses of the pieces, by hand."""
    first, second = batch(4)[0], batch(4)[0]
    step = convert(Net(classes=0), "local", (Views(first, second),), LoCo(hidden=32))
    with pytest.raises(bpfx.BpfxError, match="reduction='mean'"):
        bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.0), micro_batches=2)
    sgd = functools.partial(torch.optim.SGD, lr=0.0)
    trainer = bpfx.BlockTrainer(step, sgd, micro_batches=2, reduction="mean")
    loss = trainer.step(Views(first, second))
    pieces = [step.run_local(Views(first[s], second[s])) for s in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(loss, sum(p.loss for p in pieces) / 2)
    torch.testing.assert_close(trainer.local_losses[0], sum(p.local_losses[0] for p in pieces) / 2)


@pytest.mark.parametrize("name", IN_A_MODEL)
def test_block_trainer(name: str) -> None:
    x, y = batch()
    step = convert(Net(), F.cross_entropy, (x, y), IN_A_MODEL[name](), offset=bpfx.Offset(period=2))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    trainer = bpfx.BlockTrainer(step, adam, micro_batches=2, reduction="mean" if name in ("loco", "gim") else None)
    for _ in range(4):
        assert math.isfinite(float(trainer.step(x, y)))
    assert math.isfinite(float(trainer.step(x[:3], y[:3])))


@pytest.mark.parametrize("variant", ["goodness", "symba"])
def test_forward_forward_on_a_model_that_is_built_for_it(variant: str) -> None:
    """The norm begins a block, so that the goodness is that of what goes into it."""
    x, y = batch(24)
    parts = [nn.Sequential(LengthNorm(), nn.Linear(width, 64), nn.ReLU()) for width in (100, 64, 64)]
    model = nn.Sequential(nn.Flatten(), *parts, LengthNorm(), nn.Linear(64, 3))
    step = convert(model, F.cross_entropy, (x, y), ForwardForward(variant, theta=1.0, classes=3), blocks=["2", "3"])
    before = step.run_local(x, y).local_losses
    train(step, (x, y), steps=60, lr=1e-2)
    after = step.run_local(x, y).local_losses
    for k in (0, 1):
        assert float(after[k]) < 0.8 * float(before[k])


class Words(nn.Module):
    """A causal model of tokens."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return x


def test_gim_on_a_causal_language_model() -> None:
    ids = torch.arange(9).repeat(6, 1).add(torch.arange(6)[:, None]) % 11
    step = convert(Words(), "local", (ids,), GIM(steps=3), blocks=["layers.1"])
    assert bpfx.audit(step).ok
    before = local_loss(step, ids)
    train(step, (ids,))
    assert local_loss(step, ids) < before
    assert math.isfinite(step(ids[:4, :3]).item())


CONVERSIONS: list[tuple[Callable[[], Any], str]] = [
    (lambda: convert(Net(), F.cross_entropy, batch(), LoCo()), r"LoCo\(augment=.*Views"),
    (lambda: convert(Net(), F.cross_entropy, batch(), ForwardForward()), r"ForwardForward\(classes=3\)"),
    (lambda: convert(Net(12), F.cross_entropy, batch(), ForwardForward()), r"predicts 12; pass .*\(classes=12\)"),
    (lambda: convert(Net(), F.cross_entropy, batch(), ForwardForward("channels", classes=2)), "predicts 3 classes"),
    (lambda: convert(Net(), "local", (batch()[0],), GIM(2)), "one position only"),
    (lambda: convert(Net(), "local", (batch()[0],), ForwardForward(classes=3)), "needs a task loss|loss_fn"),
    (lambda: convert(Net(width=2), F.cross_entropy, batch(), ForwardForward("channels")), "cannot group into 3"),
    (lambda: convert(Net(), F.mse_loss, (batch()[0], torch.rand(8, 3)), ForwardForward(classes=3)), "integer label"),
    (lambda: convert(Net(), F.mse_loss, (batch()[0], torch.rand(8, 3)), ForwardForward("channels")), "integer label"),
    (lambda: convert(Net(), F.multi_margin_loss, batch(), ForwardForward(classes=3)), "plain model fails"),
]


@pytest.mark.parametrize("number", range(len(CONVERSIONS)))
def test_conversions_refused(number: int) -> None:
    make, words = CONVERSIONS[number]
    with pytest.raises(bpfx.BpfxError, match=words):
        make()
