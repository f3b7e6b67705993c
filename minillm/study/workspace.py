"""The learner's notebooks: copies of `notebooks/` in `work/`, brought up to date without losing a line of theirs.

`sync` merges each notebook cell by cell (cells are known by their id) from three versions: the learner's, the new one,
and the one that both come from, kept in `work/.base`:

- exercise cells that were edited, and cells that the learner added, stay as they are;
- a cell that only we changed is replaced, outputs included; one that only the learner changed stays;
- a cell that both changed is there twice: the learner's, and below it the new one, marked;
- a cell that we removed goes, unless the learner edited it;
- a cell that the learner deleted stays deleted until we change its text;
- outputs stay for as long as the text stays.

Before a file is overwritten it is copied to `work/.history`. A second run writes nothing.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from minillm.study import session
from minillm.study.exercise import load_stub, marker
from minillm.study.merge import Cell, Notebook, by_id, dump, is_exercise, merge, parse, text, texts
from minillm.study.paths import ANSWERS, NOTEBOOKS, WORK
from minillm.study.store import Store


class WorkspaceError(RuntimeError):
    """A notebook of the learner can not be changed as asked; one sentence that names the file and what to do."""


def sync(notebooks: Path = NOTEBOOKS, work: Path = WORK) -> list[str]:
    """Brings the learner's copies up to date; one sentence for each file that changed or could not be changed."""
    if not notebooks.is_dir():
        raise WorkspaceError(f"there is no folder {notebooks}: the checkout is not complete")
    names = {path.relative_to(root) for root in (notebooks, work / ".base") for path in root.rglob("*.ipynb")}
    said = []
    for name in sorted(names):
        if not any(part.startswith(".") for part in name.parts):  # .ipynb_checkpoints
            try:
                said += [f"{work.name}/{name.as_posix()}: {what}" for what in _sync_one(name, notebooks, work)]
            except OSError as error:
                said.append(f"{work.name}/{name.as_posix()}: not brought up to date, it is as it was: {error}")
    return said


def reset(question: str, *, work: Path = WORK, answers: Path = ANSWERS, log: Store | None = None) -> str:
    """Puts the stub back in the exercise cell of the file; what happened, in a sentence.

    The present code is kept first, among the attempts and as a file in `work/.history`. A page that shows the notebook
    must be loaded again; there the buttons below `check` do the same at once. WorkspaceError, StoreError.
    """
    stub = load_stub(question, answers).rstrip("\n")
    return _put(question, lambda present: stub, "the stub", work, stub, log)


def restore(
    question: str, which: int = -1, *, work: Path = WORK, answers: Path = ANSWERS, log: Store | None = None
) -> str:
    """Puts earlier code back in the exercise cell of the file, as `reset` does with the stub.

    `which` counts the different codes that were kept, oldest first, without the present one; -1 is the last.
    """
    stub = load_stub(question, answers).rstrip("\n")

    def earlier(present: str) -> str:
        codes = [code for code in kept(question, stub, log) if code != present]
        try:
            return codes[which]
        except IndexError:
            raise WorkspaceError(
                f"{question} has {len(codes)} earlier versions of your code, got which={which}"
            ) from None

    return _put(question, earlier, "your earlier code", work, stub, log)


def kept(question: str, stub: str, log: Store | None = None) -> list[str]:
    """The learner's different codes for a question, without the stub, the latest last. StoreError."""
    codes: dict[str, None] = {}
    for event in (log or session.log()).events("attempt", question):
        code = str(event.data["code"]).rstrip()
        if code and code != stub.rstrip():
            codes.pop(code, None)
            codes[code] = None
    return list(codes)


def keep(question: str, code: str, stub: str, log: Store | None = None) -> None:
    """Keeps code that is about to be replaced among the attempts, verdict "kept", unless it is there. StoreError."""
    code = code.rstrip()
    if code not in ("", stub.rstrip(), *kept(question, stub, log)):
        data = {"code": code, "verdict": "kept", "diagnosis": None, "path": None}
        (log or session.log()).append("attempt", question, data)


# The file


def _put(question: str, choose: Callable[[str], str], what: str, work: Path, stub: str, log: Store | None) -> str:
    path = work / f"{question}.ipynb"
    if not path.is_file():
        raise WorkspaceError(f"{path} does not exist; `python start.py` makes it")
    data = path.read_bytes()
    notebook = parse(data)
    if notebook is None:
        raise WorkspaceError(f"{path} is not a notebook; `python start.py` moves it aside and makes a new one")
    cell = _exercise_cell(notebook, question)
    if cell is None:
        raise WorkspaceError(f"{path} has no exercise cell: no cell begins with {marker(question)!r}")
    present = text(cell).rstrip()
    code = choose(present)
    if code == present:
        return f"{path}: the exercise cell holds {what} already."
    keep(question, present, stub, log)
    _to_history(work, path.relative_to(work), data)
    cell["source"] = code.splitlines(keepends=True)
    _write(path, dump(notebook))
    return f"{path}: the exercise cell holds {what} again; what was there is kept. Reload the page if it is open."


def _exercise_cell(notebook: Notebook, question: str) -> Cell | None:
    cells = [cell for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    marked = [cell for cell in cells if marker(question) in text(cell).splitlines()]
    tagged = [cell for cell in cells if is_exercise(cell)]
    return next(iter([cell for cell in marked if is_exercise(cell)] or marked or tagged), None)


def _sync_one(name: Path, notebooks: Path, work: Path) -> list[str]:
    """What was done with one notebook. The base is written last: an interrupted run is done again with the same end."""
    base_file, own_file = work / ".base" / name, work / name
    theirs, base, mine = (_read(file) for file in (notebooks / name, base_file, own_file))
    if theirs is None:
        return _removed(name, work, base, mine)
    their_notebook = parse(theirs)
    if their_notebook is None or len(by_id(their_notebook)) != len(their_notebook["cells"]):
        return [f"not brought up to date: {notebooks / name} is not a notebook whose cells have ids"]
    my_notebook = parse(mine) if mine is not None else None
    if my_notebook is None:
        said = "new" if base is None else "it was gone; this is a new copy"
        if mine is not None:
            aside = _to_history(work, name, mine)
            said = f"it was not a notebook, and is now {aside.relative_to(work).as_posix()}; this is a new copy"
        _write(own_file, theirs)
        _write(base_file, theirs)
        return [said]
    if theirs == base:
        return []
    merged, said = merge(parse(base or b"") or {"cells": []}, their_notebook, my_notebook)
    if merged != my_notebook:
        assert mine is not None
        _to_history(work, name, mine)
        _write(own_file, dump(merged))
    _write(base_file, theirs)
    return [said] if merged != my_notebook else []


def _removed(name: Path, work: Path, base: bytes | None, mine: bytes | None) -> list[str]:
    """The notebook is no longer ours: an unedited copy goes to the history, an edited one becomes the learner's own."""
    said = []
    before, now = parse(base or b""), parse(mine or b"")
    if mine is not None:
        said = ["no longer part of minillm; your copy stays, because you changed it"]
        if before and now and texts(before) == texts(now):
            aside = _to_history(work, name, mine)
            (work / name).unlink()
            said = [f"no longer part of minillm; your unchanged copy is now {aside.relative_to(work).as_posix()}"]
    (work / ".base" / name).unlink()
    return said


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _to_history(work: Path, name: Path, data: bytes) -> Path:
    folder = work / ".history" / name.with_suffix("")
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    path, n = folder / f"{stamp}.ipynb", 1
    while path.exists():
        path, n = folder / f"{stamp}-{n}.ipynb", n + 1
    _write(path, data)
    return path
