"""What the benchmarks that measure part by part share: a process for each part, and JSON that can be read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def in_own_process(script: str, name: str, arguments: list[str]) -> dict[str, Any] | None:
    """Measure a part in a fresh process; None where it failed (its own message is on stderr by then)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        command = [sys.executable, script, *arguments, "--measure", name, "--into", str(path)]
        done = subprocess.run(command, check=False)
        return json.loads(path.read_text("utf-8")) if done.returncode == 0 and path.exists() else None


def as_json(parts: dict[str, Any]) -> str:
    """Indented; a list of numbers on one line, or the timelines make it ten thousand lines."""
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", _on_one_line, json.dumps({"parts": parts}, indent=1)) + "\n"


def _on_one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"
