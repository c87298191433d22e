"""Mistakes that a drop-in loop can make without an error, found in its first steps."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from bpfx.errors import BpfxWarning
from bpfx.memory import format_bytes

if TYPE_CHECKING:
    from bpfx.step import Step


class Care:
    """Warns where a loop forgets the heads, or needs more memory than the budget that the plan was made for.

    Attributes:
        seen: versions of the heads' and of the model's parameters in the first iteration.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.seen: tuple[list[int], list[int]] = [], []

    def look(self, iteration: int) -> None:
        """Once at the beginning of every call."""
        if iteration == 0:
            self._budget()
        # Forgetting the heads is easy (an optimizer over model.parameters()) and silent: their weights never move.
        if iteration not in (0, 2):
            return
        heads = [p._version for p in self._step.heads.parameters()]
        model = [p._version for p in self._step.model.parameters() if p.requires_grad]
        if iteration == 0:
            self.seen = heads, model
        elif heads and heads == self.seen[0] and model != self.seen[1]:
            warnings.warn(
                "the model's parameters were stepped but the heads' were not; give the optimizer "
                "step.parameters() instead of model.parameters()",
                BpfxWarning,
                stacklevel=4,
            )

    def _budget(self) -> None:
        plan, correction = self._step.plan, self._step._correction
        if plan.budget is None:
            return
        rule = correction.rule if correction is not None else None
        kinds = ("local",) if rule is None else ("local", "refresh", *["bp_blocks"] * rule.exact)
        need = max(plan.predicted.get(kind, 0) for kind in kinds)
        if need > plan.budget:
            warnings.warn(
                f"the memory budget of {format_bytes(plan.budget)} holds for bpfx.BlockTrainer with "
                f"{plan.micro_batches} micro-batches; this loop is predicted to need {format_bytes(need)}",
                BpfxWarning,
                stacklevel=5,
            )
