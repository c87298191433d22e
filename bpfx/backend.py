"""``torch.compile(train_loss, backend="bpfx")``: the same passes as :func:`bpfx.convert`, behind Dynamo's capture.

``train_loss(x, y)`` computes model and loss; ``loss.backward()`` then deposits block-local gradients, offset included.
The heads belong to the backend, which trains them by default; :func:`steps` gives access to them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bpfx._dynamo import Argument, Frame, arguments_of, frame_of
from bpfx._gradients import Grads
from bpfx._variant import Variant
from bpfx.compiler import Compiler
from bpfx.convert import convert
from bpfx.errors import BpfxError, BpfxWarning, suggest
from bpfx.offset import Offset
from bpfx.passes.graph import HEADS
from bpfx.passes.traced import TracedGraph, TracedLoss, hoist_autocast
from bpfx.step import Step, StepResult

HEAD_LR = 1e-3
CONVERT = [n for n, p in inspect.signature(convert).parameters.items() if p.kind is p.KEYWORD_ONLY]
OPTIONS = (*CONVERT, "head_lr", "head_optimizer")
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def bpfx(gm: fx.GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend; ``torch.compile`` finds it by its name, without an import of bpfx.

    Args:
        gm: the graph of a function that returns a scalar loss.
        example_inputs: as Dynamo gives them.
        settings: ``options``, a mapping with the keywords of :func:`bpfx.convert` (``blocks``, ``local_loss``,
            ``offset``, …), ``head_lr`` (learning rate of Adam on the heads, by default 0.001; ``None``: the caller
            trains ``steps(model)[0].heads``), or ``head_optimizer``, a callable that takes the heads' parameters.
            The heads take one step in each ``backward()``, on a gradient that no loss scaling has touched.

    Raises:
        BpfxError: when the compiled function is called: it returns no scalar loss, a graph break split it, an option
            is unknown. In the call and not while Dynamo compiles, which would wrap it or go on without the backend.

    Example:
        >>> import torch, bpfx.backend
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> def train_loss(x, y):
        ...     return torch.nn.functional.cross_entropy(net(x), y)
        >>> compiled = torch.compile(train_loss, backend="bpfx", options={"blocks": 2})
        >>> compiled(torch.randn(6, 4), torch.randint(0, 2, (6,))).backward()
        >>> len(bpfx.backend.steps(net)[0].heads)
        1
    """
    trains = any(isinstance(e, Tensor) and e.requires_grad for e in example_inputs)
    if not (torch.is_grad_enabled() and trains):
        return gm.forward
    arguments = arguments_of(gm, example_inputs)
    frame = frame_of(arguments)
    try:
        if (mode := settings.get("mode")) is not None:
            raise BpfxError(f"mode={mode!r} belongs to inductor; with backend='bpfx' pass options={{'compile': …}}")
        return _Compiled(gm, arguments, frame, _Options.of(settings.get("options") or {}))
    except BpfxError as error:
        return _Refused(gm, str(error))


def steps(model: nn.Module) -> list[Step]:
    """The steps that the backend has made for functions that train this model, newest last.

    Each has ``heads``, ``plan``, ``diagnostics`` and a ``state_dict()`` like those of :func:`bpfx.convert`, with the
    state of the heads' optimizer. They live as long as Dynamo keeps the compiled function.
    """
    own = {id(p) for p in model.parameters()}
    return [s.step for s in list(_SESSIONS.values()) if own & {id(p) for p in s.step.model.parameters()}]


@dataclasses.dataclass(frozen=True)
class _Options:
    convert: dict[str, Any]
    head_optimizer: MakeOptimizer | None

    @classmethod
    def of(cls, given: dict[str, Any]) -> _Options:
        for name in given:
            if name not in OPTIONS:
                raise BpfxError(f"the option {name!r} of backend='bpfx' is not known; {suggest(name, OPTIONS, 12)}")
        make, rate = given.get("head_optimizer"), given.get("head_lr", HEAD_LR)
        if make is not None and "head_lr" in given:
            raise BpfxError("pass head_lr or head_optimizer, not both")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0):
            raise BpfxError(f"head_lr={rate!r}: pass a number above 0, or None to train the heads yourself")
        if make is None and rate is not None:

            def make(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
                return torch.optim.Adam(parameters, lr=rate)

        return cls({n: v for n, v in given.items() if n in CONVERT}, make)


class _Refused:
    """A graph that holds no training step: refused when it would train, plain where no gradient is asked for."""

    def __init__(self, gm: fx.GraphModule, message: str) -> None:
        self.gm, self.message = gm, message

    def __call__(self, *args: Any) -> Any:
        if torch.is_grad_enabled():
            raise BpfxError(self.message)
        return self.gm(*args)


class _Compiled:
    """What Dynamo calls in the place of one graph."""

    def __init__(self, gm: fx.GraphModule, arguments: list[Argument], frame: Frame, options: _Options) -> None:
        self.gm, self.frame, self.options = gm, frame, options
        for a in arguments:
            if a.kind == "number":
                raise BpfxError(
                    f"the number {a.name!r} changes between calls and is part of the graph; pass it as a tensor"
                )
        owners = list(dict.fromkeys(a.owner for a in arguments if a.owner))
        named = {o: "" if len(owners) == 1 else o.replace("']", "").split("['")[-1].split(".")[-1] for o in owners}
        self.roots = named
        self.arguments = [
            dataclasses.replace(a, name=".".join(filter(None, (named.get(a.owner, ""), a.name))))
            if a.kind == "weight"
            else a
            for a in arguments
        ]
        self.outputs: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.loss = _loss_among(self.outputs)
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.passed = {i: placeholders.index(o) for i, o in enumerate(self.outputs) if o in placeholders}
        computed = [i for i in range(len(self.outputs)) if i != self.loss and i not in self.passed]
        for i in computed:
            if not isinstance(self.outputs[i].meta.get("example_value"), Tensor):
                raise BpfxError(
                    f"the compiled function returns {self.outputs[i]}, a number that is computed from a shape; "
                    "return tensors, or compute it outside"
                )
        self.order = [self.loss, *computed]
        sources = [(a.kind, a.name, a.dim) for a in self.arguments]
        own = copy.deepcopy(gm)  # the plain one is what runs without gradients
        self.graph = TracedGraph(own, sources, self.loss, self.order, hoist_autocast(own))
        self.sessions: dict[Any, _Session] = {}

    def __call__(self, *args: Any) -> Any:
        weights = {a.name: v for a, v in zip(self.arguments, args, strict=True) if a.kind == "weight"}
        inputs = {a.name: (a.rank, v) for a, v in zip(self.arguments, args, strict=True) if a.kind == "input"}
        batch = {n: v for n, (_, v) in sorted(inputs.items(), key=lambda item: item[1][0])}
        if not (torch.is_grad_enabled() and self.frame.training()):
            return self.gm(*args)
        for name, value in batch.items():
            if value.requires_grad:
                raise BpfxError(
                    f"the input {name!r} asks for a gradient, and a local step gives none to inputs; "
                    "detach it, or make it a parameter"
                )
        key = tuple(id(v) for a, v in zip(self.arguments, args, strict=True) if a.parameter)
        if key not in self.sessions:
            self.sessions[key] = _session(self, key, weights, batch)
        found = iter(self.sessions[key].run(self.graph, weights, batch))
        computed = dict(zip(self.order, found, strict=True))
        return tuple(args[self.passed[i]] if i in self.passed else computed[i] for i in range(len(self.outputs)))


def _loss_among(outputs: Sequence[Any]) -> int:
    values = [o.meta.get("example_value") if isinstance(o, fx.Node) else None for o in outputs]
    losses = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad and v.dim() == 0]
    if len(losses) == 1:
        return losses[0]
    if losses:
        raise BpfxError(
            f"the compiled function returns {len(losses)} scalars that need a gradient; return the sum that is to be "
            "trained, and detach the others"
        )
    shapes = ", ".join(str(tuple(v.shape)) for v in values if isinstance(v, Tensor)) or "none"
    raise BpfxError(
        f"the graph holds no scalar loss to train (it returns tensors of shape {shapes}): either the compiled function "
        "does not return its loss, computed inside it from trainable parameters, or a graph break splits it; "
        "torch.compile(…, fullgraph=True) and TORCH_LOGS=graph_breaks show where: take prints, .item() and data-"
        "dependent branches out of it, or call bpfx.convert, which needs no whole graph"
    )


