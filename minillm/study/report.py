"""The verdict on an attempt and how it is shown: as text, as a small table, and in JupyterLab with buttons."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

COLUMNS = ("", "case", "expected", "got", "largest error")
PASSED, FAILED, QUIET = "--jp-success-color1, #388e3c", "--jp-error-color1, #d32f2f", "--jp-ui-font-color2, #757575"


@dataclass(frozen=True)
class CaseReport:
    """One case: what was asked, expected and got (shapes and dtypes), the largest error and where it is."""

    name: str
    asked: str
    expected: str
    got: str
    error: float | None
    where: str
    ok: bool


@dataclass(frozen=True)
class Verdict:
    """What an attempt is worth. `wrong` names the wrong version or the probe that the diagnosis comes from."""

    status: str  # todo | passed | failed | error | invalid
    diagnosis: str | None = None
    wrong: str | None = None
    cases: tuple[CaseReport, ...] = ()
    printed: str = ""


@dataclass(frozen=True)
class Result:
    """A verdict that shows itself; `str(result)` is the text. `notes` say what went wrong on our side."""

    question: str
    signature: str
    verdict: Verdict
    hints: int = 0
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """One line: the question and the verdict."""
        right, all_cases = sum(case.ok for case in self.verdict.cases), len(self.verdict.cases)
        words = {
            "todo": "not attempted yet",
            "passed": f"passed, {right} of {all_cases} cases right",
            "failed": f"not right yet, {right} of {all_cases} cases right",
            "error": "does not run to its end",
            "invalid": "this does not count",
        }
        return f"{self.question}: {words[self.verdict.status]}"

    @property
    def advice(self) -> str:
        """What to do about it: the diagnosis, or how to begin."""
        if self.verdict.status == "todo":
            return f"Write {self.signature} in the exercise cell, run it, and run this cell again."
        return self.verdict.diagnosis or ""

    def __str__(self) -> str:
        lines = [self.headline, *filter(None, [self.advice])]
        for case in self.verdict.cases:
            lines.append(f"  {'right' if case.ok else 'WRONG'}  {_title(case)}")
            if not case.ok:
                lines += [f"         expected  {case.expected}", f"         got       {case.got}"]
            if case.error is not None:
                lines.append(f"         largest error {case.error:.2g}{f' at {case.where}' if case.where else ''}")
        if self.verdict.printed:
            lines += ["  Your function printed:", *(f"    {line}" for line in self.verdict.printed.splitlines())]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__

    @property
    def html(self) -> str:
        """The same as a table; readable in the light and the dark theme, and without any style sheet."""
        color = {"passed": PASSED, "todo": QUIET}.get(self.verdict.status, FAILED)
        sign = {"passed": "✓", "todo": "○"}.get(self.verdict.status, "✗")
        parts = [f'<div style="color: var({color})"><b>{sign} {escape(self.headline)}</b></div>']
        parts += [f"<div>{escape(line)}</div>" for line in (self.advice, *self.notes) if line]
        if self.verdict.cases:
            parts.append(_table(self.verdict.cases))
        if self.verdict.printed:
            parts.append(f"<div>Your function printed:</div><pre>{escape(self.verdict.printed)}</pre>")
        return f'<div style="color: var(--jp-content-font-color1)">{"".join(parts)}</div>'

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        if not _in_notebook():
            return {"text/plain": str(self), "text/html": self.html}
        from minillm.study.editor import panel  # needs anywidget: not for the command line

        return panel(self.question, str(self), self.html, self.hints)


@dataclass(frozen=True)
class Hint:
    """One hint, shown as text."""

    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def _title(case: CaseReport) -> str:
    return f"{case.name}: {case.asked}" if case.asked else case.name


def _table(cases: Iterable[CaseReport]) -> str:
    head = "".join(f'<th style="text-align: left">{name}</th>' for name in COLUMNS)
    rows = "".join(_row(case) for case in cases)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(case: CaseReport) -> str:
    error = "" if case.error is None else f"{case.error:.2g}"
    at = f"{error} at {case.where}" if case.where else error
    color, word = (PASSED, "✓&nbsp;right") if case.ok else (FAILED, "✗&nbsp;wrong")
    mark = f'<b style="color: var({color}); white-space: nowrap">{word}</b>'
    asked = f'<br><span style="color: var({QUIET})">{escape(case.asked)}</span>' if case.asked else ""
    name = f'<span style="white-space: nowrap">{escape(case.name)}</span>{asked}'
    cells = (mark, name, escape(case.expected), escape(case.got), escape(at))
    return "<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in cells) + "</tr>"


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
