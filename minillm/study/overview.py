"""The start page: what is due, progress by area, and the map of questions with a search box."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from minillm.study import markup, parts, registry, schedule, session
from minillm.study.language import LANGUAGES, WORDS, area_name, date, in_days
from minillm.study.registry import AnswerError, Question
from minillm.study.store import Event, StoreError


def overview() -> "Overview":
    """The start page, to end a cell with; AnswerError if an answer file is malformed."""
    return Overview()


def snapshot(notebook: Path) -> bool:
    """Save what is due now as the output of the cell `overview()`, so that the page says it before it is run.

    Returns whether the file has such a cell. For the learner's copy only: what is committed knows no learner.
    """
    page = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in page["cells"] if "overview()" in "".join(cell["source"]) and cell["cell_type"] == "code"]
    for cell in cells:
        shown = Overview()
        data = {"text/plain": [line + "\n" for line in shown.plain().splitlines()], "text/html": [shown.static()]}
        cell["outputs"] = [{"data": data, "metadata": {}, "output_type": "display_data"}]
        new = notebook.with_suffix(".new")
        new.write_text(json.dumps(page, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
        os.replace(new, notebook)
    return bool(cells)


class Overview:
    """`refresh` reads the learner's data again; `search.value` filters the map."""

    def __init__(self) -> None:
        self.questions = registry.load_questions()
        self.events: list[Event] = []
        self.due, self.progress, self.map, self.found, self.error = (widgets.HTML() for _ in range(5))
        self.switch = widgets.ToggleButtons(options=LANGUAGES, value=session.language()).add_class("minillm-switch")
        self.search = widgets.Text(layout={"width": "auto"}).add_class("minillm-search")
        self.again = parts.button(self.refresh, icon="refresh")
        head = widgets.HBox([self.due, parts.row(self.again, self.switch)]).add_class("minillm-head")
        self.widget = parts.app(head, self.error, self.progress, self.search, self.found, self.map)
        self.refresh()
        self.switch.observe(lambda _: self.choose(), "value")
        self.search.observe(lambda _: self.show_map(), "value")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        areas: dict[str, str] = {}
        for question in self.questions.values():
            facts = f"{question.level}, {question.minutes} min"
            item = f"<li>{_link(question, 'en')} ({facts})<br>{_link(question, 'zh')}</li>"
            areas[question.area] = areas.get(question.area, "") + item
        lists = "".join(f"<p><b>{area}</b></p><ul>{items}</ul>" for area, items in areas.items())
        note = f"{parts.RUN['en']} to see what is due. {parts.RUN['zh']}，查看该复习的题目。"
        return parts.bundle(self.widget, self.plain(), f"<p>{note}</p>{lists}")

    def plain(self) -> str:
        """The questions, one a line."""
        return "\n".join(f"{question.id}  {question.en}" for question in self.questions.values())

    def static(self) -> str:
        """The page as it is now, as HTML without controls."""
        words = WORDS[self.switch.value]
        html = f"{self.due.value}{self.progress.value}{self.map.value}<p>{words['as_of'].format(date=_now())}</p>"
        return html.replace("<td>", '<td style="text-align: left">').replace("<th>", '<th style="text-align: left">')

    def refresh(self) -> None:
        """Read the learner's data and the clock again."""
        try:
            self.events = session.log().events()
        except StoreError as error:
            parts.status(self.error, "error", str(error))
        else:
            parts.status(self.error, "quiet", session.log().notice or "")  # what the store repaired, if it had to
        self.show()

    def choose(self) -> None:
        try:
            session.choose(self.switch.value)
        except StoreError as error:
            parts.status(self.error, "error", str(error))
        self.show()

    def show(self) -> None:
        """Bring every text up to date."""
        words = WORDS[self.switch.value]
        self.again.description, self.search.placeholder = words["refresh"], words["search"]
        self.show_due()
        self.show_progress()
        self.show_map()

    def show_due(self) -> None:
        words, language, now = WORDS[self.switch.value], self.switch.value, datetime.now(UTC)
        rated = {event.question for event in self.events if event.kind == "rating"} & set(self.questions)
        times = {id: schedule.due_at(self.events, id) or now for id in rated}
        due = [id for id in schedule.due(self.events, now) if id in rated]
        new = [id for id, question in self.questions.items() if id not in rated and question.level == "core"]
        lines = [f"{self.link(id)} {_quiet(words['since'].format(date=date(times[id])))}" for id in due]
        if not rated and self.questions:
            lines = [words["first"].format(link=self.link(next(iter(self.questions))))]
        elif not due and rated:
            first = min(rated, key=lambda id: times[id])
            when = {"date": date(times[first]), "in_days": in_days(times[first], now, language)}
            lines = [words["none_due"], words["next_review"].format(link=self.link(first), **when)]
        if rated and new:
            lines.append(words["next_new"].format(link=self.link(new[0])))
        items = "".join(f"<p>{line}</p>" for line in lines)
        self.due.value = f'<div class="minillm-title"><b>{words["due"]}</b></div>{items}'

    def show_progress(self) -> None:
        language, now = self.switch.value, datetime.now(UTC)
        rows = []
        for area, counts in schedule.progress(self.events, self.questions, now).items():
            text = WORDS[language]["counts"].format(**vars(counts))
            share, solved = (100 * count / counts.total for count in (counts.seen, counts.solved))
            bar = f'<div style="width: {share:.0f}%"></div><div style="width: {solved:.0f}%"></div>'
            rows.append(
                f"<tr><td>{area_name(area, language)}</td>"
                f'<td><div class="minillm-bar" title="{text}">{bar}</div></td><td>{_quiet(text)}</td></tr>'
            )
        title = f'<div class="minillm-section"><b>{WORDS[language]["progress"]}</b></div>'
        self.progress.value = f'{title}<table class="minillm-progress">{"".join(rows)}</table>'

    def show_map(self) -> None:
        words = WORDS[self.switch.value]
        found = list(self.questions.values())
        if self.search.value.strip():
            try:
                found = [question for question in registry.find(self.search.value) if question.id in self.questions]
            except AnswerError as error:
                parts.status(self.error, "error", str(error))
        count = words["found"].format(n=len(found), all=len(self.questions))
        self.found.value = f'<div class="minillm-quiet">{count}</div>'
        rows = "".join(
            f"<tr><td>{self.link(question.id)}<br>{_quiet(question.id)}</td><td>{words[question.level]}</td>"
            f"<td>{words['minutes'].format(n=question.minutes)}</td><td>{self.state(question.id)}</td></tr>"
            for question in found
        )
        head = "".join(f"<th>{words[name]}</th>" for name in ("question", "level", "time", "state"))
        self.map.value = f'<table class="minillm-map"><tr>{head}</tr>{rows}</table>' if found else ""

    def state(self, id: str) -> str:
        """What the learner did with a question, as labels: due, solved, seen; else new."""
        counts = schedule.progress(self.events, [id], datetime.now(UTC))[self.questions[id].area]
        names = [name for name in ("due", "solved", "seen") if getattr(counts, name)] or ["new"]
        if "due" in names or "solved" in names:
            names = [name for name in names if name != "seen"]
        words = WORDS[self.switch.value]
        return " ".join(
            f'<span class="minillm-chip minillm-is-{name}">{words["states"][name]}</span>' for name in names
        )

    def link(self, id: str) -> str:
        return _link(self.questions[id], self.switch.value, live=True)


def _link(question: Question, language: str, *, live: bool = False) -> str:
    title = markup.to_html(question.zh if language == "zh" else question.en, question.area, inline=True)
    return markup.anchor(f"notebooks/{question.id}.ipynb", title, live=live)


def _now() -> str:
    return datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _quiet(text: str) -> str:
    return f'<span class="minillm-quiet">{text}</span>'
