"""The questions, read from `answers/`: the only list there is. A malformed answer file is refused.

`answers/<area>/<topic>.md` (front matter and English answer) and `answers/<area>/<topic>.zh.md` (Chinese
answer) make the question `<area>/<topic>`. Paths with a part that starts with a dot are not looked at.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import yaml

from minillm.study.answer_file import Answer, AnswerError, AnswerFile, compare, read_answer
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
            file = AnswerFile(answers, question.path)
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
    file = AnswerFile(path.parents[1], path)
    return "\n".join(file.lines[file.front_end :]).strip() + "\n"


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
    file = AnswerFile(answers, answers / area / f"{topic}.md")
    chinese = answers / area / f"{topic}.zh.md"
    front = _read_front_matter(file, answers.parent / "minillm")
    english = read_answer(file, "en")
    if not chinese.is_file():
        raise file.error(1, f"the Chinese file {chinese.name} is missing")
    zh_file = AnswerFile(answers, chinese)
    translated = read_answer(zh_file, "zh")
    compare(zh_file, english, translated)
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


def _read_front_matter(file: AnswerFile, package: Path) -> dict[str, Any]:
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


def _read_yaml(file: AnswerFile) -> tuple[yaml.Node | None, Any]:
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
    file: AnswerFile, node: yaml.Node | None, keys: tuple[str, ...], line: int, prefix: str = ""
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
