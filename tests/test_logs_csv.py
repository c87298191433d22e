"""A CSV of refreshes or losses is whole after every record, and after whatever stops and goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_logs import iterations, made, record, rows, trained

import bpfx
from bpfx.diagnostics import Diagnostics
from bpfx.logs import LOSSES, REFRESHES, CsvWriter, TensorBoardWriter, scalars


def test_csv_holds_the_numbers_of_the_diagnostics(tmp_path: Path) -> None:
    step = made(micro_batches=2, lam="auto")
    path = tmp_path / "new" / "refreshes.csv"
    step.diagnostics.listen(CsvWriter(path))
    trained(step, 8)
    expected = [
        {"iteration": r["iteration"], "block": b["block"]} | {name: b[name] for name in REFRESHES}
        for r in step.diagnostics.refreshes
        for b in r["blocks"]
    ]
    found = [{k: float(v) if v else None for k, v in row.items()} for row in rows(path)]
    assert len(found) == 6 and found == expected, "to the last bit"


def test_csv_is_complete_after_every_record_and_has_one_header(tmp_path: Path) -> None:
    path, own = tmp_path / "r.csv", Diagnostics()
    own.listen(CsvWriter(path))
    assert path.read_text().splitlines() == [",".join(("iteration", "block", *REFRESHES))]
    for iteration in range(3):
        own.refreshed(record(iteration))
        assert iterations(path) == list(range(iteration + 1))
    own = Diagnostics()
    own.listen(CsvWriter(path))
    own.refreshed(record(3))
    assert path.read_text().count("iteration") == 1 and iterations(path) == [0, 1, 2, 3] and len(rows(path)) == 8


def test_csv_of_local_losses(tmp_path: Path) -> None:
    step = made()
    step.diagnostics.listen(CsvWriter(tmp_path / "losses.csv", columns=LOSSES))
    step.diagnostics.listen(CsvWriter(tmp_path / "refreshes.csv"))
    trained(step, 50)
    window = step.diagnostics.learning.windows[-1]
    found = {(int(r["iteration"]), int(r["block"])): float(r["loss"]) for r in rows(tmp_path / "losses.csv")}
    assert found == {(49, k): mean for k, mean in window.items()}
    assert max(iterations(tmp_path / "refreshes.csv")) == 48


@settings(max_examples=8, deadline=None)
@given(checkpoint=st.integers(0, 9), lost=st.integers(0, 6), tail=st.sampled_from([b"", b"9", b"9,0,0.5,,"]))
def test_a_resumed_run_writes_the_file_of_one_never_stopped(
    checkpoint: int, lost: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed up to 6 iterations after its checkpoint, in the middle of a line even."""
    folder = tmp_path_factory.mktemp("resumed")
    whole = made()
    whole.diagnostics.listen(CsvWriter(folder / "whole.csv"))
    trained(whole, 14)

    killed = made()
    killed.diagnostics.listen(CsvWriter(folder / "killed.csv"))
    trained(killed, checkpoint)
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in killed.state_dict().items()}
    trained(killed, checkpoint + lost)
    with (folder / "killed.csv").open("ab") as file:
        file.write(tail)
    resumed = made(seed=1)
    resumed.load_state_dict(state)
    writer = CsvWriter(folder / "killed.csv")
    writer.resume(resumed)
    assert all(iteration < checkpoint for iteration in iterations(folder / "killed.csv"))
    resumed.diagnostics.listen(writer)
    trained(resumed, 14)
    assert (folder / "killed.csv").read_bytes() == (folder / "whole.csv").read_bytes()


def test_a_lost_file_is_written_anew_from_the_state(tmp_path: Path) -> None:
    path, step = tmp_path / "r.csv", made()
    step.diagnostics.listen(CsvWriter(path))
    trained(step, 8)
    before = path.read_bytes()
    path.unlink()
    CsvWriter(path).resume(step)
    assert path.read_bytes() == before
    for length in range(0, len(before), 37):
        path.write_bytes(before[:length])
        CsvWriter(path).resume(step)
        assert path.read_bytes() == before, f"cut after {length} bytes"


def test_a_refresh_that_is_repeated_replaces_its_rows_and_all_after_it(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    writer = CsvWriter(path)
    for iteration in (0, 4, 8, 12, 12, 8):
        writer(scalars(record(iteration)))
    assert [int(row["iteration"]) for row in rows(path)] == [0, 0, 4, 4, 8, 8]
    again = CsvWriter(path)
    again(scalars(record(4, blocks=3)))
    assert [int(row["iteration"]) for row in rows(path)] == [0, 0, 4, 4, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,age\nAda,36\n", "holds something else"),
        ("hello", "holds something else"),
        (",".join(("iteration", "block", *REFRESHES)) + "\nAda,36\n", "line 2 is no row of 13 cells"),
    ],
)
def test_a_file_of_something_else_is_left_alone(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text(text)
    with pytest.raises(bpfx.BpfxError, match=words):
        CsvWriter(path)
    assert path.read_text() == text


@pytest.mark.parametrize("columns", ["loss", [], ["los"], [*LOSSES, "learning_rate"]], ids=str)
def test_columns_of_other_names_are_refused(columns: Any, tmp_path: Path) -> None:
    with pytest.raises(bpfx.BpfxError, match="pass a list of names out of cosine, .* loss of local losses"):
        CsvWriter(tmp_path / "log.csv", columns=columns)
    assert not (tmp_path / "log.csv").exists()


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    with pytest.raises(bpfx.BpfxError, match="that is a folder; pass the path of a file"):
        CsvWriter(tmp_path)
    pytest.importorskip("tensorboard")
    (tmp_path / "events").write_text("")
    with pytest.raises(bpfx.BpfxError, match="that is a file; pass a folder"):
        TensorBoardWriter(tmp_path / "events")


def test_a_file_that_cannot_be_written_ends_in_a_warning(tmp_path: Path) -> None:
    path, own = tmp_path / "r.csv", Diagnostics()
    own.listen(CsvWriter(path))
    path.unlink()
    path.mkdir()
    with pytest.warns(bpfx.BpfxWarning, match=r"the listener CsvWriter failed at iteration 2"):
        own.refreshed(record(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.refreshed(record(3))
