"""Capture: model + loss + example batch → one verified forward graph to the scalar loss.

Rungs, tried in order; the plan shows the one used and the reason for each fall:

1. non-strict ``torch.export`` of the whole model and loss;
2. the same with *opaque* modules: those whose Python no tracer passes run as themselves inside the graph;
3. strict ``torch.export`` (Dynamo), which keeps the backward of a custom ``autograd.Function``;
4. the whole model as one opaque block.

No rung is trusted before one verified step (see :mod:`bpfx.passes.verify`).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from bpfx.errors import BpfxError
from bpfx.passes import adapters, alias, opaque
from bpfx.passes.batch import BatchSpec, Loss, LossFn, call_model
from bpfx.passes.graph import OUTSIDE_LOSS, ModelGraph, Weights, module_name
from bpfx.passes.normalise import tidy
from bpfx.passes.reference import SEED, Reference, run_reference
from bpfx.passes.rng import preserve
from bpfx.passes.tracker import ModuleTracker
from bpfx.passes.verify import Mismatch, verify

MAX_FALLS = 12
VERIFY_SAMPLES = 4
EXTRA_DRAWS = 8


class Program(nn.Module):
    """The model and its loss as one function of the flat inputs: returns ``(loss, *output leaves)``."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, spec: BatchSpec) -> None:
        super().__init__()
        self.model = model
        self.outside_loss = None if loss_fn is None else Loss(loss_fn)
        self._spec = spec
        self.output_spec: pytree.TreeSpec | None = None
        self.output_constants: dict[int, Any] = {}

    def forward(self, *flat: Tensor) -> Any:
        args, kwargs = self._spec.unflatten(flat)
        kwargs = adapters.without_cache(self.model, kwargs)
        loss, output = call_model(self.model, self.outside_loss, args, kwargs)
        check_loss(loss)
        leaves, self.output_spec = pytree.tree_flatten(output)
        self.output_constants = {i: v for i, v in enumerate(leaves) if not isinstance(v, Tensor)}
        return (loss, *[v for v in leaves if isinstance(v, Tensor)])


@dataclasses.dataclass
class Captured:
    """A verified graph with everything needed to run it."""

    graph: ModelGraph
    spec: BatchSpec
    weights: Weights
    output_spec: pytree.TreeSpec
    output_constants: dict[int, Any]
    mutated_buffers: set[str]
    unreached: list[str]


def check_loss(loss: Any) -> None:
    """Raise unless ``loss`` is one floating-point number."""
    if not isinstance(loss, Tensor):
        raise BpfxError(f"the loss must be a scalar floating-point tensor, but is a {type(loss).__name__}")
    if loss.dim() > 0:
        raise BpfxError(
            f"the loss must be a scalar, but has shape {tuple(loss.shape)}; reduce it, with loss.mean() for example"
        )
    if not loss.is_floating_point():
        raise BpfxError(f"the loss has dtype {loss.dtype}, it must be floating point")


