"""What the sweep over whole libraries found (benchmarks/coverage.py), each as the smallest model that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import check_bp, run
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx

WIDTH = 8


class DerivedEarly(nn.Module):
    """Makes all it needs of its weights first, and layers follow before that is used (state space models do)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.log_decay, self.skip = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        decay, skip = -self.log_decay.exp(), self.skip.tanh()
        x = self.first(x).tanh()
        x = self.second(x).tanh()
        x = x * decay + self.third(x) * skip
        return self.head(x.tanh())


class DerivedTwice(DerivedEarly):
    """The same, used in several blocks: it crosses boundaries, without samples."""

    def forward(self, x: Tensor) -> Tensor:
        decay = -self.log_decay.exp()
        for layer in (self.first, self.second, self.third):
            x = (layer(x) * decay).tanh() + x * self.skip
        return self.head(x)


class NormedLayout(nn.Module):
    """A group norm, and dropout behind it, on channels-last memory that crosses a boundary (cpubone in timm)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm, self.conv = nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        x = F.dropout(self.norm(x), 0.3, self.training)
        return self.head(self.conv(x).mean((2, 3)))


class _Cube(torch.autograd.Function):
    """Keeps its module out of any trace."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Cell(nn.Module):
    """Adds to its input what it has kept of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) if self.state is None else self.linear(x) + self.state
        self.state = _Cube.apply(x.tanh())
        return self.state


class Recurrent(nn.Module):
    """Runs a cell twice and clears its state after every sequence (recurrent_gemma in transformers, before it)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = Cell(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.cell(x) + self.cell(x.sin()))
        self.cell.state = None
        return x


