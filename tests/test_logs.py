"""What is logged is what was measured, a resumed run logs as one never stopped, and no log can break training."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpfx
from bpfx import cli, diagnostics, train
from bpfx.diagnostics import Diagnostics
from bpfx.logs import REFRESHES, CsvWriter, TensorBoardWriter, scalars, table


def made(seed: int = 0, **offset: Any) -> bpfx.Step:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    settings = bpfx.Offset(**({"period": 3} | offset))
    return bpfx.convert(net, F.cross_entropy, batch(0), blocks=["2", "4"], offset=settings)


def batch(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(iteration)
    return torch.randn(12, 8, generator=draw), torch.randint(3, (12,), generator=draw)


def trained(step: bpfx.Step, stop: int) -> list[torch.Tensor]:
    """SGD without momentum, so that the step's own state is all there is."""
    losses = []
    while step.iteration < stop:
        step.zero_grad()
        loss = step(*batch(step.iteration))
        loss.backward()
        with torch.no_grad():
            for p in step.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
        losses.append(loss.detach())
    return losses


def record(iteration: int, blocks: int = 2) -> dict[str, Any]:
    cells = [
        {"block": k, "cosine": k + iteration / 7, "staleness": None, "norm": 1e-30, "period": 4} for k in range(blocks)
    ]
    return {"iteration": iteration, "blocks": cells, "cosine": 0.5, "period": 4}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def iterations(path: Path) -> list[int]:
    return sorted({int(row["iteration"]) for row in rows(path)})


# --- listeners --------------------------------------------------------------------------------------------------------


def test_listeners_hear_every_refresh_and_window_as_flat_numbers() -> None:
    step = made(micro_batches=2, lam="auto")
    heard: list[dict[str, float]] = []
    step.diagnostics.listen(heard.append)
    trained(step, 100)
    refreshes = [s for s in heard if "cosine" in s]
    windows = [s for s in heard if "block0/loss" in s]
    assert len(heard) == len(refreshes) + len(windows)
    assert refreshes == [scalars(r) for r in step.diagnostics.refreshes]
    assert [s["iteration"] for s in refreshes] == list(range(0, 100, 3))
    assert all(type(v) in (int, float) for s in heard for v in s.values())
    assert [s["iteration"] for s in windows] == [49, 99]
    means = [{f"block{k}/loss": mean for k, mean in w.items()} for w in step.diagnostics.learning.windows]
    assert [{k: v for k, v in s.items() if k != "iteration"} for s in windows] == means
    assert {f"block0/{name}" for name in REFRESHES} <= refreshes[-1].keys()
    assert "block0/staleness" not in refreshes[0], "there is no old offset at the first refresh"


def test_a_window_under_way_is_not_mixed_with_a_loaded_training() -> None:
    step, other = made(), made()
    trained(other, 60)
    trained(step, 30)  # 30 losses of a window
    step.set_extra_state(other.get_extra_state())
    heard: list[dict[str, float]] = []
    step.diagnostics.listen(heard.append)
    trained(step, 109)
    assert not [s for s in heard if "block0/loss" in s]
    trained(step, 110)
    assert len([s for s in heard if "block0/loss" in s]) == 1


def test_logging_changes_no_bit_of_training(tmp_path: Path) -> None:
    plain, logged = made(), made()
    logged.diagnostics.listen(CsvWriter(tmp_path / "r.csv"))
    logged.diagnostics.listen(TensorBoardWriter(tmp_path / "events"))
    assert torch.equal(torch.stack(trained(plain, 10)), torch.stack(trained(logged, 10)))


def test_a_removed_listener_hears_no_more() -> None:
    own = Diagnostics()
    heard: list[float] = []
    first = own.listen(lambda s: heard.append(s["iteration"]))
    second = own.listen(lambda s: heard.append(-s["iteration"]))
    own.refreshed(record(1))
    first()
    first()
    own.refreshed(record(2))
    second()
    own.refreshed(record(3))
    assert heard == [1, -1, -2]


def test_the_same_function_may_listen_twice_and_remove_itself() -> None:
    own = Diagnostics()
    heard: list[dict[str, float]] = []
    own.listen(heard.append)
    remove = own.listen(heard.append)
    own.refreshed(record(1))
    remove()
    own.refreshed(record(2))
    assert [s["iteration"] for s in heard] == [1, 1, 2]
    removers: list[Callable[[], None]] = []
    removers.append(own.listen(lambda s: removers[0]()))
    own.refreshed(record(3))
    own.refreshed(record(4))
    assert [s["iteration"] for s in heard] == [1, 1, 2, 3, 4]


