"""The start page: due, progress, map, search."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from minillm.study import overview as overview_module
from minillm.study import registry, session
from minillm.study.language import WORDS
from minillm.study.overview import overview, snapshot
from widget_tree import new_kernel, use_tree

FLASH, ROPE, YARN = "attention/flash", "position/rope", "position/yarn"


class Morning(datetime):
    """It is nine o'clock, local time."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2026, 6, 15, 9).astimezone(tz)


@pytest.fixture(autouse=True)
def _tree(tmp_path, monkeypatch):
    use_tree(tmp_path, monkeypatch, FLASH, ROPE, YARN)
    yield
    new_kernel()


def rate(question, rating, days_ago=0):
    at = datetime.now(UTC) - timedelta(days=days_ago)
    session.log().append("rating", question, {"rating": rating, "ticked": []}, at=at)


def solve(question, verdict="passed"):
    data = {"code": "", "verdict": verdict, "diagnosis": None, "path": None}
    session.log().append("attempt", question, data)


def row(shown, question):
    return next(part for part in shown.map.value.split("<tr>") if question in part)


def states(shown, question):
    return [name for name in ("due", "solved", "seen", "new") if f"minillm-is-{name}" in row(shown, question)]


def test_the_first_visit_says_where_to_begin():
    shown = overview()
    assert "Nothing rated yet. Begin with" in shown.due.value
    assert 'href="attention/flash.ipynb"' in shown.due.value
    assert states(shown, FLASH) == ["new"]


def test_due_questions_are_linked_most_overdue_first():
    rate(ROPE, 1, days_ago=5)
    rate(FLASH, 1, days_ago=40)
    shown = overview()
    assert 0 < shown.due.value.index("attention/flash.ipynb") < shown.due.value.index("position/rope.ipynb")
    assert "position/yarn.ipynb" in shown.due.value.partition("Next new question")[2]
    assert states(shown, ROPE) == ["due"]


def test_with_nothing_due_it_says_the_next_review():
    rate(FLASH, 4)
    shown = overview()
    assert "Nothing is due today." in shown.due.value
    assert "Next review: <a" in shown.due.value
    assert "(in " in shown.due.value
    assert "attention/flash" in shown.due.value.partition("Next new")[0]
    rate(ROPE, 1)  # earlier than Easy brings the other one back
    shown.again.click()
    assert "position/rope" in shown.due.value.partition("Next new")[0]
    assert "attention/flash" not in shown.due.value
    assert states(shown, FLASH) == ["seen"]


def test_what_falls_due_later_today_is_due(monkeypatch):
    monkeypatch.setattr(overview_module, "datetime", Morning)
    rated = datetime(2026, 6, 14, 21).astimezone()  # local time; Again brings it back after 24 hours
    session.log().append("rating", FLASH, {"rating": 1, "ticked": []}, at=rated)
    assert states(overview(), FLASH) == ["due"]
    assert "Due today" in overview().due.value
    assert "since 2026-06-15" in overview().due.value


def test_progress_counts_only_areas_with_questions():
    rate(ROPE, 1, days_ago=5)
    rate(YARN, 4)
    solve(YARN)
    solve(FLASH, verdict="failed")
    shown = overview()
    assert "2 of 2 rated, 1 solved, 1 due" in shown.progress.value
    assert "0 of 1 rated, 0 solved, 0 due" in shown.progress.value
    assert "alignment" not in shown.progress.value


def test_a_solved_question_that_is_due_says_both():
    rate(FLASH, 1, days_ago=5)
    solve(FLASH)
    assert states(overview(), FLASH) == ["due", "solved"]


def test_refresh_sees_what_another_kernel_recorded():
    shown = overview()
    new_kernel()
    rate(FLASH, 1, days_ago=5)
    assert states(shown, FLASH) == ["new"]
    shown.again.click()
    assert states(shown, FLASH) == ["due"]


def test_search_filters_the_map_and_an_empty_box_shows_all():
    shown = overview()
    assert shown.map.value.count("<tr>") == 4  # with the head
    shown.search.value = "rope"
    assert "position/rope" in shown.map.value
    assert "attention/flash" not in shown.map.value
    assert "1 of 3" in shown.found.value
    shown.search.value = "zebra"
    assert shown.map.value == ""
    assert "0 of 3" in shown.found.value
    shown.search.value = "  "
    assert shown.map.value.count("<tr>") == 4


def test_an_answer_file_broken_meanwhile_is_said_and_the_map_stays(tmp_path):
    shown = overview()
    (tmp_path / "answers/position/rope.md").write_text("broken", encoding="utf-8")
    shown.search.value = "rope"
    assert "rope.md:1:" in shown.error.value
    assert "position/rope" in shown.map.value


def test_the_switch_changes_the_page_and_is_kept():
    shown = overview()
    shown.switch.value = "zh"
    assert WORDS["zh"]["due"] in shown.due.value
    assert "为什么更快？" in shown.map.value
    assert "注意力" in shown.progress.value
    new_kernel()
    assert overview().switch.value == "zh"


def test_ratings_of_a_question_that_is_gone_are_not_shown():
    rate("attention/old", 1, days_ago=5)
    shown = overview()
    assert "attention/old" not in shown.due.value + shown.map.value
    assert "Begin with" in shown.due.value


def test_a_failing_store_is_one_sentence_over_the_map(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path / "file/home"))
    shown = overview()
    assert 'class="minillm-error"' in shown.error.value
    assert shown.map.value.count("<tr>") == 4


def test_no_questions_at_all(monkeypatch):
    monkeypatch.setattr(registry, "load_questions", dict)
    shown = overview()
    assert shown.map.value == ""
    assert "0 of 0" in shown.found.value


def test_saved_output_is_the_map_and_nothing_of_the_learner():
    fresh = overview()._repr_mimebundle_()
    rate(FLASH, 1, days_ago=5)
    shown = overview()
    shown.switch.value = "zh"
    used = overview()._repr_mimebundle_()
    for key in ("text/plain", "text/html"):
        assert fresh[key] == used[key]
    assert fresh["text/html"].count('href="position/rope.ipynb"') == 2  # both languages
    assert fresh["text/plain"].splitlines()[0].startswith("attention/flash  ")


def cell(id, source, kind="code"):
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": id, "metadata": {}, "source": [source], **code}


def test_a_snapshot_puts_what_is_due_in_the_saved_output(tmp_path):
    page = {"cells": [cell("say", "`overview()` 说明", "markdown"), cell("overview", "overview()"), cell("mine", "1")]}
    path = tmp_path / "start.ipynb"
    path.write_text(json.dumps(page | {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    rate(FLASH, 1, days_ago=5)
    assert snapshot(path)
    after = json.loads(path.read_text(encoding="utf-8"))
    (output,) = after["cells"][1].pop("outputs")
    assert "Due today" in output["data"]["text/html"][0]
    assert "As of 2" in output["data"]["text/html"][0]
    assert 'href="attention/flash.ipynb"' in output["data"]["text/html"][0]
    assert output["data"].keys() == {"text/plain", "text/html"}
    page["cells"][1].pop("outputs")
    assert after["cells"] == page["cells"]
    assert [file.name for file in tmp_path.glob("start*")] == ["start.ipynb"]


def test_a_snapshot_leaves_a_page_without_the_cell_alone(tmp_path):
    path = tmp_path / "start.ipynb"
    text = json.dumps({"cells": [cell("mine", "1")]})
    path.write_text(text, encoding="utf-8")
    assert not snapshot(path)
    assert path.read_text(encoding="utf-8") == text
