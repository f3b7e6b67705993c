"""A small exercise for tests: a weighted mean, with its reference module and answer file in folders of its own."""

import functools
from pathlib import Path

from minillm.study import checker, exercise
from minillm.study.exercise import Exercise, load_exercise

QUESTION = "data/mean"

MODULE = '''"""The reference."""

import torch


def weighted_mean(x, w, *, keepdim=False):
    total = w.sum(dim=-1, keepdim=keepdim)
    mean = (x * w).sum(dim=-1, keepdim=keepdim) / total
    return mean, total
'''

ANSWER = '''"""The exercise of data/mean."""

import torch

from minillm.study.checker import forbidden_ops, no_large_tensor
from minillm.study.exercise import Case, Exercise, Wrong

STUB = """\\
# exercise: data/mean
import torch


def weighted_mean(x, w, *, keepdim=False):
    \\"\\"\\"The mean of x with weights w over the last axis, and the sum of the weights: (mean, total).\\"\\"\\"
    raise NotImplementedError
"""


def make_cases():
    x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
    w = torch.tensor([[1.0, 1.0, 2.0], [0.5, 0.0, 1.5]])
    return [
        Case("vector", (x[0], w[0]), {}, "one row"),
        Case("matrix", (x, w), {}, "two rows"),
        Case("keepdim", (x, w), {"keepdim": True}, "the axis stays"),
        Case("no weight", (x, w * 0), {}, "0 / 0 is NaN"),
        Case("infinite", (x * float("inf"), w + 1), {}, "inf is inf"),
        Case("half", (x.half() / 3, w.half()), {}, "float16"),
    ]


def oracle(x, w, *, keepdim=False):
    x64, w64 = x.double().movedim(-1, 0), w.double().movedim(-1, 0)
    total = torch.stack(list(w64)).sum(0)
    mean = sum(a * b for a, b in zip(x64, w64)) / total
    if keepdim:
        mean, total = mean[..., None], total[..., None]
    return mean.to(x.dtype), total.to(x.dtype)


def large():
    return (torch.ones(100, 3), torch.ones(100, 3)), {}


EXERCISE = Exercise(
    question="data/mean",
    module="data/mean",
    function="weighted_mean",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("mean", "total"),
    rtol=1e-5,
    atol=1e-6,
    wrong=(
        Wrong("not divided", " / total", "", "The sum is not divided by the weights."),
        Wrong("plain mean", "(x * w).sum(dim=-1, keepdim=keepdim) / total", "x.mean(-1, keepdim=keepdim)", "Plain."),
        Wrong("axis dropped", "keepdim=keepdim) / total", "keepdim=False) / total", "keepdim is ignored in the mean."),
        Wrong("one total", "total = w.sum(dim=-1, keepdim=keepdim)", "total = w.sum(0, keepdim=keepdim)", "The axis."),
        Wrong("first twin", "return mean, total", "return mean, total + 1", "One is added."),
        Wrong("second twin", "return mean, total", "return mean, 1 + total", "One is put in front."),
        Wrong("rows only", "total = w", "total = w.sum(1) if False else w.transpose(0, 1).mT", "Fails for one row."),
        Wrong("always fails", "total = w", "total = [][w.dim()] + w", "Nothing works."),
        Wrong("invisible", '"""The reference."""', '"""Another text."""', "Changes no result."),
    ),
    probes=(
        no_large_tensor(large, 400, "A table of all pairs is built."),
        forbidden_ops(large, ("_softmax", "linalg_"), "An operation that this needs not."),
    ),
    hints=("Multiply.", "Sum.", "Divide."),
)
'''


def plant(folder: Path) -> Path:
    """Writes the exercise below the folder; its answers/."""
    for name, text in ("answers/data/mean.py", ANSWER), ("minillm/data/mean.py", MODULE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "answers"


def use(folder: Path, put=setattr) -> Exercise:
    """Makes this the exercise that `check` and `hint` find; `put` is setattr, or monkeypatch's."""
    answers = plant(folder)
    put(exercise, "PACKAGE", folder / "minillm")
    put(checker, "load_exercise", functools.partial(load_exercise, answers=answers))
    return load_exercise(QUESTION, answers)
