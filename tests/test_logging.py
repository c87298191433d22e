"""``BPFX_LOGS`` shows what the compiler and the schedule do, and nothing is shown without it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpfx
from bpfx import _logging


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger("bpfx")
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    for name in _logging.NAMES:
        _logging.logger(name).setLevel(logging.NOTSET)


def shown(setting: str | None) -> str:
    stream = io.StringIO()
    if setting is not None:
        _logging.configure(setting, stream)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    batch = torch.randn(6, 4), torch.randint(0, 2, (6,))
    step = bpfx.convert(net, F.cross_entropy, batch, blocks=2, offset=bpfx.Offset(period=2))
    step(*batch)
    return stream.getvalue()


CASES = {
    "capture": (["[bpfx.capture] non-strict export: verified"], ["bpfx.offset", "bpfx.partition"]),
    "partition": (["[bpfx.partition] 2 blocks: 0: "], ["plain BP", "bpfx.capture"]),
    "+partition": (["2 blocks", "plain BP"], []),
    "graphs": (["[bpfx.graphs] LocalStep", "stop_gradient", "BPStep"], []),
    "offset": (["refresh at iteration 0: mean cosine"], ["'block'"]),
    "+offset": (["refresh at iteration 0", "'block': 0"], []),
    "all,-graphs": (["bpfx.capture", "bpfx.partition", "bpfx.offset"], ["bpfx.graphs"]),
}


@pytest.mark.parametrize("setting", CASES)
def test_shows_what_was_asked_for(setting: str) -> None:
    wanted, unwanted = CASES[setting]
    text = shown(setting)
    assert all(w in text for w in wanted) and not any(u in text for u in unwanted), text


def test_silent_without_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert shown(None) == ""
    assert capfd.readouterr() == ("", "")


def test_configuring_twice_shows_lines_once() -> None:
    _logging.configure("capture", io.StringIO())
    assert shown("capture").count("non-strict export") == 1


def test_a_capture_anew_is_told() -> None:
    stream = io.StringIO()
    _logging.configure("capture", stream)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.layer(x) / len(x))

    batch = torch.randn(6, 4), torch.randint(0, 2, (6,))
    step = bpfx.convert(Fixed(), F.cross_entropy, batch, blocks=2, offset=None)
    step(*(t[:5] for t in batch))
    assert "captured anew for inputs of shape [(5, 4), (5,)]" in stream.getvalue()


def test_read_from_the_environment() -> None:
    def imported(setting: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BPFX_LOGS": setting}
        command = [sys.executable, "-c", "import bpfx, logging; print(logging.getLogger('bpfx.offset').level)"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert imported("+offset").stdout.strip() == str(logging.DEBUG)
    refused = imported("captur")
    assert refused.returncode and "BPFX_LOGS='captur'" in refused.stderr and "'capture'" in refused.stderr
