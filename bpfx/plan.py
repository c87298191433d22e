"""The plan: what the compiler decided, and what it will cost. Nothing is trained to make it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from bpfx.memory import format_bytes


@dataclasses.dataclass
class Crossing:
    """A value at the edge of a block: its name in the graph, shape in the example batch, dtype, size in bytes, and
    whether it carries a gradient in the whole model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    differentiable: bool


@dataclasses.dataclass
class BlockPlan:
    """One block.

    Attributes:
        index: position, from 0.
        name: its first and last module.
        modules: paths of its innermost modules.
        parameters: how many numbers it trains or reads as parameters.
        parameter_bytes: their size.
        parameter_names: of those that train.
        inputs, outputs: what crosses into it and out of it.
        head: the auxiliary head in words, ``None`` where there is none.
        head_parameters: numbers that the head trains.
        head_bytes: their size.
        head_flops: floating-point operations of the head's forward and backward on the example batch; ``None`` where
            they are not predicted.
        opaque: module paths that run as themselves.
        local_peak_bytes: predicted peak of its forward, head and backward alone; ``None`` where it is not predicted.
    """

    index: int
    name: str
    modules: list[str]
    parameters: int
    parameter_bytes: int
    parameter_names: list[str]
    inputs: list[Crossing]
    outputs: list[Crossing]
    head: str | None
    head_parameters: int
    head_bytes: int
    head_flops: int | None
    opaque: list[str]
    local_peak_bytes: int | None


@dataclasses.dataclass
class Schedule:
    """One way to take a training step, and what it is predicted to need.

    Attributes:
        name: ``"bp"``, ``"ac"`` (activation checkpointing), ``"ac_oib"`` (with the optimizer in the backward pass),
            ``"ac_micro"`` (with micro-batches), ``"local"`` (the drop-in loop), ``"local_serial"``,
            ``"refresh_serial"``, ``"bp_serial"`` (:class:`bpfx.BlockTrainer`).
        words: the same for readers.
        micro_batches: pieces of the batch.
        exact: whether its gradient is that of BP.
        peak_bytes: highest bytes above ``state``.
        categories: those bytes by what they hold: ``gradients``, ``boundaries``, ``activations``, ``heads`` (their
            gradients), ``optimizer`` and ``offsets`` (temporaries of a step, of a refresh). Empty where only the sum
            is predicted.
        flops: floating-point operations of matrix products, convolutions and attention, a multiply-add as two.
        state: bytes that live between steps: ``parameters`` (and buffers), ``optimizer state`` (as AdamW's: two numbers
            a parameter), ``offsets``, ``heads`` (with their optimizer state).
        set_by: which block and program set the peak, for schedules of ours.
    """

    name: str
    words: str
    micro_batches: int
    exact: bool
    peak_bytes: int
    categories: dict[str, int]
    flops: int
    state: dict[str, int]
    set_by: str = ""


