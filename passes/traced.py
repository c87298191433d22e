"""A graph that Dynamo has traced, as a module that can be captured like any other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch import Tensor, fx, nn

_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


@dataclasses.dataclass
class TracedGraph:
    """One graph and where its placeholders' values come from.

    Attributes:
        gm: a graph of torch functions without weights of its own.
        sources: per placeholder ``("weight", path, 0)``, ``("input", name, 0)`` or ``("size", name, dimension)``.
        loss: position of the scalar loss among the outputs.
        outputs: positions of the outputs that the graph computes, the loss first.
        autocast: device type and dtype that it runs under, see :func:`hoist_autocast`.
    """

    gm: fx.GraphModule
    sources: Sequence[tuple[str, str, int]]
    loss: int
    outputs: Sequence[int]
    autocast: tuple[str, torch.dtype] | None = None

    def precision(self) -> AbstractContextManager[Any]:
        """To be entered around the capture and every run of the graph."""
        return nullcontext() if self.autocast is None else torch.autocast(*self.autocast, cache_enabled=False)


class TracedLoss(nn.Module):
    """Runs the active graph over weights that it holds under the paths of the traced model.

    Args:
        graph: the first graph; :attr:`active` may be set to others over the same weights.
        weights: parameters and buffers by path.
        roots: source text of the traced modules, and the path prefix of each; the paths of a graph's nodes follow it.
    """

    active: TracedGraph

    def __init__(self, graph: TracedGraph, weights: Mapping[str, Tensor], roots: Mapping[str, str]) -> None:
        super().__init__()
        # Not registered: a graph's tensor constants are part of the graph, not weights.
        self.__dict__["_roots"] = dict(roots)
        for path, tensor in weights.items():
            owner, name = self._owner(path)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name, tensor)
            else:
                owner.register_buffer(name, tensor)
        self.activate(graph)

    def activate(self, graph: TracedGraph) -> None:
        """Let :meth:`forward` run this graph."""
        if not graph.gm.meta.get("bpfx_paths"):
            rename_paths(graph.gm, self.__dict__["_roots"])
            graph.gm.meta["bpfx_paths"] = True
        self.__dict__["active"] = graph

    def refresh(self, weights: Mapping[str, Tensor]) -> None:
        """Take over tensors that the model has replaced (a buffer that moved, say)."""
        for path, tensor in weights.items():
            owner, name = self._owner(path)
            if getattr(owner, name) is not tensor:
                setattr(owner, name, tensor)

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        *parents, name = path.split(".")
        owner: nn.Module = self
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        return owner, name

    def forward(self, **inputs: Tensor) -> tuple[Any, ...]:
        """The loss, then the graph's other tensors."""
        graph = self.active
        values: list[Any] = []
        for kind, name, dim in graph.sources:
            if kind == "weight":
                owner, last = self._owner(name)
                values.append(getattr(owner, last))
            else:
                values.append(inputs[name] if kind == "input" else inputs[name].shape[dim])
        # With the metadata of the nodes: a capture of this module then knows the traced model's own paths.
        with traceback.preserve_node_meta():
            found = _Flat(graph.gm).run(*values)
        return tuple(found[i] for i in graph.outputs)


class _Flat(fx.Interpreter):
    """Runs checkpointed regions as a part of the graph: a block recomputes as a whole, and may be cut in there."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            region, *rest = args
            return _Flat(region).run(*rest)
        return super().call_function(target, args, kwargs)


def hoist_autocast(gm: fx.GraphModule) -> tuple[str, torch.dtype] | None:
    """Take the one autocast region of a training step out of the graph, and shield what lies outside of it.

    A region is one operator to a capture, and no cut goes through an operator. Run under the same autocast, the graph
    without the region computes the same, if what was outside (the loss, as a rule) becomes a region without autocast.

    Returns:
        Device type and dtype of the autocast to run under; ``None``, and the graph as before, where there is none, or
        more than one.
    """
    depth, regions = 0, list[list[fx.Node]]()
    for node in gm.graph.nodes:
        if node.target is _ENTER:
            if depth == 0:
                regions.append([node])
            depth += 1
        elif node.target is _EXIT:
            depth -= 1
            if depth == 0:
                regions[-1].append(node)
    if len(regions) != 1 or len(regions[0]) != 2:
        return None
    enter, leave = regions[0]
    device, dtype, enabled, cache = (*enter.args, None, True, True)[:4]
    if not enabled or not isinstance(dtype, torch.dtype):
        return None
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    for outside in (nodes[: nodes.index(enter)], nodes[nodes.index(leave) + 1 :]):
        if outside:
            with gm.graph.inserting_before(outside[0]):
                shield = gm.graph.call_function(_ENTER, (device, dtype, False, cache))
            with gm.graph.inserting_after(outside[-1]):
                gm.graph.call_function(_EXIT, (shield,))
    gm.graph.erase_node(leave)
    gm.graph.erase_node(enter)
    gm.recompile()
    return str(device), dtype


def rename_paths(gm: fx.GraphModule, roots: Mapping[str, str]) -> None:
    """Name the modules in a graph's metadata as a capture of :class:`TracedLoss` would name them."""
    for node in [n for g in gm.modules() if isinstance(g, fx.GraphModule) for n in g.graph.nodes]:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (_path(entry[0], roots), entry[1]) for key, entry in stack.items()}


def _path(text: str, roots: Mapping[str, str]) -> str:
    # As Dynamo names children of modules with a __getattr__ of their own.
    text = re.sub(r"__dict__\['_modules'\]\['([^']+)'\]", r"\1", text)
    for root, prefix in roots.items():
        if text == root or text.startswith(root + "."):
            return ".".join(filter(None, ("model", prefix, text[len(root) + 1 :])))
    return "model"
