"""The question card: say or type your answer, reveal the model answer, tick the points you made, rate yourself.

One reveal takes one rating. A rating is never rewritten: `Start over` (in `review`: `Rate again`) begins a new
round, whose rating is one more event, and the schedule counts both.
"""

import re
from collections.abc import Callable
from html import escape
from time import monotonic
from typing import Any

import ipywidgets as widgets

from minillm.study import markup, parts, registry, session
from minillm.study.answer_file import KeyPoint
from minillm.study.language import LANGUAGES, WORDS
from minillm.study.rating import Rating, Review
from minillm.study.registry import Question
from minillm.study.store import StoreError

AIM = 180  # seconds for the full answer, spoken


def card(question: str) -> "Card":
    """The card of a question, to end a cell with; UnknownQuestion if there is none of this id."""
    return Card(registry.load_question(question))


def review(question: str) -> Review:
    """The rating row of a question, to end a notebook with; UnknownQuestion if there is none of this id."""
    return Review(registry.load_question(question))


class Card:
    """One question to answer. `reveal`, `restart`, `toggle_timer` and `rating.rate` are what the buttons do."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.revealed, self.started, self.spoken = False, 0.0, 0.0  # spoken: seconds on the timer
        points = range(len(question.answers["en"].key_points))
        self.rating = Rating(question.id, self.ticked, lambda: session.refresh(question.id))
        self.switch = widgets.ToggleButtons(options=LANGUAGES, value=session.language()).add_class("minillm-switch")
        self.head, self.short = widgets.HTMLMath(), widgets.HTMLMath()
        self.time, self.error, self.full, self.made, self.file, self.how = (widgets.HTML() for _ in range(6))
        self.clock = widgets.Play(interval=500, max=10**6, layout={"display": "none"})
        self.timer = parts.button(self.toggle_timer, icon="clock-o")
        self.box = widgets.Textarea(rows=6, layout={"width": "auto"}).add_class("minillm-box")
        self.reveal_button = parts.button(self.reveal, button_style="primary")
        self.restart_button = parts.button(self.restart)
        self.ticks = [widgets.Checkbox(indent=False, description_allow_html=True) for _ in points]
        self.texts = [widgets.HTMLMath() for _ in points]
        items = [widgets.VBox(pair).add_class("minillm-point") for pair in zip(self.ticks, self.texts, strict=True)]
        answer = [self.short, self.full, *items, self.made, self.file, self.how, self.rating.row]
        self.answer = widgets.VBox(answer).add_class("minillm-answer")
        self.widget = parts.app(
            widgets.HBox([self.head, self.switch]).add_class("minillm-head"),
            parts.row(self.timer, self.time, self.clock),
            self.box,
            self.error,
            parts.row(self.reveal_button, self.restart_button),
            self.answer,
            self.rating.line,
        )
        self.attempt(self.load)
        self.show()
        self.box.observe(lambda _: self.attempt(self.save), "value")
        self.switch.observe(lambda _: self.choose(), "value")
        self.clock.observe(lambda _: self.tick(), "value")
        for each in self.ticks:
            each.observe(lambda _: self.count(), "value")
        session.shown["card", question.id] = self.show

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return parts.bundle(self.widget, f"{self.question.en}\n{self.question.zh}", _fallback(self.question))

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do what needs the store and return True; a failure is shown, and the screen keeps what is typed."""
        try:
            work()
        except StoreError as error:
            parts.status(self.error, "error", str(error))
            return False
        parts.status(self.error, "quiet", session.log().notice or "")  # what the store repaired, if it had to
        return True

    def load(self) -> None:
        self.box.value = session.log().draft(self.question.id)

    def save(self) -> None:
        session.log().save_draft(self.question.id, self.box.value)

    def keep(self) -> None:
        """Record the typed answer as an event, unless it is the last one recorded."""
        text, log = self.box.value, session.log()
        kept = log.events("answer", self.question.id)
        if text.strip() and not (kept and kept[-1].data["text"] == text):
            log.append("answer", self.question.id, {"text": text})

    def reveal(self) -> None:
        """Show the answer and stop the timer; what is typed so far is recorded."""
        if not self.revealed:
            self.stop()
            self.revealed = True
            self.attempt(self.keep)
            self.show()

    def restart(self) -> None:
        """Begin a new round: what is typed is recorded first, then the box is emptied and the answer hidden."""
        if self.attempt(self.keep):
            self.stop()
            self.revealed, self.rating.given, self.spoken, self.box.value = False, 0, 0.0, ""
            for each in self.ticks:
                each.value = False
            self.show()

    def ticked(self) -> list[int]:
        return [index for index, tick in enumerate(self.ticks) if tick.value]

    def toggle_timer(self) -> None:
        """Start or stop the timer. The browser asks for the time twice a second: no thread, and no drift."""
        if self.clock.playing:
            self.stop()
        else:
            self.started, self.clock.playing = monotonic() - self.spoken, True
        self.show()

    def stop(self) -> None:
        self.tick()
        self.clock.playing = False

    def tick(self) -> None:
        if self.clock.playing:
            self.spoken = monotonic() - self.started
        minutes, seconds = divmod(int(self.spoken), 60)
        late = " minillm-late" if self.spoken > AIM else ""
        aim = escape(WORDS[self.switch.value]["aim"])
        self.time.value = f'<span class="minillm-time{late}">{minutes:02}:{seconds:02}</span> <small>{aim}</small>'

    def count(self) -> None:
        made = WORDS[self.switch.value]["made"].format(made=len(self.ticked()), all=len(self.ticks))
        self.made.value = f"<b>{made}</b>"

    def choose(self) -> None:
        """Keep the language that the switch shows, for this card and for those opened later."""
        self.attempt(lambda: session.choose(self.switch.value))
        session.refresh(self.question.id)

    def show(self) -> None:
        """Bring every text up to date: language, round, last rating."""
        language, question, area = self.switch.value, self.question, self.question.area
        words, answer = WORDS[language], question.answers[language]
        title = markup.to_html(question.zh if language == "zh" else question.en, area, live=True, inline=True)
        facts = f"{question.id} · {words[question.level]} · {words['minutes'].format(n=question.minutes)}"
        self.head.value = f'<div class="minillm-facts">{facts}</div><div class="minillm-title">{title}</div>'
        self.timer.description = words["stop" if self.clock.playing else "start"]
        self.box.placeholder = words["box"]
        self.reveal_button.description = words["reveal"]
        self.reveal_button.layout.display = "none" if self.revealed else ""
        self.restart_button.description, self.restart_button.tooltip = words["restart"], words["restart_hint"]
        self.answer.layout.display = "flex" if self.revealed else "none"
        short = markup.to_html(answer.short, area, live=True)
        self.short.value = f'<div class="minillm-section">{words["short"]}</div>{short}'
        self.full.value = (
            f'<div class="minillm-section">{words["full"]}</div><div class="minillm-quiet">{words["tick"]}</div>'
        )
        for number, (point, tick, text) in enumerate(zip(answer.key_points, self.ticks, self.texts, strict=True), 1):
            tick.description = f"{number}. {markup.to_html(point.lead, area, live=True, inline=True)}"
            text.value = markup.to_html(_after_lead(point), area, live=True)
        self.how.value = f'<div class="minillm-section">{words["how"]}</div>'
        file = _file(question, language)
        link = markup.anchor(file, file, area=area, live=True)
        self.file.value = f'<div class="minillm-quiet">{words["file"].format(link=link)}</div>'
        self.tick()
        self.count()
        self.rating.show(language)


def _after_lead(point: KeyPoint) -> str:
    lead = r"\s+".join(re.escape(word) for word in point.lead.split())
    return re.sub(rf"\A\*\*{lead}\*\*\s*", "", point.text)


def _file(question: Question, language: str) -> str:
    return f"answers/{question.id}{'.zh' if language == 'zh' else ''}.md"


def _fallback(question: Question) -> str:
    links = [markup.anchor(_file(question, code), label, area=question.area) for label, code in LANGUAGES]
    titles = [markup.to_html(text, question.area, inline=True) for text in (question.en, question.zh)]
    note = (
        f"{parts.RUN['en']} to answer it against the clock and rate yourself. {parts.RUN['zh']}，计时作答、给自己评分。"
    )
    return f"<p><b>{titles[0]}</b><br>{titles[1]}</p><p>{note}</p><p>Model answer: {' · '.join(links)}</p>"
