"""What a comparison leaves for readers: compare.md, and report.html, one file that asks the network for nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from pathlib import Path

from bpfx._runs import replace
from bpfx.compare import plots
from bpfx.compare.record import Record
from bpfx.compare.rows import ROWS
from bpfx.compare.table import NOTES, Table

__all__ = ["write"]

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; } td { font-variant-numeric: tabular-nums; }
.words { text-align: left; } .best { font-weight: 700; background: #e6f2fa; } .note { color: #8a3000; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
code { font: 0.85em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; } .small { color: #555; font-size: 0.88rem; }
dt { font-weight: 600; margin-top: 0.7rem; } dd { margin: 0 0 0 1.2rem; } .scroll { overflow-x: auto; }
"""


def write(record: Record) -> Table:
    """Write compare.md and report.html into the record's folder; the table that is in them."""
    table = Table.of(record)
    text = {"compare.md": _markdown(record, table), "report.html": _html(record, table)}
    for name, content in text.items():
        replace(record.folder / name, _writer(content))
    return table


def _writer(content: str) -> Callable[[Path], None]:
    def write_to(path: Path) -> None:
        path.write_text(content, "utf-8")

    return write_to


def _settings(record: Record) -> list[tuple[str, str]]:
    """The head of the report: what was compared, with what, when."""
    settings, about = record.settings, record.about
    config = settings.config
    images = min(config.batch_size, about["train_images"])
    blocks = "" if config.blocks == "auto" else f" (asked for: {config.blocks})"
    versions = ["; ".join(f"{key} {value}" for key, value in made.items()) for made in record.made_with]
    return [
        ("model", f"{config.model}, {about['blocks']} blocks{blocks}, local loss {config.local_loss}"),
        (
            "data",
            f"{about['data']}: {about['train_images']:,} training and {about['test_images']:,} test images of "
            f"{about['image_size']} px",
        ),
        (
            "training",
            f"{config.iterations} iterations of {images} images (BP), AdamW, one cycle to lr {config.lr:g}, "
            f"weight decay {config.weight_decay:g}, no augmentation, fp32, eager",
        ),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("rows", f"period K = {settings.period}, {settings.micro_batches} micro-batches, budget {settings.budget}"),
        ("made with", " / then ".join(versions)),
        ("begun", record.began),
        ("command", settings.command(*settings.rows)),
    ]


def _explanations(record: Record) -> list[tuple[str, str, str]]:
    """Label, explanation and command of every row."""
    settings = record.settings
    return [
        (
            ROWS[key].label,
            ROWS[key].explain(settings.period, settings.micro_batches, record.quarter),
            settings.command(key),
        )
        for key in settings.rows
    ]


def _unfinished(record: Record) -> str:
    settings = record.settings
    budgets = ("iterations", "time") if settings.budget == "both" else (settings.budget,)
    rows = [key for key in settings.rows if "reason" not in record.row(key) or record.row(key)["failed"]]
    wanted = len(rows) * len(budgets) * len(settings.seeds)
    made = sum(len(record.runs(key, budget)) for key in rows for budget in budgets)
    return f"Unfinished: {made} of {wanted} runs are there." if made < wanted else ""


def _markdown(record: Record, table: Table) -> str:
    lines = [f"# Comparison: {table.title}", ""]
    unfinished = _unfinished(record)
    lines += [unfinished, ""] if unfinished else []
    lines += [table.markdown(), "", *table.summary, "", NOTES, "", "## Settings", ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in _settings(record)]
    lines += ["", "## Rows", ""]
    for label, explanation, command in _explanations(record):
        lines += [f"- **{label}**: {explanation}", f"  `{command}`"]
    return "\n".join([*lines, ""])


def _html(record: Record, table: Table) -> str:
    escape = html.escape
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>bpfx compare: {escape(table.title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head><body>',
        f"<h1>{escape(table.title)}</h1>",
    ]
    unfinished = _unfinished(record)
    if unfinished:
        parts.append(f'<p class="note">{escape(unfinished)}</p>')
    parts += [f"<p>{escape(sentence)}</p>" for sentence in table.summary]
    parts += ['<div class="scroll">', _html_table(table), "</div>", f'<p class="small">{escape(NOTES)}</p>']
    for title, picture in plots.draw(record, table).items():
        coded = base64.b64encode(picture).decode("ascii")
        parts.append(f"<h2>{escape(title)}</h2>")
        parts.append(
            f'<img alt="{escape(title)}, by row; the values are in the table" src="data:image/png;base64,{coded}">'
        )
    parts.append("<h2>Settings</h2><table>")
    for name, value in _settings(record):
        shown = f"<code>{escape(value)}</code>" if name == "command" else escape(value)
        parts.append(f'<tr><th class="words">{escape(name)}</th><td class="words">{shown}</td></tr>')
    parts.append("</table><h2>Rows, and the command for each</h2><dl>")
    for label, explanation, command in _explanations(record):
        parts.append(f"<dt>{escape(label)}</dt><dd>{escape(explanation)}<br><code>{escape(command)}</code></dd>")
    return "\n".join([*parts, "</dl></body></html>", ""])


def _html_table(table: Table) -> str:
    columns, best = table.columns(), table.best()

    def kind(column: str) -> str:
        return ' class="words"' if column == "label" else ' class="words note"' if column == "note" else ""

    rows = ["<table><thead><tr>"]
    rows += [f"<th{kind(name)}>{html.escape(title)}</th>" for name, title in columns.items()]
    rows.append("</tr></thead><tbody>")
    for line in table.lines:
        cells = line.cells()
        marks = [' class="best"' if line.key in best.get(name, ()) else kind(name) for name in columns]
        shown = "".join(f"<td{m}>{html.escape(cells[name])}</td>" for m, name in zip(marks, columns, strict=True))
        rows.append(f"<tr>{shown}</tr>")
    return "\n".join([*rows, "</tbody></table>"])
