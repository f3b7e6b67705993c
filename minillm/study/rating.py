"""The four rating buttons of a question, with the interval that each would give, alone and as a notebook's end."""

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from typing import Any

import ipywidgets as widgets

from minillm.study import parts, schedule, session
from minillm.study.language import WORDS, date, in_days, span
from minillm.study.registry import Question
from minillm.study.store import StoreError


class Rating:
    """One rating a round: the click that is recorded closes the buttons, so a double click counts once.

    `ticked` gives the key points that the learner ticked, `changed` is called after a rating is recorded.
    """

    def __init__(self, question: str, ticked: Callable[[], list[int]], changed: Callable[[], None]) -> None:
        self.question, self.ticked, self.changed = question, ticked, changed
        self.given, self.open, self.language = 0, True, "en"  # given: the rating of this round, 0 for none
        self.line = widgets.HTML()
        self.buttons = [parts.button(lambda n=n: self.rate(n)) for n in (1, 2, 3, 4)]  # type: ignore[misc]
        self.row = parts.row(*self.buttons).add_class("minillm-rating")

    def rate(self, rating: int) -> None:
        """Record the rating, 1 to 4, unless this round has one; a failure to save is shown and closes nothing."""
        if not self.open:  # a click on its way while the buttons closed
            return
        try:
            session.log().append("rating", self.question, {"rating": rating, "ticked": self.ticked()})
        except StoreError as error:
            parts.status(self.line, "error", str(error))
            return
        self.given = rating
        self.show(self.language)
        self.changed()

    def show(self, language: str, *, open: bool = True) -> None:
        """The labels in a language and the last rating; the buttons work if `open` and this round has no rating."""
        words, now = WORDS[language], datetime.now(UTC)
        self.language, self.open = language, open and not self.given
        after: dict[int, str] = {}
        try:
            events = session.log().events("rating", self.question)
            due = schedule.due_at(events, self.question)
            if self.open:
                preview = schedule.preview(events, self.question, now)
                after = {number: span(gap, language) for number, gap in preview.items()}
        except StoreError as error:
            parts.status(self.line, "error", str(error))
        else:
            if due is None:
                parts.status(self.line, "quiet", words["never"])
            else:
                rating = words["ratings"][events[-1].data["rating"] - 1]
                text = words["saved" if self.given else "last"].format(
                    rating=rating, at=date(events[-1].at), date=date(due), in_days=in_days(due, now, language)
                )
                parts.status(self.line, "good" if self.given else "quiet", text)
        for number, each in enumerate(self.buttons, start=1):
            each.description = "\n".join(filter(None, (words["ratings"][number - 1], after.get(number))))
            each.tooltip, each.disabled = words["meanings"][number - 1], not self.open
            (each.add_class if self.given == number else each.remove_class)("minillm-given")


class Review:
    """The rating row by itself; where the question was rated today already, rating again is one click more."""

    def __init__(self, question: Question) -> None:
        self.question, self.asked = question, False  # asked: to rate once more
        self.rating = Rating(question.id, list, lambda: session.refresh(question.id))
        self.how, self.again = widgets.HTML(), parts.button(self.restart)
        self.widget = parts.app(self.how, self.rating.row, parts.row(self.rating.line, self.again))
        self.show()
        session.shown["review", question.id] = self.show

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        titles = f"<b>{escape(WORDS['en']['how'])}</b><br>{escape(WORDS['zh']['how'])}"
        html = f"<p>{titles}</p><p>{parts.RUN['en']} to rate yourself. {parts.RUN['zh']}，给自己评分。</p>"
        return parts.bundle(self.widget, f"{WORDS['en']['how']} ({self.question.id})", html)

    def restart(self) -> None:
        """Begin a new round."""
        self.asked, self.rating.given = True, 0
        self.show()

    def show(self) -> None:
        """Bring every text up to date: language, last rating."""
        language, today = session.language(), datetime.now(UTC).astimezone().date()
        try:
            events = session.log().events("rating", self.question.id)
        except StoreError:
            events = []  # the row shows the error
        open = self.asked or not (events and events[-1].at.astimezone().date() == today)
        self.how.value = f'<div class="minillm-section">{WORDS[language]["how"]}</div>'
        self.again.description = WORDS[language]["again"]
        self.again.layout.display = "none" if open and not self.rating.given else ""
        self.rating.show(language, open=open)
