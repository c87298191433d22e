"""Draws docs/concepts.svg: a model before and after the conversion.

    python docs/_draw_concepts.py

The picture has a ground of its own, so that it can be read on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 648
INK, GREY, LINE, GROUND = "#1f2933", "#52606d", "#9aa5b1", "#fbfcfd"
# Okabe and Ito's palette, told apart by people with any colour vision; the red of `bpfx draw`.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#C2410C"
TOP, BLOCK, GAP = 118, 100, 38  # first block's top, a block's height, room between two
PARTS: list[str] = []


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "start", bold: bool = False
) -> None:
    weight = ' font-weight="bold"' if bold else ""
    PARTS.append(
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, colour: str, fill: float, radius: int = 6) -> None:
    PARTS.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{colour}" '
        f'fill-opacity="{fill}" stroke="{colour}" stroke-width="1.5"/>'
    )


def arrow(path: str, colour: str, dashed: bool = False) -> None:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    mark = {INK: "ink", ORANGE: "orange", GREEN: "green", RED: "red"}[colour]
    PARTS.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash} marker-end="url(#{mark})"/>')


def layer(x: float, y: float, width: float, name: str, alive: bool) -> None:
    box(x, y, width, 30, ORANGE if alive else LINE, 0.35 if alive else 0.12, 4)
    text(x + width / 2, y + 20, name, 13, anchor="middle")


def stop(x: float, y: float) -> None:
    """A double bar across an arrow: values pass it, gradients do not."""
    PARTS.append(f'<rect x="{x - 10}" y="{y - 3}" width="20" height="6" fill="{GROUND}"/>')
    PARTS.append(f'<path d="M{x - 12} {y - 3} h24 M{x - 12} {y + 3} h24" stroke="{RED}" stroke-width="2.5"/>')


def heading(x: float, first: str, second: str, third: str) -> None:
    text(x, 40, first, 16, bold=True)
    text(x, 62, second, 13, GREY)
    text(x, 80, third, 13, GREY)


def tops() -> list[int]:
    return [TOP + k * (BLOCK + GAP) for k in range(3)]


def block(x: int, y: int, k: int) -> None:
    """Two layers; the middle block is the one at work."""
    box(x, y, 140, BLOCK, BLUE, 0.07)
    text(x + 10, y + 19, f"block {k}", 12, BLUE, bold=True)
    layer(x + 20, y + 27, 100, f"layer {2 * k + 1}", k == 1)
    layer(x + 20, y + 63, 100, f"layer {2 * k + 2}", k == 1)


def before(x: int) -> None:
    heading(x, "Your model", "back-propagation: all", "activations wait")
    end = tops()[-1] + BLOCK
    step = (end - TOP - 30) / 5
    for k in range(6):
        y = TOP + k * step
        layer(x + 28, y, 100, f"layer {k + 1}", alive=True)
        if k < 5:
            arrow(f"M{x + 78} {y + 30} V{y + step - 2}", INK)
    arrow(f"M{x + 78} {end} V{end + 24}", INK)
    text(x + 78, end + 42, "loss", 13, anchor="middle", bold=True)
    arrow(f"M{x + 106} {end + 37} H{x + 148} V{TOP + 15} H{x + 132}", RED, dashed=True)


def local(x: int) -> None:
    heading(x, "After: the local step", "each block learns from its own head;", "one block's activations at a time")
    for k, y in enumerate(tops()):
        block(x, y, k)
        if k == 2:
            arrow(f"M{x + 70} {y + BLOCK} V{y + BLOCK + 24}", INK)
            text(x + 70, y + BLOCK + 42, "loss", 13, anchor="middle", bold=True)
            arrow(f"M{x + 98} {y + BLOCK + 37} H{x + 158} V{y + 60} H{x + 144}", RED, dashed=True)
            continue
        arrow(f"M{x + 70} {y + BLOCK} V{y + BLOCK + GAP - 2}", INK)
        stop(x + 70, y + BLOCK + GAP / 2 - 3)
        box(x + 196, y + 56, 112, 40, GREEN, 0.10)
        text(x + 252, y + 73, f"head {k}", 13, anchor="middle")
        text(x + 252, y + 89, "local loss", 12, GREY, "middle")
        arrow(f"M{x + 140} {y + 86} H{x + 193}", INK)
        arrow(f"M{x + 252} {y + 54} V{y + 40} H{x + 144}", RED, dashed=True)


def exact(x: int) -> None:
    heading(x, "And the BP step", "exact: boundaries wait,", "blocks run once more")
    for k, y in enumerate(tops()):
        block(x, y, k)
        if k == 2:
            arrow(f"M{x + 50} {y + BLOCK} V{y + BLOCK + 24}", INK)
            text(x + 70, y + BLOCK + 42, "loss", 13, anchor="middle", bold=True)
            arrow(f"M{x + 90} {y + BLOCK + 26} V{y + BLOCK + 2}", RED, dashed=True)
            continue
        arrow(f"M{x + 50} {y + BLOCK} V{y + BLOCK + GAP - 2}", INK)
        box(x + 41, y + BLOCK + GAP / 2 - 8, 18, 9, GROUND, 1.0, 3)
        box(x + 41, y + BLOCK + GAP / 2 - 8, 18, 9, ORANGE, 0.35, 3)
        arrow(f"M{x + 90} {y + BLOCK + GAP} V{y + BLOCK + 2}", RED, dashed=True)


def legend(y: int) -> None:
    PARTS.append(f'<path d="M28 {y - 24} H{WIDTH - 28}" stroke="{LINE}" stroke-width="1"/>')
    box(28, y - 10, 22, 12, ORANGE, 0.35, 3)
    text(58, y, "in memory", 12, GREY)
    box(158, y - 10, 22, 12, GREEN, 0.10, 3)
    text(188, y, "head, not part of your model", 12, GREY)
    arrow(f"M398 {y - 4} H420", INK)
    text(430, y, "values", 12, GREY)
    arrow(f"M500 {y - 4} H522", RED, dashed=True)
    text(532, y, "gradient", 12, GREY)
    PARTS.append(f'<path d="M612 {y - 7} h24 M612 {y - 1} h24" stroke="{RED}" stroke-width="2.5"/>')
    text(646, y, "stop-gradient", 12, GREY)


def draw() -> str:
    PARTS.clear()
    for name, colour in (("ink", INK), ("orange", ORANGE), ("green", GREEN), ("red", RED)):
        PARTS.append(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        )
    before(28)
    local(212)
    exact(572)
    text(
        28, 578, "At a refresh both steps run on one batch: offset Δ = BP gradient − local gradient, by parameter.", 13
    )
    text(28, 600, "In between, the optimizer gets local gradient + Δ.", 13)
    legend(HEIGHT - 14)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="A model before and after the conversion">'
    )
    ground = (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{GROUND}" stroke="#d5dce2"/>'
    )
    return "\n".join([head, ground, *PARTS, "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "concepts.svg").write_text(draw(), "utf-8")
