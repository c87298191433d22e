"""Every local loss on real models: isolated, finite, learning, equal to BP at full horizon, and gone from the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import assert_gradients, bp_oracle, run
from test_loss_choice import batch
from torch import Tensor, nn

import bpfx
from bpfx import losses

Make = Callable[[], Any]


def noisy(x: Tensor) -> Tensor:
    """An augmentation for the tests: images with a little noise."""
    return x + 0.1 * torch.randn_like(x)


# Every registered loss; the second column says what it is made of here, the third what it can be used on.
LOSSES: dict[str, tuple[Make, str]] = {
    "supervised": (lambda: "supervised", "image tokens language"),
    "dgl": (lambda: "dgl", "image tokens"),
    "predsim": (lambda: "predsim", "image tokens"),
    "infopro": (lambda: "infopro", "image"),
    "infopro, contrast": (lambda: losses.InfoPro(contrast="supcon"), "image"),
    "auglocal": (lambda: "auglocal", "image tokens"),
    "loco": (lambda: losses.LoCo(augment=noisy), "image tokens"),
    "loco, supervised": (lambda: losses.LoCo(supervised=True), "image tokens"),
    "gim": (lambda: "gim", "image tokens language"),
    "forward_forward": (lambda: losses.ForwardForward(classes=5), "image tokens"),
    "forward_forward, symba": (lambda: losses.ForwardForward(variant="symba", classes=5), "image tokens"),
    "forward_forward, channels": (lambda: losses.ForwardForward(variant="channels"), "image tokens"),
    "feature_reconstruction": (
        lambda: {"*": "feature_reconstruction", 0: "supervised"},
        "image tokens language",
    ),
    "tied_readout": (lambda: "tied_readout", "language"),
}


class Residual(nn.Module):
    """Two convolutions with a batch norm each, and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.around(x))


