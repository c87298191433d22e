"""What must hold for every random model: each property against plain PyTorch on a copy of the model.

The local step's reference runs the recipe segment by segment, and between two blocks applies the head, calls backward
and passes detached copies on.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import fuzz_model
import torch
from fuzz_model import Net, Recipe
from oracles import (
    Reference,
    assert_buffers,
    assert_gradients,
    assert_loss,
    assert_same_bits,
    buffers,
    clear_gradients,
    gradients,
    run,
    seed_all,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

import bpfx
from bpfx.losses import Given
from bpfx.passes import partition
from bpfx.passes.liveness import LivenessError

# what a run is resumed with; the first is the simplest
OFFSETS: tuple[Callable[[], bpfx.Offset | None], ...] = (
    lambda: bpfx.Offset(period=2),
    lambda: bpfx.Offset(),
    lambda: bpfx.Offset(period=1),
    lambda: None,
    lambda: bpfx.Offset(period=2, form="B", alpha="auto", dtype="int8"),
    lambda: bpfx.Offset(period=3, lam="auto", decay=0.5, clip=1.0),
    lambda: bpfx.Offset(period=2, batch=2, match=0.1, dtype=torch.bfloat16),
)
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9)


class Invalid(Exception):
    """This recipe is no model that anyone could train: plain PyTorch refuses it."""


@dataclass
class Plain:
    """One training step of the untouched model."""

    reference: Reference
    outputs: tuple[Tensor, ...]
    fixed: dict[str, Tensor]  # outputs that the loss judges and nothing trains


def call(model: Net, batch: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and outputs as the user's own loop computes them."""
    if isinstance(batch, dict):
        found = model(**batch)
        return found["loss"], (found["loss"], found["logits"])
    x, y = batch
    output = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    outputs = fuzz_model.leaves(output)
    return fuzz_model.task_loss(model.recipe, outputs, y), outputs


def plain_step(recipe: Recipe) -> Plain:
    """What plain PyTorch makes of the recipe.

    Raises:
        Invalid: it refuses: something in place overwrites what backward needs, say, or nothing trains.
    """
    model = fuzz_model.build(recipe)
    try:
        seed_all()
        loss, outputs = call(model, fuzz_model.batch_of(recipe))
        after = buffers(model)
        kept = tuple(o.detach().clone() for o in outputs)
        judged = zip(recipe.outputs, outputs, strict=True) if recipe.loss != "inside" else ()
        fixed = {name: o.detach().clone() for name, o in judged if name != "raw" and not o.requires_grad}
        loss.backward()
    except RuntimeError as error:
        raise Invalid(str(error).splitlines()[0]) from None
    grads = gradients(model)
    norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
    if not (torch.isfinite(loss) and 1e-3 < norm < 1e3):
        raise Invalid("loss or gradient are of no use")
    return Plain(Reference(loss.detach(), grads, after), kept, fixed)


# --- the local step by hand ------------------------------------------------------------------------------------------


