"""Predictions of whole steps are what is measured; a memory budget is kept, by the fewest blocks and micro-batches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bpfx
from bpfx import _predict, _shelf, _simulate
from bpfx._correction import EXACT
from bpfx._predict import costs_of
from bpfx.memory import measure_peak

SGD = functools.partial(torch.optim.SGD, lr=1e-3)
Batch = tuple[Tensor, Tensor]


def mlp(depth: int = 8, width: int = 128, samples: int = 512) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*layers, nn.Linear(width, 4)), (torch.randn(samples, width), torch.randint(0, 4, (samples,)))


def convnet(samples: int = 32) -> tuple[nn.Module, Batch]:
    """Large boundaries and small gradients at the beginning, the reverse at the end."""
    torch.manual_seed(0)
    body: list[nn.Module] = []
    for a, b in ((3, 16), (16, 16), (16, 16), (16, 64), (64, 128)):
        body.append(nn.Sequential(nn.Conv2d(a, b, 3, stride=1 + (b > 16), padding=1), nn.BatchNorm2d(b), nn.ReLU()))
    net = nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 4)
    )
    return net, (torch.randn(samples, 3, 48, 48), torch.randint(0, 4, (samples,)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transformer(depth: int = 6) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    net = nn.Sequential(*(Attention(64) for _ in range(depth)), nn.Flatten(), nn.Linear(64 * 64, 4))
    return net, (torch.randn(8, 64, 64), torch.randint(0, 4, (8,)))


MODELS = {"mlp": mlp, "convnet": convnet, "transformer": transformer}


def plan(name: str, **options: Any) -> bpfx.plan.Plan:
    model, batch = MODELS[name]()
    return bpfx.plan(model, F.cross_entropy, batch, **options)


def backward(model: nn.Module, batch: Batch) -> list[Tensor]:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, list(model.parameters())))


# --- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_plain_bp_is_predicted(name: str) -> None:
    model, batch = MODELS[name]()
    row = bpfx.plan(model, F.cross_entropy, batch, blocks=3).schedules[0]
    assert row.name == "bp"
    measured = measure_peak(lambda: backward(model, batch)).peak_bytes
    assert row.peak_bytes == pytest.approx(measured, rel=0.05)
    with FlopCounterMode(display=False) as counter:
        backward(model, batch)
    assert row.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_rows_stand_in_the_order_that_theory_gives(name: str) -> None:
    rows = {s.name: s for s in plan(name, blocks=4).schedules}
    assert rows["ac_micro"].peak_bytes < rows["ac_oib"].peak_bytes <= rows["ac"].peak_bytes < rows["bp"].peak_bytes
    assert rows["local_serial"].peak_bytes < rows["local"].peak_bytes
    assert rows["bp"].flops < rows["ac"].flops < 1.4 * rows["bp"].flops
    assert rows["ac"].flops == rows["ac_oib"].flops
    assert rows["local_serial"].flops < rows["bp_serial"].flops < rows["refresh_serial"].flops
    assert [s.name for s in rows.values() if s.exact] == ["bp", "ac", "ac_oib", "ac_micro", "bp_serial"]


@pytest.mark.parametrize("name", MODELS)
def test_categories_add_up_to_the_peak(name: str) -> None:
    for row in plan(name, blocks=3).schedules:
        if row.categories:
            assert sum(row.categories.values()) == row.peak_bytes, row.name


def test_state_counts_what_lives_between_steps() -> None:
    model, batch = mlp()
    rows = {s.name: s for s in bpfx.plan(model, F.cross_entropy, batch, blocks=3).schedules}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert rows["bp"].state == {"parameters": parameters, "optimizer state": 2 * parameters}
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=bpfx.Offset(dtype="int8"))
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    trainer = bpfx.BlockTrainer(step, adamw)
    trainer.step(*batch)
    state = trainer.predict(*batch)["local_serial"].state
    assert state["offsets"] == step.offset_state.nbytes > 0
    moments = [t for o in trainer.optimizers.values() for s in o.state.values() for t in s.values() if t.dim()]
    heads = sum(p.nbytes for p in step.heads.parameters())
    assert state["optimizer state"] + state["heads"] == sum(t.nbytes for t in moments) + heads


def test_predicting_changes_nothing_and_runs_nothing() -> None:
    model, batch = convnet()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=3, offset=None)
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=2)
    before = {n: t.clone() for n, t in step.state_dict().items() if isinstance(t, Tensor)}
    random = torch.get_rng_state()
    trainer.predict(*batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in step.state_dict().items() if isinstance(t, Tensor))


def test_table_shows_every_schedule() -> None:
    found = plan("mlp", blocks=3)
    text = str(found)
    for row in found.schedules:
        assert row.words in text
    assert "of BP" in text


def test_a_loss_whose_size_depends_on_values_trains_without_a_prediction() -> None:
    def masked(output: Tensor, target: Tensor) -> Tensor:
        kept = target >= 0
        return F.cross_entropy(output[kept], target[kept])

    model, (x, y) = mlp(depth=3, samples=12)
    y[::3] = -1
    step = bpfx.convert(model, masked, (x, y), blocks=2, offset=bpfx.Offset(period=1))
    assert any("no prediction" in note and "\n" not in note for note in step.plan.notes)
    expected = torch.autograd.grad(masked(model(x), y), list(model.parameters()))
    step(x, y).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_model_that_cannot_be_predicted_is_planned_with_a_note() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum().detach()) > 0 else self.b(x)

    net = nn.Sequential(nn.Linear(8, 8), Branch(), nn.Linear(8, 2))
    batch = torch.randn(4, 8), torch.randint(0, 2, (4,))
    found = bpfx.plan(net, F.cross_entropy, batch, blocks=2)
    assert found.schedules or any("no prediction" in note for note in found.notes)


# --- predicted when asked for -----------------------------------------------------------------------------------------


def bystanders(step: bpfx.Step) -> None:
    step.model.to(torch.float64)
    step.model.requires_grad_(False)
    with torch.inference_mode():
        len(step.plan.predicted)


def trained(step: bpfx.Step) -> None:
    optimizer, batch = SGD(step.parameters()), convnet()[1]
    for _ in range(2):
        step(*batch).backward()
        optimizer.step()
    step.eval()


@pytest.mark.parametrize("then", [bystanders, trained])
def test_a_prediction_is_of_the_model_as_it_was_converted(then: Callable[[bpfx.Step], None]) -> None:
    model, batch = convnet()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=3)
    twin = bpfx.convert(convnet()[0], F.cross_entropy, batch, blocks=3)
    then(step)
    before, random = (
        {n: t.clone() for n, t in step.state_dict().items() if isinstance(t, Tensor)},
        torch.get_rng_state(),
    )
    expected = dict(twin.plan.predicted)
    assert list(expected) == ["bp", "local", "bp_blocks", "refresh"]
    assert dict(step.plan.predicted) == expected
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[n]) for n, t in step.state_dict().items() if isinstance(t, Tensor))


def test_a_prediction_is_made_under_the_conversions_autocast() -> None:
    model, batch = mlp()
    plain = bpfx.convert(model, F.cross_entropy, batch, blocks=3)
    with torch.autocast("cpu", torch.bfloat16):
        step = bpfx.convert(mlp()[0], F.cross_entropy, batch, blocks=3)
        inside = dict(plain.plan.predicted)
    outside = dict(bpfx.convert(mlp()[0], F.cross_entropy, batch, blocks=3).plan.predicted)
    assert inside == outside and step.plan.predicted["bp"] != outside["bp"]


def test_a_prediction_is_made_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], _predict.predict_bp
    monkeypatch.setattr(_predict, "predict_bp", lambda *args: calls.append(1) or original(*args))
    model, batch = mlp(depth=3, samples=12)
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=2, offset=bpfx.Offset())
    step(*batch).backward()
    assert not calls
    assert str(step.plan) == str(step.plan) and "of plain BP" in str(step.plan)
    assert len(calls) == 1


# --- how the trainer runs a step --------------------------------------------------------------------------------------


def test_early_layers_of_a_convnet_are_passed_in_one_go() -> None:
    """Their boundaries are larger than their gradients: grouped, the measured peak is smaller."""
    model, batch = convnet()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=5, offset=None)
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=4)
    assert any(len(group) > 1 for group in trainer._groups)
    grouped = measure_peak(lambda: trainer.step(*batch)).peak_bytes
    assert grouped == pytest.approx(trainer.predict(*batch)["local_serial"].peak_bytes, rel=0.1)
    trainer._groups = [range(k, k + 1) for k in range(5)]
    assert grouped < 0.9 * measure_peak(lambda: trainer.step(*batch)).peak_bytes


@pytest.mark.parametrize("mode", ["local", "bp"])
@pytest.mark.parametrize(("name", "one_by_one"), [("convnet", True), ("transformer", False)])
def test_an_exact_step_takes_the_order_with_the_smaller_peak(name: str, one_by_one: bool, mode: str) -> None:
    """Large boundaries and small gradients: one micro-batch after the other. The reverse: all of them together."""
    model, batch = MODELS[name]()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=4, offset=bpfx.Offset(bounds=(1, 1)))
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=4, mode=mode)
    assert trainer._one_by_one is one_by_one
    expected = step._compiler.arrange(4, False, mode == "local").exact.peak
    without = trainer.predict(*batch)["bp_serial"].peak_bytes
    assert expected > without if mode == "local" else expected == pytest.approx(without, rel=1e-3)
    found = []
    for trainer._one_by_one in (one_by_one, not one_by_one):
        while mode == "local" and step._correction.kind(step.iteration) != EXACT:
            trainer.step(*batch)
        found.append(measure_peak(lambda: trainer.step(*batch), warmup=0).peak_bytes)
    assert found[0] == pytest.approx(expected, rel=0.1)
    assert found[0] < 0.97 * found[1]


@pytest.mark.parametrize("where", ["boundary_device", "parameter_device"])
def test_what_waits_elsewhere_keeps_the_micro_batches_together(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries that wait on another device cost nothing here, and weights that do would be fetched again."""
    model, batch = convnet()
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=4)
    here = bpfx.BlockTrainer(step, SGD, micro_batches=4, **{where: "cpu"})
    assert here._one_by_one, "nothing moves"
    monkeypatch.setattr(_shelf, "moves", lambda device, home: True)
    elsewhere = bpfx.BlockTrainer(step, SGD, micro_batches=4, **{where: "cpu"})
    assert not elsewhere._one_by_one
    elsewhere.load_state_dict(here.state_dict())
    assert not elsewhere._one_by_one
    assert elsewhere.predict(*batch)["bp_serial"].peak_bytes > 1.3 * here.predict(*batch)["bp_serial"].peak_bytes


