"""The report of `losses.py`: table and plot from the runs that are stored."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Key = tuple[str, int, bool]  # loss, blocks, offset

COLUMNS = (
    "| loss | blocks | offset | seeds | test accuracy % | local step's peak, × BP | refresh's peak, × BP | time, × BP "
    "| head parameters | cosine at the end | cosine over refreshes | note |"
)
ABOUT = (
    "Every block is trained by the loss named, the last one always by the task loss. *Label-free*: no block but the "
    "last one sees a label. Accuracy: mean ± standard deviation over seeds, percent of the test images. Peak and time "
    "are those of forward, loss and backward, against BP's on the same model in the same run; BP steps and the loss's "
    "are timed in turn, a period at a time, so that with the offset every figure has its share of refreshes: median "
    "over windows and seeds, minimum and maximum in brackets. Cosine: of local and BP gradient, mean over the blocks "
    "before the last; at the end of training on a few batches, and over all refreshes of the training."
)


def newest(runs: dict[str, Run]) -> dict[str, Any]:
    """The settings of the run that was made last."""
    return max(runs.values(), key=lambda run: run["date"])["settings"]


def finished(runs: dict[str, Run], settings: dict[str, Any]) -> list[Run]:
    """Runs of these settings that came to their end."""
    return [run for run in runs.values() if run["status"] == "finished" and run["settings"] == settings]


def grouped(runs: dict[str, Run], settings: dict[str, Any]) -> dict[Key, list[Run]]:
    """Runs of these settings by row, BP first, their seeds in order."""
    found: dict[Key, list[Run]] = {}
    shown = [run for run in runs.values() if run["settings"] == settings]
    for run in sorted(shown, key=lambda r: (r["loss"] != "bp", r["loss"], r["blocks"], r["offset"], r["seed"])):
        found.setdefault((run["loss"], run["blocks"], run["offset"]), []).append(run)
    return found


def markdown(runs: dict[str, Run], settings: dict[str, Any]) -> str:
    """The whole report on the runs of these settings; every row as it came out."""
    rows = grouped(runs, settings)
    lines = ["# Local losses", "", ABOUT, "", sentence(settings), ""]
    lines += [COLUMNS, "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"]
    lines += [f"| {' | '.join(cells(key, row))} |" for key, row in rows.items()]
    arguments = {run["loss"]: run["arguments"] for row in rows.values() for run in row if run.get("arguments")}
    if arguments:
        lines += ["", *(f"- {loss}: {words}." for loss, words in arguments.items())]
    others = sum(run["settings"] != settings for run in runs.values())
    if others:
        lines += ["", f"{others} runs with other settings are stored but not shown."]
    made = [run for row in rows.values() for run in row]
    versions = [", ".join(f"{key} {value}" for key, value in run["made_with"].items()) for run in made]
    lines += ["", *(f"Made with {words}." for words in dict.fromkeys(versions))]
    return "\n".join([*lines, "Each run's own command, settings and date are in the JSON.", ""])


def sentence(settings: dict[str, Any]) -> str:
    """The one configuration of all rows."""
    picked = {key: value for key, value in settings.items() if key not in ("model", "data")}
    depths = "-".join(str(n) for n in picked.pop("depths"))
    words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in picked.items())
    return f"One configuration for all rows: {settings['model']} {depths} on {settings['data']}; {words}."


def cells(key: Key, row: list[Run]) -> list[str]:
    """One line of the table."""
    loss, blocks, offset = key
    made = [run for run in row if run["status"] == "finished"]
    is_bp = loss == "bp"
    name = "BP" if is_bp else loss + (" (label-free)" if any(run.get("label_free") for run in made) else "")
    head = [name, "–" if is_bp else str(blocks), "–" if is_bp else "yes" if offset else "no", str(len(made))]
    if not made:
        return [*head, *["–"] * 7, note(row)]
    times = [ratio for run in made for ratio in run.get("time_ratios", [])]
    middle = [
        accuracy(made),
        "1.00" if is_bp else share(made, "local"),
        share(made, "refresh"),
        "1.00" if is_bp else spread(times),
        "–" if is_bp else f"{made[0]['head_parameters']:,}",
        average([run["cosine_end"] for run in made]),
        average([run["cosine_refreshes"] for run in made]),
    ]
    return [*head, *middle, note(row)]


MARKS = "<!-- losses table -->", "<!-- /losses table -->"
SHORT = (
    "| local loss | test accuracy %, 4 blocks | 8 blocks | 16 blocks | 8 blocks with the offset, K = 4 "
    "| peak of a local step, × BP | time, × BP | cosine to BP's gradient |"
)


def short(runs: dict[str, Run], settings: dict[str, Any]) -> str:
    """A line for each loss, the best first; memory, time and cosine are those in 8 blocks."""
    rows = {key: [run for run in row if run["status"] == "finished"] for key, row in grouped(runs, settings).items()}
    rows = {key: row for key, row in rows.items() if row}
    middle = {loss: rows[loss, 8, False] for loss, blocks, offset in rows if (blocks, offset) == (8, False)}
    lines = [SHORT, "|---|" + "--:|" * 7]
    for (loss, _, _), row in rows.items():
        if loss == "bp":
            lines.append(f"| BP | {' | '.join([accuracy(row)] * 3)} | – | 1.00 | 1.00 | – |")
    for loss in sorted(middle, key=lambda k: -statistics.fmean(run["accuracy_percent"] for run in middle[k])):
        reached = [accuracy(rows[key]) if key in rows else "–" for key in ((loss, 4, False), (loss, 16, False))]
        offset = accuracy(rows[loss, 8, True]) if (loss, 8, True) in rows else "–"
        times = [ratio for run in middle[loss] for ratio in run.get("time_ratios", [])]
        base, _, variant = loss.partition("-")
        name = f"`{base}`" + (f", {variant}" if variant else "")
        name += " (no labels)" if any(run.get("label_free") for run in middle[loss]) else ""
        cells = [name, reached[0], accuracy(middle[loss]), reached[1], offset, share(middle[loss], "local")]
        cells += [f"{statistics.median(times):.2f}" if times else "–"]
        cells += [average([run["cosine_end"] for run in middle[loss]])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme(text: str, runs: dict[str, Run], settings: dict[str, Any]) -> str:
    """The page with its table, which stands between markers, made anew."""
    start, end = MARKS
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{short(runs, settings)}\n{end}{rest.split(end, 1)[1]}"


def accuracy(made: list[Run]) -> str:
    """Mean ± standard deviation."""
    values = [run["accuracy_percent"] for run in made]
    middle = f"{statistics.fmean(values):.1f}"
    return f"{middle} ± {statistics.stdev(values):.1f}" if len(values) > 1 else middle


def share(made: list[Run], kind: str) -> str:
    """Peak of a kind of step over BP's."""
    found = [run["peak_bytes"][kind] / run["peak_bytes"]["bp"] for run in made if kind in run["peak_bytes"]]
    return f"{statistics.median(found):.2f}" if found else "–"


