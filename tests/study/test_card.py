"""The question card and the rating row, driven as a browser drives them: by clicks and values."""

from datetime import UTC, datetime, timedelta

import pytest

from minillm.study import card as card_module
from minillm.study import schedule, session
from minillm.study.card import card, review
from minillm.study.language import WORDS, date, in_days, span
from minillm.study.registry import UnknownQuestion
from widget_tree import QUESTION, new_kernel, use_tree


@pytest.fixture(autouse=True)
def _tree(tmp_path, monkeypatch):
    use_tree(tmp_path, monkeypatch)
    yield
    new_kernel()


@pytest.fixture
def break_store(tmp_path, monkeypatch):
    """A function that makes the learner's folder unusable (its parent is a file), and one that mends it."""
    (tmp_path / "file").write_text("")

    def set_broken(broken):
        monkeypatch.setenv("MINILLM_HOME", str(tmp_path / ("file/home" if broken else "home")))

    return set_broken


def ratings():
    return [event.data for event in session.log().events("rating", QUESTION)]


def labels(rating):
    return [button.description for button in rating.buttons]


def test_the_switch_changes_question_answer_points_and_buttons():
    shown = card(QUESTION)
    assert "Why is flash attention faster?" in shown.head.value
    assert "It never writes the score matrix." in shown.short.value
    assert shown.ticks[0].description == "1. It is exact."
    assert shown.reveal_button.description == WORDS["en"]["reveal"]
    shown.switch.value = "zh"
    assert "为什么更快？" in shown.head.value
    assert "从不写出分数矩阵。" in shown.short.value
    assert shown.ticks[0].description == "1. 结果是精确的。"
    assert shown.reveal_button.description == WORDS["zh"]["reveal"]
    assert labels(shown.rating)[0].startswith("忘了")


def test_the_language_is_kept_for_the_next_kernel():
    card(QUESTION).switch.value = "zh"
    new_kernel()
    assert card(QUESTION).switch.value == "zh"
    assert review(QUESTION).how.value.count(WORDS["zh"]["how"]) == 1


def test_both_languages_have_every_word():
    assert WORDS["en"].keys() == WORDS["zh"].keys()


def test_typed_text_is_there_after_reveal_switch_and_a_new_kernel():
    shown = card(QUESTION)
    for text in ("b", "bl", "blocks 分块"):
        shown.box.value = text
        assert session.log().draft(QUESTION) == text
    shown.reveal_button.click()
    shown.switch.value = "zh"
    assert shown.box.value == "blocks 分块"
    new_kernel()
    assert card(QUESTION).box.value == "blocks 分块"


def test_the_answer_is_hidden_until_it_is_revealed():
    shown = card(QUESTION)
    assert shown.answer.layout.display == "none"
    shown.reveal_button.click()
    assert shown.answer.layout.display == "flex"
    assert shown.reveal_button.layout.display == "none"


def test_what_was_typed_is_recorded_once_at_the_reveal():
    shown = card(QUESTION)
    shown.box.value = "rescale"
    shown.reveal_button.click()
    shown.reveal_button.click()
    new_kernel()
    card(QUESTION).reveal_button.click()  # the same text again
    assert [event.data for event in session.log().events("answer", QUESTION)] == [{"text": "rescale"}]


def test_an_empty_answer_is_not_recorded():
    shown = card(QUESTION)
    shown.box.value = "  \n"
    shown.reveal_button.click()
    assert session.log().events("answer") == []


def test_each_point_shows_its_text_without_the_lead():
    shown = card(QUESTION)
    assert "The result is the same" in shown.texts[0].value
    assert "It is exact" not in shown.texts[0].value
    assert "<li>" in shown.texts[1].value  # a list inside an item stays one


@pytest.mark.parametrize(
    ("lead", "text", "rest"),
    [
        ("A b.", "**A\n  b.** rest", "rest"),
        ("m' = max(m, `a**b`).", "**m' = max(m, `a**b`).** rest **bold**", "rest **bold**"),
    ],
)
def test_the_lead_is_cut_off_also_over_a_line_break_and_with_stars_in_code(lead, text, rest):
    assert card_module._after_lead(card_module.KeyPoint(lead, text)) == rest


