"""The fewest blocks, and for those the fewest micro-batches, whose steps fit a memory budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from bpfx._predict import arrange
from bpfx.errors import BpfxError
from bpfx.memory import format_bytes
from bpfx.passes import partition
from bpfx.passes.capture import Captured
from bpfx.passes.liveness import LivenessError

if TYPE_CHECKING:
    from bpfx.compiler import Compiler

# A micro-batch of fewer samples would make batch normalisation another method.
NORM_SAMPLES = 8
# More micro-batches than that are not looked for.
MAX_PIECES = 64
# What is estimated to need that much more than the budget is not looked at more closely.
MARGIN = 1.5
# Where nothing fits, so many candidates are predicted exactly to name the smallest peak.
CLOSEST = 4


@dataclasses.dataclass
class Choice:
    """Cuts, micro-batches, the larger of the two steps' peaks in bytes, and what sets it."""

    cuts: list[int]
    micro_batches: int
    peak: int
    set_by: str


def within_budget(
    compiler: Compiler, captured: Captured, tensors: Sequence[Tensor], found: partition.Liveness, budget: int
) -> Choice:
    """Choose blocks and micro-batches so that the trainer's local step and its refresh both fit.

    Raises:
        BpfxError: none fits; it names the smallest peak that was found and what sets it.
    """
    options = _options(compiler, captured, found)
    tried: dict[int, Choice] = {}

    def exactly(i: int) -> Choice | None:
        if i not in tried:
            choice = _predicted(compiler, captured, tensors, options[i].cuts, options[i].micro_batches)
            if choice is None:
                return None
            tried[i] = choice
        return tried[i]

    for i, option in enumerate(options):
        if option.peak <= MARGIN * budget:
            choice = exactly(i)
            if choice is not None and choice.peak <= budget:
                return choice
    # None fits. Which comes closest is among those that are estimated to need the least.
    for i in sorted(range(len(options)), key=lambda i: options[i].peak)[:CLOSEST]:
        exactly(i)
    if not tried:
        raise BpfxError(
            f"memory_budget={format_bytes(budget)}: this model's memory cannot be predicted, so no budget can be kept; "
            "pass blocks= instead"
        )
    best = min(tried.values(), key=lambda choice: choice.peak)
    raise BpfxError(
        f"memory_budget={format_bytes(budget)} is out of reach at batch {compiler.spec.batch_size}: the smallest "
        f"predicted peak is {format_bytes(best.peak)}, with {len(best.cuts) + 1} blocks and {best.micro_batches} "
        f"micro-batches, set by {best.set_by}; use a smaller batch or a larger budget"
    )


def _options(compiler: Compiler, captured: Captured, found: partition.Liveness) -> list[Choice]:
    """Cuts and micro-batches with estimated peaks: the fewest blocks first, for those the fewest micro-batches."""
    samples = compiler.spec.batch_size
    floor = NORM_SAMPLES if captured.mutated_buffers else 1
    counts = [1]
    while captured.graph.dynamic and samples // (2 * counts[-1]) >= floor and 2 * counts[-1] <= MAX_PIECES:
        counts.append(2 * counts[-1])
    plans = {m: partition.by_count(found, pieces=m) for m in counts}
    return [
        Choice(cuts[blocks], m, int(partition.serial(found, cuts[blocks], m)), "")
        for blocks in range(1, max(plans[1]) + 1)
        for m, cuts in plans.items()
        if blocks in cuts
    ]


def _predicted(
    compiler: Compiler, captured: Captured, tensors: Sequence[Tensor], cuts: list[int], count: int
) -> Choice | None:
    """What the two steps over these cuts need; ``None`` where that cannot be predicted."""
    with compiler.emitted(captured, cuts) as variant:
        try:
            made = arrange(compiler.weights, variant, partial(compiler.spec.largest, tensors), count)
        except LivenessError:
            return None
        steps = {"local step": made.local, "refresh": made.refresh}
        step, worst = max(steps.items(), key=lambda item: item[1].peak)
        part, size = max(worst.categories.items(), key=lambda item: item[1], default=("nothing", 0))
        name = variant.stages[worst.block].block.name
        where = f"block {worst.block} ({name}) in the {step}, {format_bytes(size)} of it {part}"
        return Choice(cuts, count, worst.peak, where)
