"""Everything that a training step may change, copied before a measurement and put back after it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from bpfx.offset import RefreshData
from bpfx.passes.rng import preserved
from bpfx.step import Step
from bpfx.trainer import BlockTrainer


class _Kept:
    """One tensor: its values in host memory, and a weak reference, so that a step that replaces it frees it as ever."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._device = TensorWeakRef(tensor), tensor.device
        self._values = tensor.detach().to("cpu", copy=True)

    def back(self) -> Tensor:
        tensor = self._tensor()
        if tensor is None:
            return self._values.to(self._device, copy=True)
        tensor.data.copy_(self._values)  # past the version counter: what a graph has saved of it is as it was
        return tensor


class Replay(RefreshData):
    """Hands out the same batches for every refresh that is measured, and gives those it drew back at the end."""

    def __init__(self, source: RefreshData) -> None:
        super().__init__(source.data)
        self._given, self._before = source, dict(vars(source))
        # A new iterator where that takes nothing from anyone; otherwise the one under way.
        under_way = source._iterator
        if under_way is None and iter(source.data) is source.data:
            under_way = iter(source.data)
        self._source = RefreshData(source.data) if under_way is None else source
        self._under_way = source._iterator = under_way
        self._batches: list[Any] = []
        self._from_under_way: list[Any] = []
        self.position = 0

    def next(self) -> Any:
        if self.position == len(self._batches):
            self._batches.append(self._source.next())
            if self._under_way is not None and self._source._iterator is self._under_way:
                self._from_under_way.append(self._batches[-1])
        self.position += 1
        batch = self._batches[self.position - 1]
        return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, batch)

    def give_back(self) -> None:
        """The iterator under way begins again with what was drawn from it."""
        vars(self._given).update(self._before)
        if self._under_way is not None:
            self._given._iterator = itertools.chain(self._from_under_way, self._under_way)


@contextmanager
def unchanged(step: Step, trainer: BlockTrainer | None = None) -> Iterator[None]:
    """Around calls that train: everything is put back afterwards, bit for bit, after an exception as well.

    Inside there are no gradients, and a refresh takes its data from a :class:`Replay`.
    """
    if trainer is not None:
        trainer._idle.settle()
    slots: list[tuple[dict[str, Any], dict[str, Any]]]
    slots = [(s, dict(s)) for m in step.modules() for s in (m._parameters, m._buffers)]
    weights = step._compiler.weights
    tensors = {id(t): t for _, own in slots for t in own.values() if t is not None}
    tensors |= {id(weights[n]): weights[n] for n in weights.names()}  # literals in the model's code too
    kept = [_Kept(t) for t in tensors.values()]
    iteration, offset, data = step.iteration, step.offset, step._refresh_data
    seen, loss_scale = step._care.seen, step._loss_scale.state()
    correction = step._correction
    learnt = correction.progress() if correction is not None else None
    devices = {n: s.parts[0].device for n, s in step.offset_state._stored.items()}
    offsets = {n: _on_host(s) for n, s in step.offset_state.state().items()}
    restore_trainer = _trainer_state(trainer) if trainer is not None else None
    grads = [(p, p.grad) for p in step.parameters()]
    with preserved(), step.diagnostics.aside():
        replay = step._refresh_data = Replay(data) if data is not None else None
        for parameter, _ in grads:
            parameter.grad = None
        try:
            yield
        finally:
            if restore_trainer is not None:
                restore_trainer()
            for own, before in slots:
                if any(own.get(key) is not value for key, value in before.items()) or len(own) != len(before):
                    own.clear()
                    own.update(before)
            for one in kept:
                one.back()
            for parameter, grad in grads:
                parameter.grad = grad
            step.iteration, step.offset, step._refresh_data, step._forced = iteration, offset, data, None
            step._care.seen = seen
            step._loss_scale.load(loss_scale)
            if correction is not None and learnt is not None:
                correction.load_progress(learnt)
            if correction is not None:
                correction.state.load(offsets, devices.__getitem__)
            if replay is not None:
                replay.give_back()


def _trainer_state(trainer: BlockTrainer) -> Any:
    """Copies of what only a trainer has; the call that puts them back."""
    idle = trainer._idle
    optimizers = [
        (o, {p: _keep(s) for p, s in o.state.items()}, [_keep(_settings(g)) for g in o.param_groups])
        for o in trainer.optimizers.values()
    ]
    schedulers = [(s, copy.deepcopy(s.state_dict())) for s in trainer.schedulers.values()]
    results = dict(trainer.grad_norms), dict(trainer.local_losses)
    parked, broken = dict(idle._state), trainer.broken

    def restore() -> None:
        idle.settle()
        idle.release()
        for scheduler, state in schedulers:
            scheduler.load_state_dict(state)
        for optimizer, states, groups_before in optimizers:
            for parameter in [p for p in optimizer.state if p not in states]:
                del optimizer.state[parameter]
            for parameter, state in states.items():
                _refill(optimizer.state.setdefault(parameter, {}), _back(state))
            for group, settings in zip(optimizer.param_groups, groups_before, strict=True):
                _refill(group, {"params": group["params"], **_back(settings)})
        idle._state = parked
        for one in parked.values():
            one.release()  # a copy that was fetched ahead is of the state that is gone
        for target, before in zip((trainer.grad_norms, trainer.local_losses), results, strict=True):
            _refill(target, before)
        trainer.broken = broken

    return restore


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _refill(target: Any, values: Any) -> None:
    target.clear()
    target.update(values)


def _on_host(stored: dict[str, Any]) -> dict[str, Any]:
    return stored | {"parts": [p.detach().to("cpu", copy=True) for p in stored["parts"]]}


def _keep(value: Any) -> Any:
    """A copy of nested state that :func:`_back` puts into the tensors it came from."""
    if isinstance(value, Tensor):
        return _Kept(value)
    if isinstance(value, dict):
        return {key: _keep(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_keep(entry) for entry in value)
    return copy.deepcopy(value)


def _back(kept: Any) -> Any:
    if isinstance(kept, _Kept):
        return kept.back()
    if isinstance(kept, dict):
        return {key: _back(entry) for key, entry in kept.items()}
    if type(kept) in (list, tuple):
        return type(kept)(_back(entry) for entry in kept)
    return kept
