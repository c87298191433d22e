"""The compiler: runs the passes in order and keeps what they made, one variant per input shape where need be."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bpfx import losses as losses_module
from bpfx.errors import BpfxError, BpfxWarning, suggest
from bpfx.memory import format_bytes
from bpfx.passes import emit, heads, joint, lower, normalise, partition, programs, shapes, tail
from bpfx.passes.batch import BatchSpec, LossFn, as_call
from bpfx.passes.capture import VERIFY_SAMPLES, Captured, capture
from bpfx.passes.graph import ModelGraph, Weights, ancestors, tensor_bytes
from bpfx.passes.isolation import check_isolation
from bpfx.passes.liveness import LivenessError, node_saved_bytes, predict_peak
from bpfx.plan import BlockPlan, Crossing, Plan

# "auto" looks for the fewest blocks whose local step stays below this share of plain BP's predicted peak.
AUTO_SHARE = 0.245
BACKENDS = ("eager", "inductor")


@dataclasses.dataclass
class Variant:
    """The two steps for one range of input shapes."""

    captured: Captured
    blocks: list[lower.Block]
    heads: nn.ModuleList
    losses: list[programs.BoundaryLoss | None]
    local_step: fx.GraphModule
    bp_step: fx.GraphModule


class Compiler:
    """Model + loss + example batch → plan, heads and the two steps.

    Args: as for :func:`bpfx.convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        batch: Any,
        blocks: partition.Blocks = "auto",
        memory_budget: int | str | None = None,
        local_loss: str | losses_module.LocalLoss = "supervised",
        horizon: int = 1,
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
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1:
            raise BpfxError(f"horizon={horizon!r}: pass a whole number of at least 1 (1 is greedy, N is BP)")
        if isinstance(blocks, (list, tuple)) and not blocks:
            raise BpfxError("blocks=[] names no module; pass 'auto', a count, or the modules that begin a new block")
        self.local_loss = losses_module.get(local_loss)
        self.model, self.loss_fn, self.backend, self.horizon = model, loss_fn, compile, horizon
        self.budget = parse_bytes(memory_budget) if memory_budget is not None else None
        args, kwargs = as_call(batch)
        self.spec = BatchSpec.of(batch, loss_fn is not None)
        tensors = self.spec.flatten(args, kwargs)
        captured = capture(model, loss_fn, self.spec, tensors)
        self.weights: Weights = captured.weights
        # What the audit runs on: a few samples, so that the caller's batch is not kept alive.
        few = min(VERIFY_SAMPLES, self.spec.batch_size) if captured.graph.dynamic else self.spec.batch_size
        self.example = [t.clone() for t in self.spec.narrow(tensors, 0, few)]
        self.heads: nn.ModuleList | None = None
        self._notes: list[str] = []
        predictions = self._prepare(captured, tensors)
        self._check_targets(captured.graph)
        cuts = self._choose(captured, predictions, tensors, blocks)
        nodes = captured.graph.compute_nodes()
        self._cut_after = [nodes[c].name for c in cuts]
        self.main = self._emit(captured, predictions, cuts)
        self.heads = self.main.heads
        self.plan = self._plan(self.main, tensors)
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

    def variant(self, tensors: Sequence[Tensor]) -> Variant:
        """The steps that fit these inputs; another shape of a static graph is captured and verified anew."""
        key = tuple(tuple(t.shape) for t in tensors)
        if key == tuple(self.spec.shapes):
            return self.main
        if key in self._variants:
            return self._variants[key]
        found = self.main
        if not self._serves(tensors):
            found = self._recapture(tensors)
        self._variants[key] = found
        return found

    def _serves(self, tensors: Sequence[Tensor]) -> bool:
        graph = self.main.captured.graph
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

    def _prepare(self, captured: Captured, tensors: Sequence[Tensor]) -> list[fx.Node]:
        shapes.propagate(captured.graph, captured.weights, tensors)
        return tail.find_predictions(
            captured.graph, captured.weights, self.spec.targets if self.loss_fn is not None else None
        )

    def _check_targets(self, graph: ModelGraph) -> None:
        upstream = ancestors(graph.loss)
        for i in self.spec.targets:
            if graph.inputs[i] not in upstream:
                raise BpfxError(
                    f"the target {self.spec.names[i]!r} has no influence on the loss; "
                    "the last element of the batch is what loss_fn(output, target) receives"
                )

    def _choose(
        self, captured: Captured, predictions: list[fx.Node], tensors: Sequence[Tensor], blocks: partition.Blocks
    ) -> list[int]:
        graph = captured.graph
        gm = fx.GraphModule(graph.root, graph.graph)
        values = placeholder_values(graph, self.weights, tensors)
        try:
            saved = node_saved_bytes(gm, values)
        except LivenessError as error:
            saved = {n: tensor_bytes(n.meta.get("val")) for n in graph.compute_nodes()}
            self._notes.append(f"blocks are balanced by output sizes only: {error}")
        found = partition.Liveness(graph, self.weights, saved, predictions, captured.mutated_buffers)
        if blocks != "auto":
            return partition.choose(found, blocks)
        if self.budget is not None:
            return self._within_budget(captured, predictions, tensors, found, self.budget)
        try:
            limit = AUTO_SHARE * self._predict_bp(captured, tensors)
        except LivenessError:
            return partition.choose(found, "auto")

        def peak(cuts: list[int]) -> float:
            return self._predicted(captured, predictions, cuts, tensors, ("local",))["local"]

        return partition.choose(found, "auto", peak, limit)

    def _within_budget(
        self,
        captured: Captured,
        predictions: list[fx.Node],
        tensors: Sequence[Tensor],
        found: partition.Liveness,
        budget: int,
    ) -> list[int]:
        peaks: dict[int, float] = {}

        def peak(cuts: list[int]) -> float:
            # Every count is predicted exactly: the answer names the smallest peak that can be had.
            peaks[len(cuts) + 1] = max(self._predicted(captured, predictions, cuts, tensors).values())
            return peaks[len(cuts) + 1]

        cuts = partition.choose(found, "auto", peak, budget, thorough=True)
        if peaks.get(len(cuts) + 1, float("inf")) <= budget:
            return cuts
        count = min(peaks, key=peaks.__getitem__, default=0)
        reached = f"; the smallest predicted peak is {format_bytes(peaks[count])}, with {count} blocks" if peaks else ""
        raise BpfxError(
            f"memory_budget={format_bytes(budget)} is out of reach at batch {self.spec.batch_size}{reached}; "
            "use a smaller batch or a larger budget"
        )

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
                built = heads.insert_heads(graph, weights, blocks, predictions, self.local_loss, self.horizon)
        mutated = captured.mutated_buffers
        losses = heads.attach_losses(graph, weights, blocks, built, predictions, mutated)
        local = emit.emit_local_step(graph, weights, blocks, losses, self.horizon)
        bp = emit.emit_bp_step(graph, weights, blocks)
        check_isolation(local, blocks)
        return Variant(captured, blocks, built, losses, local, bp)

    def _compile(self, variant: Variant) -> None:
        local = [p for p in variant.local_step.children() if isinstance(p, programs.LocalGradient)]
        joint.compile_local_gradients(local, self.backend)
        programs.compile_blocks(variant.blocks, variant.losses, self.backend)

    # --- prediction ---------------------------------------------------------------------------------------------------

    def _predict_bp(self, captured: Captured, tensors: Sequence[Tensor]) -> int:
        gm = fx.GraphModule(captured.graph.root, captured.graph.graph)
        trainable = self.weights.trainable()

        def plain(weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
            given = {n: weights[n] for n in captured.graph.weight_of.values()}
            loss, *outputs = gm(*ordered(captured.graph, given, inputs))
            return loss, outputs, torch.autograd.grad(loss, [weights[n] for n in trainable], allow_unused=True)

        return predict_peak(plain, {n: self.weights[n] for n in self.weights.names()}, list(tensors)).peak_bytes

    def _predicted(
        self,
        captured: Captured,
        predictions: list[fx.Node],
        cuts: list[int],
        tensors: Sequence[Tensor],
        kinds: Sequence[str] = ("local", "bp_blocks", "refresh"),
    ) -> dict[str, int]:
        """Peaks of our two steps over these cuts, which need not be the ones that are chosen."""
        with normalise.undone(captured.graph):
            return self._peaks(self._emit(captured, predictions, cuts), tensors, kinds)

    def _tensors_of(self, variant: Variant) -> dict[str, Tensor]:
        """Every weight, and every tensor of the heads, by name."""
        named = {n: self.weights[n] for n in self.weights.names() if self.weights.canonical(n) == n}
        for loss in variant.losses:
            if loss is not None:
                named.update((f"heads.{loss.block}.{n}", t) for n, t in loss.head.named_parameters())
                named.update((f"heads.{loss.block}.{n}", t) for n, t in loss.head.named_buffers())
        return named

    def _peaks(
        self, variant: Variant, tensors: Sequence[Tensor], kinds: Sequence[str] = ("local", "bp_blocks", "refresh")
    ) -> dict[str, int]:
        named = self._tensors_of(variant)

        def run(step: Callable[..., Any]) -> int:
            def fn(weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
                with self.weights.override(weights):
                    return step(*inputs)

            return predict_peak(fn, named, list(tensors)).peak_bytes

        def refresh(*inputs: Tensor) -> Any:
            # As the runtime does it: the BP gradients wait while the local step runs.
            grads = variant.bp_step(*inputs)[1]
            return variant.local_step(*inputs), grads

        steps: dict[str, Callable[..., Any]] = {
            "local": variant.local_step,
            "bp_blocks": variant.bp_step,
            "refresh": refresh,
        }
        return {kind: run(steps[kind]) for kind in kinds}

    def _plan(self, variant: Variant, tensors: Sequence[Tensor]) -> Plan:
        predicted: dict[str, int] = {}
        local_peaks: dict[int, int] = {}
        try:
            predicted["bp"] = self._predict_bp(variant.captured, tensors)
            predicted.update(self._peaks(variant, tensors))
            local_peaks = self._block_peaks(variant)
        except LivenessError as error:
            predicted = {}
            self._notes.append(f"no prediction: {error}")
        opaque = variant.captured.graph.opaque
        if opaque and predicted:
            self._notes.append("opaque modules count with what one plain run of them saved")
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
                    opaque=block.opaque,
                    local_peak_bytes=local_peaks.get(block.index),
                )
            )
        return Plan(
            rows, predicted, variant.captured.graph.log, variant.captured.unreached, self._notes, self.spec.batch_size
        )

    def _block_peaks(self, variant: Variant) -> dict[int, int]:
        """Predicted peak of each block's local program alone, gradients included."""
        named = self._tensors_of(variant)
        peaks = {}
        values = {n.name: n.meta["val"] for n in variant.captured.graph.graph.nodes if "val" in n.meta}
        for name, program in variant.local_step.named_children():
            if not isinstance(program, programs.LocalGradient):
                continue
            mode = next(v.fake_mode for v in values.values() if isinstance(v, torch._subclasses.FakeTensor))
            fakes = {k: mode.from_tensor(t) for k, t in named.items()}
            inputs = [
                values[a].detach() if isinstance(values[a], Tensor) else values[a] for a in program.argument_names
            ]

            def fn(weights: dict[str, Tensor], given: list[Any], program: Any = program) -> Any:
                with self.weights.override(weights):
                    return program(given)

            peaks[int(name.split("_")[1])] = predict_peak(fn, fakes, inputs).peak_bytes
        return peaks


def check_model(model: Any) -> None:
    """Raise unless ``model`` is a module that can be converted."""
    from bpfx.step import Step

    if isinstance(model, Step):
        raise BpfxError("this model is converted already; call the step, or convert step.model anew")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrapped):
        raise BpfxError(
            f"the model is wrapped in {type(model).__name__}; convert the model inside it, model.module, instead"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise BpfxError(
            "the model is wrapped by torch.compile; convert the original module and pass compile='inductor'"
        )
    if not isinstance(model, nn.Module):
        raise BpfxError(f"the model is a {type(model).__name__}; pass a torch.nn.Module")


def parse_bytes(size: int | str) -> int:
    """``"2GiB"``, ``"500 MB"`` or a number of bytes.

    Example:
        >>> parse_bytes("1.5 KiB")
        1536
    """
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise BpfxError(f"memory_budget={size!r}: pass bytes as a number, or a size such as '2GiB' or '500MB'")
    return int(float(match[1]) * units[match[2].lower()])


def ordered(graph: ModelGraph, weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Weights and inputs in the order of the graph's placeholders."""
    queue = iter(inputs)
    return [
        weights[graph.weight_of[n]] if n in graph.weight_of else next(queue)
        for n in graph.graph.nodes
        if n.op == "placeholder"
    ]


def placeholder_values(graph: ModelGraph, weights: Weights, tensors: Sequence[Tensor]) -> list[Tensor]:
    """As :func:`ordered`, from the weight store."""
    return ordered(graph, {n: weights[n] for n in graph.weight_of.values()}, tensors)


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
