"""Saved notebooks are in order, and the tool that runs and checks them does what it says."""

import ast
import base64
import io
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tools import nb

IGNORED = {"tags": ["nbval-ignore-output"]}
DRAW = "import matplotlib.pyplot as plt\nplt.plot([0, 1], [0, 1])\nplt.show()"
MEASURE = "import time\nprint(time.monotonic_ns())"


def png(mode="RGB", colour="white"):
    file = io.BytesIO()
    Image.new(mode, (20, 20), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def saved(path, *cells, **metadata):
    """Write a notebook in normal form with these cells, each (id, source, changes of the cell)."""
    book = nbformat.v4.new_notebook(metadata=metadata)
    for id, source, changes in cells:
        cell = nbformat.v4.new_code_cell(source, id=id, execution_count=1)
        book.cells.append(nbformat.from_dict(cell | changes))
    path.write_text(nb.text(nb.normal(book)), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", [pytest.param(p, id=p.relative_to(nb.ROOT).as_posix()) for p in nb.notebooks()])
def test_a_saved_notebook_is_in_order(path):
    assert nb.check(path) == []


STREAM = {"output_type": "stream", "name": "stderr", "text": "UserWarning: so\n"}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("1", {"execution_count": None}, "was not run"),
        ("1", {"outputs": [STREAM]}, "wrote to stderr: UserWarning: so"),
        ("1", {"outputs": [ERROR]}, "stopped with ValueError"),
        ("x = 1\n" * 16, {}, "16 lines, 15 at most"),
        ("plt.plot(x);", {}, "ends with a semicolon"),
        ("# NBVAL_IGNORE_OUTPUT", {}, "use the tag"),
        ("1", {"metadata": {"tags": ["nbval-ignore-outputs"]}}, "tag nbval-ignore-outputs is none of"),
        ("1", {"metadata": IGNORED}, "without metadata"),
        ("1", {"metadata": IGNORED | {"minillm": {"reason": "a time"}}}, "come from another source"),
        ("1", {"id": "0f3a9c1e"}, "the id is a random one"),
    ],
)
def test_check_finds(tmp_path, source, changes, said):
    path = saved(tmp_path / "a.ipynb", ("cell", source, changes))
    assert any(said in problem for problem in nb.check(path)), nb.check(path)


def test_check_passes_what_is_right(tmp_path):
    raised = {"outputs": [ERROR], "metadata": {"tags": ["raises-exception"]}}
    assert nb.check(saved(tmp_path / "a.ipynb", ("one", "1", {}), ("two", "1 / 0", raised))) == []


def test_check_finds_three_code_cells_in_a_row(tmp_path):
    path = saved(tmp_path / "a.ipynb", ("one", "1", {}), ("two", "1", {}), ("three", "1", {}))
    assert nb.check(path) == ["one: 3 code cells in a row, 2 at most; say something between them"]


def test_check_finds_two_cells_of_one_id(tmp_path):
    path = saved(tmp_path / "a.ipynb", ("one", "1", {}), ("two", "1", {}))
    path.write_text(path.read_text(encoding="utf-8").replace('"two"', '"one"'), encoding="utf-8")
    assert nb.check(path) == ["two cells have one id, or one has none; name each"]


@pytest.mark.parametrize(
    "change",
    [
        lambda book: book.metadata.update(widgets={"state": {}}),
        lambda book: book.metadata.kernelspec.update(name="another"),
        lambda book: book.cells[0].metadata.update(execution={"started": "now"}),
        lambda book: book.cells[0].update(execution_count=7),
        lambda book: book.cells[0].outputs[0].data.update({"image/png": png()}),
    ],
    ids=["widget state", "kernel", "time stamps", "count", "colours"],
)
def test_check_finds_what_is_not_in_normal_form(tmp_path, change):
    shown = nbformat.v4.new_output("display_data", {"image/png": png()})
    path = saved(tmp_path / "a.ipynb", ("cell", "1", {"outputs": [shown]}))
    assert nb.check(path) == []
    book = nbformat.read(path, as_version=4)
    change(book)
    path.write_text(nb.text(book), encoding="utf-8")
    assert any("not in normal form" in problem for problem in nb.check(path))


