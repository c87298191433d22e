"""What a refresh finds, and what is done with it, does not depend on how it is cut, nor on the loop or the loss."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bpfx

sgd = functools.partial(torch.optim.SGD, lr=1.0)


def data(seed: int, samples: int = 32, width: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(samples, width, generator=draw).double(), torch.randint(3, (samples,), generator=draw)


def converted(offset: bpfx.Offset, dropout: float = 0.0, loss: Any = F.cross_entropy) -> bpfx.Step:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    return bpfx.convert(nn.Sequential(*layers).double(), loss, data(0), blocks=["3", "5"], offset=offset)


class Tied(nn.Module):
    """One weight in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (nn.Linear(8, n) for n in (8, 8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.out(torch.tanh(self.c(torch.tanh(F.linear(x, self.a.weight)))))


@pytest.mark.parametrize("micro_batches", [2, 8, 32])
def test_cosines_with_the_old_offset_are_those_of_one_piece(micro_batches: int) -> None:
    found = []
    for pieces in (1, micro_batches):
        step = converted(bpfx.Offset(period=1, micro_batches=pieces))
        for seed in range(3):
            step(*data(seed))
        found.append([(b["staleness"], b["descent"]) for r in step.diagnostics.refreshes for b in r["blocks"]])
    assert None not in found[0][-2]  # of block 0; the last head is the last layer, and its Δ zero
    for whole, cut in zip(*found, strict=True):
        assert cut == pytest.approx(whole, abs=1e-5)


def test_nothing_is_unstable_where_weights_rest() -> None:
    step = converted(bpfx.Offset(period=1, micro_batches=32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(60):
            step(*data(seed))


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_a_summed_loss_teaches_what_its_mean_does(micro_batches: int) -> None:
    """Norms of gradients are of the whole batch, beside that of the stored offset."""
    records = []
    for reduction in ("mean", "sum"):
        loss = functools.partial(F.cross_entropy, reduction=reduction)
        step = converted(bpfx.Offset(period=1, micro_batches=micro_batches, lam="auto"), loss=loss)
        for seed in range(4):
            step(*data(seed))
        records.append(step.diagnostics.refreshes[-1]["blocks"])
    for mean, total in zip(*records, strict=True):
        assert total["lam"] == pytest.approx(mean["lam"])
        for norm in ("bp", "local", "norm"):
            assert total[norm] == pytest.approx(32 * mean[norm]), norm


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 8},
        {"micro_batches": 4},
        {"batch": 64, "data": [data(7), data(8)]},
        {"batch": 8, "dtype": "int8"},
    ],
    ids=str,
)
def test_a_refresh_among_exact_steps_is_one(options: dict[str, Any]) -> None:
    step = converted(bpfx.Offset(**options))
    for seed in range(6):
        batch = data(seed)
        expected = torch.autograd.grad(F.cross_entropy(step.model(batch[0]), batch[1]), list(step.model.parameters()))
        step.zero_grad()
        step(*batch).backward()
        torch.testing.assert_close([p.grad for p in step.model.parameters()], list(expected), rtol=1e-9, atol=1e-12)
    assert [r["iteration"] for r in step.diagnostics.refreshes] == [0, 4]


def test_a_trainers_refresh_among_exact_steps_is_one() -> None:
    """Its refresh draws other masks than its step: the step is the one that exact BP makes of the same pieces."""
    found = []
    for mode in ("local", "bp"):
        step = converted(bpfx.Offset(), dropout=0.3)
        with torch.no_grad():  # local gradients that are far from BP's
            for parameter in step.heads.parameters():
                parameter.normal_()
        trainer = bpfx.BlockTrainer(step, functools.partial(torch.optim.SGD, lr=0.1), micro_batches=4, mode=mode)
        torch.manual_seed(5)
        for seed in range(5):
            trainer.step(*data(seed))
        found.append(copy.deepcopy(step.model.state_dict()))
    torch.testing.assert_close(found[0], found[1])


def test_a_clipped_tied_weight_is_corrected_alike_in_both_loops() -> None:
    found, clip = [], 0.5
    for loop in ("drop-in", "trainer"):
        torch.manual_seed(0)
        model, batch = Tied().double(), data(0)
        offset = bpfx.Offset(period=1, clip=clip)
        step = bpfx.convert(model, F.cross_entropy, batch, blocks=["b", "c", "out"], offset=offset)
        before = copy.deepcopy(model.state_dict())
        if loop == "drop-in":
            local = step.run_local(*batch).grads["a.weight"].clone()
            step(*batch).backward()
            found.append({n: p.grad for n, p in model.named_parameters()})
        else:
            bpfx.BlockTrainer(step, sgd).step(*batch)
            found.append({n: before[n] - p.detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1])
    added = (found[0]["a.weight"] - local).norm()
    assert added == pytest.approx(clip * float(local.norm()))


def test_a_state_may_be_loaded_after_a_parameter_was_frozen() -> None:
    step = converted(bpfx.Offset(period=4))
    step(*data(0)).backward()
    saved = copy.deepcopy(step.state_dict())
    step.model[0].weight.requires_grad_(False)
    again = bpfx.convert(step.model, F.cross_entropy, data(0), blocks=["3", "5"], offset=bpfx.Offset(period=4))
    again.load_state_dict(saved)
    assert set(saved["_extra_state"]["offset"]) - set(again.offset_state) == {"0.weight"}
    again.zero_grad()
    for seed in range(1, 6):
        again(*data(seed)).backward()
    assert again.model[0].weight.grad is None and again.model[0].bias.grad is not None
