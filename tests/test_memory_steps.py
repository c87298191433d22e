"""Every kind of step measured: the numbers are those of measuring by hand, predictions agree, nothing is changed."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same_bits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from twins import adamw, sgd

import bpfx
from bpfx import _shelf, _timeline
from bpfx.memory import Peak, measure_peak, measure_steps, plot_timelines

KINDS = ["local", "bp_blocks", "drop_in", "refresh"]
Batch = tuple[Tensor, Tensor]


# --- models large enough that rounding of small buffers does not matter -----------------------------------------------


def stack(samples: int = 512, depth: int = 5, width: int = 96) -> tuple[nn.Module, Batch, Any]:
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    batch = torch.randn(samples, width), torch.randint(0, 4, (samples,))
    return nn.Sequential(*layers, nn.Linear(width, 4)), batch, [str(k) for k in range(1, depth)]


def pixels(samples: int = 12) -> tuple[nn.Module, Batch, Any]:
    def part(a: int, b: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())

    parts = [part(3, 16), part(16, 16), part(16, 32, 2), part(32, 32)]
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    batch = torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,))
    return nn.Sequential(*parts, tail), batch, ["1", "2", "3"]


def tokens(samples: int = 9) -> tuple[nn.Module, Batch, Any]:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = partial(nn.TransformerEncoderLayer, 64, 4, 128, batch_first=True, norm_first=True, dropout=0.1)
            self.layers = nn.ModuleList(make() for _ in range(4))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x.mean(1))

    batch = torch.randn(samples, 48, 64), torch.randint(0, 10, (samples,))
    return Transformer(), batch, [f"layers.{k}" for k in range(1, 4)]


def small(samples: int = 6) -> tuple[nn.Module, Batch, Any]:
    """BatchNorm and dropout in every block."""
    parts = [
        nn.Sequential(nn.Conv2d(a, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)) for a in (3, 8, 8)
    ]
    batch = torch.randn(samples, 3, 8, 8), torch.randint(0, 4, (samples,))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(8 * 8 * 8, 4)), batch, ["1", "2"]


MODELS: dict[str, Callable[..., tuple[nn.Module, Batch, Any]]] = {"mlp": stack, "conv": pixels, "transformer": tokens}


@functools.cache
def first(name: str) -> tuple[bpfx.Step, dict[str, Any], Any]:
    """Conversion is what takes the time, so all steps of one model share one, and its weights."""
    model, batch, blocks = (small if name == "small" else MODELS[name])()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=blocks, offset=None)
    return step, copy.deepcopy(dict(step.state_dict())), batch


def converted(name: str, offset: Any = None, samples: int | None = None) -> tuple[bpfx.Step, Batch]:
    made, state, batch = first(name)
    step = bpfx.Step(made._compiler, offset)
    step.load_state_dict(state)
    torch.manual_seed(1)  # here: a conversion draws the heads' weights
    return step.train(), batch if samples is None else MODELS[name](samples)[1]


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_step_by_hand(name: str) -> None:
    step, batch = converted(name, bpfx.Offset(period=2))
    found = measure_steps(step, *batch)
    assert list(found) == KINDS

    def drop_in() -> float:
        loss = step(*batch)
        loss.backward()
        step.zero_grad()
        return loss.item()

    by_hand = {
        "local": measure_peak(lambda: step.run_local(*batch).loss.item()),
        "bp_blocks": measure_peak(lambda: step.run_bp(*batch).loss.item()),
        "refresh": measure_peak(drop_in, warmup=2),  # at iterations 0, 1 and 2
        "drop_in": measure_peak(drop_in, warmup=0),
    }
    for kind, peak in by_hand.items():
        assert found[kind].peak_bytes == pytest.approx(peak.peak_bytes, rel=0.01), kind
        expected = step.plan.predicted["local" if kind == "drop_in" else kind]
        assert expected == pytest.approx(found[kind].peak_bytes, rel=0.1), kind
        assert found[kind].result.shape == () and not found[kind].result.requires_grad
        assert max(live for _, live in found[kind].timeline) == found[kind].peak_bytes


@pytest.mark.parametrize("name", MODELS)
def test_a_trainer_by_hand(name: str) -> None:
    step, batch = converted(name, bpfx.Offset(period=2))
    trainer = bpfx.BlockTrainer(step, adamw, micro_batches=3)
    found = measure_steps(trainer, *batch)
    assert list(found) == ["local_serial", "refresh_serial"]
    refresh = measure_peak(lambda: trainer.step(*batch), warmup=2)
    local = measure_peak(lambda: trainer.step(*batch), warmup=0)
    assert found["refresh_serial"].peak_bytes == pytest.approx(refresh.peak_bytes, rel=0.01)
    assert found["local_serial"].peak_bytes == pytest.approx(local.peak_bytes, rel=0.01)
    exact = bpfx.BlockTrainer(step, adamw, micro_batches=3, mode="bp")
    found = measure_steps(exact, *batch)
    assert list(found) == ["bp_serial"]
    by_hand = measure_peak(lambda: exact.step(*batch), warmup=1)
    assert found["bp_serial"].peak_bytes == pytest.approx(by_hand.peak_bytes, rel=0.01)


def predicted_and_measured(name: str, pieces: int, samples: int | None) -> dict[str, tuple[int, int]]:
    step, batch = converted(name, bpfx.Offset(period=2), samples)
    trainers = [bpfx.BlockTrainer(step, adamw, micro_batches=pieces, mode=mode) for mode in ("local", "bp")]
    predicted = {kind: s.peak_bytes for kind, s in trainers[0].predict(*batch).items()}
    predicted["refresh_serial"] = max(predicted["refresh_serial"], predicted["local_serial"])
    measured = {kind: p.peak_bytes for t in trainers for kind, p in measure_steps(t, *batch).items()}
    assert set(measured) == {"local_serial", "refresh_serial", "bp_serial"}
    return {kind: (predicted[kind], measured[kind]) for kind in measured}


@pytest.mark.parametrize(("pieces", "samples"), [(1, None), (3, None), (3, 13)])
@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_measured(name: str, pieces: int, samples: int | None) -> None:
    found = predicted_and_measured(name, pieces, samples if name != "mlp" or samples is None else 512 + samples)
    off = {kind: predicted / measured - 1 for kind, (predicted, measured) in found.items()}
    assert all(abs(share) < 0.1 for share in off.values()), off


def test_without_an_offset_nothing_refreshes() -> None:
    step, batch = converted("mlp")
    found = measure_steps(step, *batch)
    assert list(found) == KINDS[:3]
    with torch.no_grad():  # changes nothing
        assert {k: p.peak_bytes for k, p in measure_steps(step, *batch).items()} == {
            k: p.peak_bytes for k, p in found.items()
        }
    assert list(measure_steps(bpfx.BlockTrainer(step, adamw), *batch)) == ["local_serial"]


def test_steps_between_refreshes_where_every_step_refreshes() -> None:
    every, sometimes = (converted("mlp", bpfx.Offset(period=p)) for p in (1, 3))
    found, expected = (measure_steps(step, *batch) for step, batch in (every, sometimes))
    assert list(found) == KINDS
    assert {k: p.peak_bytes for k, p in found.items()} == {k: p.peak_bytes for k, p in expected.items()}
    assert every[0].offset is not None and every[0].offset.period == 1


# --- nothing is changed -----------------------------------------------------------------------------------------------

BATCH, OTHER = small()[1], small()[1]


def state_of(step: bpfx.Step, trainer: bpfx.BlockTrainer | None = None) -> dict[str, Any]:
    """Everything there is, copied."""
    generators = torch.get_rng_state(), random.getstate()
    state = {
        "step": dict(step.state_dict()),
        "iteration": step.iteration,
        "grads": {n: p.grad for n, p in step.named_parameters()},
        "generators": generators,
        "heads seen": (step._care.seen, step.offset),
        "modes": [m.training for m in step.modules()],
    }
    if trainer is not None:
        state["trainer"] = trainer.state_dict()
        state["results"] = (trainer.grad_norms, trainer.local_losses, trainer.broken)
    return copy.deepcopy(state)


def objects_of(step: bpfx.Step, trainer: bpfx.BlockTrainer | None = None) -> dict[str, Any]:
    """Which objects they are; the optimizer's too."""
    named = {n: id(t) for n, t in [*step.named_parameters(), *step.named_buffers()]}
    grads = {n: id(p.grad) for n, p in step.named_parameters()}
    own = [o.state for o in trainer.optimizers.values()] if trainer else []
    return {"named": named, "grads": grads, "state": [[id(t) for t in s.values()] for o in own for s in o.values()]}


