"""One answer file: its parts, and what is refused. A malformed file is refused by file, line and what is missing."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

HEADINGS = {
    "en": ("Short answer", "Full answer", "Say the numbers", "Follow-ups", "Common wrong answers", "Sources"),
    "zh": ("简答", "详答", "数字", "追问", "常见错误", "出处"),
}


class AnswerError(ValueError):
    """An answer file breaks a rule; the message is `<file>:<line>: <what is missing or wrong>`."""


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


class Line(NamedTuple):
    number: int  # in its file, from 1
    text: str
    block: int  # which fenced block it belongs to, its fences included; 0 outside


class AnswerFile:
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


_FENCE = re.compile(r"(`{3,}|~{3,})([^`]*)$")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:\s+(.*?))?\s*$")
_LEAD = re.compile(r"\*\*(?=\S)((?:(?!\n\s*\n).)+?)(?<=\S)\*\*", re.DOTALL)
_LINK = re.compile(
    r"(?<!!)\[(?:[^\[\]]|\[[^\[\]]*\])+\]"  # [label], brackets allowed one deep; no picture
    r'\((?:[^()\s]|\([^()\s]*\))+(?:\s+"[^"]*")?\)'  # (target), round brackets allowed one deep
)
_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_QUOTED = re.compile(r"(\".+\"|“.+”|「.+」|『.+』)[.。!?！？]?", re.DOTALL)


class Reading(NamedTuple):
    """An answer, and what comparing it with the other language needs."""

    answer: Answer
    blocks: list[tuple[int, str]]  # line of the fence and code of each python block
    headings: list[int]  # line of each


def doctests(numbers: str) -> list[str]:
    """The code of the python blocks in *Say the numbers*, one string a block, ready for doctest."""
    return [code for _, code in _blocks(_scan(numbers.split("\n"), 1)[0])]


def read_answer(file: AnswerFile, language: str) -> Reading:
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
    return Reading(answer, blocks, [section[0].number for section in sections])


def _scan(texts: list[str], first: int) -> tuple[list[Line], int]:
    """Lines numbered from `first` that know their fenced block, and the line of a fence left open or 0."""
    lines, block, fence, opened = [], 0, "", 0
    for number, text in enumerate(texts, first):
        mark = text.strip()
        if fence:
            lines.append(Line(number, text, block))
            if mark.startswith(fence) and not mark.strip(fence[0]):  # the same sign, as many or more, alone
                fence, opened = "", 0
        elif mark.startswith(("```", "~~~")) and (match := _FENCE.match(mark)):
            block, fence, opened = block + 1, match[1], number
            lines.append(Line(number, text, block))
        else:
            lines.append(Line(number, text, 0))
    return lines, opened


def _heading(line: Line) -> re.Match[str] | None:
    """A heading: its signs # and its title."""
    return None if line.block or not line.text.lstrip().startswith("#") else _HEADING.match(line.text)


def _sections(file: AnswerFile, lines: list[Line], wanted: tuple[str, ...]) -> list[list[Line]]:
    """The lines under each wanted level-2 heading, that heading's line first."""
    sections: list[list[Line]] = []
    titles: list[str] = []
    stray: list[Line] = []
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


def _text(lines: list[Line]) -> str:
    return "\n".join(line.text for line in lines).strip("\n").rstrip()


def _items(file: AnswerFile, section: list[Line], *, numbered: bool) -> Iterator[tuple[int, str]]:
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


def _key_point(file: AnswerFile, number: int, text: str) -> KeyPoint:
    lead = _lead(file, number, text)
    if not lead:
        raise file.error(number, "this key point must start with its lead phrase in bold: `1. **Lead.** ...`")
    if not _ends_in_link(text):
        raise file.error(number, "this key point must end in a link to what backs it: `... [label](link)`")
    return KeyPoint(lead=" ".join(lead.split()), text=text)


def _wrong_answer(file: AnswerFile, number: int, text: str) -> str:
    if not _QUOTED.fullmatch(_lead(file, number, text)):
        raise file.error(number, 'a wrong answer must start with the statement: `- **"statement"** ...`')
    if not _ends_in_link(text):
        raise file.error(number, "a wrong answer must end in a link to where it is shown: `[label](link)`")
    return text


def _source(file: AnswerFile, number: int, text: str) -> str:
    if not _LINK.search(_masked(text)):
        raise file.error(number, "a source must have a link: `- [label](link)`")
    return text


def _follow_ups(file: AnswerFile, section: list[Line]) -> Iterator[FollowUp]:
    parts: list[list[Line]] = []
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


def _lead(file: AnswerFile, number: int, text: str) -> str:
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


def _blocks(lines: list[Line]) -> list[tuple[int, str]]:
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


def compare(file: AnswerFile, english: Reading, chinese: Reading) -> None:
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
