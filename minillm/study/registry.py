"""The questions, read from `answers/`: the only list there is. A malformed answer file is refused.

`answers/<area>/<topic>.md` (front matter and English answer) and `answers/<area>/<topic>.zh.md` (Chinese
answer) make the question `<area>/<topic>`. Paths with a part that starts with a dot are not looked at.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minillm.study.paths import ANSWERS

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML without its C part: same result, slower
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]

AREAS = (
    "attention",
    "position",
    "architecture",
    "data",
    "training",
    "distributed",
    "finetuning",
    "alignment",
    "inference",
    "prompting",
)
LEVELS = ("core", "advanced")
HEADINGS = {
    "en": ("Short answer", "Full answer", "Say the numbers", "Follow-ups", "Common wrong answers", "Sources"),
    "zh": ("简答", "详答", "数字", "追问", "常见错误", "出处"),
}


class AnswerError(ValueError):
    """An answer file breaks a rule; the message is `<file>:<line>: <what is missing or wrong>`."""


class UnknownQuestion(KeyError):
    """There is no question of this id; `nearest` holds the ids most like it."""

    def __init__(self, id: str, nearest: list[str]) -> None:
        super().__init__(id)
        self.id = id
        self.nearest = nearest

    def __str__(self) -> str:
        return f"no question {self.id}; " + (
            f"nearest: {', '.join(self.nearest)}" if self.nearest else "there are no questions yet"
        )


@dataclass(frozen=True)
class KeyPoint:
    """One item of the full answer."""

    lead: str  # the bold phrase it starts with, without the stars
    text: str  # the whole item in markdown, without its number


@dataclass(frozen=True)
class FollowUp:
    """What an interviewer asks next, and the answer in markdown."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """The model answer in one language; every string is markdown."""

    short: str
    full: str
    key_points: tuple[KeyPoint, ...]
    numbers: str
    follow_ups: tuple[FollowUp, ...]
    wrong_answers: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """One question with its answers."""

    id: str  # "<area>/<topic>"
    area: str
    order: int  # of study, inside the area
    level: str  # one of LEVELS
    minutes: int  # to study it
    aliases: tuple[str, ...]  # other words to find it by
    seeds: tuple[str, ...]  # where the seed documents ask it, such as "A1"
    modules: tuple[str, ...]  # paths under minillm/ without .py
    en: str
    zh: str
    answers: dict[str, Answer]  # by language, "en" and "zh"
    path: Path  # of the English file


def load_questions(answers: Path = ANSWERS) -> dict[str, Question]:
    """Every question by id, in order of study: areas in the order of AREAS, then `order`."""
    _check_names(answers)
    taken: dict[tuple[str, int], str] = {}
    questions = []
    for id in _ids(answers):
        question = _read_question(answers, id)
        twin = taken.setdefault((question.area, question.order), id)
        if twin != id:
            file = _File(answers, question.path)
            lines = (i for i, text in enumerate(file.lines, 1) if text.startswith("order:"))
            raise file.error(next(lines, 1), f"order {question.order} is taken by {twin}")
        questions.append(question)
    questions.sort(key=lambda q: (AREAS.index(q.area), q.order))
    return {question.id: question for question in questions}


def load_question(id: str, answers: Path = ANSWERS) -> Question:
    """The question of this id, reading its two files only; UnknownQuestion if there is none."""
    if id not in _ids(answers):
        raise UnknownQuestion(id, nearest(id, answers=answers))
    return _read_question(answers, id)


def nearest(id: str, n: int = 3, answers: Path = ANSWERS) -> list[str]:
    """The n ids most like this one, best first: by the whole id or by its last part, whichever is closer."""
    from difflib import SequenceMatcher

    typed = id.casefold()

    def likeness(known: str) -> float:
        pairs = [(known, typed), (known.split("/")[-1], typed.split("/")[-1])]
        return max(SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    return sorted(_ids(answers), key=lambda known: (-likeness(known), known))[:n]


def find(words: str, answers: Path = ANSWERS) -> list[Question]:
    """The questions that fit the words, best first; rare words and words of the id or an alias count most."""
    questions = list(load_questions(answers).values())
    terms = _terms(words)
    fields = [[(weight, _folded(text)) for weight, text in _searched(q)] for q in questions]
    weights = [[max(w * _fit(term, text) for w, text in field) for term in terms] for field in fields]
    known_to = [sum(map(bool, column)) for column in zip(*weights, strict=True)]
    rarity = [log(1 + len(questions) / max(1, count)) for count in known_to]
    scores = [sum(r * w for r, w in zip(rarity, row, strict=True)) for row in weights]
    covered = [sum(r for r, w in zip(rarity, row, strict=True) if w) for row in weights]
    best = max(covered, default=0)
    kept = [i for i in range(len(questions)) if best and covered[i] >= best / 2]
    return [questions[i] for i in sorted(kept, key=lambda i: (-scores[i], i))]


def markdown(question: Question, language: str = "en") -> str:
    """The answer file of this language ("en" or "zh") as it is written, without the front matter."""
    path = question.path if language == "en" else question.path.with_suffix(".zh.md")
    file = _File(path.parents[1], path)
    return "\n".join(file.lines[file.front_end :]).strip() + "\n"


def doctests(numbers: str) -> list[str]:
    """The code of the python blocks in *Say the numbers*, one string a block, ready for doctest."""
    return [code for _, code in _blocks(_scan(numbers.split("\n"), 1)[0])]


# --- search -----------------------------------------------------------------------------------------------


def _folded(text: str) -> str:
    """Lower case, full-width forms as plain ones, and spaces for - _ / ."""
    return re.sub(r"[-_/\s]+", " ", unicodedata.normalize("NFKC", text).casefold())


def _terms(words: str) -> list[str]:
    """Words to look for; a run of Chinese characters gives its pairs, since nothing separates its words."""
    terms: dict[str, None] = {}
    for run in re.findall(r"[一-鿿]+|[^\W一-鿿]+", _folded(words)):
        pairs = [run[i : i + 2] for i in range(len(run) - 1)] if "一" <= run[0] <= "鿿" else []
        terms.update(dict.fromkeys(pairs or [run]))
    return list(terms)


def _fit(term: str, text: str) -> float:
    """1 for the term as a word, 0.7 at the start of a word, 0 if neither; Chinese fits anywhere."""
    if "一" <= term[0] <= "鿿":
        return float(term in text)
    found = re.search(rf"(?<![^\W一-鿿]){re.escape(term)}", text)
    if not found:
        return 0.0
    return 1.0 if re.search(rf"(?<![^\W一-鿿]){re.escape(term)}(?![^\W一-鿿])", text) else 0.7


def _searched(question: Question) -> list[tuple[float, str]]:
    spoken = question.answers.values()
    return [
        (8, question.id),
        *[(6, alias) for alias in question.aliases],
        (4, f"{question.en} {question.zh}"),
        *[(2, point.lead) for answer in spoken for point in answer.key_points],
        *[(1, answer.short) for answer in spoken],
    ]


# --- files ------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int  # in its file, from 1
    text: str
    block: int  # which fenced block it belongs to, its fences included; 0 outside


class _File:
    """The lines of one answer file, and errors that name it."""

    def __init__(self, answers: Path, path: Path) -> None:
        self.name = path.relative_to(answers.parent).as_posix()
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as err:
            line = raw[: err.start].count(b"\n") + 1
            raise self.error(line, "this is not UTF-8; save the file as UTF-8") from None
        self.lines = text.replace("\r\n", "\n").split("\n")
        self.front_end = 0  # number of lines of front matter, both rulers included
        if self.lines[0].rstrip() == "---":
            ends = [i for i, line in enumerate(self.lines) if line.rstrip() == "---"]
            if len(ends) < 2:
                raise self.error(1, "the front matter has no closing ---")
            self.front_end = ends[1] + 1

    def error(self, line: int, what: str) -> AnswerError:
        return AnswerError(f"{self.name}:{line}: {what}")


def _check_names(answers: Path) -> None:
    """Refuses a markdown file that is not where an answer belongs, or that lacks its partner."""
    if not answers.is_dir():
        raise AnswerError(f"{answers}:1: no such folder; minillm runs from a checkout that has answers/")
    ids = _ids(answers)
    for path in _files(answers):
        name = path.relative_to(answers.parent).as_posix()
        parts = path.relative_to(answers).parts
        if len(parts) == 2 and parts[0] not in AREAS:
            raise AnswerError(f"{name}:1: unknown area {parts[0]}; the areas are {', '.join(AREAS)}")
        english = path.name.replace(".zh.md", ".md")
        if len(parts) != 2 or not re.fullmatch(r"[a-z0-9_]+\.md", english):
            form = "answers/<area>/<topic>.md or .zh.md, the topic in a-z, 0-9 and _"
            raise AnswerError(f"{name}:1: this is no place of an answer; it must be {form}")
        if f"{parts[0]}/{english.removesuffix('.md')}" not in ids:
            raise AnswerError(f"{name}:1: the English file {english} is missing")


def _files(answers: Path) -> list[Path]:
    paths = sorted(answers.rglob("*.md"))
    return [path for path in paths if not any(p.startswith(".") for p in path.relative_to(answers).parts)]


def _ids(answers: Path) -> list[str]:
    """The ids of the questions, by the names of the English files alone."""
    ids = [path.relative_to(answers).with_suffix("").as_posix() for path in _files(answers)]
    return [id for id in ids if re.fullmatch(rf"({'|'.join(AREAS)})/[a-z0-9_]+", id)]


def _read_question(answers: Path, id: str) -> Question:
    area, topic = id.split("/")
    file = _File(answers, answers / area / f"{topic}.md")
    chinese = answers / area / f"{topic}.zh.md"
    front = _read_front_matter(file, answers.parent / "minillm")
    english = _read_answer(file, "en")
    if not chinese.is_file():
        raise file.error(1, f"the Chinese file {chinese.name} is missing")
    zh_file = _File(answers, chinese)
    translated = _read_answer(zh_file, "zh")
    _compare(zh_file, english, translated)
    return Question(
        id=id,
        area=area,
        order=front["order"],
        level=front["level"],
        minutes=front["minutes"],
        aliases=tuple(front["aliases"]),
        seeds=tuple(front["seeds"]),
        modules=tuple(front["modules"]),
        en=front["question"]["en"].strip(),
        zh=front["question"]["zh"].strip(),
        answers={"en": english.answer, "zh": translated.answer},
        path=answers / area / f"{topic}.md",
    )


# --- front matter -----------------------------------------------------------------------------------------


def _read_front_matter(file: _File, package: Path) -> dict[str, Any]:
    if not file.front_end:
        raise file.error(1, "front matter is missing; the file starts with it, between two lines ---")
    node, front = _read_yaml(file)
    lines = _key_lines(file, node, ("question", *_FRONT), 1)
    within = next(value for key, value in node.value if key.value == "question")  # type: ignore[union-attr]
    spoken = _key_lines(file, within, ("en", "zh"), lines["question"], "question.")
    for key, value in front["question"].items():
        if not isinstance(value, str) or not value.strip():
            raise file.error(spoken[key], f"question.{key} must be text, got {value!r}")
    for key, (wanted, fits) in _FRONT.items():
        if not fits(front[key]):
            raise file.error(lines[key], f"{key} must be {wanted}, got {front[key]!r}")
        if isinstance(front[key], list) and len(set(front[key])) < len(front[key]):
            raise file.error(lines[key], f"{key} names something twice: {front[key]!r}")
    for module in front["modules"]:
        if not (package / f"{module}.py").is_file():
            raise file.error(lines["modules"], f"module {module} does not exist: no file minillm/{module}.py")
    return front


def _read_yaml(file: _File) -> tuple[yaml.Node | None, Any]:
    """The front matter twice: the node, which knows lines and keys that occur twice, and the value."""
    try:
        loader = _Loader("\n".join(file.lines[1 : file.front_end - 1]))
        node = loader.get_single_node()
        return node, loader.construct_document(node) if node else None
    except yaml.MarkedYAMLError as err:
        line = err.problem_mark.line + 2 if err.problem_mark else 1
        raise file.error(line, f"the front matter is not YAML: {err.problem}") from None
    except (yaml.YAMLError, ValueError) as err:  # ValueError: such as a date that does not exist
        raise file.error(1, f"the front matter is not YAML: {err}") from None


def _key_lines(
    file: _File, node: yaml.Node | None, keys: tuple[str, ...], line: int, prefix: str = ""
) -> dict[str, int]:
    """The line of each key of this mapping, which must have exactly these keys, each once."""
    known = ", ".join(prefix + key for key in keys)
    if not isinstance(node, yaml.MappingNode):
        raise file.error(line, f"`key: value` pairs are wanted here, with the keys {known}")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 2
        if key.value not in keys:
            raise file.error(line, f"unknown key {prefix}{key.value}; the keys are {known}")
        if key.value in lines:
            raise file.error(line, f"key {prefix}{key.value} is there twice")
        lines[key.value] = line
    for name in keys:
        if name not in lines:
            raise file.error(line, f"key {prefix}{name} is missing from the front matter")
    return lines


def _list_of(pattern: str, least: int = 0) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least:
            return False
        return all(isinstance(item, str) and re.fullmatch(pattern, item) for item in value)

    return fits


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


_FRONT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "order": ("a whole number from 1", _is_count),
    "level": (" or ".join(LEVELS), lambda value: value in LEVELS),
    "minutes": ("a whole number from 1", _is_count),
    "aliases": ("a list of words (in quotes if YAML takes them for something else)", _list_of(r".*\S.*")),
    "seeds": ("a list such as [A1, B11]", _list_of(r"[A-Z]\d+")),
    "modules": ("a list such as [attention/flash]", _list_of(r"[a-z0-9_]+(/[a-z0-9_]+)+", least=1)),
}


# --- the answer -------------------------------------------------------------------------------------------

_FENCE = re.compile(r"(`{3,}|~{3,})([^`]*)$")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:\s+(.*?))?\s*$")
_LEAD = re.compile(r"\*\*(?=\S)((?:(?!\n\s*\n).)+?)(?<=\S)\*\*", re.DOTALL)
_LINK = re.compile(
    r"(?<!!)\[(?:[^\[\]]|\[[^\[\]]*\])+\]"  # [label], brackets allowed one deep; no picture
    r'\((?:[^()\s]|\([^()\s]*\))+(?:\s+"[^"]*")?\)'  # (target), round brackets allowed one deep
)
_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_QUOTED = re.compile(r"(\".+\"|“.+”|「.+」|『.+』)[.。!?！？]?", re.DOTALL)


class _Read(NamedTuple):
    """An answer, and what comparing it with the other language needs."""

    answer: Answer
    blocks: list[tuple[int, str]]  # line of the fence and code of each python block
    headings: list[int]  # line of each


def _read_answer(file: _File, language: str) -> _Read:
    if language != "en" and file.front_end:
        raise file.error(1, "the Chinese file has no front matter; it stands in the English file")
    lines, unclosed = _scan(file.lines[file.front_end :], file.front_end + 1)
    if unclosed:
        raise file.error(unclosed, "this code block is never closed")
    sections = _sections(file, lines, HEADINGS[language])
    short, full, numbers, follow_ups, wrong, sources = sections
    points = [_key_point(file, *item) for item in _items(file, full, numbered=True)]
    blocks = _blocks(numbers)
    if not blocks:
        raise file.error(numbers[0].number, "there is no ```python block with >>> lines here")
    for number, code in blocks:
        if not re.search(r"^>>> ", code, re.MULTILINE):
            raise file.error(number, "this python block is no doctest: it has no >>> line")
    answer = Answer(
        short=_text(short[1:]),
        full=_text(full[1:]),
        key_points=tuple(points),
        numbers=_text(numbers[1:]),
        follow_ups=tuple(_follow_ups(file, follow_ups)),
        wrong_answers=tuple(_wrong_answer(file, *item) for item in _items(file, wrong, numbered=False)),
        sources=tuple(_source(file, *item) for item in _items(file, sources, numbered=False)),
    )
    return _Read(answer, blocks, [section[0].number for section in sections])


def _scan(texts: list[str], first: int) -> tuple[list[_Line], int]:
    """Lines numbered from `first` that know their fenced block, and the line of a fence left open or 0."""
    lines, block, fence, opened = [], 0, "", 0
    for number, text in enumerate(texts, first):
        mark = text.strip()
        if fence:
            lines.append(_Line(number, text, block))
            if mark.startswith(fence) and not mark.strip(fence[0]):  # the same sign, as many or more, alone
                fence, opened = "", 0
        elif mark.startswith(("```", "~~~")) and (match := _FENCE.match(mark)):
            block, fence, opened = block + 1, match[1], number
            lines.append(_Line(number, text, block))
        else:
            lines.append(_Line(number, text, 0))
    return lines, opened


def _heading(line: _Line) -> re.Match[str] | None:
    """A heading: its signs # and its title."""
    return None if line.block or not line.text.lstrip().startswith("#") else _HEADING.match(line.text)


