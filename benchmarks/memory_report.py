"""What `memory.py` measures, what it is held against, and its report: targets, tables, plots."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from step_report import ratios, spread

from bpfx.memory import mib


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run a training step; `recipe` is its family, the same at any number of micro-batches."""

    label: str
    recipe: str
    micro_batches: int = 1
    ours: bool = False


ROWS = {
    "bp": Row("BP", "bp"),
    "bp_micro4": Row("BP, 4 micro-batches", "bp", 4),
    "ac": Row("checkpointing", "ac"),
    "ac_oib": Row("checkpointing, optimizer in backward", "ac_oib"),
    "ac_micro4": Row("checkpointing, 4 micro-batches", "ac", 4),
    "local_serial1": Row("bpfx local", "local", 1, True),
    "local_serial4": Row("bpfx local, 4 micro-batches", "local", 4, True),
    "bp_serial4": Row("bpfx BP, 4 micro-batches", "bp_serial", 4, True),
    "refresh4": Row("bpfx refresh, 4 micro-batches", "refresh", 4, True),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process measures.

    `batch` is what the targets are for; `depth` is 0 for an image model; `blocks` is "layers" (the units of
    checkpointing), a memory budget ("300MiB"), or what `bpfx.convert` takes as `blocks`.
    """

    title: str
    model: str
    batch: int
    rounds: int
    depth: int = 0
    blocks: str | int = "layers"

    def rows(self) -> list[str]:
        """Names of its rows."""
        return list(ROWS)


PARTS = {
    **{f"stack-{n}": Part(f"Transformer, {n} layers", "stack", 8, 5 if n < 32 else 3, n) for n in (4, 8, 16, 32, 64)},
    "resnet50": Part("ResNet-50", "resnet50", 32, 5, blocks="300MiB"),
    "resnet152": Part("ResNet-152", "resnet152", 32, 3, blocks="300MiB"),
    "vit_b_16": Part("ViT-B/16", "vit_b_16", 16, 3, blocks=8),
    "vit_b_16-lora": Part("ViT-B/16 with LoRA", "vit_b_16-lora", 16, 3),
}


# --- numbers ----------------------------------------------------------------------------------------------------------


def peak(part: dict[str, Any], name: str) -> int | None:
    """Peak bytes of a row, stored offsets included; None where it did not run."""
    row = part["rows"].get(name, {})
    return row["peak_bytes"] + row["offset_bytes"] if "peak_bytes" in row else None


def whole_run(part: dict[str, Any], micro_batches: int, offsets: bool = True) -> int | None:
    """Peak bytes of a run with offsets: the local step's or the refresh's, and the offsets stored all the while."""
    local, refresh = (part["rows"].get(f"{name}{micro_batches}", {}) for name in ("local_serial", "refresh"))
    if "peak_bytes" not in local or "peak_bytes" not in refresh:
        return None
    return max(local["peak_bytes"], refresh["peak_bytes"]) + (refresh["offset_bytes"] if offsets else 0)


def best_exact(part: dict[str, Any], micro_batches: int) -> tuple[int, str] | None:
    """The exact recipe with the lowest peak, among those with at most so many micro-batches."""
    names = [name for name, row in ROWS.items() if not row.ours and row.micro_batches <= micro_batches]
    known = [(size, name) for name in names if (size := peak(part, name)) is not None]
    return min(known) if known else None


def heads_bytes(part: dict[str, Any]) -> int | None:
    """What bpfx keeps between steps and BP does not, offsets aside: heads, their buffers, their optimizer state."""
    ours, theirs = (part["rows"].get(name, {}).get("state_bytes") for name in ("local_serial1", "bp"))
    return None if ours is None or theirs is None else ours - theirs


def prediction_error(row: dict[str, Any]) -> float | None:
    """Predicted over measured peak, minus 1."""
    return row["predicted_bytes"] / row["peak_bytes"] - 1 if row.get("predicted_bytes") is not None else None


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One target: the parts that it is about, its limit and the figure. None where there is none."""

    what: str
    parts: tuple[str, ...]
    limit: float | None
    figure: float | None
    unit: str
    strict: bool = False  # the figure has to be below the limit
    note: str = ""  # beside the limit
    aside: float | None = None  # beside the figure: the same with the state of bpfx's heads

    def line(self, parts: dict[str, Any]) -> str:
        percent = self.unit == "%"

        def show(value: float | None) -> str:
            if value is None:
                return "–"
            return f"{100 * value:.1f} %" if percent else f"{value:.{2 if self.unit == '×' else 1}f} {self.unit}"

        if self.figure is None or self.limit is None:
            word = "no figure"
        elif not all(parts[name]["as_specified"] for name in self.parts):
            word = "not judged: other sizes than the target's"
        elif self.figure < self.limit or (self.figure == self.limit and not self.strict):
            word = "met"
        else:
            word = "**not met**"
        sign = "<" if self.strict else "≤"
        aside = "" if self.aside is None else f" (with heads: {show(self.aside)})"
        return f"| {self.what} | {sign} {show(self.limit)}{self.note} | {show(self.figure)}{aside} | {word} |"


def _mib(count: float | None) -> float | None:
    return None if count is None else mib(count)


def _over(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def verdicts(parts: dict[str, Any]) -> list[Verdict]:
    """Every target of the parts that were measured, with its figure."""
    found = []
    for name, part in parts.items():
        spec, about = PARTS[name], (name,)
        if spec.depth:
            local, bp = peak(part, "local_serial4"), peak(part, "bp_serial4")
            found.append(Verdict(f"{spec.title}: {ROWS['local_serial4'].label}", about, 80.0, _mib(local), "MiB"))
            stored = part.get("boundary_bytes", 0)
            limit = None if local is None else mib(1.25 * local + stored)
            note = f" (1.25 × local + {mib(stored):.0f} stored)" if limit is not None else ""
            found.append(Verdict(f"{spec.title}: {ROWS['bp_serial4'].label}", about, limit, _mib(bp), "MiB", note=note))
        for count in () if spec.depth else (4,):
            run, best = whole_run(part, count), best_exact(part, count)
            title = f"{spec.title}: whole run, {count} micro-batches"
            # Heads are state, as the optimizer's is, but only bpfx has them: the figures say what they would add.
            heads = heads_bytes(part)
            all_of_it = None if run is None or heads is None else run + heads
            figure, aside = (_over(size, peak(part, "bp")) for size in (run, all_of_it))
            found.append(Verdict(f"{title}, share of BP's", about, 0.20, figure, "%", aside=aside))
            limit = mib(best[0]) if best and run is not None else None
            note = f" ({ROWS[best[1]].label})" if best and limit is not None else ""
            what = f"{title}, against the best exact recipe"
            aside = _mib(all_of_it)
            found.append(Verdict(what, about, limit, _mib(run), "MiB", strict=True, note=note, aside=aside))
        for count in (1, 4):
            ratio = ratios(part, f"local_serial{count}", "ac")
            what = f"{spec.title}: {ROWS[f'local_serial{count}'].label}, time of checkpointing's"
            found.append(Verdict(what, about, 0.8, statistics.median(ratio) if ratio else None, "×"))
        errors = [
            abs(e) for n, row in part["rows"].items() if ROWS[n].ours and (e := prediction_error(row)) is not None
        ]
        what = f"{spec.title}: largest prediction error of bpfx's rows"
        found.append(Verdict(what, about, 0.10, max(errors, default=None), "%"))
    both = ("resnet50", "resnet152")
    if set(both) <= parts.keys():
        # Offsets are of the parameters' size: the target leaves parameters out, a user's memory does not.
        for offsets, words in ((False, "parameters and offsets excluded"), (True, "parameters excluded")):
            shallow, deep = (whole_run(parts[name], 4, offsets) for name in both)
            what = f"Whole run, 4 micro-batches: ResNet-152 over ResNet-50, {words}"
            found.append(Verdict(what, both, 1.1, _over(deep, shallow), "×"))
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _cells(part: dict[str, Any], name: str) -> list[str]:
    row, whole, bp = part["rows"][name], peak(part, name), peak(part, "bp")
    if whole is None:
        return [f"did not run: {row['error'].replace('|', '/')}", *[""] * 8]
    share, error = _over(whole, bp), prediction_error(row)
    return [
        f"{mib(row['peak_bytes']):.1f}",
        f"{mib(row['offset_bytes']):.1f}" if row["offset_bytes"] else "–",
        f"{mib(whole):.1f}",
        "–" if share is None else f"{100 * share:.1f} %",
        f"{mib(row['state_bytes']):.0f}",
        "–" if error is None else f"{mib(row['predicted_bytes']):.1f}",
        "–" if error is None else f"{100 * error:+.1f} %",
        spread(ratios(part, name, "ac")),
        spread(ratios(part, name, "bp")),
    ]


HEADINGS = ["peak MiB", "offsets MiB", "peak + offsets", "of BP's", "state MiB", "predicted MiB", "error"]


def table(part: dict[str, Any]) -> list[str]:
    """One part as Markdown lines."""
    headings = ["step", *HEADINGS, "time, × checkpointing", "time, × BP"]
    lines = [f"| {' | '.join(headings)} |", "|---" + "|--:" * (len(headings) - 1) + "|"]
    lines += [f"| {ROWS[name].label} | {' | '.join(_cells(part, name))} |" for name in part["rows"]]
    for count in (4,):
        run = whole_run(part, count)
        if run is not None:
            best = best_exact(part, count)
            against = f"; best exact recipe: {mib(best[0]):.1f} MiB ({ROWS[best[1]].label})" if best else ""
            lines += ["", f"Whole run with offsets, {count} micro-batches: {mib(run):.1f} MiB{against}."]
    more = heads_bytes(part)
    if more is not None:
        lines += ["", f"bpfx's heads, with their optimizer state, add {mib(more):.1f} MiB to the state."]
    seconds = part["rows"].get("ac", {}).get("seconds", [])
    if seconds:
        lines += ["", f"Checkpointing itself took {spread(seconds)} s over {len(seconds)} rounds."]
    return lines


def depths(parts: dict[str, Any]) -> list[str]:
    """The stack's peaks, offsets included: a row per recipe, a column per depth."""
    stacks = {spec.depth: parts[name] for name, spec in PARTS.items() if spec.depth and name in parts}
    if len(stacks) < 2:
        return []
    headings = [f"{depth} layers" for depth in stacks]
    lines = ["", "## Peak against depth", "", "MiB, offsets included.", ""]
    lines += [f"| step | {' | '.join(headings)} |", "|---" + "|--:" * len(stacks) + "|"]
    for name in next(iter(PARTS.values())).rows():
        sizes = [peak(part, name) for part in stacks.values()]
        if any(size is not None for size in sizes):
            lines.append(f"| {ROWS[name].label} | {' | '.join('–' if s is None else f'{mib(s):.1f}' for s in sizes)} |")
    return lines


def markdown(parts: dict[str, Any]) -> str:
    """The whole report."""
    missing = [spec.title for name, spec in PARTS.items() if name not in parts]
    lines = [
        "# Whole training steps",
        "",
        "A step is forward, loss, backward and AdamW. Peak: MiB above the state before the step, which is parameters, "
        "buffers, optimizer state, batch and bpfx's stored offsets. Offsets count in the figures that are judged; all "
        "state but the batch is in a column of its own, and there bpfx's heads with their optimizer state show. Time: "
        "median over rounds of the ratio within a round, minimum and maximum in brackets. How to read them: "
        "`benchmarks/README.md`.",
        "",
        "## Targets",
        "",
        "| target | limit | figure | |",
        "|---|--:|--:|---|",
        *(verdict.line(parts) for verdict in verdicts(parts)),
        *(["", f"Not measured: {', '.join(missing)}."] if missing else []),
        *depths(parts),
    ]
    for part in parts.values():
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in part["settings"].items() if v is not None)
        versions = ", ".join(f"{k} {v}" for k, v in part["versions"].items())
        made = f"{part['machine']}, load {part['load_before']}; {part['date'][:10]}, `{part['command']}`."
        lines += ["", f"## {part['title']}", "", *table(part), ""]
        lines.append(f"{part['blocks'] or 'no'} blocks; {settings}. {versions}; {made}")
    return "\n".join([*lines, ""])


# --- plots ------------------------------------------------------------------------------------------------------------

STYLES: dict[str, dict[str, Any]] = {
    "bp": {"color": "#0072B2", "linestyle": "-"},
    "bp_micro4": {"color": "#0072B2", "linestyle": (0, (5, 2))},
    "ac": {"color": "#56B4E9", "linestyle": "-"},
    "ac_oib": {"color": "#CC79A7", "linestyle": (0, (1, 1))},
    "ac_micro4": {"color": "#56B4E9", "linestyle": (0, (5, 2))},
    "local_serial1": {"color": "#E69F00", "linestyle": (0, (5, 2))},
    "local_serial4": {"color": "#E69F00", "linestyle": "-"},
    "bp_serial4": {"color": "#009E73", "linestyle": "-"},
    "refresh4": {"color": "#D55E00", "linestyle": (0, (3, 1, 1, 1))},
}


def plot_depths(parts: dict[str, Any], path: Path) -> bool:
    """Peak against depth, a line per recipe; False where there are not two depths, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return False
    stacks = {spec.depth: parts[name] for name, spec in PARTS.items() if spec.depth and name in parts}
    if len(stacks) < 2:
        return False
    figure = Figure(figsize=(8.6, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    drawn = []
    for name, style in STYLES.items():
        points = [(depth, mib(size)) for depth, part in stacks.items() if (size := peak(part, name)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=ROWS[name].label, linewidth=1.6, marker="o", ms=4, **style)
            drawn.append(points[-1][1])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(stacks), [str(depth) for depth in stacks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    settings = next(iter(stacks.values()))["settings"]
    what = f"{settings['batch']} × {settings['tokens']} tokens, width {settings['width']}"
    axes.set(title=f"One training step of a transformer, {what}", xlabel="layers")
    axes.set_ylabel("peak above the state before, offsets included, MiB")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the lines, in the order in which they end.
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: -drawn[i])
    legend = ([handles[i] for i in order], [labels[i] for i in order])
    axes.legend(*legend, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(path)
    return True


def plot_models(parts: dict[str, Any], path: Path) -> bool:
    """A panel of bars per image model; False where there is none, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = [parts[name] for name, spec in PARTS.items() if not spec.depth and name in parts]
    if not shown:
        return False
    names = [name for name in ROWS if any(peak(part, name) is not None for part in shown)]
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    size = (5.6 * columns + 1.0, (0.24 * len(names) + 0.9) * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, part in zip(panels, shown, strict=False):
        for place, name in enumerate(names):
            row = part["rows"].get(name, {})
            if "peak_bytes" not in row:
                continue
            held, stored = mib(row["peak_bytes"]), mib(row["offset_bytes"])
            axes.barh(place, held, color="#E69F00" if ROWS[name].ours else "#56B4E9", height=0.7)
            axes.barh(place, stored, left=held, color="#7F7F7F", height=0.7)
            axes.text(held + stored, place, f" {held + stored:.0f}", va="center", fontsize="small")
        axes.set_yticks(range(len(names)), [ROWS[name].label for name in names], fontsize="small")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
        axes.set_title(f"{part['title']}, batch {part['settings']['batch']}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    words = "peak above the state before the step, MiB (blue: exact; orange: bpfx; grey: stored offsets)"
    figure.supxlabel(words, fontsize="small")
    figure.savefig(path)
    return True
