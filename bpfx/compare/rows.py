"""The rows of a comparison: one table, and an entry in it is all that a further row takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bpfx.compare.methods import Alternating, Case, Method, Micro, Part, Serial, checkpointed, converted, plain
from bpfx.errors import BpfxError
from bpfx.offset import Offset

__all__ = ["ROWS", "Row", "chosen"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        label: in tables and plots.
        explanation: one or two sentences; {K}, {m} and {b} stand for period, micro-batches and a quarter of the batch.
        make: the method for a case; what it costs is measured on this one.
        exact: its gradient is that of BP.
        trained: makes what is trained where that is not `make`, because its gradients are the same by construction.
        trains_as: another row whose training is the same, so that one run serves both.
    """

    label: str
    explanation: str
    make: Callable[[Case], Method]
    exact: bool = False
    trained: Callable[[Case], Method] | None = None
    trains_as: str | None = None

    def explain(self, period: int, micro_batches: int, quarter: int) -> str:
        """The explanation with this comparison's numbers."""
        return self.explanation.format(K=period, m=micro_batches, b=quarter)


def _bp(case: Case) -> Method:
    return Method(plain(case), case)


def _with(offset: Callable[[Case], Offset]) -> Callable[[Case], Method]:
    """A row that trains with the offset made for a case."""

    def make(case: Case) -> Method:
        made = offset(case)
        return Method(converted(case, made), case, made.period if isinstance(made.period, int) else None)

    return make


ROWS: dict[str, Row] = {
    "bp": Row("BP", "Back-propagation, the whole batch at once. The unit of time and memory.", _bp, exact=True),
    "checkpointing": Row(
        "BP + checkpointing",
        "BP that stores the input of every repeated part of the model and computes its inside again. Gradients, and so "
        "accuracy at equal iterations, are BP's by construction; time and peak are its own.",
        lambda case: Method(checkpointed(case), case),
        exact=True,
        trained=_bp,
        trains_as="bp",
    ),
    "micro": Row(
        "BP, micro-batches",
        "BP with gradient accumulation over {m} pieces of every batch. Exact but for BatchNorm, which sees one piece.",
        lambda case: Method(plain(case), case) if case.micro_batches == 1 else Micro(plain(case), case),
        exact=True,
    ),
    "small": Row(
        "BP, quarter batch",
        "BP on the first quarter of every batch ({b} images) and nothing else: the cheap way to save memory.",
        lambda case: Part(plain(case), case),
    ),
    "serial": Row(
        "exact BP, block by block",
        "Exact BP by bpfx.BlockTrainer(mode='bp') over {m} pieces: a block is recomputed, stepped and freed before the "
        "next one. As many pieces as in the row with micro-batches, and BatchNorm sees one piece here, too.",
        lambda case: Serial(converted(case, None), case, "bp"),
        exact=True,
    ),
    "local": Row(
        "local",
        "Every block learns from its own local loss; no gradient crosses a boundary, and nothing corrects it.",
        lambda case: Method(converted(case, None), case),
    ),
    "local-serial": Row(
        "local, block by block",
        "Local losses by bpfx.BlockTrainer over {m} pieces: a block is stepped and freed before the next one.",
        lambda case: Serial(converted(case, None), case, "local"),
    ),
    "pgl": Row(
        "BP and local by turns",
        "Every {K}th gradient is BP's, those between are local, without an offset. Heads rest in a BP step.",
        lambda case: Alternating(converted(case, None), case, case.period),
    ),
    "stale": Row(
        "stale BP gradient",
        "The last BP gradient alone, up to {K} iterations old: form B with α = 0, no local gradient at all.",
        _with(lambda case: Offset(period=case.period, form="B", alpha=0.0)),
    ),
    "offset": Row(
        "local + offset",
        "Local gradients plus the offset Δ, measured every {K}th iteration and held until the next, λ = 1.",
        _with(lambda case: Offset(period=case.period)),
    ),
    "decayed": Row(
        "decaying offset",
        "As local + offset, with Δ fading to 0.7 of itself at every iteration after it was measured.",
        _with(lambda case: Offset(period=case.period, decay=0.7)),
    ),
    "auto-lambda": Row(
        "offset, λ auto",
        "As local + offset, with λ chosen block by block from what a refresh measures.",
        _with(lambda case: Offset(period=case.period, lam="auto")),
    ),
    "default": Row(
        "bpfx's default",
        "bpfx.Offset() without an argument: what bpfx.convert does when nothing is said.",
        _with(lambda case: Offset()),
    ),
    "default-serial": Row(
        "default, block by block",
        "bpfx.Offset() by bpfx.BlockTrainer over {m} pieces: the same rules, at a fraction of the memory.",
        lambda case: Serial(converted(case, Offset()), case, "local", cycle=None),
    ),
    "fresh": Row(
        "fresh small offset",
        "An offset that is never old: measured at every iteration, on the first {b} images of the batch.",
        _with(lambda case: Offset(period=1, batch=case.quarter)),
    ),
    "variate": Row(
        "fresh control variate",
        "A fresh small offset as a control variate: form B, with α chosen block by block.",
        _with(lambda case: Offset(period=1, batch=case.quarter, form="B", alpha="auto")),
    ),
    "matched": Row(
        "offset, matched heads",
        "As local + offset, and at refreshes the heads are also trained towards the gradient that BP sends back.",
        _with(lambda case: Offset(period=case.period, match=1.0)),
    ),
}


def chosen(names: tuple[str, ...]) -> tuple[str, ...]:
    """The named rows in the order of the table.

    Raises:
        BpfxError: a name is unknown, or there is none.
    """
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise BpfxError(f"There is no row {unknown[0]!r} to compare; rows are {', '.join(ROWS)}.")
    if not names:
        raise BpfxError(f"A comparison needs at least one row; rows are {', '.join(ROWS)}.")
    return tuple(key for key in ROWS if key in names)
