"""What the site needs beside the Markdown, which is written to be read in a repository as well."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
CHANGELOG = "changelog.md"
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>(?![a-z]+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_MARKED = re.compile(r"^(```\w+) (?:run|output)$", re.MULTILINE)
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The changelog stands at the top of the repository, where people look for it."""
    files.append(File.generated(config, CHANGELOG, abs_src_path=str(ROOT / "CHANGELOG.md")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/, and the marks of code that the tests run."""
    name = page.file.src_uri
    folder = "." if name == CHANGELOG else posixpath.join("docs", posixpath.dirname(name))
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: link(found, folder, config.repo_url or ""), text) for text in parts[::2]]
    return _MARKED.sub(r"\1", "".join(parts))


def link(found: re.Match[str], folder: str, address: str) -> str:
    """A link, unchanged within docs/; out of there one to the repository, or text for as long as that has no address.

    Args:
        found: with the groups ``text``, ``path`` and ``anchor``.
        folder: of the page, from the top of the repository.
        address: of the repository, or empty.
    """
    text, anchor = found["text"], found["anchor"] or ""
    path = posixpath.normpath(posixpath.join(folder, found["path"]))
    inside = posixpath.relpath(path, "docs")
    if not inside.startswith(".."):
        return f"[{text}]({posixpath.relpath(path, folder if folder != '.' else 'docs')}{anchor})"
    if address:
        return f"[{text}]({address.rstrip('/')}/blob/main/{path}{anchor})"
    return text if path.endswith(text.strip("`")) else f"{text} (`{path}`)"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Roles of docstrings (``:class:`` and the like) as code, with a link where the page of the API has the name."""
    return _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)


class Examples(griffe.Extension):
    """Docstrings here head their examples with "Example:", which griffe takes for a box of plain text."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", obj.docstring.value)
