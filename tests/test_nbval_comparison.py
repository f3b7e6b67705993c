"""The check of notebooks finds what is wrong and lets rounding pass: faults are seeded into a notebook that was run."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest

from tools import nb, same

ROOT = Path(__file__).resolve().parents[1]
CELLS = {
    "train": """
import numpy as np
x, y, w = np.linspace(0, 1, 50), np.linspace(0, 2, 50), 0.0
for _ in range(20):
    w -= 0.30 * 2 * np.mean((w * x - y) * x)
print(f"loss {np.mean((w * x - y) ** 2):.4f}, w {w:.3f}")""",
    "shape": "np.zeros((16, 8)).shape",
    "count": "print('parameters:', 7 * 11)",
    "plot": """
import matplotlib.pyplot as plt
plt.plot(x, x ** 2, label="cost")
plt.show()""",
    "caption": """
import io
from IPython.display import display
from matplotlib.figure import Figure
file = io.BytesIO()
Figure(figsize=(2, 2)).savefig(file, format="png")
display({"text/plain": "8 blocks of 64 keys", "image/png": file.getvalue()}, raw=True)""",
    "claim": "print('✓ exact')",
}
# name: (cell, what stands there, what is run instead)
FAULTS = {
    "another learning rate": ("train", "0.30", "0.29"),
    "another shape": ("shape", "(16, 8)", "(16, 9)"),
    "another whole number": ("count", "11", "12"),
    "another quantity plotted": ("plot", "x ** 2", "x ** 1.7"),
    "another colour": ("plot", '"cost")', '"cost", color="C1")'),
    "a picture missing": ("plot", "plt.show()", "plt.close()"),
    "another caption": ("caption", "64 keys", "64 queries"),
    "another number in the caption": ("caption", "8 blocks", "9 blocks"),
    "an output missing": ("claim", "print('✓ exact')", "None"),
    "an output too many": ("count", "print(", "print('so'); print("),
    "an exception": ("claim", "print(", "1 / 0; print("),
    "a dead kernel": ("claim", "print(", "import os; os._exit(1); print("),
}
HARMLESS = {
    "nothing": ("claim", "exact", "exact"),
    "a last digit": ("train", "{w:.3f}", "{w + 6e-4:.3f}"),
    "a picture of 1 pixel less": ("caption", "figsize=(2, 2)", "figsize=(2, 1.99)"),
    "a curve moved by less than its width": ("plot", "x ** 2", "x ** 2.001"),
}


def books(edits):
    """The edits by name, spread over as few notebooks as hold one edit a cell."""
    spread = []
    for name, (cell, *_) in edits.items():
        free = next((book for book in spread if cell not in book), None)
        if free is None:
            spread.append(free := {})
        free[cell] = name
    return spread


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What nbval says of each edit, None where it passes: notebooks with the outputs of CELLS and edited sources."""
    folder = tmp_path_factory.mktemp("notebooks")
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source.strip(), id=name) for name, source in CELLS.items()]
    nb.execute(book, folder)
    edits = FAULTS | HARMLESS
    spread = books(FAULTS) + books(HARMLESS)
    for number, edited in enumerate(spread):
        copy = nb.normal(nbformat.from_dict(book))
        for cell in copy.cells:
            if cell.id in edited:
                _, find, replace = edits[edited[cell.id]]
                assert cell.source.count(find) == 1
                cell.source = cell.source.replace(find, replace)
        (folder / f"book{number}.ipynb").write_text(nb.text(copy), encoding="utf-8")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["-q", "-n", "2", "--nbval", f"--junitxml={report}", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert report.exists(), done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) == len(CELLS) * len(spread), done.stdout + done.stderr
    verdicts = {}
    for case in cases:
        number = int(re.search(r"book(\d+)", case.get("classname"))[1])
        cell = list(CELLS)[int(case.get("name").split()[-1])]
        said = next((part.text or part.get("message") for part in case if part.tag in ("failure", "error")), None)
        if cell in spread[number]:
            verdicts[spread[number][cell]] = said
        else:
            assert said is None, f"{cell} was not edited: {said}"
    return verdicts


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found_in_its_cell(refused, fault):
    assert refused[fault] is not None


@pytest.mark.parametrize("change", HARMLESS)
def test_a_harmless_difference_passes(refused, change):
    assert refused[change] is None


def test_the_reason_is_said(refused):
    assert "of the pixels differ strongly" in refused["another quantity plotted"]
    assert "1 pictures are saved, 0 were drawn" in refused["a picture missing"]
    assert "the kernel died" in refused["a dead kernel"]


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ("loss 0.3125", "loss 0.3126", True),  # one unit of the last digit
        ("loss 0.3125", "loss 0.3145", False),
        ("loss 1.25e-07", "loss 1.26e-07", True),
        ("lr 3e-3", "lr 2e-3", False),  # one unit without decimals is everything
        ("tensor([1., 2.])", "tensor([1., 3.])", False),
        ("1,048,576 bytes", "1,048,577 bytes", False),
        ("12,345.67 s", "12,345.68 s", True),
        ("-0.0000", "0.0000", True),  # the sign of a rounded zero
        ("[ 0.10, -0.20]", "[0.10, -0.20]", True),  # blanks follow the width of other rows
        ("x = 0.5", "x = -0.5", False),
        ("float32", "float16", False),
        ("torch 2.13.0", "torch 2.13.1", False),
        ("nan", "0.5", False),
        ("0.5 0.5", "0.5", False),
        ("1.5x faster", "1.8x faster", False),
    ],
)
def test_texts_agree_up_to_rounding(one, other, agree):
    assert same.same_text(one, other) is agree
