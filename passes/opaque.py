"""Opaque modules: what no tracer passes stays a call of the module itself, inside the same graph.

During capture a module that must stay opaque is replaced by one node, ``bpfx::opaque``, whose output shapes are
those of the plain run. In the block programs that node calls the module itself under autograd, so whatever its
Python does (data-dependent branches, hooks, a custom backward) happens as in the plain model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode

from bpfx.passes import adapters
from bpfx.passes.graph import ModelGraph, Weights

_RECURRENT = ("lstm", "gru", "rnn")
_CALLS: dict[int, OpaqueCall] = {}
torch.library.define("bpfx::opaque", "(Tensor[] weights, Tensor[] inputs, int call) -> Tensor[]")


@torch.library.impl("bpfx::opaque", "CompositeExplicitAutograd")
def _opaque(weights: Sequence[Tensor], inputs: Sequence[Tensor], call: int) -> list[Tensor]:
    raise RuntimeError("bpfx::opaque is replaced by the module's own call before anything runs")


@torch.library.register_fake("bpfx::opaque")
def _opaque_fake(weights: Sequence[Tensor], inputs: Sequence[Tensor], call: int) -> list[Tensor]:
    return [torch.empty(s, dtype=d, device=v) for s, d, v in _CALLS[call].outputs]


@dataclasses.dataclass(eq=False)
class OpaqueCall:
    """One call of an opaque module: how to rebuild its arguments, and what it returned.

    Called with ``(weights, inputs)`` it runs the module with these weights and returns its output tensors.
    """

    path: str
    module: nn.Module
    weight_names: list[str]
    weight_slots: list[tuple[dict[str, Any], str]]
    in_spec: pytree.TreeSpec
    in_constants: dict[int, Any]
    out_spec: pytree.TreeSpec
    out_constants: dict[int, Any]
    outputs: list[tuple[tuple[int, ...], torch.dtype, torch.device]]
    training: dict[nn.Module, bool]
    saved_bytes: int

    def own_weights(self) -> list[Tensor]:
        """The module's own tensors, looked up where they live: some adapters re-register them at every look
        through ``named_parameters``."""
        return [slots[key] for slots, key in self.weight_slots]

    def __call__(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        args, kwargs = _rebuild(inputs, self.in_constants, self.in_spec)
        # The module's own tensors need no swapping, and some adapters re-register parameters while they run,
        # which a swap would not survive. Only scratch buffers and fake tensors are swapped in.
        given = zip(self.weight_names, self.own_weights(), weights, strict=True)
        swapped = {name: tensor for name, own, tensor in given if own is not tensor}
        before = {m: m.training for m in self.training}
        try:
            for m, flag in self.training.items():
                m.training = flag
            with adapters.non_reentrant_checkpoint():
                if swapped:
                    output = torch.func.functional_call(self.module, swapped, args, kwargs)
                else:
                    output = self.module(*args, **kwargs)
        finally:
            for m, flag in before.items():
                m.training = flag
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


class _StandIn(torch.autograd.Function):
    """Shapes and saved bytes of an opaque call, without running it."""

    @staticmethod
    def forward(ctx: Any, call: OpaqueCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(torch.empty(call.saved_bytes, dtype=torch.uint8))
        ctx.inputs = [(t.shape, t.dtype) if t.requires_grad else None for t in tensors]
        return tuple(torch.empty(s, dtype=d, device=v) for s, d, v in call.outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *[None if i is None else torch.empty(i[0], dtype=i[1]) for i in ctx.inputs]


class Opaque(nn.Module):
    """An :class:`OpaqueCall` as a node of a graph. The caller's module is not registered under it."""

    def __init__(self, call: OpaqueCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        if detect_fake_mode([*weights, *inputs]) is not None:
            # A prediction must not run Python that may branch on values or keep what it is given.
            return list(_StandIn.apply(self.call, *weights, *inputs))
        return self.call(weights, inputs)

    def extra_repr(self) -> str:
        return self.call.path or "the whole model"


class OutsideState(Exception):
    """Another module changes what the one at ``path`` keeps from call to call, so it cannot run by itself."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path!r} keeps a tensor from call to call that another module resets")
        self.path = path


@contextmanager
def own_state(modules: dict[str, nn.Module]) -> Iterator[None]:
    """Run the plain model at least twice inside.

    Raises:
        OutsideState: a tensor that one of ``modules`` holds as a plain attribute is another one at a call than after
            the call before. In the plain model somebody else has put it there, and a graph does not do that.
    """
    left: dict[str, dict[tuple[int, str], Tensor]] = {}
    found: list[str] = []
    with ExitStack() as stack:
        for path, module in modules.items():

            def before(m: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                now, then = _kept(m), left.get(path)
                if then is not None and (now.keys() != then.keys() or any(now[k] is not then[k] for k in now)):
                    found.append(path)

            def after(m: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
                left[path] = _kept(m)

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield
    if found:
        raise OutsideState(found[0])


def _kept(module: nn.Module) -> dict[tuple[int, str], Tensor]:
    """Tensors in plain attributes, which are neither parameters nor buffers."""
    return {(i, k): v for i, m in enumerate(module.modules()) for k, v in m.__dict__.items() if isinstance(v, Tensor)}


def may_change(graph: ModelGraph, weights: Weights, changed: set[str], program: nn.Module) -> set[str]:
    """Canonical names of buffers that opaque modules may write on another batch: chance may leave out a layer on this.

    Which ones a run writes, no graph shows: running statistics, and those that another module of the same class wrote.

    Args:
        changed: buffers that the plain model changed on the example batch.
        program: holds every module.
    """
    owners = {id(m._buffers): m for m in program.modules()}

    def owner(name: str) -> tuple[nn.Module | None, str]:
        slots, key = weights.slot(name)
        return owners.get(id(slots)), key

    written = {(type(m), key) for m, key in map(owner, changed)}
    found = set()
    for node in graph.graph.nodes:
        if node.op == "call_module":
            for name in (graph.weight_of[a] for a in node.all_input_nodes if a in graph.weight_of):
                module, key = owner(name)
                if module is not None and module.training:
                    if getattr(module, "track_running_stats", False) or (type(module), key) in written:
                        found.add(name)
    return found


@contextmanager
def recorded(modules: dict[str, nn.Module], calls: list[OpaqueCall]) -> Iterator[None]:
    """Run the plain model inside: note arguments and outputs of every call of ``modules`` in ``calls``, in order."""
    saved: dict[int, int] = {}
    started: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        for path, module in modules.items():

            def before(m: nn.Module, args: tuple[Any, ...]) -> None:
                started.append(sum(saved.values()))

            def after(
                m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str = path
            ) -> None:
                calls.append(_note(path, m, args, kwargs, output, sum(saved.values()) - started.pop()))

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        yield


def _note(
    path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, saved_bytes: int
) -> OpaqueCall:
    in_leaves, in_spec = pytree.tree_flatten((args, kwargs))
    out_leaves, out_spec = pytree.tree_flatten(output)
    own = Weights()
    own.add_module("", module)
    names = [*own.parameter_names, *own.buffer_names]
    return OpaqueCall(
        path=path,
        module=module,
        weight_names=names,
        weight_slots=[own.slot(name) for name in names],
        in_spec=in_spec,
        in_constants={i: v for i, v in enumerate(in_leaves) if not isinstance(v, Tensor)},
        out_spec=out_spec,
        out_constants={i: v for i, v in enumerate(out_leaves) if not isinstance(v, Tensor)},
        outputs=[(tuple(v.shape), v.dtype, v.device) for v in out_leaves if isinstance(v, Tensor)],
        training={m: m.training for m in module.modules()},
        saved_bytes=saved_bytes,
    )


@contextmanager
def replaced(modules: dict[str, nn.Module], calls: Sequence[OpaqueCall]) -> Iterator[None]:
    """Trace the model inside: every call of ``modules`` becomes one ``bpfx::opaque`` node.

    The replacement is an instance attribute that is removed afterwards; the modules are as before.
    """
    queue = iter(calls)

    def forward_of(path: str, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(queue, None)
            if call is None or call.path != path:
                raise RuntimeError(f"opaque module {path!r} was called in another order than in the plain run")
            key = len(_CALLS)
            _CALLS[key] = call
            leaves = pytree.tree_leaves((args, kwargs))
            inputs = [v for v in leaves if isinstance(v, Tensor)]
            results = iter(torch.ops.bpfx.opaque.default(call.own_weights(), inputs, key))
            total = len(call.outputs) + len(call.out_constants)
            out = [call.out_constants[i] if i in call.out_constants else next(results) for i in range(total)]
            return pytree.tree_unflatten(out, call.out_spec)

        return forward

    patched: list[tuple[nn.Module, Any]] = []
    try:
        for path, module in modules.items():
            patched.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward_of(path, module)
        yield
    finally:
        for module, before in reversed(patched):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def inline_calls(graph: fx.Graph, root: nn.Module) -> None:
    """Replace every ``bpfx::opaque`` node by a call of its module, owned by ``root``."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.bpfx.opaque.default:
            weights, inputs, key = node.args
            attach(root, node, _CALLS.pop(key))
            node.args = (weights, inputs)


def attach(root: nn.Module, node: fx.Node, call: OpaqueCall) -> None:
    """Make ``node`` a call of ``call``, owned by ``root``."""
    stem = "opaque_" + (call.path.replace(".", "_") or "model")
    name, count = stem, 1
    while hasattr(root, name):
        name, count = f"{stem}_{count}", count + 1
    root.add_module(name, Opaque(call))
    node.op, node.target = "call_module", name


def _rebuild(inputs: Sequence[Tensor], constants: dict[int, Any], spec: pytree.TreeSpec) -> Any:
    tensors = iter(inputs)
    leaves = [constants[i] if i in constants else next(tensors) for i in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def draws(node: fx.Node, root: nn.Module) -> bool:
    """Whether ``node`` may draw random numbers."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), Opaque)
    if any(kind in str(node.target) for kind in _RECURRENT):  # their dropout is an argument, and their schema is silent
        return True
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return True
    inner = [a for a in node.all_input_nodes if a.op == "get_attr"]
    for attribute in inner:
        module = getattr(root, str(attribute.target), None)
        if isinstance(module, fx.GraphModule) and any(draws(n, module) for n in module.graph.nodes):
            return True
    return False
