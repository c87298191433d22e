"""The documentation is true where it can be checked: its code runs and prints what it shows, its links lead somewhere.

A fence marked ``python run`` is executed, each in a namespace of its own; a fence marked ``text output`` right after it
holds what it prints. ``python tests/test_docs.py`` writes what the code prints now into the pages: read the diff.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

import bpfx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")


@dataclasses.dataclass
class Example:
    """One runnable block: where it stands, its code, and what it should print (None: anything)."""

    page: str
    line: int
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def examples(text: str, page: str) -> list[Example]:
    found: list[Example] = []
    end = -1
    for fence in _FENCE.finditer(text):
        info, body = fence["info"].strip(), fence["body"]
        if info == "python run":
            found.append(Example(page, text.count("\n", 0, fence.start()) + 2, body, None))
            end = fence.end()
        elif info == "text output":
            assert end >= 0 and not text[end : fence.start()].strip(), f"{page}: an output block without its code"
            found[-1].output = body
    return found


def run(example: Example) -> str:
    """Run the code as a module of its own and return what it prints; errors point at the line in the page."""
    code = compile("\n" * (example.line - 1) + example.code, example.page, "exec")
    printed = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error", bpfx.BpfxWarning)
        exec(code, {"__name__": "example"})
    return printed.getvalue()


def check(example: Example) -> None:
    printed = run(example)
    if example.output is not None:
        assert _lines(printed) == _lines(example.output)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


EXAMPLES = [example for page in PAGES for example in examples(page.read_text("utf-8"), str(page.relative_to(ROOT)))]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_code_runs_and_prints_what_the_page_shows(example: Example) -> None:
    check(example)


def test_pages_with_code_have_runnable_blocks() -> None:
    """Without this a changed fence would switch the tests above off unnoticed."""
    pages = {example.page for example in EXAMPLES}
    names = ["how-it-works", "offset", "choosing", "logging", "capture", "checkpoints", "trainer", "memory"]
    names += ["index", "concepts", "torch-compile", "precision"]
    own = ("README.md", *(f"docs/{name}.md" for name in names))
    assert pages >= set(own)
    assert sum(example.output is not None for example in EXAMPLES) >= 6


@pytest.mark.parametrize(
    ("code", "output", "error"),
    [
        ("raise KeyError('k')\n", None, KeyError),
        ("print(1 + 1)\n", "3\n", AssertionError),
        ("pass\n", "2\n", AssertionError),
        ("print(EXAMPLES)\n", None, NameError),
    ],
    ids=["error", "other output", "no output", "names of this file"],
)
def test_a_wrong_example_fails(code: str, output: str | None, error: type[Exception]) -> None:
    page = f"# Page\n\n```python run\n{code}```\n" + (f"\n```text output\n{output}```\n" if output else "")
    (example,) = examples(page, "page.md")
    assert example.line == 4
    with pytest.raises(error):
        check(example)


def test_an_output_block_belongs_to_the_code_before_it() -> None:
    with pytest.raises(AssertionError, match="without its code"):
        examples("```python run\nprint(1)\n```\n\nText between.\n\n```text output\n1\n```\n", "page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_every_pass_is_explained() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text("utf-8")
    passes = {path.name for path in (ROOT / "passes").glob("*.py")} - {"__init__.py"}
    assert passes, "the passes have moved"
    assert not {name for name in passes if f"`{name}`" not in text}


def update() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        for example in examples(text, page.name):
            if example.output is not None:
                now = "\n".join(_lines(run(example))) + "\n"
                text = text.replace(f"```text output\n{example.output}```", f"```text output\n{now}```")
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    update()
