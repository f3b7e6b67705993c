"""Judges an attempt at an exercise and says which mistake it makes.

A verdict rests on what the function does, never on its text: its results on every case against an independent oracle,
then against every wrong version of the reference, then the exercise's probes.
"""

import ast
import importlib
import inspect
import linecache
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.study import guard, session, trial
from minillm.study.compare import Outcome, Tolerance, describe
from minillm.study.exercise import Exercise, ExerciseError, Probe, Wrong, edited_source, load_exercise, reference_files
from minillm.study.report import CaseReport, Hint, Result, Verdict
from minillm.study.store import Store, StoreError
from minillm.study.trial import Asked

UNREPEATABLE = (
    "Called twice with the same arguments it gives different results: use no random numbers and keep nothing from "
    "one call to the next."
)
_ONE_AT_A_TIME = threading.Lock()  # what a call prints and warns of is caught for the whole process
Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]  # makes positional and keyword arguments


def check(question: str, function: Any, *, store: Store | None = None) -> Result:
    """Judges the function, keeps its source as an attempt, and returns the verdict, which shows itself in a notebook.

    Nothing that the function does is raised; ExerciseError if the exercise itself is missing or broken.
    """
    exercise = load_exercise(question)
    verdict, (code, path), notes = judge(exercise, function), _source(exercise, function), []
    kept = "kept" if verdict.status == "todo" else verdict.status  # code that is not finished is kept as well
    if callable(function) and (kept != "kept" or code.strip() not in ("", exercise.stub.strip())):
        if not code and verdict.status != "invalid":
            notes.append("The source of this function can not be found: only the verdict is recorded.")
        try:
            data = {"code": code, "verdict": kept, "diagnosis": verdict.diagnosis, "path": path}
            (store or session.log()).append("attempt", question, data)
        except (StoreError, OSError) as error:
            notes.append(f"This attempt is not recorded: {error}")
    return Result(question, exercise.signature, verdict, len(exercise.hints), tuple(notes))


def hint(question: str, *, store: Store | None = None) -> Hint:
    """The next hint of the exercise, recorded as seen; after the last one, all of them."""
    hints = load_exercise(question).hints
    try:
        log = store or session.log()
        number = 1 + max((event.data["number"] for event in log.events("hint", question)), default=0)
        if number <= len(hints):
            log.append("hint", question, {"number": number})
            return Hint(f"Hint {number} of {len(hints)}: {hints[number - 1]}")
    except (StoreError, OSError) as error:
        return Hint("\n".join([*hints, f"Which hints you have seen is not recorded: {error}"]))
    return Hint("\n".join(["There are no more hints.", *(f"{n}. {text}" for n, text in enumerate(hints, start=1))]))


def fill(exercise: Exercise, wrong: Wrong | None = None) -> str:
    """The text that a test puts in the exercise cell: the reference module, with the edit if one is given."""
    return edited_source(exercise, wrong) if wrong else exercise.path.read_text(encoding="utf-8")


def judge(exercise: Exercise, function: Any, *, time_limit: float = 10.0) -> Verdict:
    """The verdict on a function, neither recorded nor shown; `time_limit` in seconds for all of its calls together."""
    if not callable(function):
        call = f'check("{exercise.question}", {exercise.function})'
        return Verdict("error", f"check needs the function itself, {call}; it got {describe(function)}.")
    with _ONE_AT_A_TIME, torch.device("cpu"), torch.enable_grad():  # whatever the notebook has set
        return _Attempt(exercise, function, time_limit).verdict()


def no_large_tensor(
    make_inputs: Inputs, limit: int, message: str = "It builds a tensor that is larger than the exercise allows."
) -> Probe:
    """A probe that fails when an operation makes a tensor of more than `limit` elements.

    Memory is what counts: views of the inputs and expanded tensors are no new memory. What is computed outside of
    torch, in numpy say, is not seen.
    """

    def run(function: Callable[..., Any]) -> str | None:
        args, kwargs = make_inputs()
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        large = False

        def see(name: str, out: Any) -> None:
            nonlocal large
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in inputs:
                    large |= leaf.untyped_storage().nbytes() > limit * leaf.element_size()

        with _Operations(see):
            function(*args, **kwargs)
        return message if large else None

    return Probe("large tensor", run)


def forbidden_ops(make_inputs: Inputs, names: tuple[str, ...], message: str) -> Probe:
    """A probe that fails when an operation runs whose aten name contains one of `names`: "softmax", "sort"."""

    def run(function: Callable[..., Any]) -> str | None:
        args, kwargs = make_inputs()
        used: set[str] = set()
        with _Operations(lambda name, out: used.add(name)):
            function(*args, **kwargs)
        return message if any(part in name for name in used for part in names) else None

    return Probe("forbidden operation", run)


