"""What `step.py` measures, what it is held against, and its report: targets, tables, plot."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from bpfx.memory import mib

ROWS = {
    "bp": "BP",
    "checkpointing": "BP + checkpointing",
    "local": "bpfx local step",
    "drop_in": "bpfx local, drop-in loop",
    "bp_step": "bpfx BP step",
    "refresh": "bpfx refresh (local + BP)",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process measures: `kind` is "memory", "time" or "conversion"; `batch` is what the targets are for."""

    title: str
    kind: str
    model: str
    batch: int
    compile: str = "eager"


PARTS = {
    "resnet50-memory": Part("ResNet-50, memory", "memory", "resnet50", 32),
    "vit-memory": Part("ViT-B/16 with LoRA, memory", "memory", "vit_b_16", 8),
    "resnet50-time": Part("ResNet-50, time, eager", "time", "resnet50", 16),
    "vit-time": Part("ViT-B/16 with LoRA, time, eager", "time", "vit_b_16", 8),
    "resnet18-inductor-time": Part("ResNet-18, time, Inductor on both sides", "time", "resnet18", 16, "inductor"),
    "resnet50-conversion": Part("ResNet-50, conversion, eager", "conversion", "resnet50", 32),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The limit that we set ourselves for one number of one row; `value` is the name of the number."""

    part: str
    row: str
    value: str
    limit: float


MODELS = ("resnet50-memory", "vit-memory")
TARGETS = [
    *(Target(part, row, "share of BP's peak", 0.25) for part in MODELS for row in ("local", "drop_in")),
    *(Target(part, row, "prediction error", 0.10) for part in MODELS for row in ("local", "bp_step")),
    *(Target("resnet50-time", row, "time, × BP", 0.95) for row in ("local", "drop_in")),
    *(Target("resnet50-time", row, "time, × BP + checkpointing", 0.75) for row in ("local", "drop_in")),
    *(Target("resnet18-inductor-time", row, "time, × BP", 0.95) for row in ("local", "drop_in")),
    Target("resnet50-conversion", "convert", "seconds", 15.0),
]


def ratios(part: dict[str, Any], row: str, base: str) -> list[float]:
    """Per round, the row's seconds over the base's of the same round; empty where one of them did not run."""
    one, other = (part["rows"].get(name, {}).get("seconds", []) for name in (row, base))
    return [a / b for a, b in zip(one, other, strict=True)] if len(one) == len(other) else []


def prediction_error(part: dict[str, Any], row: str) -> float | None:
    """Predicted over measured peak, minus 1."""
    entry = part["rows"][row]
    return None if entry["predicted_bytes"] is None else entry["predicted_bytes"] / entry["peak_bytes"] - 1


def number_for(target: Target, part: dict[str, Any]) -> float | None:
    """The number that a target limits."""
    if target.value == "seconds":
        return part["rows"][target.row]["seconds"][0]
    if target.value == "share of BP's peak":
        return part["rows"][target.row]["peak_bytes"] / part["rows"]["bp"]["peak_bytes"]
    if target.value == "prediction error":
        error = prediction_error(part, target.row)
        return None if error is None else abs(error)
    found = ratios(part, target.row, "bp" if target.value == "time, × BP" else "checkpointing")
    return statistics.median(found) if found else None


def judged(parts: dict[str, Any]) -> list[str]:
    """The targets as a Markdown table: the figure, the limit, pass or fall short."""
    lines = ["| target | limit | figure | |", "|---|--:|--:|---|"]
    for target in TARGETS:
        part = parts.get(target.part)
        percent = target.value in ("share of BP's peak", "prediction error")
        unit = (lambda v: f"{100 * v:.1f} %") if percent else (lambda v: f"{v:.2f}")
        number = number_for(target, part) if part else None
        if part is None:
            word = "not measured"
        elif number is None:
            word = "no figure"
        elif not part["as_specified"]:
            word = "not judged: other sizes than the target's"
        else:
            word = "pass" if number <= target.limit else "**falls short**"
        what = f"{PARTS[target.part].title}: {ROWS.get(target.row, target.row)}, {target.value}"
        lines.append(f"| {what} | {unit(target.limit)} | {'–' if number is None else unit(number)} | {word} |")
    return lines


def spread(values: list[float]) -> str:
    """Median with minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def table(part: dict[str, Any]) -> list[str]:
    """One part as Markdown lines."""
    rows = part["rows"]
    if part["kind"] == "conversion":
        first, *others = rows["convert"]["seconds"]
        warm = ", ".join(f"{value:.1f}" for value in others)
        return [
            "| | first in the process | further ones | blocks |",
            "|---|--:|--:|--:|",
            f"| `bpfx.convert`, verification included, seconds | {first:.1f} | {warm} | {part['blocks']} |",
        ]
    if part["kind"] == "memory":
        lines = ["| step | measured MiB | of BP's | predicted MiB | error |", "|---|--:|--:|--:|--:|"]
        for name, row in rows.items():
            error, share = prediction_error(part, name), row["peak_bytes"] / rows["bp"]["peak_bytes"]
            guess = "– | –" if error is None else f"{mib(row['predicted_bytes']):.0f} | {100 * error:+.1f} %"
            lines.append(f"| {ROWS[name]} | {mib(row['peak_bytes']):.0f} | {100 * share:.1f} % | {guess} |")
        return lines
    lines = ["| step | time, × BP | time, × BP + checkpointing |", "|---|--:|--:|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {ROWS[name]} | did not run: {row['error'].replace('|', '/')} | |")
        else:
            pair = (spread(ratios(part, name, base)) for base in ("bp", "checkpointing"))
            lines.append(f"| {ROWS[name]} | {' | '.join(pair)} |")
    seconds = rows["bp"].get("seconds", [])
    if seconds:
        # What a reader needs to judge the ratios: how much the same work varied.
        lines += ["", f"BP itself took {spread(seconds)} s over the rounds."]
    return lines


def markdown(parts: dict[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# One training step",
        "",
        "A step is forward, loss and backward, without the optimizer, all gradients kept. Memory: peak MiB above the "
        "state before the step (parameters, buffers, batch, offset). Time: median over rounds of the ratio within a "
        "round, minimum and maximum in brackets. How to read them: `benchmarks/README.md`.",
        "",
        "## Targets",
        "",
        *judged(parts),
    ]
    for part in parts.values():
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in part["settings"].items() if v is not None)
        versions = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
        made = f"{part['machine']}, load {part['load_before']}; {part['date'][:10]}, `{part['command']}`."
        lines += ["", f"## {part['title']}", "", *table(part), ""]
        lines.append(f"{part['blocks']} blocks; {settings}. {versions}; {made}")
    return "\n".join([*lines, ""])


def plot(parts: dict[str, Any], path: Path) -> bool:
    """Memory over one step, a panel per model; False where nothing is to draw or matplotlib is missing."""
    shown = [part for part in parts.values() if part["kind"] == "memory"]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not shown:
        return False
    styles: dict[str, dict[str, Any]] = {
        "bp": {"color": "#0072B2", "linestyle": "-"},
        "checkpointing": {"color": "#56B4E9", "linestyle": (0, (5, 2))},
        "bp_step": {"color": "#009E73", "linestyle": (0, (1, 1))},
        "local": {"color": "#E69F00", "linestyle": "-"},
    }
    figure = Figure(figsize=(5.75 * len(shown), 4.6), dpi=150, layout="constrained")
    for axes, part in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for name, style in styles.items():
            row = part["rows"][name]
            label = f"{ROWS[name]} (peak {mib(row['peak_bytes']):.0f} MiB)"
            progress, live = zip(*row["timeline"], strict=True)
            axes.plot([100 * share for share in progress], live, label=label, linewidth=1.5, **style)
        title = f"{part['title'].removesuffix(', memory')}, batch {part['settings']['batch']}"
        axes.set(title=title, xlabel="progress of the step (%)", ylabel="memory above the start (MiB)")
        axes.set_xlim(0, 100)
        # Above the highest curve, so that no label covers one.
        axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", fontsize="small")
    figure.savefig(path)
    return True
