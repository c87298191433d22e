"""benchmarks/coverage.py: tiny models through the whole of it, its judgement, and that the docs show its results."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PARTS = ("coverage_configs", "coverage_models", "coverage_measure", "coverage_report")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, under a name of its own: a well-known package is called coverage, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARKS / "coverage.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in PARTS:
        sys.modules.pop(name, None)


class InThisProcess:
    """In the worker's place: a process of its own takes seconds to start."""

    def __init__(self, limit: float, *settings: Any) -> None:
        pass

    def measure(self, job: Any) -> Any:
        return sys.modules["coverage_measure"].measure(job)

    def stop(self, kill: bool = False) -> None:
        pass


def test_a_sweep_is_stored_reported_and_not_repeated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "Worker", InThisProcess)
    # Listing all of transformers takes longer than converting a model of it.
    tasks = {"gpt2": "causal language model", "perceiver": "masked language model"}
    monkeypatch.setattr(script, "jobs", lambda library, known: [script.Job(library, n, t) for n, t in tasks.items()])
    out = tmp_path / "sweep"
    command = ["--library", "transformers", "--only", "gpt2,perceiver", "--out", str(out)]
    assert script.main(command) == 0
    parts = json.loads(out.with_suffix(".json").read_text("utf-8"))["parts"]
    model = parts["transformers/gpt2"]
    assert (model["status"], model["rung"], model["local"], model["finite"]) == ("exact", "export", "finite", True)
    assert model["error"] <= script.sys.modules["coverage_measure"].TOLERANCE and model["blocks"] > 1
    assert parts["transformers/perceiver"]["status"] == "not built"  # its width is fixed in another way
    text = out.with_suffix(".md").read_text("utf-8")
    assert "| transformers | 1 | 1 | 1 | 100.0 % |" in text
    assert "1: perceiver." in text
    capsys.readouterr()
    assert script.main(command) == 0
    assert "2 of 2 models are there, 0 to go" in capsys.readouterr().err


def test_judgement_tells_equal_from_different_gradients(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, models = sys.modules["coverage_measure"], sys.modules["coverage_models"]
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    case = models.Case(net, F.cross_entropy, (torch.randn(6, 4), torch.randint(0, 3, (6,))), "")
    assert measure.judged(case)["status"] == "exact"
    convert = measure.bpfx.convert

    def wrong(*args: Any, **kwargs: Any) -> Any:
        step = convert(*args, **kwargs)
        found = step.run_bp(*case.batch)
        found.grads["0.weight"] *= 1.01
        return SimpleNamespace(plan=step.plan, run_bp=lambda *batch: found, run_local=step.run_local)

    monkeypatch.setattr(measure.bpfx, "convert", wrong)
    result = measure.judged(case)
    assert result["status"] == "differs" and "gradient of 0.weight" in result["reason"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [(1.0, 0.0), (0.0, 1 / (1 + 0.01)), (float("nan"), float("inf"))],
    ids=["equal", "missing", "not finite"],
)
def test_error_is_relative_to_the_tensor(script: ModuleType, change: float, expected: float) -> None:
    plain = {"w": torch.ones(4)}
    worst, _ = sys.modules["coverage_measure"].largest_error({"w": change * torch.ones(4)}, plain)
    assert worst == pytest.approx(expected)


def test_a_dead_or_late_worker_costs_one_model(script: ModuleType) -> None:
    """The exit code of a process that died, or the limit, becomes the reason; the next model gets a new process."""
    alive = SimpleNamespace(is_alive=lambda: True, join=lambda: None, kill=lambda: None, exitcode=-11)

    def died() -> Any:
        raise EOFError

    lost = SimpleNamespace(send=lambda job: None, poll=lambda limit: True, recv=died, close=lambda: None)
    late = SimpleNamespace(send=lambda job: None, poll=lambda limit: False, close=lambda: None)
    for connection, reason in ((lost, "the process died (exit code -11)"), (late, "no result within 5 s")):
        worker = script.Worker(5.0, 1, True, None)
        worker.process, worker.connection = alive, connection
        result = worker.measure(script.Job("timm", "m", "classification"))
        assert (result["status"], result["reason"]) == ("failed", reason)
        assert worker.process is None


def test_the_docs_show_the_stored_results(script: ModuleType) -> None:
    stored = json.loads((BENCHMARKS / "results" / "coverage.json").read_text("utf-8"))
    page = (ROOT / "docs" / "coverage.md").read_text("utf-8")
    assert script.write_docs(page, stored["parts"]) == page, "run python benchmarks/coverage.py --report-only"


def test_a_wrong_library_is_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--library", "torchvison"])
    assert "unknown library 'torchvison'; known are torchvision, timm, transformers" in capsys.readouterr().err