def spread(values: list[float]) -> str:
    """Median with minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "–"


def average(values: list[float | None]) -> str:
    kept = [value for value in values if value is not None]
    return f"{statistics.fmean(kept):.2f}" if kept else "–"


def note(row: list[Run]) -> str:
    """What went otherwise: refused, failed, diverged, warned."""
    said = [f"{run['status']}: {run['reason']}" for run in row if run["status"] != "finished"]
    said += [f"seed {r['seed']} diverged at {r['diverged_at']}" for r in row if r.get("diverged_at") is not None]
    said += [f"warned: {words}" for run in row for words in run["warnings"]]
    return "; ".join(dict.fromkeys(said)).replace("|", "/").replace("\n", " ")


def plot(runs: dict[str, Run], settings: dict[str, Any], path: Path) -> bool:
    """Accuracy against the number of blocks, without and with the offset; False where there is nothing to draw."""
    rows = {
        key: [run["accuracy_percent"] for run in row if run["status"] == "finished"]
        for key, row in grouped(runs, settings).items()
    }
    rows = {key: values for key, values in rows.items() if values}
    names = list(dict.fromkeys(loss for loss, _, _ in rows if loss != "bp"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not names:
        return False
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, offset in zip(panels, (False, True), strict=True):
        if ("bp", 1, False) in rows:
            level = statistics.fmean(rows["bp", 1, False])
            axes.axhline(level, color="black", linestyle="--", linewidth=1.2, label="BP")
        for index, name in enumerate(names):
            points = [
                (blocks, values)
                for (loss, blocks, with_it), values in rows.items()
                if (loss, with_it) == (name, offset)
            ]
            if points:
                axes.errorbar(
                    [blocks for blocks, _ in points],
                    [statistics.fmean(values) for _, values in points],
                    yerr=[statistics.stdev(values) if len(values) > 1 else 0 for _, values in points],
                    label=name,
                    # Colour and marker: ten losses are more than colours alone can tell apart.
                    color=f"C{index % 10}",
                    marker="osD^vPX<>*"[index % 10],
                    linewidth=1.5,
                    markersize=5,
                    elinewidth=0.8,
                    capsize=2,
                )
        counts = sorted({blocks for loss, blocks, _ in rows if loss != "bp"})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlim(counts[0] / 1.15, counts[-1] * 1.15)  # a panel may have no points, and one count has no width
        axes.minorticks_off()
        axes.set(title="with the offset" if offset else "without offset", xlabel="blocks")
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy (%)")
    lines = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path)
    return True


def spoken(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
