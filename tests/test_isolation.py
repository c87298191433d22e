"""No gradient of a block's local loss reaches another block: measured by bpfx.audit, and without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from oracles import assert_same_bits, run
from zoo import Case

import bpfx

MODELS = [
    "resnet18",
    "timm_vit",
    "gpt2",
    "llama_lora",
    "t5",
    "unet",
    "vit_attention_lora",
    "checkpoint_reentrant",
    "lstm",
]


def convert(case: Case, blocks: Any, **options: Any) -> Any:
    options.setdefault("offset", None)
    return bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, compile="eager", **options)


def trainable(step: Any, k: int) -> set[str]:
    wanted = {name for name, parameter in step.model.named_parameters() if parameter.requires_grad}
    return wanted & set(step.plan.blocks[k].parameter_names)


# --- the audit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_audit_finds_no_leak(name: str) -> None:
    entry = zoo.ZOO[name]
    step = convert(entry.case(), list(entry.cuts))
    audit = bpfx.audit(step)
    assert audit.ok
    assert not audit.leaks
    assert set(audit.reaches) == set(range(entry.blocks()))
    for k, reached in audit.reaches.items():
        of_model = {name for name in reached if not name.startswith("bpfx.heads.")}
        assert of_model <= trainable(step, k)
        assert of_model or not trainable(step, k), "an audit that reaches nothing proves nothing"


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "unet", "branch_inside"])
def test_audit_reports_an_uncut_graph(name: str) -> None:
    """The negative control: without the cuts every loss leaks into every block before it."""
    entry = zoo.ZOO[name]
    step = convert(entry.case(), list(entry.cuts))
    audit = bpfx.audit(step, cut=False)
    assert not audit.ok
    reached = {k: {parameter for loss, parameter in audit.leaks if loss == k} for k in range(entry.blocks())}
    assert not reached[0]  # nothing lies before the first block
    for k in range(1, entry.blocks()):
        for earlier in range(k):
            own = trainable(step, earlier)
            assert not own or own & reached[k], f"loss {k} must be seen to leak into block {earlier}"


def test_audit_is_a_table_that_names_blocks_and_leaks() -> None:
    case = zoo.convnet()
    step = convert(case, list(zoo.CONVNET_CUTS))
    clean, leaking = str(bpfx.audit(step)), str(bpfx.audit(step, cut=False))
    for block in step.plan.blocks:
        assert block.name in clean
    assert "0.conv.weight" in leaking or "leak" in leaking.lower()
    assert clean != leaking
    assert len(clean.splitlines()) >= len(step.plan.blocks)


def test_audit_changes_nothing() -> None:
    case = zoo.convnet()
    step = convert(case, list(zoo.CONVNET_CUTS), offset=bpfx.Offset(period=2, alpha=1.0, lam=1.0))
    run(step, case.batch).backward()
    before = copy.deepcopy([step.model.state_dict(), step.state_dict(), [p.grad for p in step.parameters()]])
    state = torch.get_rng_state()
    bpfx.audit(step)
    bpfx.audit(step, cut=False)
    assert torch.equal(torch.get_rng_state(), state)
    after = [step.model.state_dict(), step.state_dict(), [p.grad for p in step.parameters()]]
    assert_same_bits(after, before)


@pytest.mark.parametrize("horizon", [2, 3])
def test_horizon_reaches_so_far_and_no_further(horizon: int) -> None:
    entry = zoo.ZOO["resnet18"]
    step = convert(entry.case(), list(entry.cuts), horizon=horizon)
    audit = bpfx.audit(step)
    assert audit.ok
    for k, reached in audit.reaches.items():
        allowed = set().union(*(trainable(step, j) for j in range(max(0, k - horizon + 1), k + 1)))
        of_model = {name for name in reached if not name.startswith("bpfx.heads.")}
        assert of_model <= allowed
    last = len(step.plan.blocks) - 1
    assert audit.reaches[last] & trainable(step, last - 1), "the last loss looks back over the horizon"


# --- the same, seen from outside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "timm_vit", "gpt2", "unet", "branch_inside", "lstm", "t5"])
def test_another_head_moves_the_gradients_of_its_block_only(name: str) -> None:
    """A loss reaches a parameter exactly if changing the loss can change its gradient: no audit needed."""
    entry = zoo.ZOO[name]
    case = entry.case()
    step = convert(case, list(entry.cuts))
    plain = run(step.run_local, case.batch).grads
    for k in range(len(entry.cuts)):
        saved = copy.deepcopy(step.heads[k].state_dict())
        with torch.no_grad():
            for parameter in step.heads[k].parameters():
                parameter.add_(torch.randn_like(parameter))
        moved = run(step.run_local, case.batch).grads
        step.heads[k].load_state_dict(saved)
        changed = {name for name, grad in moved.items() if not torch.equal(grad, plain[name])}
        allowed = trainable(step, k) | {name for name in moved if name.startswith(f"bpfx.heads.{k}.")}
        assert changed <= allowed
        assert changed & trainable(step, k)


def test_heads_share_no_parameter() -> None:
    """With each other or with the model: a shared one would carry a loss into another block."""
    case = zoo.ZOO["gpt2"].case()
    step = convert(case, list(zoo.ZOO["gpt2"].cuts))
    owners = [step.model, *(step.heads[k] for k in range(len(step.plan.blocks) - 1))]
    found = [id(parameter) for owner in owners for parameter in owner.parameters()]
    assert len(found) == len(set(found))
