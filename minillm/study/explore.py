"""Interactive figures: controls over a pure function that draws, with the first picture saved in the notebook.

    def draw(block=64, causal=True):
        figure = Figure(figsize=(7, 3), layout="constrained")
        ...
        return figure, f"{n} blocks of {block} keys"

    Explore(draw, block=(16, 256, 16), causal=True)

There is one picture, replaced when it is complete, so nothing flickers. While a picture is drawn the browser holds
back what a slider sends but its newest value, and changes made here meanwhile end in one more drawing.
"""

import inspect
from base64 import b64encode
from collections.abc import Callable, Mapping
from html import escape
from io import BytesIO
from time import perf_counter
from typing import Any

import ipywidgets as widgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from minillm.study import parts

DPI = 100  # CSS pixels in an inch of figure
SHARP = 2  # picture pixels in a CSS pixel
SLOW = 0.3  # seconds: above, a slider draws when it is let go; below, a drag was at most two pictures behind
COLOURS = 128

Draw = Callable[..., Figure | tuple[Figure, str]]


class Explore:
    """`draw(**values)` returns a bare Figure, or a Figure and a caption; each control gives one value.

    A control is `(low, high)` or `(low, high, step)` (a slider, of whole numbers if all are), a list of choices, a
    bool, or an ipywidget. It starts at `draw`'s default for that name, else at the low end or the first choice.
    `labels` names controls for the reader; else it is the ipywidget's description or the parameter's name.
    The first drawing is strict: its error is the cell's error. Later errors are shown under the last good picture,
    and kept in `error`.
    """

    def __init__(self, draw: Draw, /, *, labels: Mapping[str, str] | None = None, **controls: Any) -> None:
        self.draw = draw
        self.caption, self.error, self.drawings = "", "", 0
        self._drawing = self._stale = False
        defaults = {name: p.default for name, p in inspect.signature(draw).parameters.items()}
        self.controls = {name: _control(name, kind, defaults.get(name)) for name, kind in controls.items()}
        unknown = set(labels or {}) - set(controls)
        if unknown:
            raise ValueError(f"labels must name controls ({', '.join(controls)}), got {', '.join(sorted(unknown))}")
        texts = {name: each.description or name.replace("_", " ") for name, each in self.controls.items()}
        texts |= labels or {}
        width = f"{max(map(_width, texts.values()), default=0) * 0.55 + 1:.1f}em"
        for name, control in self.controls.items():
            control.description, control.style.description_width = texts[name], width
            control.layout.width = "min(100%, 34em)"
        self._image = widgets.Image(format="png")
        self._caption, self._error = widgets.HTML(), widgets.HTML()
        seconds = self._timed()
        if seconds > SLOW:
            seconds = self._timed()  # the first figure of a kernel also loads fonts
        for control in self.controls.values():
            if seconds > SLOW and hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(lambda _: self.redraw(), "value")
        picture = [self._image, self._caption, self._error]
        self.widget = parts.app(*self.controls.values(), *picture).add_class("minillm-explore")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls show, by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def png(self) -> bytes:
        """The picture, as a PNG file."""
        return bytes(self._image.value)

    def set(self, **values: Any) -> None:
        """Move several controls and draw once. KeyError for a name that is no control."""
        targets = [(self.controls[name], value) for name, value in values.items()]
        self._drawing = True  # the changes only mark the picture as stale
        try:
            for control, value in targets:
                control.value = value
        finally:
            self._drawing = False
        if self._stale:
            self.redraw()

    def redraw(self) -> None:
        """Draw what the controls show. Called while a drawing runs, it makes that drawing be followed by one more."""
        self._stale = True
        if self._drawing:
            return
        self._drawing = True
        try:
            while self._stale:
                self._stale = False
                try:
                    self._paint()
                    self.error = ""
                except Exception as error:
                    self.error = f"{type(error).__name__}: {error}".splitlines()[0]
                parts.status(self._error, "error", self.error)
        finally:
            self._drawing = False

    def _timed(self) -> float:
        start = perf_counter()
        self._paint()
        return perf_counter() - start

    def _paint(self) -> None:
        self.drawings += 1
        drawn = self.draw(**self.values)
        figure, caption = drawn if isinstance(drawn, tuple) else (drawn, "")
        if not isinstance(figure, Figure):
            raise TypeError(f"draw must return a matplotlib Figure, got {type(figure).__name__}")
        png, width = _png(figure)
        self.figure, self.caption = figure, caption
        self._image.value, self._image.layout.width = png, f"{width}px"
        self._caption.value = f'<div class="minillm-caption">{escape(caption)}</div>'

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in self.values.items()}
        shown = ", ".join(f"{name} = {value}" for name, value in values.items())
        data = parts.bundle(self.widget, f"{self.caption}\n{shown}".strip(), "")
        del data["text/html"]
        size = {"width": int(self._image.layout.width.removesuffix("px"))}
        return data | {"image/png": b64encode(self.png).decode()}, {"image/png": size}


def _control(name: str, kind: Any, default: Any) -> Any:
    start = {} if default in (None, inspect.Parameter.empty) else {"value": default}
    if isinstance(kind, widgets.ValueWidget):
        return kind
    if isinstance(kind, bool):
        return widgets.Checkbox(**({"value": kind} | start), indent=True)
    if isinstance(kind, list) and kind:
        if all(isinstance(choice, str) for choice in kind):
            return widgets.Dropdown(options=kind, **start)
        return widgets.SelectionSlider(options=kind, **start)
    if isinstance(kind, tuple) and len(kind) in (2, 3) and all(isinstance(number, int | float) for number in kind):
        whole = all(isinstance(number, int) for number in kind)
        low, high, *rest = kind
        step = rest[0] if rest else 1 if whole else (high - low) / 100
        slider = widgets.IntSlider if whole else widgets.FloatSlider
        return slider(**({"value": low} | start), min=low, max=high, step=step)
    raise ValueError(f"control {name} must be (low, high, step), a list, a bool or an ipywidget, got {kind!r}")


def _width(text: str) -> int:
    return sum(2 if ord(letter) > 0x2E80 else 1 for letter in text)


def _png(figure: Figure) -> tuple[bytes, int]:
    """The figure as a PNG of few colours, and its width in CSS pixels."""
    figure.set_dpi(DPI * SHARP)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    file = BytesIO()
    few = picture.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=False)
    return file.getvalue(), picture.width // SHARP
