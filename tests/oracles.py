"""What the answers should be, worked out with plain PyTorch on untouched copies. Nothing here looks inside bpfx.

`bp_oracle` is a training step as anyone writes it. `detached_oracle` is a local step as one writes it by hand: at the
start of every block, apply the head to what arrives, call backward on the local loss, and pass on detached copies.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import Case, Entry

SEED = 1234
RTOL = {torch.float64: 1e-6, torch.float32: 2e-4}
FLOOR = {torch.float64: 1e-9, torch.float32: 2e-6}  # of all gradients' norm: below it a gradient is rounding alone


@dataclass
class Reference:
    """One step's results."""

    loss: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    local_losses: list[Tensor] = field(default_factory=list)


def seed_all(seed: int = SEED) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def call(model: nn.Module, batch: Any, loss_fn: Callable | None) -> Tensor:
    """The task loss as the user's own loop computes it."""
    if loss_fn is None:
        return model(**batch).loss
    x, y = batch
    if isinstance(x, dict):
        return loss_fn(model(**x), y)
    return loss_fn(model(*x) if isinstance(x, tuple) else model(x), y)


def gradients(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def bp_oracle(case: Case, seed: int = SEED) -> Reference:
    """One plain training step's loss and gradients; buffers as the forward pass left them.

    Before the backward pass, because a model that checkpoints its own BatchNorm updates it again there.
    """
    model = copy.deepcopy(case.model).train()
    seed_all(seed)
    loss = call(model, case.batch, case.loss_fn)
    after_forward = buffers(model)
    loss.backward()
    return Reference(loss.detach(), gradients(model), after_forward)


def _cut(value: Any) -> Any:
    # the copy survives what the next block does in place; it asks for a gradient when the original did, because a
    # reentrant checkpoint whose input asks for none gives its parameters none
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad):
        return value
    return value.detach().requires_grad_().clone()


def detached_oracle(case: Case, heads: Sequence[nn.Module], cuts: Sequence[str], seed: int = SEED) -> Reference:
    """One local step by hand: each block begins at a named module, and reads detached copies."""
    model = copy.deepcopy(case.model).train()
    heads = copy.deepcopy(heads)
    local_losses: list[Tensor] = []
    initial = buffers(model)
    once: dict[str, Tensor] = {}

    def note_buffers() -> None:
        # before a block's backward, because a block that checkpoints its own BatchNorm updates it again there
        now = buffers(model)
        once.update({n: b for n, b in now.items() if n not in once and not torch.equal(b, initial[n])})

    def begin(k: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            boundary = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            assert len(local_losses) == k, f"{cuts[k]} began out of order"
            with torch.random.fork_rng(devices=[]):
                predict = getattr(heads[k], "predict", heads[k])  # a plain module predicts when it is called
                local = case.task_loss(predict(boundary), case.batch)
            local_losses.append(local.detach())
            note_buffers()
            local.backward()
            return tree_map(_cut, args), tree_map(_cut, kwargs)

        return hook

    for k, name in enumerate(cuts):
        model.get_submodule(name).register_forward_pre_hook(begin(k), with_kwargs=True)
    seed_all(seed)
    loss = call(model, case.batch, case.loss_fn)
    note_buffers()
    loss.backward()
    after_forward = initial | once
    grads = gradients(model)
    for k in range(len(cuts)):
        grads |= gradients(heads[k], f"bpfx.heads.{k}.")
    return Reference(loss.detach(), grads, after_forward, [*local_losses, loss.detach()])


# --- comparing -------------------------------------------------------------------------------------------------------


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors.values()) ** 0.5


def gradient_errors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float | None = None
) -> list[str]:
    """The parameters whose gradients differ, each with by how much; an absent gradient counts as zero.

    A tensor's error is measured against its own norm, so that a wrong gradient in a small tensor is not drowned by a
    large one.
    """
    wrong = []
    dtypes = {tensor.dtype for tensor in expected.values()}
    dtype = torch.float32 if torch.float32 in dtypes else torch.float64
    floor = FLOOR[dtype] * _norm(expected)
    for name in sorted(actual.keys() | expected.keys()):
        a, e = actual.get(name), expected.get(name)
        if a is None or e is None:
            a, e = (torch.zeros_like(e), e) if a is None else (a, torch.zeros_like(a))
        if a.shape != e.shape:
            wrong.append(f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}")
            continue
        error, size = (a.double() - e.double()).norm().item(), e.double().norm().item()
        if not error <= (rtol or RTOL[dtype]) * size + floor:
            wrong.append(f"{name}: off by {error:.3g}, its norm is {size:.3g}")
    return wrong


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float | None = None) -> None:
    assert _norm(expected) > 0, "the reference has no gradient to compare with"
    wrong = gradient_errors(actual, expected, rtol)
    assert not wrong, f"{len(wrong)} of {len(expected)} gradients differ:\n  " + "\n  ".join(wrong[:12])