def test_ticks_are_counted_and_recorded_with_the_rating():
    shown = card(QUESTION)
    assert "0 of 2 made" in shown.made.value
    shown.reveal_button.click()
    shown.ticks[1].value = True
    assert "1 of 2 made" in shown.made.value
    shown.switch.value = "zh"
    assert shown.ticks[1].value
    shown.rating.buttons[1].click()
    assert ratings() == [{"rating": 2, "ticked": [1]}]


def test_the_buttons_say_when_each_rating_would_bring_the_question_back():
    shown = card(QUESTION)
    gaps = schedule.preview([], QUESTION, datetime.now(UTC))
    names = WORDS["en"]["ratings"]
    assert labels(shown.rating) == [f"{name}\n{span(gaps[n], 'en')}" for n, name in enumerate(names, start=1)]


def test_a_rating_says_the_next_review():
    shown = card(QUESTION)
    shown.reveal_button.click()
    shown.rating.buttons[2].click()
    due = schedule.due_at(session.log().events(), QUESTION)
    expected = f"Saved. Next review {date(due)} ({in_days(due, datetime.now(UTC), 'en')})."
    assert expected in shown.rating.line.value


def test_a_double_click_is_one_rating():
    shown = card(QUESTION)
    shown.reveal_button.click()
    shown.rating.buttons[2].click()
    shown.rating.buttons[2].click()
    shown.rating.buttons[0].click()
    assert ratings() == [{"rating": 3, "ticked": []}]
    assert all(button.disabled for button in shown.rating.buttons)


def test_start_over_begins_a_round_with_its_own_rating_and_keeps_the_text():
    shown = card(QUESTION)
    shown.box.value = "first"
    shown.reveal_button.click()
    shown.ticks[0].value = True
    shown.rating.buttons[0].click()
    shown.box.value = "first, longer"
    shown.restart_button.click()
    assert (shown.box.value, shown.ticked(), shown.answer.layout.display) == ("", [], "none")
    assert session.log().draft(QUESTION) == ""
    assert [event.data["text"] for event in session.log().events("answer")] == ["first", "first, longer"]
    shown.reveal_button.click()
    shown.rating.buttons[3].click()
    assert [event["rating"] for event in ratings()] == [1, 4]


def test_a_later_kernel_shows_the_last_rating_and_the_date():
    shown = card(QUESTION)
    shown.reveal_button.click()
    shown.rating.buttons[3].click()
    new_kernel()
    due = schedule.due_at(session.log().events(), QUESTION)
    line = card(QUESTION).rating.line.value
    assert f"Last rating: Easy, {date(datetime.now(UTC))}. Next review {date(due)}" in line


def test_a_failing_store_is_one_sentence_and_the_text_stays(break_store):
    shown = card(QUESTION)
    break_store(True)
    shown.box.value = "typed while the disk is away"
    assert 'class="minillm-error"' in shown.error.value
    assert "file" in shown.error.value  # the path
    assert "Traceback" not in shown.error.value
    shown.reveal_button.click()
    shown.rating.buttons[2].click()
    assert shown.answer.layout.display == "flex"
    assert shown.box.value == "typed while the disk is away"
    assert 'class="minillm-error"' in shown.rating.line.value
    shown.restart_button.click()
    assert shown.box.value == "typed while the disk is away"  # it could not be recorded, so it is not cleared
    break_store(False)
    shown.rating.buttons[2].click()
    assert [event["rating"] for event in ratings()] == [3]
    shown.box.value += "."
    assert shown.error.value == ""
    assert session.log().draft(QUESTION) == "typed while the disk is away."


def test_what_the_store_had_to_repair_is_said(tmp_path):
    card(QUESTION).box.value = "typed"
    session.log().close()
    new_kernel()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"home/study.db{suffix}").unlink(missing_ok=True)
    shown = card(QUESTION)
    assert "study.db was missing" in shown.error.value
    assert shown.box.value == "typed"


def test_a_card_opens_though_the_store_does_not(break_store):
    break_store(True)
    shown = card(QUESTION)
    assert 'class="minillm-error"' in shown.error.value
    assert "Why is flash attention faster?" in shown.head.value
    assert labels(shown.rating)[0] == "Again"


