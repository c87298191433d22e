"""Measured peaks equal hand counts; predicted peaks equal measured ones; predicting leaves no trace."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bpfx.memory import format_bytes, measure_peak, mib
from bpfx.passes import liveness, workspace
from bpfx.passes.liveness import LivenessError, node_output_bytes, node_saved_bytes, predict_peak

MIB = 2**20


# --- measuring ------------------------------------------------------------------------------------------------------


def test_smoke() -> None:
    peak = measure_peak(lambda: torch.zeros(MIB), warmup=0)
    assert peak.peak_bytes == 4 * MIB
    assert peak.result.shape == (MIB,)
    assert str(peak) == "peak 4.0 MiB on cpu"
    assert mib(3 * MIB) == 3.0
    assert format_bytes(2645 * MIB) == "2.58 GiB"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 50_000)), min_size=1, max_size=30))
def test_equals_hand_count(moves: list[tuple[bool, int]]) -> None:
    """Any sequence of allocations and releases has the peak that adding up gives."""
    held: list[Tensor] = []

    def run() -> None:
        for take, count in moves:
            if take or not held:
                held.append(torch.empty(count, dtype=torch.uint8))
            else:
                held.pop(0)
        held.clear()

    live = [0]
    stack: list[int] = []
    for take, count in moves:
        if take or not stack:
            stack.append(count)
        else:
            stack.pop(0)
        live.append(sum(stack))
    peak = measure_peak(run, warmup=0)
    assert peak.peak_bytes == max(live)
    assert peak.timeline[-1][1] == 0


def test_release_of_older_buffers_is_negative() -> None:
    older = [torch.empty(3 * MIB, dtype=torch.uint8)]

    def run() -> Tensor:
        first = torch.empty(MIB, dtype=torch.uint8)
        older.clear()
        return first

    peak = measure_peak(run, warmup=0)
    assert peak.peak_bytes == MIB
    assert peak.timeline[-1][1] == MIB - 3 * MIB


def test_gradients_of_a_warmed_up_step_count_as_older() -> None:
    layer, x = nn.Linear(256, 256), torch.ones(4, 256)

    def step() -> None:
        layer.zero_grad()
        layer(x).sum().backward()

    peak = measure_peak(step)
    grads = sum(p.nbytes for p in layer.parameters())
    assert min(live for _, live in peak.timeline) == -grads
    assert peak.timeline[-1][1] == 0  # released as many gradients as it made


def test_addresses_left_by_an_earlier_measurement_do_not_matter() -> None:
    kept = measure_peak(lambda: torch.empty(MIB), warmup=0)
    del kept  # released outside a measurement: the profiler's own table goes stale here
    gc.collect()
    again = measure_peak(lambda: torch.empty(MIB), warmup=0)
    assert again.peak_bytes == 4 * MIB


def test_timeline_is_consistent() -> None:
    peak = measure_peak(lambda: torch.ones(1000).cumsum(0).exp().sum())
    times = [moment for moment, _ in peak.timeline]
    assert times == sorted(times)
    assert peak.timeline[0] == (0.0, 0)
    assert peak.peak_bytes == max(live for _, live in peak.timeline)


def test_exception() -> None:
    with pytest.raises(ValueError, match="warmup must be 0 or more; got -1"):
        measure_peak(lambda: None, warmup=-1)
    with pytest.raises(ValueError, match="'cpu' and 'cuda'; got device 'meta'"):
        measure_peak(lambda: None, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda() -> None:
    peak = measure_peak(lambda: torch.empty(4 * MIB, device="cuda", dtype=torch.uint8), device="cuda")
    assert peak.peak_bytes == 4 * MIB
    assert peak.reserved_bytes is not None and peak.reserved_bytes >= 4 * MIB
    assert max(live for _, live in peak.timeline) == 4 * MIB


# --- predicting -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.conv = nn.Conv2d(32, 32, 3, stride, 1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.out = nn.Conv2d(32, 64, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(F.max_pool2d(self.stem(x), 3, 2, 1))))
        return self.fc(F.dropout(F.relu(self.out(x)), 0.1).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).mean(1))


State = tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]


def case(model: nn.Module, x: Tensor, recompute: bool = False) -> tuple[Callable[..., Any], State]:
    def step(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        def forward(value: Tensor) -> Tensor:
            return torch.func.functional_call(model, {**params, **buffers}, (value,))

        out = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        return torch.autograd.grad(F.cross_entropy(out, y), list(params.values()))

    y = torch.randint(0, 10, (len(x),))
    return step, (dict(model.named_parameters()), dict(model.named_buffers()), x, y)


def images(size: int = 8) -> Tensor:
    return torch.randn(size, 3, 64, 64)


CASES: dict[str, Callable[[], tuple[Callable[..., Any], State]]] = {
    "convolutions": lambda: case(Residual(), images()),
    "strided": lambda: case(Residual(stride=2), images()),
    "grouped": lambda: case(Residual(groups=4), images()),
    "depthwise": lambda: case(Residual(groups=32), images()),
    "channels_last": lambda: case(
        Residual().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        images().contiguous(memory_format=torch.channels_last),
    ),
    "checkpoint": lambda: case(Residual(), images(), recompute=True),
    "attention": lambda: case(Attention(), torch.randn(8, 128, 64)),
    "transposed": lambda: case(
        nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 32 * 32, 10)),
        torch.randn(16, 32, 16, 16),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_equals_measured(name: str) -> None:
    torch.manual_seed(0)
    step, state = CASES[name]()
    measured = measure_peak(lambda: step(*state)).peak_bytes
    assert predict_peak(step, *state).peak_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_fake_equals_real_tensors(name: str) -> None:
    """The tracker sees the same lifetimes whether tensors are fake or real."""
    step, state = CASES[name]()
    fake = predict_peak(step, *state, workspace=False)
    real = liveness._track(step, state, None, workspace=False)
    assert fake.peak_bytes == real.peak_bytes
    assert fake.timeline == real.timeline


def test_predicted_block_serial_step() -> None:
    """Forward and gradient of one block after the other, gradients kept: operators' own buffers set this peak."""
    blocks = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))

    def step(params: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        gradients: list[Tensor] = []
        for index in range(3):
            own = [params[f"{index}.weight"], params[f"{index}.bias"]]
            out = F.conv2d(x, own[0], own[1], padding=1).relu()
            gradients += torch.autograd.grad(out.mean((2, 3)).sum(), own)
            x = out.detach()
            del out
        return gradients

    params: dict[str, Tensor] = dict(blocks.named_parameters())
    state = (params, torch.randn(8, 64, 32, 32))
    measured = measure_peak(lambda: step(*state)).peak_bytes
    predicted = predict_peak(step, *state)
    assert predicted.peak_bytes == pytest.approx(measured, rel=0.05)
    assert predict_peak(step, *state, workspace=False).peak_bytes < 0.9 * measured
    assert "workspace" in predicted.at_peak[0].op


def test_predicting_leaves_no_trace() -> None:
    step, state = CASES["convolutions"]()
    before = [t.clone() for t in (*state[0].values(), *state[1].values())]
    versions = [t._version for t in (*state[0].values(), *state[1].values())]
    rng, python = torch.get_rng_state(), random.getstate()

    def noisy(*args: Any) -> Any:
        torch.manual_seed(3)
        random.random()
        with torch.random.fork_rng():
            return step(*args)

    predict_peak(noisy, *state)
    after = [*state[0].values(), *state[1].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert versions == [t._version for t in after]
    assert all(t.grad is None for t in after)
    assert torch.equal(rng, torch.get_rng_state()) and python == random.getstate()


def test_prediction_allocates_nothing() -> None:
    weight = torch.ones(1000, 1000, requires_grad=True)
    peak = measure_peak(lambda: predict_peak(lambda w: (w @ w).sum().backward(), weight))
    assert peak.peak_bytes < 100_000
    assert weight.grad is None


def test_shared_storage_and_results() -> None:
    x = torch.ones(1000)
    assert predict_peak(lambda a, b: a.add_(b), x, x[:1]).peak_bytes == 0  # in place on given memory
    assert torch.equal(x, torch.ones(1000))
    prediction = predict_peak(lambda a: (a + 1, a.view(10, 100)), x)
    assert prediction.peak_bytes == 4000
    assert prediction.timeline[-1] == ("end", 4000)  # what is returned counts
    assert [(t.op, t.shape, t.bytes) for t in prediction.at_peak] == [("add", (1000,), 4000)]


def test_values_cannot_be_read() -> None:
    with pytest.raises(LivenessError, match="cannot run on fake tensors"):
        predict_peak(lambda a: a * 2 if a.sum() > 0 else a, torch.ones(3))


def test_workspace_rule() -> None:
    x, w = torch.empty(8, 64, 32, 32), torch.empty(64, 64, 3, 3)
    conv = torch.ops.aten.convolution.default
    args = (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    out = conv(*args)
    measured = measure_peak(lambda: conv(*args)).peak_bytes
    assert workspace.operator_workspace(conv, args, [out]) + out.nbytes == pytest.approx(measured, rel=0.02)
    assert workspace.operator_workspace(torch.ops.aten.relu.default, (x,), [x]) == 0


# --- per node -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().flatten(1)


def functional_net() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    def forward(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, x: Tensor) -> Tensor:
        conv = F.conv2d(x, weight, padding=1)
        norm = F.batch_norm(conv, mean, var, scale, shift, training=True)
        return norm.relu().flatten(1)

    net = Net()
    args = (net.conv.weight, net.norm.weight, net.norm.bias, net.norm.running_mean, net.norm.running_var)
    return fx.symbolic_trace(forward), (*args, torch.randn(4, 3, 16, 16))  # type: ignore[return-value]


def test_node_saved_bytes_equals_hand_count() -> None:
    gm, args = functional_net()
    activation = 4 * 8 * 16 * 16 * 4
    saved = {node.name: size for node, size in node_saved_bytes(gm, args).items()}
    assert saved["conv2d"] == 0  # its input and its weight are given
    assert saved["batch_norm"] == activation + 2 * 8 * 4  # its input, mean and inverse deviation
    assert saved["relu"] == activation  # its result
    assert saved["flatten"] == saved["output"] == 0
    assert torch.equal(args[3], torch.zeros(8))  # running statistics untouched


def test_node_output_bytes_equals_hand_count() -> None:
    gm, args = functional_net()
    activation = 4 * 8 * 16 * 16 * 4
    made = {node.name: size for node, size in node_output_bytes(gm, args).items() if size}
    assert made == {"conv2d": activation, "batch_norm": activation, "relu": activation}


def test_nodes_of_modules_and_attributes() -> None:
    gm = fx.symbolic_trace(Net())
    x = torch.randn(4, 3, 16, 16)
    saved = node_saved_bytes(gm, (x,))
    assert sum(saved.values()) == 2 * 4 * 8 * 16 * 16 * 4 + 2 * 8 * 4
    assert gm.norm.num_batches_tracked.item() == 0  # type: ignore[union-attr, operator]


def test_node_of_unreadable_value() -> None:
    gm = fx.GraphModule({}, fx.Graph())
    x = gm.graph.placeholder("x")
    gm.graph.output(gm.graph.call_method("item", (x,)))
    gm.recompile()
    with pytest.raises(LivenessError, match="cannot run on fake tensors"):
        node_saved_bytes(gm, (torch.ones(()),))
