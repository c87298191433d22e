"""Predictions of whole steps: nothing is trained, nothing of a step's size is allocated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from bpfx import _simulate
from bpfx._alone import alone
from bpfx._costs import StageCosts, stage_costs
from bpfx._gradients import Grads
from bpfx._refresh import Sums, refresh_piece
from bpfx._serial import Piece
from bpfx._variant import Variant
from bpfx.passes import lower, partition, programs
from bpfx.passes.capture import Captured
from bpfx.passes.graph import HEADS, ModelGraph, Weights, tensor_bytes
from bpfx.passes.liveness import LivenessError, Prediction, fakes_of, mark, predict_peak
from bpfx.passes.precision import autocast_state, outside_autocast, uncached
from bpfx.plan import Schedule

MAX_SEGMENTS = 64


# --- our own steps ----------------------------------------------------------------------------------------------------


def tensors_of(weights: Weights, variant: Variant) -> dict[str, Tensor]:
    """Every weight, and every tensor of the heads, by name."""
    named = {n: weights[n] for n in weights.names() if weights.canonical(n) == n}
    for loss in variant.losses:
        if loss is not None:
            own = [*loss.head.named_parameters(), *loss.head.named_buffers()]
            heads = ((f"{HEADS}{loss.block}.{n}", t) for n, t in own)
            named.update((n, weights.override_of(n, t)) for n, t in heads)
    return named


class Forecast(Mapping[str, int]):
    """Predicted peak bytes by kind of step, made when they are first asked for.

    They take as long as the rest of a conversion, and training does not need them.

    Args:
        make: called once, by whoever asks first.

    Example:
        >>> forecast = Forecast(lambda: {"bp": 2048})
        >>> forecast["bp"], forecast
        (2048, {'bp': 2048})
    """

    def __init__(self, make: Callable[[], dict[str, int]]) -> None:
        self._make: Callable[[], dict[str, int]] | None = make
        self._found: dict[str, int] = {}

    @alone
    def _all(self) -> dict[str, int]:
        if self._make is not None:
            self._found = self._make()
            self._make = None  # with all that it holds
        return self._found

    def __getitem__(self, kind: str) -> int:
        return self._all()[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


def forecast(weights: Weights, variant: Variant, tensors: Sequence[Tensor], notes: list[str]) -> Forecast:
    """Peaks of plain BP (``"bp"``) and of the steps as the drop-in loop runs them, for later.

    It is about weights, heads and batch as they are now, of which only shapes are kept: whoever asks may have moved,
    sharded or frozen them. Under autocast it has to be asked at once; later it is made outside.

    Args:
        notes: gets what a reader should know about the prediction, when it is made.

    Raises:
        LivenessError: a tensor has no fake version.
    """
    named = {n: weights[n] for n in weights.names()} | tensors_of(weights, variant)
    _, (shapes, inputs) = fakes_of((named, list(tensors)))
    precision = nullcontext if autocast_state() else outside_autocast

    @uncached()
    def make() -> dict[str, int]:
        try:
            with torch.inference_mode(False), torch.enable_grad(), precision(), weights.override(shapes):
                found = {"bp": predict_bp(variant.captured, inputs).peak_bytes}
                found.update(drop_in_peaks(weights, variant, inputs, ("local", "bp_blocks", "refresh")))
        except LivenessError as error:
            notes.append(f"no prediction: {error}")
            return {}
        if variant.captured.graph.opaque:
            notes.append("opaque modules count with what one plain run of them saved")
        return found

    return Forecast(make)


class _DryRefresh:
    """Stands for the sum of a refresh: makes the differences and looks at no value."""

    matching: Grads | None = None

    def check(self, loss: Tensor) -> None:
        pass

    def scale(self, block: int, name: str) -> float:
        return 1.0

    def measure(self, block: int, name: str, sums: Sums, g: Tensor | None, ell: Tensor | None) -> None:
        pass

    def settle(self, block: int, deltas: Grads, sums: Sums, share: float) -> None:
        deltas.clear()


def drop_in_peaks(
    weights: Weights, variant: Variant, tensors: Sequence[Tensor], kinds: Sequence[str]
) -> dict[str, int]:
    """Predicted peak bytes of ``"local"``, ``"bp_blocks"`` and ``"refresh"`` as the drop-in loop runs them."""
    named = tensors_of(weights, variant)

    def refresh(*inputs: Tensor) -> Any:
        parts: list[Grads] = []
        refresh_piece(Piece.of(variant, inputs), _DryRefresh(), 1.0, parts)
        return parts

    steps: dict[str, Callable[..., Any]] = {
        "local": variant.local_step,
        "bp_blocks": variant.bp_step,
        "refresh": refresh,
    }

    def run(step: Callable[..., Any]) -> int:
        def fn(given: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
            with weights.override(given):
                return step(*inputs)

        return predict_peak(fn, named, list(tensors)).peak_bytes

    return {kind: run(steps[kind]) for kind in kinds}


def block_peaks(weights: Weights, variant: Variant) -> dict[int, int]:
    """Predicted peak of each block's local program alone, gradients included."""
    named = tensors_of(weights, variant)
    peaks = {}
    values = {n.name: n.meta["val"] for n in variant.captured.graph.graph.nodes if "val" in n.meta}
    mode = next(v.fake_mode for v in values.values() if isinstance(v, torch._subclasses.FakeTensor))
    fakes = {k: mode.from_tensor(t) for k, t in named.items()}
    for stage in variant.stages:
        program = stage.local
        if not isinstance(program, programs.LocalGradient):
            continue
        given = [values[a.name] for a in stage.arguments]
        inputs = [v.detach() if isinstance(v, Tensor) else v for v in given]

        def fn(tensors: dict[str, Tensor], arguments: list[Any], program: Any = program) -> Any:
            with weights.override(tensors):
                return program(arguments)

        peaks[stage.index] = predict_peak(fn, fakes, inputs).peak_bytes
    return peaks


