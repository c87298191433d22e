"""The table of a comparison: a line per row, from what compare.json holds."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bpfx.compare.record import Record
from bpfx.compare.rows import ROWS

__all__ = ["COLUMNS", "NOTES", "Line", "Table", "mean"]

COLUMNS = {
    "label": "row",
    "accuracy": "accuracy %, equal iterations",
    "ratio": "time per step, × BP's",
    "timed": "accuracy %, equal time",
    "iterations": "iterations in that time",
    "peak": "peak MiB",
    "share": "peak, % of BP's",
    "cosine": "cosine to BP",
    "note": "note",
}
NOTES = (
    "Accuracy: on the test images, mean ± standard deviation over seeds. Equal iterations: as many optimizer steps as "
    "BP. Equal time: so many steps as fit into the time that BP takes, its one-cycle schedule stretched to that "
    "length. Time per step: whole steps, optimizer and refreshes included, against BP's in the same minutes; median "
    "(smallest–largest) over windows on the trained model, or mean (smallest–largest) over the whole run where the row "
    "itself decides about its steps. BP's own line is BP against BP, so its spread is what the clock is worth. Peak: "
    "the most expensive whole step, a refresh if it has any, above the state (parameters, heads, optimizer, offsets). "
    "Cosine: between local and BP gradient, mean over blocks and over the run."
)


def mean(values: list[float]) -> str:
    """Mean ± standard deviation of shares, in percent.

    Example:
        >>> mean([0.5, 0.52]), mean([0.5]), mean([])
        ('51.0 ± 1.4', '50.0', '–')
    """
    if not values:
        return "–"
    text = f"{100 * statistics.fmean(values):.1f}"
    return f"{text} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else text


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        key: of `ROWS`.
        accuracy, timed: one share per seed, with as many iterations and with as much time as BP.
        iterations: made in BP's time.
        ratio, low, high: time of a step, in BP steps.
        peak, bp_peak: MiB.
        cosine: mean over seeds, in [-1, 1].
        note: what went wrong.
    """

    key: str
    accuracy: list[float]
    timed: list[float]
    iterations: int | None
    ratio: float | None
    low: float | None
    high: float | None
    peak: float | None
    bp_peak: float | None
    cosine: float | None
    note: str

    @property
    def label(self) -> str:
        return ROWS[self.key].label

    @property
    def share(self) -> float | None:
        """Peak in percent of BP's."""
        return None if self.peak is None or not self.bp_peak else 100 * self.peak / self.bp_peak

    def cells(self) -> dict[str, str]:
        """The line as text, by column."""

        def text(value: float | None, digits: int) -> str:
            return "–" if value is None else f"{value:.{digits}f}"

        ratio = text(self.ratio, 2)
        if self.low is not None and self.high is not None:
            ratio += f" ({self.low:.2f}–{self.high:.2f})"
        cosine = "exact" if ROWS[self.key].exact else text(self.cosine, 2)
        return {
            "label": self.label,
            "accuracy": mean(self.accuracy),
            "ratio": ratio,
            "timed": mean(self.timed),
            "iterations": "–" if not self.timed or self.iterations is None else str(self.iterations),
            "peak": text(self.peak, 1),
            "share": text(self.share, 0),
            "cosine": cosine,
            "note": self.note,
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """All lines, and the sentences over them."""

    title: str
    lines: list[Line]
    summary: list[str]

    @staticmethod
    def of(record: Record) -> Table:
        """The table of everything that `record` holds so far."""
        lines = [_line(record, key) for key in record.settings.rows]
        title = f"{record.settings.config.model} on {record.settings.config.data}"
        return Table(title, lines, _summary(lines))

    def best(self) -> dict[str, set[str]]:
        """By column, the keys of the lines with the best value; columns with a single value have none."""
        scores: dict[str, dict[str, float | None]] = {
            "accuracy": {line.key: _mean(line.accuracy) for line in self.lines},
            "timed": {line.key: _mean(line.timed) for line in self.lines},
            "ratio": {line.key: None if line.ratio is None else -line.ratio for line in self.lines},
            "peak": {line.key: None if line.peak is None else -line.peak for line in self.lines},
            "share": {line.key: None if line.share is None else -line.share for line in self.lines},
        }
        best: dict[str, set[str]] = {}
        for column, values in scores.items():
            known = {key: value for key, value in values.items() if value is not None}
            if len(known) > 1:
                best[column] = {key for key, value in known.items() if value == max(known.values())}
        return best

    def columns(self) -> dict[str, str]:
        """Titles by name, of the columns that have anything in them."""
        cells = [line.cells() for line in self.lines]
        return {name: title for name, title in COLUMNS.items() if any(cell[name] not in ("", "–") for cell in cells)}

    def markdown(self) -> str:
        """The table alone, best values in bold."""
        columns, best = self.columns(), self.best()
        rows = ["| " + " | ".join(columns.values()) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
        for line in self.lines:
            cells = line.cells()
            marked = [
                f"**{cells[c]}**" if line.key in best.get(c, ()) else cells[c].replace("|", "\\|") for c in columns
            ]
            rows.append("| " + " | ".join(marked) + " |")
        return "\n".join(rows)

    def print(self, console: Console) -> None:
        """Show the table on `console`."""
        cells = [line.cells() for line in self.lines]
        table = RichTable(title=self.title, title_justify="left")
        for name, title in self.columns().items():
            # Titles are wrapped here, to the width of what is under them, so that numbers never have to be.
            words = name in ("label", "note")
            width = 12 if words else max(12, *(len(cell[name]) for cell in cells))
            shown = "\n".join(textwrap.wrap(title, width))
            table.add_column(shown, justify="left" if words else "right", no_wrap=name != "note")
        for cell in cells:
            table.add_row(*(cell[name] for name in self.columns()))
        console.print(table)
        for sentence in self.summary:
            console.print(sentence, soft_wrap=True)


def _line(record: Record, key: str) -> Line:
    row = record.row(key)
    costs: dict[str, Any] = row.get("costs", {})
    runs = {budget: record.runs(key, budget) for budget in ("iterations", "time")}
    cosines = [run["cosine"] for run in runs["iterations"] if run["cosine"] is not None]
    ratios = costs.get("ratios", [])
    peaks = [costs[name] / 2**20 if name in costs else None for name in ("peak_bytes", "bp_peak_bytes")]
    return Line(
        key,
        [run["accuracy"] for run in runs["iterations"]],
        [run["accuracy"] for run in runs["time"]],
        record.time_iterations(key),
        costs.get("ratio"),
        min(ratios) if ratios else None,
        max(ratios) if ratios else None,
        peaks[0],
        peaks[1],
        statistics.fmean(cosines) if cosines else None,
        _note(row),
    )


def _note(row: dict[str, Any]) -> str:
    notes = []
    if "reason" in row:
        notes.append(f"{'failed' if row['failed'] else 'refused'}: {row['reason']}")
    for budget, runs in row["runs"].items():
        told = [f"seed {s} at iteration {r['diverged']}" for s, r in runs.items() if r["diverged"] is not None]
        if told:
            notes.append(f"diverged (equal {budget}): {', '.join(told)}")
    warned = row.get("warnings", [])
    if warned:
        notes.append(f"warned: {warned[0]}" + (f" (and {len(warned) - 1} more)" if len(warned) > 1 else ""))
    return "; ".join(notes)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _summary(lines: list[Line]) -> list[str]:
    """What came out, whatever it is."""
    sentences = []
    for field, words in (("accuracy", "with equal iterations"), ("timed", "in equal time")):
        known = {line.key: 100 * statistics.fmean(v) for line in lines if (v := getattr(line, field))}
        if len(known) < 2:
            continue
        first = max(known, key=lambda key: known[key])
        sentence = f"Most accurate {words}: {ROWS[first].label}, {known[first]:.1f} %"
        others = {key: value for key, value in known.items() if not ROWS[key].exact}
        if ROWS[first].exact and others:
            best = max(others, key=lambda key: others[key])
            sentence += f"; of the rows whose gradient is not exactly BP's: {ROWS[best].label}, {others[best]:.1f} %"
        sentences.append(sentence + ".")
    peaks = {line.key: line for line in lines if line.peak is not None}
    if len(peaks) > 1:
        least = min(peaks.values(), key=lambda line: line.peak or 0.0)
        sentences.append(f"Smallest peak: {least.label}, {least.peak:.1f} MiB, {least.share:.0f} % of BP's.")
    return sentences