class TinyResNet(nn.Module):
    """A stem, three residual blocks, the second of them strided."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.blocks = nn.Sequential(Residual(10, 10, 1), Residual(10, 15, 2), Residual(15, 15, 1))
        self.fc = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class TinyViT(nn.Module):
    """Patches, a class token, encoder layers, a linear readout of the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 20) * 0.02)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(20, 4, 40, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3))
        )
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.layers(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


def case_of(kind: str, size: int = 6) -> tuple[zoo.Case, list[str]]:
    """A small residual network, vision transformer or causal language model, and where its blocks begin."""
    if kind == "language":
        entry = zoo.ZOO["gpt2_no_mask"]
        case = entry.case(2)
        return zoo.Case(case.model.float(), case.loss_fn, case.batch, case.task_loss), list(entry.cuts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyViT() if kind == "tokens" else TinyResNet()
    cuts = ["layers.1", "layers.2"] if kind == "tokens" else ["blocks.1", "blocks.2"]
    return zoo.images(model, size, side=16), cuts


def converted(name: str, kind: str, **options: Any) -> tuple[bpfx.Step, zoo.Case]:
    case, cuts = case_of(kind)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = bpfx.convert(
            case.model,
            case.loss_fn,
            case.batch,
            blocks=cuts,
            local_loss=LOSSES[name][0](),
            **{"offset": None, **options},
        )
    return step, case


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


PAIRS = [(name, kind) for name, (_, kinds) in LOSSES.items() for kind in kinds.split()]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_isolated_finite_and_learning_beside_the_model(name: str, kind: str) -> None:
    step, case = converted(name, kind)
    assert step.model is case.model
    assert list(step.model.state_dict()) == list(case_of(kind)[0].model.state_dict()), "heads are no part of it"
    assert bpfx.audit(step).ok
    seen = [{n for n, p in run_local(step, case).items() if not p.isfinite().all()}]
    assert not any(seen)
    trained = {id(p) for p in step.parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(step.parameters(), lr=2e-3)
    before = {s.block: s.loss for s in run(step.evaluate_blocks, case.batch)}
    for seed in range(8):
        optimizer.zero_grad()
        loss_of(run(step, case.batch, seed)).backward()
        optimizer.step()
    after = {s.block: s.loss for s in run(step.evaluate_blocks, case.batch)}
    assert trained and before.keys() == after.keys() == set(range(len(step.plan.blocks)))
    lower = [k for k in before if after[k] < before[k] or before[k] < 1e-6]
    assert lower == list(before), f"from {before} to {after}"


def run_local(step: bpfx.Step, case: zoo.Case) -> dict[str, Tensor]:
    result = run(step.run_local, case.batch)
    assert all(loss.isfinite() for loss in result.local_losses)
    assert result.grads
    return result.grads


@pytest.mark.parametrize("name", [n for n, (_, kinds) in LOSSES.items() if "image" in kinds])
def test_full_horizon_is_bp(name: str) -> None:
    """With horizon N every block's gradient is that of the task loss, whatever the local loss."""
    case, cuts = case_of("image")
    loss = LOSSES[name][0]()
    loss = loss["*"] if isinstance(loss, dict) else loss
    step = bpfx.convert(
        case.model, case.loss_fn, case.batch, blocks=cuts, local_loss=loss, horizon=len(cuts) + 1, offset=None
    )
    assert not list(step.heads.parameters())
    found, exact = run(step.run_local, case.batch), run(step.run_bp, case.batch)
    assert_gradients(found.grads, exact.grads)
    if step._compiler.spec.rows == 1:
        assert_gradients(exact.grads, bp_oracle(case).grads)


@pytest.mark.parametrize("form", ["per token", "flat"])
def test_linear_heads_keep_a_sequence_that_comes_first(form: str) -> None:
    """Predictions stand in the order of the model's own, whichever dimension counts samples."""
    samples, tokens, classes = 3, 5, 4
    value = torch.randn(samples, tokens, 6)
    shape = (samples, tokens, classes) if form == "per token" else (samples * tokens, classes)
    plain = losses.LinearHead([losses.Feature.of(value)], [losses.Target(shape, 0 if form == "per token" else None)])
    turned = value.transpose(0, 1)
    feature = losses.Feature("x", tuple(turned.shape), 1, 2, value.dtype, value.device)
    shape = (tokens, samples, classes) if form == "per token" else (samples * tokens, classes)
    first = losses.LinearHead([feature], [losses.Target(shape, 1 if form == "per token" else None)])
    first.load_state_dict(plain.state_dict())
    expected, found = plain.predict(value), first.predict(turned)
    assert isinstance(expected, Tensor) and isinstance(found, Tensor)
    if form == "flat":
        expected, found = expected.view(samples, tokens, -1), found.view(tokens, samples, -1)
    torch.testing.assert_close(found.transpose(0, 1), expected)


def test_a_batch_size_that_became_a_number_bars_no_cut() -> None:
    """`len(x)` settles the batch size; blocks behind it exist all the same, and another size is captured anew."""
    case, cuts = case_of("tokens")
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=cuts, offset=None)
    assert len(step.plan.blocks) == 3
    for size in (6, 5):
        other, _ = case_of("tokens", size)
        expected = bp_oracle(zoo.Case(step.model, case.loss_fn, other.batch, case.task_loss))
        assert_gradients(run(step.run_bp, other.batch).grads, expected.grads)


def test_every_registered_loss_is_in_the_table() -> None:
    assert {name.split(",")[0] for name in LOSSES} == set(losses.names())


def test_evaluating_blocks_changes_nothing_and_counts_right_answers() -> None:
    case, cuts = case_of("image")
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=cuts, local_loss="dgl", offset=None)
    state, random = copy.deepcopy(step.state_dict()), torch.get_rng_state()
    scores = step.evaluate_blocks(*case.batch)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in step.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[name]), name
    result = run(step.run_local, case.batch)
    torch.testing.assert_close(torch.tensor([s.loss for s in scores]), torch.stack(result.local_losses).float())
    right = (result.outputs.argmax(1) == case.batch[1]).float().mean()
    assert scores[-1].accuracy == pytest.approx(float(right))
    assert all(s.accuracy is not None and 0 <= s.accuracy <= 1 for s in scores)


# --- compiled ---------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Many small blocks of a convnet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 10, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(10, 10, 3, padding=1)) for _ in range(3))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_compiled_losses_are_the_eager_ones() -> None:
    """One loss per block, so that one compilation covers them; it takes a while where nothing is cached."""
    chosen: dict[Any, Any] = {
        0: "predsim", 1: losses.LoCo(augment=lambda x: x.flip(-1)), 2: losses.ForwardForward(variant="channels"),
    }  # fmt: skip
    results = []
    for backend in ("eager", "inductor"):
        torch.manual_seed(1)
        step = bpfx.convert(
            Stack(), F.cross_entropy, batch(), blocks=[f"blocks.{k}" for k in range(3)], local_loss=chosen, horizon=1,
            offset=None, compile=backend,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error", bpfx.BpfxWarning)  # a block that is not compiled as one program says so
            results.append(run(step.run_local, batch()))
    eager, compiled = results
    assert len(compiled.local_losses) == 4
    torch.testing.assert_close(compiled.local_losses, eager.local_losses, rtol=1e-4, atol=1e-5)
    assert_gradients(compiled.grads, eager.grads, rtol=1e-3)
