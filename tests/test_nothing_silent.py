"""What could go wrong without a word: each case is right, or refused in words."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx


def mlp(width: int = 8, out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6 if k == 0 else width, width), nn.Tanh()) for k in range(3)]
    return nn.Sequential(*layers, nn.Linear(width, out))


def data(size: int = 10) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 6), torch.randint(0, 3, (size,))


def plain(model: nn.Module, loss_fn: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    loss = loss_fn(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, loss_fn: Any, batch: Any, step: bpfx.Step) -> None:
    loss, grads = plain(model, loss_fn, batch)
    found = step.run_bp(*batch)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.grads, grads, rtol=1e-4, atol=1e-6)


class Chunked(nn.Module):
    """Its graph depends on the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2.0 if x.shape[0] > 6 else 1.0) / int(x.shape[0])


class Literal(nn.Module):
    """A constant tensor in its code that depends on the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) / torch.tensor(float(x.shape[0]))


@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [
        (mlp(), lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(o)),
        (Chunked(), F.cross_entropy),
        (Literal(), F.cross_entropy),
    ],
    ids=["division by the batch size", "branch on the batch size", "literal with the batch size"],
)
def test_the_batch_size_inside_the_graph(model: nn.Module, loss_fn: Any) -> None:
    step = bpfx.convert(model, loss_fn, data(), blocks=2, offset=None)
    for size in (10, 7, 4):
        check(model, loss_fn, data(size), step)


def test_a_loss_that_trains_a_tensor_of_its_own_is_refused() -> None:
    hidden = nn.Linear(3, 3)
    with pytest.raises(bpfx.BpfxError, match=r"(?s)\(3, 3\).*loss_fn"):
        bpfx.convert(mlp(), lambda o, y: F.cross_entropy(hidden(o), y), data(), blocks=2)


class Denoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(out=6)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return F.mse_loss(self.body(x + noise), noise)


def test_a_loss_on_the_models_own_noise_is_refused() -> None:
    """A head would be trained on other noise than the one that was put in."""
    with pytest.raises(bpfx.BpfxError, match=r"(?s)loss cannot be taken apart.*blocks=1"):
        bpfx.convert(Denoise(), None, data()[0], blocks=2)
    step = bpfx.convert(Denoise(), None, data()[0], blocks=1, offset=None)
    assert step(data()[0]).requires_grad


def test_draws_of_a_heads_loss_leave_the_blocks_draws_alone() -> None:
    def noisy(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o + 0.1 * torch.rand_like(o), y)

    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    batch = data()
    step = bpfx.convert(model, noisy, batch, blocks=["2", "4"], offset=None)
    losses = []
    runs = (
        lambda: step.run_bp(*batch).loss,
        lambda: step.run_local(*batch).loss,
        lambda: noisy(model(batch[0]), batch[1]),
    )
    for run in runs:
        torch.manual_seed(5)
        losses.append(run().detach())
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


class Counting(nn.Module):
    """Writes a buffer, by an amount that may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.no_grad():
            self.seen.add_((x > 100).sum())
        return self.last(h.tanh())


def test_a_buffer_that_did_not_change_at_conversion_is_written_once() -> None:
    model, (x, y) = Counting(), data()
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=["last"], offset=bpfx.Offset(period=1))
    x[0, 0] = 1000.0
    step(x, y).backward()
    assert float(model.seen) == 1.0


class Twice(nn.Module):
    """One BatchNorm, used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)).relu())).relu())


def test_a_shared_batchnorm_is_not_cut_apart() -> None:
    with pytest.raises(bpfx.BpfxError, match="cannot be cut"):
        bpfx.convert(Twice(), F.cross_entropy, data(), blocks=["b"])
    model = Twice()
    expected = copy.deepcopy(model)
    expected(data()[0])
    bpfx.convert(model, F.cross_entropy, data(), blocks=["c"], offset=None).run_bp(*data())
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))


class Centre(nn.Module):
    """A loss that keeps a running number of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(output, y)
        with torch.no_grad():
            self.scale.mul_(0.5).add_(loss.detach())
        return loss


def test_heads_leave_the_losss_own_state_alone() -> None:
    model, loss_fn = mlp(), Centre()
    expected = copy.deepcopy(loss_fn)
    expected(model(data()[0]), data()[1])
    bpfx.convert(model, loss_fn, data(), blocks=3, offset=None).run_local(*data())
    torch.testing.assert_close(loss_fn.scale, expected.scale)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] -= 0.5
        return self.body(x)


def test_a_model_that_writes_into_its_input() -> None:
    model, (x, y) = Shift(), data()
    before = x.clone()
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=2, offset=None)
    assert torch.equal(x, before), "conversion wrote into the caller's batch"
    loss, grads = plain(model, F.cross_entropy, (x.clone(), y))
    found = step.run_bp(x, y)
    torch.testing.assert_close(found.loss, loss)
    torch.testing.assert_close(found.grads, grads)


def test_complex_parameters() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6))

    model = Spectral()
    step = bpfx.convert(model, F.cross_entropy, data(), blocks=["last"], offset=bpfx.Offset(period=1))
    step(*data()).backward()
    _, grads = plain(model, F.cross_entropy, data())
    torch.testing.assert_close(model.weight.grad, grads["weight"])


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(bpfx.BpfxError, match=r"(?s)0\.weight.*sparse=False"):
        bpfx.convert(model, F.cross_entropy, (torch.randint(0, 9, (4, 2)), torch.randint(0, 3, (4,))), blocks=2)


def test_eval_mode_evaluates_the_plain_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.9), nn.Linear(8, 3))
    step = bpfx.convert(model, F.cross_entropy, data(), blocks=["2"], offset=None)
    step.eval()
    assert torch.equal(step(*data()), F.cross_entropy(model(data()[0]), data()[1]))
    assert step.iteration == 0


@pytest.mark.parametrize("attempt", [copy.deepcopy, lambda step: step.__reduce__()], ids=["copy", "pickle"])
def test_copies_are_refused_in_words(attempt: Any) -> None:
    step = bpfx.convert(mlp(), F.cross_entropy, data(), blocks=2)
    with pytest.raises(bpfx.BpfxError, match="state_dict"):
        attempt(step)
