"""What training shows of itself: refreshes, the local loss of every block over time, and the state of every block."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bpfx._alone import alone
from bpfx._logging import logger
from bpfx._refresh import restore_statistics, running_statistics
from bpfx.compiler import Compiler
from bpfx.errors import BpfxWarning
from bpfx.logs import Listener, Listeners, scalars
from bpfx.losses import Predictor
from bpfx.passes.heads import class_labels
from bpfx.passes.programs import BlockProgram, LocalGradient
from bpfx.passes.rng import get_rng_state, set_rng_state

WINDOW = 50  # calls whose local losses make one mean; they are looked at only then, since looking waits for a device
PATIENCE = 4  # windows before a block is said not to learn
KEPT = 400  # windows that are kept
REFRESHES = 2000  # records of refreshes that are kept


class Learning:
    """The local loss of every block, as means over windows of 50 calls, and a warning about a block that stands still.

    Attributes:
        windows: the last 400 of them, a dictionary from block to mean loss each.
        first: the first of all.
    """

    def __init__(self, listeners: Listeners | None = None) -> None:
        self.listeners = listeners
        self.windows: deque[dict[int, float]] = deque(maxlen=KEPT)
        self.first: dict[int, float] = {}
        self._sum: Tensor | None = None
        self._blocks: list[int] = []
        self._count, self._seen = 0, 0
        self._best: dict[int, float] = {}
        self._told: set[int] = set()

    def add(self, losses: Mapping[int, Tensor], iteration: int | None = None) -> None:
        """Take the local losses of one call, by block. Warns with a :class:`bpfx.BpfxWarning`.

        Args:
            losses: by block.
            iteration: of the call; ``None``: calls are counted here, so a resumed run begins at 0.
        """
        if not losses:
            return
        if list(losses) != self._blocks:
            self._blocks, self._sum, self._count = list(losses), None, 0
        now = torch.stack([loss.detach().double() for loss in losses.values()])
        self._sum = now if self._sum is None else self._sum + now
        self._count += 1
        if self._count < WINDOW:
            return
        means = dict(zip(losses, (self._sum / self._count).tolist(), strict=True))
        self._sum, self._count = None, 0
        self._seen += 1
        self.windows.append(means)
        self.first = self.first or means
        for k, mean in means.items():
            self._best[k] = min(mean, self._best.get(k, math.inf))
        if self.listeners is not None:
            now_at = self._seen * WINDOW - 1 if iteration is None else iteration
            self.listeners.tell({"iteration": now_at} | {f"block{k}/loss": mean for k, mean in means.items()})
        self._warn(means)

    def begin_anew(self) -> None:
        """Forget the window that is under way: the losses to come are of another training."""
        self._sum, self._count = None, 0

    def gains(self) -> dict[int, float]:
        """How far the best window of every block is below its first, as a share of the first."""
        return {k: (v - self._best[k]) / abs(v) if v else 0.0 for k, v in self.first.items() if k in self._best}

    def _warn(self, means: dict[int, float]) -> None:
        lost = [k for k, mean in means.items() if not math.isfinite(mean)]
        gains = self.gains()
        # All standing still may be a small learning rate; one that stands still while another learns is stuck.
        learning = any(gain > 0.05 for gain in gains.values())
        late = learning and self._seen >= PATIENCE
        idle = [k for k, mean in means.items() if mean == 0 == self.first.get(k) and late]
        still = [k for k, gain in gains.items() if gain < 0.01 and late and k not in idle]
        slow = f"does not learn: in {self._seen * WINDOW} calls its local loss fell by less than 1 %, others' by more"
        empty = "has a local loss of 0 all along: there is nothing to learn there, or nothing to compare with"
        for words, blocks in (("has a local loss that is NaN or infinite", lost), (slow, still), (empty, idle)):
            fresh = [k for k in blocks if k not in self._told]
            self._told.update(fresh)
            if fresh:
                shown = ", ".join(f"{k} ({self.first[k]:.4g}, now {means[k]:.4g})" for k in fresh)
                warnings.warn(f"block {shown} {words}", BpfxWarning, stacklevel=4)


@dataclasses.dataclass
class Diagnostics:
    """What was measured while training.

    Attributes:
        refreshes: one record per refresh, the last 2000 of them: ``iteration``; ``cosine``, the mean over the blocks
            that have an offset; ``period``, K from here on; and ``blocks``, a list of ``block``, ``cosine`` (of BP and
            local gradient), ``ratio`` (‖Δ‖/‖g_BP‖), ``staleness`` (cosine of the new and the old Δ; with several pieces
            an estimate of it), ``spread`` (share of ‖Δ‖² that the micro-batches disagree on), ``descent`` (cosine of
            the new BP gradient and the old Δ), ``bp``, ``local`` and ``norm`` (of the BP gradient, the local gradient
            and Δ), ``alpha``, ``lam`` and ``period`` (in force), each ``None`` where there is nothing to compare.
        learning: the local loss of every block, since the process began.
        measured: refreshes since the process began, the records that are no longer kept too.
    """

    refreshes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    learning: Learning = dataclasses.field(default_factory=Learning)
    measured: int = 0
    _listeners: Listeners = dataclasses.field(default_factory=Listeners, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.learning.listeners = self._listeners

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Have a function called after every refresh, and after every window of local losses.

        It gets a flat dictionary of numbers: ``iteration`` and, after a refresh, ``cosine``, ``period``,
        ``block0/cosine``, ``block0/ratio`` and so on; after a window ``block0/loss`` and so on. ``None`` is left out.
        It is called in the middle of a step, so it is no place to save the step's state. If it raises, it is removed
        with a :class:`bpfx.BpfxWarning`, and training goes on. Listeners are not part of any saved state.

        Returns:
            The call that removes it.

        Example:
            >>> remove = step.diagnostics.listen(lambda scalars: wandb.log(scalars))  # doctest: +SKIP
        """
        return self._listeners.add(callback)

    def refreshed(self, record: dict[str, Any]) -> None:
        """Take the record of a refresh, and tell the listeners."""
        self.refreshes.append(record)
        del self.refreshes[:-REFRESHES]
        self.measured += 1
        logger("offset").info(
            "refresh at iteration %d: mean cosine %.3f, period %s",
            *(record["iteration"], record["cosine"], record["period"]),
        )
        for values in record["blocks"]:
            logger("offset").debug("%s", values)
        self._listeners.tell(scalars(record))

    def retract(self, iteration: int) -> None:
        """Drop the records from this iteration on, of a step that failed; listeners hear of it when it is repeated."""
        before = len(self.refreshes)
        self.refreshes[:] = [r for r in self.refreshes if r["iteration"] < iteration]
        self.measured -= before - len(self.refreshes)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around calls that are undone, or taken to measure them: nothing is recorded and no listener hears of them."""
        own = dict(vars(self))
        self.refreshes, self.learning, self._listeners = list(self.refreshes), Learning(), Listeners()
        try:
            yield
        finally:
            vars(self).update(own)


@dataclasses.dataclass(frozen=True)
class BlockScore:
    """How one block does on one batch.

    Attributes:
        block: its index.
        name: its modules.
        local_loss: name of its local loss; ``"task"`` for the last block.
        loss: its value, with the block's weight.
        accuracy: share of samples that its head (the model itself, for the last block) classifies right; ``None`` where
            it predicts no class per sample.
    """

    block: int
    name: str
    local_loss: str
    loss: float
    accuracy: float | None


@alone
def block_scores(compiler: Compiler, tensors: Sequence[Tensor]) -> list[BlockScore]:
    """The local loss and local accuracy of every block that trains, as a local step would find them.

    Nothing is trained and nothing changes: random state and running statistics are put back. All boundaries are held.
    """
    variant = compiler.variant(tensors)
    graph, weights = variant.captured.graph, compiler.weights
    predictions = compiler.predictions_of(variant.captured)
    labels = class_labels(graph, predictions)
    answers = tensors[labels] if labels is not None else None
    values: dict[str, Any] = {n.name: t for n, t in zip(graph.inputs, tensors, strict=True) if n is not None}
    saved, state = running_statistics(weights, variant.captured.mutated_buffers, variant.heads), get_rng_state()
    scores = []
    try:
        with torch.no_grad():
            for stage in variant.stages:
                block = stage.block
                given = [values[n.name] for n in block.inputs]
                outputs = BlockProgram(block, weights).evaluate(given, scratch=True)
                values.update((n.name, v) for n, v in zip(block.outputs, outputs, strict=True))
            for stage in variant.stages:
                program, last = stage.local, stage is variant.stages[-1]
                loss = program.local_loss if isinstance(program, LocalGradient) else None
                if loss is None:
                    if last or isinstance(program, LocalGradient):
                        found = [values[p.name] for p in predictions if p.name in values]
                        value = values[graph.loss.name]
                        scores.append(
                            BlockScore(stage.index, stage.block.name, "task", float(value), _accuracy(found, answers))
                        )
                    continue
                assert isinstance(program, LocalGradient)
                features = [values[n] for n in program.feature_names]
                entering = [values[n] for n in program.entering_names]
                value = loss(features, tensors, entering)
                made: Sequence[Tensor] = ()
                if isinstance(loss.head, Predictor):
                    made = loss.head.predictions(loss.given(features, tensors, entering))
                scores.append(
                    BlockScore(stage.index, stage.block.name, loss.name, float(value), _accuracy(made, answers))
                )
    finally:
        restore_statistics(weights, variant.heads, saved)
        set_rng_state(state)
    return scores


def _accuracy(predictions: Sequence[Tensor], labels: Tensor | None) -> float | None:
    if labels is None or len(predictions) != 1 or predictions[0].dim() != 2 or len(predictions[0]) != len(labels):
        return None
    counted = labels >= 0  # -100 stands for a row without a label
    right = (predictions[0].argmax(1) == labels) & counted
    return float(right.sum() / counted.sum()) if bool(counted.any()) else None
