"""The memory-first trainer: a block is stepped, and its gradient freed, before the next block runs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bpfx import _shelf
from bpfx._alone import alone
from bpfx._correction import EXACT, REFRESH
from bpfx._exact import exact_sweep
from bpfx._gradients import Grads
from bpfx._hooks import refuse_steps_in_backward
from bpfx._idle import IdleState
from bpfx._loss_scale import refuse_halves
from bpfx._parallel import Ranks, idle_sweep, ranks_of_trainer, summed
from bpfx._refresh import restore_statistics, running_statistics
from bpfx._serial import Piece, bp_sweep, local_sweep
from bpfx._sharded import refuse_divided
from bpfx._simulate import singly
from bpfx._stepping import BlockOptimizers, OptimizerFactory, SchedulerFactory
from bpfx.errors import BpfxError, BpfxWarning
from bpfx.memory import format_bytes
from bpfx.passes.graph import HEADS
from bpfx.passes.rng import get_rng_state, set_rng_state
from bpfx.plan import Schedule
from bpfx.step import Step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("local", "bp")
CLIPS = ("block", "global")


class BlockTrainer:
    """Trains block by block: all micro-batches, gradient, clipping, optimizer and freeing of one block, then the next.

    Gradient accumulation, clipping, schedulers and freeing gradients early compose here, because a block's gradient is
    complete while no other block's exists. The memory of a local step hardly grows with the depth of the model; exact
    BP steps, which the default offset takes where stored offsets would not last, store the boundaries of the batch, or
    with micro-batches, where that is less, those of one of them and the gradients of all blocks.

    Args:
        step: what :func:`bpfx.convert` returned.
        optimizer: makes one block's optimizer: called with a list of ``(name, parameter)`` pairs, which every optimizer
            of ``torch.optim`` accepts, as in ``functools.partial(torch.optim.AdamW, lr=1e-3)``. For groups (no weight
            decay on norms, say) pass a function that sorts the pairs by name.
        micro_batches: pieces into which each batch is split, sizes as equal as can be; ``None`` for what the plan
            chose under ``memory_budget``, otherwise 1. A batch with fewer samples gives fewer pieces. Each piece counts
            by its share of the loss: by samples, by the targets that count, or in full where the loss is a sum.
        clip_norm: largest norm of a gradient; ``None`` for no clipping.
        clip: ``"block"`` clips every block's gradient by itself. ``"global"`` clips by the norm of the whole gradient,
            exactly as ``clip_grad_norm_`` over all parameters would; no block can be stepped before that norm is known,
            so every step computes its gradients twice and takes about twice the time, at the same memory.
        lr_scheduler: makes one block's learning-rate scheduler from its optimizer; stepped once per step
            (``ReduceLROnPlateau`` with the loss).
        mode: ``"local"`` (local gradients, with offsets where the step has them) or ``"bp"`` (exact back-propagation:
            a forward sweep stores the boundaries, a reverse sweep recomputes one block at a time; for all micro-batches
            together or for one after the other, whatever is predicted to need less).
        state_device: where optimizer state and offsets of idle blocks live, ``"cpu"`` to keep them out of an
            accelerator's memory; fetched one block ahead. ``None``: on the parameters' device.
        parameter_device: the same for the parameters of idle blocks; they are used by forward passes as well, so this
            costs two transfers a sweep.
        boundary_device: where boundaries wait between blocks.
        reduction: ``"mean"`` or ``"sum"`` where the loss is neither by the trainer's own finding and you know better.
        data_parallel: ``True``, or a process group of torch.distributed, where every process gives its own part of each
            batch and all take the step of the whole batch (docs/data-parallel.md). ``False``: this process trains
            alone; ``None``, the default, as well, with a warning where torch.distributed has several processes.

    Attributes:
        optimizers, schedulers: by the index of the block that they step.
        grad_norms: norm of the gradient by block at the last step, before clipping (``clip_norm`` only).
        local_losses: local loss by block at the last step (0-dim tensors).
        broken: why the trainer cannot go on, ``None`` as a rule.

    Raises:
        BpfxError: an argument out of its range, an optimizer over other parameters than it was given.

    Example:
        >>> import functools, torch, bpfx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, y = torch.randn(6, 4), torch.randint(0, 2, (6,))
        >>> step = bpfx.convert(net, torch.nn.functional.cross_entropy, (x, y), blocks=2)
        >>> adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
        >>> trainer = bpfx.BlockTrainer(step, optimizer=adamw, micro_batches=2, clip_norm=1.0)
        >>> trainer.step(x, y).shape
        torch.Size([])
    """

    @alone
    def __init__(
        self,
        step: Step,
        optimizer: OptimizerFactory,
        *,
        micro_batches: int | None = None,
        clip_norm: float | None = None,
        clip: str = "block",
        lr_scheduler: SchedulerFactory | None = None,
        mode: str = "local",
        state_device: torch.device | str | None = None,
        parameter_device: torch.device | str | None = None,
        boundary_device: torch.device | str | None = None,
        reduction: str | None = None,
        data_parallel: bool | ProcessGroup | None = None,
    ) -> None:
        if not isinstance(step, Step):
            inside = "; pass what is inside, its .module, and data_parallel=True" * hasattr(step, "module")
            raise BpfxError(f"BlockTrainer takes what bpfx.convert returned; got a {type(step).__name__}{inside}")
        _check(mode=(mode, MODES), clip=(clip, CLIPS), reduction=(reduction, (None, "mean", "sum")))
        if micro_batches is None:
            micro_batches = step.plan.micro_batches
        check_micro_batches(micro_batches)
        number = isinstance(clip_norm, (int, float)) and not isinstance(clip_norm, bool) and clip_norm > 0
        if clip_norm is not None and not number:
            raise BpfxError(f"clip_norm={clip_norm!r}: pass a number above 0, or None for no clipping")
        self.converted, self.micro_batches, self.mode, self.reduction = step, micro_batches, mode, reduction
        self.clip_norm, self.clip = clip_norm, clip
        self._boundary_home = _device("boundary_device", boundary_device)
        compiler = step._compiler
        refuse_divided(step.model, "BlockTrainer is not built for it; use the step in a loop, or data_parallel=True")
        self._ranks: Ranks | None = ranks_of_trainer(step, data_parallel, reduction, mode, clip, clip_norm)
        if micro_batches > 1:
            compiler.check_reduction(reduction)
        self._named = compiler.trained_by(mode == "local")
        self._blocks = BlockOptimizers(self._named, optimizer, lr_scheduler)
        state_home = _device("state_device", state_device)
        heads = {f"{HEADS}{n}": p for n, p in step.heads.named_parameters()}
        parameters = {n: compiler.weights[n] for n in compiler.weights.parameter_names} | heads
        parameter_home = _device("parameter_device", parameter_device)
        order = dict(sorted(self._blocks.optimizers.items(), reverse=mode == "bp"))
        self._idle = IdleState(order, parameters, state_home, parameter_home)
        if state_home is not None and step.offset is not None and step.offset.device is None:
            step.offset_state.move(state_home)
        self.grad_norms: dict[int, float] = {}
        self.local_losses: dict[int, Tensor] = {}
        self.broken: str | None = None
        # From the example batch, so that a resumed run passes the blocks (and draws random numbers) in the same order.
        self._complete_at = compiler.complete_at(self._named) if mode == "local" else {}
        device = next(iter(parameters.values())).device
        self._together = any(
            home is not None and _shelf.moves(device, home) for home in (self._boundary_home, parameter_home)
        )
        made = compiler.arrange(micro_batches, self._together, mode == "local")
        # One block at a time is right where nothing is predicted, too.
        self._groups = made.groups if made is not None else singly(len(compiler.main.stages))
        self._refresh_pieces = made.refresh_pieces if made is not None else micro_batches
        self._one_by_one = made is not None and made.one_by_one
        if made is not None and mode == "local":
            self._keep_budget(made.exact.peak)

    @property
    def optimizers(self) -> dict[int, torch.optim.Optimizer]:
        return self._blocks.optimizers

    @property
    def schedulers(self) -> dict[int, Any]:
        return self._blocks.schedulers

    @alone
    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One training step on a batch given as to the converted step.

        Returns:
            The task loss of the batch at the weights before the step, a 0-dim tensor without a gradient.

        Raises:
            BpfxError: a batch that is built otherwise than the example; or the step failed (out of memory, say) after
                some blocks had been stepped already. Then the trainer is broken: :meth:`load_state_dict` repairs it.
                Where a step fails before the first block is stepped, its error is passed on and everything but the
                offsets of a half-done refresh (dropped, and measured again at the next step) is as it was before.
        """
        if self.broken is not None:
            raise BpfxError(f"{self.broken}; call load_state_dict with a saved state before the next step")
        step, compiler = self.converted, self.converted._compiler
        tensors = compiler.spec.flatten(args, kwargs)
        step._check_trainable()
        if not step.training:
            raise BpfxError("the step is in eval mode; call step.train() before training")
        refuse_halves()
        if torch.is_inference_mode_enabled():
            raise BpfxError("no gradient can be computed under torch.inference_mode(); call trainer.step outside it")
        self._check_parameters()
        samples = compiler.spec.samples(tensors)
        if not samples and self._ranks is None:
            raise BpfxError("this batch has no samples; skip it")
        pieces = compiler.spec.split(tensors, self.micro_batches) if samples else []
        shares = compiler.shares(pieces, self.reduction)
        weights, mutated = compiler.weights, compiler.main.captured.mutated_buffers
        statistics, random = running_statistics(weights, mutated, step.heads), get_rng_state()
        stepped: list[int] = []
        refreshes = step.diagnostics.measured
        learnt = step._correction.progress() if step._correction is not None else None
        try:
            kind = step._kind() if self.mode == "local" else EXACT
            if self._ranks is not None:
                shares = self._ranks.weighted(pieces, shares, self.reduction, step.iteration, kind)
            step._ranks = self._ranks
            if kind == REFRESH:
                size = -(-samples // self._refresh_pieces)
                step._measure(tensors, size, self._boundary_home, self._idle.use, self.reduction)
                if step._correction is not None and step._correction.in_exact_phase(step.iteration):
                    kind = EXACT  # Δ has other draws and pieces than this step, and must not enter it
            norm: float | None = None
            if self.clip_norm is not None and self.clip == "global":
                norm = self._global_norm(pieces, shares, kind)
                restore_statistics(weights, step.heads, statistics)
                set_rng_state(random)
            loss = self._sweep(pieces, shares, kind, norm, stepped)
            self._blocks.schedule(float(loss) if self._blocks.wants_loss else None)
        except BaseException as error:
            self._clean()
            if not stepped:
                restore_statistics(weights, step.heads, statistics)
                set_rng_state(random)
                if step._correction is not None and step.diagnostics.measured > refreshes:
                    step._correction.forget()  # the next step measures again, and has nothing to compare with
                step.diagnostics.retract(step.iteration)
                if step._correction is not None and learnt is not None:
                    step._correction.load_progress(learnt)
                raise
            self.broken = (
                f"a step failed after {len(stepped)} of {len(self.optimizers)} blocks had been stepped "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
            )
            if not isinstance(error, Exception):
                raise
            raise BpfxError(f"{self.broken}; the trainer is broken until load_state_dict") from error
        step.iteration += 1
        return loss

    def _keep_budget(self, exact: int) -> None:
        """Rule out exact steps where the memory budget holds for local steps and refreshes only."""
        budget, correction = self.converted.plan.budget, self.converted._correction
        if budget is None or exact <= budget or correction is None or not correction.rule.exact:
            return
        correction.rule.never_exact()
        warnings.warn(
            f"exact BP steps would take {format_bytes(exact)} of the memory budget of {format_bytes(budget)}; offsets "
            "are kept for 4 iterations or more instead, also where they do not last. Pass a larger budget, more "
            "micro_batches, or another Offset(bounds=…)",
            BpfxWarning,
            stacklevel=3,
        )

    def predict(self, *args: Any, **kwargs: Any) -> dict[str, Schedule]:
        """What this trainer's steps on such a batch are predicted to need, beside the exact recipes that users know.

        Returns:
            :class:`bpfx.plan.Schedule` by name: ``"local_serial"``, ``"refresh_serial"``, ``"bp_serial"`` with this
            trainer's micro-batches, and ``"bp"``, ``"ac"``, ``"ac_oib"``, ``"ac_micro"``, ``"local"``.

        Raises:
            BpfxError: an operator cannot be predicted.
        """
        compiler = self.converted._compiler
        tensors = compiler.spec.flatten(args, kwargs)
        found = compiler.schedules(tensors, self.micro_batches, self.converted.offset, self._one_by_one)
        return {s.name: s for s in found}

    # --- one step -----------------------------------------------------------------------------------------------------

    def _gradients(
        self, inputs: Sequence[list[Tensor]], shares: Sequence[float], kind: str
    ) -> Iterator[tuple[int, Grads, Any]]:
        """Every block's gradient, offsets not yet added, in the sweep's order; at last the loss, under index -1."""
        compiler = self.converted._compiler
        pieces = [
            Piece.of(compiler.variant(tensors), tensors, share, self._boundary_home, self._idle.use)
            for tensors, share in zip(inputs, shares, strict=True)
            if share  # a piece without a single target that counts has no loss
        ]
        if not pieces:
            loss = compiler.main.captured.graph.loss.meta["val"]
            yield from idle_sweep(compiler.main.stages, kind, self.mode == "local", loss)
            return
        if self.mode == "bp":
            for k, grads in bp_sweep(pieces, one_by_one=self._one_by_one):
                yield k, grads, None
        elif kind == EXACT:
            yield from exact_sweep(pieces, one_by_one=self._one_by_one)
        else:
            yield from local_sweep(pieces, self._groups)
        losses = [p.loss * p.share for p in pieces if p.loss is not None]
        yield -1, {}, torch.stack([loss.detach() for loss in losses]).sum()

    def _complete(
        self, inputs: Sequence[list[Tensor]], shares: Sequence[float], kind: str
    ) -> Generator[tuple[int, Grads, Any], None, None]:
        """As :meth:`_gradients`, a block's gradients being those that its optimizer steps, complete and corrected."""
        blocks = self._assembled(inputs, shares, kind)
        if self._ranks is not None:
            blocks = summed(blocks, self._ranks, self._named)
        with closing(blocks):
            for k, grads, extra in blocks:
                if k in self._named and self.mode == "local":
                    grads = self.converted._corrected(grads, [name for name, _ in self._named[k]], kind == EXACT)
                yield k, grads, extra

    def _assembled(
        self, inputs: Sequence[list[Tensor]], shares: Sequence[float], kind: str
    ) -> Generator[tuple[int, Grads, Any], None, None]:
        """As :meth:`_gradients`, by the optimizer that steps them.

        The gradient of a parameter that two blocks share waits for the second.
        """
        waiting: Grads = {}
        held: dict[int, Any] = {}  # blocks that wait for a parameter's other gradient, with their local losses
        for k, grads, extra in self._gradients(inputs, shares, kind):
            if k < 0:
                for late in list(held):  # what they wait for has no gradient
                    yield late, self._mine(late, waiting), held.pop(late)
                yield k, {}, extra
                return
            # No name for a single gradient: it would keep the last one alive while the next block runs.
            for name in list(grads):
                waiting[name] = waiting[name].add_(grads.pop(name)) if name in waiting else grads.pop(name)
            held[k] = extra
            for ready in [h for h in held if k <= self._complete_at.get(h, h) or not self._turned(kind)]:
                yield ready, self._mine(ready, waiting), held.pop(ready)

    def _turned(self, kind: str) -> bool:
        """Whether this sweep goes the other way than the one after which the optimizers were sorted."""
        return self.mode == "local" and kind == EXACT

    def _mine(self, k: int, waiting: Grads) -> Grads:
        return {n: waiting.pop(n) for n, _ in self._named.get(k, ()) if n in waiting}

    def _global_norm(self, inputs: Sequence[list[Tensor]], shares: Sequence[float], kind: str) -> float:
        with closing(self._complete(inputs, shares, kind)) as blocks:
            squares = [
                torch.nn.utils.get_total_norm(list(grads.values())).double().square()
                for k, grads, _ in blocks
                if k >= 0 and grads
            ]
        return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0

    def _sweep(
        self,
        inputs: Sequence[list[Tensor]],
        shares: Sequence[float],
        kind: str,
        norm: float | None,
        stepped: list[int],
    ) -> Tensor:
        self.grad_norms.clear()
        self.local_losses.clear()
        # Closed at once when a step fails: an abandoned sweep would keep its gradients alive for as long as someone
        # holds the error, and set the random state when that is let go.
        with closing(self._complete(inputs, shares, kind)) as blocks:
            for k, grads, extra in blocks:
                if k < 0:
                    loss: Tensor = extra
                    break
                if extra is not None:
                    self.local_losses[k] = extra
                if k not in self.optimizers:
                    continue
                self._present(k)
                with self._idle.stepping(k, backwards=self._turned(kind)):
                    total = self._blocks.clip(k, grads, self.clip_norm, norm)
                    stepped.append(k)  # before: an optimizer that fails half-way has stepped, too
                    self._blocks.step(k)
                if total is not None:
                    self.grad_norms[k] = total
                if self.mode == "local" and kind != EXACT:
                    for name, _ in self._named.get(k + 1, ()):
                        self.converted.offset_state.prefetch(name)
        self._idle.release()
        if self._ranks is not None:
            loss = self._ranks.settle(loss, self.local_losses)
        if self._turned(kind):  # blocks whose local loss is the task loss, and the order of the others
            own = {k: self.local_losses.get(k, loss.detach()) for k in self.converted._learning}
            self.local_losses.clear()
            self.local_losses.update(own)
        self.converted.diagnostics.learning.add(self.local_losses, self.converted.iteration)
        return loss

    def _present(self, k: int) -> None:
        """The parameters of block k on their device: one that shares a group with others may have been sent home."""
        stages = self.converted._compiler.main.stages
        following = k + 1 if self.mode == "local" else k - 1  # an exact step of a local run fetches later than it could
        ahead = stages[following].reads if 0 <= following < len(stages) else ()
        self._idle.use([name for name, _ in self._named[k]], ahead)

    def _check_parameters(self) -> None:
        """Every parameter is still the one that its optimizer steps."""
        weights, heads = self.converted._compiler.weights, dict(self.converted.heads.named_parameters())
        for name, parameter in (pair for pairs in self._named.values() for pair in pairs):
            now = heads[name.removeprefix(HEADS)] if name.startswith(HEADS) else weights[name]
            if now is not parameter and name not in weights.rewritten:
                raise BpfxError(
                    f"the parameter {name!r} was replaced by another object after the trainer was made, and its "
                    "optimizer would step the old one; make a new BlockTrainer"
                )
            refuse_steps_in_backward(name, parameter)

    def _clean(self) -> None:
        for parameters in self._named.values():
            for _, parameter in parameters:
                parameter.grad = None
        self._idle.release()

    def resident(self) -> AbstractContextManager[None]:
        """All parameters on their device, to evaluate the model, say; needed with ``parameter_device``.

        Example:
            >>> with trainer.resident():  # doctest: +SKIP
            ...     step.model.eval()(x)
        """
        return self._idle.everything()

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: model, heads, offsets, schedule, optimizers, schedulers."""
        with self.resident():
            self._idle.settle()
            own = {"mode": self.mode, "one_by_one": self._one_by_one, **self._blocks.state_dict()}
            return {"step": self.converted.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; a broken trainer is whole again afterwards.

        Raises:
            BpfxError: the state belongs to other blocks, or to the other mode.
        """
        if not isinstance(state, dict) or not {"mode", "step", "optimizers", "schedulers"} <= state.keys():
            raise BpfxError("this is no state of a BlockTrainer; pass what its state_dict() gave")
        if state["mode"] != self.mode:
            raise BpfxError(f"this state is of mode={state['mode']!r}, the trainer's is {self.mode!r}")
        self.converted._check_blocks(state["step"].get("_extra_state"))
        self._blocks.check_state(state)
        with self.resident():
            self.converted.load_state_dict(state["step"])
            self._blocks.load_state_dict(state)
            self._idle.park()
        # With it random numbers are drawn in another order.
        self._one_by_one = bool(state.get("one_by_one", self._one_by_one)) and not self._together
        self.broken = None

    def __repr__(self) -> str:
        return (
            f"BlockTrainer(mode={self.mode!r}, {len(self.converted.plan.blocks)} blocks, "
            f"micro_batches={self.micro_batches}, clip_norm={self.clip_norm})"
        )


def check_micro_batches(count: Any) -> None:
    """Raise unless ``count`` is a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BpfxError(f"micro_batches={count!r}: pass a whole number of at least 1")


def _check(**choices: tuple[Any, Sequence[Any]]) -> None:
    for name, (value, known) in choices.items():
        if value not in known:
            raise BpfxError(f"{name}={value!r}: pass {' or '.join(map(repr, known))}")


def _device(name: str, device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise BpfxError(f"{name}={device!r}: pass a device such as 'cpu', or None") from None