def recurrent() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Recurrent(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


class Dummy(nn.Module):
    """Takes part in the gradient with a tensor that its forward makes (mra in transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head((x + torch.zeros_like(x).requires_grad_()).tanh())


class FlatTokens(nn.Module):
    """Beside its stream it makes a kernel for every token, samples and tokens in one dimension (convbert)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.kernels = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, kernel in zip(self.layers, self.kernels, strict=True):
            weights = kernel(x).flatten(0, 1).softmax(-1)
            inner = layer(x).tanh()
            inner = inner @ inner.mT @ inner
            x = x + (inner.flatten(0, 1) * weights).view_as(x)
        return self.head(x.mean(1))


class MaskedAttention(nn.Module):
    """Attention written out, its scores masked with infinity (prophetnet in transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
        for layer in self.qkv:
            q, k, v = layer(x).chunk(3, -1)
            scores = q @ k.mT + mask
            x = x + scores.softmax(-1, dtype=torch.float64).type_as(scores) @ v
        return self.head(x.mean(1))


class LayerDrop(nn.Module):
    """Chance leaves out layers that keep running statistics (parakeet and cohere_asr in transformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand([]) < 0.5:
                x = x + layer(x).tanh()
        return x


class Translator(nn.Module):
    """Two sequences of different lengths cross a boundary, and only a head that reads both trains all (moonshine)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.decoder = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wide, self.head = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 3)  # no block's output fits the head

    def forward(self, x: Tensor) -> Tensor:
        source, own = x.split((x.shape[1] - 3, 3), 1)
        for read, write in zip(self.decoder, self.encoder, strict=True):
            own = own + (read(own) @ source.mT).softmax(-1) @ source
            source = write(source).tanh()
        return self.head(self.wide(own + source.mean(1, keepdim=True)).relu())


def case(model: nn.Module, x: Any) -> zoo.Case:
    model = model.double()
    batch = (x, torch.randint(0, 3, (6,)))
    return zoo.Case(model, F.cross_entropy, batch, lambda output, batch: F.cross_entropy(output, batch[1]))


def convert(given: zoo.Case, **more: Any) -> Any:
    return bpfx.convert(given.model, given.loss_fn, given.batch, offset=None, **more)


def check_local(step: Any, given: zoo.Case) -> None:
    """The local step runs, and every local loss reaches what it should."""
    found = run(step.run_local, given.batch)
    trained = {name for block in step.plan.blocks for name in block.parameter_names}
    assert trained <= found.grads.keys()
    assert all(bool(g.isfinite().all()) for g in found.grads.values())


Model = tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]
MODELS: dict[str, Model] = {
    "weights derived before they are used": (DerivedEarly, (6, WIDTH), ["second", "third"]),
    "derived weights used in several blocks": (DerivedTwice, (6, WIDTH), ["second", "third"]),
    "samples and tokens in one dimension": (FlatTokens, (6, 4, WIDTH), ["kernels.2"]),
    "scores masked with infinity": (MaskedAttention, (6, 4, WIDTH), ["qkv.1", "qkv.2"]),
    "a leaf made on the way": (Dummy, (6, WIDTH), ["head"]),
    "a state that the caller resets": (recurrent, (6, WIDTH), ["1", "2"]),
    "group norm of channels-last memory": (NormedLayout, (6, 3, 6, 6), ["norm"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_converts_with_equal_gradients_and_runs_local_steps(name: str) -> None:
    build, shape, cuts = MODELS[name]
    torch.manual_seed(0)
    for blocks in (cuts, len(cuts) + 1):
        given = case(build(), torch.randn(shape, dtype=torch.float64))
        step = convert(given, blocks=blocks)
        check_bp(step, given)
        check_local(step, given)


def test_a_layer_that_the_example_left_out_updates_its_statistics_once() -> None:
    """The recomputation of an opaque module leaves no trace, whatever the draw of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(LayerDrop(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    given = case(model, torch.randn(6, WIDTH, dtype=torch.float64))
    step = convert(given, blocks=["1", "3"])
    assert [block.opaque for block in step.plan.blocks] == [["0"], [], []]
    for draw in range(4):
        check_bp(step, given, draw)
    ran = [int(layer[1].num_batches_tracked) for layer in model[0].layers]
    assert 0 < sum(ran) < 4 * len(ran)


def per_token(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def test_sequences_of_two_lengths_cross_a_boundary() -> None:
    """One head reads both; batches of another length follow without a new example."""
    torch.manual_seed(0)
    model = Translator().double()
    batch = (torch.randn(6, 8, WIDTH, dtype=torch.float64), torch.randint(0, 3, (6, 3)))
    given = zoo.Case(model, per_token, batch, lambda output, batch: per_token(output, batch[1]))
    step = convert(given, blocks=["decoder.1", "decoder.2"])
    assert [len(head.features) for head in step.heads] == [2, 2]
    for length in (8, 5):
        longer = torch.randn(6, length, WIDTH, dtype=torch.float64)
        given = zoo.Case(model, per_token, (longer, batch[1]), given.task_loss)
        check_bp(step, given)
        check_local(step, given)


def test_derived_weights_belong_to_the_block_that_uses_them() -> None:
    given = case(DerivedEarly(), torch.randn(6, WIDTH, dtype=torch.float64))
    step = convert(given, blocks=["second", "third"])
    owners = {n: block.index for block in step.plan.blocks for n in block.parameter_names}
    assert (owners["log_decay"], owners["skip"]) == (1, 2)


def test_a_module_whose_state_others_reset_runs_inside_its_caller() -> None:
    given = case(recurrent(), torch.randn(6, WIDTH, dtype=torch.float64))
    step = convert(given, blocks=["1", "2"])
    assert [block.opaque for block in step.plan.blocks] == [[], ["1"], []]
    for _ in range(2):  # the state of the step before must not be there in the next one
        check_bp(step, given)
        check_local(step, given)


def test_no_cut_where_no_head_could_reach_a_weight() -> None:
    """What the kernel makes has no entry per sample until the stream takes it up."""
    given = case(FlatTokens(), torch.randn(6, 4, WIDTH, dtype=torch.float64))
    with pytest.raises(bpfx.BpfxError, match="in front of 'layers.2'.* no head could reach"):
        convert(given, blocks=["layers.2"])


def test_no_cut_between_scores_and_their_softmax() -> None:
    given = case(MaskedAttention(), torch.randn(6, 4, WIDTH, dtype=torch.float64))
    seen: list[str] = []

    def first(points: list[Any]) -> list[Any]:
        seen.extend(point.after for point in points)
        return points[:1]

    convert(given, blocks=first)
    assert "linear" in seen
    assert not {"matmul", "add"} & set(seen)  # the scores, and their mask added
