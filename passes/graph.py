"""The graph that all passes work on: one forward graph from inputs and weights to the scalar loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn


class Weights:
    """Parameters, buffers and constants by name, always the model's own current objects.

    A name is looked up in the module that owns it at every access, so an object that the model replaces
    (some adapters re-register parameters in their forward) is never stale.

    Example:
        >>> store = Weights()
        >>> store.add_module("", torch.nn.Linear(2, 1))
        >>> sorted(store.names())
        ['bias', 'weight']
    """

    def __init__(self) -> None:
        self._slots: dict[str, tuple[dict[str, Any], str]] = {}
        self._canonical: dict[str, str] = {}
        self._override: dict[str, Tensor] | None = None
        self.loss_scale = 1.0  # of the losses that are differentiated; gradients of weights are divided by it again
        self.parameter_names: list[str] = []
        self.buffer_names: list[str] = []
        self.rewritten: list[str] = []  # parameters that the model's own forward writes to

    def add_module(self, prefix: str, module: nn.Module) -> None:
        """Register every parameter and buffer of ``module`` under ``prefix``; tied ones get one canonical name."""
        first: dict[int, str] = {id(self[name]): name for name in self._slots}
        for path, owner in module.named_modules(remove_duplicate=False):
            for kind, names in (("_parameters", self.parameter_names), ("_buffers", self.buffer_names)):
                slots: dict[str, Any] = getattr(owner, kind)
                for key, value in slots.items():
                    if value is None:
                        continue
                    name = ".".join(part for part in (prefix, path, key) if part)
                    self._slots[name] = (slots, key)
                    self._canonical[name] = first.setdefault(id(value), name)
                    if self._canonical[name] == name and name not in names:
                        names.append(name)

    def add_constant(self, name: str, value: Tensor) -> None:
        """Register a tensor that belongs to no module (a literal in the model's code)."""
        self._slots[name] = ({name: value}, name)
        self._canonical[name] = name

    def canonical(self, name: str) -> str:
        """The one name of a tied tensor (the first in ``named_parameters`` order)."""
        return self._canonical[name]

    def slot(self, name: str) -> tuple[dict[str, Any], str]:
        """Where a weight lives: the owning module's dictionary and the key in it."""
        return self._slots[name]

    def names(self) -> Iterator[str]:
        return iter(self._slots)

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def __getitem__(self, name: str) -> Tensor:
        if self._override is not None and name in self._override:
            return self._override[name]
        slots, key = self._slots[name]
        return slots[key]

    def trainable(self) -> list[str]:
        """Canonical names of the parameters with ``requires_grad``."""
        return [name for name in self.parameter_names if self[name].requires_grad]

    def override_of(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, unless another one stands in for that name."""
        return tensor if self._override is None else self._override.get(name, tensor)

    def overridden(self, prefix: str) -> dict[str, Tensor]:
        """Stand-ins under ``prefix``, by the rest of their name."""
        if self._override is None:
            return {}
        return {n.removeprefix(prefix): t for n, t in self._override.items() if n.startswith(prefix)}

    @contextmanager
    def override(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Look names up in ``tensors`` first (a prediction runs the programs on fake tensors)."""
        before, self._override = self._override, tensors
        try:
            yield
        finally:
            self._override = before


@dataclasses.dataclass
class ModelGraph:
    """One captured forward graph.

    Attributes:
        graph: ATen-level graph; placeholders are weights and user inputs, the output is ``(loss, *outputs)``.
        root: owner of the sub-graph modules that ``get_attr`` nodes name (no_grad and autocast regions).
        weight_of: canonical weight name of each weight placeholder.
        inputs: user-input placeholders, in the order of the flattened batch (``None``: the graph does not use it).
        loss: the node of the scalar loss.
        outputs: nodes (or constants) of the model's own output leaves.
        batch_size: samples in the example batch.
        batch_dims: the dimension of each node's value that counts samples, where it has one.
        opaque: module paths that run as themselves, with the reason for each.
        dynamic: whether one graph serves other batch sizes.
        guard: raises when inputs leave the range that the graph was captured for; ``None`` for a static graph.
        log: what was tried, in order, with the reason for each fall.
    """

    graph: fx.Graph
    root: nn.Module
    weight_of: dict[fx.Node, str]
    inputs: list[fx.Node | None]
    loss: fx.Node
    outputs: list[Any]
    batch_size: int
    batch_dims: dict[fx.Node, int]
    opaque: dict[str, str]
    dynamic: bool
    guard: Callable[..., Any] | None
    log: list[str]

    def compute_nodes(self) -> list[fx.Node]:
        """Every node that computes something, in execution order."""
        return [n for n in self.graph.nodes if n.op in ("call_function", "call_module", "call_method")]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that ``node`` was recorded in, without the capture's own wrapper."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return strip_wrapper(stack[-1][0]) if stack else ""


def module_paths(node: fx.Node) -> list[str]:
    """Paths of every module around ``node``, outermost first."""
    return [strip_wrapper(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


# The capture wraps the model as ``model`` and the caller's loss as this.
OUTSIDE_LOSS = "outside_loss"
HEADS = "bpfx.heads."  # names of auxiliary heads begin so; a model may well have a part called "heads" itself


def module_name(path: str) -> str:
    """Path in the model of a path in the capture's wrapper: ``model.layer1.0`` → ``layer1.0``."""
    if path.startswith(OUTSIDE_LOSS):
        return path
    return path.removeprefix("model.") if path.startswith("model.") else ""


def strip_wrapper(path: str) -> str:
    """As :func:`module_name`; calls of the same module a second time carry a suffix ``@1`` there."""
    return module_name(path.split("@")[0])


def tensor_bytes(value: Any) -> int:
    """Bytes of a tensor (0 for anything else)."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def is_differentiable_dtype(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_no_grad_region(node: fx.Node) -> bool:
    """Whether ``node`` is a captured ``torch.no_grad()`` region (its result carries no gradient)."""
    return (
        node.op == "call_function" and "set_grad_enabled" in str(node.target) and bool(node.args) and not node.args[0]
    )


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node whose value ``node`` depends on."""
    flow = nx.DiGraph((a, n) for n in node.graph.nodes for a in n.all_input_nodes)
    return nx.ancestors(flow, node) if node in flow else set()


DETACHING = {torch.ops.aten.detach.default, torch.ops.aten.detach_.default}


def _makes_anew(node: fx.Node) -> bool:
    """Whether only the shape of what a node reads matters to it: ``zeros_like``, ``new_full`` and the like."""
    name = node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""
    return name.endswith("_like") or name.startswith("new_")


def passes_gradient(node: fx.Node) -> bool:
    """Whether a computed value carries a gradient as soon as something that it is made of does."""
    if node.op == "output" or node.target in DETACHING or _makes_anew(node) or is_no_grad_region(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    # A list or tuple of tensors is differentiable as a whole; its items are told apart by their dtype.
    return not isinstance(value, Tensor) or is_differentiable_dtype(value)


def differentiable_nodes(graph: ModelGraph, weights: Weights) -> set[fx.Node]:
    """Nodes whose value carries a gradient in plain BP.

    They depend on a trainable parameter, and the loss depends on them, through differentiable values.
    """
    live: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            name = graph.weight_of.get(node)
            if name is not None and weights[name].requires_grad:
                live.add(node)
            continue
        if passes_gradient(node) and any(arg in live for arg in node.all_input_nodes):
            live.add(node)
    reached = {graph.loss}
    stack = [graph.loss]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in live and node not in reached:
                reached.add(node)
                stack.append(node)
    return live & reached
