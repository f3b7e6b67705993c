"""Each notebook's exercise: the stub is open, the reference passes, and every wrong version gets its own diagnosis."""

import ast

import nbformat
import pytest

from minillm.study.checker import fill, judge
from minillm.study.exercise import load_exercise, load_source
from minillm.study.paths import NOTEBOOKS
from minillm.study.registry import load_questions

QUESTIONS = list(load_questions())
WRONG = [(question, wrong) for question in QUESTIONS for wrong in load_exercise(question).wrong]


def tagged(question, tag):
    """The source of the notebook's one cell with this tag."""
    cells = nbformat.read(NOTEBOOKS / f"{question}.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if tag in cell.metadata.get("tags", [])]
    return source


def checked(question, exercise_cell):
    """What the notebook's check cell shows when the exercise cell holds this text."""
    names = dict(vars(load_source(exercise_cell, f"filled_{question.replace('/', '_')}")))
    *before, last = ast.parse(tagged(question, "check")).body
    exec(compile(ast.Module(before, []), "check", "exec"), names)
    return eval(compile(ast.Expression(last.value), "check", "eval"), names)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_stub_is_not_attempted(question, monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path))
    result = checked(question, tagged(question, "exercise"))
    assert result.verdict.status == "todo"
    assert "not attempted yet" in str(result)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_notebook_filled_with_the_reference_passes(question, monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path))
    result = checked(question, fill(load_exercise(question)))
    assert result.verdict.status == "passed", str(result)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_solution_may_use_what_the_stub_imports(question):
    exercise = load_exercise(question)
    ours = [node for node in ast.parse(exercise.stub).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in ours if node.module.startswith("minillm.")]
    given = {name.name for node in ours for name in node.names}
    own = [node for node in ast.parse(fill(exercise)).body if getattr(node, "name", None) not in given]
    at = next(i for i, node in enumerate(own) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    cell = ast.unparse(ast.Module([*own[:at], *ours, *own[at:]], []))
    function = getattr(load_source(cell, f"given_{question.replace('/', '_')}"), exercise.function)
    verdict = judge(exercise, function)
    assert verdict.status == "passed", verdict


@pytest.mark.parametrize(("question", "wrong"), WRONG, ids=[f"{q}: {w.name}" for q, w in WRONG])
def test_a_wrong_version_gets_its_own_diagnosis(question, wrong):
    exercise = load_exercise(question)
    module = load_source(fill(exercise, wrong), f"wrong_{question.replace('/', '_')}")
    verdict = judge(exercise, getattr(module, exercise.function))
    assert verdict.status == "failed", verdict
    assert verdict.diagnosis == wrong.diagnosis
    assert verdict.wrong == wrong.name


@pytest.mark.parametrize("question", QUESTIONS)
def test_calling_the_reference_is_not_solving(question):
    exercise = load_exercise(question)
    module = __import__(f"minillm.{exercise.module.replace('/', '.')}", fromlist=["_"])
    reference = getattr(module, exercise.function)
    for function in (reference, lambda *args, **kwargs: reference(*args, **kwargs)):
        assert judge(exercise, function).status == "invalid"


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_has_enough_wrong_versions(question):
    exercise = load_exercise(question)
    assert len(exercise.wrong) >= 5
    assert len(exercise.wrong) + len(exercise.also_wrong) >= 10
    assert exercise.hints
