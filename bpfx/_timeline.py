"""The picture of live memory over a step, one line per way to take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpfx.errors import BpfxError, suggest

if TYPE_CHECKING:
    from bpfx.memory import Peak

ENDINGS = (".png", ".svg")
_BINS = 250
# Okabe and Ito's palette, told apart by people with any colour vision; line styles change with every round of it.
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def thin(timeline: Sequence[tuple[float, int]], bins: int = _BINS) -> list[tuple[float, int]]:
    """The upper edge of the same curve: of every stretch of time its maximum, where it is, so the peak stays.

    The last point of a stretch is kept as well where nothing happens in the next one.

    Example:
        >>> thin([(0.0, 0), (0.1, 7), (0.2, 3), (0.3, 5), (0.4, 1), (1.0, 0)], bins=3)
        [(0.0, 0), (0.1, 7), (0.4, 1), (1.0, 0)]
    """
    end = timeline[-1][0] or 1.0
    parts: dict[int, list[int]] = {}
    for index, (moment, _) in enumerate(timeline):
        parts.setdefault(min(int(bins * moment / end), bins - 1), []).append(index)
    wanted = {0}
    for number, part in parts.items():
        wanted.add(max(part, key=lambda i: timeline[i][1]))
        if number + 1 not in parts:
            wanted.add(part[-1])
    return [timeline[index] for index in sorted(wanted)]


def draw(peaks: Mapping[str, Peak[Any]], path: str | Path, title: str, base: str | None) -> Path:
    """See :func:`bpfx.memory.plot_timelines`."""
    path = Path(path)
    if not peaks:
        raise BpfxError("plot_timelines has nothing to draw: pass at least one measured Peak by name")
    if path.suffix.lower() not in ENDINGS:
        raise BpfxError(f"plot_timelines cannot write {str(path)!r}: pass a name that ends in {' or '.join(ENDINGS)}")
    if base is not None and base not in peaks:
        raise BpfxError(f"base={base!r} is none of the rows; {suggest(base, peaks)}")
    try:
        from matplotlib import patheffects
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise BpfxError("plot_timelines needs matplotlib, which is missing: pip install 'bpfx[plot]'") from None
    ordered = sorted(peaks, key=lambda name: -peaks[name].peak_bytes)
    styles = {name: (_COLOURS[i % len(_COLOURS)], _STYLES[i // len(_COLOURS) % 4]) for i, name in enumerate(peaks)}
    top = max(max(p.peak_bytes for p in peaks.values()) / 2**20, 1e-3)
    digits = 0 if top >= 1000 else 1 if top >= 10 else 2
    # A Figure of its own instead of pyplot: no display is needed and no global state is left behind.
    figure = Figure(figsize=(10.5, 5.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    lowest = 0.0
    marks: list[tuple[float, float]] = []
    taken: list[tuple[float, float]] = []
    for rank, name in enumerate(ordered):
        colour, style = styles[name]
        points = thin(peaks[name].timeline)
        end = points[-1][0] or 1.0
        # As a share of the step: measuring slows steps down unequally, so milliseconds would mislead.
        share, live = [100 * moment / end for moment, _ in points], [count / 2**20 for _, count in points]
        lowest = min(lowest, *live)
        number = f"{peaks[name].peak_bytes / 2**20:,.{digits}f}"
        label = f"{name}: {number} MiB"
        if base is not None and name != base and peaks[base].peak_bytes:
            label += f" ({100 * peaks[name].peak_bytes / peaks[base].peak_bytes:.1f} %)"
        axes.fill_between(share, live, step="post", color=colour, alpha=0.06, linewidth=0, zorder=2 + rank)
        axes.plot(
            share, live, drawstyle="steps-post", color=colour, linestyle=style, linewidth=1.4, label=label, zorder=20
        )
        x, y = _mark(list(zip(share, live, strict=True)), marks, top)
        marks.append((x, y))
        axes.plot(x, y, "o", color=colour, markeredgecolor="white", markersize=7, zorder=30)
        at = _free((x, y), taken, top)
        taken.append(at)
        axes.text(
            *at, number, ha="center", va="center", fontsize=9, fontweight="bold", color=colour, zorder=40,
            path_effects=halo,
        )  # fmt: skip
    axes.set_xlim(0, 100)
    axes.set_ylim(1.05 * lowest if lowest < -0.02 * top else 0, 1.12 * top)
    axes.set(xlabel="progress of the step", ylabel="live memory above the start (MiB)")
    axes.xaxis.set_major_formatter(PercentFormatter())
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=10)
    heading = "peak" if base is None else f"peak (share of {base})"
    legend = figure.legend(
        loc="outside right upper", frameon=False, fontsize=9.5, title=heading, title_fontsize=9.5, alignment="left",
        labelspacing=0.8, handlelength=2.4,
    )  # fmt: skip
    for line in legend.get_lines():
        line.set_linewidth(2.4)
    figure.savefig(path)
    return path


def _mark(curve: list[tuple[float, float]], others: list[tuple[float, float]], top: float) -> tuple[float, float]:
    """Where the peak is marked. One that is reached many times (by every block, say) is marked away from others."""
    highest = max(y for _, y in curve)
    candidates = [(x, y) for x, y in curve if y >= 0.998 * highest]

    def room(point: tuple[float, float]) -> float:
        near = [abs(point[0] - x) / 100 + abs(point[1] - y) / top for x, y in others]
        return min([0.12, *near, abs(point[0]) / 50, abs(100 - point[0]) / 50])

    return max(candidates, key=room)


def _free(mark: tuple[float, float], taken: list[tuple[float, float]], top: float) -> tuple[float, float]:
    """The place for a label that covers no other: above its mark, beside it, or further above."""
    x, y = min(max(mark[0], 2.5), 97.5), mark[1]
    above = [(x, y + (4 + i) * 0.01 * top) for i in range(100)]
    beside = [(x + shift, y + 0.01 * top) for shift in (-4.2, 4.2) if 2.5 <= x + shift <= 97.5]
    free = (
        p
        for p in (above[0], *beside, *above)
        if all(abs(p[0] - a) >= 5 or abs(p[1] - b) >= 0.045 * top for a, b in taken)
    )
    return next(free, above[0])
