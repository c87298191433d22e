"""benchmarks/offset.py: its verdicts on made-up runs, its timing rule, and one short run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SETTINGS = {"model": "M", "data": "D", "iterations": 2, "batch_size": 4, "try_out": False}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; the names it shares with others are forgotten again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("offset", "offset_parts", "offset_report", "losses", "losses_report", "accuracy", "parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import offset  # type: ignore[import-not-found]

    return offset


def run(part: str, row: str, accuracy: float, seed: int = 0, time: float = 1.5, **more: Any) -> dict[str, Any]:
    """A run as it is stored."""
    finished = {
        "status": "finished",
        "accuracy_percent": accuracy,
        "diverged_at": None,
        "shares": {"refresh": 0.25, "local": 0.75} if row.startswith("offset") else {"step": 1.0},
        "refreshes": 1,
        "cosine_refreshes": 0.25 if row.startswith("offset") else None,
        "wall": {"average": time, "kinds": {}},
        "cpu": {"average": time, "kinds": {}},
        "bp_step_seconds": 0.1,
    }
    if seed == 0:
        finished["peak_bytes"] = {"bp": 100, "drop_in": {"refresh": 40, "local": 30}, "serial": {"local": 20}}
    common = {"part": part, "row": row, "seed": seed, "warnings": [], "settings": SETTINGS}
    made = {"made_with": {"bpfx": "0"}, "command": "python", "date": f"2020-01-01T00:00:0{seed}", "seconds": 1.0}
    return common | made | finished | more


def stored(*runs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{r['part']}/{r['row']}/{r['seed']}": r for r in runs}


def three(part: str, row: str, *accuracies: float, **more: Any) -> list[dict[str, Any]]:
    return [run(part, row, value, seed, **more) for seed, value in enumerate(accuracies)]


def verdicts(script: ModuleType, runs: dict[str, dict[str, Any]]) -> list[str]:
    text = script.markdown(runs)
    return [line.split(" | ")[2] for line in text.splitlines() if line.startswith(("| Fine", "| From", "| LoRA"))]


def test_the_targets_of_fine_tuning_are_computed(script: ModuleType) -> None:
    bp, local = three("tuning", "bp", 80, 81, 82), three("tuning", "local", 70, 71, 72)
    good = stored(*bp, *local, *three("tuning", "offset", 79, 80, 81))
    assert verdicts(script, good) == ["met"] * 5
    assert "drop-in loop 40.0 % (refresh)" in script.markdown(good)
    assert "reached by: BlockTrainer over 4 micro-batches" in script.markdown(good)
    bad = stored(*bp, *three("tuning", "local", 75, 76, 77), *three("tuning", "offset", 70, 71, 72, time=1.7))
    for r in bad.values():
        r.get("peak_bytes", {})["serial"] = {"exact": 26}
    assert verdicts(script, bad) == ["**missed**"] * 5


def test_the_guide_shows_the_stored_results(script: ModuleType) -> None:
    runs = script.load(BENCHMARKS / "results" / "offset.json")
    page = script.GUIDE.read_text("utf-8")
    assert "<!-- offset tuning -->" in page and "<!-- offset scratch -->" in page
    assert script.write_guide(page, runs) == page, "run python benchmarks/offset.py --report-only"


def test_a_line_of_the_guide(script: ModuleType) -> None:
    runs = stored(*three("tuning", "bp", 80, 81, 82), *three("tuning", "offset", 79, 80, 80))
    found = script.write_guide("a\n<!-- offset tuning -->\nold\n<!-- /offset tuning -->\nb", runs).splitlines()
    assert (found[0], found[-1]) == ("a", "b")
    assert found[-3] == "| offset (default) | 3 | 79.7 ± 0.6 | 1.3 | 1.50 | 40 % | 20 % |"


def test_from_scratch_the_best_plain_local_row_counts_and_all_of_them_are_needed(script: ModuleType) -> None:
    runs = [*three("scratch", "bp", 90, 90, 91), *three("scratch", "offset", 89, 89, 90)]
    runs += [*three("scratch", "local", 80, 80, 81), *three("scratch", "local-predsim", 82, 83, 82)]
    assert verdicts(script, stored(*runs)) == ["not known", "met", "met"]
    runs += three("scratch", "local-auglocal", 88.5, 88.5, 89.5)
    assert verdicts(script, stored(*runs)) == ["**missed**", "met", "met"]
    assert "+0.5 ± 0.0 points above local: auglocal" in script.markdown(stored(*runs))


def test_few_seeds_and_missing_rows_are_said_and_a_try_out_is_not_judged(script: ModuleType) -> None:
    assert verdicts(script, stored(run("lora", "offset", 70))) == [
        "not known",
        "not known",
        "met (1 of 3 seeds)",
        "met (1 of 3 seeds)",
        "not known",
    ]
    tried = stored(run("lora", "offset", 70, settings=SETTINGS | {"try_out": True}))
    assert verdicts(script, tried) == ["not judged"]


def test_a_row_has_differences_shares_and_notes(script: ModuleType) -> None:
    runs = stored(run("tuning", "bp", 80), run("tuning", "local", 70, diverged_at=7), run("tuning", "offset", 79))
    runs |= stored(run("tuning", "fresh", 0, status="refused", reason="no | batch", settings=SETTINGS))
    lines = {line.split(" | ")[0]: line for line in script.markdown(runs).splitlines() if line.startswith("| ")}
    cells = lines["| offset (default)"].split(" | ")
    assert cells[4:7] == ["+9.0", "+1.0", "25 / 0 / 75"]
    assert cells[9:11] == ["40 % (refresh)", "20 % (local)"]
    assert lines["| local: supervised"].endswith("seed 0 diverged at 7 |")
    assert lines["| offset, K=1, 25 samples"].endswith("refused: no / batch |")


def test_the_average_time_has_every_refresh_and_no_hiccup(script: ModuleType) -> None:
    kinds = ["refresh", "local", "local", "local"] * 10
    own = [3.0 if kind == "refresh" else 1.0 for kind in kinds]
    own[1] = 100.0
    found = script.average_ratio(own, kinds, [2.0, 2.0, 50.0, *[2.0] * 5])
    assert found == {"average": 0.75, "kinds": {"refresh": 1.5, "local": 0.5}}
    assert script.average_ratio([1.0], ["step"], [2.0])["average"] == 0.5


def test_the_plot_is_drawn_where_there_is_something_to_draw(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    refused = run("tuning", "bp", 0, status="refused", reason="")
    assert not script.plot(stored(refused), tmp_path / "none.png")
    assert script.plot(stored(run("tuning", "bp", 80), run("lora", "offset", 70)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "nothing"], "unknown part 'nothing'"),
        (["--parts", "lora"], "needs --weights-module FILE.py and --images FILE.npz"),
        (["--seeds", "0"], "expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_is_stored_reported_and_not_repeated(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "offset"
    given = ["--iterations", "4", "--train-size", "40", "--test-size", "40", "--seeds", "1", "--out", str(out)]
    only = ["--parts", "scratch,tuning", "--only", "scratch/bp,scratch/offset-k4,tuning/offset/0"]
    assert script.main([*given, *only]) == 0
    runs = json.loads(out.with_suffix(".json").read_text("utf-8"))["parts"]
    assert list(runs) == ["scratch/bp/0", "scratch/offset-k4/0", "tuning/offset/0"]
    made = runs["scratch/offset-k4/0"]
    assert made["status"] == "finished" and made["shares"] == {"refresh": 0.25, "local": 0.75}
    assert set(made["peak_bytes"]["drop_in"]) == set(made["peak_bytes"]["serial"]) == {"refresh", "local"}
    assert 0 < made["peak_bytes"]["serial"]["local"] < made["peak_bytes"]["bp"]
    assert set(runs["tuning/offset/0"]["peak_bytes"]["drop_in"]) == {"refresh", "exact", "local"}
    assert made["wall"]["average"] > 0 and "--only scratch/offset-k4/0 " in made["command"]
    assert not out.with_name("offset.running").exists()
    table = out.with_suffix(".md").read_text("utf-8")
    assert "not judged" in table and "4 iterations of BP on the first 5 classes" in table

    assert script.main([*given, *only]) == 0
    assert json.loads(out.with_suffix(".json").read_text("utf-8"))["parts"] == runs
    out.with_suffix(".md").unlink()
    assert script.main(["--report-only", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text("utf-8") == table


def test_adapters_go_onto_a_convolutional_network_of_the_users(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numpy, _ = pytest.importorskip("numpy"), pytest.importorskip("peft")
    module = tmp_path / "weights.py"
    module.write_text("from test_offset_benchmark import tiny as mobilenet_v2\n", "utf-8")
    archive = tmp_path / "images.npz"
    numpy.savez(archive, x=numpy.zeros((70, 8, 8, 3), "uint8"), y=numpy.arange(70) % 10, classes=numpy.arange(10))
    given = ["--parts", "lokr", "--weights-module", str(module), "--images", str(archive), "--iterations", "2"]
    given += ["--seeds", "1", "--out", str(tmp_path / "offset")]
    assert script.main([*given, "--only", "lokr/probe"]) == 0
    made = json.loads((tmp_path / "offset.json").read_text("utf-8"))["parts"]["lokr/probe/0"]
    assert made["settings"]["train_images"] == 50 and made["settings"]["test_images"] == 20
    assert script.main([*given, "--only", "lokr/bp", "--lokr-model", "efficientnet_lite0"]) == 2
    assert "no function efficientnet_lite0()" in capsys.readouterr().err


def tiny() -> nn.Module:
    """Something with a MobileNet's outer shape."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
            self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 1000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x).mean((2, 3)))

    return Tiny()
