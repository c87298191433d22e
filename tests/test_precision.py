"""Autocast: gradients are those of the plain loop under the same autocast, wherever the conversion took place."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx
from bpfx.passes.precision import autocast_state

Context = Callable[[], contextlib.AbstractContextManager[Any]]
PLAIN: Context = contextlib.nullcontext
BF16: Context = functools.partial(torch.autocast, "cpu", torch.bfloat16)
FP16: Context = functools.partial(torch.autocast, "cpu", torch.float16)


class Net(nn.Module):
    """Autocast runs convolutions and linear layers in low precision, and keeps the rest in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.scale, self.hidden, self.drop, self.last = (
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Dropout(0.1),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = (x + F.relu(self.second(x))).mean((2, 3)).float()  # a cast of its own
        return self.last(self.drop(F.gelu(self.hidden(self.scale(x)))))


def example() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Net(), (torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,)))


def plain(model: nn.Module, batch: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    with context():
        loss = F.cross_entropy(model(batch[0]), batch[1])
    found = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), dict(zip(dict(model.named_parameters()), found, strict=True))


def offsets(step: bpfx.Step) -> list[Tensor]:
    return [step.offset_state[name] for name in step.offset_state]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("called", [PLAIN, BF16], ids=["called plain", "called bf16"])
@pytest.mark.parametrize("converted", [PLAIN, BF16], ids=["converted plain", "converted bf16"])
def test_bp_and_exact_steps_equal_the_plain_loop(converted: Context, called: Context) -> None:
    model, batch = example()
    twin = copy.deepcopy(model)
    with converted():
        step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=bpfx.Offset(period=1))
    loss, expected = plain(twin, batch, called)
    torch.manual_seed(7)
    with called():
        result = step.run_bp(*batch)
    assert torch.equal(result.loss, loss)
    assert_equal(result.grads, expected)
    torch.manual_seed(7)
    with called():
        delivered = step(*batch)
    delivered.backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, expected)
    assert {p.dtype for p in step.heads.parameters()} == {torch.float32}


@pytest.mark.parametrize("called", [PLAIN, BF16], ids=["called plain", "called bf16"])
def test_local_steps_do_not_depend_on_where_the_conversion_took_place(called: Context) -> None:
    found = []
    for converted in (PLAIN, BF16):
        model, batch = example()
        torch.manual_seed(1)
        with converted():
            blocks, offset = ["second", "hidden"], bpfx.Offset(period=2)
            step = bpfx.convert(model, F.cross_entropy, batch, blocks=blocks, offset=offset)
        gradients = []
        for seed in range(3):  # a refresh, a corrected local step, a refresh
            torch.manual_seed(seed)
            with called():
                loss = step(*batch)
            loss.backward()
            gradients += [p.grad.clone() for p in step.parameters()]
        found.append(gradients)
        assert {d.dtype for d in offsets(step)} == {torch.float32}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_last_block_of_a_local_step_equals_the_plain_loop() -> None:
    model, batch = example()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=["hidden"], offset=None)
    _, expected = plain(copy.deepcopy(model), batch, BF16)
    torch.manual_seed(7)
    with BF16():
        step(*batch).backward()
    for name in ("hidden.weight", "last.weight", "last.bias"):
        assert torch.equal(model.get_parameter(name).grad, expected[name])


