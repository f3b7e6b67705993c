"""Writes the table of questions into README.md and README.zh.md; `--check` only says whether it is up to date."""

import argparse
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from minillm.study.paths import ROOT
from minillm.study.registry import AnswerError, Question, load_questions

MODULES = 3  # of a question, in a row of the table
START, END = "<!-- questions -->", "<!-- /questions -->"
READMES = {"README.md": "en", "README.zh.md": "zh"}
HEADS = {
    "en": ("Question", "Answer", "Code", "Minutes"),
    "zh": ("题目", "答案", "代码", "分钟"),
}
AREAS = {
    "attention": ("Attention", "注意力"),
    "position": ("Position", "位置编码"),
    "architecture": ("Architecture", "模型结构"),
    "data": ("Data", "数据"),
    "training": ("Training", "训练"),
    "distributed": ("Distributed", "分布式"),
    "finetuning": ("Fine-tuning", "微调"),
    "alignment": ("Alignment", "对齐"),
    "inference": ("Inference", "推理"),
    "prompting": ("Prompting", "提示词"),
}


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrites the tables, or with --check compares only; 1 if one is stale or can not be made, else 0."""
    parser = argparse.ArgumentParser(prog="tools/readme.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a table is stale")
    check = parser.parse_args(argv).check
    try:
        questions = load_questions(root / "answers")
        texts = {name: (root / name).read_text(encoding="utf-8") for name in READMES}
        fresh = {name: replaced(text, name, questions.values(), READMES[name]) for name, text in texts.items()}
    except FileNotFoundError as error:
        print(f"{error.filename} is missing", file=sys.stderr)
        return 1
    except (AnswerError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    stale = [name for name in READMES if fresh[name] != texts[name]]
    for name in stale:
        if check:
            print(f"{name}: the table of questions is stale; run `python tools/readme.py`", file=sys.stderr)
        else:
            (root / name).write_text(fresh[name], encoding="utf-8", newline="\n")
            print(f"{name}: table of questions written")
    return 1 if check and stale else 0


def replaced(text: str, name: str, questions: Iterable[Question], language: str) -> str:
    """The README's text with a fresh table between its markers; ValueError unless each marker is there once."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"{name}: the lines {START} and {END} must be there once each, in this order")
    before, rest = text.split(START)
    return f"{before}{START}\n{table(questions, language)}\n{END}{rest.split(END)[1]}"


def table(questions: Iterable[Question], language: str) -> str:
    """One table for each area that has questions, in markdown; links are relative to the README."""
    question, answer, code, minutes = HEADS[language]
    lines = []
    for area, group in groupby(questions, key=lambda q: q.area):
        lines += ["", f"### {AREAS[area][language == 'zh']}", ""]
        lines += [f"| {question} | {answer} | {code} | {minutes} |", "|---|---|---|---:|"]
        lines += [_row(q, language) for q in group]
    return "\n".join([*lines, ""])


def _row(question: Question, language: str) -> str:
    asked = question.zh if language == "zh" else question.en
    for sign in ("\\", "|", "[", "]"):
        asked = asked.replace(sign, "\\" + sign)
    notebook = f"[{asked}](notebooks/{question.id}.ipynb)"
    answers = f"[English](answers/{question.id}.md) · [中文](answers/{question.id}.zh.md)"
    shown = question.modules[:MODULES]  # the notebook names them all
    modules = " · ".join(f"[{module.split('/')[-1]}](minillm/{module}.py)" for module in shown)
    return f"| {notebook} | {answers} | {modules} | {question.minutes} |"


if __name__ == "__main__":
    sys.exit(main())
