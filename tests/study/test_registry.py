"""The registry reads valid answer files whole and refuses every malformed one by file, line and reason."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from answer_tree import EN, FRONT, ZH, write_question
from minillm.study import answer_file, registry
from minillm.study.registry import AnswerError, UnknownQuestion, find, load_question, load_questions, nearest

ID = "attention/flash"
LINK = "[paper, section 3.1](https://arxiv.org/abs/2205.14135)"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    write_question(tmp_path, ID)
    return tmp_path / "answers"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} must occur once in {path.name}"
    path.write_text(text.replace(old, new), encoding="utf-8", newline="\n")


def line_of(path: Path, text: str) -> int:
    """The line on which this text starts."""
    before, found, _ = path.read_text(encoding="utf-8").partition(text)
    assert found
    return before.count("\n") + 1


# --- what a valid question gives ---


def test_every_part_of_a_question(answers: Path) -> None:
    question = load_questions(answers)[ID]
    assert (question.id, question.area, question.order, question.level) == (ID, "attention", 1, "core")
    assert question.minutes == 30
    assert question.aliases == ("tiling", "online softmax")
    assert question.seeds == ("A1", "B11")
    assert question.modules == (ID,)
    assert question.en == "Why is flash attention faster?"
    assert question.zh == "为什么更快？"
    assert question.path == answers / "attention" / "flash.md"
    assert list(question.answers) == ["en", "zh"]


def test_every_part_of_an_answer(answers: Path) -> None:
    answer = load_question(ID, answers).answers["en"]
    assert answer.short == "It never writes the score matrix."
    assert answer.full.startswith("1. **It is exact.**")
    assert answer.full.endswith(f"{LINK}.")
    assert [point.lead for point in answer.key_points] == ["It is exact.", "Blocks stay in fast memory."]
    # an item comes without its number and its indent, what it holds kept line by line
    assert answer.key_points[1].text == (
        f"**Blocks stay in fast memory.** A list inside an item:\n- reads each key once {LINK}."
    )
    assert answer.numbers.startswith("The score matrix of 4,096")
    assert answer.numbers.endswith("32\n```")
    assert [(f.question, f.answer) for f in answer.follow_ups] == [
        ("What does the backward pass keep?", "Output and log-sum-exp."),
        ("Is it always faster?", "Not for short sequences."),
    ]
    assert len(answer.wrong_answers) == 1
    assert answer.wrong_answers[0].startswith('**"It is an approximation."** It is exact.')
    assert answer.sources == ("[FlashAttention](https://arxiv.org/abs/2205.14135)",)


def test_the_chinese_answer(answers: Path) -> None:
    answer = load_question(ID, answers).answers["zh"]
    assert answer.short == "从不写出分数矩阵。"
    assert [point.lead for point in answer.key_points] == ["结果是精确的。", "分块留在片上内存"]
    assert [f.question for f in answer.follow_ups] == ["反向传播保留什么？", "总是更快吗？"]


def test_doctests_are_ready_to_run(answers: Path) -> None:
    (code,) = answer_file.doctests(load_question(ID, answers).answers["en"].numbers)
    (example,) = doctest.DocTestParser().get_examples(code)
    # the closing fence must not become part of the expected output
    assert (example.source, example.want) == ("4096 * 4096 * 2 // 2**20\n", "32\n")


def test_an_indented_block_loses_its_indent(answers: Path) -> None:
    edit(
        answers / "attention/flash.md",
        "```python\n>>> 4096 * 4096 * 2 // 2**20\n32\n```",
        "- here:\n\n  ```python\n  >>> 4096 * 4096 * 2 // 2**20\n  32\n  ```",
    )
    (code,) = answer_file.doctests(load_question(ID, answers).answers["en"].numbers)
    assert code == ">>> 4096 * 4096 * 2 // 2**20\n32\n"


def test_a_lead_over_two_lines_with_code(answers: Path) -> None:
    edit(answers / "attention/flash.md", "**It is exact.** The", "**It is exact: `a**b` and\n   `c**d` agree.** The")
    point = load_question(ID, answers).answers["en"].key_points[0]
    assert point.lead == "It is exact: `a**b` and `c**d` agree."


@pytest.mark.parametrize(
    "link",
    [
        "[`flash.py`](../../minillm/attention/flash.py)",
        "[round](https://en.wikipedia.org/wiki/Roofline_(model))",
        '[titled](https://arxiv.org/abs/2205.14135 "FlashAttention")',
        "[b](y.md), [a [1]](x.md)",
        "([in brackets](x.md)).",
        "[two lines](x.md)\n   [second](y.md)",
    ],
)
def test_forms_of_the_last_link(answers: Path, link: str) -> None:
    edit(answers / "attention/flash.md", f"{LINK}.", link)
    assert load_question(ID, answers).answers["en"].key_points[1].text.endswith(link.split("\n   ")[-1])


def test_what_an_item_holds_keeps_its_indent(answers: Path) -> None:
    edit(
        answers / "attention/flash.md",
        "   - reads each",
        "   - one:\n\n     ```text\n       x\n     ```\n   - reads each",
    )
    text = load_question(ID, answers).answers["en"].key_points[1].text
    assert "\n- one:\n\n  ```text\n    x\n  ```\n- reads each key once" in text


@pytest.mark.parametrize("before", ["分块", "分块。", "KV-cache", "`x**y`", "(a)", "“分块”", "why?"])
@pytest.mark.parametrize("after", ["留在", " 留在", "（留在", "：留在", "stays", "\n   stays", "1"])
def test_a_bold_lead_is_one_that_markdown_sees(answers: Path, before: str, after: str) -> None:
    start = f"**{before}**{after}"
    edit(answers / "attention/flash.zh.md", "**分块留在片上内存** 每个", f"{start} 每个")
    if MarkdownIt().render(start).startswith("<p><strong>"):
        assert load_question(ID, answers).answers["zh"].key_points[1].lead == before
    else:
        with pytest.raises(AnswerError, match=r"flash\.zh\.md:8: markdown does not end the bold phrase"):
            load_question(ID, answers)


def test_headings_and_items_inside_code_are_code(answers: Path) -> None:
    for name in ("flash.md", "flash.zh.md"):
        edit(answers / "attention" / name, "32\n```", "32\n>>> 1  # one\n1\n# a comment\n## Sources\n1. no item\n```")
    answer = load_question(ID, answers).answers["en"]
    assert "## Sources\n1. no item" in answer.numbers
    assert len(answer.sources) == 1
    # a fence of four is not closed by three
    edit(answers / "attention/flash.md", "Output and log-sum-exp.", "````\n```\n### no question\n````")
    assert len(load_question(ID, answers).answers["en"].follow_ups) == 2


def test_windows_line_ends_and_byte_order_mark(answers: Path) -> None:
    plain = load_question(ID, answers)
    for name in ("flash.md", "flash.zh.md"):
        path = answers / "attention" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_question(ID, answers) == plain


def test_both_yaml_loaders_give_the_same(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = load_questions(answers)
    monkeypatch.setattr(registry, "_Loader", yaml.SafeLoader)
    assert load_questions(answers) == fast
    edit(answers / "attention/flash.md", "order: 1\n", "order: [1\n")
    with pytest.raises(AnswerError, match=r"flash\.md:\d: the front matter is not YAML"):
        load_questions(answers)


def test_questions_come_in_order_of_study(tmp_path: Path) -> None:
    for order, id in ((2, "attention/b"), (10, "attention/a"), (1, "architecture/a"), (1, "position/z")):
        write_question(tmp_path, id, order=order)
    # areas as in AREAS, not by name; order by number, neither by name nor as text
    assert list(load_questions(tmp_path / "answers")) == ["attention/b", "attention/a", "position/z", "architecture/a"]


def test_other_files_are_not_questions(answers: Path) -> None:
    (answers / "attention" / "flash.py").write_text("raise SystemExit", encoding="utf-8")
    (answers / "attention" / ".ipynb_checkpoints").mkdir()
    (answers / "attention" / ".ipynb_checkpoints" / "flash-checkpoint.md").write_text("", encoding="utf-8")
    (answers / "attention" / "._flash.md").write_bytes(b"\x00\xff")
    assert list(load_questions(answers)) == [ID]


def test_one_question_is_read_without_the_others(answers: Path) -> None:
    write_question(answers.parent, "attention/broken", order=2).write_text("", encoding="utf-8")
    assert load_question(ID, answers).id == ID
    with pytest.raises(AnswerError, match=r"broken\.md"):
        load_questions(answers)


def test_markdown_is_the_file_without_front_matter(answers: Path) -> None:
    question = load_question(ID, answers)
    assert registry.markdown(question) == EN.strip() + "\n"
    assert registry.markdown(question, "zh") == ZH.strip() + "\n"


def test_the_repository_reads() -> None:
    questions = load_questions()
    assert questions
    for id, question in questions.items():
        assert question.id == id
        assert load_question(id) == question


def test_import_is_light() -> None:
    code = "import sys, minillm.study.registry; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "minillm.study.registry" in modules
    assert not {"torch", "numpy", "IPython", "sqlite3", "fsrs", "markdown_it"} & set(modules)


# --- refusals: (name, file, old, new, text on whose line the error must be, message) ---

CASES = [
    # front matter
    ("no front matter", "", FRONT, "", 1, "front matter is missing"),
    ("open front matter", "", "modules: [attention/flash]\n---\n", "modules: [attention/flash]\n", 1, "no closing ---"),
    (
        "unknown key",
        "",
        "level: core",
        "level: core\ntags: [x]",
        "tags",
        "unknown key tags; the keys are question, order",
    ),
    ("missing key", "", "minutes: 30\n", "", None, "key minutes is missing"),
    ("key twice", "", "level: core", "level: core\norder: 1", "order: 1\nminutes", "key order is there twice"),
    ("not a mapping", "", FRONT, "---\n- a\n---\n", None, "`key: value` pairs are wanted here"),
    ("empty", "", FRONT, "---\n---\n", None, "`key: value` pairs are wanted here"),
    ("no YAML", "", "level: core", "level: [core", None, "the front matter is not YAML"),
    ("impossible date", "", "order: 1", "order: 2026-13-45", None, "the front matter is not YAML"),
    ("order as text", "", "order: 1", 'order: "1"', "order", "order must be a whole number from 1, got '1'"),
    ("order true", "", "order: 1", "order: true", "order", "order must be a whole number from 1, got True"),
    ("order 0", "", "order: 1", "order: 0", "order", "order must be a whole number from 1, got 0"),
    (
        "minutes a fraction",
        "",
        "minutes: 30",
        "minutes: 7.5",
        "minutes",
        "minutes must be a whole number from 1, got 7.5",
    ),
    ("level", "", "level: core", "level: easy", "level", "level must be core or advanced, got 'easy'"),
    ("level a list", "", "level: core", "level: [core]", "level", "level must be core or advanced"),
    ("aliases a text", "", "[tiling, online softmax]", "tiling", "aliases", "aliases must be a list of words"),
    ("alias a number", "", "[tiling, online softmax]", "[4090]", "aliases", "aliases must be a list of words"),
    ("alias twice", "", "[tiling, online softmax]", "[tiling, tiling]", "aliases", "aliases names something twice"),
    ("seeds", "", "[A1, B11]", "[Q1-a]", "seeds", r"seeds must be a list such as [A1, B11]"),
    ("question a text", "", "question: {", "question: why #", "question", "keys question.en, question.zh"),
    ("no Chinese question", "", ', zh: "为什么更快？"', "", "question", "key question.zh is missing"),
    ("third language", "", 'zh: "', 'fr: x, zh: "', "question", "unknown key question.fr"),
    ("empty question", "", '"Why is flash attention faster?"', '" "', "question", "question.en must be text"),
    ("no module", "", "[attention/flash]", "[]", "modules", "modules must be a list such as"),
    ("module with .py", "", "[attention/flash]", "[attention/flash.py]", "modules", "modules must be a list such as"),
    ("module above", "", "[attention/flash]", "[../answers/x]", "modules", "modules must be a list such as"),
    ("module of another case", "", "[attention/flash]", "[attention/Flash]", "modules", "modules must be a list such"),
    (
        "absent module",
        "",
        "[attention/flash]",
        "[attention/flash, attention/mla]",
        "modules",
        "module attention/mla does not exist: no file minillm/attention/mla.py",
    ),
    # headings
    ("missing heading", "", "## Sources\n", "", None, "heading ## Sources is missing"),
    ("extra heading", "", "## Sources", "## Notes\n\nx\n\n## Sources", "## Notes", "unknown heading ## Notes"),
    (
        "heading spelt otherwise",
        "",
        "## Short answer",
        "## Short Answer",
        "## Short A",
        "unknown heading ## Short Answer",
    ),
    ("heading twice", "", "## Sources", "## Short answer\n\nx\n\n## Sources", "## Short answer\n\nx", "is there twice"),
    ("title", "", "## Short answer", "# Flash\n\n## Short answer", "# Flash", "heading # Flash does not belong here"),
    ("small heading", "", "It never", "### Why\n\nIt never", "### Why", "heading ### Why does not belong here"),
    (
        "indented heading",
        "",
        "It never",
        "   ### Why\n\nIt never",
        "   ### Why",
        "heading ### Why does not belong here",
    ),
    ("title later", "", "Not for short", "# Well\n\nNot for short", "# Well", "heading # Well does not belong here"),
    (
        "text first",
        "",
        "\n## Short answer",
        "Hello\n\n## Short answer",
        "Hello",
        "text before the heading ## Short answer",
    ),
    ("empty section", "", "It never writes the score matrix.", "", "## Short answer", "## Short answer is empty"),
    ("open code block", "", "32\n```", "32", "```python", "this code block is never closed"),
    # full answer
    ("no list", "", "1. **It is exact.**", "**It is exact.**", "**It is exact.**", "Full answer is a list"),
    ("dashes", "", "1. **It is exact.**", "- **It is exact.**", "- **It is exact.**", "Full answer is a list"),
    ("not indented", "", "   to rounding", "to rounding", "to rounding", "are indented by 3 spaces or more"),
    ("indented by 2", "", "   to rounding", "  to rounding", "  to rounding", "are indented by 3 spaces or more"),
    ("misnumbered", "", "2. **Blocks", "3. **Blocks", "3. **Blocks", "this item is number 3, it should be 2"),
    ("no lead", "", "**It is exact.** The", "It is **exact.** The", "1. It", "must start with its lead phrase in bold"),
    (
        "open lead",
        "",
        "**It is exact.** The",
        "**It is exact. The",
        "1. **It",
        "must start with its lead phrase in bold",
    ),
    ("no link", "", LINK, "", "2. **Blocks", "this key point must end in a link"),
    ("link not last", "", f"{LINK}.", f"{LINK} and more", "2. **Blocks", "this key point must end in a link"),
    ("empty link", "", LINK, "[paper]()", "2. **Blocks", "this key point must end in a link"),
    ("link in code", "", f"{LINK}.", f"`{LINK}`", "2. **Blocks", "this key point must end in a link"),
    ("picture", "", f"{LINK}.", f"!{LINK}", "2. **Blocks", "this key point must end in a link"),
    # numbers
    ("no doctest", "", "```python", "```text", "## Say", "there is no ```python block with >>> lines here"),
    ("fence of no language", "", "```python", "```", "## Say", "there is no ```python block with >>> lines here"),
    ("no prompt", "", ">>> 4096", "4096", "```python", "this python block is no doctest"),
    # follow-ups
    (
        "text before question",
        "",
        "### What does",
        "Well.\n\n### What does",
        "Well.",
        "text before the first ### question",
    ),
    ("no question", "", "### What does the backward pass keep?", "###", "###\n", "this ### heading has no question"),
    ("no answer", "", "Not for short sequences.", "", "### Is it", "this follow-up has no answer"),
    ("no follow-up", "", EN[EN.index("### What") : EN.index("## Common")], "\n", "## Follow", "## Follow-ups is empty"),
    # wrong answers and sources
    (
        "unquoted",
        "",
        '"It is an approximation."',
        "It is an approximation.",
        "- **It is",
        "must start with the statement",
    ),
    ("wrong, no link", "", "It is exact. [notebook]", "It is exact. (notebook)", '- **"It', "must end in a link"),
    (
        "source, no link",
        "",
        "- [FlashAttention](https",
        "- FlashAttention (https",
        "- Flash",
        "a source must have a link",
    ),
    # the Chinese file
    ("zh front matter", "zh", "## 简答", "---\norder: 1\n---\n## 简答", 1, "the Chinese file has no front matter"),
    ("zh heading", "zh", "## 简答", "## Short answer", "## Short answer", "unknown heading ## Short answer"),
    ("zh missing heading", "zh", "## 追问\n", "", None, "heading ## 追问 is missing"),
    ("zh key points", "zh", "2. **分块留在片上内存** ", "   ", "## 详答", "1 key points here, 2 in the English file"),
    ("zh follow-ups", "zh", "### 总是更快吗？\n", "", "## 追问", "1 follow-ups here, 2 in the English file"),
    ("zh follow-ups more", "zh", "## 常见", "### 再问\n\n再答\n\n## 常见", "## 追问", "3 follow-ups here, 2 in"),
    (
        "zh wrong answers",
        "",
        "## Sources",
        f'- **"x"** y {LINK}\n\n## Sources',
        "## 常见",
        "1 wrong answers here, 2 in",
    ),
    (
        "zh blocks",
        "",
        "## Follow-ups",
        "```python\n>>> 1\n1\n```\n\n## Follow-ups",
        "## 数字",
        "1 python blocks here, 2 in",
    ),
    ("zh code", "zh", "4096 * 4096 * 2 //", "4096 * 4096 * 4 //", ">>> 4096", "this line must be `>>> 4096 * 4096 * 2"),
    ("zh result", "zh", "\n32\n", "\n64\n", "64\n", "this line must be `32`, as in the English file"),
    ("zh shorter code", "", "32\n```", "32\n>>> 1\n1\n```", "```\n\n## 追问", "this line must be `>>> 1`"),
    (
        "bold that markdown does not end",
        "zh",
        "**结果是精确的。** 只有",
        "**结果是精确的。**只有",
        "1. **",
        "markdown does not end the bold phrase at `。**只`: put a space after **",
    ),
]


@pytest.mark.parametrize(("language", "old", "new", "at", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refusal(answers: Path, language: str, old: str, new: str, at: str | int | None, message: str) -> None:
    load_questions(answers)  # valid before the edit
    english = answers / "attention" / "flash.md"
    chinese = english.with_suffix(".zh.md")
    if old == FRONT:
        old = english.read_text(encoding="utf-8").partition("## Short")[0].rstrip() + "\n"
    edit(chinese if language else english, old, new)
    with pytest.raises(AnswerError, match=re.escape(message)) as refusal:
        load_questions(answers)
    name, line, _ = str(refusal.value).split(":", 2)
    path = answers.parent / name
    assert path in (english, chinese)
    if at is None:  # what is missing has no line of its own: one of the file
        assert 1 <= int(line) <= len(path.read_text(encoding="utf-8").split("\n"))
    else:
        assert int(line) == (at if isinstance(at, int) else line_of(path, at))
    with pytest.raises(AnswerError, match=re.escape(message)):
        load_question(ID, answers)


HEADINGS = [h for h in EN.split("\n") if h.startswith("## ")]


@pytest.mark.parametrize("at", range(5))
def test_refuses_headings_out_of_order(answers: Path, at: int) -> None:
    head, *parts = EN.split("\n## ")
    parts[at], parts[at + 1] = parts[at + 1], parts[at]
    path = answers / "attention" / "flash.md"
    path.write_text(FRONT + "\n## ".join([head, *parts]), encoding="utf-8", newline="\n")
    message = f"heading {HEADINGS[at + 1]} is out of order: {HEADINGS[at]} comes here"
    with pytest.raises(AnswerError, match=re.escape(f"flash.md:{line_of(path, HEADINGS[at + 1])}: {message}")):
        load_questions(answers)


def test_refuses_a_missing_chinese_file(answers: Path) -> None:
    (answers / "attention" / "flash.zh.md").unlink()
    with pytest.raises(
        AnswerError, match=r"^answers/attention/flash\.md:1: the Chinese file flash\.zh\.md is missing$"
    ):
        load_questions(answers)


def test_refuses_a_missing_english_file(answers: Path) -> None:
    (answers / "attention" / "flash.md").unlink()
    with pytest.raises(
        AnswerError, match=r"^answers/attention/flash\.zh\.md:1: the English file flash\.md is missing$"
    ):
        load_questions(answers)


def test_refuses_an_unknown_area(answers: Path) -> None:
    (answers / "attention").rename(answers / "atention")
    with pytest.raises(
        AnswerError, match=r"^answers/atention/flash\.md:1: unknown area atention; the areas are attention,"
    ):
        load_questions(answers)


@pytest.mark.parametrize(
    "name", ["README.md", "attention/deep/flash.md", "attention/Flash-2.md", "attention/flash.fr.md"]
)
def test_refuses_a_file_in_no_place_of_an_answer(answers: Path, name: str) -> None:
    path = answers / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("", encoding="utf-8")
    with pytest.raises(AnswerError, match=rf"^answers/{re.escape(name)}:1: this is no place of an answer"):
        load_questions(answers)


def test_refuses_an_order_twice_in_an_area(answers: Path) -> None:
    path = write_question(answers.parent, "attention/gqa", order=1)
    line = line_of(path, "order: 1")
    with pytest.raises(AnswerError, match=rf"gqa\.md:{line}: order 1 is taken by attention/flash$"):
        load_questions(answers)
    write_question(answers.parent, "attention/gqa", order=2)
    write_question(answers.parent, "position/rope", order=1)  # another area may use the same order
    assert len(load_questions(answers)) == 3


def test_refuses_bytes_that_are_not_utf8(answers: Path) -> None:
    path = answers / "attention" / "flash.zh.md"
    line = line_of(path, "## 数字")
    path.write_bytes(path.read_bytes().replace("## 数字".encode(), "## 数字".encode("gbk")))
    with pytest.raises(AnswerError, match=rf"flash\.zh\.md:{line}: this is not UTF-8"):
        load_questions(answers)


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match="no such folder; minillm runs from a checkout"):
        load_questions(tmp_path / "answers")


# --- ids and search ---


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Six questions whose words differ; aliases, answers and leads are the same in all of them but for the edits."""
    for id, order, en, zh in (
        ("attention/flash", 1, "Why is FlashAttention fast?", "为什么 FlashAttention 节省显存？"),
        ("attention/gqa", 2, "How does GQA shrink the KV cache?", "GQA 如何减小 KV 缓存？"),
        ("position/rope", 1, "Why does RoPE carry relative position?", "旋转位置编码为什么是相对的？"),
        ("position/long_context", 2, "How do models reach long contexts?", "如何扩展上下文长度？"),
        ("distributed/zero", 1, "What do the ranks partition?", "切分了什么？"),
        ("data/cleaning", 1, "What properties has clean text, other than Zero?", "清洗有什么特点？"),
    ):
        path = write_question(tmp_path, id, order=order, en=en, zh=zh)
        if id != "attention/flash":
            edit(path, "[tiling, online softmax]", "[]")
    edit(tmp_path / "answers/distributed/zero.md", "**It is exact.**", "**Optimizer states are sharded.**")
    edit(tmp_path / "answers/data/cleaning.zh.md", "从不写出分数矩阵。", "用组内均值作基线。")
    edit(
        tmp_path / "answers/attention/gqa.md",
        "It never writes the score matrix.",
        "Unlike flash or rope, it shares heads.",
    )
    return tmp_path / "answers"


