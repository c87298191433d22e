"""What bpfx reads from Dynamo: where the placeholders of a graph come from. The one file with its private API."""

from __future__ import annotations

import dataclasses
import inspect
import re
import weakref
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator

_OWNED = re.compile(r"\._(?:modules|parameters|buffers)\[")
_KEY = re.compile(r"\['([^']*)'\]")
_ARGUMENT = re.compile(r"[LG]\['(\w+)'\]")


@dataclasses.dataclass
class Argument:
    """Where one placeholder of a graph gets its value.

    Attributes:
        kind: ``"weight"`` (a tensor that a module holds), ``"input"``, ``"size"`` (of an input's dimension) or
            ``"number"``.
        name: for a weight its path below ``owner``; for an input a readable name; for a size the input's.
        owner: the source text of the outermost module that holds the weight.
        parameter: whether a weight is a parameter; otherwise it is a buffer.
        dim: dimension of a size.
        rank: position among the arguments of the compiled function; those that it takes from outside come last.
    """

    kind: str
    name: str
    owner: str = ""
    parameter: bool = False
    dim: int = 0
    rank: int = 0


@dataclasses.dataclass
class Frame:
    """The function that is being compiled.

    Attributes:
        code: the same object for every recompilation.
        modules: the outermost modules that hold weights, where they can be told.
    """

    code: CodeType
    modules: list[weakref.ref[nn.Module]]

    def training(self) -> bool:
        """Whether any of the modules is in training mode; true where none is known."""
        alive = [m for ref in self.modules if (m := ref()) is not None]
        return not alive or any(m.training for m in alive)


def frame_of(arguments: Sequence[Argument]) -> Frame:
    """The frame that Dynamo compiles now; to be called by a backend."""
    translator: Any = InstructionTranslator.current_tx()
    scope = {"L": dict(translator.f_locals), "G": translator.f_globals}
    closure = getattr(translator, "closure", None) or ()
    scope["L"].update((n, c.cell_contents) for n, c in zip(translator.f_code.co_freevars, closure, strict=False))
    modules = []
    for owner in dict.fromkeys(a.owner for a in arguments if a.owner):
        try:
            found = eval(owner, scope)
        except Exception:  # a source that only Dynamo can reconstruct
            continue
        if isinstance(found, nn.Module):
            modules.append(weakref.ref(found))
    return Frame(translator.f_code, modules)


def arguments_of(gm: fx.GraphModule, examples: Sequence[Any]) -> list[Argument]:
    """What every placeholder stands for, in order."""
    code = InstructionTranslator.current_tx().f_code
    nodes = gm.graph.find_nodes(op="placeholder")
    found = [_argument(n, e, code) for n, e in zip(nodes, examples, strict=True)]
    _name_apart([a for a in found if a.kind == "input"])
    sizes: dict[str, tuple[str, int]] = {}
    for node, argument in zip(nodes, found, strict=True):
        value = node.meta.get("example_value")
        if argument.kind == "input" and isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(str(size.node.expr), (argument.name, dim))
    for node, argument in zip(nodes, found, strict=True):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and (place := sizes.get(str(value.node.expr))) is not None:
            argument.kind, (argument.name, argument.dim) = "size", place
    return found


def _argument(node: fx.Node, example: Any, code: CodeType) -> Argument:
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    text = getattr(source, "name", node.name)
    text = str(text() if callable(text) else text)  # a method before torch 2.12
    # As Dynamo looks into modules with a __getattr__ of their own, PEFT's for one.
    text = re.sub(r"\.__dict__\['(_modules|_parameters|_buffers)'\]", r".\1", text)
    if not isinstance(example, Tensor):
        return Argument("number", node.name)
    owned = _OWNED.search(text)
    if owned is not None:
        path = ".".join(_KEY.findall(text[owned.start() :])) or node.name
        return Argument("weight", path, text[: owned.start()], isinstance(example, nn.Parameter))
    local = _ARGUMENT.match(text)
    taken = inspect.getargs(code)
    names = [*taken.args, *filter(None, (taken.varargs, taken.varkw))]
    given = local is not None and text.startswith("L") and local[1] in names
    if isinstance(example, nn.Parameter):
        return Argument("weight", _plain(text), parameter=True)
    rank = names.index(local[1]) if given and local is not None else len(names)
    keys = [k for k in re.findall(r"\['?(\w+)'?\]", text) if k]
    return Argument("input", _plain("_".join(keys[1:] or keys)) or node.name, rank=rank)


def _plain(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _name_apart(arguments: Sequence[Argument]) -> None:
    seen: dict[str, int] = {}
    for argument in arguments:
        if not argument.name.isidentifier():
            argument.name = f"x_{argument.name}"
        count = seen[argument.name] = seen.get(argument.name, -1) + 1
        if count:
            argument.name = f"{argument.name}_{count}"