def test_the_timer_counts_on_the_clock_and_stops_at_the_reveal(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(card_module, "monotonic", lambda: now[0])
    shown = card(QUESTION)
    assert ">00:00<" in shown.time.value
    shown.timer.click()
    assert shown.clock.playing
    assert shown.timer.description == WORDS["en"]["stop"]
    now[0] += 65.4
    shown.clock.value += 1  # what the browser does twice a second
    assert ">01:05<" in shown.time.value
    shown.timer.click()
    now[0] += 1000
    shown.timer.click()
    now[0] += 120
    shown.reveal_button.click()
    assert ">03:05<" in shown.time.value
    assert "minillm-late" in shown.time.value
    assert not shown.clock.playing
    shown.restart_button.click()
    assert ">00:00<" in shown.time.value


def test_saved_output_has_the_question_and_nothing_of_the_learner():
    fresh = card(QUESTION)._repr_mimebundle_()
    shown = card(QUESTION)
    shown.box.value = "secret"
    shown.switch.value = "zh"
    shown.reveal_button.click()
    shown.rating.buttons[0].click()
    used = card(QUESTION)._repr_mimebundle_()
    view = "application/vnd.jupyter.widget-view+json"
    assert used.pop(view)["model_id"] != fresh.pop(view)["model_id"]
    assert fresh == used
    assert fresh["text/plain"] == "Why is flash attention faster?\n为什么更快？"
    assert "Why is flash attention faster?" in fresh["text/html"]
    assert "为什么更快？" in fresh["text/html"]
    for name in ("flash.md", "flash.zh.md"):
        assert f'href="../../answers/attention/{name}"' in fresh["text/html"]


def test_an_unknown_question_is_refused():
    with pytest.raises(UnknownQuestion, match="attention/flash"):
        card("attention/flsh")


class TestReview:
    def test_it_rates(self):
        shown = review(QUESTION)
        assert shown.again.layout.display == "none"
        shown.rating.buttons[2].click()
        shown.rating.buttons[2].click()
        assert ratings() == [{"rating": 3, "ticked": []}]
        assert "Saved. Next review" in shown.rating.line.value

    def test_after_a_rating_today_another_is_one_click_more(self):
        rated, shown = card(QUESTION), review(QUESTION)
        rated.reveal_button.click()
        rated.rating.buttons[0].click()
        assert "Last rating: Again" in shown.rating.line.value  # told at once, in the same kernel
        shown.rating.buttons[2].click()  # closed
        new_kernel()
        shown = review(QUESTION)
        shown.rating.buttons[2].click()
        assert len(ratings()) == 1
        shown.again.click()
        shown.rating.buttons[2].click()
        assert [event["rating"] for event in ratings()] == [1, 3]

    def test_a_rating_of_another_day_leaves_it_open(self):
        earlier = datetime.now(UTC) - timedelta(days=2)
        session.log().append("rating", QUESTION, {"rating": 3, "ticked": []}, at=earlier)
        shown = review(QUESTION)
        assert not any(button.disabled for button in shown.rating.buttons)
        assert f"Last rating: Good, {date(earlier)}" in shown.rating.line.value

    def test_a_rating_in_it_reaches_the_card(self):
        shown = card(QUESTION)
        review(QUESTION).rating.buttons[3].click()
        assert "Last rating: Easy" in shown.rating.line.value


@pytest.mark.parametrize(
    ("days", "english", "chinese"),
    [(0, "today", "今天"), (1, "in 1 day", "1 天后"), (3, "in 3 days", "3 天后"), (-2, "2 days ago", "2 天前")],
)
def test_distance_in_calendar_days(days, english, chinese):
    now = datetime(2026, 6, 15, 12, tzinfo=UTC)  # no change of clocks near
    assert in_days(now + timedelta(days=days), now, "en") == english
    assert in_days(now + timedelta(days=days), now, "zh") == chinese


@pytest.mark.parametrize(
    ("days", "english", "chinese"),
    [(1, "1 day", "1 天"), (59, "59 days", "59 天"), (91, "3 months", "3 个月"), (1100, "3 years", "3 年")],
)
def test_spans_in_words(days, english, chinese):
    assert span(timedelta(days=days), "en") == english
    assert span(timedelta(days=days), "zh") == chinese
