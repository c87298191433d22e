"""Cases of BlockTrainer on two processes, see parallel_worker.py."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import (
    CASES,
    OFFSETS,
    adamw,
    alone,
    batches,
    case,
    close,
    everywhere,
    mine,
    refused,
    same,
    together,
)
from torch import Tensor, nn

import bpfx
from bpfx import _parallel

# --- BlockTrainer -----------------------------------------------------------------------------------------------------


def trainer_is_one_process(
    name: str,
    mode: str = "local",
    first: int | None = None,
    micro: int = 1,
    model: str = "mlp",
    loss: str = "mean",
    **options: Any,
) -> None:
    given = [*batches(4, ignored=loss == "masked"), *batches(1, 5, 7), *batches(2, 8, 9)]
    as_given = lambda b: {"x": b[0], "labels": b[1]} if model == "partly" else b  # noqa: E731

    def run(trainer: bpfx.BlockTrainer, batch: Any) -> Tensor:
        return trainer.step(**batch) if isinstance(batch, dict) else trainer.step(*batch)

    made = partial(bpfx.BlockTrainer, optimizer=adamw, mode=mode, micro_batches=micro, **options)
    single, step = (make(OFFSETS[name](), model, loss) for make in (alone, together))
    one, trainer = made(single, data_parallel=False), made(step, data_parallel=True)
    for i, b in enumerate(given):
        expected = run(one, as_given(b))
        found = run(trainer, as_given(mine(b, first)))
        same(f"loss {i}", found, expected, 1e-7)
        assert trainer.local_losses.keys() == one.local_losses.keys()
        same(f"local losses {i}", list(trainer.local_losses.values()), list(one.local_losses.values()), 1e-7)
        assert trainer.grad_norms.keys() == one.grad_norms.keys()
        same(f"norms {i}", list(trainer.grad_norms.values()), list(one.grad_norms.values()), 1e-7)
    close(step, single, 1e-7)


for _name in ("none", "fixed", "exact", "auto", "clip"):
    CASES[f"trainer_{_name}"] = partial(trainer_is_one_process, _name)
_trainer_cases: dict[str, dict[str, Any]] = {
    "bp": {"name": "none", "mode": "bp"},
    "clip_norm": {"name": "fixed", "clip_norm": 0.1},
    "clip_norm_global": {"name": "fixed", "clip_norm": 0.1, "clip": "global"},
    "uneven": {"name": "exact", "first": 3},
    "uneven_refreshes": {"name": "fixed", "first": 1},
    "uneven_micro_batches": {"name": "none", "first": 3, "micro": 2},
    "rank_without_samples": {"name": "fixed", "first": 0},
    "rank_without_samples_exact": {"name": "exact", "first": 0},
    "rank_without_samples_bp": {"name": "none", "mode": "bp", "first": 0},
    "sum": {"name": "fixed", "loss": "sum", "first": 3},
    "labels_that_count": {"name": "fixed", "loss": "masked"},
    "labels_that_count_exact": {"name": "exact", "loss": "masked", "first": 2},
    "own_loss_partly_seen": {"name": "fixed", "model": "partly", "loss": "inside", "first": 3},
    "own_loss_partly_seen_exact": {"name": "exact", "model": "partly", "loss": "inside"},
    "parked_on_the_cpu": {
        **{"name": "fixed", "state_device": "cpu", "parameter_device": "cpu", "boundary_device": "cpu"}
    },
}
for _name, _options in _trainer_cases.items():
    CASES[f"trainer_{_name}"] = partial(trainer_is_one_process, **_options)


@case
def trainer_sums_a_block_while_the_next_one_runs() -> None:
    """One all-reduce for each block, begun before the next block's program and waited for after it."""
    told: list[str] = []

    class Heard(_parallel.Pending):
        def __init__(self, group: Any, layout: Any, grads: Any, factor: float = 1.0) -> None:
            told.append(f"begin {layout[0][0]}")
            self.name = layout[0][0]
            super().__init__(group, layout, grads, factor)

        def wait(self) -> Any:
            told.append(f"wait {self.name}")
            return super().wait()

    step = together(None)
    trainer = bpfx.BlockTrainer(step, adamw, data_parallel=True)
    for stage in step._compiler.main.stages:
        own = stage.local.forward
        stage.local.forward = lambda *a, own=own, k=stage.index: (told.append(f"run {k}"), own(*a))[1]
    plain, _parallel.Pending = _parallel.Pending, Heard  # type: ignore[misc]
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, **o: (calls.append(t.nbytes), all_reduce(t, **o))[1]
    try:
        trainer.step(*mine(batches(1)[0]))
    finally:
        _parallel.Pending, dist.all_reduce = plain, all_reduce  # type: ignore[misc]
        for stage in step._compiler.main.stages:
            del stage.local.forward
    blocks = [f"{k}.0.weight" for k in range(3)] + ["3.weight"]
    order = ["run 0", f"begin {blocks[0]}"]
    for k in range(1, 4):
        order += [f"run {k}", f"begin {blocks[k]}", f"wait {blocks[k - 1]}"]
    assert told == [*order, f"wait {blocks[3]}"], told
    trained = sum(p.nbytes for p in step.parameters())
    names = sum(1 for _ in step.parameters())
    # Every gradient once, one number for each that says whether it is there, and the losses.
    assert len(calls) == 4 + 1 and sum(calls) == trained + 8 * names + 8 * (1 + 4), (calls, trained, names)


