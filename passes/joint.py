"""Joint tracing: forward, local loss and backward of a block as one ATen graph, compiled as one program.

``torch.compile`` alone compiles a forward and a backward and decides what to keep between them; here nothing has to be
kept, and the backward is fused with the forward and the head. Structurally equal blocks share one compiled program.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bpfx.errors import BpfxWarning
from bpfx.passes.precision import autocast_state, outside_autocast
from bpfx.passes.programs import LocalGradient

Shapes = tuple[Any, ...]


class JointGradient:
    """One block's compiled local gradient, for the input shapes of its first call.

    Another shape (the last batch of an epoch) is left to the block's separately compiled forward, whose shapes are
    dynamic, rather than waited for.
    """

    def __init__(self, program: LocalGradient, backend: str, compiled: dict[str, Callable[..., Any]]) -> None:
        self.program, self.backend, self.compiled = program, backend, compiled
        self.shapes: Shapes | None = None
        self.run: Callable[..., Any] | None = None
        loss = program.local_loss
        task = loss.task if loss is not None else None
        self.weight_names = [*program.block.weights, *(task.names if task is not None else ())]
        self.head_names = loss.tensor_names if loss is not None else []
        self.gradient_names, _ = program.gradient_inputs()

    def __call__(self, values: list[Any]) -> tuple[Any, ...] | None:
        """The program's result, or ``None`` where this call is not for the compiled program."""
        shapes = (autocast_state(), *(tuple(v.shape) if isinstance(v, Tensor) else v for v in values))
        if self.shapes is None:
            self.shapes = shapes
            self._build(values)
        if self.run is None or shapes != self.shapes:
            return None
        arguments = (list(values), *self._tensors())
        values.clear()
        with torch.no_grad(), outside_autocast():  # the casts are in the graph
            outputs, loss, found = self.run(*arguments)
        grads: dict[str, Tensor] = {}
        for name, grad in zip(self.gradient_names, found, strict=True):
            if grad is not None:
                # A compiled program may return one tensor twice; gradients are changed in place later.
                grads[name] = grad.clone() if any(grad is other for other in grads.values()) else grad
        return (*outputs, loss, grads)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        program = self.program
        heads = program.local_loss.tensors_now() if program.local_loss is not None else []
        return [program.weights[n].detach() for n in self.weight_names], [t.detach() for t in heads]

    def _build(self, values: list[Any]) -> None:
        program = self.program
        wanted = set(self.gradient_names)

        def joint(inputs: list[Any], weights: list[Tensor], heads: list[Tensor]) -> Any:
            named = dict(zip((*self.weight_names, *self.head_names), (*weights, *heads), strict=True))
            named = {n: t.requires_grad_() if n in wanted else t for n, t in named.items()}
            with program.weights.override(named), torch.enable_grad():
                outputs, loss = program.losses(list(inputs))
                with outside_autocast():
                    found = torch.autograd.grad(loss, [named[n] for n in self.gradient_names], allow_unused=True)
            return [o.detach() if isinstance(o, Tensor) else o for o in outputs], loss.detach(), list(found)

        block, head = program.block, program.local_loss
        # A tracer does not pass compiled code. A head is no submodule of its loss, hence the dictionary.
        compiled_code, block.code = block.code, block.source
        compiled_head = head.call if head is not None else None
        if head is not None:
            head.__dict__["call"] = head.head
        try:
            given = (list(values), *self._tensors())
            gm = make_fx(joint, tracing_mode="fake", _allow_non_fake_inputs=True)(*given)
            kinds = [(tuple(t.shape), t.dtype) for part in given for t in part if isinstance(t, Tensor)]
            self.run = self.compiled.setdefault(f"{gm.code}{kinds}", torch.compile(gm, backend=self.backend))
        except Exception as error:  # whatever a tracer meets, the block still runs, in two compiled halves
            warnings.warn(
                f"block {block.index} ({block.name}) is not compiled as one program: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                BpfxWarning,
                stacklevel=2,
            )
        finally:
            block.code = compiled_code
            if head is not None:
                head.__dict__["call"] = compiled_head


def compile_local_gradients(programs: Sequence[LocalGradient], backend: str) -> None:
    """Give every program that can have one its joint program; it is traced and compiled at the first call.

    Blocks that draw random numbers keep their separately compiled parts: a joint graph draws in another way than the
    recomputation of the BP step, and both gradients of a refresh need the same draws. So do opaque blocks, horizons
    above 1, and heads that borrow the model's weights.
    """
    compiled: dict[str, Callable[..., Any]] = {}
    for program in programs:
        loss = program.local_loss
        apart = loss is not None and (loss.head.borrows or loss.random)
        if not (program.block.random or program.block.opaque or program.ahead or apart):
            program.__dict__["joint"] = JointGradient(program, backend, compiled)
