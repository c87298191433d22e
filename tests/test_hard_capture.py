"""What tracers get wrong, loudly or silently: every hard case converts, and computes what plain PyTorch does."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import zoo
import zoo_hard
from oracles import (
    assert_gradients,
    assert_same_bits,
    bp_oracle,
    buffers,
    call,
    check_bp,
    check_is_a_test,
    check_local,
    check_owners,
    drop_in,
    gradient_errors,
    run,
    seed_all,
)
from torch import nn
from zoo import Case, Entry

import bpfx


def convert(case: Case, entry: Entry, **options: Any) -> Any:
    blocks = list(entry.cuts) or "auto"
    return bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, offset=None, compile="eager", **options)


@pytest.mark.filterwarnings("ignore::bpfx.BpfxWarning")
@pytest.mark.parametrize("name", zoo.names(hard=True))
def test_hard_case(name: str, subtests: Any) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    values = {key: value.clone() for key, value in case.model.state_dict().items()}
    flags = {key: module.training for key, module in case.model.named_modules()}
    step = convert(case, entry)
    with subtests.test("conversion leaves values and training flags alone"):
        assert_same_bits(case.model.state_dict(), values)
        assert {key: module.training for key, module in case.model.named_modules()} == flags
    with subtests.test("the named modules begin the blocks"):
        assert len(step.plan.blocks) == entry.blocks() or not entry.cuts
    with subtests.test("every parameter belongs to one block"):
        check_owners(step.plan, entry, case.model)
    for seed in range(6 if "random_depth" in entry.tags else 1):
        with subtests.test("BP step", seed=seed):
            expected = check_bp(step, case, seed)
            if seed == 0:  # others may leave out most of a model of random depth
                check_is_a_test(entry, case, expected)
        if entry.cuts:
            with subtests.test("local step", seed=seed):
                check_local(step, case, entry.cuts, seed)
    with subtests.test("another batch size"):
        other = entry.case(entry.size + 1)
        other.model = step.model
        check_bp(step, other)


@pytest.mark.filterwarnings("ignore::bpfx.BpfxWarning")
@pytest.mark.parametrize(
    "name", ["custom_function", "branch_inside", "branch_at_root", "torch_depth", "python_depth", "lstm"]
)
def test_automatic_cuts(name: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    step = bpfx.convert(case.model, case.loss_fn, case.batch, offset=None, compile="eager")
    for seed in range(3):
        check_bp(step, case, seed)


# --- the cases can catch what they are there for ---------------------------------------------------------------------


def test_custom_backward_differs_from_the_traced_one() -> None:
    """Traced through, sign has gradient zero: the comparison must see that."""
    case = zoo.ZOO["custom_function"].case()
    expected = bp_oracle(case)
    traced = copy.deepcopy(case)
    traced.model.blocks[1].forward = lambda x: x + traced.model.blocks[1].linear(x).sign()
    seed_all()
    call(traced.model, traced.batch, traced.loss_fn).backward()
    found = {name: p.grad for name, p in traced.model.named_parameters() if p.grad is not None}
    assert any(line.startswith("blocks.1.linear.weight") for line in gradient_errors(found, expected.grads))


@pytest.mark.parametrize("name", ["python_depth", "torch_depth"])
def test_random_depth_varies_over_the_seeds_used(name: str) -> None:
    case = zoo.ZOO[name].case()
    skipped = {
        frozenset(p for p, _ in case.model.named_parameters() if p not in bp_oracle(case, s).grads) for s in range(6)
    }
    assert len(skipped) >= 3


# --- branches that another batch takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["branch_inside", "branch_at_root"])
def test_both_sides_of_a_branch(name: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    step = convert(case, entry)
    sides = set()
    for shift in (-2.0, 2.0, -2.0):
        x, y = entry.case().batch
        # the branch reads the mean over all features, which a shift of one of them moves
        x = x + shift * torch.eye(zoo_hard.WIDTH, dtype=x.dtype)[0] * zoo_hard.WIDTH
        case.batch = (x, y)
        sides.add(_side(case))
        check_bp(step, case)
        if entry.cuts:
            check_local(step, case, entry.cuts)
    assert sides == {True, False}


def _side(case: Case) -> bool:
    model = copy.deepcopy(case.model)
    seed_all()
    with torch.no_grad():
        return bool(model.blocks[0](case.batch[0]).mean() > 0)


# --- the plan says what happened -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::bpfx.BpfxWarning")
@pytest.mark.parametrize(("name", "where"), [("branch_inside", "blocks.1"), ("vit_attention_lora", "self_attention")])
def test_plan_names_the_opaque_module_and_the_reason(name: str, where: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    step = convert(case, entry)
    opaque = [k for k, block in enumerate(step.plan.blocks) if block.opaque]
    assert opaque
    if name == "branch_inside":
        assert opaque == [1], "only the block with the branch needs to run as itself"
    capture = step.plan.capture if isinstance(step.plan.capture, str) else "\n".join(map(str, step.plan.capture))
    assert where in capture
    assert where in str(step.plan)


def test_plan_of_a_traceable_model_has_nothing_opaque() -> None:
    case = zoo.convnet()
    step = bpfx.convert(
        case.model, case.loss_fn, case.batch, blocks=list(zoo.CONVNET_CUTS), offset=None, compile="eager"
    )
    assert not any(block.opaque for block in step.plan.blocks)


# --- PEFT ------------------------------------------------------------------------------------------------------------


def test_adapters_that_plain_bp_does_not_reach_are_named() -> None:
    """attention reads out_proj's weight and never calls it: an adapter there trains nobody."""
    entry = zoo.ZOO["vit_out_proj_lora"]
    case = entry.case()
    with pytest.warns(bpfx.BpfxWarning, match=r"no gradient.*out_proj|out_proj.*no gradient"):
        convert(case, entry)