def test_the_trainer_equals_the_drop_in_loop() -> None:
    results = []
    for blockwise in (False, True):
        model, batch = example()
        torch.manual_seed(1)
        step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=None)
        sgd = functools.partial(torch.optim.SGD, lr=0.1)
        trainer = bpfx.BlockTrainer(step, optimizer=sgd) if blockwise else None
        optimizer = sgd(step.parameters())
        for seed in range(2):
            torch.manual_seed(seed)
            with BF16():
                loss = trainer.step(*batch) if trainer is not None else step(*batch)
            if trainer is None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append([p.detach() for p in step.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_adapters_convert_under_autocast_and_its_cache() -> None:
    """A weight that is cast once and cached would carry its autograd graph into another block's backward."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    model = peft.get_peft_model(base, peft.LoKrConfig(target_modules=["2", "4"], r=2))
    batch = torch.randn(6, 6), torch.randint(0, 5, (6,))
    with BF16():
        step = bpfx.convert(model, F.cross_entropy, batch, blocks="auto", offset=bpfx.Offset(period=1))
        loss = step(*batch)
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with BF16():
        expected = F.cross_entropy(model(batch[0]), batch[1])
    for p, g in zip(trained.values(), torch.autograd.grad(expected, list(trained.values())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def test_autocast_is_as_before_after_a_step_that_fails() -> None:
    model, batch = example()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=None)
    handle = step.heads[0].register_forward_hook(lambda *a: 1 / 0)
    with BF16():
        with pytest.raises(ZeroDivisionError):
            step(*batch)
        assert autocast_state() == (("cpu", torch.bfloat16),) and torch.is_autocast_cache_enabled()
    handle.remove()


@pytest.mark.parametrize("offset", [None, bpfx.Offset(period=2), bpfx.Offset(period=1)], ids=["local", "K=2", "K=1"])
def test_float16_gradients_do_not_vanish_behind_a_scaler(offset: bpfx.Offset | None) -> None:
    """Activation gradients of about 1e-8 are zero in float16, unless the blocks' backwards are scaled as well."""
    model, (x, y) = example()
    tiny = lambda output, target: F.cross_entropy(output, target) * 1e-6  # noqa: E731
    step = bpfx.convert(model, tiny, (x, y), blocks=3, offset=offset)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(3):
        step.zero_grad()
        torch.manual_seed(7)
        with FP16():
            loss = step(x, y)
        scaler.scale(loss).backward()
    scaled = {n: p.grad / 2.0**16 for n, p in model.named_parameters()}
    with torch.no_grad():
        state = [d.norm() for d in offsets(step)]
    assert all(0 < float(d) < 1e-3 for d in state), "offsets are unscaled"
    step.zero_grad()
    torch.manual_seed(7)
    precise = tiny(model(x), y)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(precise, parameters), strict=True))
    for name, gradient in scaled.items():
        exact = offset is not None and offset.period == 1
        if exact and gradient.norm() > 1e-10:
            assert (gradient - expected[name]).norm() < 0.05 * expected[name].norm() + 1e-9, name
        assert gradient.any() or not expected[name].any(), f"{name} vanished"


def small(fixed: bool) -> tuple[bpfx.Step, Tensor, Tensor]:
    """Gradients of about 1e-7; ``fixed``: a graph for one batch size, so that pieces have graphs of their own."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.c(x + torch.zeros(int(x.shape[0]), 16) if fixed else x)

    torch.manual_seed(0)
    x, y = torch.randn(256, 8), torch.randint(3, (256,))
    offset = bpfx.Offset(period=1, micro_batches=4)
    tiny = lambda output, target: F.cross_entropy(output, target) * 1e-4  # noqa: E731
    return bpfx.convert(Net(), tiny, (x, y), blocks=["b", "c"], offset=offset), x, y


def scaled_steps(step: bpfx.Step, count: int, x: Tensor, y: Tensor) -> Tensor:
    """The first weight's gradient after so many steps."""
    for _ in range(count):
        step.zero_grad()
        with FP16():
            loss = step(x, y)
        (loss * 2.0**16).backward()
    grad = step.model.a.weight.grad
    assert isinstance(grad, Tensor)
    return grad / 2.0**16


@pytest.mark.parametrize("fixed", [False, True])
def test_pieces_of_a_refresh_are_scaled_as_the_batch_is(fixed: bool) -> None:
    step, x, y = small(fixed)
    found = scaled_steps(step, 2, x, y)
    expected = torch.autograd.grad(F.cross_entropy(step.model(x), y) * 1e-4, step.model.a.weight)[0]
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_loaded_state_goes_on_with_the_scale() -> None:
    step, x, y = small(False)
    scaled_steps(step, 2, x, y)
    saved = copy.deepcopy(step.state_dict())
    resumed = small(False)[0]
    resumed.load_state_dict(saved)
    assert torch.equal(scaled_steps(resumed, 1, x, y), scaled_steps(step, 1, x, y))


def test_an_overflow_is_skipped_by_the_scaler_and_the_scale_follows() -> None:
    model, (x, y) = example()
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=3, offset=None)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
    before = [p.detach().clone() for p in model.parameters()]
    moved = []
    for _ in range(8):
        optimizer.zero_grad()
        with FP16():
            loss = step(x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)))
    assert moved[-1] and all(torch.isfinite(p).all() for p in model.parameters())


def test_the_trainer_refuses_float16() -> None:
    model, batch = example()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=None)
    trainer = bpfx.BlockTrainer(step, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    with FP16(), pytest.raises(bpfx.BpfxError, match=r"GradScaler.*bfloat16"):
        trainer.step(*batch)
