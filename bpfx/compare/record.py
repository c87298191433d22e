"""compare.json: what has been measured so far, by row, budget and seed; written after every run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from bpfx._config import CONFIG_FILE
from bpfx._files import finite
from bpfx._runs import replace
from bpfx.compare.rows import ROWS
from bpfx.compare.settings import Settings
from bpfx.errors import BpfxError

__all__ = ["FILE", "Record"]

FILE = "compare.json"
_KIND = "bpfx compare"

Run = dict[str, Any]


class Record:
    """The measurements of a comparison and the file that holds them.

    Attributes:
        folder: of the comparison.
        settings: of all runs in it.
        about: what the data and the partition turned out to be.
        rows: by key: `runs` by budget and seed, `costs`, and `reason` with `failed` where a row could not run.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.about: dict[str, Any] = {}
        self.made_with: list[dict[str, Any]] = []
        self.began = _now()
        self.rows: dict[str, dict[str, Any]] = {}

    @staticmethod
    def load(folder: Path) -> Record:
        """The comparison in `folder`.

        Raises:
            BpfxError: there is none, or its file cannot be read.
        """
        path = folder / FILE
        if not path.exists():
            other = "a run of bpfx train, and " if (folder / CONFIG_FILE).exists() else ""
            raise BpfxError(f"{folder} holds {other}no comparison to continue: it has no {FILE}.")
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["kind"] != _KIND:
                raise KeyError(_KIND)
            record = Record(folder, Settings.of(content["settings"]))
            record.about, record.made_with, record.began = (content[k] for k in ("about", "made_with", "began"))
            record.rows = {key: content["rows"][key]["measured"] for key in content["rows"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BpfxError(f"{path} cannot be read as a comparison: {type(error).__name__}: {error}.") from None
        return record

    @staticmethod
    def open(folder: Path, settings: Settings) -> Record:
        """The comparison in `folder` with further rows and seeds, or a new one.

        Raises:
            BpfxError: the folder holds something else, or a comparison with other settings.
        """
        if not (folder / FILE).exists():
            if (folder / CONFIG_FILE).exists():
                raise BpfxError(f"{folder} holds a run of bpfx train; choose another folder for the comparison.")
            return Record(folder, settings)
        record = Record.load(folder)
        differences = record.settings.differences(settings)
        if differences:
            raise BpfxError(
                f"{folder} holds a comparison with other settings ({', '.join(differences)}), so that its runs cannot "
                f"stand in one table with these; choose another folder, or continue it with --resume {folder}."
            )
        record.settings = settings.joined(record.settings)
        return record

    @property
    def quarter(self) -> int:
        """Images in a quarter of a batch, at least 1."""
        size = min(self.settings.config.batch_size, self.about.get("train_images", self.settings.config.batch_size))
        return max(1, size // 4)

    def row(self, key: str) -> dict[str, Any]:
        """The measurements of a row, made empty where it has none."""
        return self.rows.setdefault(key, {"runs": {"iterations": {}, "time": {}}})

    def run(self, key: str, budget: str, seed: int) -> Run | None:
        """A finished run."""
        found: Run | None = self.row(key)["runs"][budget].get(str(seed))
        return found

    def runs(self, key: str, budget: str) -> list[Run]:
        """The finished runs of a row, in the order of the seeds."""
        return [run for seed in self.settings.seeds if (run := self.run(key, budget, seed)) is not None]

    def same(self, key: str, seed: int, iterations: int) -> Run | None:
        """A finished run of any row that trains as this one does, with this seed and so many iterations."""
        kind = ROWS[key].trains_as or key
        for other in self.rows:
            if (ROWS[other].trains_as or other) == kind:
                for runs in self.rows[other]["runs"].values():
                    run: Run | None = runs.get(str(seed))
                    if run is not None and run["iterations"] == iterations:
                        return run
        return None

    def time_iterations(self, key: str) -> int | None:
        """Iterations of a row that take BP's time; None as long as its time is unknown."""
        costs = self.row(key).get("costs")
        if key == "bp":
            return self.settings.config.iterations
        return None if costs is None else max(1, round(self.settings.config.iterations / costs["ratio"]))

    def save(self) -> None:
        """Write compare.json, or leave the old one: never a half."""
        now = {
            "bpfx": importlib.metadata.version("bpfx"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": _device(self.settings.config.device),
        }
        if now not in self.made_with:
            self.made_with.append(now)
        content = {
            "kind": _KIND,
            "settings": self.settings.stored(),
            "command": self.settings.command(*self.settings.rows),
            "about": self.about,
            "made_with": self.made_with,
            "began": self.began,
            "written": _now(),
            "rows": {
                key: {
                    "label": ROWS[key].label,
                    "explanation": ROWS[key].explain(self.settings.period, self.settings.micro_batches, self.quarter),
                    "command": self.settings.command(key),
                    "measured": self.rows[key],
                }
                for key in ROWS
                if key in self.rows
            },
        }
        text = json.dumps(finite(content), indent=1) + "\n"
        replace(self.folder / FILE, lambda path: path.write_text(text, "utf-8"))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _device(name: str) -> str:
    if name.startswith("cuda") and torch.cuda.is_available():
        return f"{name} ({torch.cuda.get_device_name(name)})"
    return f"{name} ({platform.machine()})"
