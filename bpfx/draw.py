"""A plan as an SVG picture: blocks, what crosses between them, where gradients stop, and the auxiliary heads."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

from bpfx.plan import BlockPlan, Crossing, Plan

__all__ = ["svg", "write"]

_MARGIN, _BLOCK_WIDTH, _HEAD_WIDTH, _BETWEEN = 36, 400, 300, 70
_BLOCK_HEIGHT, _LINE, _TOP = 78, 16, 128
_WIDTH = 2 * _MARGIN + _BLOCK_WIDTH + _BETWEEN + _HEAD_WIDTH
_AXIS = _MARGIN + 56  # where the arrows from block to block run; what crosses is written beside them
_HEAD_LEFT = _MARGIN + _BLOCK_WIDTH + _BETWEEN
_CROSSINGS_SHOWN = 3

# Okabe and Ito's palette, told apart by people with any colour vision.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#C2410C"
_INK, _GREY = "#1f2933", "#5b6770"


def write(plan: Plan, path: str | Path, title: str = "bpfx plan") -> None:
    """Draw `plan` into the SVG file `path`.

    Args:
        plan: from `bpfx.plan(...)` or `step.plan`.
        path: of the file; overwritten.
        title: heading of the picture.
    """
    Path(path).write_text(svg(plan, title), encoding="utf-8")


def svg(plan: Plan, title: str = "bpfx plan") -> str:
    """The picture of `plan` as SVG text, which any browser shows.

    Every block is a box with its modules, its parameters and the predicted peak of its local step (also as a bar,
    relative to the largest). Tensors that cross a boundary are listed with shape, dtype and MiB; the double bar across
    an arrow is a stop-gradient: values pass it, gradients do not.

    Example:
        >>> import torch, bpfx
        >>> from bpfx import draw, models
        >>> batch = torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
        >>> plan = bpfx.plan(models.build("small-resnet", 10, 1), torch.nn.functional.cross_entropy, batch, blocks=3)
        >>> draw.svg(plan).startswith("<svg")
        True
    """
    parts: list[str] = []
    blocks = plan.blocks
    largest = max((block.local_peak_bytes or 0 for block in blocks), default=0) or 1
    y = _TOP
    y = _arrow(parts, y, _crossing_lines(blocks[0].inputs), stop=False)
    for position, block in enumerate(blocks):
        last = position == len(blocks) - 1
        _block(parts, y, block, largest)
        _head(parts, y, block, last)
        y += _BLOCK_HEIGHT
        if not last:
            y = _arrow(parts, y, _crossing_lines(block.outputs), stop=True)
    height = y + _MARGIN
    return "\n".join([*_frame(height, title, plan), *parts, "</svg>", ""])


def _frame(height: int, title: str, plan: Plan) -> list[str]:
    parameters = sum(block.parameters for block in plan.blocks)
    heads = sum(block.head_parameters for block in plan.blocks)
    names = {"bp": "BP", "local": "local step", "bp_blocks": "BP step, recomputed per block"}
    peaks = " · ".join(f"{name} {_mib(plan.predicted[key])}" for key, name in names.items() if key in plan.predicted)
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
            for name, colour in (("ink", _INK), ("green", _GREEN))
        ),
        "</defs>",
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_MARGIN, 38, title, size=20, weight="bold"),
        _text(_MARGIN, 62, f"{len(plan.blocks)} blocks · {parameters:,} parameters · {heads:,} in auxiliary heads"),
        _text(_MARGIN, 80, f"predicted peak of one step: {peaks}" if peaks else ""),
        *_legend(104),
    ]


def _legend(y: int) -> list[str]:
    x = _MARGIN
    return [
        f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{_BLUE}" fill-opacity="0.12" stroke="{_BLUE}"/>',
        _text(x + 20, y, "block", colour=_GREY),
        _stop_mark(x + 78, y - 4),
        _text(x + 96, y, "stop-gradient", colour=_GREY),
        f'<rect x="{x + 194}" y="{y - 9}" width="14" height="10" '
        f'fill="{_GREEN}" fill-opacity="0.12" stroke="{_GREEN}"/>',
        _text(x + 214, y, "auxiliary head with its local loss", colour=_GREY),
        f'<rect x="{x + 426}" y="{y - 6}" width="22" height="4" fill="{_ORANGE}"/>',
        _text(x + 454, y, "peak of the block's local step, relative to the largest", colour=_GREY),
    ]


def _block(parts: list[str], y: int, block: BlockPlan, largest: int) -> None:
    left = _MARGIN
    parts.append(
        f"<g><title>{escape(', '.join(block.modules))}</title>"
        f'<rect x="{left}" y="{y}" width="{_BLOCK_WIDTH}" height="{_BLOCK_HEIGHT}" rx="6" '
        f'fill="{_BLUE}" fill-opacity="0.08" stroke="{_BLUE}" stroke-width="1.5"/>'
    )
    parts.append(_text(left + 14, y + 22, f"block {block.index}", weight="bold", colour=_BLUE, size=13))
    parts.append(_text(left + 82, y + 22, _shorten(block.name, 48), size=13))
    opaque = f" · opaque: {', '.join(block.opaque)}" if block.opaque else ""
    detail = f"{block.parameters:,} parameters ({_mib(block.parameter_bytes)}){opaque}"
    parts.append(_text(left + 14, y + 42, _shorten(detail, 62), colour=_GREY))
    if block.local_peak_bytes is None:
        parts.append(_text(left + 14, y + 60, "peak of the local step not predicted", colour=_GREY) + "</g>")
        return
    parts.append(_text(left + 14, y + 60, f"local step peaks at {_mib(block.local_peak_bytes)}", colour=_GREY))
    bar = f'<rect x="{left + 14}" y="{y + 67}" height="4" fill="{_ORANGE}"'
    full = _BLOCK_WIDTH - 28
    parts.append(f'{bar} width="{full}" fill-opacity="0.2"/>')
    parts.append(f'{bar} width="{full * block.local_peak_bytes / largest:.1f}"/></g>')


def _head(parts: list[str], y: int, block: BlockPlan, last: bool) -> None:
    if block.head is None and not last:
        return
    middle = y + _BLOCK_HEIGHT // 2
    parts.append(
        f'<line x1="{_MARGIN + _BLOCK_WIDTH}" y1="{middle}" x2="{_HEAD_LEFT}" y2="{middle}" '
        f'stroke="{_GREEN}" stroke-width="1.5" marker-end="url(#green)"/>'
    )
    top, height = y + 12, _BLOCK_HEIGHT - 24
    parts.append(
        f"<g><title>{escape(block.head or 'task loss')}</title>"
        f'<rect x="{_HEAD_LEFT}" y="{top}" width="{_HEAD_WIDTH}" height="{height}" rx="6" '
        f'fill="{_GREEN}" fill-opacity="0.08" stroke="{_GREEN}" stroke-width="1.5"/>'
    )
    if block.head is None:
        first, second = "task loss", "the model's own"
    else:
        first, second = _shorten(block.head, 44), f"{block.head_parameters:,} parameters → local loss"
    parts.append(_text(_HEAD_LEFT + 14, top + 22, first, size=13, weight="bold" if block.head is None else "normal"))
    parts.append(_text(_HEAD_LEFT + 14, top + 41, second, colour=_GREY) + "</g>")


def _arrow(parts: list[str], y: int, lines: list[str], stop: bool) -> int:
    """An arrow down from `y` with `lines` beside it; where it ends."""
    end = y + max(40, _LINE * len(lines) + 22)
    middle = (y + end) // 2
    parts.append(
        f'<line x1="{_AXIS}" y1="{y}" x2="{_AXIS}" y2="{end}" '
        f'stroke="{_INK}" stroke-width="1.5" marker-end="url(#ink)"/>'
    )
    if stop:
        # A little above the middle, clear of the arrow's point.
        parts.append(_stop_mark(_AXIS, middle - 4))
    first = middle - _LINE * (len(lines) - 1) // 2 + 4
    parts += [_text(_AXIS + 24, first + _LINE * index, line) for index, line in enumerate(lines)]
    return end


def _stop_mark(x: int, y: int) -> str:
    """A double bar across a vertical arrow; a white gap between shows that the gradient does not cross."""
    return (
        f'<g><title>stop-gradient</title><rect x="{x - 9}" y="{y - 3}" width="18" height="6" fill="white"/>'
        f'<path d="M{x - 11} {y - 3} h22 M{x - 11} {y + 3} h22" stroke="{_RED}" stroke-width="2.5"/></g>'
    )


def _crossing_lines(crossings: list[Crossing]) -> list[str]:
    lines = []
    for crossing in crossings[:_CROSSINGS_SHOWN]:
        shape = "×".join(str(side) for side in crossing.shape) or "scalar"
        note = "" if crossing.differentiable else " · carries no gradient"
        dtype = str(crossing.dtype or "").removeprefix("torch.")
        lines.append(f"{_shorten(crossing.name, 40)}: {shape} {dtype} · {_mib(crossing.bytes)}{note}")
    rest = crossings[_CROSSINGS_SHOWN:]
    if rest:
        lines.append(f"and {len(rest)} more, {_mib(sum(crossing.bytes for crossing in rest))}")
    return lines


def _text(x: int, y: int, text: str, size: int = 12, weight: str = "normal", colour: str = _INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'


def _mib(count: int) -> str:
    size = count / 2**20
    return f"{size:.1f} MiB" if size >= 0.1 else f"{count / 2**10:.1f} KiB"


def _shorten(text: str, length: int) -> str:
    """The beginning and the end of `text`: module paths differ there."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[-half:]}"