def test_normal_form_merges_streams_and_names_widgets_by_their_cell(tmp_path):
    parts = [{"output_type": "stream", "name": "stdout", "text": text} for text in ("a\n", "b\n")]
    widget = {"output_type": "display_data", "metadata": {}, "data": {nb.WIDGET: {"model_id": "random"}}}
    books = [saved(tmp_path / name, ("cell", "1", {"outputs": [*parts, widget]})) for name in ("1.ipynb", "2.ipynb")]
    texts = [path.read_text(encoding="utf-8") for path in books]
    assert texts[0] == texts[1]
    outputs = nbformat.reads(texts[0], as_version=4).cells[0].outputs
    assert outputs[0].text == "a\nb\n"
    assert outputs[1].data[nb.WIDGET]["model_id"] != "random"


def test_pictures_get_128_colours_once():
    many = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    file = io.BytesIO()
    many.save(file, "PNG")
    few = nb.few_colours(base64.b64encode(file.getvalue()).decode())
    assert len(Image.open(io.BytesIO(base64.b64decode(few))).getcolors()) <= nb.COLOURS
    assert nb.few_colours(few) == few


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A notebook that draws and measures, after its first run; each test works on the text."""
    path = tmp_path_factory.mktemp("ran") / "a.ipynb"
    reason = {"metadata": IGNORED | {"minillm": {"reason": "a clock"}}}
    own = "import os, urllib.request\nos.environ['MINILLM_HOME'], urllib.request.getproxies()['https']"
    saved(path, ("draw", DRAW, {}), ("measure", MEASURE, reason), ("own", own, {}))
    assert nb.run(path).endswith("saved")
    return path.read_text(encoding="utf-8")


def test_a_run_reaches_neither_the_learners_store_nor_the_network(ran, monkeypatch):
    from minillm.study.paths import data_dir

    home, proxy = ast.literal_eval(nbformat.reads(ran, as_version=4).cells[2].outputs[0].data["text/plain"])
    monkeypatch.delenv("MINILLM_HOME")
    assert not Path(home).is_relative_to(data_dir())
    assert proxy == nb.NOWHERE


def outputs_after(path, text, old, new, **options):
    """The outputs of the drawing and of the measuring cell, before and after an edit and a run."""
    before = nbformat.reads(text, as_version=4)
    path.write_text(text.replace(old, new), encoding="utf-8")
    nb.run(path, **options)
    after = nbformat.read(path, as_version=4)
    return [(before.cells[i].outputs, after.cells[i].outputs) for i in (0, 1)]


def test_a_second_run_changes_nothing(ran, tmp_path):
    drawn, measured = outputs_after(tmp_path / "a.ipynb", ran, "", "")
    assert drawn[0] == drawn[1]
    assert measured[0] == measured[1]


def test_another_source_is_measured_and_drawn_anew(ran, tmp_path):
    edited = ran.replace("[0, 1], [0, 1]", "[0, 1], [1, 0]")
    drawn, measured = outputs_after(tmp_path / "a.ipynb", edited, "monotonic_ns", "time_ns")
    assert drawn[0] != drawn[1]
    assert measured[0] != measured[1]
    assert nb.check(tmp_path / "a.ipynb") == ["draw: 3 code cells in a row, 2 at most; say something between them"]


def test_fresh_measures_anew(ran, tmp_path):
    _, measured = outputs_after(tmp_path / "a.ipynb", ran, "", "", fresh=True)
    assert measured[0] != measured[1]


def test_a_notebook_that_raises_is_not_saved(tmp_path, capsys):
    path = saved(tmp_path / "a.ipynb", ("cell", "1 / 0", {}))
    before = path.read_text(encoding="utf-8")
    assert nb.main(["run", str(path)]) == 1
    assert path.read_text(encoding="utf-8") == before
    assert "ZeroDivisionError" in capsys.readouterr().err
