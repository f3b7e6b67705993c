"""The buttons below a verdict: what the kernel answers. tests/browser has them do it to an open page."""

import functools

import pytest

import exercise_tree
from exercise_tree import QUESTION
from minillm.study import editor, report, session
from minillm.study.checker import judge
from minillm.study.exercise import load_stub
from minillm.study.report import Result

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path))
    task = exercise_tree.use(tmp_path, monkeypatch.setattr)
    monkeypatch.setattr(editor, "load_stub", functools.partial(load_stub, answers=tmp_path / "answers"))
    yield task
    session.log().close()


@pytest.fixture
def buttons(task):
    return editor.Buttons(QUESTION, hints=3)


def kept():
    return [event.data["code"] for event in session.log().events("attempt", QUESTION)]


def test_reset_answers_with_the_stub_once_the_code_is_kept(task, buttons):
    answer = buttons.answer("reset", "mine")
    assert (answer["code"], answer["sent"]) == (task.stub.rstrip(), "mine")
    assert kept() == ["mine"]
    buttons.answer("reset", task.stub)
    buttons.answer("reset", "mine\n")
    assert kept() == ["mine"]  # neither the stub nor the same text again


def test_restore_goes_round_through_all_that_was_kept(task, buttons):
    for code in "first", "second", "third":
        buttons.answer("reset", code)
    seen = ["new"]
    for _ in range(5):
        seen.append(buttons.answer("restore", seen[-1])["code"])
    assert seen == ["new", "third", "second", "first", "new", "third"]
    assert buttons.answer("restore", task.stub)["code"] == "new"


def test_restore_without_earlier_code_replaces_nothing(buttons):
    assert buttons.answer("restore", "mine") == {"kind": "quiet", "text": "There is no earlier code of yours."}
    assert buttons.answer("restore", None).keys() == {"kind", "text"}
    assert buttons.answer("restore", "mine").keys() == {"kind", "text"}


def test_editor_that_is_not_found_loses_nothing(task, buttons):
    assert buttons.answer("reset", None)["code"] == task.stub.rstrip()
    assert kept() == []
    buttons.answer("reset", "mine")
    assert buttons.answer("restore", None)["code"] == "mine"


def test_press_is_answered_to_the_view_that_was_pressed(task, buttons, monkeypatch):
    sent = []
    monkeypatch.setattr(buttons, "send", sent.append)
    buttons._receive(buttons, {"kind": "hint", "text": None, "id": "view"}, [])
    assert sent == [{"kind": "hint", "text": "Hint 1 of 3: Multiply.", "id": "view"}]


def test_nothing_is_replaced_when_the_code_can_not_be_kept(task, buttons, monkeypatch):
    sent = []
    monkeypatch.setattr(buttons, "send", sent.append)
    session.log().close()
    monkeypatch.setenv("MINILLM_HOME", __file__)  # a file, where a folder is needed
    buttons._receive(buttons, {"kind": "reset", "text": "mine", "id": "view"}, [])
    monkeypatch.undo()
    assert sent[0]["kind"] == "error"
    assert sent[0]["text"].startswith("Nothing was changed: ")
    assert "code" not in sent[0]


def test_output_of_a_cell_is_the_verdict_with_buttons_and_without(task, monkeypatch):
    monkeypatch.setattr(report, "_in_notebook", lambda: True)
    result = Result(QUESTION, task.signature, judge(task, 3), 3)
    bundle = result._repr_mimebundle_()
    assert (bundle["text/plain"], bundle["text/html"]) == (str(result), result.html)
    assert bundle[VIEW].keys() == {"model_id", "version_major", "version_minor"}


def test_no_button_for_hints_that_do_not_exist():
    assert list(editor.Buttons(QUESTION, hints=0).buttons) == ["reset", "restore"]
