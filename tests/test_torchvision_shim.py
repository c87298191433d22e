"""`import bpfx` keeps torchvision, and what imports it, alive; in fresh processes, where nothing is imported yet."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torchvision")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_bpfx_first_lets_the_libraries_be_imported() -> None:
    assert run("import bpfx, peft, transformers, timm, torchvision; print('all')") == "all"


def test_torchvision_models_work_in_a_child_process_that_imports_bpfx() -> None:
    code = """
        import subprocess, sys
        import bpfx
        child = "import bpfx, torch, torchvision as tv; print(tv.models.resnet18()(torch.zeros(2, 3, 32, 32)).shape[1])"
        subprocess.run([sys.executable, "-c", child], check=True)
    """
    assert run(code) == "1000"


def test_ensure_is_idempotent_and_imports_no_torchvision() -> None:
    code = """
        import sys
        from bpfx import _torchvision
        print("torchvision" in sys.modules)
        print(_torchvision.ensure() == _torchvision.ensure(), len(_torchvision._declared) <= 1)
        import torchvision
        print(_torchvision.ensure() in (True, False))
    """
    assert run(code) == "False\nTrue True\nTrue"


def test_schemas_are_declared_when_the_library_does_not_load() -> None:
    code = """
        import torch
        def broken(path):
            raise OSError("undefined symbol")
        torch.ops.load_library = broken
        import bpfx
        from bpfx import _torchvision
        print(_torchvision.ensure(), torch.ops.torchvision.nms.default._schema, torch.ops.torchvision.qnms is not None)
        import torchvision
    """
    out = run(code)
    assert out.startswith("True torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    assert out.endswith("True")


def test_nothing_is_declared_when_the_library_loads() -> None:
    code = """
        import torch
        library = torch.library.Library("torchvision", "DEF")
        def working(path):
            for name in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.ops.load_library = working
        import bpfx
        from bpfx import _torchvision
        print(_torchvision.ensure(), _torchvision._declared)
    """
    assert run(code) == "False []"


def test_absent_torchvision_is_left_alone() -> None:
    code = """
        import sys
        sys.modules["torchvision"] = None
        import torch, bpfx
        from bpfx import _torchvision
        print(_torchvision.ensure(), hasattr(torch.ops.torchvision, "nms"))
    """
    assert run(code) == "False False"