def assert_loss(actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
    rtol = rtol or RTOL[expected.dtype]
    torch.testing.assert_close(actual.detach().to(expected), expected, rtol=rtol, atol=rtol)


def assert_buffers(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rtol = RTOL.get(value.dtype, 0.0)
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_bits(actual: Any, expected: Any, path: str = "state") -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), f"{path}: keys {set(actual) ^ set(expected)} are in one only"
        for key in expected:
            assert_same_bits(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), path
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, e, f"{path}.{i}")
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected), (
            f"{path}: differs by {(actual.double() - expected.double()).abs().max():.3g}"
        )
    else:
        assert actual == expected, f"{path}: {actual!r}, expected {expected!r}"


# --- bpfx's side of the comparison -----------------------------------------------------------------------------------


def run(method: Callable, batch: Any, seed: int = SEED) -> Any:
    """Call a step (or one of its methods) on a batch as its form asks, after seeding."""
    seed_all(seed)
    return method(**batch) if isinstance(batch, dict) else method(*batch)


def clear_gradients(step: Any) -> None:
    for parameter in step.parameters():
        parameter.grad = None


def drop_in(step: Any, batch: Any, seed: int = SEED) -> Reference:
    """One step as users write it: call, backward, read `.grad`."""
    clear_gradients(step)
    loss = run(step, batch, seed)
    if isinstance(batch, dict):
        loss = loss.loss
    loss.backward()
    found = gradients(step.model) | gradients(step.heads, "bpfx.heads.")
    return Reference(loss.detach(), found, buffers(step.model))


def check_bp(step: Any, case: Case, seed: int = SEED) -> Reference:
    """The BP step equals autograd on the untouched model, buffers included; what autograd found."""
    expected = bp_oracle(case, seed)
    actual = run(step.run_bp, case.batch, seed)
    assert_loss(actual.loss, expected.loss)
    assert_gradients(actual.grads, expected.grads)
    assert_buffers(buffers(step.model), expected.buffers)
    return expected


def check_is_a_test(entry: Entry, case: Case, expected: Reference) -> None:
    """There are gradients to compare: a model whose gradients vanish at the start would pass whatever bpfx does."""
    total = sum(grad.double().square().sum() for grad in expected.grads.values()) ** 0.5
    trainable = [name for name, parameter in case.model.named_parameters() if parameter.requires_grad]
    seen = {name for name in trainable if name in expected.grads and expected.grads[name].norm() > 1e-9 * total}
    share = 0.5 if entry.dead or "random_depth" in entry.tags else 0.9  # biases before a norm are zero in any model
    assert len(seen) >= share * len(trainable)


def check_owners(plan: Any, entry: Entry, model: nn.Module) -> None:
    """Every parameter belongs to one block, except tied ones, which belong wherever they are used, and unused ones."""
    count = Counter(name for block in plan.blocks for name in block.parameter_names)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(count) <= {name for name, _ in model.named_parameters()}
    if not entry.dead:
        assert wanted <= set(count)
    shared = {name for name, times in count.items() if times > 1}
    assert len(shared) == ("tied" in entry.tags)


def check_local(step: Any, case: Case, cuts: Sequence[str], seed: int = SEED) -> None:
    """The local step equals the hand-detached one, through `run_local` and through `loss.backward()`."""
    expected = detached_oracle(case, step.heads, cuts, seed)
    actual = run(step.run_local, case.batch, seed)
    assert len(actual.local_losses) == len(cuts) + 1
    for a, e in zip(actual.local_losses, expected.local_losses, strict=True):
        assert_loss(a, e)
    assert_gradients(actual.grads, expected.grads)
    assert_buffers(buffers(step.model), expected.buffers)

    expected = detached_oracle(case, step.heads, cuts, seed)
    found = drop_in(step, case.batch, seed)
    assert_loss(found.loss, expected.loss)
    assert_gradients(found.grads, expected.grads)
    assert_buffers(found.buffers, expected.buffers)
