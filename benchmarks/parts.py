"""What the benchmarks that measure part by part share: a process and an entry for each part, JSON that can be read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def in_own_process(script: str, name: str, arguments: list[str]) -> dict[str, Any] | None:
    """Measure a part in a fresh process; None where it failed (its own message is on stderr by then)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, script, *arguments, "--measure", name, "--into", str(path)]
        done = subprocess.run(command, check=False)
        return json.loads(path.read_text("utf-8")) if done.returncode == 0 and path.exists() else None


def measure_parts(
    script: str,
    known: Sequence[str],
    only: str,
    out: Path,
    arguments: list[str],
    markdown: Callable[[dict[str, Any]], str],
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Measure the parts that are asked for; each replaces its own entry in OUT.json, and the others stay.

    Args:
        script: the benchmark's file.
        known: all parts, in the order of the report.
        only: those to measure, separated by commas.
        out: where results go, without an ending.
        arguments: of the command line.
        markdown: makes OUT.md.

    Returns:
        Every part there is; the parts that failed; rows that did not run, as "PART ROW".
    """
    stored, tables = (out.with_name(out.name + ending) for ending in (".json", ".md"))
    parts: dict[str, Any] = json.loads(stored.read_text("utf-8"))["parts"] if stored.exists() else {}
    stored.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    wanted = [name for name in known if name in only.split(",")]
    for count, name in enumerate(wanted, 1):
        print(f"{count}/{len(wanted)} {name} …", file=sys.stderr, flush=True)
        part = in_own_process(script, name, arguments)
        if part is None:
            failed.append(name)
            continue
        # What was measured in part keeps the command of the rest.
        parts[name] = {"command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments])} | part
        parts = {key: parts[key] for key in known if key in parts}
        stored.write_text(as_json(parts), "utf-8")
        tables.write_text(markdown(parts), "utf-8")
    print(markdown(parts))
    print(f"Wrote {stored}, {tables}")
    if failed:
        print(f"Failed, and left as they were: {', '.join(failed)}", file=sys.stderr)
    rows = [(n, row, r) for n in wanted for row, r in parts.get(n, {}).get("rows", {}).items()]
    broken = [f"{n} {row}" for n, row, r in rows if isinstance(r, dict) and "error" in r]
    if broken:
        print(f"Did not run: {', '.join(broken)}", file=sys.stderr)
    return parts, failed, broken


def as_json(parts: dict[str, Any]) -> str:
    """Indented; a list of numbers on one line, or the timelines make it ten thousand lines."""
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", _on_one_line, json.dumps({"parts": parts}, indent=1)) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"