def test_unused_parameters_are_named() -> None:
    entry = zoo.ZOO["unused_parameter"]
    case = entry.case()
    with pytest.warns(bpfx.BpfxWarning, match=r"unused\.weight"):
        convert(case, entry)


def test_a_model_that_trains_everything_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    case = zoo.convnet()
    bpfx.convert(case.model, case.loss_fn, case.batch, offset=None, compile="eager")
    assert not [str(w.message) for w in recwarn if issubclass(w.category, bpfx.BpfxWarning)]


def test_peft_trains_adapters_only() -> None:
    entry = zoo.ZOO["llama_lokr"]
    case = entry.case()
    step = convert(case, entry)
    frozen = {name for name, parameter in case.model.named_parameters() if not parameter.requires_grad}
    found = drop_in(step, case.batch)
    assert frozen
    assert not frozen & found.grads.keys()


def test_peft_adapter_can_be_disabled_and_merged_after_training() -> None:
    entry = zoo.ZOO["llama_lora"]
    case = entry.case()
    step = convert(case, entry)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    drop_in(step, case.batch)
    optimizer.step()
    case.model.eval()
    with torch.no_grad():
        adapted = case.model(**case.batch).logits
        with case.model.disable_adapter():
            plain = case.model(**case.batch).logits
        merged = case.model.merge_and_unload()(**case.batch).logits
    assert not torch.allclose(adapted, plain)
    torch.testing.assert_close(merged, adapted)


# --- state that a module keeps for itself ----------------------------------------------------------------------------


def test_cumulative_batchnorm_counts_every_step_once() -> None:
    entry = zoo.ZOO["batchnorm_average"]
    case = entry.case()
    step = convert(case, entry)
    counter = case.model.blocks[0].norm
    assert counter.num_batches_tracked == 0, "conversion must not count"
    for steps in range(1, 4):
        expected = bp_oracle(case, seed=steps)
        run(step.run_local if steps % 2 else step.run_bp, case.batch, seed=steps)
        assert counter.num_batches_tracked == steps
        torch.testing.assert_close(buffers(case.model), expected.buffers)


def test_python_random_state_moves_as_in_a_plain_step() -> None:
    entry = zoo.ZOO["python_depth"]
    case = entry.case()
    step = convert(case, entry)
    for method in (step.run_bp, step.run_local):
        seed_all()
        call(copy.deepcopy(case.model), case.batch, case.loss_fn)
        expected = random.random()
        run(method, case.batch)
        assert random.random() == expected


class _Spread(torch.autograd.Function):
    """Identity forward; backward doubles the gradient: exact in the loss, wrong only in the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


class _SpreadAtRoot(zoo_hard.Stack):
    def __init__(self) -> None:
        super().__init__(zoo_hard.Residual(), zoo_hard.Residual())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(_Spread.apply(self.blocks(x)))


def test_custom_function_in_the_root_forward() -> None:
    case = zoo.outside(_SpreadAtRoot().double(), torch.randn(4, zoo_hard.WIDTH).double(), torch.tensor([0, 1, 2, 3]))
    step = bpfx.convert(case.model, case.loss_fn, case.batch, offset=None, compile="eager")
    check_bp(step, case)


def test_custom_function_in_the_loss() -> None:
    case = zoo.convnet(dtype=torch.float64)
    case.loss_fn = lambda output, y: nn.functional.cross_entropy(_Spread.apply(output), y)
    case.task_loss = lambda prediction, batch: case.loss_fn(prediction, batch[1])
    blocks = list(zoo.CONVNET_CUTS)
    step = bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, offset=None, compile="eager")
    check_bp(step, case)
    check_local(step, case, zoo.CONVNET_CUTS)


def test_checkpoint_inside_draws_the_same_mask_twice() -> None:
    """Both kinds of checkpoint see the dropout of the plain model without any checkpoint."""
    plain = zoo.outside(
        zoo_hard.Stack(*(zoo_hard.Residual() for _ in range(3))), *zoo.ZOO["checkpoint_reentrant"].case().batch
    )
    plain.model.double()
    for name in ("checkpoint_reentrant", "checkpoint_non_reentrant"):
        entry = zoo.ZOO[name]
        case = entry.case()
        plain.model.load_state_dict(case.model.state_dict())
        step = convert(case, entry)
        assert_gradients(run(step.run_bp, case.batch).grads, bp_oracle(plain).grads)