def make_step(offset: str | None, batches: int) -> bpfx.Step:
    own = bpfx.Offset(period=2, dtype="int8" if offset == "int8" else None, lam="auto") if offset else None
    step = converted("small", own)[0]
    for _ in range(batches):
        step(*OTHER).backward()
    return step


@pytest.mark.parametrize(("offset", "batches"), [(None, 1), ("int8", 0), ("int8", 2), ("fp32", 1)])
def test_a_step_is_as_it_was(offset: str | None, batches: int) -> None:
    step = make_step(offset, batches)
    before, objects = state_of(step), objects_of(step)
    assert any(isinstance(m, nn.BatchNorm2d) for m in step.modules())
    assert any(isinstance(m, nn.Dropout) for m in step.modules())
    measure_steps(step, *BATCH)
    assert_same_bits(state_of(step), before)
    assert objects_of(step) == objects


def make_trainer(
    mode: str, steps: int, offset: Any = "default", optimizer: Any = adamw, **options: Any
) -> bpfx.BlockTrainer:
    own = bpfx.Offset(period=2, dtype="int8") if offset == "default" else offset
    defaults = {"micro_batches": 2, "clip_norm": 1.0, "lr_scheduler": partial(CosineAnnealingLR, T_max=9)}
    trainer = bpfx.BlockTrainer(converted("small", own)[0], optimizer, mode=mode, **defaults | options)
    for _ in range(steps):
        trainer.step(*OTHER)
    return trainer


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_trainer_is_as_it_was(mode: str, steps: int) -> None:
    runs = []
    for measures in (False, True):
        trainer = make_trainer(mode, steps)
        if measures:
            for number, parameter in enumerate(trainer.converted.parameters()):
                parameter.grad = torch.full_like(parameter, 3.0) if number % 2 else None
            before, objects = state_of(trainer.converted, trainer), objects_of(trainer.converted, trainer)
            measure_steps(trainer, *BATCH)
            assert_same_bits(state_of(trainer.converted, trainer), before)
            assert objects_of(trainer.converted, trainer) == objects
            trainer.converted.zero_grad()
        losses = [trainer.step(*OTHER) for _ in range(3)]  # and what follows is what would have followed
        runs.append((losses, copy.deepcopy(trainer.state_dict())))
    assert_same_bits(*runs)


