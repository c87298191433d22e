"""What a run ends with: one table, printed and as report.md and report.json, one PNG of curves, one SVG of the plan."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from bpfx import draw
from bpfx._config import Config
from bpfx._files import finite
from bpfx.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LABELS", "Report", "Row", "make"]

LABELS = {
    "bp": "BP",
    "checkpointing": "BP + checkpointing",
    "local": "local",
    "offset": "local + offset",
}
# Okabe and Ito's palette, told apart by people with any colour vision; line styles differ as well.
_STYLES: dict[str, dict[str, Any]] = {
    "bp": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "checkpointing": {"color": "#56B4E9", "linestyle": (0, (5, 2)), "marker": "D"},
    "local": {"color": "#E69F00", "linestyle": (0, (3, 1, 1, 1)), "marker": "s"},
    "offset": {"color": "#009E73", "linestyle": "-", "marker": "^"},
}
_COLUMNS = {
    "method": "method",
    "peak_mib": "measured peak MiB",
    "predicted_mib": "predicted peak MiB",
    "state_mib": "state MiB",
    "seconds_per_step": "s/step",
    "accuracy": "test accuracy %",
    "cosine": "cosine to BP",
}
_NOTES = (
    "Peak: forward and backward of one step above what lives between steps; for local + offset the refresh step, the "
    "most expensive one. State: parameters, buffers, heads, offsets and optimizer. s/step: median over periods, "
    "optimizer included. Cosine: between local and BP gradient, mean over blocks and over the run."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: key of `LABELS`.
        peak_mib: measured peak of one step, MiB.
        predicted_mib: the plan's prediction of it, MiB; None where there is none.
        state_mib: what lives between steps, MiB.
        seconds_per_step: median, seconds.
        accuracy: on the test images, percent; None where it equals BP's by construction.
        cosine: mean between local and BP gradient, in [-1, 1]; None where there is nothing to compare.
    """

    method: str
    peak_mib: float
    predicted_mib: float | None
    state_mib: float | None
    seconds_per_step: float
    accuracy: float | None
    cosine: float | None

    def cells(self) -> list[str]:
        """The line as text, in the order of the table's columns."""

        def text(value: float | None, digits: int) -> str:
            return "–" if value is None else f"{value:.{digits}f}"

        accuracy = "as BP" if self.method == "checkpointing" else text(self.accuracy, 1)
        sizes = [text(value, 1) for value in (self.peak_mib, self.predicted_mib, self.state_mib)]
        return [LABELS[self.method], *sizes, text(self.seconds_per_step, 3), accuracy, text(self.cosine, 2)]


@dataclasses.dataclass(frozen=True)
class Report:
    """The table of a run, the sentences under it, and where it was written."""

    rows: list[Row]
    summary: list[str]
    folder: Path

    def markdown(self) -> str:
        """The table and its sentences as Markdown."""
        lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "|---" + "|--:" * (len(_COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.summary, "", _NOTES, ""])

    def print(self, console: Console) -> None:
        """Show the table on `console`."""
        table = Table(title=f"Report of {self.folder}", title_justify="left")
        for index, title in enumerate(_COLUMNS.values()):
            table.add_column(title, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)
        for sentence in self.summary:
            console.print(sentence, soft_wrap=True)


def make(
    config: Config,
    folder: Path,
    results: dict[str, Any],
    metrics: list[dict[str, Any]],
    plan: Plan,
    console: Console,
) -> Report:
    """Write everything a run ends with into `folder`, and print the table.

    Args:
        config: the settings of the run.
        folder: of the run.
        results: what was measured, by method; `checkpointing` may be None.
        metrics: the rows of metrics.csv.
        plan: from `bpfx.plan`.
        console: for the table and the names of the files.
    """
    # A refresh of other samples or pieces than the batch has is not what the plan predicts.
    refreshes = config.offset_batch is None and config.micro_batches == 1 and config.lam != "auto"
    known = {k: v for k, v in plan.predicted.items() if k != "refresh" or refreshes}
    rows = [_row(method, results[method], known) for method in LABELS if results.get(method)]
    report = Report(rows, _summary(config, results), folder)
    title = f"# {config.model} on {config.data}\n\n"
    settings = (
        f"{config.iterations} iterations of {config.batch_size} images, AdamW, one cycle to lr {config.lr:g}, "
        f"{len(plan.blocks)} blocks, offset period {config.period}, seed {config.seed}, {config.compile}"
        f"{'' if config.compile == 'eager' else ' (BP and checkpointing run eager)'}.\n\n"
    )
    (folder / "report.md").write_text(title + settings + report.markdown(), encoding="utf-8")
    content = {"rows": [dataclasses.asdict(row) for row in rows], "summary": report.summary, "results": results}
    (folder / "report.json").write_text(json.dumps(finite(content), indent=1) + "\n", encoding="utf-8")
    (folder / "plan.txt").write_text(f"{plan}\n", encoding="utf-8")
    draw.write(plan, folder / "plan.svg", title=f"{config.model}, {len(plan.blocks)} blocks")
    drawn = curves(folder / "curves.png", f"{config.model} on {config.data}", results, metrics)
    report.print(console)
    weights = [f"{method}.pt" for method in config.methods]
    files = [
        *weights,
        "report.md",
        "report.json",
        "metrics.csv",
        *(["refreshes.csv"] if "offset" in config.methods else []),
        "plan.txt",
        "plan.svg",
        *(["curves.png"] if drawn else []),
    ]
    console.print(f"In {folder}: {', '.join(files)}", soft_wrap=True)
    if not drawn:
        console.print("No curves.png, because matplotlib is missing: pip install 'bpfx[plot]'")
    return report