@case
def trainer_keeps_one_set_of_running_statistics() -> None:
    step = together(bpfx.Offset(period=2), "norm")
    trainer = bpfx.BlockTrainer(step, adamw, data_parallel=True)
    for b in batches(3):
        trainer.step(*mine(b))
    everywhere(step)


@case
def trainer_resumes_from_rank_zero() -> None:
    given = [mine(b) for b in batches(8)]
    made = partial(bpfx.BlockTrainer, optimizer=adamw, data_parallel=True)
    through = made(together(bpfx.Offset()))
    for b in given:
        through.step(*b)
    expected = copy.deepcopy(dict(through.converted.state_dict()))
    trainer = made(together(bpfx.Offset()))
    for b in given[:5]:
        trainer.step(*b)
    saved = [copy.deepcopy(trainer.state_dict())]
    dist.broadcast_object_list(saved, 0)
    trainer = made(together(bpfx.Offset()))
    trainer.load_state_dict(saved[0])
    for b in given[5:]:
        trainer.step(*b)
    for name, value in trainer.converted.state_dict().items():
        assert name == "_extra_state" or torch.equal(value, expected[name]), name


@case
def trainer_in_a_group_of_its_own() -> None:
    """A group of one process is one process; the same run in a group that was made for it."""
    groups = [dist.new_group([r]) for r in range(2)]
    pair = dist.new_group([0, 1])
    step = alone(None)
    assert bpfx.BlockTrainer(step, adamw, data_parallel=groups[dist.get_rank()])._ranks is None
    step = together(None)
    trainer = bpfx.BlockTrainer(step, adamw, data_parallel=pair)
    trainer.step(*mine(batches(1)[0]))
    everywhere(step)
    other = groups[1 - dist.get_rank()]
    if other is not dist.GroupMember.NON_GROUP_MEMBER:
        refused("this process is not in the group", lambda: bpfx.BlockTrainer(step, adamw, data_parallel=other))


@case
def trainer_refuses_what_it_cannot_do() -> None:
    made = partial(bpfx.BlockTrainer, optimizer=adamw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made(together(None))
        assert any("trains alone in its own" in str(w.message) for w in caught)
        caught.clear()
        made(together(None), data_parallel=False)
        assert not caught
    refused("pass True, False, or a process group", lambda: made(together(None), data_parallel=2))
    clip = 1.0 + dist.get_rank()
    refused("the trainer settings of rank 1", lambda: made(together(None), data_parallel=True, clip_norm=clip))
    step = together(None)
    step.model.add_module("normed", nn.SyncBatchNorm(3))
    try:
        refused("normed is a SyncBatchNorm", lambda: made(step, data_parallel=True))
    finally:
        del step.model.normed
    trainer = made(together(bpfx.Offset()), data_parallel=True)
    x, y = batches(1)[0]
    refused("no samples on any rank", lambda: trainer.step(x[:0], y[:0]))
    trainer.converted.iteration = dist.get_rank()
    refused("rank 0 is at iteration 0 and rank 1 at 1", lambda: trainer.step(x, y))
    assert trainer.broken is None
    trainer.converted.iteration = 0
    trainer.step(*mine((x, y)))
    everywhere(trainer.converted)
