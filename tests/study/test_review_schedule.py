"""The schedule is what FSRS says about the rating events, the same on every machine."""

import random
from datetime import UTC, datetime, timedelta, timezone

import pytest
from fsrs import Card, Rating, ReviewLog, Scheduler

from minillm.study.schedule import RATINGS, Progress, due, due_at, preview, progress
from minillm.study.store import Event

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
DAY = timedelta(days=1)


def rating(value: object, at: datetime, question: str = "attention/flash") -> Event:
    return Event("0" * 32, at, "rating", question, {"rating": value, "ticked": []})


def attempt(verdict: str, question: str = "attention/flash") -> Event:
    return Event("0" * 32, START, "attempt", question, {"code": "", "verdict": verdict})


def test_first_intervals_by_hand() -> None:
    # FSRS-6: the first stability is parameter w0..w3 = 0.212, 1.2931, 2.3065, 8.2956 days, and at the wanted retention
    # of 0.9 the interval is the stability, in whole days and at least one: 1, 1, 2, 8.
    assert preview([], "attention/flash", START) == {1: 1 * DAY, 2: 1 * DAY, 3: 2 * DAY, 4: 8 * DAY}
    assert due_at([rating(4, START)], "attention/flash") == START + 8 * DAY
    assert due_at([rating(4, START)], "attention/gqa") is None
    assert tuple(each.name for each in sorted(Rating)) == RATINGS


@pytest.mark.parametrize("seed", range(5))
def test_replay_equals_the_reschedule_of_fsrs(seed: int) -> None:
    chosen, at, logs = random.Random(seed), START, []
    for _ in range(12):
        logs.append(ReviewLog(card_id=1, rating=Rating(chosen.randint(1, 4)), review_datetime=at, review_duration=None))
        at += timedelta(hours=chosen.randint(1, 900))
    scheduler = Scheduler(learning_steps=(), relearning_steps=(), enable_fuzzing=False)
    card = scheduler.reschedule_card(Card(card_id=1), logs)
    events = [rating(int(log.rating), log.review_datetime) for log in logs]
    assert due_at(events, "attention/flash") == card.due
    chosen.shuffle(events)  # the order of two machines' events does not matter
    assert due_at(events, "attention/flash") == card.due


def test_the_preview_is_what_happens() -> None:
    events = [rating(3, START), rating(2, START + 3 * DAY), rating(1, START + 4 * DAY, "attention/gqa")]
    now = START + 20 * DAY
    shown = preview(events, "attention/flash", now)
    for value, interval in shown.items():
        assert due_at([*events, rating(value, now)], "attention/flash") == now + interval
    assert shown[1] < shown[2] < shown[3] < shown[4]


def test_times_of_other_zones_are_the_same_moments() -> None:
    tokyo = timezone(timedelta(hours=9))
    shifted = [rating(3, START.astimezone(tokyo)), rating(3, (START + 2 * DAY).astimezone(tokyo))]
    events = [rating(3, START), rating(3, START + 2 * DAY)]
    result = due_at(shifted, "attention/flash")
    assert result == due_at(events, "attention/flash")
    assert result is not None
    assert result.tzinfo is UTC
    now = START + 30 * DAY
    assert preview(shifted, "attention/flash", now.astimezone(tokyo)) == preview(events, "attention/flash", now)


def test_a_review_in_the_past_of_the_last_one_does_not_fail() -> None:
    # Another machine's clock was ahead; the events are all the same replayed in time order.
    events = [rating(3, START + DAY), rating(3, START)]
    assert due_at(events, "attention/flash") == due_at(events[::-1], "attention/flash")
    assert all(interval >= DAY for interval in preview(events, "attention/flash", START - DAY).values())


def test_due_lists_the_longest_overdue_first() -> None:
    events = [
        rating(4, START, "a/eight"),
        rating(3, START, "a/two"),
        rating(1, START, "a/one"),
        rating(2, START, "a/also"),
        attempt("passed", "a/never-rated"),
    ]
    tomorrow = (START + DAY).astimezone().replace(hour=0, minute=0, second=0)  # where the learner is
    assert due(events, tomorrow - timedelta(microseconds=1)) == []
    assert due(events, tomorrow) == ["a/also", "a/one"]  # rated in the evening, due in the morning
    assert due(events, START + DAY) == ["a/also", "a/one"]
    assert due(events, START + 9 * DAY) == ["a/also", "a/one", "a/two", "a/eight"]
    assert due([*events, rating(3, START + 9 * DAY, "a/one")], START + 9 * DAY) == ["a/also", "a/two", "a/eight"]


def test_progress_counts_questions_not_events() -> None:
    questions = dict.fromkeys(("attention/flash", "attention/gqa", "data/dedup", "attention/mla"))
    events = [
        rating(1, START),
        rating(3, START),
        rating(4, START, "attention/gqa"),
        rating(1, START, "attention/removed"),
        attempt("failed", "attention/gqa"),
        attempt("failed", "data/dedup"),
        attempt("passed"),
        attempt("passed"),
    ]
    assert progress(events, questions, START + 5 * DAY) == {
        "attention": Progress(total=3, seen=2, solved=1, due=1),
        "data": Progress(total=1, seen=0, solved=0, due=0),
    }
    assert list(progress(events, questions)) == ["attention", "data"]
    assert progress(events, questions)["attention"].due == 2  # START is long ago


@pytest.mark.parametrize("value", [0, 5, None, "3"])
def test_a_rating_outside_1_to_4_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"a rating is 1, 2, 3 or 4 .* got"):
        due_at([rating(value, START)], "attention/flash")


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a time zone, got 2026-03-01T20:00:00"):
        due([], START.replace(tzinfo=None))
