"""What runs of the command line share: stopping with Ctrl-C, whole files, random state, batches without an end."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bpfx import data
from bpfx._config import Config
from bpfx.checkpoint import replace as replace


class Interrupted(Exception):
    """The run was asked to stop and has saved where it was; carries the run's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class Stop:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, folder: Path) -> Iterator[None]:
        """The first Ctrl-C ends the step, saves and stops; the second one stops at once."""

        def handle(signum: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(folder) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def batches(train: data.Split, config: Config, iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches from `iteration` on, epoch after epoch, without the smaller last one of each."""
    # BatchNorm cannot train on a single sample, which the last batch may be.
    size = min(config.batch_size, len(train))
    per_epoch = data.batch_count(train, size, drop_last=True)
    epoch, skip = divmod(iteration, per_epoch)
    while True:
        for x, y in data.batches(train, size, config.seed, epoch, skip, drop_last=True):
            yield x.to(config.device), y.to(config.device)
        epoch, skip = epoch + 1, 0


def random_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in state["cuda"]])