def _usable(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without views that autograd has given up: one of several made at once, whose memory was overwritten."""
    found = {}
    for name, value in values.items():
        try:
            _ = value.grad_fn
        except RuntimeError:
            continue
        found[name] = value
    return found


def _cut(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies; names of one tensor stay names of one tensor."""
    made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    found = {}
    for name, value in values.items():
        key = value.data_ptr(), tuple(value.shape), value.stride()
        if key not in made:
            carries = value.is_floating_point() and value.requires_grad
            # the clone survives what the next block does in place
            made[key] = value.detach().requires_grad_(carries).clone()
        found[name] = made[key]
    return found


def _match(values: list[Tensor], wanted: Tensor, where: str) -> Tensor:
    """Take out the value of the program that a head was given; the newest, where several are equal."""
    for i, value in reversed([*enumerate(values)]):
        if value.shape == wanted.shape and value.requires_grad and torch.allclose(value, wanted, rtol=1e-9, atol=1e-12):
            return values.pop(i)
    raise AssertionError(f"{where}: its head reads a value that does not cross the boundary")


def _prediction(shape: tuple[int, ...], predictions: Sequence[Tensor]) -> Tensor:
    """The one of this shape; a loss may begin before the model has moved its classes to the second place."""
    for value in predictions:
        for moved in (value, value.movedim(-1, 1)):
            if moved.shape == shape:
                return moved
    raise AssertionError(f"no prediction of the shape {shape}: {[tuple(p.shape) for p in predictions]}")


def _carrying(recipe: Recipe, model: Net, fed: dict[str, Tensor], y: Tensor) -> list[set[str]]:
    """At the start of every segment, the values that a gradient comes to in plain BP."""
    found: list[set[str]] = []

    def note(names: set[str], name: str, grads: tuple[Tensor | None, ...]) -> None:
        if any(g is not None for g in grads):
            names.add(name)

    def note_part(names: set[str], name: str, place: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[place[0]]
        if grad is not None and bool(grad.contiguous().as_strided(*place[1:]).any()):
            names.add(name)

    values = model.start(**fed)
    for segment in model.segments:
        values = _usable(values)
        found.append(set())
        for name, value in values.items():
            # At the place in the autograd graph, not at the tensor: it may be overwritten later.
            if value.grad_fn is not None:
                value.grad_fn.register_prehook(partial(note, found[-1], name))
            base = value._base
            if base is not None and base.grad_fn is not None and base.is_contiguous():
                # A view that is written to is from then on a view of what its base has become.
                place = base.output_nr, value.shape, value.stride(), value.storage_offset()
                base.grad_fn.register_prehook(partial(note_part, found[-1], name, place))
        values = segment(values)
    fuzz_model.task_loss(recipe, model.finish(values), y).backward()
    return found


def _reached(values: Iterable[Tensor], parameters: Sequence[Tensor]) -> set[int]:
    total = [v.sum() for v in values if v.requires_grad]
    if not total or not parameters:
        return set()
    found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    return {i for i, g in enumerate(found) if g is not None}


def local_step(
    recipe: Recipe, model: Net, fixed: dict[str, Tensor], heads: Any, cuts: Sequence[int], features: dict[int, Any]
) -> Reference:
    """One local step by hand.

    Args:
        model: in the state to start from; gets the gradients.
        fixed: judged outputs that no head predicts, since nothing trains them.
        heads: those of the converted twin, in the state to start from.
        cuts: the segments that begin the second block, the third, …
        features: what each head was given in the converted step.
    """
    batch = fuzz_model.batch_of(recipe)
    inside = isinstance(batch, dict)
    fed: Any = {k: v for k, v in batch.items() if k != "labels"} if inside else batch[0]
    y = batch["labels"] if inside else batch[1]
    if not isinstance(fed, dict):
        fed = dict(zip(("x", *recipe.more), fed if isinstance(fed, tuple) else (fed,), strict=True))
    flat = [leaf for leaf in tree_leaves(fuzz_model.batch_of(recipe)) if isinstance(leaf, Tensor)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    judged = dict.fromkeys(name for name in recipe.outputs if name != "raw" and name not in fixed)
    local_losses: list[Tensor] = []
    carrying = _carrying(recipe, copy.deepcopy(model), copy.deepcopy(fed), y)
    seed_all()
    values = model.start(**fed)
    for i, segment in enumerate(model.segments):
        values = _usable(values)
        if i in cuts:
            k = cuts.index(i)
            if k in features:
                crossing = [v for n, v in values.items() if n in carrying[i]]
                left = list(crossing)  # two may be equal: norms of one value
                seen = [_match(left, f, f"block {k}") for f in features[k].features]
                missed = _reached(crossing, trainable) - _reached(seen, trainable)
                assert not missed, f"block {k}: a crossing value trains parameters {missed} that its head cannot reach"
                predictions = heads[k].predictions(Given(tuple(seen), tuple(flat)))
                assert len(predictions) == len(judged)
                guess = {name: _prediction(recipe.shape(name), predictions) for name in judged}
                outputs = tuple((guess | fixed).get(name, y) for name in recipe.outputs)
                local = fuzz_model.task_loss(recipe, outputs, y)
                local_losses.append(local.detach())
                local.backward()
            else:
                crossing = [values[n] for n in carrying[i]]
                assert not _reached(crossing, trainable), f"block {k} trains, but has no head"
            values = _cut(values)
        values = segment(values)
    loss = fuzz_model.task_loss(recipe, model.finish(values), y)
    if loss.requires_grad:
        local_losses.append(loss.detach())
        after = buffers(model)
        loss.backward()
    else:
        local_losses.append(loss)
        after = buffers(model)
    grads = gradients(model)
    for k in features:
        grads |= gradients(heads[k], f"bpfx.heads.{k}.")
    return Reference(loss.detach(), grads, after, local_losses)


@contextmanager
def _overheard(step: bpfx.Step, features: dict[int, Any]) -> Any:
    """Notes what every head is given."""

    def note(k: int, head: Any, args: tuple[Given]) -> None:
        kept = tuple(f.detach().clone() for f in args[0].features)
        features[k] = Given(kept)

    handles = [head.register_forward_pre_hook(partial(note, k)) for k, head in enumerate(step.heads)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- conversion ------------------------------------------------------------------------------------------------------


def convert(recipe: Recipe, model: Net, offset: bpfx.Offset | None = None) -> tuple[bpfx.Step, list[int]]:
    """The step, a block at each segment that a cut is possible in front of, and those segments."""
    cuts: list[int] = []
    by_name = partition.by_name

    def possible(liveness: partition.Liveness, points: list[partition.CutPoint], names: list[str]) -> list[int]:
        """One name at a time: converting again without each that is refused would take twice as long."""
        found: dict[int, int] = {}
        for i, name in enumerate(names, 1):
            try:
                found |= dict.fromkeys(by_name(liveness, points, [name]), i)
            except bpfx.BpfxError as error:
                assert str(error).startswith("blocks:")
        cuts.extend(found[position] for position in sorted(found))
        return sorted(found)

    seed_all(5)
    names = [f"segments.{i}" for i in range(1, len(recipe.segments))]
    with mock.patch.object(partition, "by_name", possible):
        loss, batch = fuzz_model.loss_fn(recipe), fuzz_model.batch_of(recipe)
        return bpfx.convert(model, loss, batch, blocks=names, offset=offset), cuts


def _unpredicted() -> Any:
    """Converting without predicting peaks, which takes a quarter of the time."""
    return mock.patch("bpfx.compiler.predict_bp", side_effect=LivenessError("not asked for"))


def check(recipe: Recipe) -> str:
    """Every property of one random model; how it was converted.

    Raises:
        Invalid: plain PyTorch cannot train it.
        AssertionError: bpfx is wrong.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("error", module=r"bpfx\.")
        warnings.simplefilter("ignore", bpfx.BpfxWarning)  # what BP does not reach, say
        if recipe.seed % 8:
            stack.enter_context(_unpredicted())
        expected = plain_step(recipe)
        model = fuzz_model.build(recipe)
        before = copy.deepcopy(model.state_dict())
        try:
            step, cuts = convert(recipe, model)
        except bpfx.BpfxError as error:
            if expected.fixed and str(error).startswith("the loss cannot be taken apart"):
                raise Invalid("no head can make an output that the trained layers have no part in") from None
            raise
        assert_same_bits(dict(model.state_dict()), dict(before), "the model after its conversion")
        start = copy.deepcopy(dict(step.state_dict()))
        if len(step.plan.blocks) != len(cuts) + 1:  # a segment in which nothing is computed
            cuts = []
        check_bp(recipe, step, expected)
        step.load_state_dict(start)
        if len(step.plan.blocks) == len(cuts) + 1:
            check_local(recipe, step, expected, cuts, before)
            step.load_state_dict(start)
        audit = bpfx.audit(step)
        assert audit.ok, str(audit)
        check_exact(recipe, step, expected, start)
        check_trainer(recipe, step, start)
        check_resume(recipe, step, start)
    opaque = any(block.opaque for block in step.plan.blocks)
    return f"{len(step.plan.blocks)} blocks{', opaque parts' if opaque else ''}"


def check_bp(recipe: Recipe, step: bpfx.Step, expected: Plain) -> None:
    """The BP step is autograd's on the untouched model, outputs and buffers included."""
    found = run(step.run_bp, fuzz_model.batch_of(recipe))
    assert_loss(found.loss, expected.reference.loss)
    assert_gradients(found.grads, expected.reference.grads)
    assert_buffers(buffers(step.model), expected.reference.buffers)
    _assert_outputs(found.outputs, expected)


def _assert_outputs(outputs: Any, expected: Plain) -> None:
    for found, value in zip(fuzz_model.leaves(outputs), expected.outputs, strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=1e-6, atol=1e-9)


def check_local(recipe: Recipe, step: bpfx.Step, plain: Plain, cuts: list[int], before: dict[str, Tensor]) -> None:
    """The local step is the hand-detached one, through `run_local` and through `loss.backward()`."""
    features: dict[int, Any] = {}
    heads = copy.deepcopy(step.heads)
    with _overheard(step, features):
        found = run(step.run_local, fuzz_model.batch_of(recipe))
    twin = fuzz_model.build(recipe)
    twin.load_state_dict(before)
    expected = local_step(recipe, twin, plain.fixed, heads, cuts, features)
    assert_loss(found.loss, expected.loss)
    losses = found.local_losses
    assert len(losses) == len(expected.local_losses), "a block's local loss is missing"
    for a, e in zip(losses, expected.local_losses, strict=True):
        assert_loss(a, e)
    assert_gradients(found.grads, expected.grads)
    assert_buffers(buffers(step.model), expected.buffers)


def check_exact(recipe: Recipe, step: bpfx.Step, expected: Plain, start: dict[str, Any]) -> None:
    """An exact step puts BP's gradient into `.grad`, and so does a refresh at every iteration."""
    for offset in (bpfx.Offset(), bpfx.Offset(period=1)):
        exact = bpfx.Step(step._compiler, offset)
        exact.load_state_dict(start)
        if offset.period != 1:
            exact._forced = "exact"
        clear_gradients(exact)
        out = run(exact, fuzz_model.batch_of(recipe))
        loss = out if isinstance(out, Tensor) else out["loss"]
        loss.backward()
        assert_loss(loss, expected.reference.loss)
        assert_gradients(gradients(exact.model), expected.reference.grads)
        assert_buffers(buffers(exact.model), expected.reference.buffers)
        clear_gradients(exact)
        exact.load_state_dict(start)


def _plain_micro(recipe: Recipe, start: dict[str, Any], count: int) -> Net:
    """The loop that one writes: micro-batches, accumulated, then a step of the optimizer."""
    twin = fuzz_model.build(recipe)
    twin.load_state_dict({n.removeprefix("model."): v for n, v in start.items() if n.startswith("model.")})
    optimizer = SGD([p for p in twin.parameters() if p.requires_grad])
    batch, n = fuzz_model.batch_of(recipe), recipe.batch
    bounds = [n * i // count for i in range(count + 1)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        part = torch.utils._pytree.tree_map(lambda t, a=a, b=b: t[a:b], batch)
        share = 1.0 if recipe.loss == "sum" else (b - a) / n
        (call(twin, part)[0] * share).backward()
    optimizer.step()
    return twin


def check_trainer(recipe: Recipe, step: bpfx.Step, start: dict[str, Any]) -> None:
    """`BlockTrainer(mode="bp")` in two micro-batches is the plain loop over them, in both orders.

    Random draws are the loop's only where each micro-batch makes both sweeps before the next.
    """
    try:
        trainer = bpfx.BlockTrainer(step, SGD, micro_batches=2, mode="bp")
    except bpfx.BpfxError as error:
        assert "does not follow from those of its micro-batches" in str(error)
        return
    seed_all()
    twin = _plain_micro(recipe, start, 2)
    names = dict(twin.named_parameters())
    was = {n: start[f"model.{n}"] for n in names}
    moved = {n: p.detach() - was[n] for n, p in names.items()}
    for trainer._one_by_one in (True,) if recipe.random else (True, False):
        run(trainer.step, fuzz_model.batch_of(recipe))
        found = {n: p.detach() - was[n] for n, p in step.model.named_parameters()}
        assert_gradients(found, moved, 1e-5)
        assert_buffers(buffers(step.model), buffers(twin))
        step.load_state_dict(start)


def check_resume(recipe: Recipe, step: bpfx.Step, start: dict[str, Any]) -> None:
    """Two iterations, a checkpoint, two more: a new step that loads it goes on bit for bit."""
    make = OFFSETS[recipe.offset]
    first = bpfx.Step(step._compiler, make())
    first.load_state_dict(start)
    seed_all(3)
    optimizer = SGD(first.parameters())
    _train(recipe, first, optimizer, 0)
    stream = io.BytesIO()
    state = {"step": first.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(state, stream)
    losses = _train(recipe, first, optimizer, 2)
    whole = copy.deepcopy(dict(first.state_dict()))
    saved = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    if recipe.seed % 8:
        second = bpfx.Step(step._compiler, make())
    else:  # another model and another conversion, as in another process
        second = convert(recipe, fuzz_model.build(recipe), make())[0]
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    optimizer = SGD(second.parameters())
    second.load_state_dict(saved["step"])
    optimizer.load_state_dict(saved["optimizer"])
    seed_all(4)
    torch.set_rng_state(saved["random"])
    assert_same_bits(_train(recipe, second, optimizer, 2), losses, "losses")
    assert_same_bits(dict(second.state_dict()), whole)


def _train(recipe: Recipe, step: bpfx.Step, optimizer: torch.optim.Optimizer, begin: int) -> list[Tensor]:
    losses = []
    for number in (begin, begin + 1):
        batch = fuzz_model.batch_of(recipe, number)
        out = step(**batch) if isinstance(batch, dict) else step(*batch)
        loss = out if isinstance(out, Tensor) else out["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses
