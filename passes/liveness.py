"""Peak memory of a computation before it is run, and what a graph saves for its backward pass.

The computation runs on fake tensors, which have shapes but no memory. Autograd is the real one, so buffers live exactly
as long as they would; what operators allocate inside themselves comes from :mod:`bpfx.passes.workspace`.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from bpfx.passes import workspace as _workspace


class LivenessError(RuntimeError):
    """The computation cannot run on fake tensors: it looks at values, or an operator has no fake version."""


@dataclass(frozen=True)
class LiveTensor:
    """One buffer alive at the peak: the operator that made it, its shape, its size in bytes."""

    op: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Prediction:
    """What one call would need.

    Attributes:
        peak_bytes: highest number of live bytes above what was live before the call; never below 0.
        timeline: ``(operator, live bytes)`` in order of execution; an operator with a workspace has two entries, the
            first with the workspace and the second without.
        at_peak: the largest buffers alive at the peak, largest first; an operator's workspace shows as
            ``"convolution (workspace)"``.
        categories: bytes alive at the peak by what :func:`mark` called them; ``"activations"`` for the rest.
        flops: floating-point operations of matrix products, convolutions and attention, a multiply-add as two, as
            ``torch.utils.flop_counter`` counts them.
    """

    peak_bytes: int
    timeline: list[tuple[str, int]]
    at_peak: list[LiveTensor]
    categories: dict[str, int]
    flops: int


def predict_peak(fn: Callable[..., Any], *args: Any, workspace: bool = True, largest: int = 10) -> Prediction:
    """Peak bytes of ``fn(*args)``, without running it and without allocating.

    Args:
        fn: any function of tensors; it may call ``backward``, ``torch.autograd.grad`` and ``torch.utils.checkpoint``.
            What it returns counts as well. It sees fake tensors, so it must not branch on values, and it must reach
            parameters and buffers through ``args``: real tensors that it closes over are replaced too, but
            ``.backward()`` would leave fake gradients on them.
        args: tensors, or lists, tuples and dicts of them: parameters, buffers, inputs. Not counted, never modified.
        workspace: add what operators allocate inside themselves (CPU only).
        largest: how many entries ``at_peak`` gets.

    Raises:
        LivenessError: the computation cannot run on fake tensors.

    Random states are the same before and after.

    >>> import torch
    >>> def step(p, x):
    ...     loss = torch.nn.functional.linear(x, p["weight"]).relu().sum()
    ...     return torch.autograd.grad(loss, list(p.values()))
    >>> weight = torch.ones(256, 64, requires_grad=True)
    >>> prediction = predict_peak(step, {"weight": weight}, torch.ones(1024, 64))
    >>> prediction.peak_bytes >= 2 * 1024 * 256 * 4
    True
    """
    mode, fakes = fakes_of(args)
    with _same_random_state():
        return _track(fn, fakes, mode, workspace, largest)


def _track(
    fn: Callable[..., Any], args: Sequence[Any], mode: FakeTensorMode | None, workspace: bool, largest: int = 10
) -> Prediction:
    """Run ``fn`` under the tracker, with tensors of whatever kind ``args`` holds."""
    tracker = _Tracker(workspace)
    tracker.ignore(args)
    try:
        with mode or nullcontext(), tracker, tracker.listening():
            result = fn(*args)  # kept until the prediction is made: what is returned counts
        prediction = tracker.prediction(largest)
        del result
        return prediction
    except Exception as error:
        if mode is None:
            raise
        raise LivenessError(f"cannot run on fake tensors: {_in_short(error)}") from error
    finally:
        tracker.close()


def _in_short(error: Exception) -> str:
    """The kind of an error and the first line of its text; tracers add whole graphs."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@contextmanager
def _same_random_state() -> Iterator[None]:
    python = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)


def fakes_of(args: Sequence[Any]) -> tuple[FakeTensorMode, Sequence[Any]]:
    """The arguments with every tensor replaced by a fake one; tensors that shared a storage still do.

    Returns:
        Their mode (that of the first tensor which is fake already, if there is one), and the arguments.

    Raises:
        LivenessError: a tensor has no fake version.
    """
    existing = next((leaf.fake_mode for leaf in tree_leaves(args) if isinstance(leaf, FakeTensor)), None)
    mode = existing or FakeTensorMode(allow_non_fake_inputs=True)

    def convert(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)

    try:
        return mode, tree_map_only(Tensor, convert, args)
    except Exception as error:
        raise LivenessError(f"an argument has no fake version: {_in_short(error)}") from error