def ids(words: str, answers: Path) -> list[str]:
    return [question.id for question in find(words, answers)]


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("cleaning", "data/cleaning"),
        ("DATA/Cleaning", "data/cleaning"),
        ("long context", "position/long_context"),
        ("long-contexts", "position/long_context"),
        ("partition", "distributed/zero"),  # a word of the question
        ("optimizer shard", "distributed/zero"),  # a lead phrase; the start of a word is enough
        ("ONLINE-softmax", "attention/flash"),  # an alias
        ("ｒｏｐｅ", "position/rope"),  # full-width
        ("显存", "attention/flash"),
        ("KV缓存", "attention/gqa"),
        ("位置编码的相对性", "position/rope"),  # no run of it stands in the question
        ("组内均值", "data/cleaning"),  # the Chinese short answer
        ("how does the rope work", "position/rope"),  # common words do not decide
    ],
)
def test_find_ranks_the_right_question_first(many: Path, words: str, first: str) -> None:
    assert ids(words, many)[:1] == [first]


def test_find_ranks_by_where_the_word_stands(many: Path) -> None:
    assert ids("rope", many) == ["position/rope", "attention/gqa"]  # its id; a word of an answer
    assert ids("zero", many) == ["distributed/zero", "data/cleaning"]  # its id; a word of a question


