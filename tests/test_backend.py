"""``torch.compile(train_loss, backend="bpfx")`` trains as ``bpfx.convert``; without training it is the function."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bpfx
import bpfx.backend as backend
from bpfx.memory import measure_peak

SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.middle = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=False))


class Tied(nn.Module):
    """One embedding as first and last layer, and a loss scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = (
            nn.Embedding(11, 8),
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        )
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(self.words(x)) * self.scale, self.words.weight)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def adapted() -> nn.Module:
    return peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0", "2"], r=2, modules_to_save=["4"]))


def vectors(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 6), torch.randint(0, 5, (count,))


def words(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (count, 7)), torch.randint(0, 11, (count, 7))


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def per_word(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).transpose(1, 2), y)


def half_inside(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss outside autocast, as AMP loops often have it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x * 2)
    return F.cross_entropy(logits.float(), y)


class Whole(nn.Module):
    """What convert is given: model and loss as a module."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model, x, y)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Callable[..., Tensor], Any]] = {
    "mlp": (mlp, vectors, plain_loss, ["2", "4"]),
    "convnet": (lambda: zoo.convnet().model, lambda: zoo.convnet().batch, plain_loss, 3),
    "checkpoint": (Checkpointed, vectors, plain_loss, ["middle", "last"]),
    "tied": (Tied, words, per_word, ["layer"]),
    "peft": (adapted, vectors, plain_loss, ["base_model.model.2"]),
}


def compiled_of(model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return torch.compile(lambda x, y: loss(model, x, y), backend="bpfx", options=options)


def train(loss: Callable[..., Tensor], parameters: Any, batches: list[Any]) -> list[Tensor]:
    optimizer, losses = SGD(parameters), []
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(100 + i)
        optimizer.zero_grad()
        found = loss(x, y)
        found.backward()
        losses.append(found.detach().clone())
        optimizer.step()
    return losses


@pytest.mark.parametrize("offset", [None, bpfx.Offset(period=2)], ids=["local", "offset"])
@pytest.mark.parametrize("name", CASES)
def test_equals_convert(name: str, offset: bpfx.Offset | None) -> None:
    make, batch, loss, blocks = CASES[name]
    torch.manual_seed(0)
    model, batches = make(), [batch() for _ in range(4)]
    twin = copy.deepcopy(model)
    compiled = compiled_of(model, loss, blocks=blocks, offset=offset, head_optimizer=SGD)
    torch.manual_seed(1)
    losses = train(compiled, model.parameters(), batches)
    torch.manual_seed(1)
    named = [f"model.{b}" for b in blocks] if isinstance(blocks, list) else blocks
    torch.manual_seed(100)  # heads are made in the first call of a compiled function
    step = bpfx.convert(Whole(twin, loss), None, batches[0], blocks=named, offset=offset)
    expected = train(step, step.parameters(), batches)
    (own,) = backend.steps(model)
    assert len(own.plan.blocks) == len(step.plan.blocks) > 1
    assert_same_bits(losses, expected)
    assert_same_bits(list(model.parameters()), list(twin.parameters()))
    starts = [b.modules[0] for b in own.plan.blocks]
    assert starts == [b.modules[0].removeprefix("model.") for b in step.plan.blocks]
    assert_same_bits(list(own.heads.parameters()), list(step.heads.parameters()))


def test_autocast_inside_the_function_equals_autocast_around_convert() -> None:
    torch.manual_seed(0)
    model, batch = mlp(), vectors()
    twin = copy.deepcopy(model)
    plain = half_inside(model, *batch)
    torch.manual_seed(5)
    loss = compiled_of(model, half_inside, blocks=["2", "4"], offset=bpfx.Offset(period=1))(*batch)
    loss.backward()
    half_inside(twin, *batch).backward()
    assert len(backend.steps(model)[0].plan.blocks) == 3 and torch.equal(loss, plain)
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-7)


def test_new_shapes_keep_their_heads_and_their_gradients() -> None:
    torch.manual_seed(0)
    model = Tied()
    compiled = compiled_of(model, per_word, blocks=["layer"], offset=bpfx.Offset(period=1))
    heads = None
    for size in ((4, 7), (3, 7), (5, 9), (4, 7)):
        batch = torch.randint(0, 11, size), torch.randint(0, 11, size)
        model.zero_grad()
        torch.manual_seed(1)
        compiled(*batch).backward()
        torch.manual_seed(1)
        expected = torch.autograd.grad(per_word(model, *batch), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        (step,) = backend.steps(model)
        heads = heads or step.heads
        assert step.heads is heads
    assert step.iteration == 4


@pytest.mark.parametrize(
    ("name", "how"),
    [("convnet", "no_grad"), ("convnet", "inference"), ("convnet", "eval"), ("mlp", "eval"), ("tied", "eval")],
)
def test_without_training_it_is_the_plain_function(name: str, how: str) -> None:
    make, batch, loss, _ = CASES[name]
    torch.manual_seed(0)
    model, pair = make(), batch()
    compiled = compiled_of(model, loss)
    compiled(*pair).backward()
    (step,) = backend.steps(model)
    before = step.iteration
    if how == "eval":
        model.eval()
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode, "eval": torch.enable_grad}[how]():
        torch.manual_seed(1)
        expected = loss(model, *pair)
        torch.manual_seed(1)
        got = compiled(*pair)
    assert torch.equal(got, expected) and step.iteration == before
    if how == "eval":
        gradients = torch.autograd.grad(got, list(model.parameters()))
        plain = torch.autograd.grad(expected, list(model.parameters()))
        assert_same_bits(list(gradients), list(plain))
        model.train()
        compiled(*pair)
        assert step.iteration == before + 1


def test_found_without_an_import_of_bpfx() -> None:
    script = """
        import sys, torch
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        assert "bpfx" in torch.compiler.list_backends() and "bpfx" not in sys.modules
        loss = torch.compile(lambda x: net(x).square().mean(), backend="bpfx", options={"blocks": 2})(torch.ones(3, 4))
        loss.backward()
        assert net[0].weight.grad is not None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_other_outputs_come_back_in_their_places() -> None:
    model, (x, y) = mlp(), vectors()

    def metrics(x: Tensor, y: Tensor) -> dict[str, Any]:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        right = (logits.argmax(1) == y).float().mean()
        return {"n": x.shape[0], "right": right, "loss": loss, "logits": logits, "x": x}

    compiled = torch.compile(metrics, backend="bpfx", options={"blocks": 3, "offset": None, "head_lr": None})
    for count in (6, 5, 4):
        found, expected = compiled(x[:count], y[:count]), metrics(x[:count], y[:count])
        found["loss"].backward()
        assert found["n"] == count and found["x"].shape[0] == count
        for name in ("right", "loss", "logits"):
            assert torch.equal(found[name], expected[name])


