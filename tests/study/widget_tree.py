"""A small checkout and a learner's folder for tests of the widgets."""

from pathlib import Path

import pytest

from answer_tree import write_question
from minillm.study import registry, session

QUESTION = "attention/flash"


def use_tree(root: Path, monkeypatch: pytest.MonkeyPatch, *ids: str) -> None:
    """Questions under root/answers are the questions, root/home is the learner's data."""
    for order, id in enumerate(ids or [QUESTION], start=1):
        write_question(root, id, order=order)
    answers, load, load_all, find = root / "answers", registry.load_question, registry.load_questions, registry.find
    monkeypatch.setattr(registry, "load_question", lambda id: load(id, answers))
    monkeypatch.setattr(registry, "load_questions", lambda _=None: load_all(answers))
    monkeypatch.setattr(registry, "find", lambda words: find(words, answers))
    monkeypatch.setenv("MINILLM_HOME", str(root / "home"))
    new_kernel()


def new_kernel() -> None:
    """Forget what one kernel keeps in memory."""
    session._open.cache_clear()
    session.shown.clear()
