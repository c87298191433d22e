"""Lowering, second half: the programs of a block.

forward: values only, no trace left. local gradient: forward, head, loss and backward at once. vjp: recompute the
forward and differentiate it against the incoming cotangents. They are modules, so that the emitted steps can call
them, and they look their weights up by name at every run, so that they always train the model's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from bpfx.errors import BpfxError
from bpfx.losses import Given, Head, Weighted
from bpfx.passes.graph import HEADS, Weights
from bpfx.passes.lower import Block
from bpfx.passes.ownership import owned
from bpfx.passes.precision import outside_autocast, uncached
from bpfx.passes.rng import RngState, get_rng_state, set_rng_state
from bpfx.passes.tail import SubProgram

Grads = dict[str, Tensor]
Sink = Callable[[str, Tensor], None]


class TaskLoss:
    """The model's own loss as a function of predictions: ``task(inputs)(*predictions)`` is a scalar."""

    def __init__(self, suffix: SubProgram, weights: Weights, mutated: frozenset[str]) -> None:
        self.program, self.inputs, self.names = suffix.module, tuple(suffix.inputs), tuple(suffix.weights)
        self.weights, self.mutated, self.random = weights, mutated, suffix.random

    def __call__(self, inputs: Sequence[Any]) -> Callable[..., Tensor]:
        # What the loss keeps of its own (a class centre, a running scale) belongs to the model's predictions alone.
        constants = [self.weights[n].detach() for n in self.names]
        constants = [t.clone() if n in self.mutated else t for n, t in zip(self.names, constants, strict=True)]
        rest = (*(inputs[i] for i in self.inputs), *constants)
        return lambda *predictions: self.program(*predictions, *rest)


class BoundaryLoss(nn.Module):
    """A head and all it is given: ``forward(features, inputs, entering)`` returns a scalar.

    Args:
        block: whose boundary it is.
        head: computes the local loss.
        task: the model's own loss; ``None`` for a head that does not ask for it.
        weights: looks up what replaces the head's parameters for a while.
        weighted: the factor of the local loss.
    """

    head: Head
    call: Callable[..., Tensor]
    task: TaskLoss | None
    weights: Weights

    def __init__(self, block: int, head: Head, task: TaskLoss | None, weights: Weights, weighted: Weighted) -> None:
        super().__init__()
        # Owned by the step and the model, not by this module.
        self.__dict__.update(head=head, call=head, task=task, weights=weights)
        self.block, self.name, self.weight = block, weighted.loss.name, weighted.weight
        self.inputs = frozenset((*head.inputs, *(task.inputs if task is not None else ())))
        self.reads = frozenset((*head.borrows, *(task.names if task is not None else ())))
        dropout = any(isinstance(m, nn.modules.dropout._DropoutNd) for m in head.modules())
        self.random = head.random or dropout or (task is not None and task.random)
        self.parameter_names = [f"{HEADS}{block}.{name}" for name, _ in head.named_parameters()]
        self.tensor_names = self.parameter_names + [f"{HEADS}{block}.{name}" for name, _ in head.named_buffers()]

    def parameters_now(self) -> list[Tensor]:
        return [
            self.weights.override_of(n, p) for n, p in zip(self.parameter_names, self.head.parameters(), strict=True)
        ]

    def tensors_now(self) -> list[Tensor]:
        """Parameters and buffers of the head, in the order of ``tensor_names``."""
        return [*self.head.parameters(), *self.head.buffers()]

    def given(self, features: Sequence[Tensor], inputs: Sequence[Any], entering: Sequence[Tensor] = ()) -> Given:
        """What the head is called with."""
        task = self.task(inputs) if self.task is not None else None
        return Given(tuple(features), tuple(inputs), tuple(entering), task)

    def forward(self, features: Sequence[Tensor], inputs: Sequence[Any], entering: Sequence[Tensor] = ()) -> Tensor:
        return self._evaluate(self.call, features, inputs, entering)

    def plain(self, features: Sequence[Tensor], inputs: Sequence[Any], entering: Sequence[Tensor] = ()) -> Tensor:
        """The same, uncompiled: what is compiled cannot be differentiated twice."""
        return self._evaluate(self.head, features, inputs, entering)

    def _evaluate(
        self, call: Callable[..., Tensor], features: Sequence[Tensor], inputs: Sequence[Any], entering: Sequence[Tensor]
    ) -> Tensor:
        given = self.given(features, inputs, entering)
        # The draws of a head must not shift those of the blocks.
        state = get_rng_state() if self.random else ()
        swapped = self.weights.overridden(f"{HEADS}{self.block}.")
        with uncached():
            loss: Tensor = torch.func.functional_call(self.head, swapped, (given,)) if swapped else call(given)
        set_rng_state(state)
        if not isinstance(loss, Tensor) or loss.dim():
            shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise BpfxError(f"the head of {self.name!r} behind block {self.block} gave {shown}, not a 0-dim tensor")
        return loss if self.weight == 1.0 else loss * self.weight


