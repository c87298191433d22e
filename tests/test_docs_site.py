"""The site builds without a warning, its pages are all there, and what they say of the code is in the code."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bpfx

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def navigation(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from navigation(value) if isinstance(value, list) else [str(value)]


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    from mkdocs.config import load_config

    listed = set(navigation(load_config(str(ROOT / "mkdocs.yml")).nav))
    assert listed == {page.name for page in DOCS.glob("*.md")} | {"changelog.md"}
    for name in listed:
        html = (site / name).with_suffix(".html").read_text("utf-8")
        assert len(html) > 5000
        assert "```" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL), f"{name}: a fence was not read"
        assert ":class:" not in html and ":func:" not in html, f"{name}: a role was not read"


@pytest.mark.parametrize(
    ("markdown", "folder", "expected"),
    [
        ("[offset](offset.md#α)", "docs", "[offset](offset.md#α)"),
        ("[losses](docs/losses.md)", ".", "[losses](losses.md)"),
        ("[a.py](../examples/a.py)", "docs", "[a.py](https://host/us/bpfx/blob/main/examples/a.py)"),
        ("[site](https://host/x)", "docs", "[site](https://host/x)"),
    ],
)
def test_links_that_leave_the_docs_lead_to_the_repository(markdown: str, folder: str, expected: str) -> None:
    hooks = runpy.run_path(str(DOCS / "_hooks.py"))

    def replaced(address: str) -> str:
        return hooks["_LINK"].sub(lambda found: hooks["link"](found, folder, address), markdown)

    assert replaced("https://host/us/bpfx/") == expected
    assert replaced("") == (expected if "/examples/" not in expected else "a.py"), "text, while there is no address"


def test_nothing_is_fetched_by_a_reader(site: Path) -> None:
    for page in site.glob("*.html"):
        for source in re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\s\">]+)", page.read_text("utf-8")
        ):
            raise AssertionError(f"{page.name} loads {source}")


def test_the_reference_has_every_public_name(site: Path) -> None:
    html = (site / "api.html").read_text("utf-8")
    backend = ["backend.bpfx", "backend.steps", "checkpoint.save", "checkpoint.load", "draw.write"]
    helpers = ["huggingface.Trainer", "accelerate.plain_checkpoints", "lightning.PlainCheckpoints"]
    names = [*bpfx.__all__, *backend, *(f"integrations.{name}" for name in helpers)]
    for module in (bpfx.losses, bpfx.logs, bpfx.theory):
        members = {name: getattr(module, name) for name in module.__all__}
        described = [name for name, value in members.items() if inspect.isclass(value) or inspect.isroutine(value)]
        names += [f"{module.__name__.removeprefix('bpfx.')}.{name}" for name in described]
    # Functions that a module of the same name hides from the reader of the source.
    hidden = {"convert": "convert.convert", "plan": "convert.plan", "audit": "audit.audit"}
    headed = set(re.findall(r'<h\d id="bpfx\.([\w.]+)"', html))
    assert not [name for name in names if hidden.get(name, name) not in headed]


# --- troubleshooting -------------------------------------------------------------------------------------------------

HOLE = "…"
RAISED = ("BpfxError", "LivenessError", "warn")
# The command line and what only it uses: their errors name the option or the file, and the page says so.
ELSEWHERE = ("bpfx/compare/", "bpfx/data/", "bpfx/_config.py", "bpfx/cli.py", "bpfx/theory.py")


def flat(node: ast.AST) -> str:
    """The text of a string expression, with a hole for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(map(flat, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return flat(node.left) + flat(node.right)
    return HOLE


def texts() -> tuple[set[str], dict[str, str], set[str]]:
    """All strings of the source; every message that is raised or warned, by its place; the places that warn."""
    strings: set[str] = set()
    messages: dict[str, str] = {}
    warned: set[str] = set()
    for folder in ("bpfx", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                    strings.add(flat(node))
                if isinstance(node, ast.Call) and node.args:
                    called, at = ast.unparse(node.func).split(".")[-1], f"{name}:{node.lineno}"
                    if called in RAISED:
                        messages[at] = flat(node.args[0])
                    if called == "warn":
                        warned.add(at)
    return strings, messages, warned


def fragments() -> list[str]:
    """First cells of the tables that are headed by "message"."""
    found, reading = [], False
    for line in (DOCS / "troubleshooting.md").read_text("utf-8").splitlines():
        reading = line.startswith("| message") or (reading and line.startswith("|"))
        if reading and (cell := re.match(r"\| `([^`]+)` \|", line)):
            found.append(cell[1])
    return found


def pattern(fragment: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, fragment.split(HOLE))))


def test_messages_of_the_troubleshooting_page_are_in_the_source() -> None:
    quoted, (strings, _, _) = fragments(), texts()
    assert len(quoted) > 150 and len(quoted) == len(set(quoted))
    assert not [fragment for fragment in quoted if not any(map(pattern(fragment).search, strings))]


def test_the_troubleshooting_page_has_every_warning_and_nearly_every_error() -> None:
    patterns, (_, messages, warned) = [pattern(fragment) for fragment in fragments()], texts()
    words = {at: text.replace(HOLE, "") for at, text in messages.items() if not at.startswith(ELSEWHERE)}
    known = [at for at in words if len(words[at]) > 12]  # some only pass on what another says
    missing = [at for at in known if not any(p.search(messages[at]) for p in patterns)]
    assert not [at for at in missing if at in warned], missing
    assert len(missing) <= 0.05 * len(known), missing


def test_the_check_of_messages_can_fail() -> None:
    assert not pattern("no such … message").search("no such thing")
    assert pattern("no such … message").search("there is no such … message; pass one")


# --- pictures --------------------------------------------------------------------------------------------------------


def test_the_picture_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "_draw_concepts.py"))["draw"]()
    assert drawn == (DOCS / "concepts.svg").read_text("utf-8")
