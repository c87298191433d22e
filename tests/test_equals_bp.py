"""The BP step is backpropagation and the local step is what one would detach by hand, for every model of the zoo."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracles import (
    SEED,
    assert_buffers,
    assert_gradients,
    assert_loss,
    bp_oracle,
    buffers,
    call,
    check_bp,
    check_is_a_test,
    check_local,
    check_owners,
    detached_oracle,
    drop_in,
    gradient_errors,
    gradients,
    run,
    seed_all,
)
from torch import Tensor, nn
from zoo import Case, Entry

import bpfx


def convert(case: Case, blocks: Any, **options: Any) -> Any:
    return bpfx.convert(case.model, case.loss_fn, case.batch, blocks=blocks, offset=None, compile="eager", **options)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a module that conversion must leave alone."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "objects": {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(getattr(module, attribute)) for attribute in vars(module) if attribute.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    values, expected = after.pop("values"), before.pop("values")
    for key in before:
        assert after[key] == before[key], key
    for name, value in expected.items():
        assert torch.equal(values[name], value), f"{name} changed"


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.names(hard=False))
def test_model(name: str, subtests: Any) -> None:
    entry: Entry = zoo.ZOO[name]
    case = entry.case()
    before = fingerprint(case.model)
    step = convert(case, list(entry.cuts))
    with subtests.test("conversion leaves the model alone"):
        assert step.model is case.model
        assert_untouched(case.model, before)
    with subtests.test("the named modules begin the blocks"):
        assert len(step.plan.blocks) == entry.blocks()
    with subtests.test("every parameter belongs to one block"):
        check_owners(step.plan, entry, case.model)
    with subtests.test("BP step"):
        expected = check_bp(step, case)
        check_is_a_test(entry, case, expected)
    with subtests.test("local step"):
        check_local(step, case, entry.cuts)
    if entry.tags & zoo.LARGE:
        return  # a smaller entry of its kind does the rest
    with subtests.test("another batch size"):
        other = entry.case(entry.size + 1)
        other.model = step.model
        check_bp(step, other, seed=5)
        check_local(step, other, entry.cuts, seed=6)


# --- the oracles themselves ------------------------------------------------------------------------------------------


def test_detached_oracle_is_the_loop_one_writes_by_hand() -> None:
    case = zoo.convnet(dtype=torch.float64)
    heads = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 5)) for c in (6, 8, 8))
    heads.double()
    reference = detached_oracle(case, heads, ("1", "2", "3"))

    model, heads = copy.deepcopy(case.model), copy.deepcopy(heads)
    x, y = case.batch
    seed_all(SEED)
    for k, block in enumerate(model):
        x = block(x.detach())
        F.cross_entropy(heads[k](x) if k < len(heads) else x, y).backward()
    assert gradient_errors(gradients(model) | gradients(heads, "bpfx.heads."), reference.grads) == []
    assert_buffers(buffers(model), reference.buffers)


def test_comparison_tells_bp_from_local() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, ["1", "2", "3"])
    local = detached_oracle(case, step.heads, ("1", "2", "3"))
    wrong = gradient_errors(local.grads, bp_oracle(case).grads)
    assert any(line.startswith("0.conv.weight") for line in wrong)
    assert not any(line.startswith("3.linear.weight") for line in wrong)


# --- what the table does not reach -----------------------------------------------------------------------------------


def test_same_gradients_call_after_call() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    for seed in range(4):
        check_bp(step, case, seed)
        check_local(step, case, zoo.CONVNET_CUTS, seed)


def test_batch_sizes_in_any_order() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    for size in (4, 7, 2, 1, 4):
        other = zoo.convnet(size, dtype=torch.float64)
        other.model = step.model
        check_bp(step, other, seed=size)
        check_local(step, other, zoo.CONVNET_CUTS, seed=size)


@pytest.mark.parametrize("blocks", [1, 2, 4, "auto"])
def test_bp_step_whatever_the_cuts(blocks: Any) -> None:
    case = zoo.convnet(dtype=torch.float64)
    check_bp(convert(case, blocks), case)


def test_one_block_is_bp() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, 1)
    expected = bp_oracle(case)
    found = drop_in(step, case.batch)
    assert_gradients(found.grads, expected.grads)


@pytest.mark.parametrize("method", ["run_bp", "run_local"])
def test_a_step_draws_what_a_plain_step_draws(method: str) -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    model = copy.deepcopy(case.model)
    seed_all()
    call(model, case.batch, case.loss_fn).backward()
    expected = torch.rand(3)
    run(getattr(step, method), case.batch)
    assert torch.equal(torch.rand(3), expected)


def test_run_methods_leave_gradients_alone() -> None:
    case = zoo.convnet()
    step = convert(case, list(zoo.CONVNET_CUTS))
    run(step.run_bp, case.batch)
    run(step.run_local, case.batch)
    assert all(parameter.grad is None for parameter in step.parameters())


def test_backward_accumulates() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    once = detached_oracle(case, step.heads, zoo.CONVNET_CUTS)
    drop_in(step, case.batch)
    run(step, case.batch).backward()  # once more, gradients not cleared
    twice = {name: 2 * grad for name, grad in once.grads.items()}
    assert_gradients(gradients(step.model) | gradients(step.heads, "bpfx.heads."), twice)


def test_backward_scales_with_the_loss() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    expected = detached_oracle(case, step.heads, zoo.CONVNET_CUTS)
    (run(step, case.batch) / 8).backward()
    eighth = {name: grad / 8 for name, grad in expected.grads.items()}
    assert_gradients(gradients(step.model) | gradients(step.heads, "bpfx.heads."), eighth)


def test_training_follows_plain_training() -> None:
    """Six SGD steps with one block: what is wrong only now and then, or only after an update, shows here."""
    case = zoo.convnet(dtype=torch.float64)
    plain = copy.deepcopy(case.model)
    step = convert(case, 1)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1, momentum=0.9)
    seed_all()
    for _ in range(6):
        plain_optimizer.zero_grad()
        call(plain, case.batch, case.loss_fn).backward()
        plain_optimizer.step()
    seed_all()
    for _ in range(6):
        optimizer.zero_grad()
        step(*case.batch).backward()
        optimizer.step()
    torch.testing.assert_close(dict(case.model.named_parameters()), dict(plain.named_parameters()))
    assert_buffers(buffers(case.model), buffers(plain))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama_no_mask", "t5"])
def test_step_returns_the_models_own_output(name: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    step = convert(case, list(entry.cuts))
    untouched = copy.deepcopy(case.model)
    seed_all()
    expected = untouched(**case.batch)
    output = run(step, case.batch)
    assert type(output) is type(expected)
    assert_loss(output.loss, expected.loss.detach())
    torch.testing.assert_close(output.logits, expected.logits)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_padding_of_another_batch(name: str) -> None:
    """transformers drops a mask of ones when it sees one; a graph captured then must not have dropped it for good."""
    entry = zoo.ZOO[name]
    case = entry.case()
    padded = case.batch
    case.batch = dict(padded, attention_mask=torch.ones_like(padded["attention_mask"]))
    step = convert(case, list(entry.cuts))
    check_bp(step, case)
    case.batch = padded
    check_bp(step, case)
    check_local(step, case, entry.cuts)


def test_frozen_parameters_get_nothing() -> None:
    case = zoo.convnet(dtype=torch.float64)
    case.model[1].requires_grad_(False)
    step = convert(case, ["2", "3"])
    check_bp(step, case)
    check_local(step, case, ["2", "3"])
    assert all(parameter.grad is None for parameter in case.model[1].parameters())


def test_a_frozen_block_has_no_head_and_passes_gradients_on() -> None:
    case = zoo.convnet(dtype=torch.float64)
    case.model[1].requires_grad_(False)
    step = convert(case, ["1", "2", "3"])
    assert [bool(block.head) for block in step.plan.blocks] == [True, False, True, False]
    check_bp(step, case)
    local = run(step.run_local, case.batch)
    assert not {name for name in local.grads if name.startswith(("1.", "bpfx.heads.1."))}
    assert {name for name in local.grads if name.startswith("2.")}


def test_loss_module_with_parameters_of_its_own_settings() -> None:
    class_weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    loss_fn = nn.CrossEntropyLoss(weight=class_weights, label_smoothing=0.1)
    case = zoo.convnet(dtype=torch.float64)
    case.loss_fn = loss_fn
    case.task_loss = lambda prediction, batch: loss_fn(prediction, batch[1])
    step = convert(case, list(zoo.CONVNET_CUTS))
    check_bp(step, case)
    check_local(step, case, zoo.CONVNET_CUTS)


# --- the model stays the caller's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_the_training_flag(training: bool) -> None:
    case = zoo.convnet()
    case.model.train(training)
    before = fingerprint(case.model)
    convert(case, list(zoo.CONVNET_CUTS))
    assert_untouched(case.model, before)


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "llama_lora", "vit_attention_lora", "lstm"])
def test_model_evaluates_saves_and_loads_without_bpfx(name: str) -> None:
    entry = zoo.ZOO[name]
    case = entry.case()
    untouched = copy.deepcopy(case.model).eval()
    step = convert(case, list(entry.cuts))
    expected = call(untouched, case.batch, case.loss_fn)
    case.model.eval()
    assert torch.equal(call(case.model, case.batch, case.loss_fn), expected)
    case.model.train()

    drop_in(step, case.batch)  # saving after training is what users do
    assert case.model.state_dict().keys() == untouched.state_dict().keys()
    stream = io.BytesIO()
    torch.save(case.model.state_dict(), stream)
    stream.seek(0)
    untouched.load_state_dict(torch.load(stream))
    case.model.eval()
    saved = call(case.model, case.batch, case.loss_fn)
    assert torch.equal(call(untouched, case.batch, case.loss_fn), saved)
    assert torch.equal(call(pickle.loads(pickle.dumps(case.model)), case.batch, case.loss_fn), saved)
    assert torch.equal(call(copy.deepcopy(case.model), case.batch, case.loss_fn), saved)


def test_loaded_weights_are_the_ones_that_train() -> None:
    case = zoo.convnet(dtype=torch.float64)
    step = convert(case, list(zoo.CONVNET_CUTS))
    case.model.load_state_dict(zoo.convnet(seed=3, dtype=torch.float64).model.state_dict())
    check_bp(step, case)
    check_local(step, case, zoo.CONVNET_CUTS)


def test_step_parameters_are_model_and_heads_once() -> None:
    case = zoo.ZOO["gpt2"].case()
    step = convert(case, list(zoo.ZOO["gpt2"].cuts))
    expected = [*case.model.parameters(), *step.heads.parameters()]
    found = list(step.parameters())
    assert len(found) == len({id(parameter) for parameter in found})
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in expected}


def test_training_learns() -> None:
    """The loop of the README on a batch it can memorise."""
    case = zoo.convnet(8)
    step = convert(case, list(zoo.CONVNET_CUTS))
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    seed_all()
    losses: list[Tensor] = []
    for _ in range(60):
        loss = step(*case.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_keywords_come_in_any_order() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, more: dict[str, Tensor], labels: Tensor) -> Tensor:
            return F.cross_entropy(self.last(self.first(x + more["a"] - more["b"]).relu()), labels)

    x, a, b, labels = *(torch.randn(5, 4) for _ in range(3)), torch.randint(0, 3, (5,))
    model = Net()
    step = bpfx.convert(model, None, {"x": x, "more": {"a": a, "b": b}, "labels": labels}, blocks=2, offset=None)
    assert torch.equal(step(labels=labels, more={"b": b, "a": a}, x=x), model(x, {"a": a, "b": b}, labels))
    with pytest.raises(bpfx.BpfxError, match="built otherwise"):
        step(labels=labels, more={"b": b}, x=x)


def test_a_model_that_returns_one_operator_as_its_loss_has_heads() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(super().forward(x), y)

    batch = {"x": torch.randn(5, 4), "y": torch.randint(0, 3, (5,))}
    step = bpfx.convert(Net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), None, batch, blocks=2, offset=None)
    assert len(step.plan.blocks) == 2 and step.plan.blocks[0].head is not None