def test_a_listener_cannot_change_what_others_hear_nor_the_record() -> None:
    own = Diagnostics()
    heard: list[dict[str, float]] = []
    own.listen(lambda s: s.clear())
    own.listen(heard.append)
    own.refreshed(record(1))
    assert heard == [scalars(record(1))] and own.refreshes == [record(1)]


def test_a_listener_that_fails_is_removed_with_a_warning_and_training_goes_on() -> None:
    plain, step = made(), made()
    calls: list[int] = []
    heard: list[float] = []

    def broken(given: dict[str, float]) -> None:
        calls.append(1)
        raise ConnectionError("no route to host")

    step.diagnostics.listen(broken)
    step.diagnostics.listen(lambda s: heard.append(s["iteration"]))
    with pytest.warns(bpfx.BpfxWarning, match=r"broken failed at iteration 0 .* ConnectionError: no route") as caught:
        losses = trained(step, 7)
    assert len([w for w in caught if issubclass(w.category, bpfx.BpfxWarning)]) == 1
    assert len(calls) == 1 and heard == [0, 3, 6]
    assert torch.equal(torch.stack(losses), torch.stack(trained(plain, 7)))


def test_an_interrupt_in_a_listener_is_passed_on() -> None:
    def stop(given: dict[str, float]) -> None:
        raise KeyboardInterrupt

    own = Diagnostics()
    own.listen(stop)
    with pytest.raises(KeyboardInterrupt):
        own.refreshed(record(1))


def test_listeners_are_no_part_of_the_state(tmp_path: Path) -> None:
    step, plain = made(), made()
    step.diagnostics.listen(CsvWriter(tmp_path / "r.csv"))
    trained(step, 4)
    trained(plain, 4)
    assert step.state_dict()["_extra_state"].keys() == plain.state_dict()["_extra_state"].keys()
    torch.save(step.state_dict(), tmp_path / "step.pt")
    torch.load(tmp_path / "step.pt", weights_only=True)


def test_calls_that_do_not_count_are_neither_recorded_nor_told() -> None:
    step = made()
    trained(step, 4)
    heard: list[dict[str, float]] = []
    step.diagnostics.listen(heard.append)
    records, learning = list(step.diagnostics.refreshes), step.diagnostics.learning
    with step.diagnostics.aside():
        trained(step, 60)
    own = step.diagnostics
    assert (own.refreshes, own.measured, own.learning, heard) == (records, 2, learning, [])
    own.refreshed(record(60))
    assert [s["iteration"] for s in heard] == [60] and own.measured == 3


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_oldest_records_go_and_every_cosine_is_still_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "REFRESHES", 5)
    step = made(period=1)
    trainee = train.Trainee(step, step.model, step)
    cosines: list[float] = []
    expected: list[float] = []
    step.diagnostics.listen(lambda s: expected.append(s["cosine"]))
    for stop in (3, 4, 8, 8, 12):
        trained(step, stop)
        cosines += trainee.new_cosines()
    assert [r["iteration"] for r in step.diagnostics.refreshes] == [7, 8, 9, 10, 11]
    assert step.diagnostics.measured == 12 and len(expected) == 12 and cosines == expected
    other = made(seed=1, period=1)
    other.load_state_dict(step.state_dict())
    assert other.diagnostics.refreshes == step.diagnostics.refreshes
    fresh = train.Trainee(other, other.model, other)
    assert fresh.new_cosines() == []
    trained(other, 14)
    trained(step, 14)
    assert fresh.new_cosines() == expected[-2:]
    assert other.diagnostics.refreshes == step.diagnostics.refreshes