def _sections(file: _File, lines: list[_Line], wanted: tuple[str, ...]) -> list[list[_Line]]:
    """The lines under each wanted level-2 heading, that heading's line first."""
    sections: list[list[_Line]] = []
    titles: list[str] = []
    stray: list[_Line] = []
    for line in lines:
        heading = _heading(line)
        if heading and len(heading[1]) == 2:
            title = heading[2] or ""
            if title not in wanted:
                known = ", ".join(f"## {name}" for name in wanted)
                raise file.error(line.number, f"unknown heading ## {title}; the headings are {known}")
            if title in titles:
                raise file.error(line.number, f"heading ## {title} is there twice")
            titles.append(title)
            sections.append([line])
            continue
        if heading and (len(heading[1]) == 1 or titles[-1:] != [wanted[3]]):
            stray.append(line)
        elif not sections and line.text.strip():
            raise file.error(line.number, f"text before the heading ## {wanted[0]}")
        if sections:
            sections[-1].append(line)
    for title in wanted:
        if title not in titles:
            raise file.error(len(file.lines), f"heading ## {title} is missing")
    for line in stray:
        allowed = f"besides the six ## headings only ### under ## {wanted[3]} is allowed"
        raise file.error(line.number, f"heading {line.text.strip()} does not belong here; {allowed}")
    for section, title, due in zip(sections, titles, wanted, strict=True):
        if title != due:
            raise file.error(section[0].number, f"heading ## {title} is out of order: ## {due} comes here")
        if not _text(section[1:]):
            raise file.error(section[0].number, f"## {title} is empty")
    return sections