class BlockProgram(nn.Module):
    """What the three programs of one block share: looking up weights and running the block's code."""

    block: Block
    weights: Weights

    def __init__(self, block: Block, weights: Weights) -> None:
        super().__init__()
        self.__dict__.update(block=block, weights=weights)
        # Inputs and outputs that carry a gradient in the whole model, by position.
        self.wanted = [i for i, n in enumerate(block.inputs) if n.name in block.differentiable]
        self.given = [i for i, n in enumerate(block.outputs) if n.name in block.differentiable]

    def evaluate(self, values: Sequence[Any], scratch: bool = False, frozen: bool = False) -> tuple[Any, ...]:
        """Run the block's code.

        Args:
            values: its inputs, in order.
            scratch: write running statistics into copies, so that the run leaves no trace.
            frozen: take parameters without their gradient (a block that is only looked through).
        """
        block = self.block
        tensors = [self.weights[n] for n in block.weights]
        if scratch and block.mutated:
            tensors = [t.clone() if n in block.mutated else t for n, t in zip(block.weights, tensors, strict=True)]
        if frozen:
            tensors = [t.detach() for t in tensors]
        if block.overwrites:
            values = [v.clone() if isinstance(v, Tensor) else v for v in values]
        with uncached():
            result: tuple[Any, ...] = block.code(*values, *tensors)
        return result

    def extra_repr(self) -> str:
        return f"{self.block.name}, {len(self.block.trainable)} parameters train"


class Forward(BlockProgram):
    """Values only: ``(*inputs) -> outputs``. Leaves no trace; the recomputation updates running statistics."""

    def forward(self, *values: Any) -> tuple[Any, ...]:
        # Compiled code is another program with gradients than without (its draws and its rounding may differ), and the
        # recomputation must be the same one. What autograd saved dies when this returns.
        with torch.set_grad_enabled(self.block.code is not self.block.source):
            leaves = list(values)
            if torch.is_grad_enabled():
                for i in self.wanted:
                    leaves[i] = values[i].detach().requires_grad_()
            return tuple(_detached(o) for o in self.evaluate(leaves, scratch=True))