def test_a_failed_step_takes_its_record_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "REFRESHES", 3)
    own = Diagnostics()
    for iteration in range(5):
        own.refreshed(record(iteration))
    own.retract(4)
    assert [r["iteration"] for r in own.refreshes] == [2, 3] and own.measured == 4
    own.retract(4)
    assert own.measured == 4


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected_events(heard: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for s in heard:
        for key in s.keys() - {"iteration"}:
            points.setdefault(key, []).append((int(s["iteration"]), s[key]))
    return points


def same_points(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for tag, points in one.items():
        assert [at for at, _ in points] == [at for at, _ in other[tag]], tag
        single = [torch.tensor(v).item() for _, v in other[tag]]  # events hold single precision
        assert [v for _, v in points] == single, tag


def test_events_hold_tags_and_values(tmp_path: Path) -> None:
    step = made()
    heard: list[dict[str, float]] = []
    step.diagnostics.listen(heard.append)
    writer = TensorBoardWriter(tmp_path)
    step.diagnostics.listen(writer)
    trained(step, 52)
    found = events(tmp_path)
    assert {"cosine", "period", "block0/cosine", "block1/lam", "block0/loss", "block2/loss"} <= found.keys()
    same_points(found, expected_events(heard))
    writer.close()


def test_events_after_the_checkpoint_are_hidden_when_a_run_resumes(tmp_path: Path) -> None:
    written: list[dict[str, float]] = []
    for start, span in ((0, range(0, 20, 4)), (8, range(8, 28, 4))):
        writer = TensorBoardWriter(tmp_path, start)
        for iteration in span:
            writer(scalars(record(iteration)))
        writer.close()
    written = [scalars(record(iteration)) for iteration in range(0, 28, 4)]
    same_points(events(tmp_path), expected_events(written))


def test_missing_tensorboard_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(bpfx.BpfxError, match=r"pip install 'bpfx\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)
    assert cli.main(["train", "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'bpfx[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "refused before anything is made"


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_shows_the_latest_refresh_and_losses() -> None:
    step = made()
    assert table(step).startswith("nothing measured yet")
    trained(step, 1)
    first = table(step).splitlines()
    assert first[0].startswith("refresh at iteration 0: mean cosine") and len(first) == 4
    assert "staleness" not in first[1] and "spread" not in first[1] and "local loss" not in first[1]
    trained(step, 50)
    latest = table(step)
    lines = latest.splitlines()
    assert "iteration 48" in lines[0] and len(lines) == 5
    for block in step.diagnostics.refreshes[-1]["blocks"]:
        line = lines[2 + block["block"]].split()
        assert f"{block['cosine']:.4g}" == line[1] and f"{block['norm']:.4g}" in line
        assert f"{step.diagnostics.learning.windows[-1][block['block']]:.4g}" in line
    assert "–" in lines[4], "the last block has a loss and no offset"


def test_the_table_without_an_offset_shows_losses() -> None:
    step = bpfx.convert(made().model, F.cross_entropy, batch(0), blocks=["2", "4"], offset=None)
    trained(step, 50)
    assert len(table(step).splitlines()) == 5 and "cosine" not in table(step)


def test_a_value_that_is_not_finite_is_logged_as_it_is(tmp_path: Path) -> None:
    flat = scalars(record(0) | {"blocks": [{"block": 0, "cosine": math.nan, "norm": math.inf}]})
    writer = CsvWriter(tmp_path / "r.csv")
    writer(flat)
    (row,) = rows(writer.path)
    assert math.isnan(float(row["cosine"])) and math.isinf(float(row["norm"]))


# --- bpfx train -------------------------------------------------------------------------------------------------------

TINY = ["--iterations", "6", "--batch-size", "8", "--eval-images", "40", "--blocks", "3", "--period", "2"]
TINY += ["--methods", "offset", "--checkpoint-every", "3", "--tensorboard"]


class Killed(BaseException):
    """Stands for the process's end."""


def values(folder: Path) -> dict[str, dict[int, float]]:
    """The last value at every step; times differ from run to run."""
    return {tag: dict(points) for tag, points in events(folder).items() if tag != "seconds"}


def test_a_run_that_was_killed_has_the_logs_of_one_that_was_not(
    tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint, and then between two."""
    folder = tmp_path / "killed"
    original = train.Trainee.__call__

    def run_until(call: int, *command: str) -> None:
        calls = [0]

        def step(self: train.Trainee, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = original(self, x, y)
            calls[0] += 1
            if calls[0] == call:
                raise Killed  # after the refresh, and before the step counts
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainee, "__call__", step)
            with pytest.raises(Killed):
                cli.main(list(command))

    run_until(2, "train", *TINY, "--out", str(folder))
    run_until(5, "train", "--resume", str(folder))
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert (folder / "refreshes.csv").read_bytes() == (whole_run / "refreshes.csv").read_bytes()
    assert values(folder / "tensorboard" / "offset") == values(whole_run / "tensorboard" / "offset")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert cli.main(["train", *TINY, "--out", str(folder)]) == 0
    return folder


def test_a_run_logs_its_training_and_not_its_measuring(whole_run: Path) -> None:
    assert iterations(whole_run / "refreshes.csv") == [0, 2, 4]
    found = events(whole_run / "tensorboard" / "offset")
    assert [at for at, _ in found["block0/cosine"]] == [0, 2, 4]
    assert found["test_accuracy"][-1][0] == 6 and [at for at, _ in found["train_loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_the_option_writes_no_events(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [o for o in TINY if o != "--tensorboard"]
    assert cli.main(["train", *options, "--methods", "bp", "--out", str(folder)]) == 0
    assert not (folder / "tensorboard").exists() and not (folder / "refreshes.csv").exists()
