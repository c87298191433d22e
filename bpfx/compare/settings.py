"""The settings of a comparison, as compare.json holds them, and the command line that gives them again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from bpfx._config import Config
from bpfx.compare.rows import ROWS, chosen
from bpfx.errors import BpfxError

__all__ = ["BUDGETS", "USED", "Settings"]

BUDGETS = ("iterations", "time", "both")
# What of a run's settings a comparison uses. Offsets are the rows' own matter, and everything runs in eager mode.
USED = (
    "model",
    "data",
    "data_root",
    "download",
    "image_size",
    "batch_size",
    "blocks",
    "local_loss",
    "horizon",
    "device",
    "iterations",
    "lr",
    "weight_decay",
    "eval_every",
    "eval_images",
    "checkpoint_seconds",
)
# These change neither a number nor its meaning, so a comparison may go on with others.
_FREE = ("checkpoint_seconds", "download", "data_root")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared, and how.

    Attributes:
        config: model, data and training; its seed is that of no run.
        rows: keys of `ROWS`.
        seeds: of weights, data order and dropout, one run each.
        period: K of the rows that have one.
        micro_batches: pieces of a batch in the rows that split it.
        budget: "iterations" (all rows as many as BP), "time" (all rows as long as BP) or "both".

    Raises:
        BpfxError: a value outside its range.

    Example:
        >>> from bpfx._config import Config
        >>> Settings(Config(lr=0.002), rows=("local", "bp"), seeds=(0, 1)).command("local")
        'bpfx compare --rows local --seeds 0,1 --lr 0.002'
    """

    config: Config
    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    period: int = 4
    micro_batches: int = 4
    budget: str = "both"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", chosen(self.rows))
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            given = ",".join(map(str, self.seeds))
            raise BpfxError(f"seeds must be one or more whole numbers, each once, such as 0,1,2, not {given!r}.")
        for seed in self.seeds:
            dataclasses.replace(self.config, seed=seed)  # refuses one out of range
        for name in ("period", "micro_batches"):
            if getattr(self, name) < 1:
                raise BpfxError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.budget not in BUDGETS:
            raise BpfxError(f"budget must be {', '.join(BUDGETS[:-1])} or {BUDGETS[-1]}, not {self.budget!r}.")

    def stored(self) -> dict[str, Any]:
        """As compare.json holds them."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "config"}
        content: dict[str, Any] = json.loads(json.dumps({name: getattr(self.config, name) for name in USED} | own))
        return content

    @staticmethod
    def of(stored: dict[str, Any]) -> Settings:
        """The settings in a compare.json.

        Raises:
            KeyError, TypeError: it holds other settings than this version's.
            BpfxError: a value outside its range.
        """
        lists: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        config = Config(**{name: lists.pop(name) for name in USED})
        return Settings(config, **lists)

    def differences(self, other: Settings) -> list[str]:
        """Names of the settings without which runs of the two cannot stand in one table."""
        mine, others = self.stored(), other.stored()
        free = (*_FREE, "rows", "seeds", "budget")
        return [name for name in mine if name not in free and mine[name] != others[name]]

    def joined(self, other: Settings) -> Settings:
        """These settings with the rows and seeds of both."""
        seeds = tuple(dict.fromkeys((*other.seeds, *self.seeds)))
        budget = self.budget if self.budget == other.budget else "both"
        return dataclasses.replace(self, rows=(*other.rows, *self.rows), seeds=seeds, budget=budget)

    def command(self, *rows: str) -> str:
        """The command that runs these rows with these settings."""
        words = ["bpfx", "compare", "--rows", ",".join(rows), "--seeds", ",".join(map(str, self.seeds))]
        defaults = {f.name: f.default for f in (*dataclasses.fields(Config), *dataclasses.fields(Settings))}
        # From this class, where both have a setting of that name.
        own = {f.name for f in dataclasses.fields(self)}
        for name in (*USED, "period", "micro_batches", "budget"):
            value = getattr(self if name in own else self.config, name)
            if value == defaults[name]:
                continue
            flag = "--" + name.replace("_", "-")
            if value is True:
                words.append(flag)
            else:
                text = (
                    ",".join(map(str, value))
                    if isinstance(value, tuple)
                    else repr(value)
                    if isinstance(value, float)
                    else str(value)
                )
                words += [flag, text]
        return shlex.join(words)
