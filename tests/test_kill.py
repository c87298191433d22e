"""A run that is killed at any moment has a whole checkpoint and resumes bit for bit; other files are refused.

Started as a program, this file is the training process: it converts once and forks, so that killing it is cheap.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpfx
from bpfx import checkpoint, cli

KILLS, LEFT = 20, 3
FILE = "state.pt"


# --- the training process --------------------------------------------------------------------------------------------


def batch_at(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(iteration)
    return torch.randn(6, 8, generator=draw), torch.randint(3, (6,), generator=draw)


def make() -> bpfx.BlockTrainer:
    """Dropout, BatchNorm and an offset: everything that has a state."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    offset = bpfx.Offset(period=3)
    step = bpfx.convert(nn.Sequential(*layers), F.cross_entropy, batch_at(0), blocks=["3"], offset=offset)
    torch.manual_seed(1)
    return bpfx.BlockTrainer(step, functools.partial(torch.optim.AdamW, lr=1e-2), micro_batches=2)


def state_of(trainer: bpfx.BlockTrainer) -> dict[str, Any]:
    return {"trainer": trainer.state_dict(), "random": torch.get_rng_state()}


def train(trainer: bpfx.BlockTrainer, file: Path, stop: int | None) -> None:
    """Resume from the file, if there is one, and save to it after every iteration, until killed or at the end."""
    ballast = torch.zeros(2**20)  # so that writing takes about as long as training
    if file.exists():
        saved = checkpoint.load(file)
        trainer.load_state_dict(saved["trainer"])
        torch.set_rng_state(saved["random"])
    while stop is None or trainer.converted.iteration < stop:
        trainer.step(*batch_at(trainer.converted.iteration))
        checkpoint.save({**state_of(trainer), "ballast": ballast}, file)


def child(work: Any, *arguments: Any) -> int:
    """Do something in a forked process; its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return process


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer, chance = make(), random.Random(7)
    file, halves, reached = folder / FILE, 0, [0]
    for _ in range(KILLS):
        file.with_name(FILE + ".new").unlink(missing_ok=True)
        process = child(train, trainer, file, None)
        time.sleep(chance.uniform(0.05, 0.25))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "it ended before it was killed"
        halves += file.with_name(FILE + ".new").exists()
        if file.exists():
            reached.append(checkpoint.load(file)["trainer"]["step"]["_extra_state"]["iteration"])
    end = reached[-1] + LEFT
    for target in (file, folder / "uninterrupted.pt"):
        _, status = os.waitpid(child(train, trainer, target, end), 0)
        assert status == 0
    print(json.dumps({"reached": reached, "halves": halves, "end": end}))


# --- killing it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_there_is_a_whole_checkpoint_after_every_kill(killed: tuple[Path, dict[str, Any]]) -> None:
    _, found = killed
    assert found["reached"] == sorted(found["reached"]), "a kill has lost work that was saved"
    assert found["reached"][-1] > 0
    assert found["halves"] > 0, "no kill came while a file was being written, so nothing was shown"


def test_the_killed_run_ends_as_the_uninterrupted_one(killed: tuple[Path, dict[str, Any]]) -> None:
    folder, found = killed
    from oracles import assert_same_bits

    one, other = checkpoint.load(folder / FILE), checkpoint.load(folder / "uninterrupted.pt")
    assert one["trainer"]["step"]["_extra_state"]["iteration"] == found["end"]
    assert_same_bits(one, other)


# --- files that are no checkpoint ------------------------------------------------------------------------------------


class Program:
    """What a pickle may hold: something that runs when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def write_bad(kind: str, path: Path) -> None:
    good = path.with_name("good.pt")
    checkpoint.save({"rows": [], "finished": {}, "current": None, "weight": torch.randn(1000)}, good)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "overwritten":
        content = bytearray(good.read_bytes())
        content[40:400] = bytes(360)
        path.write_bytes(content)
    elif kind == "picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    elif kind == "text":
        path.write_text("iteration 7\n" * 20)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Program(path.with_name("ran"))))
    elif kind == "program":
        torch.save({"rows": Program(path.with_name("ran"))}, path)
    else:
        torch.save(nn.Linear(2, 2).state_dict(), path)


BAD = {
    "empty": "it is empty",
    "cut off": "it is cut off",
    "overwritten": "it is damaged",
    "picture": "torch.save did not write it",
    "text": "torch.save did not write it",
    "pickle": "torch.save did not write it",
    "program": "more than tensors and plain values",
    "another program's": "is none of bpfx train",
}


@pytest.mark.parametrize("kind", BAD)
def test_file_is_refused_with_a_sentence(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line, and by reading it oneself; what it holds is never run."""
    path = tmp_path / "checkpoint.pt"
    write_bad(kind, path)
    (tmp_path / "config.json").write_text('{"settings": {}}')
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and BAD[kind] in said and str(path) in said and "Traceback" not in said
    if kind != "another program's":
        with pytest.raises(bpfx.BpfxError, match=BAD[kind]):
            checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    current = {"method": "bp", "iteration": 1, "module": nn.Linear(2, 2).state_dict()}
    checkpoint.save({"rows": [], "finished": {}, "current": current}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.json").write_text('{"settings": {"batch_size": 8, "blocks": 2}}')
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not fit config.json" in said


@pytest.mark.parametrize("foreign", [{}, nn.Linear(2, 2).state_dict(), {"_extra_state": 3}, {"_extra_state": {"a": 1}}])
def test_state_of_something_else_is_refused(foreign: dict[str, Any]) -> None:
    trainer = make()
    before = {name: p.detach().clone() for name, p in trainer.converted.named_parameters()}
    with pytest.raises(bpfx.BpfxError, match="no state of a converted step"):
        trainer.converted.load_state_dict(foreign)
    with pytest.raises(bpfx.BpfxError, match="no state of a BlockTrainer"):
        trainer.load_state_dict(foreign)
    with pytest.raises(bpfx.BpfxError, match="no state of a converted step"):
        trainer.load_state_dict({**trainer.state_dict(), "step": foreign})
    assert all(torch.equal(p, before[name]) for name, p in trainer.converted.named_parameters())


def test_there_is_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.pt"):
        with pytest.raises(bpfx.BpfxError, match="there is no checkpoint"):
            checkpoint.load(path)


def test_every_file_is_read_without_running_code() -> None:
    """Nothing in the package unpickles anything else."""
    root = Path(bpfx.__file__).parent
    found = [p for folder in ("bpfx", "passes", "models") for p in (root.parent / folder).rglob("*.py")]
    assert len(found) > 50
    for path in found:
        for line in path.read_text("utf-8").splitlines():
            if "torch.load(" in line and ">>>" not in line:
                assert "weights_only=True" in line, f"{path.name}: {line.strip()}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
