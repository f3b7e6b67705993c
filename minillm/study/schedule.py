"""When to study a question again: the rating events replayed through FSRS.

Nothing but events is kept, so the schedule is the same on every machine that has the same events. Intervals are whole
days: no learning steps inside a session, no random fuzz.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from fsrs import Card, Rating, Scheduler

from minillm.study.store import Event

RATINGS = ("Again", "Hard", "Good", "Easy")  # 1, 2, 3, 4
SCHEDULER = Scheduler(learning_steps=(), relearning_steps=(), enable_fuzzing=False)


@dataclass(frozen=True)
class Progress:
    """How many questions of an area there are, were rated, were solved (an attempt passed), and are due."""

    total: int
    seen: int
    solved: int
    due: int


def due_at(events: Iterable[Event], question: str) -> datetime | None:
    """When the question is due, in UTC, or None if it was never rated. ValueError for a rating outside 1..4."""
    card = _cards(events).get(question)
    return card.due if card else None


def preview(events: Iterable[Event], question: str, now: datetime) -> dict[int, timedelta]:
    """The time until the next review for each rating 1..4, if it is given now."""
    now, card = _utc(now), _cards(events).get(question) or Card(card_id=0)
    return {rating: _review(card, rating, now).due - now for rating in range(1, len(RATINGS) + 1)}


def due(events: Iterable[Event], now: datetime) -> list[str]:
    """The ids of the rated questions that are due on the local day of `now`, at whatever hour; the oldest first."""
    end, cards = tonight(_utc(now)), _cards(events)
    return sorted((id for id, card in cards.items() if card.due <= end), key=lambda id: (cards[id].due, id))


def tonight(now: datetime) -> datetime:
    """The end of the local day: what falls due later today is due, at whatever time it was rated."""
    return now.astimezone().replace(hour=23, minute=59, second=59, microsecond=0)


def progress(events: Iterable[Event], questions: Iterable[str], now: datetime | None = None) -> dict[str, Progress]:
    """Counts by area, in the order of the question ids given (a dict of questions will do)."""
    events, ids = list(events), list(questions)
    seen = {event.question for event in events if event.kind == "rating"}
    passed = {event.question for event in events if event.kind == "attempt" and event.data.get("verdict") == "passed"}
    overdue = set(due(events, now or datetime.now(UTC)))
    areas: dict[str, list[str]] = {}
    for id in ids:
        areas.setdefault(id.split("/")[0], []).append(id)
    return {
        area: Progress(len(ids), *(len(group.intersection(ids)) for group in (seen, passed, overdue)))
        for area, ids in areas.items()
    }


def _cards(events: Iterable[Event]) -> dict[str, Card]:
    cards: dict[str, Card] = {}
    for event in sorted((event for event in events if event.kind == "rating"), key=lambda event: event.at):
        card = cards.get(event.question) or Card(card_id=0)
        cards[event.question] = _review(card, event.data.get("rating"), _utc(event.at))
    return cards


def _review(card: Card, rating: Any, at: datetime) -> Card:
    if rating not in range(1, len(RATINGS) + 1):
        raise ValueError(f"a rating is 1, 2, 3 or 4 ({', '.join(RATINGS)}), got {rating!r}")
    return SCHEDULER.review_card(card, Rating(rating), at)[0]


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"a time of review needs a time zone, got {moment.isoformat()}")
    return moment.astimezone(UTC)