class _Tracker(TorchDispatchMode):
    """Follows the storages that operators create until the last reference to them is gone."""

    def __init__(self, workspace: bool) -> None:
        super().__init__()
        self._workspace = workspace
        self._known: dict[int, weakref.ref[Any]] = {}  # by the storage's address, which is unique while it lives
        self._live = self._peak = self._peak_index = 0
        self._peak_extra = LiveTensor("", (), 0)
        self._events: list[tuple[int, LiveTensor | None]] = []  # (serial, made) or (serial, None: released)
        self._timeline: list[tuple[str, int]] = []
        self._serials: dict[int, int] = {}  # by the storage's address
        self._marks: dict[int, str] = {}
        self._flops = 0
        self._serial = 0
        self._open = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take what :func:`mark` says meanwhile."""
        token = _listener.set(self)
        try:
            yield
        finally:
            _listener.reset(token)

    def mark(self, category: str, values: Any) -> None:
        for storage in _storages(values):
            serial = self._serials.get(storage._cdata)
            if serial is not None and storage._cdata in self._known:
                self._marks[serial] = category

    def ignore(self, args: Any) -> None:
        """Storages that exist already are not counted, nor are the gradients of the tensors that own them."""
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor):
                self._add(leaf, None)
                if leaf.is_leaf and leaf.grad is not None:
                    self._add(leaf.grad, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self._flops += int(count(*args, **(kwargs or {}), out_val=result))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not tensors or any(given.alias_info is not None for given in func._schema.returns):
            return result  # views and in-place operators make no memory
        # A result without elements may stand for a buffer whose size only the kernel knows.
        kept = _workspace.kept_bytes(func, tensors) if self._workspace else 0
        for tensor in tensors:
            hidden, kept = (kept, 0) if kept and tensor.numel() == 0 else (0, kept)
            self._add(tensor, name, hidden)
        extra = _workspace.operator_workspace(func, args, tensors) if self._workspace else 0
        self._note(name, extra)
        return result

    def _add(self, tensor: Tensor, op: str | None, hidden: int = 0) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return
        size = (storage.nbytes() + hidden) if op is not None else 0
        if tensor.device.type == "cuda":
            size = -(-size // 512) * 512  # the caching allocator's granule
        serial = self._serial = self._serial + 1
        self._serials[key] = serial
        if size:
            self._live += size
            self._events.append((serial, LiveTensor(op or "", tuple(tensor.shape), size)))

        def released(reference: weakref.ref[Any]) -> None:
            if self._known.get(key) is reference:
                del self._known[key]
            if size and self._open:
                self._live -= size
                self._events.append((serial, None))

        self._known[key] = weakref.ref(storage, released)

    def _note(self, op: str, extra: int) -> None:
        if extra:
            self._timeline.append((op, self._live + extra))
        self._timeline.append((op, self._live))
        if self._live + extra > self._peak:
            self._peak, self._peak_index = self._live + extra, len(self._events)
            self._peak_extra = LiveTensor(f"{op} (workspace)", (), extra)

    def prediction(self, largest: int) -> Prediction:
        alive: dict[int, LiveTensor] = {}
        for serial, made in self._events[: self._peak_index]:
            if made is None:
                alive.pop(serial, None)
            else:
                alive[serial] = made
        entries = [*alive.values(), *([self._peak_extra] if self._peak_extra.bytes else [])]
        entries.sort(key=lambda entry: -entry.bytes)
        categories: dict[str, int] = {}
        for serial, made in [*alive.items(), *([(0, self._peak_extra)] if self._peak_extra.bytes else [])]:
            category = self._marks.get(serial, "activations")
            categories[category] = categories.get(category, 0) + made.bytes
        timeline = [*self._timeline, ("end", self._live)]
        return Prediction(self._peak, timeline, entries[:largest], categories, self._flops)

    def close(self) -> None:
        self._open = False
        self._known.clear()


_listener: ContextVar[_Tracker | None] = ContextVar("bpfx_liveness_tracker", default=None)


def mark(category: str, values: Any) -> None:
    """Say what these tensors are, inside a function whose peak is predicted; does nothing anywhere else.

    >>> import torch
    >>> def fn(x):
    ...     y = x.exp()
    ...     mark("boundaries", y)
    ...     return y.sum()
    >>> predict_peak(fn, torch.ones(1024)).categories["boundaries"]
    4096
    """
    tracker = _listener.get()
    if tracker is not None:
        tracker.mark(category, values)


# --- per node -------------------------------------------------------------------------------------------------------


def node_saved_bytes(gm: fx.GraphModule, args: Sequence[object]) -> dict[fx.Node, int]:
    """Bytes each node of a graph saves for backward, beyond what is saved or given already.

    Args:
        gm: graph of a forward pass. It runs once, node by node, on fake tensors with gradients enabled.
        args: values of its placeholders, in order (parameters as leading placeholders, then the batch); real or fake.

    Returns:
        Bytes for every node. A storage counts once, for the node that saves it first (a ReLU's output for the ReLU, not
        for the convolution that reads it); placeholders and attributes of ``gm`` count for nobody.

    Raises:
        LivenessError: an operator cannot run on fake tensors.

    Real tensors in ``args`` and in ``gm`` are not modified.

    >>> import torch
    >>> from torch import fx
    >>> gm = fx.symbolic_trace(lambda w, x: torch.relu(x @ w).sum())
    >>> found = node_saved_bytes(gm, (torch.ones(8, 4, requires_grad=True), torch.ones(16, 8)))
    >>> [(node.name, size) for node, size in found.items() if size]
    [('relu', 256)]
    """
    return _interpret(gm, args).saved


def node_output_bytes(gm: fx.GraphModule, args: Sequence[object]) -> dict[fx.Node, int]:
    """Bytes of each node's output tensors; 0 for views, in-place results and what is given. Arguments as above.

    >>> import torch
    >>> from torch import fx
    >>> gm = fx.symbolic_trace(lambda x: torch.relu(x).view(-1))
    >>> [(node.name, size) for node, size in node_output_bytes(gm, (torch.ones(16, 8),)).items()]
    [('x', 0), ('relu', 512), ('view', 0), ('output', 0)]
    """
    return _interpret(gm, args).made


def _interpret(gm: fx.GraphModule, args: Sequence[object]) -> _NodeInterpreter:
    mode, fakes = fakes_of(args)
    runner = _NodeInterpreter(gm, mode, fakes)
    with _same_random_state():
        try:
            with mode, torch.enable_grad():
                runner.run(*fakes)
        except Exception as error:
            raise LivenessError(f"cannot run on fake tensors: {_in_short(error)}") from error
    return runner


class _NodeInterpreter(fx.Interpreter):
    """Runs a graph node by node and books new storages: those saved for backward, and those returned."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, args: Sequence[object]) -> None:
        super().__init__(gm)
        self._mode = mode
        self.saved: dict[fx.Node, int] = {}
        self.made: dict[fx.Node, int] = {}
        # Storages stay alive here, so that an address is never met twice.
        self._given = _Seen()
        self._given.add(args)
        self._saved, self._made = _Seen(), _Seen()
        self._node: fx.Node | None = None

    def fetch_attr(self, target: str) -> Any:
        value = tree_map_only(Tensor, self._mode.from_tensor, super().fetch_attr(target))
        self._given.add(value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        fakes: dict[str, Tensor] = {name: self._mode.from_tensor(tensor) for name, tensor in own.items()}
        self._given.add(fakes)
        return torch.func.functional_call(module, fakes, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        self.saved.setdefault(n, 0)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            result = super().run_node(n)
        self.made[n] = sum(s.nbytes() for s in _storages(result) if s not in self._given and self._made.add_one(s))
        return result

    def _pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor  # a real weight inside an opaque node
        for storage in _storages(tensor):
            if storage not in self._given and self._saved.add_one(storage) and self._node is not None:
                self.saved[self._node] += storage.nbytes()
        # A detached alias: returning the tensor itself would tie a result to its own graph.
        return tensor.detach()


class _Seen:
    """A set of storages that keeps them alive."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        return storage._cdata in self._storages

    def add_one(self, storage: torch.UntypedStorage) -> bool:
        """Whether it was new."""
        if storage in self:
            return False
        self._storages[storage._cdata] = storage
        return True

    def add(self, values: Any) -> None:
        for storage in _storages(values):
            self.add_one(storage)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
