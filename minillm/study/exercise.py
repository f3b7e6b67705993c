"""What an exercise is and how it is loaded: stub, cases, oracle, wrong versions, probes and hints of one question.

`answers/<area>/<topic>.py` holds two names: STUB, a string literal that is read without running the file (so without
importing torch), and EXERCISE. Nothing here imports torch.
"""

import ast
import difflib
import functools
import hashlib
import linecache
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from minillm.study.paths import ANSWERS, ROOT

PACKAGE = ROOT / "minillm"


class ExerciseError(RuntimeError):
    """An exercise is missing or broken: a fault of ours, not of the learner. One sentence that names the file."""


@dataclass(frozen=True)
class Case:
    """One call of the learner's function; `asked` says in one phrase what is special about it."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    asked: str = ""


@dataclass(frozen=True)
class Wrong:
    """One edit of a reference module that makes it wrong, and the sentence for a learner who made this mistake.

    `find` occurs exactly once in the module's source; `module` is the exercise's own unless given.
    """

    name: str
    find: str
    replace: str
    diagnosis: str
    module: str | None = None


@dataclass(frozen=True)
class Probe:
    """Sees what results do not show: `run(function)` calls it and returns a diagnosis, or None if all is well.

    It is asked if all results are right, and with `wrong_too` also if they are not.
    """

    name: str
    run: Callable[[Callable[..., Any]], str | None]
    wrong_too: bool = False


@dataclass(frozen=True, eq=False)
class Exercise:
    """The exercise of one question; compared and cached by identity."""

    question: str
    module: str  # the reference, "attention/flash" for minillm/attention/flash.py
    function: str  # its name in the stub and in the module
    stub: str  # the source of the exercise cell; the first line is `marker(question)`
    make_cases: Callable[[], list[Case]]
    expected: Callable[..., Any]  # the oracle: same signature, shares no code with the reference
    outputs: tuple[str, ...]  # what is returned: one name for a tensor, several for a tuple of tensors
    rtol: float
    atol: float
    wrong: tuple[Wrong, ...] = ()  # wrong versions that the function's results show
    also_wrong: tuple[Wrong, ...] = ()  # wrong versions that only the module's tests see
    probes: tuple[Probe, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The reference module's file."""
        return PACKAGE / f"{self.module}.py"

    @property
    def parameters(self) -> ast.arguments:
        """The parameters that the stub's function takes."""
        return _function(self.stub, self.function, f"the stub of {self.question}").args

    @property
    def signature(self) -> str:
        """The call that the learner's function must accept, as in the stub: `f(q, k, v, *, causal=False)`."""
        return f"{self.function}({ast.unparse(self.parameters)})"


def marker(question: str) -> str:
    """The line by which the exercise cell of an open notebook is found."""
    return f"# exercise: {question}"


def exercise_ids(answers: Path = ANSWERS) -> list[str]:
    """The questions that have an exercise, in alphabetical order."""
    return sorted(path.relative_to(answers).with_suffix("").as_posix() for path in answers.glob("*/*.py"))


def load_stub(question: str, answers: Path = ANSWERS) -> str:
    """The text of the exercise cell before anything is written, read without running the file."""
    path = _answer_file(question, answers)
    for node in ast.parse(path.read_text(encoding="utf-8"), path.name).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["STUB"]:
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
            raise ExerciseError(f"{path}:{node.lineno}: STUB must be one string literal")
    raise ExerciseError(f"{path}: there is no STUB = '''...''' at the top level")


def load_exercise(question: str, answers: Path = ANSWERS) -> Exercise:
    """The EXERCISE of `answers/<question>.py`; one object until the file changes. ExerciseError if it is broken."""
    path = _answer_file(question, answers)
    return _load(question, path, answers, path.stat().st_mtime_ns)


def reference_files(exercise: Exercise) -> list[Path]:
    """The reference module and every other module of an area that defines a function of this name."""
    pattern = re.compile(rf"^def {exercise.function}\(", re.MULTILINE)
    others = (path for path in PACKAGE.glob("*/*.py") if path.parent.name != "study" and path != exercise.path)
    return [exercise.path, *(path for path in others if pattern.search(path.read_text(encoding="utf-8")))]


def edited_source(exercise: Exercise, wrong: Wrong) -> str:
    """The module's source with the edit made. ValueError if `find` does not occur exactly once or nothing changes."""
    path = PACKAGE / f"{wrong.module or exercise.module}.py"
    source = path.read_text(encoding="utf-8")
    count = source.count(wrong.find)
    if count != 1 or wrong.find == wrong.replace:
        what = "find equals replace" if count == 1 else f"find occurs {count} times in {path}, it must occur once"
        raise ValueError(f"wrong version {wrong.name!r} of {exercise.question}: {what}: {wrong.find!r}")
    return source.replace(wrong.find, wrong.replace)


def load_source(source: str, name: str) -> ModuleType:
    """The text run as a module that is in no file; inspect.getsource works on what it defines."""
    key = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    file = f"<{key}>"
    module = ModuleType(key)
    module.__file__ = file
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[key] = module  # dataclasses and typing look a class's module up here
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _answer_file(question: str, answers: Path) -> Path:
    path = answers / f"{question}.py"
    known = exercise_ids(answers)
    if question not in known:
        near = difflib.get_close_matches(question, known, n=3, cutoff=0.0)
        raise ExerciseError(f"no exercise {question}; nearest: {', '.join(near) or f'there is none in {answers}'}")
    return path


@functools.lru_cache(maxsize=64)
def _load(question: str, path: Path, answers: Path, mtime_ns: int) -> Exercise:
    name = f"minillm_answers.{question.replace('/', '.')}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:  # no import: its cached bytecode takes two edits within a second for one
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise ExerciseError(f"{path} does not run: {type(error).__name__}: {error}") from error
    exercise = getattr(module, "EXERCISE", None)
    if not isinstance(exercise, Exercise):
        raise ExerciseError(f"{path}: EXERCISE must be an Exercise, it is {type(exercise).__name__}")
    _validate(exercise, question, path, load_stub(question, answers))
    return exercise


def _validate(exercise: Exercise, question: str, path: Path, stub: str) -> None:
    names = [wrong.name for wrong in (*exercise.wrong, *exercise.also_wrong)]
    rules = {
        f"question must be {question!r}, it is {exercise.question!r}": exercise.question == question,
        "stub must be STUB": exercise.stub == stub,
        f"the first line of STUB must be {marker(question)!r}": stub.split("\n")[0] == marker(question),
        f"there is no reference module {exercise.path}": exercise.path.is_file(),
        "outputs must name what is returned": bool(exercise.outputs),
        "a wrong version of another module belongs in also_wrong": all(not wrong.module for wrong in exercise.wrong),
        "two wrong versions have one name": len(set(names)) == len(names),
    }
    for what, holds in rules.items():
        if not holds:
            raise ExerciseError(f"{path}: {what}")
    for source, where in (stub, f"{path}: STUB"), (exercise.path.read_text(encoding="utf-8"), str(exercise.path)):
        _function(source, exercise.function, where)


def _function(source: str, name: str, where: str) -> ast.FunctionDef:
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(found) != 1:
        raise ExerciseError(f"{where}: there must be one function {name} at the top level, there are {len(found)}")
    return found[0]
