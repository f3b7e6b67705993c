"""What notebooks call: begin, source, claim, predict, followups, wrong_answers."""

import inspect
import re

import matplotlib
import pytest
import torch

from minillm.study import notebook, registry
from minillm.study.language import WORDS
from minillm.study.notebook import COLORS, STYLE, begin, claim, followups, predict, source, wrong_answers
from widget_tree import QUESTION, new_kernel, use_tree


@pytest.fixture(autouse=True)
def _tree(tmp_path, monkeypatch):
    use_tree(tmp_path, monkeypatch)
    with matplotlib.rc_context():
        yield
    new_kernel()


@pytest.fixture
def outputs(monkeypatch):
    """What a cell would show."""
    shown = []
    monkeypatch.setattr(notebook, "display", lambda data, raw: shown.append(data))
    return shown


def test_begin_shows_question_answer_modules_and_test(outputs):
    begin(QUESTION)
    (data,) = outputs
    assert data["text/plain"] == "Why is flash attention faster?\n为什么更快？"
    assert re.findall('href="([^"]+)"', data["text/html"]) == [
        "../../answers/attention/flash.md",
        "../../answers/attention/flash.zh.md",
        "../../minillm/attention/flash.py",
        "../../tests/attention/test_flash.py",
    ]


def test_begin_seeds_torch(outputs):
    begin(QUESTION)
    first = torch.rand(3)
    begin(QUESTION)
    assert torch.equal(torch.rand(3), first)


def test_begin_takes_the_device_that_is_asked_for(outputs, monkeypatch):
    monkeypatch.setenv("MINILLM_DEVICE", "meta")
    assert begin(QUESTION) == torch.device("meta")


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_begin_takes_cuda_where_there_is_one(outputs, monkeypatch, there, device):
    monkeypatch.delenv("MINILLM_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert begin(QUESTION) == torch.device(device)


@pytest.mark.parametrize(
    ("setting", "cores", "threads"), [(None, 16, [4]), (None, 4, [2]), (None, 1, [1]), ("3", 16, [])]
)
def test_begin_caps_threads_unless_the_environment_does(outputs, monkeypatch, setting, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    taken = []
    monkeypatch.setattr(notebook.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    begin(QUESTION)
    assert taken == threads


def test_begin_sets_the_look_of_figures(outputs):
    begin(QUESTION)
    assert {key: matplotlib.rcParams[key] for key in STYLE if key != "figure.figsize"} == {
        key: value for key, value in STYLE.items() if key != "figure.figsize"
    }
    assert tuple(matplotlib.rcParams["figure.figsize"]) == STYLE["figure.figsize"]


def test_begin_refuses_an_unknown_question(outputs):
    with pytest.raises(registry.UnknownQuestion):
        begin("attention/flsh")
    assert outputs == []


def test_every_method_has_its_own_colour():
    assert len(set(COLORS.values())) == len(COLORS)
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in COLORS.values())


def test_source_is_the_librarys_own_text(outputs):
    source(registry.nearest)
    (data,) = outputs
    text = inspect.getsource(registry.nearest)
    assert data["text/plain"] == f"# minillm/study/registry.py\n{text}"
    assert data["text/markdown"] == f"`minillm/study/registry.py`\n````python\n{text}````\n"


def test_source_looks_through_decorators(outputs):
    import functools

    @functools.wraps(registry.nearest)
    def wrapped(*args):
        return registry.nearest(*args)

    source(wrapped)
    assert outputs[0]["text/plain"] == f"# minillm/study/registry.py\n{inspect.getsource(registry.nearest)}"


def test_claim_prints_what_holds(capsys):
    claim("two is less than three", torch.tensor(2) < 3)
    assert capsys.readouterr().out == "✓ two is less than three\n"


def test_claim_stops_at_what_does_not_hold(capsys):
    with pytest.raises(AssertionError, match=r"^three is less than two$"):
        claim("three is less than two", torch.tensor(3) < 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", [("one", "two"), (True, "one")])
def test_claim_refuses_text_as_a_condition(given):
    with pytest.raises(TypeError, match="the statement first"):
        claim(*given)


class TestPredict:
    def test_the_answer_is_shown_after_a_guess(self):
        shown = predict("How many bytes?", 2**20, "bytes")
        shown.guess.value = "524,288"
        shown.compare()
        assert "1,048,576 bytes; your guess is 0.5 times that." in shown.result.value

    @pytest.mark.parametrize("guess", ["", "many", "nan", "inf"])
    def test_no_number_no_answer(self, guess):
        shown = predict("How many bytes?", 2**20)
        shown.guess.value = guess
        shown.compare()
        assert WORDS["en"]["number"] in shown.result.value
        assert "1,048,576" not in shown.result.value

    @pytest.mark.parametrize("guess", ["1e6", "1 000 000", "1_000_000", "1,000,000.0"])
    def test_numbers_as_people_write_them(self, guess):
        shown = predict("How many?", 2_000_000)
        shown.guess.value = guess
        shown.compare()
        assert "0.5 times" in shown.result.value

    def test_an_answer_of_zero_has_no_ratio(self):
        shown = predict("What is the gradient there?", 0.0)
        shown.guess.value = "1"
        shown.compare()
        assert ">0<" in shown.result.value

    def test_saved_output_has_the_answer_folded(self):
        data = predict("Is a < b? By what factor?", 0.123456, "times")._repr_mimebundle_()
        assert data["text/plain"] == "Is a < b? By what factor?\n0.1235 times"
        assert "<details><summary>Answer</summary>0.1235 times</details>" in data["text/html"]
        assert "a &lt; b" in data["text/html"]


def test_followups_are_folded_in_both_languages(outputs):
    followups(QUESTION)
    (data,) = outputs
    assert data["text/plain"] == "- What does the backward pass keep?\n- Is it always faster?"
    english, chinese = data["text/html"].split("<details><summary>中文</summary>")
    assert "<summary><b>Is it always faster?</b></summary><blockquote><p>Not for short sequences.</p>" in english
    assert "<summary><b>总是更快吗？</b></summary>" in chinese
    assert data["text/html"].count("<details>") == data["text/html"].count("</details>") == 5


def test_wrong_answers_show_the_statement_and_fold_the_reason(outputs):
    wrong_answers(QUESTION)
    html = outputs[0]["text/html"]
    assert "<summary><b>&quot;It is an approximation.&quot;</b></summary><blockquote><p>It is exact." in html
    assert 'href="flash.ipynb#equal"' in html
    assert "“它是近似算法。”" in html