@dataclasses.dataclass
class Plan:
    """What ``bpfx.plan`` and ``step.plan`` return; ``print(plan)`` shows it as a table.

    Attributes:
        blocks: in order of execution.
        predicted: peak bytes above the state before a step, parameters excluded, by kind of step: ``"bp"`` plain
            back-propagation, ``"local"`` the local step, ``"bp_blocks"`` the BP step that recomputes block by block,
            ``"refresh"`` both one after the other (the offsets that stay are state, not counted).
            Empty where an operator has no fake version (then ``notes`` says so). Made when it is first asked for.
        capture: what was tried, in order, with the reason for each fall.
        unreached: trainable parameters that even plain BP gives no gradient.
        notes: anything else a reader should know.
        batch_size: samples in the example batch.
        micro_batches: what :class:`bpfx.BlockTrainer` splits a batch into by default.
        budget: the memory budget in bytes that the blocks were chosen for, if there was one.
        schedules: what every way to take a step is predicted to need, plain BP and checkpointing among them; only
            ``bpfx.plan`` fills it, ``BlockTrainer.predict`` gives it for a step.
    """

    blocks: list[BlockPlan]
    predicted: Mapping[str, int]
    capture: list[str]
    unreached: list[str]
    notes: list[str]
    batch_size: int
    micro_batches: int = 1
    budget: int | None = None
    schedules: list[Schedule] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        predicted = dict(self.predicted)  # first: it may add a note
        rows = [("block", "modules", "parameters", "reads", "passes on", "head", "local peak")]
        for b in self.blocks:
            rows.append(
                (
                    str(b.index),
                    _short(b.name, 46),
                    f"{b.parameters:,}",
                    _crossings(b.inputs),
                    _crossings([o for o in b.outputs if o.shape]),
                    f"{b.head} ({b.head_parameters:,})" if b.head else "task loss" if b is self.blocks[-1] else "none",
                    format_bytes(b.local_peak_bytes) if b.local_peak_bytes is not None else "?",
                )
            )
        lines = _columns(rows)
        heads = [b for b in self.blocks if b.head_parameters]
        if heads:
            numbers, size = sum(b.head_parameters for b in heads), sum(b.head_bytes for b in heads)
            work = [b.head_flops for b in heads if b.head_flops is not None]
            flops = f", {_count(sum(work))}FLOPs a step" if work else ""
            lines.append(f"heads: {numbers:,} parameters, {format_bytes(size)}{flops}")
        lines.append("")
        words = {"bp": "plain BP", "local": "local step", "bp_blocks": "BP step, block by block", "refresh": "refresh"}
        if self.schedules:
            lines += _schedule_table(self.schedules, self.batch_size)
        elif predicted:
            base = predicted.get("bp", 0)
            lines.append(f"predicted peak at batch {self.batch_size}, parameters excluded:")
            for kind, peak in predicted.items():
                share = f"  {peak / base:5.0%} of plain BP" if base and kind != "bp" else ""
                lines.append(f"  {words.get(kind, kind):24s} {format_bytes(peak):>10s}{share}")
        lines.append("capture:")
        lines += [f"  {line}" for line in self.capture]
        opaque = [p for b in self.blocks for p in b.opaque]
        if opaque:
            shown = ", ".join(repr(p or "the whole model") for p in opaque[:6])
            lines.append(f"opaque (run as themselves): {shown}" + (f" and {len(opaque) - 6} more" * (len(opaque) > 6)))
        if self.unreached:
            lines.append(f"no gradient even under plain BP: {', '.join(self.unreached)}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


_PARTS = ("gradients", "boundaries", "activations", "heads")


def _schedule_table(schedules: list[Schedule], batch: int) -> list[str]:
    base = schedules[0]
    rows: list[tuple[str, ...]] = [
        ("one training step", "pieces", "peak", "of BP", *_PARTS, "other", "+ state", "FLOPs of BP", "gradient")
    ]
    for s in schedules:
        share = f"{s.peak_bytes / base.peak_bytes:.0%}" if base.peak_bytes else "?"
        work = f"{s.flops / base.flops:.2f}" if base.flops else "?"
        # Other: what an optimizer's step, or the storing of an offset, makes and drops.
        other = sum(size for name, size in s.categories.items() if name not in _PARTS)
        sizes = [*(s.categories.get(p, 0) for p in _PARTS), other]
        parts = [format_bytes(size) if s.categories else "?" for size in sizes]
        kind = "BP's" if s.exact else "both" if s.name.startswith("refresh") else "local"
        state = format_bytes(sum(s.state.values()))
        rows.append((s.words, str(s.micro_batches), format_bytes(s.peak_bytes), share, *parts, state, work, kind))
    table = _columns(rows)
    return [f"predicted at batch {batch}; the peak is above the state (weights, AdamW, offsets, heads):", *table]


def _count(number: int) -> str:
    """A number with the prefix of its size, and a space before it."""
    for factor, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {prefix}"
    return f"{number} "


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def _crossings(values: list[Crossing]) -> str:
    real = [v for v in values if v.bytes]
    if not real:
        return "-"
    total = format_bytes(sum(v.bytes for v in real))
    largest = max(real, key=lambda v: v.bytes)
    more = f" +{len(real) - 1}" if len(real) > 1 else ""
    return f"{'×'.join(map(str, largest.shape))}{more}, {total}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width // 2 - 1] + "…" + text[-(width // 2) :]
