"""What the app's widgets are made of: the style sheet, buttons, lines of status, and what is saved in the notebook."""

from collections.abc import Callable
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

RUN = {"en": "Run this cell (Shift+Enter)", "zh": "运行这个单元格（Shift+Enter）"}


@cache
def theme() -> str:
    """The style sheet of the app's widgets, as a `<style>` element."""
    return f"<style>{Path(__file__).with_name('theme.css').read_text(encoding='utf-8')}</style>"


def app(*children: widgets.Widget) -> widgets.VBox:
    """The children in one column, in the app's style."""
    return widgets.VBox([widgets.HTML(theme()), *children]).add_class("minillm-app")


def row(*children: widgets.Widget) -> widgets.HBox:
    """The children beside each other; a narrow page breaks the line."""
    return widgets.HBox(children).add_class("minillm-row")


def button(on_click: Callable[[], None], **more: Any) -> widgets.Button:
    """A button as wide as its text."""
    made = widgets.Button(layout={"width": "auto"}, **more)
    made.on_click(lambda _: on_click())
    return made


def status(line: widgets.HTML, kind: str, text: str) -> None:
    """Show one line of text, or nothing; kind is "error", "good" or "quiet"."""
    line.value = f'<div class="minillm-{kind}" role="status">{escape(text)}</div>' if text else ""


def bundle(widget: widgets.DOMWidget, plain: str, html: str) -> dict[str, Any]:
    """The output of a cell: the live widget, and beside it what pages without a kernel show instead."""
    view = {"application/vnd.jupyter.widget-view+json": widget.get_view_spec()}
    return {"text/plain": plain, "text/html": html} | view