class _Session:
    """The step of one function over one set of weights; recompilations share it."""

    def __init__(self, compiled: _Compiled, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.traced = TracedLoss(compiled.graph, weights, compiled.roots)
        options = dict(compiled.options.convert)
        offset = options.pop("offset", Offset())
        if offset is not None and not isinstance(offset, Offset):
            raise BpfxError(f"offset={offset!r}: pass bpfx.Offset(…), or None for plain local training")
        with compiled.graph.precision():
            self.step = BackendStep(_GraphCompiler(self.traced, None, batch, **options), offset)
        self.step.train_heads_with(compiled.options.head_optimizer)

    def serves(self, graph: TracedGraph, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Raise where the step's blocks cannot be found in a graph."""
        self.traced.activate(graph)
        self.traced.refresh(weights)
        compiler = self.step._compiler
        with graph.precision():
            compiler.variant(compiler.spec.flatten((), batch))

    def run(self, graph: TracedGraph, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        self.traced.activate(graph)
        self.traced.refresh(weights)
        with graph.precision():
            return self.step(**batch)


_SESSIONS: weakref.WeakValueDictionary[Any, _Session] = weakref.WeakValueDictionary()


def _session(compiled: _Compiled, key: Any, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> _Session:
    whole = (compiled.frame.code, key)
    known = _SESSIONS.get(whole)
    if known is not None:
        try:
            known.serves(compiled.graph, weights, batch)
            return known
        except BpfxError as error:
            warnings.warn(
                f"a recompilation of {compiled.frame.code.co_name} begins with new heads and offsets: {error}",
                BpfxWarning,
                stacklevel=4,
            )
    _SESSIONS[whole] = session = _Session(compiled, weights, batch)
    return session


class _GraphCompiler(Compiler):
    """A compiler whose model has one graph for each recompilation."""

    model: TracedLoss

    def __init__(self, model: TracedLoss, loss_fn: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        self._first = model.active
        self._others: dict[Any, Variant] = {}
        super().__init__(model, loss_fn, batch, *args, **kwargs)

    def variant(self, tensors: Sequence[Tensor]) -> Variant:
        """The steps of the active graph that fit these inputs."""
        active = self.model.active
        if active is self._first:
            return super().variant(tensors)
        key = (id(active), tuple(tuple(t.shape) for t in tensors))
        if key not in self._others:
            served = (v for (g, _), v in self._others.items() if g == id(active) and self._fits(v, tensors))
            self._others[key] = next(served, None) or self._recapture(tensors)
        return self._others[key]


class BackendStep(Step):
    """The step behind a compiled function: as :class:`bpfx.Step`, and it may train its own heads.

    Attributes:
        head_optimizer: steps the heads in each backward; ``None`` where the caller does.
    """

    head_optimizer: torch.optim.Optimizer | None = None

    def train_heads_with(self, make: MakeOptimizer | None) -> None:
        """Let ``make(parameters)`` build the heads' optimizer; ``None`` leaves their gradients in ``.grad``."""
        parameters = list(self.heads.parameters())
        self.head_optimizer = make(parameters) if make is not None and parameters else None

    def _deliver(self, local: StepResult, grads: Grads) -> Any:
        if self.head_optimizer is None:
            return super()._deliver(local, grads)
        own = {n: grads.pop(n) for n in list(grads) if n.startswith(HEADS)}
        output = super()._deliver(local, grads)
        output[0].register_hook(lambda scale: self._step_heads(own))
        return output

    def _step_heads(self, grads: Grads) -> None:
        """One step of the heads, in the backward: it is theirs alone, so no loss scaling reaches it."""
        assert self.head_optimizer is not None
        bad = [n for n, g in grads.items() if not torch.isfinite(g).all()]
        if bad:
            warnings.warn(
                f"{bad[0]} has NaN or infinite gradients; the heads skip this step", BpfxWarning, stacklevel=2
            )
            return
        for name, parameter in self.heads.named_parameters():
            parameter.grad = grads.get(HEADS + name)
        self.head_optimizer.step()
        self.head_optimizer.zero_grad(set_to_none=True)

    def get_extra_state(self) -> dict[str, Any]:
        """As for a step, with the state of the heads' optimizer."""
        own = self.head_optimizer.state_dict() if self.head_optimizer is not None else None
        return {**super().get_extra_state(), "head_optimizer": own}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """As for a step, with the state of the heads' optimizer."""
        super().set_extra_state(state)
        if self.head_optimizer is not None and state.get("head_optimizer") is not None:
            self.head_optimizer.load_state_dict(state["head_optimizer"])