def _text(lines: list[_Line]) -> str:
    return "\n".join(line.text for line in lines).strip("\n").rstrip()


def _items(file: _File, section: list[_Line], *, numbered: bool) -> Iterator[tuple[int, str]]:
    """The items of a section that is one list: line and markdown of each, without number or dash."""
    title, form = section[0].text.strip(), "1. " if numbered else "- "
    marker = re.compile(r"(\d+)\. +(?=\S)" if numbered else r"(-) +(?=\S)")
    starts: list[int] = []
    item: list[str] = []
    width = 0
    for line in section[1:]:
        start = None if line.block else marker.match(line.text)
        if start:
            if starts:
                yield starts[-1], "\n".join(item).strip()
            starts.append(line.number)
            if numbered and start[1] != str(len(starts)):
                raise file.error(line.number, f"this item is number {start[1]}, it should be {len(starts)}")
            item, width = [line.text[start.end() :]], start.end()
        elif not line.text.strip():
            item.append("")
        else:
            indent = len(line.text) - len(line.text.lstrip(" "))
            if not starts or indent < len(form):
                raise file.error(
                    line.number,
                    f"{title} is a list: an item starts with `{form}`, its further lines "
                    f"are indented by {len(form)} spaces or more",
                )
            item.append(line.text[min(indent, width) :])
    yield starts[-1], "\n".join(item).strip()


