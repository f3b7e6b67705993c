"""What the widgets of one kernel share: the learner's open store, the language chosen last, and news of a change."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from minillm.study.paths import data_dir
from minillm.study.store import Store, StoreError

LANGUAGE = "language"  # the draft that keeps the choice
shown: dict[tuple[str, str], Callable[[], None]] = {}  # by kind and question: brings the newest widget up to date


@lru_cache(maxsize=1)
def _open(path: Path) -> Store:
    return Store(path)


def log() -> Store:
    """The learner's store, opened once for this kernel (opening reads every row); StoreError if it fails."""
    return _open(data_dir() / "study.db")


def language() -> str:
    """The language that the learner chose last, "en" or "zh"; "en" where none is kept or the store fails."""
    try:
        return "zh" if log().draft(LANGUAGE) == "zh" else "en"
    except StoreError:
        return "en"


def choose(language: str) -> None:
    """Keep the learner's choice, "en" or "zh"; StoreError if it could not be saved."""
    log().save_draft(LANGUAGE, language)


def refresh(question: str) -> None:
    """Bring every widget of a question up to date."""
    for key, show in list(shown.items()):
        if key[1] == question:
            show()