class ForwardOnce(BlockProgram):
    """A block in which nothing trains: values only, running statistics updated."""

    def forward(self, *values: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return self.evaluate(values)


class LocalGradient(BlockProgram):
    """Forward, local loss and backward of one block: ``([values]) -> (*outputs, loss, grads)``; the list is emptied.

    With a horizon the blocks that follow are run as well, without a gradient of their own, and the loss is that of
    the last of them.
    """

    ahead: list[BlockProgram]
    local_loss: BoundaryLoss | None
    joint: Callable[[list[Any]], tuple[Any, ...] | None] | None

    def __init__(
        self,
        window: Sequence[Block],
        argument_names: Sequence[str],
        weights: Weights,
        local_loss: BoundaryLoss | None,
        feature_names: Sequence[str],
        entering_names: Sequence[str],
        user_inputs: Sequence[str],
    ) -> None:
        super().__init__(window[0], weights)
        self.__dict__.update(ahead=[BlockProgram(b, weights) for b in window[1:]], local_loss=local_loss, joint=None)
        self.argument_names = tuple(argument_names)
        self.feature_names, self.entering_names = tuple(feature_names), tuple(entering_names)
        self.user_inputs = tuple(user_inputs)
        self.last = window[-1]

    def losses(self, values: list[Any]) -> tuple[tuple[Any, ...], Tensor]:
        """The block's outputs and its local loss, with the autograd graph between them."""
        env: dict[str, Any] = dict(zip(self.argument_names, values, strict=True))
        values.clear()
        entering = [env[n] for n in self.entering_names]
        outputs = self._run(self, env)
        if self.ahead:
            # Looking ahead draws what the blocks ahead will draw themselves a moment later.
            state = get_rng_state()
            for program in self.ahead:
                self._run(program, env, ahead=True)
            set_rng_state(state)
        if self.local_loss is None:
            return outputs, env[self.last.outputs[0].name]
        inputs = [env.get(name) for name in self.user_inputs]
        return outputs, self.local_loss([env[n] for n in self.feature_names], inputs, entering)

    def _run(self, program: BlockProgram, env: dict[str, Any], ahead: bool = False) -> tuple[Any, ...]:
        block = program.block
        outputs = program.evaluate([env[n.name] for n in block.inputs], scratch=ahead, frozen=ahead)
        env.update(zip((n.name for n in block.outputs), outputs, strict=True))
        return outputs

    def forward(self, values: list[Any], sink: Sink | None = None) -> tuple[Any, ...]:
        """Run it.

        Args:
            values: what it reads, by the order of its argument names; emptied.
            sink: takes every gradient as soon as it is complete; the dictionary stays empty then.
        """
        if self.joint is not None and (result := self.joint(values)) is not None:
            *results, ready = result
            if sink is not None:
                for name in list(ready):
                    sink(name, ready.pop(name))
            return (*results, ready)
        with torch.enable_grad():
            outputs, loss = self.losses(values)
            names, tensors = self.gradient_inputs()
            scale = self.weights.loss_scale
            grads: Grads = {}
            if loss.requires_grad:  # not where nothing that trains reaches the loss
                _, grads = differentiate([loss], _times(loss, scale), names, tensors, [], sink, scale)
        # What carries no gradient in the whole model is no place of a stop-gradient, and takes no graph along.
        given = set(self.given)
        outputs = tuple(o if i in given else _detached(o) for i, o in enumerate(outputs))
        return (*outputs, loss.detach(), grads)

    def gradient_inputs(self) -> tuple[list[str], list[Tensor]]:
        names = list(self.block.trainable)
        tensors = [self.weights[n] for n in names]
        if self.local_loss is not None:
            names += self.local_loss.parameter_names
            tensors += self.local_loss.parameters_now()
        return names, tensors


class LossGradient(BlockProgram):
    """The last block of the BP step: ``(*inputs) -> (*outputs, *cotangents, grads)``; outputs[0] is the loss."""

    def forward(self, *values: Any) -> tuple[Any, ...]:
        outputs, cotangents, grads = self.pull(list(values))
        return (*outputs, *cotangents, grads)

    def pull(
        self, values: list[Any], share: float = 1.0, sink: Sink | None = None
    ) -> tuple[list[Any], list[Tensor | None], Grads]:
        """Outputs, cotangents of the inputs that carry a gradient, gradients; ``values`` is emptied.

        Args:
            values: the block's inputs.
            share: of this micro-batch in the loss of the batch; gradients are those of ``share * loss``.
            sink: as for :meth:`LocalGradient.forward`.
        """
        leaves = list(values)
        values.clear()
        for i in self.wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        names, wanted = self.block.trainable, [leaves[i] for i in self.wanted]
        with torch.enable_grad():
            outputs = self.evaluate(leaves)
            del leaves
            weights, scale = [self.weights[n] for n in names], self.weights.loss_scale
            # The cotangents stay scaled, down to the first block.
            given = _times(outputs[0], share * scale)
            found, grads = differentiate([outputs[0]], given, names, weights, wanted, sink, scale)
        return [_detached(o) for o in outputs], found, grads


class VectorJacobian(BlockProgram):
    """Recompute a block and differentiate it: ``(rng, *inputs, *cotangents) -> (*cotangents, grads)``.

    Running statistics are updated here, once; the forward sweep left them alone.
    """

    def forward(self, rng: RngState | None, *values: Any) -> tuple[Any, ...]:
        count = len(self.block.inputs)
        cotangents, grads = self.pull(rng, list(values[:count]), list(values[count:]))
        return (*cotangents, grads)

    def pull(
        self, rng: RngState | None, values: list[Any], cotangents: list[Tensor | None], sink: Sink | None = None
    ) -> tuple[list[Tensor | None], Grads]:
        """Cotangents of the inputs that carry a gradient, and gradients; both lists are emptied.

        Args:
            rng: random state to recompute with.
            values: the block's inputs.
            cotangents: of the outputs that carry a gradient.
            sink: as for :meth:`LocalGradient.forward`.
        """
        if rng is not None:
            set_rng_state(rng)
        leaves = list(values)
        values.clear()
        for i in self.wanted:
            leaves[i] = leaves[i].detach().requires_grad_()
        names, wanted = self.block.trainable, [leaves[i] for i in self.wanted]
        with torch.enable_grad():
            outputs = self.evaluate(leaves)
            del leaves
            pairs = [
                # The place in the autograd graph, not the tensor: what nobody saved dies before the backward begins.
                (get_gradient_edge(outputs[i]), c)
                for i, c in zip(self.given, cotangents, strict=True)
                if c is not None and outputs[i].requires_grad
            ]
            cotangents.clear()
            del outputs
            if not pairs:
                return [None] * len(wanted), {}
            weights = [self.weights[n] for n in names]
            ends, given, scale = [o for o, _ in pairs], [c for _, c in pairs], self.weights.loss_scale
            return differentiate(ends, given, names, weights, wanted, sink, scale)


def differentiate(
    outputs: Sequence[Any],
    cotangents: Sequence[Tensor] | None,
    names: Sequence[str],
    weights: Sequence[Tensor],
    leaves: Sequence[Tensor],
    sink: Sink | None,
    scale: float = 1.0,
) -> tuple[list[Tensor | None], Grads]:
    """Gradients of ``leaves``, and of ``weights`` by name (left out where there is none).

    Args:
        outputs: tensors or gradient edges.
        sink: takes the gradient of every weight as soon as it is complete, so that no second set of them exists beside
            one that they are added to.
        scale: of the loss behind ``cotangents``; the gradients of weights are divided by it.
    """
    if not weights and not leaves:
        return [], {}
    if sink is None:
        with outside_autocast():
            found = torch.autograd.grad(outputs, [*weights, *leaves], cotangents, allow_unused=True)
        grads = {n: g if scale == 1.0 else g / scale for n, g in zip(names, found, strict=False) if g is not None}
        return list(found[len(names) :]), grads
    before = [w.grad for w in weights]
    handles = []
    for name, weight in zip(names, weights, strict=True):
        weight.grad = None
        handles.append(weight.register_post_accumulate_grad_hook(partial(_hand_on, sink, name, scale)))
    try:
        with outside_autocast():
            torch.autograd.backward(outputs, cotangents, inputs=[*weights, *leaves])
    finally:
        for handle, weight, grad in zip(handles, weights, before, strict=True):
            handle.remove()
            weight.grad = grad
    return [leaf.grad for leaf in leaves], {}


def _hand_on(sink: Sink, name: str, scale: float, weight: Tensor) -> None:
    grad, weight.grad = weight.grad, None
    assert grad is not None
    sink(name, owned(grad) if scale == 1.0 else grad / scale)


def _times(loss: Tensor, factor: float) -> list[Tensor] | None:
    """The cotangent of ``factor * loss``."""
    return None if factor == 1.0 else [torch.full_like(loss, factor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def compile_blocks(blocks: Sequence[Block], losses: Sequence[BoundaryLoss | None], backend: str) -> None:
    """Compile the blocks' code and the heads with ``torch.compile``; equal blocks are compiled once."""
    compiled: dict[int, Any] = {}
    for block in blocks:
        if not block.opaque:
            source = block.source
            block.code = compiled.setdefault(id(source), torch.compile(source, backend=backend, fullgraph=True))
    for loss in losses:
        if loss is not None and not loss.head.borrows:
            loss.__dict__["call"] = torch.compile(loss.head, backend=backend)
