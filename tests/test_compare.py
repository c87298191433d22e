"""`bpfx compare`: every row trains on the same footing, stops, continues, and ends in one report that stands alone."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shlex
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bpfx
from bpfx import cli, compare, models
from bpfx._config import Config, build, prepare
from bpfx._runs import batches
from bpfx.compare import methods, plots, runs
from bpfx.compare.methods import Case, Method
from bpfx.compare.record import Record
from bpfx.compare.rows import ROWS
from bpfx.compare.settings import Settings
from bpfx.compare.table import COLUMNS, Table
from bpfx.errors import BpfxError

ROWS_OF_THE_RUN = ("bp", "checkpointing", "serial", "offset")
TINY = ["--model", "tiny", "--iterations", "6", "--batch-size", "8", "--eval-images", "40", "--image-size", "8"]
TINY += ["--blocks", "3", "--period", "2", "--micro-batches", "2"]
CONFIG = Config(model="tiny", iterations=4, batch_size=8, eval_images=40, image_size=8, blocks=3)


def tiny(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Three convolutions without BatchNorm, so that pieces of a batch have the gradient of the whole."""
    parts = [nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.Tanh()) for c in (in_channels, 6, 6)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes))


@pytest.fixture(autouse=True, scope="module")
def _tiny_model() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._BUILDERS, "tiny", tiny)
        yield


def run(folder: Path, *options: str, rows: tuple[str, ...] = ROWS_OF_THE_RUN, seeds: str = "0") -> int:
    return cli.main(["compare", *TINY, "--rows", ",".join(rows), "--seeds", seeds, "--out", str(folder), *options])


def stored(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "compare.json").read_text("utf-8"))
    return content


def accuracies(folder: Path) -> dict[str, Any]:
    """What does not depend on the clock: accuracy at equal iterations, by row and seed."""
    rows = stored(folder)["rows"]
    return {
        key: {
            seed: (r["accuracy"], r["curve"], r["cosine"]) for seed, r in row["measured"]["runs"]["iterations"].items()
        }
        for key, row in rows.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny comparison."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder) == 0
    return folder


def case(period: int = 2, micro_batches: int = 3, iterations: int = 4) -> Case:
    return Case(CONFIG, prepare(CONFIG), period, micro_batches, iterations)


def weights(method: Method) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in method.trainee.model.state_dict().items()}


def trained(key: str, made: Case) -> dict[str, torch.Tensor]:
    """A row's weights after its iterations."""
    return weights(runs.train(ROWS[key], made, runs.Watch())[1])


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# the rows are what they say


def test_micro_batches_have_the_gradient_of_the_batch() -> None:
    made = case()
    batch = next(batches(made.splits.train, made.config, 0))
    grads = []
    for key in ("bp", "micro"):
        method = ROWS[key].make(made)
        method.gradients(*batch)
        grads.append({n: p.grad for n, p in method.trainee.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 8
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["micro", "serial", "checkpointing"])
def test_exact_rows_train_as_bp(key: str) -> None:
    assert ROWS[key].exact
    assert_close(trained("bp", case()), trained(key, case()))


@pytest.mark.parametrize("key", ["local", "default"])
def test_rows_by_the_trainer_train_as_those_by_the_loop(key: str) -> None:
    assert_close(trained(key, case()), trained(f"{key}-serial", case()))


def test_bp_and_local_by_turns_is_bp_with_period_1() -> None:
    made = case(period=1)
    assert_close(trained("bp", made), trained("pgl", made))


def test_bp_and_local_by_turns_differs_from_both_otherwise() -> None:
    turns, bp, local = (trained(key, case(period=2))["0.0.weight"] for key in ("pgl", "bp", "local"))
    assert not torch.allclose(turns, bp, rtol=1e-3) and not torch.allclose(turns, local, rtol=1e-3)


def test_quarter_batch_is_bp_on_its_first_images() -> None:
    made = case()
    x, y = next(batches(made.splits.train, made.config, 0))
    small, bp = ROWS["small"].make(made), ROWS["bp"].make(made)
    assert small.gradients(x, y) == bp.gradients(x[:2], y[:2])


def test_bp_row_is_what_bpfx_train_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*TINY[: TINY.index("--period")], "--seed", "3", "--methods", "bp", "--out", str(tmp_path / "train")]
    assert cli.main(["train", *options]) == 0
    there = torch.load(tmp_path / "train" / "bp.pt", weights_only=True)
    config = Config(model="tiny", iterations=6, batch_size=8, eval_images=40, image_size=8, blocks=3, seed=3)
    here = trained("bp", Case(config, prepare(config), 2, 2, 6))
    assert all(torch.equal(here[name], there[name]) for name in there)


