"""One optimizer and one scheduler per block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bpfx._gradients import Grads
from bpfx.errors import BpfxError

NamedParameters = list[tuple[str, Tensor]]
OptimizerFactory = Callable[[NamedParameters], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


class BlockOptimizers:
    """Optimizers, and where asked schedulers, by the index of the block they step.

    Raises:
        BpfxError: what the factory returned is no optimizer, or one over other parameters, or needs a closure.
    """

    def __init__(
        self,
        named: Mapping[int, NamedParameters],
        factory: OptimizerFactory,
        scheduler: SchedulerFactory | None,
    ) -> None:
        self.named = named
        self.optimizers = {k: _made(factory, parameters) for k, parameters in named.items()}
        if scheduler is not None and not callable(scheduler):
            raise BpfxError(
                f"lr_scheduler={type(scheduler).__name__}: pass a function that makes a scheduler from an optimizer, "
                "as functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1000)"
            )
        self.schedulers = {k: scheduler(o) for k, o in self.optimizers.items()} if scheduler is not None else {}
        for made in self.schedulers.values():
            if not callable(getattr(made, "step", None)):
                raise BpfxError(f"the lr_scheduler factory returned a {type(made).__name__}, which has no step()")
        self.wants_loss = any(isinstance(s, ReduceLROnPlateau) for s in self.schedulers.values())

    def clip(self, k: int, grads: Grads, clip_norm: float | None, norm: float | None) -> float | None:
        """Hand the gradients of block k, clipped, to its parameters; they are taken out of ``grads``.

        Args:
            grads: by parameter name; a parameter without one is left to the optimizer's rule for ``grad=None``.
            clip_norm: largest norm, ``None`` for no clipping.
            norm: the norm to clip by where that is not the block's own.

        Returns:
            The norm of the block's gradient before clipping, ``None`` without clipping.
        """
        parameters = [p for _, p in self.named[k]]
        for name, parameter in self.named[k]:
            parameter.grad = grads.pop(name, None)
        total: Tensor | None = None
        if clip_norm is not None:
            total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            by = total if norm is None else total.new_tensor(norm)
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, by)
        return float(total) if total is not None else None

    def step(self, k: int) -> None:
        """Step block k, and free its gradients."""
        self.optimizers[k].step()
        for _, parameter in self.named[k]:
            parameter.grad = None

    def schedule(self, loss: float | None) -> None:
        """One step of every scheduler."""
        for scheduler in self.schedulers.values():
            if isinstance(scheduler, ReduceLROnPlateau):
                assert loss is not None
                scheduler.step(loss)
            else:
                scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {k: o.state_dict() for k, o in self.optimizers.items()},
            "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless the state has an entry for every optimizer and scheduler, and no other."""
        for kind, own in self._kinds():
            if state[kind].keys() != own.keys():
                raise BpfxError(
                    f"this state has {kind} for the blocks {sorted(state[kind])}, the trainer for {sorted(own)}; "
                    "convert with the same blocks, and make the trainer with the same arguments"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        for kind, own in self._kinds():
            for k, one in own.items():
                one.load_state_dict(state[kind][k])

    def _kinds(self) -> tuple[tuple[str, Mapping[int, Any]], ...]:
        return ("optimizers", self.optimizers), ("schedulers", self.schedulers)


def _made(factory: OptimizerFactory, named: NamedParameters) -> torch.optim.Optimizer:
    made = factory(list(named)) if callable(factory) else None
    if not isinstance(made, torch.optim.Optimizer):
        what = f"the factory returned a {type(made).__name__}" if callable(factory) else f"got {type(factory).__name__}"
        raise BpfxError(
            f"optimizer: {what}; pass a function of (name, parameter) pairs that returns an optimizer, as "
            "functools.partial(torch.optim.AdamW, lr=1e-3)"
        )
    wanted = {id(p): n for n, p in named}
    held = [p for group in made.param_groups for p in group["params"]]
    missing = [n for i, n in wanted.items() if i not in {id(p) for p in held}]
    if missing:
        raise BpfxError(
            f"optimizer: the factory left out {missing[0]!r}{f' and {len(missing) - 1} more' * (len(missing) > 1)}; "
            "return an optimizer over all the parameters it is given (set requires_grad=False to freeze one)"
        )
    foreign = [p for p in held if id(p) not in wanted]
    if foreign:
        raise BpfxError(
            f"optimizer: the factory returned an optimizer over other parameters ({len(foreign)} of them, the first of "
            f"shape {tuple(foreign[0].shape)}); every block has an optimizer of its own, over the pairs it is given"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise BpfxError(
            f"{type(made).__name__} evaluates the model several times a step and cannot be used block by block; "
            "use an optimizer whose step() needs no closure"
        )
    return made