def test_models_of_one_class_keep_apart() -> None:
    """Dynamo compiles such a function once, with the parameters as arguments."""
    torch.manual_seed(0)
    models = [mlp(), mlp()]
    compiled = torch.compile(plain_loss, backend="bpfx", options={"blocks": 3})
    for _ in range(2):
        for model in models:
            compiled(model, *vectors()).backward()
    first, second = (backend.steps(m) for m in models)
    assert len(first) == len(second) == 1 and first[0] is not second[0]
    assert first[0].iteration == second[0].iteration == 2


def test_a_method_and_a_module_can_be_compiled() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = mlp()

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.model(x), y)

    trainer = Trainer()
    torch.compile(trainer.loss, backend="bpfx", options={"blocks": ["2"]})(*vectors()).backward()
    module = Whole(mlp(), plain_loss)
    torch.compile(module, backend="bpfx", options={"blocks": ["model.2"]})(*vectors()).backward()
    for model in (trainer.model, module):
        (step,) = backend.steps(model)
        assert len(step.plan.blocks) == 2 and all(p.grad is not None for p in model.parameters())


def test_heads_learn_by_themselves_and_no_loss_scale_reaches_them() -> None:
    torch.manual_seed(0)
    model, batch = mlp(), vectors()
    results = []
    for scale in (1.0, 2.0**16):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        compiled = compiled_of(twin, plain_loss, blocks=3, offset=None, head_lr=0.1)
        for _ in range(2):
            (compiled(*batch) * scale).backward()
        (step,) = backend.steps(twin)
        unscaled = [p.grad / scale for p in twin.parameters()]
        results.append([*(p.detach().clone() for p in step.heads.parameters()), *unscaled])
        assert all(p.grad is None for p in step.heads.parameters())
        torch._dynamo.reset()
    assert_same_bits(*results)
    compiled_of(model, plain_loss, blocks=3, offset=None, head_lr=None)(*batch).backward()
    (step,) = backend.steps(model)
    assert all(p.grad is not None for p in step.heads.parameters())