@pytest.mark.parametrize("key", ROWS)
def test_every_row_can_be_made_and_explained(key: str) -> None:
    row = ROWS[key]
    assert "{" not in row.explain(4, 4, 25)
    method = row.make(case())
    assert isinstance(method.cycle, int | None)


OFFSETS: dict[str, Callable[[], bpfx.Offset | None]] = {  # as docs/compare.md has them, with K = 2 and batches of 8
    "local": lambda: None,
    "stale": lambda: bpfx.Offset(form="B", alpha=0.0, period=2),
    "offset": lambda: bpfx.Offset(period=2),
    "decayed": lambda: bpfx.Offset(period=2, decay=0.7),
    "auto-lambda": lambda: bpfx.Offset(period=2, lam="auto"),
    "default": lambda: bpfx.Offset(),
    "fresh": lambda: bpfx.Offset(period=1, batch=2),
    "variate": lambda: bpfx.Offset(period=1, batch=2, form="B", alpha="auto"),
    "matched": lambda: bpfx.Offset(period=2, match=1.0),
}


def by_hand(offset: bpfx.Offset | None, iterations: int) -> dict[str, torch.Tensor]:
    """Weights after a plain loop over the same batches."""
    splits = prepare(CONFIG)
    model, given = build(CONFIG, splits), batches(splits.train, CONFIG, 0)
    step = bpfx.convert(model, F.cross_entropy, next(given), blocks=3, offset=offset)
    optimizer = torch.optim.AdamW(step.parameters(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CONFIG.lr, total_steps=iterations, cycle_momentum=False)
    torch.manual_seed(CONFIG.seed + 1)
    for _, (x, y) in zip(range(iterations), batches(splits.train, CONFIG, 0), strict=False):
        step(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("key", OFFSETS)
def test_a_row_is_the_loop_that_the_page_says(key: str) -> None:
    found, expected = trained(key, case(iterations=6)), by_hand(OFFSETS[key](), 6)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_differ() -> None:
    """But for `default`, which begins with exact steps and is BP in so short a run."""
    first = {key: trained(key, case(iterations=6))["0.0.weight"] for key in OFFSETS}
    assert all(not torch.equal(first[a], first[b]) for a in first for b in first if a < b)
    torch.testing.assert_close(first["default"], trained("bp", case(iterations=6))["0.0.weight"], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("iterations", [5, 13])
def test_a_longer_or_shorter_run_has_its_whole_cycle_of_rates(iterations: int) -> None:
    _, method = runs.train(ROWS["bp"], case(iterations=iterations), runs.Watch())
    assert method.optimizer is not None
    rates = {group["lr"] for group in method.optimizer.param_groups}
    assert len(rates) == 1 and rates.pop() < CONFIG.lr / 1000


def test_no_two_rows_look_alike_in_the_plots() -> None:
    looks = [(s["color"], str(s["linestyle"]), s["marker"]) for s in plots.styles().values()]
    assert len(set(looks)) == len(looks) == len(ROWS)
    assert len({(color, line) for color, line, _ in looks}) == len(ROWS)


# a whole comparison


def test_every_finished_row_has_both_budgets(finished: Path) -> None:
    rows = stored(finished)["rows"]
    assert tuple(rows) == ROWS_OF_THE_RUN
    for key, row in rows.items():
        made = row["measured"]
        assert "reason" not in made, (key, made.get("reason"))
        for budget in ("iterations", "time"):
            assert 0 <= made["runs"][budget]["0"]["accuracy"] <= 1, (key, budget)
        costs = made["costs"]
        assert min(costs["ratios"]) <= costs["ratio"] <= max(costs["ratios"])
        assert costs["peak_bytes"] > 0 and costs["bp_seconds"] > 0
        if key != "bp":
            assert made["runs"]["time"]["0"]["iterations"] == max(1, round(6 / costs["ratio"]))
    assert rows["bp"]["measured"]["runs"]["time"] == rows["bp"]["measured"]["runs"]["iterations"]
    assert rows["checkpointing"]["measured"]["runs"]["iterations"] == rows["bp"]["measured"]["runs"]["iterations"]


def test_settings_versions_and_commands_are_there(finished: Path) -> None:
    content = stored(finished)
    assert {"bpfx", "torch", "python", "threads", "device"} <= content["made_with"][0].keys()
    assert content["settings"]["iterations"] == 6 and content["settings"]["rows"] == list(ROWS_OF_THE_RUN)
    words = shlex.split(content["rows"]["offset"]["command"])
    assert words[:6] == ["bpfx", "compare", "--rows", "offset", "--seeds", "0"]
    given = vars(cli._parser().parse_args(words[1:]))
    assert given["period"] == 2 and given["model"] == "tiny" and given["blocks"] == 3 and given["eval_images"] == 40


def test_table_is_printed_and_written(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--resume", str(finished)]) == 0
    out = capsys.readouterr().out
    text = (finished / "compare.md").read_text("utf-8")
    for key in ROWS_OF_THE_RUN:
        assert ROWS[key].label in out and f"| {ROWS[key].label} |" in text and ROWS[key].explain(2, 2, 2) in text


class _Page(html.parser.HTMLParser):
    """Checks nesting, and keeps what the page would fetch and what it says."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.said: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_html_report_stands_alone(finished: Path) -> None:
    text = (finished / "report.html").read_text("utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert len(page.fetched) == 3 and all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert not re.search(r"https?://|@import|url\(", text)
    said = " ".join(page.said)
    for key in ROWS_OF_THE_RUN:
        assert ROWS[key].label in said and f"bpfx compare --rows {key} --seeds 0" in said


# stopping and continuing


def test_complete_comparison_is_not_repeated(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(runs, "train", never)
    monkeypatch.setattr(runs, "costs", never)
    before = (finished / "compare.json").read_bytes()
    assert cli.main(["compare", "--resume", str(finished)]) == 0
    assert run(finished) == 0
    assert (finished / "compare.json").read_bytes() == before


@pytest.mark.parametrize("row", ["offset", "default-serial"])
def test_stopped_comparison_continues_to_the_same_numbers(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("bp", row)
    assert run(tmp_path / "whole", "--budget", "iterations", rows=rows) == 0
    read, began = runs.batches, []

    def interrupted(train: Any, config: Config, start: int) -> Any:
        began.append(start)
        for number, batch in enumerate(read(train, config, start)):
            if len(began) == 2 and number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(runs, "batches", interrupted)
    assert run(tmp_path / "cut", "--budget", "iterations", rows=rows) == 130
    assert (tmp_path / "cut" / "current.pt").exists() and (tmp_path / "cut" / "report.html").exists()
    assert set(accuracies(tmp_path / "cut")[row]) == set()
    assert "Unfinished: 1 of 2 runs" in (tmp_path / "cut" / "compare.md").read_text("utf-8")
    assert cli.main(["compare", "--resume", str(tmp_path / "cut")]) == 0
    assert began == [0, 0, 3]
    assert accuracies(tmp_path / "cut") == accuracies(tmp_path / "whole")
    assert not (tmp_path / "cut" / "current.pt").exists()


def test_rows_and_seeds_can_be_added(tmp_path: Path) -> None:
    assert run(tmp_path, "--budget", "iterations", rows=("bp",)) == 0
    before = stored(tmp_path)["rows"]["bp"]["measured"]["runs"]["iterations"]["0"]
    assert run(tmp_path, "--budget", "iterations", rows=("local",), seeds="0,1") == 0
    rows = stored(tmp_path)["rows"]
    assert rows["bp"]["measured"]["runs"]["iterations"]["0"] == before
    assert {key: list(row["measured"]["runs"]["iterations"]) for key, row in rows.items()} == {
        "bp": ["0", "1"],
        "local": ["0", "1"],
    }


def test_a_row_that_cannot_run_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(case: Case, offset: Any) -> Any:
        raise methods.BpfxError("no such offset | today")

    monkeypatch.setattr("bpfx.compare.rows.converted", refuse)
    assert run(tmp_path, "--budget", "iterations", rows=("bp", "stale", "local")) == 0
    assert "refused: no such offset | today" in capsys.readouterr().out
    assert "refused: no such offset" in (tmp_path / "report.html").read_text("utf-8")
    rows = stored(tmp_path)["rows"]
    assert rows["stale"]["measured"]["failed"] is False and "0" in rows["bp"]["measured"]["runs"]["iterations"]


def test_what_may_pass_is_tried_again_and_counts_as_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data that cannot be read once are no property of a row, unlike what the row itself refuses."""
    options, rows = ("--budget", "iterations", "--checkpoint-seconds", "0"), ("bp", "local")
    assert run(tmp_path / "whole", *options, rows=rows) == 0
    read, began = runs.batches, []

    def torn(train: Any, config: Config, start: int) -> Any:
        began.append(start)
        for number, batch in enumerate(read(train, config, start)):
            if len(began) == 2 and number == 3:
                raise BpfxError("the disk is away")
            yield batch

    monkeypatch.setattr(runs, "batches", torn)
    assert run(tmp_path / "torn", *options, rows=rows) == 0
    assert "failed: the disk is away" in capsys.readouterr().out
    assert "Unfinished: 1 of 2 runs" in (tmp_path / "torn" / "compare.md").read_text("utf-8")
    assert cli.main(["compare", "--resume", str(tmp_path / "torn")]) == 0
    assert began == [0, 0, 3], "what failed goes on from where it was saved"
    assert accuracies(tmp_path / "torn") == accuracies(tmp_path / "whole")
    assert not (tmp_path / "torn" / "current.pt").exists()


def test_warnings_before_a_stop_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Method.advance

    def warned(self: Method, *batch: torch.Tensor) -> float:
        if self.trainee.step is not None and self.iteration == 2:
            warnings.warn("a block stands still", bpfx.BpfxWarning, stacklevel=1)
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, *batch)

    monkeypatch.setattr(Method, "advance", warned)
    assert run(tmp_path, "--budget", "iterations", rows=("local",)) == 130
    monkeypatch.undo()
    assert cli.main(["compare", "--resume", str(tmp_path)]) == 0
    assert "a block stands still" in stored(tmp_path)["rows"]["local"]["measured"]["warnings"]


def test_divergence_is_noted(tmp_path: Path) -> None:
    assert run(tmp_path, "--lr", "1e25", "--budget", "iterations", rows=("bp",)) == 0
    assert stored(tmp_path)["rows"]["bp"]["measured"]["runs"]["iterations"]["0"]["diverged"] is not None
    assert "diverged (equal iterations): seed 0 at iteration" in (tmp_path / "compare.md").read_text("utf-8")


def test_method_that_decides_itself_is_timed_over_its_run() -> None:
    made = case(iterations=8)
    method = Method(methods.plain(made), made, cycle=None)
    row = compare.Row("itself", "", lambda _: method)
    result, _ = runs.train(row, made, runs.Watch())
    assert 1 <= len(result["ratios"]) <= 5 and all(ratio > 0 for ratio in result["ratios"])


# messages


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["compare", *arguments]) == 2
    return capsys.readouterr().err


def test_unknown_row_is_answered_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    err = said(capsys, "--rows", "bp,lokal")
    assert "'lokal'" in err and all(key in err for key in ROWS)


@pytest.mark.parametrize("seeds", ["", ",", "1,1"])
def test_seeds_are_asked_for(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "seeds must be one or more whole numbers, each once, such as 0,1,2" in said(capsys, "--seeds", seeds)


def test_other_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert "whole numbers separated by commas" in said(capsys, "--seeds", "one")
    assert "seed must be at least 0 and below 2**63, not -1" in said(capsys, "--seeds", "0,-1")
    assert "checkpoint_seconds must be a number of at least 0, not inf" in said(capsys, "--checkpoint-seconds", "inf")
    assert "period must be at least 1, not 0" in said(capsys, "--period", "0")
    assert "micro_batches must be at least 1, not 0" in said(capsys, "--micro-batches", "0")
    assert "budget must be iterations, time or both, not 'money'" in said(capsys, "--budget", "money")
    assert "leave out --rows" in said(capsys, "--rows", "bp", "--resume", "anywhere")


def test_missing_matplotlib_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "pip install 'bpfx[plot]'" in said(capsys, "--rows", "bp", "--out", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_foreign_folders_are_left_alone(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has no compare.json" in said(capsys, "--resume", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "a run of bpfx train" in said(capsys, "--resume", str(tmp_path))
    assert "choose another folder" in said(capsys, "--out", str(tmp_path))
    err = said(capsys, *TINY, "--lr", "0.1", "--out", str(finished))
    assert "other settings (lr)" in err
    for content in ("{", "[]", '{"kind": "shopping list"}'):
        (tmp_path / "compare.json").write_text(content)
        assert "cannot be read as a comparison" in said(capsys, "--resume", str(tmp_path))


def test_settings_survive_the_file() -> None:
    settings = Settings(Config(model="tiny", blocks=("a", "b"), lr=0.01), rows=("local", "bp"), seeds=(4, 5), period=3)
    again = Settings.of(json.loads(json.dumps(settings.stored())))
    assert again.stored() == settings.stored() and again.rows == ("bp", "local")
    assert again.command("bp") == "bpfx compare --rows bp --seeds 4,5 --model tiny --blocks a,b --lr 0.01 --period 3"


def test_table_of_nothing_is_empty(tmp_path: Path) -> None:
    table = Table.of(Record(tmp_path, Settings(CONFIG, rows=("bp", "local"), seeds=(0,))))
    assert [line.accuracy for line in table.lines] == [[], []] and not table.summary
    assert list(table.columns()) == ["label", "cosine"]  # of what is known before anything has run


# --- the stored one ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_stored_comparison() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "compare.md").read_text("utf-8")
    shown = page.split("<!-- stored comparison -->\n")[1].split("<!-- /stored comparison -->")[0].splitlines()
    record = Record.load(root / "benchmarks" / "results" / "compare")
    columns = ("label", "accuracy", "ratio", "timed", "iterations", "share")
    stored = [COLUMNS, *(line.cells() for line in Table.of(record).lines)]
    assert [shown[0], *shown[2:]] == ["| " + " | ".join(row[c] for c in columns) + " |" for row in stored]
    assert record.settings.command(*record.settings.rows) in page
