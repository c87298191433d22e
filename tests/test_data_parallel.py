"""Several processes train as one: real ones, started by torchrun, against the run of one process on whole batches.

What they do is in ``parallel_worker.py``; starting processes takes the time, so one start serves all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpfx
from bpfx import cli, logs
from bpfx._ranks import is_rank_zero

ROOT = Path(__file__).parent.parent


def test_two_processes_are_one(tmp_path: Path, subtests: pytest.Subtests) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [str(Path(parallel_worker.__file__)), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([*command, *worker], env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT)
    found = [json.loads(p.read_text()) if p.exists() else {} for p in (tmp_path / f"{r}.json" for r in range(2))]
    assert all(found), done.stderr[-3000:]
    for name in parallel_worker.CASES:
        with subtests.test(name):
            for rank, outcomes in enumerate(found):
                assert name in outcomes, f"rank {rank} did not get there; it ended with {list(outcomes)[-1]}"
                assert not outcomes[name], f"rank {rank}: {outcomes[name]}"


# --- one process ------------------------------------------------------------------------------------------------------


def small() -> bpfx.Step:
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return bpfx.convert(model, F.cross_entropy, (x, y), blocks=["2"], offset=bpfx.Offset(period=1))


def test_what_needs_other_processes_is_refused_in_words() -> None:
    step = small()
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(bpfx.BpfxError, match="start the script with torchrun"):
        bpfx.BlockTrainer(step, sgd, data_parallel=True)
    with pytest.raises(bpfx.BpfxError, match="start one process for each device"):
        step._replicate_for_data_parallel()  # what nn.DataParallel calls on two GPUs
    with pytest.raises(bpfx.BpfxError, match="pass what is inside, its .module"):
        bpfx.BlockTrainer(nn.DataParallel(step), sgd)  # type: ignore[arg-type]


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that torchrun gives to rank 1."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_command_line_runs_in_one_process(second_of_two: pytest.MonkeyPatch, capsys: Any) -> None:
    """The first of several says so, and the others say nothing."""
    for command in ("train", "compare"):
        second_of_two.setenv("RANK", "1")
        assert cli.main([command]) == 2
        assert capsys.readouterr() == ("", "")
        second_of_two.setenv("RANK", "0")
        assert cli.main([command]) == 2
        assert f"bpfx {command} runs in one process" in capsys.readouterr().err


def test_only_the_first_process_shows_progress_and_writes(
    second_of_two: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    step = small()
    batch = torch.randn(4, 3), torch.randint(0, 2, (4,))

    def write(name: str, **options: Any) -> bool:
        path = tmp_path / name
        writer = logs.CsvWriter(path, **options)
        remove = step.diagnostics.listen(writer)
        step(*batch)
        writer.resume(step)
        remove()
        return path.exists()

    assert not is_rank_zero()
    assert cli._console().quiet
    assert not write("second.csv")
    assert write("own.csv", every_rank=True)
    second_of_two.setenv("RANK", "0")
    assert is_rank_zero() and not cli._console().quiet
    assert write("first.csv")
