"""benchmarks/losses.py: its report on made-up runs, which runs it keeps and repeats, and one short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SETTINGS = {"model": "M", "depths": [1, 1], "data": "D", "iterations": 2, "batch_size": 4}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; the names it shares with others are forgotten again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("losses", "losses_report", "accuracy", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import losses  # type: ignore[import-not-found]

    monkeypatch.setattr(losses, "ROUNDS", 1)
    monkeypatch.setattr(losses, "PROBES", 1)
    return losses


def run(loss: str, blocks: int = 4, offset: bool = False, seed: int = 0, **more: Any) -> dict[str, Any]:
    """A run as it is stored."""
    finished = {
        "status": "finished",
        "accuracy_percent": 80.0 + seed,
        "diverged_at": None,
        "cosine_refreshes": 0.25 if offset else None,
        "cosine_end": None if loss == "bp" else 0.5,
        "peak_bytes": {"bp": 100, "local": 40, "refresh": 60} if offset else {"bp": 100, "local": 40},
        "time_ratios": [0.9, 1.1, 1.0],
        "head_parameters": 1234,
        "label_free": loss == "free",
        "arguments": "two views" if loss == "free" else "",
    }
    common = {"loss": loss, "blocks": blocks, "offset": offset, "seed": seed, "warnings": [], "settings": SETTINGS}
    made = {"made_with": {"bpfx": "0"}, "command": "python", "date": f"2020-01-01T00:00:0{seed}", "seconds": 1.0}
    return common | made | finished | more


def stored(*runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(index): entry for index, entry in enumerate(runs)}


def lines_of(script: ModuleType, runs: dict[str, dict[str, Any]]) -> list[str]:
    return [line for line in script.markdown(runs, SETTINGS).splitlines() if line.startswith("| ")]


def test_a_row_has_mean_and_deviation_ratios_and_cosines(script: ModuleType) -> None:
    runs = stored(run("free", offset=True, seed=1), run("free", offset=True), run("bp", 1))
    _, bp, row = lines_of(script, runs)
    assert bp == "| BP | – | – | 1 | 80.0 | 1.00 | – | 1.00 | – | – | – |  |"
    assert row == (
        "| free (label-free) | 4 | yes | 2 | 80.5 ± 0.7 | 0.40 | 0.60 | 1.00 (0.90–1.10) | 1,234 | 0.50 | 0.25 |  |"
    )
    assert "- free: two views." in script.markdown(runs, SETTINGS)


def test_refused_failed_and_diverged_runs_say_so(script: ModuleType) -> None:
    refused = {"loss": "a", "blocks": 8, "offset": False, "seed": 0, "warnings": [], "settings": SETTINGS}
    refused |= {"made_with": {}, "command": "", "date": "", "status": "refused", "reason": "no | image"}
    runs = stored(refused, run("b", diverged_at=7, warnings=["careful"]))
    _, first, second = lines_of(script, runs)
    assert first == f"| a | 8 | no | 0 |{' – |' * 7} refused: no / image |"
    assert second.endswith("| seed 0 diverged at 7; warned: careful |")


def test_runs_with_other_settings_are_counted_not_shown(script: ModuleType) -> None:
    runs = stored(run("a"), run("b", settings=SETTINGS | {"iterations": 9}, date="2021"))
    assert len(lines_of(script, runs)) == 2
    assert "1 runs with other settings are stored but not shown" in script.markdown(runs, SETTINGS)
    assert script.newest(runs)["iterations"] == 9


def test_the_plot_is_drawn_where_there_is_something_to_draw(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert not script.plot(stored(run("bp", 1)), SETTINGS, tmp_path / "none.png")
    runs = stored(run("bp", 1), run("a"), run("a", 8, offset=True), run("a", 8, offset=True, seed=1))
    assert script.plot(runs, SETTINGS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_finished_run_and_a_refused_row_are_not_repeated_a_failed_run_is(script: ModuleType) -> None:
    job, other = script.Job("a", 4, False, 0), script.Job("a", 4, False, 1)
    assert script.done(job, {job.name: run("a")}, SETTINGS)
    assert not script.done(job, {job.name: run("a")}, SETTINGS | {"iterations": 3})
    assert not script.done(job, {job.name: run("a", status="failed")}, SETTINGS)
    assert not script.done(other, {job.name: run("a")}, SETTINGS)
    assert script.done(other, {job.name: run("a", status="refused")}, SETTINGS)


def test_the_views_keep_shape_and_values(script: ModuleType) -> None:
    x = torch.arange(2.0 * 5 * 6).reshape(2, 1, 5, 6)
    assert script.crop_and_flip(x).shape == x.shape
    unmoved = script.crop_and_flip(x.repeat(20, 1, 1, 1), padding=0)
    assert {True, False} == {bool((a == b).all()) for a, b in zip(unmoved, x.repeat(20, 1, 1, 1), strict=True)}
    assert all(
        torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(unmoved, x.repeat(20, 1, 1, 1), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "nothing"], "unknown loss 'nothing'"),
        (["--blocks", "4,x"], "such as 4,8"),
        (["--seeds", "0"], "expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert words in capsys.readouterr().err


def test_a_short_run_is_stored_reported_and_not_repeated(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "losses"
    sizes = ["--iterations", "2", "--train-size", "40", "--test-size", "40", "--seeds", "1", "--threads", "1"]
    only = ["--losses", "supervised,tied_readout", "--blocks", "4", "--only", "bp,supervised/4/offset,tied*/local"]
    assert script.main([*sizes, *only, "--out", str(out)]) == 0
    runs = json.loads(out.with_suffix(".json").read_text("utf-8"))["parts"]
    assert list(runs) == ["bp/0", "supervised/4/offset/0", "tied_readout/4/local/0"]
    made = runs["supervised/4/offset/0"]
    assert made["status"] == "finished" and len(made["begin"]) == 4
    assert 0 < made["peak_bytes"]["local"] < made["peak_bytes"]["bp"] and len(made["time_ratios"]) == 1
    assert -1 <= made["cosine_refreshes"] <= 1 and -1 <= made["cosine_end"] <= 1
    assert made["settings"]["iterations"] == 2 and "--only supervised/4/offset/0 " in made["command"]
    assert runs["tied_readout/4/local/0"]["status"] == "refused"
    table = out.with_suffix(".md").read_text("utf-8")
    assert "| supervised | 4 | yes | 1 |" in table and "refused: tied_readout" in table

    assert script.main([*sizes, *only, "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text("utf-8"))["parts"] == runs
    out.with_suffix(".md").unlink()
    assert script.main(["--report-only", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text("utf-8") == table


def test_the_short_table_has_the_best_loss_first(script: ModuleType) -> None:
    runs = [run("bp", 1, accuracy_percent=90.0), run("dgl", 8, accuracy_percent=70.0), run("free", 4)]
    runs += [run("free-kind", 8), run("free-kind", 8, seed=1), run("free-kind", 16, status="refused", reason="small")]
    found = script.write_readme("a\n<!-- losses table -->\nold\n<!-- /losses table -->\nb", stored(*runs), SETTINGS)
    assert found.splitlines()[0] == "a" and found.splitlines()[-1] == "b"
    assert found.splitlines()[4:-2] == [
        "| BP | 90.0 | 90.0 | 90.0 | – | 1.00 | 1.00 | – |",
        "| `free`, kind | – | 80.5 ± 0.7 | – | – | 0.40 | 1.00 | 0.50 |",
        "| `dgl` | – | 70.0 | – | – | 0.40 | 1.00 | 0.50 |",
    ]


def test_the_readme_shows_the_stored_results(script: ModuleType) -> None:
    runs = script.load(BENCHMARKS / "results" / "losses.json")
    page = (BENCHMARKS.parent / "README.md").read_text("utf-8")
    made = script.write_readme(page, runs, script.newest(runs))
    assert made == page, "run python benchmarks/losses.py --report-only"
