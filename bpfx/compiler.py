"""The compiler: runs the passes in order and keeps what they made, one variant per input shape where need be."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bpfx._alone import alone
from bpfx._arguments import OWN, check_loss_fn, check_model, parse_bytes
from bpfx._budget import within_budget
from bpfx._logging import logger
from bpfx._offset_state import OffsetState
from bpfx._predict import (
    Arrangement,
    Table,
    arrange,
    block_peaks,
    costs_of,
    drop_in_peaks,
    forecast,
    ordered,
    predict_bp,
    schedules,
)
from bpfx._variant import Variant
from bpfx.errors import BpfxError, BpfxWarning, suggest
from bpfx.losses import Assignment, Choice
from bpfx.offset import Offset
from bpfx.passes import emit, heads, joint, lower, normalise, partition, programs, shapes, tail
from bpfx.passes.batch import BatchSpec, LossFn, as_call
from bpfx.passes.capture import VERIFY_SAMPLES, Captured, capture
from bpfx.passes.graph import HEADS, ModelGraph, Weights, ancestors, tensor_bytes
from bpfx.passes.isolation import check_isolation
from bpfx.passes.liveness import LivenessError, node_saved_bytes
from bpfx.passes.own_loss import OwnLoss
from bpfx.passes.precision import autocast_state, uncached
from bpfx.passes.reduction import Reduction, find_reduction
from bpfx.passes.stages import make_stages
from bpfx.plan import BlockPlan, Crossing, Plan, Schedule

# "auto" looks for the fewest blocks whose local step stays below this share of plain BP's predicted peak.
AUTO_SHARE = 0.245
BACKENDS = ("eager", "inductor")
LocalLosses = Choice | Mapping[Any, Choice]


class Compiler:
    """Model + loss + example batch → plan, heads and the two steps.

    Args: as for :func:`bpfx.convert`.
    """

    @alone
    @uncached()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | str | None,
        batch: Any,
        blocks: partition.Blocks = "auto",
        memory_budget: int | str | None = None,
        local_loss: LocalLosses = "supervised",
        horizon: int | None = None,
        compile: str = "eager",
    ) -> None:
        check_model(model)
        if memory_budget is not None and blocks != "auto":
            raise BpfxError(
                f"blocks={blocks!r} and memory_budget={memory_budget!r} exclude each other: "
                "a budget chooses the number of blocks; pass one of the two"
            )
        if compile not in BACKENDS:
            raise BpfxError(f"compile={compile!r} is not known; {suggest(str(compile), BACKENDS)}")
        self.assignment = Assignment(local_loss)
        if horizon is None:
            horizon = self.assignment.horizon
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise BpfxError(f"horizon={horizon!r}: pass a whole number of at least 1 (1 is greedy, N is BP)")
        if isinstance(blocks, (list, tuple)) and not blocks:
            raise BpfxError("blocks=[] names no module; pass 'auto', a count, or the modules that begin a new block")
        self.model, self.backend, self.horizon = model, compile, horizon
        self.budget = parse_bytes(memory_budget) if memory_budget is not None else None
        args, kwargs = as_call(batch)
        outside = None if loss_fn == OWN else check_loss_fn(loss_fn)
        self.spec = BatchSpec.of(batch, outside is not None)
        making = self.assignment.rows
        if making is not None:
            self.spec = self.spec.expanded(making.rows, making.expand)
        with torch.random.fork_rng():  # rows that are made at random
            tensors = self.spec.flatten(args, kwargs)
        self.loss_fn = self._own_loss(tensors) if loss_fn == OWN else outside
        captured = capture(model, self.loss_fn, self.spec, tensors)
        _log_capture(captured)
        self.weights: Weights = captured.weights
        # What the audit runs on: a few samples, so that the caller's batch is not kept alive.
        # Whole samples, and two of them at least: a contrastive loss compares samples.
        rows = self.spec.rows
        few = min(-(-VERIFY_SAMPLES // rows) * rows, self.spec.batch_size)
        few = few if captured.graph.dynamic else self.spec.batch_size
        self.example = [t.clone() for t in self.spec.narrow(tensors, 0, few)]
        self.heads: nn.ModuleList | None = None
        self._notes: list[str] = []
        self._predictions = predictions = self._prepare(captured, tensors)
        self._check_targets(captured.graph)
        self._found = self._liveness(captured, predictions, tensors)
        self._micro_batches = 1
        cuts = self._choose(captured, tensors, blocks)
        nodes = captured.graph.compute_nodes()
        self._cut_after = [nodes[c].name for c in cuts]
        self.main = self._emit(captured, predictions, cuts)
        self.heads = self.main.heads
        self.plan = self._plan(self.main, tensors)
        self._log_blocks()
        if compile != "eager":
            self._compile(self.main)
        self._variants: dict[tuple[tuple[int, ...], ...], Variant] = {}
        if captured.unreached:
            warnings.warn(
                "even plain BP gives no gradient to "
                + ", ".join(captured.unreached)
                + "; they train under requires_grad=True but nothing reaches them",
                BpfxWarning,
                stacklevel=3,
            )

    @alone
    @uncached()
    def variant(self, tensors: Sequence[Tensor]) -> Variant:
        """The steps that fit these inputs; another shape of a static graph is captured and verified anew."""
        key = tuple(tuple(t.shape) for t in tensors)
        if key == tuple(self.spec.shapes):
            return self.main
        if key in self._variants:
            return self._variants[key]
        found = self.main
        if not self._fits(found, tensors):
            found = self._recapture(tensors)
        self._variants[key] = found
        return found

    def complete_at(self, named: Mapping[int, Sequence[tuple[str, Tensor]]]) -> dict[int, int]:
        """By block, where a reverse sweep has all gradients of these parameters: the first block that reads one."""
        first: dict[str, int] = {}
        for stage in reversed(self.main.stages):
            first |= dict.fromkeys(stage.block.trainable, stage.index)
        return {k: min([k, *(first[n] for n, _ in pairs if n in first)]) for k, pairs in named.items()}

    def trained_by(self, local: bool) -> dict[int, list[tuple[str, Tensor]]]:
        """Every parameter that trains, by the block after which it may be stepped: the last one that reads it.

        Args:
            local: in the local sweep, heads included; otherwise in the reverse sweep of the BP step.
        """
        stages = self.main.stages
        heads = {f"{HEADS}{n}": p for n, p in self.main.heads.named_parameters()}
        block_of: dict[str, int] = {}
        for stage in stages if local else reversed(stages):
            if stage.vjp is not None or local:
                block_of |= dict.fromkeys(stage.reads if local else stage.block.weights, stage.index)
                last = stage.index
            if local and isinstance(stage.local, programs.LocalGradient):
                block_of |= {n: stage.index for n in stage.local.gradient_inputs()[0] if n in heads}
        found: dict[int, list[tuple[str, Tensor]]] = {}
        for name in self.weights.trainable():
            # One that nothing reads has no gradient under plain BP either; some optimizer has it all the same.
            found.setdefault(block_of.get(name, last), []).append((name, self.weights[name]))
        for name, parameter in heads.items() if local else ():
            found.setdefault(block_of[name], []).append((name, parameter))
        return dict(sorted(found.items()))

    @functools.cached_property
    def reduction(self) -> Reduction:
        """How the losses of micro-batches make up the loss of the batch."""
        return find_reduction(self.main.captured, self.spec, self._predictions, self.example)

    def check_reduction(self, told: str | None) -> None:
        """Raise where micro-batches cannot be weighted.

        Raises:
            BpfxError: the loss of a batch is neither a mean nor a sum of its parts' losses, and ``told`` is ``None``.
        """
        if told is None and self.reduction.kind == "unknown":
            raise BpfxError(
                f"the loss of a batch does not follow from those of its micro-batches: {self.reduction.reason}; "
                "use micro_batches=1, or reduction='mean' or 'sum' where you know that to be right"
            )

    def shares(self, pieces: Sequence[Sequence[Tensor]], told: str | None = None) -> list[float]:
        """Share of each piece's loss in the loss of all pieces together.

        Args:
            told: ``"mean"`` or ``"sum"``, where the caller knows better.
        """
        if len(pieces) == 1:
            return [1.0]
        if told == "sum":
            return [1.0] * len(pieces)
        if told is None:
            self.check_reduction(told)
            return self.reduction.shares(pieces)
        sizes = [self.spec.samples(p) for p in pieces]
        return [n / sum(sizes) for n in sizes]

    def _fits(self, variant: Variant, tensors: Sequence[Tensor]) -> bool:
        graph = variant.captured.graph
        if not graph.dynamic or graph.guard is None:
            return False
        try:
            graph.guard(*tensors)
        except Exception:  # the guard's own message speaks of symbols; another capture settles it
            return False
        return True

    def _recapture(self, tensors: Sequence[Tensor]) -> Variant:
        shaped = [tuple(t.shape) for t in tensors]
        sized = next(s[0] for s, per in zip(shaped, self.spec.per_sample, strict=True) if per)
        spec = dataclasses.replace(self.spec, shapes=shaped, batch_size=sized)
        captured = capture(self.model, self.loss_fn, spec, list(tensors))
        logger("capture").info("captured anew for inputs of shape %s", shaped)
        _log_capture(captured)
        predictions = self._prepare(captured, tensors)
        nodes = captured.graph.compute_nodes()
        by_name = {n.name: i for i, n in enumerate(nodes)}
        cuts = [by_name.get(name, -1) for name in self._cut_after]
        if -1 in cuts or sorted(cuts) != cuts:
            raise BpfxError(
                f"inputs of shape {shaped} give another graph than the example's {self.spec.describe()}, and the "
                "blocks cannot be found in it; call bpfx.convert with a batch of this shape"
            )
        variant = self._emit(captured, predictions, cuts)
        if self.backend != "eager":
            self._compile(variant)
        return variant

    def _own_loss(self, tensors: Sequence[Tensor]) -> OwnLoss:
        """The local loss on the model's output, which a first capture shows."""
        if not self.assignment.label_free:
            raise BpfxError(
                f"loss_fn={OWN!r} trains without targets, but {self.assignment.wanting()} needs a task loss; "
                "pass a loss_fn and targets, or a label-free local loss"
            )
        own = OwnLoss(self.assignment.of(-1, ()))
        captured = capture(self.model, own, self.spec, tensors)
        outputs = self._prepare(captured, tensors, own)
        inputs = [heads.feature(captured.graph, n) for n in captured.graph.inputs if n is not None]
        features = [heads.feature(captured.graph, n) for n in outputs]
        own.build(features, inputs, 1)
        return own

    def _prepare(self, captured: Captured, tensors: Sequence[Tensor], loss_fn: LossFn | None = None) -> list[fx.Node]:
        shapes.propagate(captured.graph, captured.weights, tensors)
        return self.predictions_of(captured, loss_fn)

    def predictions_of(self, captured: Captured, loss_fn: LossFn | None = None) -> list[fx.Node]:
        """What the task loss of a captured graph is computed from."""
        outside = (loss_fn or self.loss_fn) is not None
        return tail.find_predictions(captured.graph, captured.weights, self.spec.targets if outside else None)

    def _check_targets(self, graph: ModelGraph) -> None:
        upstream = ancestors(graph.loss)
        for i in self.spec.targets:
            if graph.inputs[i] not in upstream:
                raise BpfxError(
                    f"the target {self.spec.names[i]!r} has no influence on the loss; "
                    "the last element of the batch is what loss_fn(output, target) receives"
                )

    def _choose(self, captured: Captured, tensors: Sequence[Tensor], blocks: partition.Blocks) -> list[int]:
        found = self._found
        if blocks != "auto":
            return partition.choose(found, blocks)
        if self.budget is not None:
            chosen = within_budget(self, captured, tensors, found, self.budget)
            self._micro_batches = chosen.micro_batches
            return chosen.cuts
        try:
            limit = AUTO_SHARE * predict_bp(captured, tensors).peak_bytes
        except LivenessError:
            return partition.choose(found, "auto")

        def peak(cuts: list[int]) -> float:
            with self.emitted(captured, cuts) as variant:
                return drop_in_peaks(self.weights, variant, tensors, ("local",))["local"]

        return partition.choose(found, "auto", peak, limit)

    def _liveness(self, captured: Captured, predictions: list[fx.Node], tensors: Sequence[Tensor]) -> Any:
        graph = captured.graph
        gm = fx.GraphModule(graph.root, graph.graph)
        values = ordered(graph, {n: self.weights[n] for n in graph.weight_of.values()}, tensors)
        try:
            saved = node_saved_bytes(gm, values)
        except LivenessError as error:
            saved = {n: tensor_bytes(n.meta.get("val")) for n in graph.compute_nodes()}
            self._notes.append(f"blocks are balanced by output sizes only: {error}")
        return partition.Liveness(graph, self.weights, saved, predictions, captured.mutated_buffers)

    @contextmanager
    def emitted(self, captured: Captured, cuts: list[int]) -> Iterator[Variant]:
        """The steps over these cuts, which need not be the ones that are chosen."""
        with normalise.undone(captured.graph):
            yield self._emit(captured, self._predictions, cuts)

    def _emit(self, captured: Captured, predictions: list[fx.Node], cuts: list[int]) -> Variant:
        # The capture's own: literals in the model's code may depend on the shapes that were captured.
        graph, weights = captured.graph, captured.weights
        nodes = graph.compute_nodes()
        bounds = [0, *(c + 1 for c in cuts), len(nodes)]
        block_of = {n: k for k in range(len(bounds) - 1) for n in nodes[bounds[k] : bounds[k + 1]]}
        normalise.make_functional(graph, block_of)
        blocks = lower.split(graph, weights, cuts, captured.mutated_buffers)
        built = self.heads
        if built is None:
            with torch.random.fork_rng():  # the caller's generator goes on as if nothing had been built
                built = heads.insert_heads(graph, weights, blocks, predictions, self.assignment, self.horizon)
        mutated = captured.mutated_buffers
        losses = heads.attach_losses(graph, weights, blocks, built, predictions, mutated, self.assignment, self.horizon)
        stages = make_stages(graph, weights, blocks, losses, self.horizon)
        local, bp = emit.emit_local_step(graph, stages), emit.emit_bp_step(graph, stages)
        check_isolation(local, blocks)
        return Variant(captured, blocks, stages, built, losses, local, bp)

    def _compile(self, variant: Variant) -> None:
        local = [p for p in variant.local_step.children() if isinstance(p, programs.LocalGradient)]
        joint.compile_local_gradients(local, self.backend)
        programs.compile_blocks(variant.blocks, variant.losses, self.backend)

    def _log_blocks(self) -> None:
        blocks = ", ".join(f"{b.index}: {b.name}" for b in self.plan.blocks)
        logger("partition").info("%d blocks: %s", len(self.plan.blocks), blocks)
        logger("partition").debug("%s", self.plan)
        for step in (self.main.local_step, self.main.bp_step):
            logger("graphs").info("%s%s", type(step).__name__, step.code)

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _plan(self, variant: Variant, tensors: Sequence[Tensor]) -> Plan:
        predicted: Mapping[str, int] = {}
        local_peaks: dict[int, int] = {}
        head_flops: dict[int, int] = {}
        try:
            local_peaks = block_peaks(self.weights, variant)
            costs = [(c.stage.index, c.head) for c in costs_of(self.weights, variant, tensors)]
            head_flops = {k + self.horizon - 1: cost.flops for k, cost in costs if cost is not None}
            predicted = forecast(self.weights, variant, tensors, self._notes)
            if self.backend != "eager" or autocast_state():
                # At once: compiled programs do not run on fake tensors, and autocast may be over.
                len(predicted)
        except LivenessError as error:
            self._notes.append(f"no prediction: {error}")
        rows = []
        for block in variant.blocks:
            loss = variant.losses[block.index]
            parameters = [n for n in block.weights if n in self.weights.parameter_names]
            rows.append(
                BlockPlan(
                    index=block.index,
                    name=block.name,
                    modules=block.modules,
                    parameters=sum(self.weights[n].numel() for n in parameters),
                    parameter_bytes=sum(tensor_bytes(self.weights[n]) for n in parameters),
                    parameter_names=list(block.trainable),
                    inputs=_crossings(block.inputs, block),
                    outputs=_crossings(block.outputs, block),
                    head=loss.head.description if loss is not None else None,
                    head_parameters=sum(p.numel() for p in loss.head.parameters()) if loss is not None else 0,
                    head_bytes=sum(tensor_bytes(p) for p in loss.head.parameters()) if loss is not None else 0,
                    head_flops=head_flops.get(block.index),
                    opaque=block.opaque,
                    local_peak_bytes=local_peaks.get(block.index),
                )
            )
        captured = variant.captured
        plan = Plan(rows, predicted, captured.graph.log, captured.unreached, self._notes, self.spec.batch_size)
        plan.micro_batches, plan.budget = self._micro_batches, self.budget
        return plan

    @alone
    @uncached()
    def arrange(self, count: int, together: bool, heads: bool) -> Arrangement | None:
        """How the block-serial trainer runs ``count`` micro-batches of the example, and what its steps need.

        Args:
            together: an exact step runs all micro-batches of a block together in any case.
            heads: whether there are local steps, and heads that learn.

        Returns:
            ``None`` where there is nothing to choose, or nothing can be predicted.
        """
        if count == 1:
            return None
        with FakeTensorMode(allow_non_fake_inputs=True):
            batch = [
                torch.empty(shape, dtype=t.dtype, device=t.device)
                for shape, t in zip(self.spec.shapes, self.example, strict=True)
            ]
        try:
            piece = functools.partial(self.spec.largest, batch)
            return arrange(self.weights, self.main, piece, count, together, heads)
        except LivenessError:
            return None

    @alone
    @uncached()
    def schedules(
        self,
        tensors: Sequence[Tensor],
        micro_batches: int,
        offset: Offset | None = None,
        one_by_one: bool | None = None,
    ) -> list[Schedule]:
        """Predictions of every way to take a step on a batch of these shapes.

        Args:
            one_by_one: the order of an exact step; ``None`` for the better one.

        Raises:
            BpfxError: an operator cannot be predicted.
        """
        variant = self.variant(tensors)
        sizes = [self.spec.samples(p) for p in self.spec.split(tensors, micro_batches)]
        relative = [size / max(sizes) for size in sizes]
        stored = OffsetState(offset.dtype if offset is not None else None)
        size = stored.bytes_for(self.weights[n] for b in variant.blocks[:-1] for n in b.trainable)
        try:
            with normalise.undone(variant.captured.graph):
                found = self._found
                table = Table(variant.captured, variant, found, size)
                piece = functools.partial(self.spec.largest, tensors)
                return schedules(table, tensors, piece, len(sizes), relative, one_by_one)
        except LivenessError as error:
            raise BpfxError(f"no prediction: {error}") from error


def _log_capture(captured: Captured) -> None:
    for line in captured.graph.log:
        logger("capture").info("%s", line)


def _crossings(nodes: Sequence[fx.Node], block: lower.Block) -> list[Crossing]:
    """The tensors among these values; a size that crosses as a number is no tensor and costs nothing."""
    found = []
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = tuple(int(s) for s in value.shape)
            differentiable = node.name in block.differentiable
            found.append(Crossing(node.name, shape, value.dtype, tensor_bytes(value), differentiable))
    return found