class Replacing(torch.optim.Optimizer):
    """Makes new state tensors at every step, and writes past the version counter."""

    def __init__(self, named: Any) -> None:
        super().__init__(named, {"lr": torch.tensor(0.1)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"].mul_(0.5)
            for p in group["params"]:
                if p.grad is not None:
                    own = self.state[p]
                    own["mean"] = own["mean"] * 0.9 + p.grad if own else p.grad.clone()
                    own.setdefault("seen", []).append(float(p.grad.sum()))
                    p.data.sub_(own["mean"] * group["lr"])


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_that_replaces_its_state(steps: int) -> None:
    trainer = make_trainer("local", steps, optimizer=Replacing, lr_scheduler=None)
    before = state_of(trainer.converted, trainer)
    found = measure_steps(trainer, *BATCH)["local_serial"]
    assert_same_bits(state_of(trainer.converted, trainer), before)
    trainer.converted.iteration = 3
    by_hand = measure_peak(lambda: trainer.step(*BATCH), warmup=0) if steps else found
    assert found.peak_bytes == pytest.approx(by_hand.peak_bytes, rel=0.01)


def test_state_that_waits_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that were fetched ahead while measuring are not used afterwards."""
    away = {"state_device": "cpu", "parameter_device": "cpu", "boundary_device": "cpu"}
    monkeypatch.setattr(_shelf, "moves", lambda device, home: True)
    losses = []
    for measures in (False, True):
        trainer = make_trainer("local", 2, **away)
        if measures:
            measure_steps(trainer, *BATCH)
        losses.append([trainer.step(*OTHER) for _ in range(3)])
        losses[-1] += [p.detach().clone() for p in trainer.converted.parameters()]
    assert_same_bits(*losses)


@pytest.mark.parametrize("at", [1, 4, 11])
@pytest.mark.parametrize("kind", ["step", "local", "bp"])
def test_an_error_leaves_things_as_they_were(kind: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first block, between blocks, in the measured call."""
    trainer = make_trainer(kind, 1) if kind != "step" else None
    step = trainer.converted if trainer is not None else make_step("fp32", 1)
    for parameter in step.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, objects = state_of(step, trainer), objects_of(step, trainer)
    calls, own = itertools.count(1), {name: getattr(torch.autograd, name) for name in ("grad", "backward")}

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        if next(calls) >= at:
            raise torch.OutOfMemoryError("out of memory")
        return own[name](*args, **kwargs)

    with monkeypatch.context() as patch:
        for name in own:
            patch.setattr(torch.autograd, name, partial(call, name))
        with pytest.raises((torch.OutOfMemoryError, bpfx.BpfxError), match="out of memory"):
            measure_steps(trainer if trainer is not None else step, *BATCH)
    assert_same_bits(state_of(step, trainer), before)
    assert objects_of(step, trainer) == objects


@pytest.mark.parametrize("form", ["loader", "loader under way", "iterator"])
def test_data_of_refreshes_is_given_back(form: str) -> None:
    """A refresh that takes its samples from elsewhere takes the same ones after a measurement as without it."""
    x, y = (torch.cat(parts) for parts in zip(BATCH, OTHER, strict=True))
    losses = []
    for measures in (False, True):
        torch.manual_seed(4)
        loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
        data: Any = iter([b for _ in range(6) for b in loader]) if form == "iterator" else loader
        trainer = make_trainer("local", 1 if form != "loader" else 0, bpfx.Offset(period=1, batch=7, data=data))
        if measures:
            measure_steps(trainer, *BATCH)
        losses.append([trainer.step(*OTHER) for _ in range(4)])
        losses[-1] += [trainer.converted.offset_state[n] for n in trainer.converted.offset_state]
    assert_same_bits(*losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_steps() -> None:
    model, batch, blocks = stack()
    on_device = batch[0].cuda(), batch[1].cuda()
    step = bpfx.convert(model.cuda(), F.cross_entropy, on_device, blocks=blocks, offset=bpfx.Offset())
    trainer = bpfx.BlockTrainer(step, adamw, state_device="cpu")
    trainer.step(*on_device)
    before = state_of(step, trainer)
    for peak in (measure_steps(step, *on_device) | measure_steps(trainer, *on_device)).values():
        assert peak.device.type == "cuda" and peak.peak_bytes > 0
        assert peak.active_bytes is not None and peak.reserved_bytes is not None
    assert_same_bits(state_of(step, trainer), before)


# --- words ------------------------------------------------------------------------------------------------------------


def test_messages() -> None:
    step, batch = converted("mlp")
    for target, words in ((step.model, "Sequential"), (lambda: None, "function"), (None, "NoneType")):
        with pytest.raises(bpfx.BpfxError, match=f"measure_steps takes .*BlockTrainer; got a {words}; measure_peak"):
            measure_steps(target, *batch)  # type: ignore[arg-type]
    with pytest.raises(bpfx.BpfxError, match="eval mode; call step.train"):
        measure_steps(step.eval(), *batch)
    trainer = bpfx.BlockTrainer(step.train(), sgd)  # type: ignore[arg-type]
    trainer.broken = "a step failed"
    with pytest.raises(bpfx.BpfxError, match="a step failed; call load_state_dict"):
        measure_steps(trainer, *batch)
    with pytest.raises(bpfx.BpfxError):
        measure_steps(step, batch[0])


# --- the picture ------------------------------------------------------------------------------------------------------


def peak_of(*live: int) -> Peak[None]:
    return Peak(None, max(live), [(float(t), count) for t, count in enumerate(live)], torch.device("cpu"))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_timelines_are_drawn(ending: str, tmp_path: Path) -> None:
    call = {n: partial(torch.ones, n << 20) for n in (1, 2)}
    rows: dict[str, Peak[Any]] = {f"{n} Mi": measure_peak(lambda n=n: call[n]().exp().sum()) for n in call}
    path = tmp_path / f"timelines.{ending}"
    assert plot_timelines(rows, str(path), title="Two", base="2 Mi") == path
    text = path.read_bytes()
    assert len(text) > 5000
    assert text.startswith(b"\x89PNG" if ending == "png" else b"<?xml")


def test_strange_timelines_are_drawn(tmp_path: Path) -> None:
    """Nothing allocated, only released, many rows with the same peak at the same moment."""
    rows: dict[str, Peak[Any]] = {f"row {k}": peak_of(0, 3 * 2**20, 0) for k in range(16)}
    rows |= {"none": Peak(None, 0, [(0.0, 0)], torch.device("cpu")), "released": peak_of(0, -(2**22), -(2**20))}
    plot_timelines(rows, tmp_path / "a.png", base="none")
    plot_timelines({"none": rows["none"]}, tmp_path / "b.svg")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.svg"))


def test_thin_keeps_peaks() -> None:
    generator = random.Random(0)
    timeline = [(0.0, 0), *((i / 1000, generator.randrange(10**6)) for i in range(1, 5000))]
    kept = _timeline.thin(timeline, bins=100)
    assert len(kept) <= 103 and kept == sorted(kept)
    assert set(kept) <= set(timeline)
    assert max(live for _, live in kept) == max(live for _, live in timeline)
    assert (kept[0], kept[-1]) == (timeline[0], timeline[-1])
    assert _timeline.thin([(0.0, 0)]) == [(0.0, 0)]
    # A level that nothing ends for a long time is not taken for the maximum before it.
    assert _timeline.thin([(0.0, 0), (0.1, 9), (0.2, 1), (9.0, 2), (10.0, 0)], 10) == [
        (0.0, 0), (0.1, 9), (0.2, 1), (9.0, 2), (10.0, 0),
    ]  # fmt: skip


def test_messages_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"BP": peak_of(0, 1, 0)}
    with pytest.raises(bpfx.BpfxError, match="at least one"):
        plot_timelines({}, tmp_path / "a.png")
    with pytest.raises(bpfx.BpfxError, match=r"ends in \.png or \.svg"):
        plot_timelines(rows, tmp_path / "a.jpeg")
    with pytest.raises(bpfx.BpfxError, match="base='bp' is none of the rows.*'BP'"):
        plot_timelines(rows, tmp_path / "a.png", base="bp")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(bpfx.BpfxError, match=r"pip install 'bpfx\[plot\]'"):
        plot_timelines(rows, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