def test_a_trainer_predicts_the_order_that_it_has() -> None:
    """It is chosen for the example batch, kept for others, and taken over by a run that is resumed."""
    model, (x, y) = transformer()
    step = bpfx.convert(model, F.cross_entropy, (x, y), blocks=4, offset=None)
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=4, mode="bp")
    assert not trainer._one_by_one
    larger = x.repeat(8, 1, 1), y.repeat(8)
    for trainer._one_by_one in (False, True):
        predicted = trainer.predict(*larger)["bp_serial"].peak_bytes
        assert measure_peak(lambda: trainer.step(*larger)).peak_bytes == pytest.approx(predicted, rel=0.1)
    resumed = bpfx.BlockTrainer(step, SGD, micro_batches=4, mode="bp")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed._one_by_one


class Tower(nn.Module):
    """Frozen layers on an input of their own, in between; the embedding is tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.frozen = nn.Embedding(300, 64), nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.layers, self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 300, bias=False)
        self.frozen.requires_grad_(False)
        self.out.weight = self.e.weight

    def forward(self, ids: Tensor, z: Tensor) -> Tensor:
        x = self.e(ids)
        for layer, frozen in zip(self.layers, self.frozen, strict=True):
            z = torch.tanh(frozen(z))
            x = torch.tanh(layer(x) + z)
        return self.out(x)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("mode", ["local", "bp"])
def test_tied_and_frozen_parts_are_predicted_in_both_orders(mode: str, one_by_one: bool) -> None:
    torch.manual_seed(0)
    batch = torch.randint(300, (256,)), torch.randn(256, 64), torch.randint(300, (256,))
    cuts = ["frozen.0", "layers.0", "frozen.1", "layers.1", "frozen.2", "layers.2"]
    step = bpfx.convert(Tower(), F.cross_entropy, batch, blocks=cuts, offset=bpfx.Offset(bounds=(1, 1)))
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=4, mode=mode)
    trainer._one_by_one = one_by_one
    while mode == "local" and step._correction.kind(step.iteration) != EXACT:
        trainer.step(*batch)
    costs = costs_of(step._compiler.weights, step._compiler.main, step._compiler.spec.largest(list(batch), 4))
    predicted = _simulate.bp_serial(costs, 4, one_by_one=one_by_one, heads=mode == "local").peak
    assert measure_peak(lambda: trainer.step(*batch), warmup=0).peak_bytes == pytest.approx(predicted, rel=0.1)


def test_a_refresh_takes_smaller_pieces_where_it_would_set_the_peak() -> None:
    model, batch = transformer(depth=16)
    step = bpfx.convert(model, F.cross_entropy, batch, blocks=16, offset=bpfx.Offset(period=2))
    trainer = bpfx.BlockTrainer(step, SGD, micro_batches=2)
    assert trainer._refresh_pieces > trainer.micro_batches
    trainer.step(*batch)
    local = measure_peak(lambda: trainer.step(*batch), warmup=0).peak_bytes
    refresh = measure_peak(lambda: trainer.step(*batch), warmup=0).peak_bytes
    assert refresh <= 1.05 * local


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_budget_is_kept(name: str, share: float) -> None:
    """By the trainer with what the plan chose, for local steps and refreshes alike."""
    model, batch = MODELS[name]()
    budget = int(share * measure_peak(lambda: backward(model, batch)).peak_bytes)
    step = bpfx.convert(model, F.cross_entropy, batch, memory_budget=budget, offset=bpfx.Offset(period=1))
    trainer = bpfx.BlockTrainer(step, SGD)
    assert trainer.micro_batches == step.plan.micro_batches
    assert measure_peak(lambda: trainer.step(*batch)).peak_bytes <= 1.02 * budget


def test_a_generous_budget_changes_nothing() -> None:
    found = plan("mlp", memory_budget="1GiB")
    assert (len(found.blocks), found.micro_batches) == (1, 1)


def test_a_smaller_budget_takes_no_fewer_blocks() -> None:
    model, batch = transformer(depth=4)
    bp = measure_peak(lambda: backward(model, batch)).peak_bytes
    counts = []
    for share in (0.6, 0.25):
        found = bpfx.plan(model, F.cross_entropy, batch, memory_budget=int(share * bp))
        counts.append((len(found.blocks), found.micro_batches))
    assert counts == sorted(counts)


def test_batch_normalisation_keeps_eight_samples_a_piece() -> None:
    model, batch = convnet()
    bp = bpfx.plan(model, F.cross_entropy, batch, blocks=1).schedules[0].peak_bytes
    found = bpfx.plan(model, F.cross_entropy, batch, memory_budget=int(0.35 * bp))
    assert found.micro_batches <= 4


def test_a_budget_out_of_reach_names_the_smallest_peak_and_what_sets_it() -> None:
    model, batch = mlp()
    with pytest.raises(bpfx.BpfxError) as caught:
        bpfx.convert(model, F.cross_entropy, batch, memory_budget="10KiB")
    text = str(caught.value)
    assert "out of reach" in text and "set by block" in text
    reached = re.search(r"smallest predicted peak is ([0-9.]+ [KM]iB)", text)
    assert reached is not None
    # What it names can be had.
    number, unit = reached[1].split()
    size = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert bpfx.plan(model, F.cross_entropy, batch, memory_budget=int(1.05 * size)).blocks


def test_the_drop_in_loop_says_that_it_exceeds_the_budget() -> None:
    model, batch = mlp()
    budget = int(0.3 * measure_peak(lambda: backward(model, batch)).peak_bytes)
    step = bpfx.convert(model, F.cross_entropy, batch, memory_budget=budget)
    with pytest.warns(bpfx.BpfxWarning, match=r"budget.*BlockTrainer"):
        step(*batch)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"micro_batches": 2.5}, "micro_batches=2.5"),
        ({"offset": "x"}, "offset='x'"),
        ({"memory_budget": "1.2.3GiB"}, "memory_budget"),
        ({"memory_budget": "."}, "memory_budget"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(bpfx.BpfxError, match=re.escape(words)):
        plan("mlp", **options)


def test_more_micro_batches_than_samples_are_as_many_as_samples() -> None:
    model, batch = convnet(samples=4)
    rows = {s.name: s for s in bpfx.plan(model, F.cross_entropy, batch, blocks=2, micro_batches=1000).schedules}
    assert rows["local_serial"].micro_batches == 4


def test_a_budget_may_be_a_large_float() -> None:
    assert len(plan("mlp", memory_budget=2e16).blocks) == 1
