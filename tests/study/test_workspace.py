"""The learner's notebooks: updates merge cell by cell, nothing of theirs is lost, reset and restore keep both."""

import json
import os
import random
from copy import deepcopy
from pathlib import Path

import pytest

import exercise_tree
from exercise_tree import QUESTION
from minillm.study import merge as merging
from minillm.study import workspace
from minillm.study.exercise import load_stub
from minillm.study.merge import NEW_VERSION, merge
from minillm.study.store import Store
from minillm.study.workspace import WorkspaceError, reset, restore, sync

NAME = Path("data/mean.ipynb")


def cell(id, source, kind="code", **more):
    more = {"metadata": {}, **more}
    if kind == "code":
        more = {"execution_count": None, "outputs": [], **more}
    return {"cell_type": kind, "id": id, "source": source.splitlines(keepends=True), **more}


def notebook(*cells):
    made = [cell(one, one) if isinstance(one, str) else one for one in cells]
    return {"cells": deepcopy(made), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def sources(book):
    return {each["id"]: "".join(each["source"]) for each in book["cells"]}


def ids(book):
    return " ".join(each["id"] for each in book["cells"])


def edited(book, **texts):
    """The notebook with other texts in the cells named; None deletes a cell."""
    book = deepcopy(book)
    for each in book["cells"]:
        if texts.get(each["id"]) is not None:
            each["source"] = [texts[each["id"]]]
    book["cells"] = [each for each in book["cells"] if texts.get(each["id"], "") is not None]
    return book


BASE = notebook("a", "b", cell("task", "stub", metadata={"tags": ["exercise"]}), "c")


# The merge


def test_cells_that_only_we_changed_are_replaced_with_their_outputs():
    theirs = edited(BASE, b="new")
    theirs["cells"][1] |= {"outputs": ["new output"], "metadata": {"tags": ["predict"]}}
    mine = deepcopy(BASE)
    mine["cells"][1]["outputs"] = ["old output"]
    merged, said = merge(BASE, theirs, mine)
    assert merged == theirs
    assert said == "cells: 1 updated"


def test_cells_that_only_the_learner_changed_stay():
    mine = edited(BASE, a="mine")
    mine["cells"][0]["outputs"] = ["my output"]
    merged, _ = merge(BASE, edited(BASE, c="new"), mine)
    assert sources(merged) == {"a": "mine", "b": "b", "task": "stub", "c": "new"}
    assert merged["cells"][0]["outputs"] == ["my output"]


def test_outputs_stay_while_the_text_stays():
    mine, theirs = deepcopy(BASE), deepcopy(BASE)
    mine["cells"][0] |= {"outputs": ["mine"], "execution_count": 7}
    theirs["cells"][0] |= {"outputs": ["theirs"], "metadata": {"tags": ["check"]}}
    merged, said = merge(BASE, theirs, mine)
    assert merged["cells"][0] == mine["cells"][0] | {"metadata": {"tags": ["check"]}}
    assert said == "metadata updated"


def test_metadata_is_merged_key_by_key():
    base, theirs, mine = (deepcopy(BASE) for _ in range(3))
    base["cells"][0]["metadata"] = {"tags": ["x"], "gone": 1}
    theirs["cells"][0]["metadata"] = {"tags": ["y"]}
    mine["cells"][0]["metadata"] = {"tags": ["x"], "gone": 1, "collapsed": True}
    merged, _ = merge(base, theirs, mine)
    assert merged["cells"][0]["metadata"] == {"tags": ["y"], "collapsed": True}


@pytest.mark.parametrize(("kind", "mark"), [("code", f"# {NEW_VERSION}\n"), ("markdown", f"> {NEW_VERSION}\n\n")])
def test_cell_that_both_changed_is_there_twice(kind, mark):
    base = notebook("a", cell("b", "b", kind), "c")
    merged, said = merge(base, edited(base, b="theirs"), edited(base, b="mine"))
    assert sources(merged) == {"a": "a", "b": "mine", "b-new": f"{mark}theirs", "c": "c"}
    assert said == "cells: 1 kept beside a new version"


def test_copy_of_a_new_version_is_replaced_by_a_newer_one_unless_edited():
    second, third = edited(BASE, b="second"), edited(BASE, b="third")
    merged, _ = merge(BASE, second, edited(BASE, b="mine"))
    again, _ = merge(second, third, merged)
    assert sources(again)["b-new"] == f"# {NEW_VERSION}\nthird"
    assert len(again["cells"]) == 5
    kept, _ = merge(second, third, edited(merged, **{"b-new": "my own"}))
    assert (sources(kept)["b-new"], sources(kept)["b-new-2"]) == ("my own", f"# {NEW_VERSION}\nthird")


def test_same_change_on_both_sides_is_no_conflict():
    merged, _ = merge(BASE, edited(BASE, b="same"), edited(BASE, b="same"))
    assert merged == edited(BASE, b="same")


def test_edited_exercise_stays_and_has_no_second_stub():
    theirs = edited(BASE, task="new stub")
    merged, said = merge(BASE, theirs, edited(BASE, task="solved"))
    assert sources(merged) == {"a": "a", "b": "b", "task": "solved", "c": "c"}
    assert "new stub" in said
    assert sources(merge(BASE, theirs, BASE)[0])["task"] == "new stub"


def test_removed_cells_go_unless_edited():
    merged, said = merge(BASE, edited(BASE, a=None, b=None), edited(BASE, b="mine"))
    assert sources(merged) == {"b": "mine", "task": "stub", "c": "c"}
    assert said == "cells: 1 removed, 1 kept though removed"


def test_deleted_cells_stay_deleted_until_they_change():
    mine = edited(BASE, b=None)
    theirs = edited(BASE, a="new")
    merged, _ = merge(BASE, theirs, mine)
    assert ids(merged) == "a task c"
    assert ids(merge(theirs, edited(theirs, b="better"), merged)[0]) == "a b task c"


def test_learners_cells_stay_behind_the_cell_they_followed():
    mine = notebook("start", *BASE["cells"][:2], "note", "note2", *BASE["cells"][2:], "end")
    theirs = notebook("zero", "a", "b", "b2", *BASE["cells"][2:])
    assert ids(merge(BASE, theirs, mine)[0]) == "start zero a b note note2 b2 task c end"


def test_learners_cell_stays_when_the_cell_before_it_goes():
    mine = notebook("a", "b", "note", *BASE["cells"][2:])
    assert ids(merge(BASE, edited(BASE, b=None), mine)[0]) == "a note task c"


def test_order_of_the_learner_wins_where_they_moved_cells():
    mine = notebook("c", *BASE["cells"][:3])
    theirs = notebook(*BASE["cells"], "d")
    assert ids(merge(BASE, theirs, mine)[0]) == "c d a b task"


def test_our_new_order_is_taken_where_the_learner_moved_nothing():
    mine = notebook(*BASE["cells"], "note")
    theirs = notebook("c", *BASE["cells"][:3])
    assert ids(merge(BASE, theirs, mine)[0]) == "c note a b task"


def test_lost_base_loses_nothing():
    empty = {"cells": []}
    merged, _ = merge(empty, edited(BASE, c="new"), edited(BASE, a=None, b="mine", task="solved"))
    assert ids(merged) == "a b b-new task c c-new"
    assert sources(merged) | {"a": "a", "b": "mine", "task": "solved"} == sources(merged)


def test_ids_that_another_program_dropped_or_doubled():
    mine = notebook("a", "b", *BASE["cells"][2:], "own")
    for each in mine["cells"][:2]:
        del each["id"]
    mine["cells"][-1]["id"] = "task"
    mine["nbformat_minor"] = 4
    merged, _ = merge(BASE, edited(BASE, b="new"), mine)
    assert list(sources(merged).values()) == ["a", "new", "stub", "c", "own"]
    assert len(set(sources(merged))) == 5
    assert merged["nbformat_minor"] == 5


def test_line_ends_of_windows_are_no_edit():
    base = notebook(cell("a", "x\ny\n"))
    mine = edited(base, a="x\r\ny\r\n")
    assert sources(merge(base, edited(base, a="new"), mine)[0]) == {"a": "new"}


def test_nothing_of_the_learners_is_ever_lost():
    """Random histories of edits on both sides: every text that the learner wrote is still there, and ours as well."""
    rng = random.Random(0)
    for _ in range(150):
        base = notebook(*(f"c{n}" for n in range(6)))
        base["cells"][rng.randrange(6)]["metadata"] = {"tags": ["exercise"]}
        mine = deepcopy(base)
        for step in range(3):
            theirs = change(base, rng, f"theirs{step}")
            mine = change(mine, rng, f"mine{step}")
            written = {text for text in sources(mine).values() if "mine" in text}
            merged, _ = merge(base, theirs, mine)
            assert written <= set(sources(merged).values())
            assert len(set(sources(merged))) == len(merged["cells"])
            exercises = {each["id"] for each in theirs["cells"] if each["metadata"]}
            shown = "\n".join(sources(merged).values())
            old = sources(base)
            for id, text in sources(theirs).items():
                assert text in shown or id in exercises or old.get(id) == text, (id, text)
            assert merge(theirs, theirs, merged)[0] == merged  # a second run changes nothing
            assert merge(base, theirs, merged)[0] == merged  # nor one after an interruption
            base, mine = theirs, merged


def change(book, rng, name):
    """One random edit, deletion, new cell or move of the notebook."""
    book = deepcopy(book)
    cells = book["cells"]
    for number in range(rng.randrange(3)):
        kind, at = rng.choice(["edit", "edit", "delete", "insert", "move"]), rng.randrange(len(cells) or 1)
        if kind == "insert" or not cells:
            cells.insert(at, cell(f"{name}-{number}", f"text of {name}-{number}"))
        elif kind == "edit":
            cells[at]["source"] = [f"{name} edit {number}"]
        elif kind == "delete":
            del cells[at]
        else:
            cells.insert(rng.randrange(len(cells)), cells.pop(at))
    return book


# The files


@pytest.fixture
def folders(tmp_path):
    notebooks, work = tmp_path / "notebooks", tmp_path / "work"
    put(notebooks / NAME, BASE)
    return notebooks, work


def put(path, book):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(merging.dump(book))


def get(path):
    return json.loads(path.read_bytes())


def tree(folder):
    """Every file below the folder with its content and time of writing."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def history(work):
    return [get(path) for path in sorted((work / ".history").rglob("*.ipynb"))]


def test_first_run_copies_and_the_second_writes_nothing(folders):
    notebooks, work = folders
    put(notebooks / ".ipynb_checkpoints" / "x.ipynb", BASE)
    assert sync(*folders) == ["work/data/mean.ipynb: new"]
    assert (work / NAME).read_bytes() == (notebooks / NAME).read_bytes()
    before = tree(work)
    assert sync(*folders) == []
    assert tree(work) == before


def test_update_keeps_the_file_that_was_there(folders):
    notebooks, work = folders
    sync(*folders)
    put(work / NAME, edited(BASE, a="mine \u4e2d\u6587"))
    put(notebooks / NAME, edited(BASE, c="new"))
    assert sync(*folders) == ["work/data/mean.ipynb: cells: 1 updated"]
    assert sources(get(work / NAME)) == {"a": "mine \u4e2d\u6587", "b": "b", "task": "stub", "c": "new"}
    assert history(work) == [edited(BASE, a="mine \u4e2d\u6587")]
    before = tree(work)
    assert sync(*folders) == []
    assert tree(work) == before


def test_update_that_changes_no_cell_leaves_the_file_alone(folders):
    notebooks, work = folders
    sync(*folders)
    before = tree(work)[work / NAME]
    (notebooks / NAME).write_text(json.dumps(BASE, indent=2), encoding="utf-8", newline="\r\n")
    assert sync(*folders) == []
    assert tree(work)[work / NAME] == before


def test_deleted_notebook_comes_back(folders):
    sync(*folders)
    (folders[1] / NAME).unlink()
    assert sync(*folders) == ["work/data/mean.ipynb: it was gone; this is a new copy"]
    assert get(folders[1] / NAME) == BASE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"cells": 3}',
        merging.dump(notebook(cell("a", "") | {"source": 3})),
        merging.dump(notebook(cell("a", "") | {"metadata": None})),
        merging.dump(notebook() | {"nbformat": 3}),
        b"\xff\xfe{}",
    ],
)
def test_broken_file_is_moved_aside(folders, data):
    work = folders[1]
    sync(*folders)
    (work / NAME).write_bytes(data)
    (said,) = sync(*folders)
    (aside,) = (work / ".history").rglob("*.ipynb")
    now = aside.relative_to(work).as_posix()
    assert said == f"work/data/mean.ipynb: it was not a notebook, and is now {now}; this is a new copy"
    assert aside.read_bytes() == data
    assert get(work / NAME) == BASE


def test_notebook_of_ours_that_is_broken_changes_nothing(folders):
    notebooks, work = folders
    sync(*folders)
    before = tree(work)
    for data in b"{", merging.dump({"cells": [{"cell_type": "code", "source": ""}]}):
        (notebooks / NAME).write_bytes(data)
        (said,) = sync(*folders)
        assert "is not a notebook whose cells have ids" in said
        assert tree(work) == before


def test_removed_notebook_goes_to_the_history_unless_edited(folders):
    notebooks, work = folders
    put(notebooks / "data" / "edited.ipynb", BASE)
    sync(*folders)
    put(work / "data" / "edited.ipynb", edited(BASE, a="mine"))
    for path in notebooks.rglob("*.ipynb"):
        path.unlink()
    said = sync(*folders)
    assert said[0] == "work/data/edited.ipynb: no longer part of minillm; your copy stays, because you changed it"
    assert said[1].startswith("work/data/mean.ipynb: no longer part of minillm; your unchanged copy is now .history/")
    assert [path.name for path in work.glob("data/*")] == ["edited.ipynb"]
    assert history(work) == [BASE]
    assert sync(*folders) == []


def test_learners_own_notebooks_are_not_touched(folders):
    put(folders[1] / "notes.ipynb", BASE)
    before = tree(folders[1])
    assert sync(*folders) == ["work/data/mean.ipynb: new"]
    assert before.items() <= tree(folders[1]).items()


def test_interrupted_update_is_done_again_with_the_same_end(folders, monkeypatch):
    notebooks, work = folders
    sync(*folders)
    put(work / NAME, edited(BASE, b="mine"))
    put(notebooks / NAME, edited(BASE, b="theirs", c="new"))
    write = workspace._write

    def stop_at_base(path, data):
        if ".base" in path.parts:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_write", stop_at_base)
        with pytest.raises(KeyboardInterrupt):
            sync(*folders)
    done = tree(work)[work / NAME]
    assert sync(*folders) == []
    assert tree(work)[work / NAME] == done
    assert ids(get(work / NAME)) == "a b b-new task c"


def test_write_that_fails_leaves_the_old_file_and_says_so(folders, monkeypatch):
    notebooks, work = folders
    sync(*folders)
    put(work / NAME, edited(BASE, a="mine"))
    put(notebooks / NAME, edited(BASE, c="new"))
    before = tree(work)

    def full(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    (said,) = sync(*folders)
    assert said == "work/data/mean.ipynb: not brought up to date, it is as it was: [Errno 28] No space left on device"
    assert tree(work) == before


def test_missing_notebooks_are_not_taken_for_removed_ones(folders):
    sync(*folders)
    with pytest.raises(WorkspaceError, match="the checkout is not complete"):
        sync(folders[0] / "absent", folders[1])
    assert (folders[1] / NAME).exists()


# Reset and restore


@pytest.fixture
def desk(tmp_path):
    """The learner's copy of a notebook with the small exercise, and their store."""
    answers = exercise_tree.plant(tmp_path)
    stub = load_stub(QUESTION, answers).rstrip("\n")
    task = cell("task", stub, metadata={"tags": ["exercise"]})
    put(tmp_path / "work" / NAME, notebook(cell("text", "# exercise: data/mean", "markdown"), "a", task, "check"))
    with Store(tmp_path / "study.db") as store:
        yield Desk(tmp_path / "work", answers, store, stub)


class Desk:
    def __init__(self, work, answers, store, stub):
        self.where = {"work": work, "answers": answers, "log": store}
        self.file, self.store, self.stub = work / NAME, store, stub

    def write(self, code):
        put(self.file, edited(get(self.file), task=code))

    def attempt(self, code, verdict="failed"):
        self.store.append("attempt", QUESTION, {"code": code, "verdict": verdict, "diagnosis": None, "path": None})

    @property
    def code(self):
        return sources(get(self.file))["task"]


def test_reset_puts_the_stub_back_and_keeps_the_code(desk):
    desk.write("my code \u4e2d\u6587")
    others = {id: text for id, text in sources(get(desk.file)).items() if id != "task"}
    assert "holds the stub again; what was there is kept" in reset(QUESTION, **desk.where)
    assert desk.code == desk.stub
    assert sources(get(desk.file)) == others | {"task": desk.stub}
    assert [event.data["code"] for event in desk.store.events("attempt")] == ["my code \u4e2d\u6587"]
    assert sources(history(desk.where["work"])[0])["task"] == "my code \u4e2d\u6587"
    restore(QUESTION, **desk.where)
    assert desk.code == "my code \u4e2d\u6587"


def test_reset_of_an_untouched_cell_writes_nothing(desk):
    before = tree(desk.where["work"])
    assert "holds the stub already" in reset(QUESTION, **desk.where)
    assert tree(desk.where["work"]) == before
    assert desk.store.events() == []


def test_restore_goes_back_through_the_attempts(desk):
    for code in "first", "second", "first", desk.stub + "\n", "third", "third\n":
        desk.attempt(code)
    desk.write("fourth")
    found = []
    for which in -1, -2, 0:
        restore(QUESTION, which, **desk.where)
        found.append(desk.code)
    assert found == ["third", "first", "second"]  # then kept: second, first, third, fourth
    restore(QUESTION, **desk.where)
    assert desk.code == "fourth"
    assert len(history(desk.where["work"])) == 4


def test_restore_of_what_is_not_there_changes_nothing(desk):
    desk.attempt("first")
    desk.write("second")
    before = tree(desk.where["work"])
    with pytest.raises(WorkspaceError, match="data/mean has 1 earlier versions of your code, got which=-2"):
        restore(QUESTION, -2, **desk.where)
    assert tree(desk.where["work"]) == before


def test_exercise_cell_is_found_by_its_marker_or_its_tag(desk):
    book = get(desk.file)
    book["cells"].insert(0, cell("other", "x = 1", metadata={"tags": ["exercise"]}))
    put(desk.file, book)
    desk.write("# exercise: data/mean\nmine")
    reset(QUESTION, **desk.where)
    assert (desk.code, sources(get(desk.file))["other"]) == (desk.stub, "x = 1")


def test_reset_without_a_notebook_or_a_cell_says_what_to_do(desk):
    put(desk.file, notebook("a"))
    with pytest.raises(WorkspaceError, match="has no exercise cell: no cell begins with '# exercise: data/mean'"):
        reset(QUESTION, **desk.where)
    desk.file.write_bytes(b"{")
    with pytest.raises(WorkspaceError, match=r"is not a notebook; `python start\.py` moves it aside"):
        reset(QUESTION, **desk.where)
    desk.file.unlink()
    with pytest.raises(WorkspaceError, match=r"does not exist; `python start\.py` makes it"):
        reset(QUESTION, **desk.where)
