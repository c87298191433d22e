"""The tables of `coverage.py`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

Run = dict[str, Any]
RUNGS = ("export", "export with opaque modules", "strict export", "one opaque block")
DETECTION = "detection"


def counted(parts: dict[str, Run]) -> list[Run]:
    """What the goal is about: models that train as they are. Detectors of torchvision are shown, and not counted."""
    return [r for r in parts.values() if r["status"] != "not built" and r["task"] != DETECTION]


def converted(run: Run) -> bool:
    return run["status"] in ("exact", "differs")


def summary(parts: dict[str, Run]) -> str:
    """A row for each library."""
    head = [
        "library",
        "models",
        "converted",
        "BP gradients equal",
        "share",
        *RUNGS,
        "two blocks or more",
        "local step finite",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    rows = counted(parts)
    for library in [*dict.fromkeys(r["library"] for r in rows), "all"]:
        own = [r for r in rows if library in (r["library"], "all")]
        done = [r for r in own if converted(r)]
        exact = [r for r in own if r["status"] == "exact"]
        rungs = Counter(r["rung"] for r in done)
        cells = [
            library,
            len(own),
            len(done),
            len(exact),
            f"{100 * len(exact) / max(len(own), 1):.1f} %",
            *(rungs.get(rung, 0) for rung in RUNGS),
            sum(r["blocks"] > 1 for r in done),
            sum(r.get("local") == "finite" for r in done),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def full(parts: dict[str, Run]) -> str:
    """A row for each model that trains."""
    lines = []
    rows = [r for r in parts.values() if r["status"] != "not built"]
    for library in dict.fromkeys(r["library"] for r in rows):
        own = sorted((r for r in rows if r["library"] == library), key=lambda r: (r["task"] == DETECTION, r["name"]))
        lines += ["", f"### {library} {own[0]['made_with'][library]}", ""]
        lines += [
            "| model | task | rung | blocks | BP gradients | largest error | s |",
            "|---|---|---|--:|---|--:|--:|",
        ]
        for run in own:
            name = run["name"] + (f" ({run['family']})" if run["family"] not in ("", run["name"]) else "")
            rung = run.get("rung", "–")
            if rung == "export with opaque modules":
                rung = f"export, {run['opaque']} opaque"
            verdict = {"exact": "equal", "differs": "**differ**", "failed": "**not converted**"}[run["status"]]
            error = f"{run['error']:.0e}" if run.get("error") else "0" if "error" in run else "–"
            cells = [name, run["task"], rung, str(run.get("blocks", "–")), verdict, error, f"{run['seconds']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def failures(parts: dict[str, Run]) -> str:
    """What did not go well, with the reason; detectors too."""
    rows = [r for r in parts.values() if r["status"] in ("failed", "differs")]
    lines = ["| model | what | reason |", "|---|---|---|"]
    for run in rows:
        what = "not converted" if run["status"] == "failed" else "gradients differ"
        reason = run["reason"]
        if run.get("double") is not None:
            reason += f"; in float64 the largest error is {run['double']:.0e}"
        lines.append(f"| {run['library']} {run['name']} | {what} | {plain(reason)} |")
    rows = [r for r in parts.values() if converted(r) and r.get("local") != "finite"]
    lines += [f"| {r['library']} {r['name']} | local step | {plain(r['local'])} |" for r in rows]
    return "\n".join(lines) if len(lines) > 2 else "None."


def not_built(parts: dict[str, Run]) -> str:
    """Names of what does not train here without bpfx."""
    names = [f"{r['name']}" for r in parts.values() if r["status"] == "not built"]
    return f"{len(names)}: {', '.join(names)}." if names else "None."


def plain(text: str) -> str:
    """A message as a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")[:280]


def versions(parts: dict[str, Run]) -> str:
    """What the results were made with."""
    found: dict[str, list[str]] = {}
    for run in parts.values():
        for name, version in run["made_with"].items():
            if str(version) not in found.setdefault(name, []):
                found[name].append(str(version))
    return ", ".join(f"{name} {' / '.join(v)}" for name, v in found.items())


SECTIONS = {"summary": summary, "models": full, "failures": failures, "not built": not_built, "versions": versions}


def write_docs(text: str, parts: dict[str, Run]) -> str:
    """The page with its tables, which stand between markers, made anew."""
    for name, make in SECTIONS.items():
        start, end = f"<!-- coverage {name} -->", f"<!-- /coverage {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"the page has no pair of markers {start} … {end}")
        before, rest = text.split(start, 1)
        after = rest.split(end, 1)[1]
        text = f"{before}{start}\n{make(parts)}\n{end}{after}"
    return text


def markdown(parts: dict[str, Run]) -> str:
    """The whole report."""
    seconds = sum(r["seconds"] for r in parts.values())
    return "\n\n".join(
        [
            "# Models that bpfx converts as they are",
            "Made by `python benchmarks/coverage.py`; what each column means is in docs/coverage.md.",
            f"{versions(parts)}. {len(parts)} models in {seconds / 60:.0f} minutes.",
            summary(parts),
            "## Failures",
            failures(parts),
            "## All models",
            full(parts),
            "## Not counted: they do not train here without bpfx either",
            not_built(parts),
            "",
        ]
    )