def _row(method: str, result: dict[str, Any], known: Mapping[str, int]) -> Row:
    # A block whose gradient is exactly zero has no direction, hence no cosine.
    cosines = [value for value in result.get("cosines", []) if math.isfinite(value)]
    accuracy = result.get("accuracy")
    predicted = _predicted(method, known)
    state = result.get("state_bytes")
    return Row(
        method,
        result["peak_bytes"] / 2**20,
        None if predicted is None else predicted / 2**20,
        None if state is None else state / 2**20,
        result["seconds_per_step"],
        None if accuracy is None else 100 * accuracy,
        statistics.fmean(cosines) if cosines else None,
    )


def _predicted(method: str, predicted: Mapping[str, int]) -> int | None:
    # A refresh is the most expensive step of a run with an offset.
    return predicted.get("refresh" if method == "offset" else method)


def _summary(config: Config, results: dict[str, Any]) -> list[str]:
    """What came out, whatever it is."""
    sentences = []
    final = {method: 100 * results[method]["accuracy"] for method in config.methods}
    if "local" in final and "offset" in final:
        gain = final["offset"] - final["local"]
        change = "the same as" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
        sentence = f"With the offset, test accuracy is {change} local losses alone"
        sentences.append(sentence + (f"; BP reaches {final['bp']:.1f} %." if "bp" in final else "."))
    if "bp" in results and "local" in results:
        share = 100 * results["local"]["peak_bytes"] / max(results["bp"]["peak_bytes"], 1)
        time_share = results["local"]["seconds_per_step"] / results["bp"]["seconds_per_step"]
        sentences.append(f"A local step peaks at {share:.0f} % of BP's memory and takes {time_share:.2f}× its time.")
    for method in config.methods:
        if results[method]["diverged"] is not None:
            at = results[method]["diverged"]
            sentences.append(f"{LABELS[method]}: the loss became infinite or NaN at iteration {at}; try a lower --lr.")
    return sentences


def curves(path: Path, title: str, results: dict[str, Any], metrics: list[dict[str, Any]]) -> bool:
    """Draw accuracy over iterations and memory over one step as a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # A Figure of its own instead of pyplot: no display is needed and no global state is left behind.
    figure = Figure(figsize=(11.5, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _accuracy_panel(left, metrics)
    _memory_panel(right, results)
    for axes in (left, right):
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.savefig(path)
    return True


def _accuracy_panel(axes: Axes, metrics: list[dict[str, Any]]) -> None:
    for method in LABELS:
        points = [
            (row["iteration"], 100 * row["test_accuracy"])
            for row in metrics
            if row["method"] == method and row["test_accuracy"] is not None
        ]
        if points:
            label = f"{LABELS[method]} ({points[-1][1]:.1f} %)"
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, linewidth=1.8, **_STYLES[method])
    axes.set(title="Test accuracy", xlabel="iteration", ylabel="test accuracy (%)")
    axes.legend(frameon=False, loc="lower right")


def _memory_panel(axes: Axes, results: dict[str, Any]) -> None:
    for method in LABELS:
        result = results.get(method)
        if not result:
            continue
        end = max(result["timeline"][-1][0], 1e-9)
        # As a share of the step: measuring slows the methods down unequally, so milliseconds would mislead.
        share = [100 * moment / end for moment, _ in result["timeline"]]
        mib = [live / 2**20 for _, live in result["timeline"]]
        style = {key: value for key, value in _STYLES[method].items() if key != "marker"}
        step = " refresh" if method == "offset" else ""
        label = f"{LABELS[method]}{step} (peak {result['peak_bytes'] / 2**20:.1f} MiB)"
        axes.plot(share, mib, label=label, linewidth=1.4, **style)
    axes.set(title="Memory over one step", xlabel="progress of the step (%)", ylabel="memory above the start (MiB)")
    axes.set_ylim(bottom=0)
    # Above the highest curve, so that no label covers one.
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
    axes.legend(frameon=False, loc="upper right", fontsize="small")
