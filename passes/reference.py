"""The plain run that every capture is measured against: loss, gradients, buffers, and what looks hard to trace."""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint_module
from torch import Tensor, nn

from bpfx.errors import BpfxError
from bpfx.passes import adapters
from bpfx.passes.graph import Weights, module_name
from bpfx.passes.precision import outside_autocast, uncached
from bpfx.passes.rng import preserve, preserved

SEED = 20250424


@dataclasses.dataclass
class Reference:
    """One plain training step.

    Attributes:
        tensors: the inputs it ran on.
        loss: the scalar loss.
        grads: gradient by canonical parameter name; ``None`` where plain BP reaches the parameter not at all.
        buffers: buffers after the step.
        mutated: names of the buffers that the step changed.
        suspects: module paths that use a custom ``autograd.Function`` or draw from Python's or NumPy's generator.
        checkpoints: module paths that call ``torch.utils.checkpoint``.
    """

    tensors: Sequence[Tensor]
    loss: Tensor
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    mutated: set[str]
    suspects: dict[str, str]
    checkpoints: dict[str, str]

    @property
    def unreached(self) -> list[str]:
        """Trainable parameters that plain BP gives no gradient."""
        return [name for name, grad in self.grads.items() if grad is None]


def run_reference(program: nn.Module, weights: Weights, tensors: Sequence[Tensor], seed: int = SEED) -> Reference:
    """Run the untouched model once, seeded, and put everything it changed back.

    Raises:
        BpfxError: nothing in the model trains, or the loss does not depend on a trainable parameter.
    """
    trainable = weights.trainable()
    if not trainable:
        total = len(weights.parameter_names)
        raise BpfxError(
            f"no parameter of the model trains ({total} parameters, none with requires_grad=True); "
            "call requires_grad_(True) on those to train"
        )
    watch = _Watch(program)
    before = {name: (weights[name].detach().clone(), weights[name]._version) for name in weights.buffer_names}
    given = [t.clone() for t in tensors]  # a model may write into its input
    with preserve(weights), preserved(seed), adapters.non_reentrant_checkpoint(), torch.enable_grad():
        with watch.watching(), uncached():
            loss, *_ = program(*given)
        if not loss.requires_grad:
            raise BpfxError("the loss does not depend on any trainable parameter (is the model under no_grad?)")
        foreign = _foreign_leaves(loss, [*(weights[n] for n in weights.parameter_names), *given])
        # Before the backward: a checkpointed region that updates its BatchNorm again when it recomputes counts once.
        buffers = {name: weights[name].detach().clone() for name in weights.buffer_names}
        versions = {name: weights[name]._version for name in weights.buffer_names}
        with outside_autocast():
            found = torch.autograd.grad(loss, [weights[n] for n in trainable], allow_unused=True)
    # A buffer may be written without changing on this batch, and BatchNorm's kernels do not count their writes.
    mutated = {n for n, (b, v) in before.items() if versions[n] != v or not torch.equal(b, buffers[n])}
    grads: dict[str, Tensor | None] = dict(zip(trainable, found, strict=True))
    sparse = [name for name, grad in grads.items() if grad is not None and grad.is_sparse]
    if sparse:
        raise BpfxError(f"{sparse[0]!r} gets a sparse gradient; build its layer with sparse=False")
    loss = loss.detach()
    del _
    _check_leaves(foreign)
    return Reference(tensors, loss, grads, buffers, mutated, watch.suspects, watch.checkpoints)


def _foreign_leaves(loss: Tensor, known: Sequence[Tensor]) -> list[weakref.ref[Tensor]]:
    """The tensors that the loss trains and that belong to no module we see."""
    ids = {id(t) for t in known}
    seen: set[Any] = set()
    found = []
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in ids:
            found.append(weakref.ref(variable))
    return found


def _check_leaves(leaves: Sequence[weakref.ref[Tensor]]) -> None:
    """Raise when one of them has outlived its step, so that it is to be trained: it would silently stay as it is."""
    if any(leaf() is not None for leaf in leaves):
        gc.collect()
    for leaf in leaves:
        if (variable := leaf()) is not None:
            raise BpfxError(
                f"the loss trains a tensor of shape {tuple(variable.shape)} that belongs neither to the model nor to "
                "loss_fn as a module; pass the nn.Module that holds it as loss_fn, or register it in the model"
            )


class _Watch:
    """Notes which module calls a custom autograd Function, a checkpoint, or a generator that no tracer sees."""

    def __init__(self, program: nn.Module) -> None:
        self.paths = {id(m): path for path, m in program.named_modules()}
        self.stack: list[tuple[str, Any]] = []
        self.suspects: dict[str, str] = {}
        self.checkpoints: dict[str, str] = {}

    def here(self) -> str:
        return module_name(self.stack[-1][0] if self.stack else "")

    @contextmanager
    def watching(self) -> Iterator[None]:
        function_apply = torch.autograd.Function.__dict__["apply"]
        generator = checkpoint_module._checkpoint_without_reentrant_generator
        module = nn.modules.module
        here = threading.get_ident()

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            # Another thread's are none of this model's, and one belongs to torch 2.11's non-reentrant checkpoint.
            if threading.get_ident() == here and cls.__name__ != "_NoopSaveInputs":
                self.suspects.setdefault(self.here(), f"custom autograd.Function {cls.__name__}")
            return function_apply.__get__(None, cls)(*args, **kwargs)

        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                self.checkpoints.setdefault(self.here(), "torch.utils.checkpoint inside")
            return generator(*args, **kwargs)

        handles = [
            module.register_module_forward_pre_hook(lambda m, args: self._push(m)),
            module.register_module_forward_hook(lambda m, args, output: self._pop(m)),
        ]
        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        checkpoint_module._checkpoint_without_reentrant_generator = checkpointed
        try:
            yield
        finally:
            torch.autograd.Function.apply = function_apply  # type: ignore[method-assign]
            checkpoint_module._checkpoint_without_reentrant_generator = generator
            for handle in handles:
                handle.remove()

    def _push(self, m: nn.Module) -> None:
        if id(m) in self.paths:
            self.stack.append((self.paths[id(m)], _outside_generators()))

    def _pop(self, m: nn.Module) -> None:
        if id(m) not in self.paths or not self.stack:
            return
        path, before = self.stack[-1]
        after = _outside_generators()
        if before != after:
            self.suspects.setdefault(self.here(), "draws from Python's or NumPy's random generator")
            # The callers saw the same draw through this module; it is not theirs.
            self.stack = [(p, after) for p, _ in self.stack]
        self.stack.pop()


def _outside_generators() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state() if numpy else None
    return random.getstate(), (drawn[1].tobytes(), drawn[2]) if drawn is not None else None