class _Operations(TorchDispatchMode):
    """Shows every operation's aten name and result to `see`."""

    def __init__(self, see: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.see = see

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler first, 2 s

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(func._schema.name.split("::")[-1], out)
        return out


class _Early(Exception):
    """The verdict is known before the last call."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


class _Attempt:
    """One function under judgement."""

    def __init__(self, exercise: Exercise, function: Callable[..., Any], time_limit: float) -> None:
        self.exercise, self.function, self.limit = exercise, function, time_limit
        self.asked, self.tolerance = trial.asked(exercise), Tolerance(exercise.rtol, exercise.atol)
        self.files = frozenset(map(guard.normal, reference_files(exercise)))
        self.given = _given(exercise)
        self.watch = guard.Stopwatch()
        self.outcomes: list[Outcome] = []

    def verdict(self) -> Verdict:
        try:
            for asked in self.asked:
                self.outcomes.append(self.run(asked))
            if all(o.raised and o.raised.kind == "NotImplementedError" and o.raised.own for o in self.outcomes):
                return Verdict("todo")
            again, cases = self.run(self.asked[0], seed=1), self.reports()
            status, diagnosis, wrong = self.judged(again, cases)
        except _Early as early:
            return early.verdict
        printed = next((outcome.printed for outcome in self.outcomes if outcome.printed), "")
        return Verdict(status, diagnosis, wrong, cases, printed)

    def judged(self, again: Outcome, cases: tuple[CaseReport, ...]) -> tuple[str, str | None, str | None]:
        """Status, diagnosis, and the name of what the diagnosis comes from."""
        if not self.tolerance.alike(self.outcomes[0], again):
            return "failed", UNREPEATABLE, None
        bad = [(outcome, case.name) for outcome, case in zip(self.outcomes, cases, strict=True) if not case.ok]
        if bad and (known := trial.matching(self.exercise, self.outcomes, self.tolerance)):
            texts = [wrong.diagnosis for wrong in known]
            diagnosis = texts[0] if len(texts) == 1 else f"One of these: {' Or: '.join(texts)}"
            return "failed", diagnosis, ", ".join(wrong.name for wrong in known)
        if misfit := next((o.misfit for o, _ in bad if o.misfit), None):
            return "error", misfit, None
        if raised := next((f"In the case {name!r} {o.raised}" for o, name in bad if o.raised), None):
            return "error", f"{raised.removesuffix('.')}.", None
        if problem := next((f"In the case {name!r}: {o.problem}" for o, name in bad if o.problem), None):
            return "failed", problem, None
        if changed := next((", ".join(o.changed) for o, _ in bad if o.changed), None):
            return "failed", f"It changes {changed} in place; the caller still needs it: work on a copy.", None
        for probe in self.exercise.probes:
            if (probe.wrong_too or not bad) and (found := self.probe(probe, strict=not bad)):
                return "failed", found, probe.name
        return ("failed", _difference(cases), None) if bad else ("passed", None, None)

    def probe(self, probe: Probe, strict: bool) -> str | None:
        with guard.preserved():
            guard.seed(0)
            called = self.call(lambda: probe.run(self.function), probe.name)
        if called.raised and (not strict or called.raised.line):
            return f"On other inputs {called.raised}." if strict else None
        if called.raised or not (called.value is None or isinstance(called.value, str)):
            what = f"raised {called.raised}" if called.raised else f"returned {describe(called.value)}, not a sentence"
            raise ExerciseError(f"the exercise {self.exercise.question} is broken: the probe {probe.name!r} {what}")
        return called.value

    def run(self, asked: Asked, seed: int = 0) -> Outcome:
        where = f"the case {asked.case.name!r}"
        return trial.run(self.exercise, asked, self.function, lambda work: self.call(work, where), seed)

    def call(self, work: Callable[[], Any], where: str) -> guard.Call:
        called = guard.call(work, max(0.0, self.limit - self.watch.seconds), self.is_reference)
        if called.watched:
            raise _Early(Verdict("invalid", f"It runs minillm's own {self.exercise.module}.py: write it yourself."))
        if called.expired:
            cause = "it waits for something, input() or sleep" if self.watch.idle else "look for a loop that never ends"
            late = f"It did not finish within {self.limit:g} seconds (in {where}): {cause}."
            more = " It could not be stopped: restart the kernel." if called.stuck else ""
            raise _Early(Verdict("error", late + more, cases=self.reports(), printed=called.printed))
        return called

    def is_reference(self, code: CodeType) -> bool:
        if code in self.given:
            return False
        return code is guard.code_of(self.exercise.expected) or guard.normal(code.co_filename) in self.files

    def reports(self) -> tuple[CaseReport, ...]:
        pairs = zip(self.asked, self.outcomes, strict=False)
        return tuple(trial.report(self.exercise, asked, outcome, self.tolerance) for asked, outcome in pairs)


def _given(exercise: Exercise) -> frozenset[CodeType | None]:
    """The code of the functions of ours that the stub itself imports: to be used, wherever they stand."""
    given = []
    for node in ast.parse(exercise.stub).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minillm."):
            module = importlib.import_module(node.module)
            given += [guard.code_of(getattr(module, name.name)) for name in node.names]
    return frozenset(given)


def _difference(cases: tuple[CaseReport, ...]) -> str:
    """What can be said of wrong numbers that no wrong version makes."""
    right, wrong = [case.name for case in cases if case.ok], next(case for case in cases if not case.ok)
    others = f"It is right in: {', '.join(right)}." if right else "No case is right."
    return f"No known mistake gives these numbers. {others} In the case {wrong.name!r} look at {wrong.where}."


def _source(exercise: Exercise, function: Any) -> tuple[str, str | None]:
    """The text to keep: the whole notebook cell, or the function alone and its file. Empty for code of ours."""
    code = guard.code_of(function) if callable(function) else None
    if code is None or guard.normal(code.co_filename) in map(guard.normal, reference_files(exercise)):
        return "", None
    if not os.path.exists(code.co_filename) or re.search(r"ipykernel_\d+", code.co_filename):
        return "".join(linecache.getlines(code.co_filename)), None
    with suppress(OSError, TypeError):
        return inspect.getsource(code), code.co_filename
    return "", code.co_filename
