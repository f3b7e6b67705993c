"""Markdown of the answer files as HTML for notebooks: formulas kept for MathJax, links made right for the reader."""

import json
import os
import posixpath
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

OPEN = "rendermime:handle-local-link"
EXTERNAL = ("http://", "https://", "mailto:")


def _dollar(state: StateInline, silent: bool) -> bool:
    """Inline rule: `$...$` and `$$...$$` become one token, so that no other rule touches the formula."""
    text, start = state.src, state.pos
    if text[start] != "$":
        return False
    mark = "$$" if text.startswith("$$", start) else "$"
    inside = start + len(mark)
    end = text.find(mark, inside)
    while end > 0 and text[end - 1] == "\\":
        end = text.find(mark, end + 1)
    body = text[inside:end] if end > 0 else ""
    after = text[end + 1 : end + 2] if end > 0 else ""
    spaced = mark == "$" and (body != body.strip() or after.isdigit())  # "$5 and $6" holds no formula
    if not body.strip() or "`" in body or spaced:
        return False
    if not silent:
        state.push("math", "", 0).content = f"{mark}{body}{mark}"
    state.pos = end + len(mark)
    return True


def href(target: str, area: str = "") -> str:
    """The link from a notebook of `area` (the start page: "") to a path of the checkout, as a relative URL."""
    return posixpath.relpath(target, posixpath.join("notebooks", area))


def anchor(target: str, label: str, *, area: str = "", live: bool = False) -> str:
    """An HTML link to a path of the checkout; `label` is HTML. See `to_html` for `live`."""
    return f"{_open(href(target, area), live)}{label}</a>"


def _open(url: str, live: bool) -> str:
    """The opening tag of a link. JupyterLab resolves relative links in outputs but not in widgets: there (`live`)
    the link names the command that opens the file in a tab, with the file's path on the server of this kernel."""
    attributes = {"href": url}
    if url.startswith(EXTERNAL):
        attributes |= {"target": "_blank", "rel": "noopener"}
    elif live and not url.startswith("#"):
        path, _, fragment = url.partition("#")
        served = _on_server(path)
        if served:
            arguments = json.dumps({"path": served, "id": f"#{fragment}" if fragment else ""})
            attributes |= {"data-commandlinker-command": OPEN, "data-commandlinker-args": arguments}
    return "<a " + " ".join(f'{name}="{escape(value)}"' for name, value in attributes.items()) + ">"


def _on_server(path: str) -> str | None:
    """The path under the Jupyter server's root of a file given relative to the kernel's folder, None if unknown."""
    from jupyter_core.paths import jupyter_runtime_dir

    records = sorted(Path(jupyter_runtime_dir()).glob("jpserver-*.json"), key=lambda record: record.stat().st_mtime)
    parent = f"jpserver-{os.environ.get('JPY_PARENT_PID')}.json"  # on Windows this is no process id: the newest then
    for record in sorted(records, key=lambda record: record.name == parent)[::-1]:
        with suppress(OSError, ValueError, KeyError):
            root = Path(json.loads(record.read_text(encoding="utf-8"))["root_dir"]).resolve()
            return (Path.cwd() / path).resolve().relative_to(root).as_posix()
    return None


def to_html(markdown: str, area: str, *, live: bool = False, inline: bool = False) -> str:
    """HTML of answer-file Markdown, links rewritten for a notebook of the same area; raw HTML is shown as text.

    `inline` leaves out the paragraph around one line. `live` is for widgets, whose links JupyterLab leaves alone.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.inline.ruler.before("escape", "math", _dollar)

    def math(_: object, tokens: Sequence[Token], index: int, *__: Any) -> str:
        return escape(tokens[index].content)

    def text(_: object, tokens: Sequence[Token], index: int, *__: Any) -> str:
        return escape(tokens[index].content).replace("$", "<span>$</span>")  # alone, it opens no formula

    def line_break(_: object, tokens: Sequence[Token], index: int, *__: Any) -> str:
        before, after = tokens[index - 1].content[-1:], tokens[index + 1].content[:1]
        return "" if _is_wide(before) and _is_wide(after) else "\n"  # Chinese has no space between words

    def link(_: object, tokens: Sequence[Token], index: int, *__: Any) -> str:
        url = str(tokens[index].attrs.get("href", ""))
        if not url.startswith((*EXTERNAL, "#")):
            url = href(posixpath.normpath(posixpath.join("answers", area, url)), area)
        return _open(url, live)

    for name, rule in (("math", math), ("text", text), ("softbreak", line_break), ("link_open", link)):
        parser.add_render_rule(name, rule)
    return parser.renderInline(markdown) if inline else parser.render(markdown)


def _is_wide(letter: str) -> bool:
    return bool(letter) and east_asian_width(letter) in "WF"
