"""What a trainer is given wrongly it refuses in a sentence: what was wrong, with which value, and what would work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import run
from torch import Tensor, nn
from twins import adamw, case_of, convert, fresh, sgd, snapshot

import bpfx


def refused(words: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """One class of error, short, without the inside of the library, and with these words."""
    with pytest.raises(bpfx.BpfxError, match=f"(?s){words}") as refusal:
        call(*args, **kwargs)
    text = str(refusal.value)
    assert refusal.value.__cause__ is None
    assert len(text) < 400 and "\n" not in text and not text.endswith(".")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"micro_batches": 0}, r"micro_batches=0.*at least 1"),
        ({"micro_batches": -2}, r"micro_batches=-2"),
        ({"micro_batches": 2.5}, r"micro_batches=2\.5.*whole number"),
        ({"micro_batches": True}, r"micro_batches=True"),
        ({"micro_batches": "4"}, r"micro_batches='4'"),
        ({"clip_norm": -1}, r"clip_norm=-1.*above 0.*None"),
        ({"clip_norm": 0}, r"clip_norm=0"),
        ({"clip_norm": True}, r"clip_norm=True"),
        ({"clip_norm": float("nan")}, r"clip_norm=nan"),
        ({"clip_norm": "1"}, r"clip_norm='1'"),
        ({"clip": "x"}, r"clip='x'.*'block' or 'global'"),
        ({"mode": "x"}, r"mode='x'.*'local' or 'bp'"),
        ({"mode": "BP"}, r"mode='BP'.*'bp'"),
        ({"reduction": "average"}, r"reduction='average'.*'mean'.*'sum'"),
        ({"state_device": "gpu"}, r"state_device='gpu'.*device"),
        ({"parameter_device": 1.5}, r"parameter_device=1\.5"),
        ({"boundary_device": "nowhere"}, r"boundary_device='nowhere'"),
        ({"lr_scheduler": lambda optimizer: None}, r"lr_scheduler.*NoneType.*step"),
        ({"lr_scheduler": lambda optimizer: 0.1}, r"lr_scheduler.*float.*step"),
        ({"lr_scheduler": 0.1}, r"lr_scheduler=float.*function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    refused(words, bpfx.BlockTrainer, fresh("mlp"), adamw, **options)


@pytest.mark.parametrize("step", [nn.Linear(2, 2), None, "step"], ids=lambda s: type(s).__name__)
def test_not_a_step(step: Any) -> None:
    refused(rf"bpfx\.convert.*{type(step).__name__}", bpfx.BlockTrainer, step, adamw)


OTHER = nn.Parameter(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda pairs: None, r"factory returned a NoneType.*functools\.partial"),
        (lambda pairs: [p for _, p in pairs], r"factory returned a list"),
        (torch.optim.SGD([OTHER], lr=0.1), r"got SGD.*function.*functools\.partial"),
        (lambda pairs: torch.optim.SGD([OTHER], lr=0.1), r"left out '0\.0\.weight' and 3 more.*requires_grad"),
        (lambda pairs: torch.optim.SGD(pairs[1:], lr=0.1), r"left out '0\.0\.weight';"),
        (lambda pairs: torch.optim.SGD([p for _, p in pairs] + [OTHER], lr=0.1), r"other parameters.*\(3, 5\)"),
        (partial(torch.optim.LBFGS, lr=0.1), r"LBFGS.*block by block.*closure"),
    ],
    ids=["None", "list", "an optimizer", "foreign", "left out", "foreign too", "LBFGS"],
)
def test_factories_that_make_no_blocks_optimizer(factory: Any, words: str) -> None:
    refused(words, bpfx.BlockTrainer, fresh("mlp"), factory)


def test_an_error_inside_the_factory_is_the_callers_own() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        bpfx.BlockTrainer(fresh("mlp"), partial(torch.optim.SGD, lr=-1.0))


# --- losses -----------------------------------------------------------------------------------------------------------


def contrastive(output: Tensor, y: Tensor) -> Tensor:
    """Every sample against every other: what it is for a part of the batch says nothing about the whole."""
    near = F.normalize(output, dim=1)
    return F.cross_entropy(near @ near.T / 0.1, torch.arange(output.shape[0])) + 0 * y.sum()


def contrasted() -> bpfx.Step:
    case = case_of("mlp", 8)
    case.loss_fn = contrastive
    return convert(case, list(zoo.MLP_CUTS))


def test_a_loss_between_samples_has_no_micro_batches() -> None:
    step = contrasted()
    refused(r"loss.*micro.batch.*reduction='mean'", bpfx.BlockTrainer, step, sgd, micro_batches=2)
    refused(r"loss.*micro.batch.*reduction='mean'", bpfx.BlockTrainer, step, sgd, micro_batches=2, mode="bp")


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2, "reduction": "mean"}], ids=["whole", "told"])
@pytest.mark.parametrize("offset", [None, "every second"])
def test_a_loss_between_samples_trains_whole_or_as_told(options: dict[str, Any], offset: Any) -> None:
    step = contrasted()
    step = bpfx.Step(step._compiler, bpfx.Offset(period=2) if offset else None)
    trainer = bpfx.BlockTrainer(step, sgd, **options)
    for _ in range(3):
        assert trainer.step(*case_of("mlp", 8).batch).isfinite()


# --- while it runs ----------------------------------------------------------------------------------------------------


def test_eval_mode() -> None:
    step = fresh("mlp")
    trainer = bpfx.BlockTrainer(step, sgd)
    step.eval()
    refused(r"eval mode.*step\.train\(\)", trainer.step, *case_of("mlp").batch)
    step.train()
    trainer.step(*case_of("mlp").batch)


def test_batches_that_are_built_otherwise() -> None:
    x, y = case_of("mlp").batch
    trainer = bpfx.BlockTrainer(fresh("mlp"), sgd)
    before = snapshot(trainer.converted)
    refused(r"float64.*float32", trainer.step, x.double(), y)
    refused(r"example.*tensor", trainer.step, x)
    refused(r"dimensions", trainer.step, x[0], y)
    refused(r"no samples", trainer.step, x[:0], y[:0])
    assert trainer.broken is None
    assert all(torch.equal(v, before[n]) for n, v in trainer.converted.state_dict().items() if n in dict_of(before))


def dict_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {n: v for n, v in state.items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("mode", ["local", "bp"])
def test_a_parameter_that_is_frozen_after_the_conversion(mode: str) -> None:
    case = case_of("mlp")
    step = convert(case, list(zoo.MLP_CUTS))
    trainer = bpfx.BlockTrainer(step, sgd, mode=mode)
    case.model.get_submodule("1").requires_grad_(False)
    refused(r"requires_grad.*1\.0.*convert", trainer.step, *case.batch)


# --- states -----------------------------------------------------------------------------------------------------------


def states() -> dict[str, tuple[dict[str, Any], str]]:
    made = {mode: bpfx.BlockTrainer(fresh("mlp"), adamw, mode=mode) for mode in ("local", "bp")}
    for trainer in made.values():
        run(trainer.step, case_of("mlp").batch)
    own = {mode: copy.deepcopy(trainer.state_dict()) for mode, trainer in made.items()}
    fewer = convert(case_of("mlp"), ["2"])
    scheduled = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3)
    return {
        "other mode": (own["bp"], r"mode='bp'.*'local'"),
        "other blocks": (bpfx.BlockTrainer(fewer, adamw).state_dict(), r"2 blocks.*3.*same blocks"),
        "scheduler": (
            bpfx.BlockTrainer(fresh("mlp"), adamw, lr_scheduler=scheduled).state_dict(),
            r"schedulers.*\[0, 1, 2\].*same arguments",
        ),
        "the step's": (snapshot(made["local"].converted), r"no state of a BlockTrainer.*state_dict"),
    }


@pytest.mark.parametrize("which", ["other mode", "other blocks", "scheduler", "the step's"])
def test_states_of_another_trainer(which: str) -> None:
    """Refused before anything is loaded."""
    state, words = states()[which]
    trainer = bpfx.BlockTrainer(fresh("mlp"), adamw)
    with torch.no_grad():
        for parameter in trainer.converted.parameters():
            parameter.add_(1.0)
    before = snapshot(trainer.converted)
    refused(words, trainer.load_state_dict, state)
    after = trainer.converted.state_dict()
    assert all(torch.equal(after[n], v) for n, v in dict_of(before).items())
