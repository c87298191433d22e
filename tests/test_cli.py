"""The command line: a tiny run ends with all it promises, survives any kind of stop, and errors are sentences."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpfx import _runs, cli, train
from bpfx._config import Config

TINY = ["--iterations", "6", "--batch-size", "8", "--eval-images", "40", "--blocks", "3", "--period", "2"]
FILES = [
    "config.json",
    "metrics.csv",
    "refreshes.csv",
    "report.md",
    "report.json",
    "curves.png",
    "plan.svg",
    "plan.txt",
    "checkpoint.pt",
]


def run_tiny(folder: Path, *options: str) -> int:
    return cli.main(["train", *TINY, "--out", str(folder), *options])


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path, method: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{method}.pt", weights_only=True)


def assert_same_run(one: Path, other: Path, methods: tuple[str, ...] = train.METHODS) -> None:
    assert metrics(one) == metrics(other)
    for method in methods:
        first, second = weights(one, method), weights(other, method)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), method
    cosines = [
        [json.loads((folder / "report.json").read_text())["results"][method]["cosines"] for method in methods]
        for folder in (one, other)
    ]
    assert cosines[0] == cosines[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_tiny(folder) == 0
    return folder


# a whole run


def test_run_leaves_everything_it_promises(finished: Path) -> None:
    for name in [*FILES, "bp.pt", "local.pt", "offset.pt"]:
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob("*.new")), "a half-written file is left"


def test_report_has_every_method_and_column(finished: Path) -> None:
    rows = {row["method"]: row for row in json.loads((finished / "report.json").read_text())["rows"]}
    assert list(rows) == ["bp", "checkpointing", "local", "offset"]
    for method, row in rows.items():
        assert row["peak_mib"] > 0 and row["seconds_per_step"] > 0, method
    for method in train.METHODS:
        assert 0 <= rows[method]["accuracy"] <= 100 and rows[method]["predicted_mib"] > 0
    for method in ("local", "offset"):
        assert -1 <= rows[method]["cosine"] <= 1
    assert rows["checkpointing"]["peak_mib"] < rows["bp"]["peak_mib"]
    text = (finished / "report.md").read_text()
    assert "| BP + checkpointing |" in text and "With the offset, test accuracy is" in text


def test_local_step_needs_less_memory_than_bp(finished: Path) -> None:
    rows = {row["method"]: row for row in json.loads((finished / "report.json").read_text())["rows"]}
    assert rows["local"]["peak_mib"] < rows["bp"]["peak_mib"]


def test_methods_start_from_the_same_weights_and_see_the_same_data(tmp_path: Path) -> None:
    config = Config(iterations=1, batch_size=8, methods=("bp", "local"))
    splits = train.prepare(config)
    starts = [train.Trainee.make(config, splits, method).model.state_dict() for method in config.methods]
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_svg_is_well_formed_and_names_every_block(finished: Path) -> None:
    text = "".join(xml.etree.ElementTree.parse(finished / "plan.svg").getroot().itertext())
    assert all(f"block {index}" in text for index in (1, 2)) and "MiB" in text and "stop-gradient" in text


def test_output_that_is_no_terminal_gets_no_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(tmp_path / "run", "--methods", "bp") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ " not in out
    assert "BP: iteration 6, test accuracy" in out and "measured peak MiB" in out


def test_run_without_matplotlib_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_tiny(tmp_path / "run", "--methods", "bp") == 0
    assert "pip install 'bpfx[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "run" / "curves.png").exists()


# stopping and resuming


class Killed(BaseException):
    """Stands for the process's end: nothing in bpfx may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Let the `call`-th training step of `method` be the last thing that happens."""
    steps = {"count": 0}
    original: Callable[..., torch.Tensor] = train.Trainee.__call__

    def step(self: train.Trainee, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kind = "bp" if self.step is None else "local" if self.step.offset is None else "offset"
        steps["count"] += kind == method
        if steps["count"] >= call:
            raise Killed
        return original(self, x, y)

    monkeypatch.setattr(train.Trainee, "__call__", step)


def test_run_killed_between_checkpoints_resumes_bit_for_bit(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(patch, "offset", 6)
        with pytest.raises(Killed):
            run_tiny(folder, "--checkpoint-every", "3")
    assert not (folder / "report.md").exists()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, finished)


def test_run_killed_right_after_its_last_step_is_not_trained_further(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        kill_at(patch, "bp", 7)  # the seventh call is the first of the memory measurement
        with pytest.raises(Killed):
            run_tiny(folder, "--checkpoint-every", "6")
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert_same_run(folder, finished)


def test_resuming_a_complete_run_repeats_its_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(finished)
    assert cli.main(["train", "--resume", str(finished)]) == 0
    assert "local + offset" in capsys.readouterr().out and metrics(finished) == before


def test_interrupt_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--methods", "bp", "--iterations", "100000", "--checkpoint-every", "2", "--eval-every", "50000"]
    command = [sys.executable, "-m", "bpfx", "train", *TINY, *options, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert f"bpfx train --resume {folder}" in out and "Traceback" not in out
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["current"]["iteration"] > 0


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(beside: Path) -> None:
        beside.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        _runs.replace(path, half)
    assert path.read_text() == "old"


# plan, draw, help


def test_plan_prints_blocks_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--batch-size", "8", "--blocks", "3"]) == 0
    assert "stem" in capsys.readouterr().out


def test_local_losses_are_chosen_by_region(capsys: pytest.CaptureFixture[str]) -> None:
    which = ["--local-loss", "0=predsim,*=dgl", "--horizon", "1"]
    assert cli.main(["plan", "--batch-size", "8", "--blocks", "3", *which]) == 0
    printed = capsys.readouterr().out
    assert "similarity" in printed and "DGL" in printed


def test_draw_writes_the_picture(tmp_path: Path) -> None:
    out = tmp_path / "model.svg"
    assert cli.main(["draw", "--batch-size", "8", "--blocks", "3", "--out", str(out)]) == 0
    assert xml.etree.ElementTree.parse(out).getroot().tag.endswith("svg")


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["draw"]])
def test_help_shows_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0 and "bpfx train --resume" in capsys.readouterr().out


# messages


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--model", "small_resnet"], "Unknown model 'small_resnet'. Did you mean small-resnet?"),
        (["train", "--data", "CIFAR11"], "Unknown data set 'CIFAR11'"),
        (["train", "--data", "FashionMNIST"], "FashionMNIST needs --data-root"),
        (["train", "--iterations", "0"], "iterations must be at least 1, not 0"),
        (["train", "--local-loss", "nope"], "local_loss='nope' is not known; the known ones are auglocal"),
        (["plan", "--horizon", "0"], "horizon must be at least 1, not 0"),
        (["train", "--period", "0"], "period=0"),
        (["train", "--lambda", "much"], "argument --lambda: 'much' is neither a number nor auto"),
        (["train", "--lambda", "-1"], "lam=-1.0"),
        (["train", "--offset-batch", "200"], "offset_batch must be at most the batch size, 100, not 200"),
        (["train", "--lr", "nan"], "lr must be a positive number, not nan"),
        (["train", "--weight-decay", "-1"], "weight_decay must be a number of at least 0, not -1.0"),
        (["train", "--seed", "99999999999999999999999"], "seed must be at least 0 and below"),
        (["train", "--methods", "bp,ff"], "methods must be some of bp, local, offset, each once, not 'bp,ff'"),
        (["train", "--device", "abacus"], "The device 'abacus' is not available here"),
        (["train", "--resume", "no/such/run"], "no/such/run holds no run to resume"),
        (["train", "--resume", "x", "--lr", "1"], "takes every setting from the run's folder; leave out --lr"),
        (["train", "--resume", "/dev/null"], "/dev/null holds no run to resume"),
        (["train", "--out", "/dev/null/run"], "Cannot make the folder /dev/null/run: Not a directory; choose another"),
        (["compare", "--out", "/dev/null/run"], "Cannot make the folder /dev/null/run"),
        (["draw", "--out", "/"], "Cannot write /: it is a folder; name a file in it, such as /plan.svg"),
        (["train", "--batch-size", "many"], "invalid int value: 'many'"),
        (["train", "--modle", "x"], "unrecognized arguments: --modle x"),
        (["tarin"], "invalid choice: 'tarin'"),
        ([], "required: COMMAND"),
        (["plan", "--blocks", "stage.0"], "stage.0"),
        (["draw", "--out", "no/such/folder/plan.svg"], "there is no folder no/such/folder"),
    ],
)
def test_errors_are_one_plain_sentence(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("bpfx: ") and expected in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no folder"


def test_report_of_a_run_that_diverged_is_json(tmp_path: Path) -> None:
    assert run_tiny(tmp_path / "run", "--methods", "local", "--lr", "1e18", "--eval-every", "1") == 0

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "run" / "report.json").read_text("utf-8")
    assert None in json.loads(text, parse_constant=never)["results"]["local"]["cosines"]


def test_folder_that_holds_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tiny(finished) == 2
    assert f"--resume {finished}" in capsys.readouterr().err


def test_damaged_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, "bp", 4)
        with pytest.raises(Killed):
            run_tiny(folder, "--methods", "bp", "--checkpoint-every", "2")
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    assert cli.main(["train", "--resume", str(folder)]) == 2
    assert f"The checkpoint {folder / 'checkpoint.pt'} cannot be read" in capsys.readouterr().err
