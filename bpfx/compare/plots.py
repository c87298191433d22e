"""The three plots of a comparison: accuracy over iterations, over time, and against memory, as PNGs."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bpfx import report as palette
from bpfx.compare.record import Record, Run
from bpfx.compare.rows import ROWS
from bpfx.compare.table import Line, Table
from bpfx.errors import BpfxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "require"]

# The rest of Okabe and Ito's palette, and shapes, so that no two rows differ by their colour alone.
_COLORS = ("#D55E00", "#CC79A7", "#000000", "#0072B2", "#009E73", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = ("v", "P", "X", "<", ">", "*", "p", "h", "d", "H", "8")


def require() -> None:
    """Raise, before hours have passed, where matplotlib is missing.

    Raises:
        BpfxError: says how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BpfxError(
            "The report of a comparison is drawn with matplotlib, which is not installed: pip install 'bpfx[plot]'."
        ) from None


def styles() -> dict[str, dict[str, Any]]:
    """Colour, line and marker by row; those of `bpfx train`'s report where that has the row."""
    found, others = {}, 0
    for key in ROWS:
        known = palette._STYLES.get(key)
        if known is None:
            known = {
                "color": _COLORS[others % len(_COLORS)],
                "linestyle": _LINES[(others + others // len(_COLORS)) % len(_LINES)],
                "marker": _MARKERS[others % len(_MARKERS)],
            }
            others += 1
        found[key] = known
    return found


def draw(record: Record, table: Table) -> dict[str, bytes]:
    """PNGs by what they show, for people: only those for which there is something to draw."""
    pictures = {}
    labels = ("iteration", "time (steps of BP)")
    for budget, xlabel in zip(("iterations", "time"), labels, strict=True):
        curves = {line.key: _curve(record, line, budget) for line in table.lines}
        curves = {key: curve for key, curve in curves.items() if curve}
        if curves:
            title = f"Test accuracy over {budget}"
            pictures[title] = _png(_curves(title, xlabel, curves))
    points = [line for line in table.lines if line.accuracy and line.peak is not None]
    if points:
        title = "Test accuracy against peak memory"
        pictures[title] = _png(_scatter(title, points))
    return pictures


def _curve(record: Record, line: Line, budget: str) -> list[tuple[float, float]]:
    """Mean over seeds, at the iterations that all of them were tested at."""
    runs: list[Run] = record.runs(line.key, budget)
    if not runs:
        return []
    curves = [dict(map(tuple, run["curve"])) for run in runs]
    iterations = sorted(set.intersection(*(set(curve) for curve in curves)))
    unit = 1.0 if budget == "iterations" else record.settings.config.iterations / runs[0]["iterations"]
    return [(unit * at, 100 * statistics.fmean(curve[at] for curve in curves)) for at in iterations]


def _figure() -> tuple[Figure, Axes]:
    # A Figure of its own instead of pyplot: no display is needed and no global state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 5.0), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(title: str, xlabel: str, curves: dict[str, list[tuple[float, float]]]) -> Figure:
    figure, axes = _figure()
    looks = styles()
    # In the legend as the curves end, from top to bottom, so that an entry is found beside its curve.
    for key in sorted(curves, key=lambda key: -curves[key][-1][1]):
        xs, ys = zip(*curves[key], strict=True)
        label = f"{ROWS[key].label} ({ys[-1]:.1f} %)"
        width = 3.0 if key == "bp" else 1.6  # still seen below a curve that is the same
        axes.plot(xs, ys, label=label, markersize=5, linewidth=width, **looks[key])
    axes.set(title=title, xlabel=xlabel, ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    figure.legend(frameon=False, loc="outside right center", fontsize="small", handlelength=3.4)
    return figure


def _scatter(title: str, lines: list[Line]) -> Figure:
    figure, axes = _figure()
    looks = styles()
    places = []
    for line in lines:
        assert line.peak is not None
        place = (line.peak, 100 * statistics.fmean(line.accuracy))
        places.append(place)
        look = looks[line.key]
        axes.plot(
            *place, marker=look["marker"], color=look["color"], markersize=9, markeredgecolor="white", linestyle="none"
        )
    axes.set(title=title, xlabel="peak memory of a step above the state (MiB)", ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    axes.margins(x=0.12, y=0.14)
    _label(figure, axes, places, [line.label for line in lines])
    return figure


def _label(figure: Figure, axes: Axes, places: list[tuple[float, float]], labels: list[str]) -> None:
    """Write every label beside its point where it covers neither another label nor a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # so that the layout is final and points have pixels
    figure.set_layout_engine("none")
    pixels = [tuple(axes.transData.transform(place)) for place in places]
    size = figure.dpi / 72
    taken = [Bbox.from_extents(x - 6 * size, y - 6 * size, x + 6 * size, y + 6 * size) for x, y in pixels]
    frame = axes.get_window_extent()
    for index in sorted(range(len(places)), key=lambda i: -pixels[i][1]):
        for dx, dy, side in _candidates():
            text = axes.annotate(
                labels[index],
                places[index],
                xytext=(dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6} if abs(dy) > 12 else None,
            )
            box = text.get_window_extent(canvas.get_renderer())
            inside = frame.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            others = [other for i, other in enumerate(taken) if i != index]
            if inside and not any(box.overlaps(other) for other in others):
                taken.append(box)
                break
            text.remove()
        else:  # no room at all: over the others rather than nowhere
            axes.annotate(labels[index], places[index], xytext=(9, 0), textcoords="offset points", fontsize=8)


def _candidates() -> Iterable[tuple[float, float, str]]:
    """Places beside a point, in points of type, the nearest first."""
    for dy in (0, 9, -9, 18, -18, 27, -27, 38, -38, 50, -50, 64, -64, 80, -80):
        yield 9, dy, "left"
        yield -9, dy, "right"
        if abs(dy) >= 9:
            yield 0, 1.4 * dy, "center"


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png", facecolor="white")
    return written.getvalue()
