"""Calls a learner's function so that whatever it does stays inside: time, output, exceptions, global settings.

The call runs in a thread of its own. So the time limit needs no signals and is the same on every platform and in every
thread, a call that is stuck in compiled code is given up rather than waited for, and an interrupt of ours can not
arrive late in the caller. Ctrl-C reaches the caller as always and ends the call.
"""

import contextlib
import ctypes
import functools
import inspect
import io
import linecache
import os
import random
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import numpy as np
import torch

from minillm.study.paths import ANSWERS, ROOT

PRINTED = 2000  # characters that are kept of what a call prints
MESSAGE = 300  # characters that are shown of an exception's message
GRACE = 1.0  # seconds that a stopped call is waited for
PATHS = sysconfig.get_paths()
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (  # of the process; others belong to the thread
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
)
NOT_THE_LEARNERS = tuple(
    os.path.normcase(os.path.realpath(folder)) + os.sep
    for folder in (
        *(PATHS[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        *map(str, (Path(torch.__file__).parent, ROOT / "minillm", ANSWERS)),
    )
)


@dataclass(frozen=True)
class Raised:
    """An exception as the learner needs it: `line` and `text` are the place in their own code, if there is one."""

    kind: str
    message: str
    line: int | None = None
    text: str = ""
    own: bool = False  # raised by that line itself, not inside something that it calls

    def __str__(self) -> str:
        what = f"{self.kind}: {self.message}" if self.message else self.kind
        place = "it" if self.line is None else f"line {self.line} ({self.text})"
        return f"{place} raised {what}"


@dataclass(frozen=True)
class Call:
    """What came of a call. `watched`: a function watched for ran. `stuck`: it could not be ended in time."""

    value: Any = None
    raised: Raised | None = None
    expired: bool = False
    stuck: bool = False
    watched: bool = False
    printed: str = ""


class _Stop(SystemExit):
    """Ends the thread of a call; threads end silently on SystemExit, and `except Exception` does not catch it."""


class _Output(io.TextIOBase):
    """Keeps the beginning of what is printed."""

    def __init__(self) -> None:
        self.kept, self.total = "", 0

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self.kept += text[: max(0, PRINTED - len(self.kept))]
        self.total += len(text)
        return len(text)

    def __str__(self) -> str:
        return self.kept + (f"\n... {self.total:,} characters in all" if self.total > len(self.kept) else "")


def call(function: Callable[[], Any], seconds: float, watch: Callable[[CodeType], bool] | None = None) -> Call:
    """Calls `function` for at most `seconds`; `watch` says of a Python function that runs whether it is watched for."""
    output, result = _Output(), _Result()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("default")
        thread = threading.Thread(target=_work, args=(function, result, watch), daemon=True)
        try:
            thread.start()
            expired = not _done(result.done, seconds)
        except BaseException:
            _stop(thread, result.done)
            raise
        if expired:
            _stop(thread, result.done)
    for warning in list(caught):
        output.write(f"{warning.category.__name__}: {warning.message}\n")
    return Call(result.value, result.raised, expired, expired and not result.done.is_set(), result.watched, str(output))


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Puts torch's settings, the random number generators and the recursion limit back; starts from float32."""
    python, numpy, rng, limit = random.getstate(), np.random.get_state(), torch.get_rng_state(), sys.getrecursionlimit()
    before = [get() for get, _ in SETTINGS]
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        for (get, put), value in zip(SETTINGS, before, strict=True):
            if get() != value:
                put(value)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(rng)
        sys.setrecursionlimit(limit)


def seed(number: int) -> None:
    """Seeds the generators of torch (on the CPU), Python and numpy."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def normal(path: str | Path) -> str:
    """A file name in the one form in which two names of one file are equal."""
    return os.path.normcase(os.path.realpath(path))


def code_of(function: Any) -> CodeType | None:
    """The code that a call of `function` runs first, or None if it is not written in Python."""
    while isinstance(function, functools.partial):
        function = function.func
    with contextlib.suppress(Exception):
        function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) and not inspect.ismethod(function):
        function = vars(type(function)).get("__call__")
    return getattr(function, "__code__", None)


@dataclass
class _Result:
    value: Any = None
    raised: Raised | None = None
    watched: bool = False
    done: threading.Event = field(default_factory=threading.Event)


def _work(function: Callable[[], Any], result: _Result, watch: Callable[[CodeType], bool] | None) -> None:
    seen: dict[int, CodeType] = {}

    def spy(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and id(code) not in seen and watch is not None:
            seen[id(code)] = code
            if code.co_flags & inspect.CO_OPTIMIZED and watch(code):  # the body of a function, not of a module or class
                result.watched = True

    with contextlib.suppress(_Stop):
        try:
            if watch:
                sys.setprofile(spy)
            try:
                result.value = function()
            finally:
                sys.setprofile(None)
        except _Stop:
            raise
        except BaseException as error:
            result.raised = _raised(error)
        finally:
            result.done.set()


class Stopwatch:
    """Seconds since it was made: those of the processor where they are fewer, since a machine busy with other things
    is no fault of the code that waits for it; but a third of the wall clock's at least, since code may just sleep."""

    def __init__(self) -> None:
        self.wall, self.processor = time.monotonic(), time.process_time()

    @property
    def spent(self) -> tuple[float, float]:
        """Seconds of the wall clock and of the processor."""
        return time.monotonic() - self.wall, time.process_time() - self.processor

    @property
    def seconds(self) -> float:
        wall, processor = self.spent
        return min(wall, max(processor, wall / 3))

    @property
    def idle(self) -> bool:
        """Whether hardly any of the time was spent by the processor: the code waited for something."""
        wall, processor = self.spent
        return processor < wall / 10


def _done(done: threading.Event, seconds: float) -> bool:
    """Waits in short steps, because Windows does not let Ctrl-C end a longer wait.

    For an event and not for the thread: Python 3.11 takes a thread for dead if Ctrl-C comes while it is joined.
    """
    watch = Stopwatch()
    while not done.is_set() and (left := seconds - watch.seconds) > 0:
        done.wait(min(left, 0.1))
    return done.is_set()


def _stop(thread: threading.Thread, done: threading.Event) -> None:
    """Ends the thread, or leaves it to a second thread that asks it again from time to time."""

    def runs() -> bool:
        return thread.is_alive() and not done.is_set()  # what is behind it is no longer the learner's

    def ask(seconds: float) -> None:
        end = time.monotonic() + seconds
        while runs() and time.monotonic() < end:
            _send(thread, ctypes.py_object(_Stop))
            done.wait(0.05)
        if runs():
            _forget(thread)

    def go_on() -> None:
        while runs():
            done.wait(2.0)
            ask(0.05)

    ask(GRACE)
    if runs():
        threading.Thread(target=go_on, daemon=True).start()


def _send(thread: threading.Thread, exception: Any) -> None:
    """Has the thread raise the exception at its next step in Python; None takes an earlier one back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), exception)


def _forget(thread: threading.Thread) -> None:
    """Takes back the exception that a thread stuck in compiled code has not raised yet.

    As long as one is pending anywhere, Python 3.11 lets every traced function of the process spin; and it only notices
    that none is left when some thread has raised one.
    """
    _send(thread, None)

    def take() -> None:
        with contextlib.suppress(_Stop):
            _send(threading.current_thread(), ctypes.py_object(_Stop))
            for _ in range(1000):
                (lambda: None)()

    helper = threading.Thread(target=take, daemon=True)
    helper.start()
    helper.join()


def _raised(error: BaseException) -> Raised:
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message can not be read)"
    message = message if len(message) <= MESSAGE else message[:MESSAGE] + " [...]"
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    own = [place for place in places if _learners(place[0])]
    if not own:
        return Raised(type(error).__name__, message)
    file, line = own[-1]
    return Raised(type(error).__name__, message, line, linecache.getline(file, line).strip(), own[-1] == places[-1])


def _learners(file: str) -> bool:
    text = not file.startswith("<") or bool(linecache.getlines(file))  # else generated by a library, or frozen
    return text and not normal(file).startswith(NOT_THE_LEARNERS)
