"""Exercises are loaded from answer files, refused when they break a rule, and edited into wrong versions."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import exercise_tree
from exercise_tree import ANSWER, MODULE, QUESTION
from minillm.study import exercise
from minillm.study.exercise import (
    ExerciseError,
    Wrong,
    edited_source,
    exercise_ids,
    load_exercise,
    load_source,
    load_stub,
    marker,
    reference_files,
)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    exercise_tree.use(tmp_path, monkeypatch.setattr)
    return tmp_path / "answers"


def write(answers: Path, old: str, new: str) -> None:
    """Edits the answer file, which must hold `old`."""
    assert old in ANSWER
    (answers / f"{QUESTION}.py").write_text(ANSWER.replace(old, new), encoding="utf-8")


def test_exercise_says_what_it_asks(answers):
    loaded = load_exercise(QUESTION, answers)
    assert loaded.signature == "weighted_mean(x, w, *, keepdim=False)"
    assert loaded.stub.split("\n")[0] == marker(QUESTION) == "# exercise: data/mean"
    assert loaded.stub == load_stub(QUESTION, answers)
    assert exercise_ids(answers) == [QUESTION]


def test_exercise_is_one_object_until_the_file_changes(answers):
    first = load_exercise(QUESTION, answers)
    assert load_exercise(QUESTION, answers) is first
    write(answers, "rtol=1e-5", "rtol=0.25")
    assert load_exercise(QUESTION, answers).rtol == 0.25


def test_stub_is_read_without_running_the_file_or_importing_torch(answers):
    (answers / f"{QUESTION}.py").write_text("raise SystemExit\n" + ANSWER, encoding="utf-8")
    code = (
        "import sys, pathlib; from minillm.study.exercise import load_stub;"
        f"print(load_stub({QUESTION!r}, pathlib.Path(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(answers)], capture_output=True, text=True, check=True
    ).stdout
    assert "def weighted_mean(x, w, *, keepdim=False):" in shown


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('question="data/mean"', 'question="data/men"', "question must be 'data/mean', it is 'data/men'"),
        ("# exercise: data/mean", "# task: data/mean", "the first line of STUB must be '# exercise: data/mean'"),
        ("stub=STUB", "stub=STUB.upper()", "stub must be STUB"),
        ('module="data/mean"', 'module="data/gone"', "there is no reference module"),
        ('function="weighted_mean"', 'function="mean"', "there must be one function mean at the top level"),
        ('outputs=("mean", "total")', "outputs=()", "outputs must name what is returned"),
        ('"Plain."', '"Plain.", module="data/other"', "belongs in also_wrong"),
        ('Wrong("second twin"', 'Wrong("first twin"', "two wrong versions have one name"),
        ("EXERCISE = Exercise(", "TASK = Exercise(", "EXERCISE must be an Exercise, it is NoneType"),
        ("rtol=1e-5", "rtol=1 / 0", "does not run: ZeroDivisionError"),
        ('STUB = """', 'STUB = "" + """', "STUB must be one string literal"),
    ],
)
def test_broken_exercise_is_refused(answers, old, new, message):
    write(answers, old, new)
    with pytest.raises(ExerciseError, match=message.replace("(", r"\(")) as refusal:
        load_exercise(QUESTION, answers)
    assert "mean.py" in str(refusal.value)


def test_missing_stub_is_refused(answers):
    write(answers, "STUB =", "TEXT =")
    with pytest.raises(ExerciseError, match="there is no STUB"):
        load_stub(QUESTION, answers)


@pytest.mark.parametrize("load", [load_exercise, load_stub])
def test_unknown_question_names_the_nearest(answers, load):
    with pytest.raises(ExerciseError, match="no exercise data/mena; nearest: data/mean"):
        load("data/mena", answers)


def test_edit_is_made_where_it_occurs_once(answers):
    loaded = load_exercise(QUESTION, answers)
    assert edited_source(loaded, loaded.wrong[0]) == MODULE.replace(" / total", "")


def test_edit_of_another_module(answers, tmp_path):
    (tmp_path / "minillm" / "data" / "sum.py").write_text("one = 1\n", encoding="utf-8")
    wrong = Wrong("two", "1", "2", "", module="data/sum")
    assert edited_source(load_exercise(QUESTION, answers), wrong) == "one = 2\n"


@pytest.mark.parametrize(
    ("find", "message"),
    [("keepdim", "find occurs 5 times"), ("absent", "find occurs 0 times"), ("mean, total", "equals")],
)
def test_edit_that_is_not_one_is_refused(answers, find, message):
    with pytest.raises(ValueError, match=message):
        edited_source(load_exercise(QUESTION, answers), Wrong("it", find, "mean, total", ""))


def test_references_are_all_modules_with_the_function(answers, tmp_path):
    for name, text in {"other": "def weighted_mean(x): ...\n", "apart": "def mean(x): ...\n"}.items():
        (tmp_path / "minillm" / "data" / f"{name}.py").write_text(text, encoding="utf-8")
    study = tmp_path / "minillm" / "study"
    study.mkdir()
    (study / "helper.py").write_text("def weighted_mean(x): ...\n", encoding="utf-8")
    found = reference_files(load_exercise(QUESTION, answers))
    assert [path.name for path in found] == ["mean.py", "other.py"]
    assert found[0] == exercise.PACKAGE / "data" / "mean.py"


def test_source_is_loaded_with_its_text():
    pair = "from dataclasses import dataclass\n\n\n@dataclass\nclass Pair:\n    a: 'int'\n"
    source = f"{pair}\n\ndef twice(x):\n    return 2 * x\n"
    module = load_source(source, "pair")
    assert module.twice(module.Pair(3).a) == 6
    assert inspect.getsource(module.twice) == "def twice(x):\n    return 2 * x\n"
    assert inspect.getsource(module.Pair).startswith("@dataclass")


def test_source_that_fails_leaves_no_module():
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load_source("1 / 0", "broken")
    assert set(sys.modules) == before