def test_an_overflow_does_not_reach_the_heads() -> None:
    model, (x, y) = mlp(), vectors()
    compiled = compiled_of(model, plain_loss, blocks=3, offset=None)
    loss = compiled(x * float("inf"), y)
    before = [p.detach().clone() for p in backend.steps(model)[0].heads.parameters()]
    with pytest.warns(bpfx.BpfxWarning, match="NaN or infinite"):
        loss.backward()
    assert_same_bits(before, [p.detach().clone() for p in backend.steps(model)[0].heads.parameters()])


def test_state_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    model, batches = mlp(), [vectors() for _ in range(5)]
    options = {"blocks": 3, "offset": bpfx.Offset(period=3)}
    compiled = compiled_of(model, plain_loss, **options)
    train(compiled, model.parameters(), batches[:2])
    saved = copy.deepcopy(backend.steps(model)[0].state_dict())
    twin = copy.deepcopy(model)
    expected = train(compiled, model.parameters(), batches[2:])
    torch._dynamo.reset()
    other = compiled_of(twin, plain_loss, **options)
    other(*batches[0])  # makes the step that takes the state over
    backend.steps(twin)[0].load_state_dict(saved)
    assert_same_bits(train(other, twin.parameters(), batches[2:]), expected)


def test_peak_is_that_of_convert() -> None:
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    batch = torch.randn(4096, 64), torch.randint(0, 4, (4096,))
    names = [str(k) for k in range(1, 8)]
    compiled = compiled_of(model, plain_loss, blocks=names, offset=None)
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=names, offset=None)
    optimizer = torch.optim.Adam(step.heads.parameters())

    def converted() -> None:
        step(*batch).backward()
        optimizer.step()
        step.zero_grad()

    def through_dynamo() -> None:
        compiled(*batch).backward()
        model.zero_grad()

    plain = measure_peak(lambda: torch.autograd.grad(plain_loss(model, *batch), list(model.parameters()))).peak_bytes
    one, other = (measure_peak(f, warmup=2).peak_bytes for f in (converted, through_dynamo))
    assert other <= 1.1 * one and other < 0.6 * plain


def test_compiled_blocks() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), vectors()
    twin = copy.deepcopy(model)
    for m, how in ((model, "inductor"), (twin, "eager")):
        torch.manual_seed(1)
        compiled_of(m, plain_loss, blocks=2, offset=None, compile=how)(*batch).backward()
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


# --- messages --------------------------------------------------------------------------------------------------------


def no_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x)


def graph_break(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    hidden = model[0](x)
    torch._dynamo.graph_break()
    return F.cross_entropy(model[4](hidden), y)


def two_losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(x)
    return F.cross_entropy(logits, y), logits.square().mean()


REFUSED = {
    "no loss": (no_loss, {}, r"no scalar loss.*\(6, 5\).*return.*loss"),
    "graph break": (graph_break, {}, r"no scalar loss.*graph break.*fullgraph=True"),
    "two losses": (two_losses, {}, r"2 scalars.*detach"),
    "unknown option": (plain_loss, {"blcks": 2}, r"'blcks'.*'blocks'"),
    "two optimizers": (plain_loss, {"head_lr": 0.1, "head_optimizer": SGD}, r"head_lr or head_optimizer"),
    "rate": (plain_loss, {"head_lr": -1.0}, r"head_lr=-1.0"),
    "offset": (plain_loss, {"offset": 3}, r"offset=3"),
    "blocks": (plain_loss, {"blocks": ["9"]}, r"no module '9'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name: str) -> None:
    loss, options, message = REFUSED[name]
    compiled = compiled_of(mlp(), loss, **options)
    with pytest.raises(bpfx.BpfxError, match=f"(?s){message}"):
        compiled(*vectors())


def test_an_input_that_asks_for_a_gradient_is_refused() -> None:
    x, y = vectors()
    with pytest.raises(bpfx.BpfxError, match=r"input 'x'.*gradient.*detach"):
        compiled_of(mlp(), plain_loss, blocks=2)(x.requires_grad_(), y)


def test_a_mode_is_refused() -> None:
    model = mlp()
    with pytest.raises((bpfx.BpfxError, RuntimeError), match="mode"):
        torch.compile(partial(plain_loss, model), backend="bpfx", mode="max-autotune")(*vectors())


def test_another_structure_begins_anew_and_says_so() -> None:
    model, (x, y) = mlp(), vectors()

    def loss(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(model(x), y, weight)

    compiled = torch.compile(loss, backend="bpfx", options={"blocks": 3})
    compiled(x, y).backward()
    with pytest.warns(bpfx.BpfxWarning, match="begins with new heads"):
        compiled(x, y, torch.ones(5)).backward()