def costs_of(weights: Weights, variant: Variant, tensors: Sequence[Tensor]) -> list[StageCosts]:
    """What every program needs on tensors of these shapes."""
    return stage_costs(variant.captured.graph.inputs, weights, variant.stages, tensors_of(weights, variant), tensors)


@dataclasses.dataclass
class Arrangement:
    """How the block-serial trainer runs its two steps, and what they are predicted to need.

    Attributes:
        groups: blocks that a micro-batch passes in one go in the local step.
        refresh_pieces: pieces of the batch in a refresh.
        local, refresh: the two steps.
        exact: an exact BP step over the same micro-batches, with the heads that learn in it.
        one_by_one: whether that one takes each micro-batch through both sweeps before the next.
    """

    groups: list[range]
    refresh_pieces: int
    local: _simulate.Simulation
    refresh: _simulate.Simulation
    exact: _simulate.Simulation
    one_by_one: bool


def arrange(
    weights: Weights,
    variant: Variant,
    piece: Callable[[int], Sequence[Tensor]],
    count: int,
    together: bool = False,
    heads: bool = True,
) -> Arrangement:
    """Choose groups and the pieces of a refresh for the smallest peak of a run.

    A refresh takes one piece after the other, so that smaller ones cost no memory elsewhere: there are more of them
    than micro-batches where that keeps the refresh below the local step. Not with running statistics in the model,
    where the size of a piece changes the gradient, nor with a single micro-batch, whose draws the refresh repeats.

    Args:
        piece: the largest of so many pieces of the batch.
        count: micro-batches.
        together: an exact step runs all micro-batches of a block together in any case.
        heads: whether there are local steps, and heads that learn; otherwise only the exact step is looked at.

    Raises:
        LivenessError: a program cannot run on fake tensors.
    """
    costs = costs_of(weights, variant, piece(count))
    exact, one_by_one = _simulate.best_bp(costs, count, heads=heads, together=together)
    if not heads:
        nothing = _simulate.Simulation()
        return Arrangement(_simulate.singly(len(costs)), count, nothing, nothing, exact, one_by_one)
    groups = _simulate.best_groups(costs, count)
    local = _simulate.local_serial(costs, count, groups)
    pieces, found = count, _simulate.refresh(costs, count)
    captured = variant.captured
    while count > 1 and captured.graph.dynamic and not captured.mutated_buffers and found.peak > local.peak:
        tensors = piece(2 * pieces)
        if all(a.shape == b.shape for a, b in zip(tensors, piece(pieces), strict=True)):
            break  # single samples
        pieces *= 2
        found = _simulate.refresh(costs_of(weights, variant, tensors), pieces)
    return Arrangement(groups, pieces, local, found, exact, one_by_one)