def make_weights(model: nn.Module, loss_fn: LossFn | None) -> Weights:
    """All weights of the model under their own names, and those of a loss module under ``outside_loss.``."""
    weights = Weights()
    weights.add_module("", model)
    weights.rewritten = [name for name in adapters.rewritten_weights(model) if name in weights]
    if loss_fn is not None:
        weights.add_module(OUTSIDE_LOSS, Loss(loss_fn))
    return weights


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Capture in train mode: a model whose root is in eval mode is switched over as a whole, and put back."""
    flags = {m: m.training for m in model.modules()}
    try:
        if not model.training:
            model.train()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def capture(model: nn.Module, loss_fn: LossFn | None, spec: BatchSpec, tensors: Sequence[Tensor]) -> Captured:
    """Return the first rung's graph that passes verification.

    Args:
        model: any module; it is run, never changed (buffers, gradients and random state are put back).
        loss_fn: ``loss_fn(output, target)``, or ``None`` for a model that returns its loss.
        spec: structure of the example batch.
        tensors: the example's tensor leaves.

    Raises:
        BpfxError: the plain model itself fails, its loss is no scalar, or nothing in it trains.
    """
    weights = make_weights(model, loss_fn)
    with train_mode(model):
        attempt = _Attempts(model, loss_fn, spec, list(tensors), weights)
        return attempt.run()


class _Attempts:
    def __init__(
        self, model: nn.Module, loss_fn: LossFn | None, spec: BatchSpec, tensors: list[Tensor], weights: Weights
    ) -> None:
        self.model, self.loss_fn, self.spec, self.weights = model, loss_fn, spec, weights
        self.full = tensors
        self.log: list[str] = []
        self.program = Program(model, loss_fn, spec)
        self.modules = {module_name(path): m for path, m in self.program.named_modules()}
        # A few samples are enough to compare two programs, and the caller may have no memory for plain BP.
        few = min(VERIFY_SAMPLES, spec.batch_size)
        self.few = spec.narrow(tensors, 0, few) if few < spec.batch_size else tensors

    def run(self) -> Captured:
        reference = self._reference(self.few)
        opaque_paths: dict[str, str] = dict(reference.suspects)
        for _ in range(MAX_FALLS):
            if "" in opaque_paths:
                break
            rung = "non-strict export" + (f" with {len(opaque_paths)} opaque modules" if opaque_paths else "")
            outcome = self._try(rung, reference, opaque_paths, strict=False)
            if isinstance(outcome, Captured):
                return outcome
            new = {path: why for path, why in outcome.items() if path not in opaque_paths}
            if not new:
                # Nothing to blame but the model as a whole; a checkpointed region is the first suspicion.
                new = {p: w for p, w in reference.checkpoints.items() if p not in opaque_paths}
            opaque_paths.update(new or {"": "no smaller part could be blamed"})
        outcome = self._try("strict export", reference, {}, strict=True)
        if isinstance(outcome, Captured):
            return outcome
        outcome = self._try("one opaque block", reference, {"": opaque_paths.get("", "all other rungs failed")})
        if isinstance(outcome, Captured):
            return outcome
        raise BpfxError("no way to capture this model was verified: " + "; ".join(self.log))

    def _reference(self, tensors: list[Tensor]) -> Reference:
        try:
            return run_reference(self.program, self.weights, tensors)
        except BpfxError:
            raise
        except Exception as error:
            if tensors is self.few and self.few is not self.full:
                self.few = self.full  # a model may need its whole batch (BatchNorm over 1×1 maps, a fixed size)
                return self._reference(self.full)
            raise BpfxError(f"the plain model fails on the example batch: {type(error).__name__}: {error}") from error

    def _try(
        self, rung: str, reference: Reference, opaque_paths: dict[str, str], strict: bool = False
    ) -> Captured | dict[str, str]:
        """One rung: the verified graph, or the modules to blame with the reason for each."""
        tensors = self.full if opaque_paths else self.few
        if tensors is not reference.tensors:
            reference = self._reference(tensors)
        tracker = ModuleTracker(self.program)
        try:
            with ExitStack() as stack:
                if not opaque_paths:
                    stack.enter_context(adapters.lycoris_without_module_dropout(self.model))
                if "" in opaque_paths:
                    graph = self._whole(tensors)
                else:
                    graph = self._export(tensors, opaque_paths, strict, tracker)
            mutated = reference.mutated | opaque.may_change(graph, self.weights, reference.mutated, self.program)
            tidy(graph, mutated)
            mismatch = verify(graph, self.weights, reference, tensors)
        except BpfxError:
            raise
        except Exception as error:
            where = error.path if isinstance(error, opaque.OutsideState) else tracker.culprit()
            reason = _first_line(error)
            self.log.append(f"{rung}: fell at {where or 'the model itself'}: {reason}")
            while where in opaque_paths and where:
                where = where.rpartition(".")[0]  # opaque already, so its caller is what cannot be traced
            return self._same_class(where, reason)
        if mismatch is None and not opaque_paths and not self._serves_all(graph):
            # The few samples' number is part of this graph (a division by it, a branch on it): capture the whole batch.
            self.few = self.full
            return self._try(rung, self._reference(self.full), opaque_paths, strict)
        if mismatch is not None:
            self.log.append(f"{rung}: not equal to the plain model: {mismatch.reason}")
            return self._blame(mismatch, reference)
        graph.log = [*self.log, f"{rung}: verified, loss and gradients equal to the plain model's"]
        graph.opaque = {p: opaque_paths[p] for p in _outermost(opaque_paths)}
        assert self.program.output_spec is not None
        return Captured(
            graph,
            self.spec,
            self.weights,
            self.program.output_spec,
            self.program.output_constants,
            mutated,
            self._unreached(reference),
        )

    def _serves_all(self, graph: ModelGraph) -> bool:
        """Whether a graph captured with a few samples is right for the whole batch."""
        if self.few is self.full:
            return True
        if not graph.dynamic or graph.guard is None:
            return False
        try:
            graph.guard(*self.full)
        except Exception:  # the guard's message speaks of symbols; the whole batch settles it
            return False
        return True

    def _unreached(self, reference: Reference) -> list[str]:
        """Trainable parameters that plain BP never reaches: a layer that chance left out is reached by another draw."""
        unreached = reference.unreached
        for seed in range(1, EXTRA_DRAWS + 1):
            if not unreached:
                break
            again = run_reference(self.program, self.weights, reference.tensors, SEED + seed).unreached
            unreached = [name for name in unreached if name in again]
        return unreached

    def _blame(self, mismatch: Mismatch, reference: Reference) -> dict[str, str]:
        return {p: f"{w} ({mismatch.reason})" for p, w in reference.checkpoints.items()}

    def _same_class(self, path: str, reason: str) -> dict[str, str]:
        """What one module's Python does, the others of its class do too (containers of torch.nn apart)."""
        if path == "" or isinstance(self.modules[path], (nn.Sequential, nn.ModuleList)):
            return {path: reason}
        kind = type(self.modules[path])
        same = [p for p, m in self.modules.items() if type(m) is kind and p]
        outer = _outermost(same)
        return dict.fromkeys(outer, reason) if path in outer else {path: reason}

    def _export(
        self, tensors: list[Tensor], opaque_paths: dict[str, str], strict: bool, tracker: ModuleTracker
    ) -> ModelGraph:
        dynamic = not opaque_paths
        outermost = {p: self.modules[p] for p in _outermost(opaque_paths)}
        with ExitStack() as stack:
            stack.enter_context(preserve(self.weights))
            stack.enter_context(_quiet())
            stack.enter_context(adapters.non_reentrant_checkpoint())
            if outermost:
                calls: list[opaque.OpaqueCall] = []
                with opaque.own_state(outermost), torch.enable_grad():
                    self.program(*(t.clone() for t in tensors))
                    with opaque.recorded(outermost, calls):
                        self.program(*(t.clone() for t in tensors))
                stack.enter_context(opaque.replaced(outermost, calls))
            if not strict:  # Dynamo would trace the tracker's own hooks
                stack.enter_context(tracker)
            stack.enter_context(tracker.slots_restored())
            shapes = (tuple(_dynamic_dims(t, self.spec.batch_size, len(tensors[0])) for t in tensors),)
            # Export marks its arguments as dynamic; the caller's own tensors stay unmarked.
            exported = torch.export.export(
                self.program,
                tuple(t.detach() for t in tensors),
                dynamic_shapes=shapes if dynamic else None,
                strict=strict,
            )
        return graph_of(exported, self.weights, self.spec, list(tensors))

    def _whole(self, tensors: list[Tensor]) -> ModelGraph:
        """The whole program as one opaque node."""
        calls: list[opaque.OpaqueCall] = []
        with preserve(self.weights), opaque.recorded({"": self.program}, calls), torch.enable_grad():
            self.program(*(t.clone() for t in tensors))
        call = calls[0]
        graph = fx.Graph()
        weight_of: dict[fx.Node, str] = {}
        for i, (name, tensor) in enumerate(zip(call.weight_names, call.own_weights(), strict=True)):
            node = graph.placeholder(f"w_{i}")
            node.meta["val"] = tensor
            weight_of[node] = self.weights.canonical(weight_name(name))
        inputs: list[fx.Node | None] = []
        for name, tensor in zip(self.spec.names, tensors, strict=True):
            node = graph.placeholder(name)
            node.meta["val"] = tensor
            inputs.append(node)
        root = nn.Module()
        result = graph.call_function(operator.getitem, (list(weight_of), list(inputs)))
        opaque.attach(root, result, call)
        result.meta["val"] = [torch.empty(s, dtype=d, device=v) for s, d, v in call.outputs]
        items = []
        for i in range(len(call.outputs)):
            item = graph.call_function(operator.getitem, (result, i))
            item.meta["val"] = result.meta["val"][i]
            items.append(item)
        graph.output(tuple(items))
        return ModelGraph(
            graph, root, weight_of, inputs, items[0], items[1:], self.spec.batch_size, {}, {}, False, None, []
        )


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths that lie inside no other of them."""
    paths = list(paths)
    return [p for p in paths if not any(q != p and (not q or p.startswith(q + ".")) for q in paths)]


def graph_of(
    exported: torch.export.ExportedProgram, weights: Weights, spec: BatchSpec, tensors: list[Tensor]
) -> ModelGraph:
    """Turn an exported program into a :class:`ModelGraph` over the model's own weights."""
    gm = exported.graph_module
    # A copy: the passes write concrete sizes into it, and the guards are made from the symbolic ones of the original.
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, copies))
    placeholders = {n.name: copies[n] for n in gm.graph.nodes if n.op == "placeholder"}
    weight_of: dict[fx.Node, str] = {}
    inputs: list[fx.Node | None] = []
    for entry in exported.graph_signature.input_specs:
        node = placeholders[entry.arg.name]
        if entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert entry.target is not None
            weight_of[node] = weights.canonical(weight_name(entry.target))
        elif entry.kind is InputKind.CONSTANT_TENSOR:
            name = f"constant.{entry.target}"
            weights.add_constant(name, exported.constants[str(entry.target)])
            weight_of[node] = name
        elif entry.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            raise RuntimeError(f"an input of kind {entry.kind} cannot be cut into blocks")
    for given, name in zip(inputs, spec.names, strict=True):
        assert given is not None
        given._rename(name)
        given.target = given.name
    opaque.inline_calls(graph, gm)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # notes the dtype of the capture; under autocast another one is right
    alias.show_writes(graph)
    results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    symbol = _batch_symbol(inputs, spec)
    dims = {n: d for n in graph.nodes if (d := _batch_dim(n, symbol, tensors[0].shape[0])) is not None}
    return ModelGraph(
        graph=graph,
        root=gm,
        weight_of=weight_of,
        inputs=inputs,
        loss=results[0],
        outputs=results[1:],
        batch_size=spec.batch_size,
        batch_dims=dims,
        opaque={},
        dynamic=symbol is not None,
        guard=_guard(exported) if symbol is not None else None,
        log=[],
    )


