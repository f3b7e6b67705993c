"""What a notebook needs besides the code of its topic: opening, look of figures, claims, predictions, answer parts."""

import inspect
import math
import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib
import torch
from cycler import cycler
from IPython import get_ipython
from IPython.display import display

from minillm.study import markup, parts, registry, session
from minillm.study.language import LANGUAGES, WORDS
from minillm.study.paths import ROOT

# Okabe and Ito's colours, told apart with any colour vision. One method has one colour in every notebook.
COLORS = {
    "naive": "#D55E00",
    "tiled": "#0072B2",
    "sdpa": "#009E73",
    "triton": "#CC79A7",
    "accent": "#E69F00",
    "grey": "#767676",
    "light": "#DDE3EA",
}
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "figure.figsize": (7.0, 3.4),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "image.cmap": "viridis",
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def begin(question: str) -> torch.device:
    """Open a notebook: show the question and its links, seed torch with 0, set the look of figures.

    Returns the device to work on: MINILLM_DEVICE if set, else "cuda" where there is one, else "cpu". Without
    OMP_NUM_THREADS torch gets half of the cores, four at most. UnknownQuestion if there is none of this id.
    """
    asked = registry.load_question(question)
    torch.manual_seed(0)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(4, max(1, (os.cpu_count() or 1) // 2)))
    matplotlib.rcParams.update(STYLE)
    if get_ipython() is not None:
        from matplotlib_inline.config import InlineBackend

        InlineBackend.instance().figure_formats = {"retina"}  # twice the pixels at the same size
    answer = [f"answers/{question}.md", f"answers/{question}.zh.md"]
    links = {
        "Answer": [_link(path, label, asked) for path, (label, _) in zip(answer, LANGUAGES, strict=True)],
        "Code": [_link(f"minillm/{module}.py", module, asked) for module in asked.modules],
        "Tests": [_link(f"tests/{asked.area}/test_{asked.path.stem}.py", "what it must do", asked)],
    }
    titles = [markup.to_html(text, asked.area, inline=True) for text in (asked.en, asked.zh)]
    row = "<br>".join(f"{name}: {' · '.join(several)}" for name, several in links.items())
    _show(f"{asked.en}\n{asked.zh}", f"<p><b>{titles[0]}</b><br>{titles[1]}</p><p>{row}</p>")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("MINILLM_DEVICE") or cuda)


def source(function: Callable[..., Any]) -> None:
    """Show the text of a function as it stands in the library, under the name of its file."""
    function = inspect.unwrap(function)
    text = inspect.getsource(function)
    file = Path(inspect.getsourcefile(function) or "")
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    display({"text/plain": f"# {name}\n{text}", "text/markdown": f"`{name}`\n````python\n{text}````\n"}, raw=True)


def claim(statement: str, holds: object) -> None:
    """Print the statement if it holds, else stop the notebook with AssertionError."""
    if not isinstance(statement, str) or isinstance(holds, str):
        raise TypeError("claim takes the statement first, then whether it holds: claim('2 < 3', 2 < 3)")
    if not holds:
        raise AssertionError(statement)
    print(f"✓ {statement}")


class Prediction:
    """A number to commit to before it is shown. `compare` is what the button does."""

    def __init__(self, prompt: str, answer: float, unit: str) -> None:
        self.prompt, self.answer, self.unit = prompt, answer, unit
        self.words = WORDS[session.language()]
        self.guess = widgets.Text(placeholder=self.words["guess"], layout={"width": "12em"})
        self.result = widgets.HTML()
        button = parts.button(self.compare, description=self.words["compare"])
        asked = widgets.HTMLMath(f"<b>{escape(prompt)}</b>")
        self.widget = parts.app(asked, parts.row(self.guess, widgets.HTML(escape(unit)), button), self.result)

    def compare(self) -> None:
        """Show the value and how far off the guess is; a guess that is no number is asked for again."""
        try:
            guess = float(self.guess.value.replace(",", "").replace("_", "").replace(" ", ""))
        except ValueError:
            guess = math.nan
        if not math.isfinite(guess):
            parts.status(self.result, "error", self.words["number"])
            return
        text = f"{_number(self.answer)} {self.unit}".strip()
        if self.answer:
            text += self.words["ratio"].format(ratio=_number(guess / self.answer))
        parts.status(self.result, "good", text)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        value = f"{_number(self.answer)} {self.unit}".strip()
        html = f"<p><b>{escape(self.prompt)}</b></p><details><summary>Answer</summary>{escape(value)}</details>"
        return parts.bundle(self.widget, f"{self.prompt}\n{value}", html)


def predict(prompt: str, answer: float, unit: str = "") -> Prediction:
    """A box for the learner's guess that then shows the answer, to end a cell with; saved with the answer folded."""
    return Prediction(prompt, answer, unit)


def followups(question: str) -> None:
    """Show what an interviewer asks next, from the answer file, each answer folded; then in Chinese, folded."""
    asked = registry.load_question(question)
    pairs = {code: [(f.question, f.answer) for f in asked.answers[code].follow_ups] for _, code in LANGUAGES}
    _folded(pairs, asked.area)


def wrong_answers(question: str) -> None:
    """Show the common wrong answers from the answer file, the reasons folded; then in Chinese, folded."""
    asked = registry.load_question(question)
    pairs = {code: [_statement(item) for item in asked.answers[code].wrong_answers] for _, code in LANGUAGES}
    _folded(pairs, asked.area)


def _statement(item: str) -> tuple[str, str]:
    """A wrong answer `**"statement"** why` as its two parts."""
    statement, _, why = item.removeprefix("**").partition("**")
    return statement, why.strip()


def _folded(pairs: dict[str, list[tuple[str, str]]], area: str) -> None:
    html = {
        code: "".join(
            f"<details><summary><b>{markup.to_html(head, area, inline=True)}</b></summary>"
            f"<blockquote>{markup.to_html(body, area)}</blockquote></details>"
            for head, body in several
        )
        for code, several in pairs.items()
    }
    plain = "\n".join(f"- {head}" for head, _ in pairs["en"])
    _show(plain, f"{html['en']}<details><summary>中文</summary>{html['zh']}</details>")


def _link(path: str, label: str, question: registry.Question) -> str:
    return markup.anchor(path, escape(label), area=question.area)


def _show(plain: str, html: str) -> None:
    display({"text/plain": plain, "text/html": html}, raw=True)


def _number(value: float) -> str:
    """Four digits, with separators of thousands: 1,234; 0.01234; 2.1e+12."""
    whole = float(value).is_integer() and abs(value) < 1e12
    return f"{int(value):,}" if whole else f"{value:,.4g}"