# --- the exact recipes that users know --------------------------------------------------------------------------------


def predict_bp(captured: Captured, tensors: Sequence[Tensor]) -> Prediction:
    """Plain back-propagation, all gradients kept."""
    weights = captured.weights
    gm = fx.GraphModule(captured.graph.root, captured.graph.graph)
    trainable = weights.trainable()

    def plain(given: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
        used = {n: given[n] for n in captured.graph.weight_of.values()}
        loss, *outputs = gm(*ordered(captured.graph, used, inputs))
        found = torch.autograd.grad(loss, [given[n] for n in trainable], allow_unused=True)
        mark("gradients", [g for g in found if g is not None])
        return loss, outputs, found

    return predict_peak(plain, {n: weights[n] for n in weights.names()}, list(tensors))


def predict_checkpointed(
    captured: Captured, segments: Sequence[lower.Block], tensors: Sequence[Tensor], in_backward: bool
) -> Prediction:
    """Activation checkpointing of every segment but the last.

    Args:
        in_backward: free every gradient as soon as it is complete (an optimizer step in the backward pass), instead of
            keeping all of them.
    """
    weights, graph = captured.weights, captured.graph
    trainable = weights.trainable()

    def run(given: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
        with weights.override(given):
            used = {n: weights[n] for n in {name for s in segments for name in s.weights}}
        values: dict[str, Any] = {n.name: t for n, t in zip(graph.inputs, inputs, strict=True) if n is not None}
        last = {n.name: s.index for s in segments for n in s.inputs}
        for segment in segments:
            # Weights are closed over: buffers that are written may not be among what a checkpoint saves.
            code = functools.partial(_call, segment.source, [used[n] for n in segment.weights])
            arguments = [values[n.name] for n in segment.inputs]
            for node in segment.inputs:
                if last[node.name] == segment.index:
                    values.pop(node.name)
            if segment is segments[-1]:
                outputs = code(*arguments)
            else:
                outputs = checkpoint(code, *arguments, use_reentrant=False)
                mark("boundaries", outputs)
            del arguments
            values.update((n.name, v) for n, v in zip(segment.outputs, outputs, strict=True))
        loss = outputs[0]
        del outputs
        values.clear()
        if not in_backward:
            found = torch.autograd.grad(loss, [given[n] for n in trainable], allow_unused=True)
            mark("gradients", [g for g in found if g is not None])
            return found
        leaves = [given[n] for n in trainable]
        handles = [leaf.register_post_accumulate_grad_hook(_free) for leaf in leaves]
        loss.backward()
        for handle in handles:
            handle.remove()
        return None

    return predict_peak(run, {n: weights[n] for n in weights.names()}, list(tensors))


def _call(code: Callable[..., Any], weights: list[Tensor], *values: Any) -> Any:
    return code(*values, *weights)


def _free(parameter: Tensor) -> None:
    mark("gradients", parameter.grad)
    parameter.grad = None


def best_segments(captured: Captured, found: partition.Liveness) -> list[lower.Block]:
    """The segments with which checkpointing is estimated to need the least: the strongest row to stand beside."""
    cuts = partition.by_count(found, MAX_SEGMENTS, serial=True)
    best = min(cuts, key=lambda count: partition.serial(found, cuts[count]))
    return lower.split(captured.graph, captured.weights, cuts[best], captured.mutated_buffers)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Table:
    """Everything that :func:`schedules` needs beside shapes."""

    captured: Captured
    variant: Variant
    found: partition.Liveness
    offset_bytes: int


def schedules(
    table: Table,
    tensors: Sequence[Tensor],
    piece: Callable[[int], Sequence[Tensor]],
    count: int,
    sizes: Sequence[float],
    one_by_one: bool | None = None,
) -> list[Schedule]:
    """Every way to take one training step, ours and the exact recipes, with what it is predicted to need.

    Args:
        tensors: a batch; only shapes matter.
        piece: the largest of so many pieces of it.
        count: how many micro-batches.
        sizes: of the micro-batches, relative to the largest.
        one_by_one: the order of an exact step; ``None`` for the better one.

    Raises:
        LivenessError: a program cannot run on fake tensors.
    """
    captured, variant, weights = table.captured, table.variant, table.captured.weights
    segments = best_segments(captured, table.found)
    state, with_heads = _state(weights, variant, False, 0), _state(weights, variant, True, table.offset_bytes)
    gradients = sum(tensor_bytes(weights[n]) for n in weights.trainable())

    def exact(name: str, words: str, found: Prediction, pieces: int = 1, kept: int = 0) -> Schedule:
        parts = dict(found.categories)
        parts["gradients"] = parts.get("gradients", 0) + kept
        flops = found.flops * pieces
        return Schedule(name, words, pieces, True, found.peak_bytes + kept, parts, flops, state)

    def ours(name: str, words: str, found: _simulate.Simulation, pieces: int, right: bool) -> Schedule:
        stages = variant.stages
        where = f"block {found.block} ({stages[found.block].block.name}), {found.program}"
        own = state if right else with_heads
        return Schedule(name, words, pieces, right, found.peak, found.categories, found.flops, own, where)

    costs, small = costs_of(weights, variant, tensors), costs_of(weights, variant, piece(count))
    made = arrange(weights, variant, piece, count)
    local = drop_in_peaks(weights, variant, tensors, ("local",))["local"]
    once = _simulate.local_serial(costs, 1)
    if one_by_one is None:
        found = _simulate.best_bp(small, count, sizes)[0]
    else:
        found = _simulate.bp_serial(small, count, sizes, one_by_one)
    rows = [
        exact("bp", "BP", predict_bp(captured, tensors)),
        exact("ac", "BP + checkpointing (AC)", predict_checkpointed(captured, segments, tensors, False)),
        exact("ac_oib", "AC + optimizer in backward", predict_checkpointed(captured, segments, tensors, True)),
        exact(
            "ac_micro",
            "AC + micro-batches",
            predict_checkpointed(captured, segments, piece(count), True),
            count,
            gradients if count > 1 else 0,
        ),
        Schedule("local", "local, drop-in loop", 1, False, local, {}, once.flops, with_heads),
        ours(
            "local_serial",
            "local, block-serial",
            _simulate.local_serial(small, count, made.groups, sizes),
            count,
            False,
        ),
        ours("refresh_serial", "refresh, block by block", made.refresh, made.refresh_pieces, False),
        ours("bp_serial", "BP, block-serial", found, count, True),
    ]
    return rows


def _state(weights: Weights, variant: Variant, local: bool, offsets: int) -> dict[str, int]:
    """Bytes that live between steps: weights, AdamW's state, offsets, heads with their AdamW state."""
    own = [n for n in weights.names() if weights.canonical(n) == n]
    state = {
        "parameters": sum(tensor_bytes(weights[n]) for n in own),
        "optimizer state": 2 * sum(tensor_bytes(weights[n]) for n in weights.trainable()),
    }
    if local:
        state["offsets"] = offsets
        state["heads"] = 3 * sum(tensor_bytes(p) for p in variant.heads.parameters())
    return state


# --- placeholders -----------------------------------------------------------------------------------------------------


def ordered(graph: ModelGraph, weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Weights and inputs in the order of the graph's placeholders."""
    queue = iter(inputs)
    return [
        weights[graph.weight_of[n]] if n in graph.weight_of else next(queue)
        for n in graph.graph.nodes
        if n.op == "placeholder"
    ]