def test_find_matches_words_not_their_middles(many: Path) -> None:
    assert "data/cleaning" not in ids("rope", many)  # p-rope-rties


def test_find_leaves_out_what_fits_less_than_half(many: Path) -> None:
    assert ids("flash heads", many) == ["attention/gqa"]  # heads is the rarer word
    assert ids("flash attention heads", many) == ["attention/flash", "attention/gqa"]


@pytest.mark.parametrize("words", ["quantum", "量子", "?!", ""])
def test_find_nothing(many: Path, words: str) -> None:
    assert find(words, many) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("attention/flsh", "attention/flash"),
        ("flash", "attention/flash"),
        ("Position/RoPE", "position/rope"),
        ("attention\\gqa", "attention/gqa"),
        ("distributed/zero3", "distributed/zero"),
        ("longcontext", "position/long_context"),
        ("data", "data/cleaning"),  # the area alone
        ("ZERO", "distributed/zero"),
        ("distributed/rope", "position/rope"),  # the wrong area
    ],
)
def test_nearest_id(many: Path, typed: str, meant: str) -> None:
    assert nearest(typed, answers=many)[0] == meant
    with pytest.raises(UnknownQuestion) as unknown:
        load_question(typed, many)
    assert unknown.value.nearest[0] == meant
    assert str(unknown.value) == f"no question {typed}; nearest: {', '.join(unknown.value.nearest)}"


def test_nearest_gives_as_many_as_asked(many: Path) -> None:
    assert [len(nearest("x", n, many)) for n in (0, 1, 3, 99)] == [0, 1, 3, 6]


def test_an_unknown_id_without_any_question(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    assert load_questions(tmp_path / "answers") == {}
    with pytest.raises(UnknownQuestion, match="there are no questions yet"):
        load_question(ID, tmp_path / "answers")


@pytest.mark.parametrize(
    "id", ["../answers/attention/flash", "attention/flash.zh", "attention/", "/etc/passwd", "attention/flash.md"]
)
def test_an_id_is_not_a_path(answers: Path, id: str) -> None:
    with pytest.raises(UnknownQuestion):
        load_question(id, answers)
