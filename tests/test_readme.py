"""The table of questions in the READMEs is the one that answers/ gives."""

import importlib.util
import re
from pathlib import Path

import pytest

from minillm.study.paths import ROOT
from minillm.study.registry import AREAS, Question

SPEC = importlib.util.spec_from_file_location("tools_readme", ROOT / "tools" / "readme.py")
assert SPEC is not None
assert SPEC.loader is not None
readme = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(readme)

EMPTY = f"# Title\n\n{readme.START}\n{readme.END}\n\nThe rest.\n"


def question(id: str, *modules: str, en: str = "Why?", zh: str = "为什么？") -> Question:
    area = id.split("/")[0]
    path = ROOT / "answers" / f"{id}.md"
    return Question(id, area, 1, "core", 30, (), (), modules or (id,), en, zh, {}, path)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of two READMEs with empty tables, where there are three questions."""
    questions = [question("attention/flash", "attention/flash", "attention/naive"), question("attention/gqa")]
    questions.append(question("position/rope", en=r"Is a[i] | b \ c?", zh="相对位置？"))
    monkeypatch.setattr(readme, "load_questions", lambda answers: {q.id: q for q in questions})
    for name in readme.READMES:
        (tmp_path / name).write_text(EMPTY, encoding="utf-8", newline="\n")
    return tmp_path


def test_the_tables_of_this_repository_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_every_link_of_the_tables_leads_to_a_file() -> None:
    for name in readme.READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)]+)\)", text.partition(readme.START)[2].partition(readme.END)[0])
        assert targets
        assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_writes_what_check_accepts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--check"], root) == 1
    assert capsys.readouterr().err == (
        "README.md: the table of questions is stale; run `python tools/readme.py`\n"
        "README.zh.md: the table of questions is stale; run `python tools/readme.py`\n"
    )
    assert (root / "README.md").read_text(encoding="utf-8") == EMPTY  # check writes nothing
    assert readme.main([], root) == 0
    assert readme.main(["--check"], root) == 0
    written = {name: (root / name).read_bytes() for name in readme.READMES}
    assert readme.main([], root) == 0
    assert {name: (root / name).read_bytes() for name in readme.READMES} == written


def test_the_english_table(root: Path) -> None:
    readme.main([], root)
    assert (root / "README.md").read_text(encoding="utf-8").split("\n") == [
        "# Title",
        "",
        "<!-- questions -->",
        "",
        "### Attention",
        "",
        "| Question | Answer | Code | Minutes |",
        "|---|---|---|---:|",
        "| [Why?](notebooks/attention/flash.ipynb) "
        "| [English](answers/attention/flash.md) · [中文](answers/attention/flash.zh.md) "
        "| [flash](minillm/attention/flash.py) · [naive](minillm/attention/naive.py) | 30 |",
        "| [Why?](notebooks/attention/gqa.ipynb) "
        "| [English](answers/attention/gqa.md) · [中文](answers/attention/gqa.zh.md) "
        "| [gqa](minillm/attention/gqa.py) | 30 |",
        "",
        "### Position",
        "",
        "| Question | Answer | Code | Minutes |",
        "|---|---|---|---:|",
        r"| [Is a\[i\] \| b \\ c?](notebooks/position/rope.ipynb) "
        "| [English](answers/position/rope.md) · [中文](answers/position/rope.zh.md) "
        "| [rope](minillm/position/rope.py) | 30 |",
        "",
        "<!-- /questions -->",
        "",
        "The rest.",
        "",
    ]


def test_the_chinese_table(root: Path) -> None:
    readme.main([], root)
    text = (root / "README.zh.md").read_text(encoding="utf-8")
    assert "### 注意力" in text
    assert "| 题目 | 答案 | 代码 | 分钟 |" in text
    assert "| [相对位置？](notebooks/position/rope.ipynb) |" in text
    assert "Why?" not in text


def test_a_row_names_three_modules_at_most() -> None:
    row = readme._row(question("attention/flash", *(f"attention/m{i}" for i in range(5))), "en")
    assert [f"[m{i}]" in row for i in range(5)] == [True, True, True, False, False]


def test_every_area_has_a_name() -> None:
    assert tuple(readme.AREAS) == AREAS


@pytest.mark.parametrize(
    "text",
    ["# Title\n", readme.START, readme.END, f"{readme.END}\n{readme.START}\n", EMPTY + EMPTY, EMPTY + readme.START],
)
def test_refuses_a_readme_without_its_two_markers(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.zh.md").write_text(text, encoding="utf-8", newline="\n")
    for arguments in ([], ["--check"]):
        assert readme.main(arguments, root) == 1
        sentence = "README.zh.md: the lines <!-- questions --> and <!-- /questions --> must be there once each"
        assert sentence in capsys.readouterr().err
    assert (root / "README.zh.md").read_text(encoding="utf-8") == text
    assert (root / "README.md").read_text(encoding="utf-8") == EMPTY  # both or neither


def test_refuses_a_missing_readme(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.zh.md").unlink()
    assert readme.main([], root) == 1
    assert re.fullmatch(r".*README\.zh\.md is missing\n", capsys.readouterr().err)


def test_a_malformed_answer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main([], tmp_path) == 1
    assert "answers:1: no such folder" in capsys.readouterr().err
