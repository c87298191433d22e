"""The step: a drop-in ``loss = step(x, y); loss.backward(); optimizer.step()`` over the two emitted graph modules."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from bpfx._alone import alone
from bpfx._care import Care
from bpfx._correction import EXACT, LOCAL, REFRESH, Correction
from bpfx._ddp import OnOneDevice, aside, for_limits, ranks_of_ddp
from bpfx._deliver import Deliver
from bpfx._exact import exact_sweep
from bpfx._gradients import Grads, merged
from bpfx._hooks import hooks_aside
from bpfx._loss_scale import LossScale
from bpfx._matching import check_matching
from bpfx._offset_state import OffsetState
from bpfx._parallel import Ranks, rounds_of
from bpfx._refresh import RefreshSum, idle_piece, refresh_piece, restore_statistics, running_statistics
from bpfx._serial import Piece
from bpfx._sharded import Shards, shards_of
from bpfx._shelf import Parked
from bpfx._variant import Variant
from bpfx.compiler import Compiler
from bpfx.diagnostics import BlockScore, Diagnostics, block_scores
from bpfx.errors import BpfxError, BpfxWarning
from bpfx.losses import Views
from bpfx.offset import Offset, RefreshData
from bpfx.passes.batch import call_model, judges_output, loss_of
from bpfx.passes.graph import HEADS
from bpfx.passes.programs import LocalGradient
from bpfx.passes.rng import get_rng_state, set_rng_state
from bpfx.plan import Plan


@dataclasses.dataclass
class StepResult:
    """What one run of an emitted step gives.

    Attributes:
        loss: the task loss, a scalar.
        grads: gradient by parameter name; those of heads as ``bpfx.heads.<block>.<name>``.
        local_losses: the local loss of every block that trains, in order (empty for the BP step).
        outputs: the model's own output.
        exact: whether ``grads`` of the model's parameters are BP's.
    """

    loss: Tensor
    grads: Grads
    local_losses: list[Tensor]
    outputs: Any
    exact: bool = False


class Step(OnOneDevice):
    """A converted model. Made by :func:`bpfx.convert`.

    ``parameters()`` are the model's and the heads'; give them all to the optimizer. ``state_dict()`` holds the model,
    the heads, the offsets and the position in the schedule. Called under ``torch.no_grad()`` or after ``eval()`` it
    evaluates the plain model.

    Attributes:
        model: the caller's own module, unchanged.
        heads: one auxiliary head per boundary.
        plan: what the compiler decided.
        local_step, bp_step: the two emitted graph modules; ``print(step.local_step.code)`` shows them.
        diagnostics: what the refreshes measured.
        iteration: calls so far.
    """

    _compiler: Compiler
    local_step: fx.GraphModule
    bp_step: fx.GraphModule

    def __init__(self, compiler: Compiler, offset: Offset | None) -> None:
        super().__init__()
        self.model: nn.Module = compiler.model
        if isinstance(compiler.loss_fn, nn.Module):
            self.loss_fn = compiler.loss_fn
        self.heads: nn.ModuleList = compiler.main.heads
        # Not registered as submodules: the programs own no weights, and every weight is to be listed once.
        self.__dict__.update(_compiler=compiler, local_step=compiler.main.local_step, bp_step=compiler.main.bp_step)
        self.plan: Plan = compiler.plan
        self.offset = offset
        self.diagnostics = Diagnostics()
        self.iteration = 0
        self._refresh_data = RefreshData(offset.data) if offset is not None and offset.data is not None else None
        self._trainable = compiler.weights.trainable()
        self._no_offsets = OffsetState()
        self._loss_scale = LossScale()
        self._forced: str | None = None  # kind of the steps that are being measured
        self._correction: Correction | None = None
        self._ranks: Ranks | None = None  # of the call that is under way
        if offset is not None:
            block_of = {n: b.index for b in reversed(compiler.main.blocks) for n in b.trainable}
            last = compiler.main.blocks[-1].index
            if offset.match:
                check_matching(offset.match, [s.local for s in compiler.main.stages])
            count = Counter(n for b in compiler.main.blocks for n in b.trainable)
            shared = frozenset(n for n, times in count.items() if times > 1)
            moving = [n for n in self._trainable if block_of.get(n, last) != last]
            # Looked up each time: a loaded state may bring other parameters.
            self._correction = Correction(offset, block_of, last, shared, lambda: [compiler.weights[n] for n in moving])
        # The blocks whose local losses a step returns.
        stages = compiler.main.stages
        self._learning = [s.index for s in stages if isinstance(s.local, LocalGradient) or s is stages[-1]]
        self._care = Care(self)

    # --- the drop-in loop ---------------------------------------------------------------------------------------------

    @alone
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one local step (and a refresh where the schedule says so).

        Returns:
            The scalar loss, or the model's own output with its ``.loss``; ``loss.backward()`` delivers g̃ to ``.grad``.

        Raises:
            BpfxError: a batch that is built otherwise than the example, or parameters that train otherwise than then.
        """
        compiler = self._compiler
        if not (torch.is_grad_enabled() and self.training):
            args, kwargs = pytree.tree_map_only(Views, lambda views: views.first, (args, kwargs))
            if judges_output(compiler.loss_fn):
                return self.model(*args, **kwargs)
            loss, output = call_model(self.model, compiler.loss_fn, args, kwargs)
            return loss if compiler.loss_fn is not None else output
        tensors = compiler.spec.flatten(args, kwargs)
        self._check_trainable()
        self._care.look(self.iteration)
        self._ranks, shards = ranks_of_ddp(self), shards_of(self)
        self._loss_scale.now()
        variant = self._variant(tensors)
        kind = self._kind()
        run = {EXACT: self._run_exact, REFRESH: self._refresh, LOCAL: self._run_local}[kind]
        run = run if shards is None else partial(self._run_sharded, shards)
        with aside(self, kind), hooks_aside(self.parameters()):
            result = run(variant, tensors)
        grads = result.grads if result.exact else for_limits(self, result.grads)
        result.grads = self._corrected(grads, exact=result.exact)
        self.iteration += 1
        self.diagnostics.learning.add(dict(zip(self._learning, result.local_losses, strict=True)), self.iteration - 1)
        return self._deliver(result, result.grads)

    @property
    def offset_state(self) -> OffsetState:
        """Δ by parameter name, as the optimizer's parameters are: decoded, and on their device."""
        return self._correction.state if self._correction is not None else self._no_offsets

    @alone
    def run_local(self, *args: Any, **kwargs: Any) -> StepResult:
        """One local step; ``.grad`` and the schedule stay as they are. Running statistics are updated."""
        tensors = self._compiler.spec.flatten(args, kwargs)
        return self._run_local(self._compiler.variant(tensors), tensors)

    @alone
    def run_bp(self, *args: Any, **kwargs: Any) -> StepResult:
        """One BP step, recomputing block by block; ``.grad`` and the schedule stay as they are."""
        tensors = self._compiler.spec.flatten(args, kwargs)
        return self._run_bp(self._compiler.variant(tensors), tensors)

    def evaluate_blocks(self, *args: Any, **kwargs: Any) -> list[BlockScore]:
        """Local loss and local accuracy of every block on one batch; nothing is trained and nothing changes.

        Returns:
            One :class:`bpfx.diagnostics.BlockScore` per block that trains, the last with the task loss.
        """
        with torch.random.fork_rng():
            return block_scores(self._compiler, self._compiler.spec.flatten(args, kwargs))

    def _variant(self, tensors: Sequence[Tensor]) -> Variant:
        """The steps for these shapes, which may have weights' views of their own, with the call's loss scale."""
        variant = self._compiler.variant(tensors)
        variant.captured.weights.loss_scale = self._loss_scale.current
        return variant

    # --- the two steps ------------------------------------------------------------------------------------------------

    def _run_local(self, variant: Variant, tensors: Sequence[Tensor]) -> StepResult:
        loss, local_losses, grads, outputs = variant.local_step(*tensors)
        return StepResult(loss, merged(grads), list(local_losses), self._output(variant, loss, outputs))

    def _run_bp(self, variant: Variant, tensors: Sequence[Tensor]) -> StepResult:
        loss, grads, outputs = variant.bp_step(*tensors)
        return StepResult(loss, merged(grads), [], self._output(variant, loss, outputs), exact=True)

    def _run_sharded(self, shards: Shards, variant: Variant, tensors: Sequence[Tensor]) -> StepResult:
        kept = frozenset(n.name for n in variant.captured.graph.outputs if isinstance(n, fx.Node))
        piece, grads, losses = shards.run_local(variant, tensors, kept)
        assert piece.loss is not None
        return StepResult(piece.loss, grads, losses, self._outputs_of(piece, variant))

    def _output(self, variant: Variant, loss: Tensor, leaves: Sequence[Any]) -> Any:
        constants, queue = variant.captured.output_constants, iter(leaves)
        total = len(leaves) + len(constants)
        found = [constants[i] if i in constants else next(queue) for i in range(total)]
        return pytree.tree_unflatten(found, variant.captured.output_spec)

    def _run_exact(self, variant: Variant, tensors: Sequence[Tensor]) -> StepResult:
        """The BP gradient of the batch, and the heads' own."""
        assert self.offset is not None
        wanted = [o for o in variant.captured.graph.outputs if isinstance(o, fx.Node)]
        compiler = self._compiler
        # Pieces must not change the gradient, and outputs of pieces are no output of the batch.
        whole = variant.captured.mutated_buffers or compiler.reduction.kind == "unknown" or compiler.loss_fn is None
        if self.offset.micro_batches > 1 and not whole:
            split = self._compiler.spec.split(list(tensors), self.offset.micro_batches)
            shares = self._refresh_shares(split, tensors, None)
            pieces = [Piece.of(self._variant(t), t, s) for t, s in zip(split, shares, strict=True) if s]
            wanted = []  # the outputs belong to pieces; with a loss_fn nobody sees them
        else:
            pieces = [Piece.of(variant, tensors)]
        parts: list[Grads] = []
        losses: dict[int, Tensor] = {}
        for k, grads, local_loss in exact_sweep(pieces, frozenset(n.name for n in wanted)):
            parts.append(grads)
            if local_loss is not None:
                losses[k] = local_loss
        loss = torch.stack([p.loss.detach() * p.share for p in pieces if p.loss is not None]).sum()
        losses[variant.stages[-1].index] = loss
        # With a horizon, the last blocks before the end have no head: their local loss is the task loss.
        local_losses = [losses.get(k, loss) for k in self._learning]
        outputs = self._outputs_of(pieces[0], variant) if wanted else None
        return StepResult(loss, merged(parts), local_losses, outputs, exact=True)

    def _outputs_of(self, piece: Piece, variant: Variant) -> Any:
        """The model's output from the values that a piece has kept."""
        graph = variant.captured.graph
        named = [n for n in graph.outputs if isinstance(n, fx.Node) and n is not graph.loss]
        values = {n.name: _plain(piece.values[n.name]) for n in named}
        assert piece.loss is not None
        values[graph.loss.name] = piece.loss
        outputs = [values[o.name] if isinstance(o, fx.Node) else o for o in graph.outputs]
        return self._output(variant, piece.loss, outputs)

    def _corrected(self, grads: Grads, names: Sequence[str] | None = None, exact: bool = False) -> Grads:
        """g̃ in the memory of the local gradients (or BP's, if ``exact``), all of them or those of one block."""
        return grads if self._correction is None else self._correction.apply(grads, self.iteration, names, exact)

    # --- the refresh --------------------------------------------------------------------------------------------------

    def _kind(self) -> str:
        """What the schedule asks for now; to be asked once per step."""
        if self._correction is None:
            return LOCAL
        self._correction.check(self.iteration)
        self._correction.watch(self.iteration)
        return self._forced or self._correction.kind(self.iteration)

    def _refresh(self, variant: Variant, tensors: Sequence[Tensor]) -> StepResult:
        """Measure Δ; return the local gradient of the current batch."""
        assert self.offset is not None and self._correction is not None
        samples, batch = self._correction.available(self._compiler.spec.samples(tensors)), self.offset.batch
        whole = batch is None or (self._ranks is None and batch == samples // self._compiler.spec.rows)
        if whole and self.offset.micro_batches == 1:
            # The local gradients that Δ is made of are those of the training step.
            parts: list[Grads] = []
            wanted = [o for o in variant.captured.graph.outputs if isinstance(o, fx.Node)]
            piece = Piece.of(variant, tensors)
            if self._ranks is not None:
                self._ranks.together(self.iteration, REFRESH)
            with self._measuring(several=False) as total:
                losses = refresh_piece(piece, total, 1.0, parts, frozenset(n.name for n in wanted))
            assert piece.loss is not None
            return StepResult(piece.loss, merged(parts), losses, self._outputs_of(piece, variant))
        with self._correction.as_one(self.diagnostics, self.iteration):
            self._measure(tensors)
            # Δ has other samples, draws or pieces than this step: among exact steps it must not enter it.
            exact = self._correction.in_exact_phase(self.iteration)
            return self._run_exact(variant, tensors) if exact else self._run_local(variant, tensors)

    def _measure(
        self,
        tensors: Sequence[Tensor],
        size: int | None = None,
        home: torch.device | None = None,
        use: Callable[[Iterable[str], Iterable[str]], None] | None = None,
        told: str | None = None,
    ) -> None:
        """A refresh that the training step does not see: same draws, same running statistics afterwards.

        Args:
            tensors: the current batch.
            size: samples in a piece at most, ``None`` for the offset's own division.
            home: where boundaries wait.
            use: see :class:`bpfx._serial.Piece`.
            told: whether the loss is a mean or a sum, where the caller knows better.
        """
        weights, start = self._compiler.weights, get_rng_state()
        saved = running_statistics(weights, self._compiler.main.captured.mutated_buffers, self.heads)
        pieces = self._pieces(tensors, size) if self._compiler.spec.samples(tensors) else []
        shares = self._refresh_shares(pieces, tensors, told)
        rounds = rounds_of(self._ranks, pieces, shares, told, self.iteration)
        try:
            with self._measuring(several=len(rounds) > 1) as total:
                for inputs, share, total.part in rounds:
                    if inputs:
                        piece = Piece.of(self._variant(inputs), inputs, 1.0, home, use)
                        refresh_piece(piece, total, share, None)
                    else:
                        idle_piece(self._compiler.main.stages, total, share)
        finally:
            restore_statistics(weights, self.heads, saved)
            set_rng_state(start)

    def _refresh_shares(
        self, pieces: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], told: str | None
    ) -> list[float]:
        compiler = self._compiler
        samples, wanted = compiler.spec.samples(tensors), sum(compiler.spec.samples(p) for p in pieces)
        if len(pieces) == 1 and wanted == samples:
            return [1.0]
        kind = told or compiler.reduction.kind
        if kind == "unknown":
            warnings.warn(
                f"the micro-batches of a refresh are weighted by their samples: {compiler.reduction.reason}",
                BpfxWarning,
                stacklevel=6,
            )
            told = "mean"
        shares = compiler.shares(pieces, told)
        # A sum over B′ samples, scaled to the samples that the local gradient sums over.
        return [share * samples / wanted for share in shares] if kind == "sum" else shares

    def _pieces(self, tensors: Sequence[Tensor], size: int | None = None) -> list[list[Tensor]]:
        spec, offset = self._compiler.spec, self.offset
        assert offset is not None
        wanted = samples = spec.samples(tensors)
        if offset.batch is not None:
            wanted = offset.batch * spec.rows
        if self._refresh_data is None and self._correction is not None:
            wanted = self._correction.available(samples, wanted)
        sources = [(list(tensors), min(samples, wanted))]
        if wanted > samples:
            if self._refresh_data is None:
                raise BpfxError(
                    f"Offset(batch={offset.batch}) is larger than the current batch of {samples // spec.rows}; "
                    "pass Offset(data=…), an iterable of batches, or a batch of at most that size"
                )
            sources = self._refresh_data.draw(spec, wanted)
        pieces = []
        per = max(1, min(-(-wanted // offset.micro_batches), size or wanted))
        for drawn, take in sources:
            pieces += spec.split(spec.narrow(drawn, 0, take), -(-take // per))
        return pieces

    @contextmanager
    def _measuring(self, several: bool) -> Iterator[RefreshSum]:
        """Around a refresh: the sum that takes its pieces, then statistics and schedule."""
        correction, iteration = self._correction, self.iteration
        assert correction is not None
        inside, shared = partial(correction.inside, iteration=iteration), correction.shared
        made_of = correction.state, correction.block_of, inside, correction.offset, shared
        total = RefreshSum(*made_of, self._ranks, several)
        try:
            yield total
        except BaseException:
            # Half of the blocks may have their new offset. The next call refreshes again, since this one did not count.
            if total.seen:
                correction.forget()
            raise
        found = total.finish()
        complaint = total.complaint()
        if complaint is not None:
            warnings.warn(
                f"NaN or infinite gradients at the refresh of iteration {iteration}: {complaint}",
                BpfxWarning,
                stacklevel=6,
            )
        if not found and total.bad:
            correction.failed(iteration)
            return
        blocks = correction.settle(iteration, found, total.matching)
        inner = [f.cosine for f in found.values() if f.cosine is not None]
        mean = sum(inner) / len(inner) if inner else 1.0
        record = {"iteration": iteration, "blocks": blocks, "cosine": mean, "period": correction.rule.period}
        self.diagnostics.refreshed(record)

    # --- delivery -----------------------------------------------------------------------------------------------------

    def _deliver(self, local: StepResult, grads: Grads) -> Any:
        weights = self._compiler.weights
        heads = {f"{HEADS}{n}": p for n, p in self.heads.named_parameters()}
        # Under DistributedDataParallel every parameter reports, with or without a gradient: it waits for all of them.
        names = list(grads if self._ranks is None else dict.fromkeys([*grads, *self._trainable, *heads]))
        parameters = [heads[n] if n in heads else weights[n] for n in names]
        loss = Deliver.apply(local.loss, [grads.pop(n, None) for n in names], self._loss_scale, *parameters)
        if self._compiler.loss_fn is not None:
            return loss
        return _with_loss(local.outputs, loss)

    def _check_trainable(self) -> None:
        now = self._compiler.weights.trainable()
        if now != self._trainable:
            changed = sorted(set(now) ^ set(self._trainable))
            raise BpfxError(
                f"requires_grad of {changed[0]!r}{f' and {len(changed) - 1} more' * (len(changed) > 1)} was changed "
                "after the conversion; call bpfx.convert again"
            )

    # --- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Offsets and the position in the schedule; part of ``state_dict()``."""
        return {
            "iteration": self.iteration,
            "offset": self.offset_state.state(),
            "correction": self._correction.progress() if self._correction is not None else None,
            "blocks": [b.name for b in self.plan.blocks],
            "refreshes": list(self.diagnostics.refreshes),
            "loss_scale": self._loss_scale.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`get_extra_state` gave.

        Raises:
            BpfxError: the state belongs to other blocks.
        """
        self._check_blocks(state)
        weights = self._compiler.weights
        self.iteration = int(state["iteration"])
        if self._correction is not None:
            # Parameters that do not train any more have no gradient to correct.
            kept = {n: entry for n, entry in state["offset"].items() if n in self._correction.block_of}
            self._correction.state.load(kept, lambda name: weights[name].device)
            self._correction.load_progress(state.get("correction"))
        self.diagnostics.refreshes[:] = list(state["refreshes"])
        self.diagnostics.learning.begin_anew()
        self._loss_scale.load(state.get("loss_scale"))

    def _check_blocks(self, state: Any) -> None:
        own = [b.name for b in self.plan.blocks]
        if not isinstance(state, dict) or not isinstance(state.get("blocks"), list):
            raise BpfxError("this is no state of a converted step; pass what its state_dict() gave")
        if state["blocks"] != own:
            raise BpfxError(
                f"this state belongs to {len(state['blocks'])} blocks ({', '.join(state['blocks'][:3])}, …), "
                f"this step has {len(own)} ({', '.join(own[:3])}, …); convert with the same blocks"
            )
        if self._correction is not None:
            self._correction.check_progress(state.get("correction"))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As for any module; a state of other blocks is refused before anything is loaded."""
        if strict or "_extra_state" in state_dict:
            self._check_blocks(state_dict.get("_extra_state"))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __deepcopy__(self, memo: Any) -> Step:
        raise BpfxError("a step cannot be copied; copy step.model and convert it, or keep step.state_dict()")

    def __reduce__(self) -> Any:
        raise BpfxError("a step cannot be pickled; save step.state_dict(), and convert the model again to load it")

    def extra_repr(self) -> str:
        return f"{len(self.plan.blocks)} blocks, offset={self.offset}"


def _plain(value: Any) -> Any:
    return value.fetch() if isinstance(value, Parked) else value


def _with_loss(output: Any, loss: Tensor) -> Any:
    """The model's output with ``loss`` in the place of its own."""
    old = loss_of(output)
    leaves, spec = pytree.tree_flatten(output)
    return pytree.tree_unflatten([loss if leaf is old else leaf for leaf in leaves], spec)
