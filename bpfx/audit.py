"""The isolation audit: which local loss reaches which parameter, measured with real gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from bpfx._alone import alone
from bpfx.errors import BpfxError
from bpfx.passes.graph import HEADS
from bpfx.passes.programs import LocalGradient
from bpfx.passes.rng import preserve
from bpfx.passes.stop_gradient import stop_gradient
from bpfx.step import Step


@dataclasses.dataclass
class Audit:
    """What the audit measured.

    Attributes:
        reaches: for every block's local loss the parameters to which it gives a gradient (heads as ``bpfx.heads.…``).
        allowed: for every block's local loss the parameters it may reach.
        names: the blocks' names.
        cut: whether the stop-gradients were in place.
    """

    reaches: dict[int, set[str]]
    allowed: dict[int, set[str]]
    names: list[str]
    cut: bool

    @property
    def leaks(self) -> list[tuple[int, str]]:
        """``(block of the loss, parameter)`` for every gradient that crosses a boundary."""
        return [(k, n) for k in sorted(self.reaches) for n in sorted(self.reaches[k] - self.allowed[k])]

    @property
    def ok(self) -> bool:
        return not self.leaks

    def __str__(self) -> str:
        title = "isolation audit" + ("" if self.cut else " (negative control: stop-gradients taken out)")
        lines = [title, f"{'loss of block':40s} {'own':>6s} {'head':>6s} {'leaks':>6s}"]
        for k in sorted(self.reaches):
            found = self.reaches[k]
            head = {n for n in found if n.startswith(HEADS)}
            leaks = found - self.allowed[k]
            own = found - head - leaks
            lines.append(f"{k:3d}  {self.names[k][:34]:34s}  {len(own):6d} {len(head):6d} {len(leaks):6d}")
        for k, name in self.leaks[:10]:
            lines.append(f"leak: the loss of block {k} reaches {name}")
        if len(self.leaks) > 10:
            lines.append(f"and {len(self.leaks) - 10} more")
        lines.append("isolated: every local loss stays in its block" if self.ok else f"{len(self.leaks)} LEAKS")
        return "\n".join(lines)


@alone
def audit(step: Step, *batch: Any, cut: bool = True) -> Audit:
    """Run the emitted local step and ask autograd, loss by loss, which parameters of the whole model it reaches.

    Parameters, buffers, gradients, offsets and random state are left as they are.

    Args:
        step: from :func:`bpfx.convert`.
        batch: the batch to run on, as for calling the step; a few samples of the example by default.
        cut: ``False`` takes the stop-gradients out first: the negative control, which must report leaks.

    Raises:
        BpfxError: ``step`` is no converted step.

    Example:
        >>> import torch, bpfx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> pair = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, pair, blocks=2)
        >>> bpfx.audit(step).ok, bpfx.audit(step, cut=False).ok
        (True, False)
    """
    if not isinstance(step, Step):
        raise BpfxError(f"bpfx.audit takes a converted step, not a {type(step).__name__}; call bpfx.convert first")
    compiler = step._compiler
    with torch.random.fork_rng():  # rows that are made at random
        tensors = compiler.spec.flatten(batch, {}) if batch else compiler.example
    variant = compiler.variant(tensors)
    interpreter = _Interpreter(variant.local_step, step, cut)
    with preserve(compiler.weights), torch.enable_grad():
        interpreter.run(*tensors)
    # The loss at the end of block k may reach block k and the `horizon - 1` blocks before it, and its own head.
    allowed: dict[int, set[str]] = {}
    for k in interpreter.reaches:
        seen = variant.blocks[max(0, k - compiler.horizon + 1) : k + 1]
        loss = variant.losses[k]
        allowed[k] = {n for b in seen for n in b.trainable} | set(loss.parameter_names if loss is not None else ())
    return Audit(interpreter.reaches, allowed, [b.name for b in variant.blocks], cut)


class _Interpreter(fx.Interpreter):
    """Runs the local step; at every block asks which parameters its loss reaches instead of taking the gradient."""

    def __init__(self, graph: fx.GraphModule, step: Step, cut: bool) -> None:
        super().__init__(graph)
        self.cut = cut
        weights = step._compiler.weights
        self.named: dict[str, Tensor] = {n: weights[n] for n in weights.trainable()}
        self.named.update((f"{HEADS}{n}", p) for n, p in step.heads.named_parameters())
        self.reaches: dict[int, set[str]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        program = self.fetch_attr(target)
        if not isinstance(program, LocalGradient):
            return super().call_module(target, args, kwargs)
        outputs, loss = program.losses(*args)
        named = list(self.named.values())
        found = torch.autograd.grad(loss, named, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
        reached = {n for n, g in zip(self.named, found, strict=False) if g is not None}
        self.reaches.setdefault(program.last.index, set()).update(reached)
        return (*outputs, loss.detach(), {})

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is stop_gradient and not self.cut:
            return args[0]
        return super().call_function(target, args, kwargs)