def _key_point(file: _File, number: int, text: str) -> KeyPoint:
    lead = _lead(file, number, text)
    if not lead:
        raise file.error(number, "this key point must start with its lead phrase in bold: `1. **Lead.** ...`")
    if not _ends_in_link(text):
        raise file.error(number, "this key point must end in a link to what backs it: `... [label](link)`")
    return KeyPoint(lead=" ".join(lead.split()), text=text)


def _wrong_answer(file: _File, number: int, text: str) -> str:
    if not _QUOTED.fullmatch(_lead(file, number, text)):
        raise file.error(number, 'a wrong answer must start with the statement: `- **"statement"** ...`')
    if not _ends_in_link(text):
        raise file.error(number, "a wrong answer must end in a link to where it is shown: `[label](link)`")
    return text


def _source(file: _File, number: int, text: str) -> str:
    if not _LINK.search(_masked(text)):
        raise file.error(number, "a source must have a link: `- [label](link)`")
    return text


def _follow_ups(file: _File, section: list[_Line]) -> Iterator[FollowUp]:
    parts: list[list[_Line]] = []
    for line in section[1:]:
        heading = _heading(line)
        if heading and len(heading[1]) == 3:
            parts.append([line])
        elif parts:
            parts[-1].append(line)
        elif line.text.strip():
            raise file.error(line.number, f"text before the first ### question of {section[0].text.strip()}")
    for part in parts:
        question, answer = part[0].text.strip().lstrip("#").strip(), _text(part[1:])
        if not question:
            raise file.error(part[0].number, "this ### heading has no question")
        if not answer:
            raise file.error(part[0].number, "this follow-up has no answer under it")
        yield FollowUp(question, answer)


