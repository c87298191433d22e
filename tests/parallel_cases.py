"""What two processes are compared by: models, batches, the same on one process, and what is equal."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bpfx

Batch = tuple[Tensor, Tensor]
CASES: dict[str, Callable[[], None]] = {}
adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ROOT, RANK = Path(__file__).parent.parent, int(os.environ.get("RANK", "0"))
TOLERANCE = 1e-9  # of a tensor's norm, in double


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


# --- models and batches -----------------------------------------------------------------------------------------------


def mlp(norm: bool = False) -> nn.Sequential:
    between = (lambda: nn.BatchNorm1d(6)) if norm else nn.Identity
    layers = [nn.Sequential(nn.Linear(6, 6), between(), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


class Partly(nn.Module):
    """Computes its own loss, and has a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).tanh()
        logits = self.last(self.second(hidden).tanh() + self.aside(x))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def masked(output: Tensor, target: Tensor) -> Tensor:
    """A mean over the labels that count, whose number is clamped."""
    counted = (target >= 0).to(output.dtype)
    losses = F.cross_entropy(output, target.clamp(min=0), reduction="none")
    return (losses * counted).sum() / counted.sum().clamp(min=1)


LOSSES: dict[str, Any] = {
    "mean": F.cross_entropy,
    "sum": partial(F.cross_entropy, reduction="sum"),
    "masked": masked,
    "inside": None,
}


def batches(count: int, size: int = 8, seed: int = 2, ignored: bool = False) -> list[Batch]:
    made = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=made, dtype=torch.float64)
    found = [(draw(size, 6), torch.randint(0, 3, (size,), generator=made)) for _ in range(count)]
    if ignored:  # more and more, until the first half has no label at all
        for i, (_, y) in enumerate(found):
            y[: min(1 + i, size // 2)] = -100
    return found


def mine(batch: Batch, first: int | None = None) -> Batch:
    """This process's samples: the first half for rank 0, or so many."""
    at = len(batch[0]) // 2 if first is None else first
    x, y = batch
    return (x[:at], y[:at]) if dist.get_rank() == 0 else (x[at:], y[at:])


@cache
def _converted(who: str, model: str, loss: str, horizon: int) -> tuple[bpfx.Step, dict[str, Any]]:
    # The processes draw other weights, and end up with rank 0's.
    torch.manual_seed(1 if who == "alone" else 1 + dist.get_rank())
    made = {"mlp": mlp, "norm": partial(mlp, True), "partly": Partly}[model]()
    x, y = batches(1, ignored=loss == "masked")[0]
    batch = {"x": x, "labels": y} if model == "partly" else (x, y)
    blocks = ["second", "last"] if model == "partly" else ["1", "2", "3"]
    step = bpfx.convert(made, LOSSES[loss], batch, blocks=blocks, horizon=horizon)
    return step, copy.deepcopy(dict(step.state_dict()))


def fresh(who: str, offset: Any = None, model: str = "mlp", loss: str = "mean", horizon: int = 1) -> Any:
    """A step at the start. Conversion takes the time, so all steps of one kind share one, and its weights."""
    first, state = _converted(who, model, loss, horizon)
    step = bpfx.Step(first._compiler, offset)
    step.load_state_dict(state)
    step.zero_grad()
    return step


alone, together = partial(fresh, "alone"), partial(fresh, "together")


# --- what is equal ----------------------------------------------------------------------------------------------------


def same(name: str, found: Any, expected: Any, rtol: float = TOLERANCE) -> None:
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    error, norm = float((found - expected).norm()), float(expected.norm())
    assert error <= rtol * norm + 1e-12, f"{name}: off by {error:.3g} of {norm:.3g}"


def close(found: Any, expected: Any, rtol: float = TOLERANCE) -> None:
    """Parameters, heads, offsets, and when they were measured."""
    given, wanted = dict(found.named_parameters()), dict(expected.named_parameters())
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        same(name, given[name].detach(), value.detach(), rtol)
    assert found.offset_state.keys() == expected.offset_state.keys(), "offsets of other parameters"
    for name, value in expected.offset_state.items():
        same(f"offset of {name}", found.offset_state[name], value, rtol)
    times = [[r["iteration"] for r in s.diagnostics.refreshes] for s in (found, expected)]
    assert times[0] == times[1], f"refreshes at {times}"
    everywhere(found)


def everywhere(step: nn.Module) -> None:
    """The same bits on both ranks."""
    own = torch.cat([t.detach().double().flatten() for t in (*step.parameters(), *step.buffers())])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    assert torch.equal(*others), "the ranks differ"


def mean(values: Any) -> Tensor:
    total = torch.as_tensor(values, dtype=torch.float64).clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def refused(words: str, call: Callable[[], Any]) -> None:
    """On both ranks, in these words."""
    try:
        call()
    except bpfx.BpfxError as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"not refused: {words}")


# --- offsets --------------------------------------------------------------------------------------------------------

OFFSETS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "fixed": lambda: bpfx.Offset(period=3),
    "exact": lambda: bpfx.Offset(),
    "auto": lambda: bpfx.Offset(bounds=(4, 8), form="B", alpha="auto"),
    "clip": lambda: bpfx.Offset(period=3, clip=0.2, decay=0.9),
    "pieces": lambda: bpfx.Offset(period=2, micro_batches=2, lam="auto"),
    "bf16": lambda: bpfx.Offset(period=2, dtype=torch.bfloat16),
}
