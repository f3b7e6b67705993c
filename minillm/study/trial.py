"""Runs a function on the cases of an exercise: the learner's, the oracle and the wrong versions, all in one way."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minillm.study import guard
from minillm.study.compare import Difference, Outcome, Tolerance, describe, read, same_input, unpack
from minillm.study.exercise import Case, Exercise, ExerciseError, Wrong, edited_source, load_source
from minillm.study.report import CaseReport

WRONG_LIMIT = 10.0  # seconds for a wrong version on one case


@dataclass(frozen=True)
class Asked:
    """A case and the oracle's answer to it."""

    case: Case
    expected: tuple[Tensor, ...]


@functools.lru_cache(maxsize=16)
def asked(exercise: Exercise) -> tuple[Asked, ...]:
    """The cases with what is expected of each. ExerciseError if the cases or the oracle fail."""
    where = f"the exercise {exercise.question} is broken"
    with guard.preserved():
        guard.seed(0)
        try:
            cases = exercise.make_cases()
        except Exception as error:
            raise ExerciseError(f"{where}: make_cases raised {type(error).__name__}: {error}") from error
        if not cases:
            raise ExerciseError(f"{where}: make_cases made no case")
        return tuple(Asked(case, _expected(exercise, case, f"{where}: the oracle on {case.name!r}")) for case in cases)


def _expected(exercise: Exercise, case: Case, where: str) -> tuple[Tensor, ...]:
    args, kwargs = copy.deepcopy((case.args, case.kwargs))
    try:
        value = exercise.expected(*args, **kwargs)
    except Exception as error:
        raise ExerciseError(f"{where} raised {type(error).__name__}: {error}") from error
    values, _ = unpack(value, exercise.outputs)
    if values is None or not all(isinstance(each, Tensor) for each in values):
        raise ExerciseError(f"{where} returned {describe(value)}, not {', '.join(exercise.outputs)}")
    return tuple(each.detach().clone() for each in values)


def run(
    exercise: Exercise,
    asked: Asked,
    function: Callable[..., Any],
    call: Callable[[Callable[[], Any]], guard.Call],
    seed: int = 0,
) -> Outcome:
    """What the function does on the case, given fresh copies of the arguments. `call` calls it."""
    args, kwargs = copy.deepcopy((asked.case.args, asked.case.kwargs))
    misfit = _misfit(exercise, function, args, kwargs)
    if misfit:
        return Outcome(misfit=misfit)
    with guard.preserved():
        guard.seed(seed)
        called = call(lambda: function(*args, **kwargs))
    if called.raised:
        return Outcome(raised=called.raised, printed=called.printed)
    outs, problem = read(called.value, asked.expected, exercise.outputs)
    parameters = exercise.parameters
    names = [each.arg for each in (*parameters.posonlyargs, *parameters.args)]
    names += [f"argument {number + 1}" for number in range(len(names), len(args))]
    after = [*zip(names, asked.case.args, args, strict=False)]
    after += [(name, asked.case.kwargs[name], kwargs[name]) for name in kwargs]
    changed = tuple(name for name, old, new in after if not same_input(old, new))
    return Outcome(outs, problem, changed, printed=called.printed)


def report(exercise: Exercise, asked: Asked, outcome: Outcome, tolerance: Tolerance) -> CaseReport:
    """The outcome of a case in words, and whether it is right."""
    expected = ", ".join(f"{n} {describe(t)}" for n, t in zip(exercise.outputs, asked.expected, strict=True))
    got = str(outcome.raised) if outcome.raised else outcome.misfit or ", ".join(out.text for out in outcome.outs)
    got += f"; changed in place: {', '.join(outcome.changed)}" if outcome.changed else ""
    case = asked.case
    if outcome.raised or outcome.misfit or outcome.problem:
        return CaseReport(case.name, case.asked, expected, got, None, "", ok=False)
    worst = Difference(-1.0, (), close=True)
    for name, want, out in zip(exercise.outputs, asked.expected, outcome.outs, strict=True):
        assert out.value is not None
        found = tolerance.difference(want, out.value)
        if (found.close, -found.error) < (worst.close, -worst.error):
            worst, where = found, f"{name}{list(found.index) or ''}"
            if not found.close:
                got_one, expected_one = _apart(out.value[found.index], want[found.index])
                where += f", which is {got_one}, expected {expected_one}"
    where = where if worst.error or not worst.close else ""
    return CaseReport(case.name, case.asked, expected, got, worst.error, where, worst.close and not outcome.changed)


def matching(exercise: Exercise, outcomes: Sequence[Outcome], tolerance: Tolerance) -> list[Wrong]:
    """The wrong versions that do on every case what the function did; of several, those that most cases show."""
    found: list[tuple[int, Wrong]] = []
    cases = asked(exercise)
    for wrong in exercise.wrong:
        if all(tolerance.alike(outcome, _mistake(exercise, wrong, i)) for i, outcome in enumerate(outcomes)):
            theirs = [_mistake(exercise, wrong, i) for i in range(len(outcomes))]
            shown = sum(not report(exercise, *pair, tolerance).ok for pair in zip(cases, theirs, strict=True))
            raised = [(mine.raised, his.raised) for mine, his in zip(outcomes, theirs, strict=True) if his.raised]
            guess = len(raised) == len(theirs) and any(a and b and a.message != b.message for a, b in raised)
            if shown and not guess:  # nothing but one type of exception is no evidence: the messages must agree as well
                found.append((shown, wrong))
    most = max((shown for shown, _ in found), default=0)
    return [wrong for shown, wrong in found if shown == most]


@functools.lru_cache(maxsize=4096)
def _mistake(exercise: Exercise, wrong: Wrong, index: int) -> Outcome:
    def call(work: Callable[[], Any]) -> guard.Call:
        called = guard.call(work, WRONG_LIMIT)
        return guard.Call(raised=guard.Raised("TimeLimit", "")) if called.expired else called

    return run(exercise, asked(exercise)[index], _wrong_function(exercise, wrong), call)


@functools.lru_cache(maxsize=512)
def _wrong_function(exercise: Exercise, wrong: Wrong) -> Callable[..., Any]:
    try:
        module = load_source(edited_source(exercise, wrong), exercise.function)
        function: Callable[..., Any] = getattr(module, exercise.function)
    except Exception as error:
        what = f"the wrong version {wrong.name!r} does not load: {type(error).__name__}: {error}"
        raise ExerciseError(f"the exercise {exercise.question} is broken: {what}") from error
    return function


def _misfit(exercise: Exercise, function: Callable[..., Any], args: Any, kwargs: Any) -> str | None:
    """What is wrong with the parameters of the function, or None if it takes these arguments."""
    try:
        signature = inspect.signature(function)
    except Exception:  # not written in Python, or very strange: the call will tell
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"It must accept {exercise.signature}; it takes {signature}: {error}."
    return None


def _apart(got: Tensor, expected: Tensor) -> tuple[str, str]:
    """Two different numbers in words, with as many digits as it takes to see that they differ."""
    one, other = got.item(), expected.item()
    if isinstance(one, float) and isinstance(other, float):
        for digits in (4, 6, 9):
            words = f"{one:.{digits}g}", f"{other:.{digits}g}"
            if words[0] != words[1]:
                return words
    return str(one), str(other)