def weight_name(target: str) -> str:
    """Name in the model of a name in the capture's wrapper."""
    return target.removeprefix("model.")


def _guard(exported: torch.export.ExportedProgram) -> Callable[..., Any]:
    @functools.cache
    def built() -> Callable[..., Any] | None:
        with _quiet():
            module = exported.module()
        return getattr(module, "_guards_fn", None)

    def check(*tensors: Tensor) -> None:
        guards = built()
        if guards is not None:
            guards(*tensors)

    return check


def _dynamic_dims(tensor: Tensor, batch_size: int, few: int) -> dict[int, Any] | None:
    """Which dimensions may vary: the batch everywhere, and every dimension of integer tensors (tokens, masks)."""
    if tensor.dim() == 0:
        return None
    auto = torch.export.Dim.AUTO
    if not tensor.is_floating_point() and tensor.dim() == 2:
        return {0: auto, 1: auto}
    return {0: auto} if tensor.shape[0] in (few, batch_size) else None


def _batch_symbol(inputs: Sequence[fx.Node | None], spec: BatchSpec) -> Any:
    for node, per_sample in zip(inputs, spec.per_sample, strict=True):
        if node is not None and per_sample:
            size = node.meta["val"].shape[0]
            # Code that turned the size into a number, such as len(x), has settled the symbol: the graph is static.
            free = isinstance(size, torch.SymInt) and not size.node.expr.is_number
            return size if free else None
    return None


def _batch_dim(node: fx.Node, symbol: Any, few: int) -> int | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    for d, size in enumerate(value.shape):
        if symbol is not None:
            if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                return d
        elif int(size) == few:
            return d
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Export logs and prints whole graphs on the way to an exception; the plan's one line says what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"