def _masked(text: str) -> str:
    """The text with code turned to x, as long as it was, so that no rule looks inside code."""
    return _CODE.sub(lambda span: "x" * len(span[0]), text) if "`" in text else text


def _lead(file: _File, number: int, text: str) -> str:
    """The bold phrase at the start, "" without one; refused if markdown would show its stars."""
    lead = _LEAD.match(_masked(text))
    if not lead:
        return ""
    before, after = text[lead.end(1) - 1], text[lead.end() : lead.end() + 1]
    if after and not after.isspace() and _is_sign(before) and not _is_sign(after):
        raise file.error(number, f"markdown does not end the bold phrase at `{before}**{after}`: put a space after **")
    return text[lead.start(1) : lead.end(1)]


def _is_sign(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"


def _ends_in_link(text: str) -> bool:
    links = list(_LINK.finditer(_masked(text)))
    return bool(links) and not text[links[-1].end() :].strip(" \n.,;)。，；）")


def _blocks(lines: list[_Line]) -> list[tuple[int, str]]:
    """The fenced python blocks: line of the fence, and the code without the fence's indent."""
    blocks = []
    for block in dict.fromkeys(line.block for line in lines if line.block):
        fence, *code = (line for line in lines if line.block == block)
        mark = _FENCE.match(fence.text.strip())
        if mark and mark[2].split()[:1] == ["python"]:
            indent = len(fence.text) - len(fence.text.lstrip())
            texts = [re.sub(rf"^ {{0,{indent}}}", "", line.text).rstrip() for line in code[:-1]]
            blocks.append((fence.number, "".join(f"{text}\n" for text in texts)))
    return blocks


def _compare(file: _File, english: _Read, chinese: _Read) -> None:
    """Refuses a Chinese answer that does not hold the same parts and the same numbers as the English one."""
    one, other = english.answer, chinese.answer
    for heading, what, wanted, given in (
        (1, "key points", len(one.key_points), len(other.key_points)),
        (2, "python blocks", len(english.blocks), len(chinese.blocks)),
        (3, "follow-ups", len(one.follow_ups), len(other.follow_ups)),
        (4, "wrong answers", len(one.wrong_answers), len(other.wrong_answers)),
    ):
        if wanted != given:
            raise file.error(chinese.headings[heading], f"{given} {what} here, {wanted} in the English file")
    for (_, code), (number, zh_code) in zip(english.blocks, chinese.blocks, strict=True):
        for i, (text, zh_text) in enumerate(zip_longest(code.split("\n"), zh_code.split("\n"), fillvalue=""), 1):
            if text != zh_text:
                raise file.error(number + i, f"this line must be `{text}`, as in the English file")
