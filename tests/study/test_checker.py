"""The checker: a verdict on whatever a learner may hand in, the right diagnosis, and nothing that leaks out."""

import _thread
import functools
import importlib.util
import math
import random
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import exercise_tree
from exercise_tree import QUESTION
from minillm.study import checker, guard, trial
from minillm.study.checker import check, fill, forbidden_ops, hint, judge, no_large_tensor
from minillm.study.compare import Difference, Tolerance, describe, errors
from minillm.study.exercise import ExerciseError, Probe, Wrong, load_source
from minillm.study.report import Result
from minillm.study.store import Store, StoreError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield exercise_tree.use(tmp_path_factory.mktemp("task"), patch.setattr)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "study.db") as store:
        yield store


def learner(text, name="weighted_mean"):
    """A function as a notebook cell would define it."""
    return getattr(load_source(text, "cell"), name)


def right(x, w, *, keepdim=False):
    total = w.sum(-1, keepdim=keepdim)
    return torch.einsum("...i,...i->...", x, w).reshape(total.shape) / total, total


# The verdict


def test_right_solution_passes(task):
    verdict = judge(task, right)
    assert (verdict.status, verdict.diagnosis, verdict.wrong) == ("passed", None, None)
    assert len(verdict.cases) == 6
    assert all(case.ok for case in verdict.cases)


def test_pasted_reference_passes(task):
    assert judge(task, learner(fill(task))).status == "passed"


@pytest.mark.parametrize(
    "name", ["not divided", "plain mean", "axis dropped", "one total", "rows only", "always fails"]
)
def test_wrong_version_gets_its_own_diagnosis(task, name):
    wrong = next(wrong for wrong in task.wrong if wrong.name == name)
    verdict = judge(task, learner(fill(task, wrong)))
    assert (verdict.status, verdict.wrong, verdict.diagnosis) == ("failed", name, wrong.diagnosis)


def test_mistake_is_known_by_what_it_does_not_by_its_text(task):
    def sums(x, w, *, keepdim=False):
        return (x * w).cumsum(-1)[..., -1:] if keepdim else (x * w).cumsum(-1)[..., -1], w.sum(-1, keepdim=keepdim)

    assert judge(task, sums).wrong == "not divided"


def test_two_mistakes_that_look_the_same_are_both_named(task):
    verdict = judge(task, learner(fill(task, task.wrong[4])))
    assert verdict.wrong == "first twin, second twin"
    assert verdict.diagnosis == "One of these: One is added. Or: One is put in front."


def test_wrong_version_without_effect_on_results_is_no_diagnosis(task):
    assert judge(task, learner(fill(task, task.wrong[-1]))).status == "passed"


def test_exception_in_every_case_matches_only_with_its_message(task):
    verdict = judge(task, learner("def weighted_mean(x, w, *, keepdim=False):\n    return {}[0]\n"))
    assert verdict.wrong is None
    fails = judge(task, learner("def weighted_mean(x, w, *, keepdim=False):\n    return [1][x.dim()]\n"))
    assert fails.wrong == "always fails"  # IndexError: list index out of range, as in that version


def test_unknown_mistake_says_where_it_shows(task):
    def shifted(x, w, *, keepdim=False):
        mean, total = right(x, w, keepdim=keepdim)
        return mean + 0.25 * (x.dim() > 1), total

    verdict = judge(task, shifted)
    assert (verdict.status, verdict.wrong) == ("failed", None)
    assert "It is right in: vector, no weight, infinite." in verdict.diagnosis
    assert "'matrix' look at mean[0], which is 3, expected 2.75" in verdict.diagnosis
    case = verdict.cases[1]
    assert (case.ok, case.error, case.asked) == (False, 0.25, "two rows")
    assert case.expected == case.got == "mean float32[2], total float32[2]"


# Attempts that are none


def test_stub_is_not_attempted(task):
    assert judge(task, learner(task.stub)).status == "todo"


def test_unfinished_attempt_is_an_error_with_its_line(task):
    text = (
        "def weighted_mean(x, w, *, keepdim=False):\n    if keepdim:\n        raise NotImplementedError\n"
        "    return (x * w).sum(-1) / w.sum(-1), w.sum(-1)\n"
    )
    verdict = judge(task, learner(text))
    assert verdict.status == "error"
    assert "In the case 'keepdim' line 3 (raise NotImplementedError) raised NotImplementedError" in verdict.diagnosis


def test_operation_that_torch_does_not_have_is_not_an_untouched_stub(task):
    def sparse(x, w, *, keepdim=False):
        return torch.ops.aten.linalg_svdvals.default(x.to_sparse()), w

    assert judge(task, sparse).status == "error"


def reference(task):
    spec = importlib.util.spec_from_file_location("data_mean", task.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.weighted_mean


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        lambda f: lambda x, w, keepdim=False: f(x, w, keepdim=keepdim),
        functools.partial,
        lambda f: lambda x, w, keepdim=False: right(x, w) if x.dim() == 1 and not keepdim else f(x, w, keepdim=keepdim),
        lambda f: torch.no_grad()(f),
    ],
    ids=["itself", "called", "partial", "only sometimes", "decorated"],
)
def test_running_the_reference_does_not_count(task, wrap):
    verdict = judge(task, wrap(reference(task)))
    assert verdict.status == "invalid"
    assert verdict.diagnosis == "It runs minillm's own data/mean.py: write it yourself."


def test_running_the_oracle_does_not_count(task):
    assert judge(task, task.expected).status == "invalid"


def test_importing_the_reference_without_running_it_counts(task):
    def imports(x, w, *, keepdim=False):
        reference(task)
        return right(x, w, keepdim=keepdim)

    assert judge(task, imports).status == "passed"


# Nonsense


class Module(torch.nn.Module):
    def forward(self, x, w, keepdim=False):
        return right(x, w, keepdim=keepdim)


class Unreadable(Exception):
    def __str__(self):
        raise ValueError("no message")


class Strange:
    def __getattr__(self, name):
        raise RuntimeError("no attribute")

    def __call__(self, x, w, keepdim=False):
        return self.result


def raises(error):
    raise error


async def coroutine(x, w, keepdim=False):
    return x


def generator(x, w, keepdim=False):
    yield x


def recursive(x, w, keepdim=False):
    return recursive(x, w, keepdim)


def gives(make):
    """A function whose result `make` makes of the right one."""
    return lambda x, w, *, keepdim=False: make(*right(x, w, keepdim=keepdim))


def does(act):
    """A function with the right result that does something else as well."""

    def function(x, w, *, keepdim=False):
        result = right(x, w, keepdim=keepdim)
        act(x, w)
        return result

    return function


BUFFER = torch.zeros(2)


def in_one_buffer(mean, total):
    """A result in memory that the next call uses again."""
    return BUFFER[: mean.numel()].copy_(mean.reshape(-1)).reshape(mean.shape), total


NONSENSE = {
    "not a function": (3, "error", "it got int"),
    "a result": (torch.ones(2), "error", "it got float32[2]"),
    "None": (None, "error", 'check needs the function itself, check("data/mean", weighted_mean); it got None'),
    "no parameters": (lambda: None, "error", "It must accept weighted_mean(x, w, *, keepdim=False); it takes ()"),
    "keyword missing": (lambda x, w: right(x, w), "error", "got an unexpected keyword argument 'keepdim'"),
    "builtin": (max, "error", "it raised RuntimeError"),
    "class": (Module, "error", "raised TypeError"),
    "returns None": (gives(lambda m, t: None), "failed", "`return (mean, total)` is missing"),
    "one value": (gives(lambda m, t: m), "failed", "2 tensors are asked"),
    "three values": (gives(lambda m, t: (m, t, t)), "failed", "returns 3 values; 2 are asked: (mean, total)"),
    "dictionary": (gives(lambda m, t: {"mean": m}), "failed", "returns dict; 2 tensors are asked"),
    "numpy": (gives(lambda m, t: (m.numpy(), t)), "failed", "mean is numpy.ndarray; a torch.Tensor is asked"),
    "number": (gives(lambda m, t: (m, 1.0)), "failed", "total is float; a torch.Tensor is asked"),
    "shape": (gives(lambda m, t: (m[None], t)), "failed", "mean has shape [1]; [] is asked"),
    "dtype": (gives(lambda m, t: (m.double(), t)), "failed", "mean is float64; float32 is asked"),
    "half only": (gives(lambda m, t: (m.float(), t)), "failed", "In the case 'half': mean is float32; float16"),
    "sparse": (gives(lambda m, t: (m.to_sparse(), t)), "failed", "mean is a torch.sparse_coo tensor on cpu"),
    "meta": (gives(lambda m, t: (m.to("meta"), t)), "failed", "on meta"),
    "NaN": (gives(lambda m, t: (m * math.nan, t)), "failed", "mean, which is nan, expected 2.75"),
    "inf": (gives(lambda m, t: (m + math.inf, t)), "failed", "mean, which is inf, expected 2.75"),
    "huge": (gives(lambda m, t: (t.expand(9**9, 9**8, *t.shape), t)), "failed", "shape [387420489, 43046721]"),
    "too huge": (does(lambda x, w: torch.empty(10**17)), "error", "raised RuntimeError"),
    "coroutine": (coroutine, "failed", "`async def`"),
    "generator": (generator, "failed", "`yield`"),
    "recursion": (recursive, "error", "RecursionError"),
    "sys.exit": (does(lambda x, w: raises(SystemExit(3))), "error", "raised SystemExit: 3"),
    "KeyboardInterrupt": (does(lambda x, w: raises(KeyboardInterrupt())), "error", "KeyboardInterrupt"),
    "GeneratorExit": (does(lambda x, w: raises(GeneratorExit())), "error", "GeneratorExit"),
    "no message": (does(lambda x, w: raises(Unreadable())), "error", "(its message can not be read)"),
    "long message": (does(lambda x, w: raises(ValueError("long " * 999))), "error", "long long  [...]."),
    "random": (gives(lambda m, t: (m + torch.rand(()), t)), "failed", "different results"),
    "Python's random": (gives(lambda m, t: (m + random.random(), t)), "failed", "different results"),
    "numpy's random": (gives(lambda m, t: (m + np.random.rand(), t)), "failed", "different results"),
    "input filled": (does(lambda x, w: x.zero_()), "failed", "It changes x in place"),
    "inputs resized": (does(lambda x, w: (x.resize_(0), w.resize_(0))), "failed", "changes x, w in place"),
    "input changed and changed back": (does(lambda x, w: x.neg_().neg_()), "passed", ""),
    "module": (Module(), "passed", ""),
    "namedtuple": (gives(lambda m, t: torch.return_types.max((m, t))), "passed", ""),
    "list": (gives(lambda m, t: [m, t]), "passed", ""),
    "requires grad": (gives(lambda m, t: (m.clone().requires_grad_(), t)), "passed", ""),
    "parameter": (gives(lambda m, t: (torch.nn.Parameter(m), t)), "passed", ""),
    "view": (gives(lambda m, t: (m.expand(3, *m.shape)[1], t)), "passed", ""),
    "mock": (mock.MagicMock(), "failed", "It returns unittest.mock.MagicMock; 2 tensors are asked"),
    "strange object": (Strange(), "error", "raised RuntimeError: no attribute"),
    "strange results": (gives(lambda m, t: (Strange(), Strange())), "failed", "mean is "),
    "nested": (gives(lambda m, t: (torch.nested.nested_tensor([m, m]), t)), "failed", "mean can not be read"),
    "complex": (gives(lambda m, t: (m * 1j, t)), "failed", "mean is complex64; float32 is asked"),
    "one buffer": (gives(in_one_buffer), "failed", "In the case 'half': mean is float32"),
    "inference mode": (torch.inference_mode()(right), "passed", ""),
    "warns": (does(lambda x, w: warnings.warn("look", stacklevel=1)), "passed", ""),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_whatever_is_handed_in_gets_a_verdict(task, name):
    function, status, said = NONSENSE[name]
    verdict = judge(task, function)
    assert verdict.status == status, verdict
    assert said in (verdict.diagnosis or "")
    result = Result(QUESTION, task.signature, verdict)
    assert "Traceback" not in str(result) + result.html


@pytest.mark.parametrize("name", ["random", "shape", "recursion", "input filled"])
def test_verdict_is_the_same_again(task, name):
    function = NONSENSE[name][0]
    assert judge(task, function) == judge(task, function)


def test_state_between_calls_is_seen(task):
    calls = []

    def counts(x, w, *, keepdim=False):
        calls.append(x)
        mean, total = right(x, w, keepdim=keepdim)
        return mean, total + (len(calls) > len(trial.asked(task)))

    assert judge(task, counts).diagnosis == checker.UNREPEATABLE


def test_exception_shows_the_learners_line_not_ours(task):
    text = (
        "import torch\n\n\ndef helper(x):\n    return torch.ones(2) @ torch.ones(3)  # no\n\n\n"
        "def weighted_mean(x, w, *, keepdim=False):\n    return helper(x), w\n"
    )
    verdict = judge(task, learner(text))
    assert verdict.status == "error"
    start = "In the case 'vector' line 5 (return torch.ones(2) @ torch.ones(3)  # no) raised RuntimeError: "
    assert verdict.diagnosis.startswith(start)
    assert verdict.cases[0].got.startswith("line 5")


def test_exception_without_a_line_of_the_learner(task):
    assert judge(task, torch.dot).diagnosis.startswith(
        "In the case 'matrix' it raised RuntimeError: 1D tensors expected"
    )


def test_argument_list_may_be_longer_than_the_stub(task):
    assert judge(task, lambda x, w, keepdim=False, extra=0: right(x, w, keepdim=keepdim)).status == "passed"


# Time


def endless(x, w, keepdim=False):
    while True:
        pass


def deaf(x, w, keepdim=False):
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


def sleeper(x, w, keepdim=False):
    time.sleep(3)


@pytest.mark.parametrize(("function", "stuck"), [(endless, False), (deaf, True), (sleeper, True)])
def test_time_limit(task, monkeypatch, function, stuck):
    monkeypatch.setattr(guard, "GRACE", 0.3)
    verdict = judge(task, function, time_limit=0.2)
    assert verdict.status == "error"
    assert "It did not finish within 0.2 seconds (in the case 'vector')" in verdict.diagnosis
    assert ("restart the kernel" in verdict.diagnosis) is stuck


def test_a_call_that_waits_is_told_so(task, monkeypatch):
    monkeypatch.setattr(guard, "GRACE", 0.3)
    assert "it waits for something" in judge(task, sleeper, time_limit=0.3).diagnosis
    assert "look for a loop" in judge(task, endless, time_limit=0.3).diagnosis


def test_a_call_that_can_not_be_stopped_does_not_slow_the_next_one(task, monkeypatch):
    monkeypatch.setattr(guard, "GRACE", 0.3)
    asleep = threading.Event()

    def long(x, w, keepdim=False):
        asleep.wait(20)

    try:
        assert judge(task, long, time_limit=0.2).status == "error"
        began = time.process_time()
        assert judge(task, right).status == "passed"  # Python 3.11 spins here if an exception is pending elsewhere
        assert time.process_time() - began < 2
    finally:
        asleep.set()


def test_attempts_from_several_threads_keep_apart(task, capsys):
    before, verdicts = list(warnings.filters), []

    def loud(x, w, *, keepdim=False):
        print("loud")
        return right(x, w, keepdim=keepdim)

    def work(function):
        verdicts.append((function, judge(task, function)))

    threads = [threading.Thread(target=work, args=(each,)) for each in (loud, right) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.status for _, verdict in verdicts] == ["passed"] * 6
    assert all(bool(verdict.printed) is (function is loud) for function, verdict in verdicts)
    assert warnings.filters == before
    print("as before")
    assert capsys.readouterr().out == "as before\n"


def test_a_tensor_that_refuses_to_be_asked(task):
    class Stubborn(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise RuntimeError("no")

    verdict = judge(task, lambda x, w, keepdim=False: x.as_subclass(Stubborn))
    assert verdict.status == "failed"
    assert "2 tensors are asked" in verdict.diagnosis


@pytest.mark.parametrize(
    ("wall", "processor", "seconds"),
    [
        (10.0, 4.0, 4.0),  # a busy machine gave it 4 seconds
        (9.0, 0.0, 3.0),  # it sleeps
        (10.0, 30.0, 10.0),  # three threads
    ],
)
def test_a_busy_machine_does_not_count(monkeypatch, wall, processor, seconds):
    now = [100.0, 50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[1])
    watch = guard.Stopwatch()
    now[:] = [100.0 + wall, 50.0 + processor]
    assert watch.seconds == pytest.approx(seconds)


def test_time_limit_holds_in_probes_and_for_all_calls_together(task):
    def slow(x, w, keepdim=False):
        while x.shape[0] == 100:
            pass
        return right(x, w, keepdim=keepdim)

    assert "(in large tensor)" in judge(task, slow, time_limit=1.0).diagnosis


def test_time_limit_never_reaches_the_caller():
    def work():
        return sum(number % 7 for number in range(400_000))

    began, right_sum = time.perf_counter(), work()
    seconds = time.perf_counter() - began
    for step in range(40):  # the limit falls before, into and behind the end of the call
        called = guard.call(work, seconds * step / 20)
        assert called.raised is None
        assert called.value == right_sum or called.expired


def test_ctrl_c_reaches_the_caller(task):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test worker may ignore the signal
    try:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            judge(task, endless, time_limit=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(frame.f_code is endless.__code__ for frame in sys._current_frames().values()), "it still runs"


# What a function does to its surroundings


def test_settings_and_generators_are_as_before(task):
    def meddler(x, w, *, keepdim=False):
        result = right(x, w, keepdim=keepdim)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.set_num_threads(3)
        torch.set_default_device("meta")
        torch.set_float32_matmul_precision("medium")
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        warnings.simplefilter("ignore")
        return result

    def settings():
        return (
            *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device()),
            *(
                torch.get_float32_matmul_precision(),
                torch.get_rng_state().tolist(),
                random.getstate(),
                warnings.filters,
            ),
            *(np.random.get_state()[1].tolist(), np.random.get_state()[2]),
        )

    before = settings()
    assert judge(task, meddler).status == "passed"
    assert settings() == before


def test_verdict_does_not_depend_on_the_settings_of_the_notebook(task):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.device("meta"):
            trial.asked.cache_clear()
            assert judge(task, right).status == "passed"
    finally:
        torch.set_default_dtype(torch.float32)
        trial.asked.cache_clear()


def test_gradients_can_be_taken_where_the_notebook_has_them_off(task):
    def with_grad(x, w, *, keepdim=False):
        leaf = x.detach().clone().requires_grad_()
        right(leaf, w, keepdim=keepdim)[0].sum().backward()
        return right(x, w, keepdim=keepdim)

    with torch.no_grad():
        assert judge(task, with_grad).status == "passed"


def test_what_is_printed_is_shown_in_part(task, capsys):
    def chatty(x, w, *, keepdim=False):
        for number in range(1000):
            print("number", number)
        return right(x, w, keepdim=keepdim)

    verdict = judge(task, chatty)
    assert verdict.status == "passed"
    assert verdict.printed.startswith("number 0\nnumber 1\n")
    assert verdict.printed.endswith("... 10,890 characters in all")
    assert len(verdict.printed) < guard.PRINTED + 50
    assert capsys.readouterr() == ("", "")


def test_warnings_count_as_printed(task):
    assert "UserWarning: look" in judge(task, NONSENSE["warns"][0]).printed


# Probes


def pairs(x, w, *, keepdim=False):
    if x.dim() == 2 and x.shape[0] > 10:
        x @ x.mT  # 100 x 100 numbers; a view or an expanded tensor would be no new memory
    return right(x, w, keepdim=keepdim)


def test_probe_finds_what_right_results_hide(task):
    verdict = judge(task, pairs)
    assert (verdict.status, verdict.wrong) == ("failed", "large tensor")
    assert verdict.diagnosis == "A table of all pairs is built."
    assert all(case.ok for case in verdict.cases)


def test_probe_is_not_asked_about_wrong_results_unless_it_says_so(task):
    def wrong(x, w, keepdim=False):
        return [each + 0.5 for each in pairs(x, w, keepdim=keepdim)]

    assert judge(task, wrong).diagnosis.startswith("No known mistake gives these numbers.")
    too = replace(task, probes=tuple(replace(probe, wrong_too=True) for probe in task.probes))
    assert judge(too, wrong).wrong == "large tensor"


def test_two_numbers_that_differ_are_shown_to_differ(task):
    def nearly(x, w, keepdim=False):
        mean, total = right(x, w, keepdim=keepdim)
        return mean * (1 + 2e-5), total

    found = next(case.where for case in judge(task, nearly).cases if not case.ok)
    one, other = found.split("which is ")[1].split(", expected ")
    assert one != other
    assert float(one) == pytest.approx(float(other), rel=3e-5)


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: x @ x.mT, True),
        (lambda x: torch.empty(100, 100), True),
        (lambda x: [x.expand(100, 100, 3), x[:50].mT, x.mul_(2), x[None].unfold(1, 2, 1)], False),
        (lambda x: x.expand(100, 100, 3) + 1, True),
        (lambda x: torch.cat([x] * 2), True),
        (lambda x: torch.zeros(100, 4, dtype=torch.float64), False),
    ],
    ids=["product", "empty", "views", "expanded and used", "joined", "at the limit"],
)
def test_large_tensor(work, found):
    probe = no_large_tensor(lambda: ((torch.ones(100, 3),), {}), 400)
    assert probe.run(work) == ("It builds a tensor that is larger than the exercise allows." if found else None)


@pytest.mark.parametrize(
    ("work", "found"),
    [
        (lambda x: torch.softmax(x, -1), True),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]), True),
        (lambda x: torch.exp(x) / torch.exp(x).sum(), False),
    ],
)
def test_forbidden_operation(work, found):
    names = ("_softmax", "_scaled_dot_product")
    assert forbidden_ops(lambda: ((torch.ones(4, 3),), {}), names, "No.").run(work) == ("No." if found else None)


def test_exception_on_the_inputs_of_a_probe(task):
    def small_only(x, w, *, keepdim=False):
        assert x.shape[0] < 100, "too many"
        return right(x, w, keepdim=keepdim)

    verdict = judge(task, small_only)
    assert verdict.status == "failed"
    assert "On other inputs line" in verdict.diagnosis
    assert "AssertionError: too many" in verdict.diagnosis


# Our own faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"make_cases": lambda: []}, "make_cases made no case"),
        ({"make_cases": lambda: 1 / 0}, "make_cases raised ZeroDivisionError"),
        (
            {"expected": lambda x, w, keepdim=False: x},
            "the oracle on 'vector' returned float32\\[3\\], not mean, total",
        ),
        ({"expected": lambda x, w: (x, w)}, "the oracle on 'keepdim' raised TypeError"),
        ({"wrong": (Wrong("w", "absent", "b", "d"),)}, "the wrong version 'w' does not load: ValueError"),
        ({"wrong": (Wrong("w", "return mean, total", "return (", "d"),)}, "does not load: SyntaxError"),
        ({"probes": (Probe("p", lambda f: 3),)}, "the probe 'p' returned int, not a sentence"),
    ],
)
def test_broken_exercise_is_our_fault_and_says_so(task, change, message):
    function = right if "probes" in change else gives(lambda m, t: (m, t + 7))
    with pytest.raises(ExerciseError, match=message) as error:
        judge(replace(task, **change), function)
    assert "the exercise data/mean is broken" in str(error.value)


def test_every_verdict_of_a_wrong_version_that_never_ends(task, monkeypatch):
    monkeypatch.setattr(trial, "WRONG_LIMIT", 0.2)
    endless_edit = Wrong("endless", "total = w", "while True: pass\n    total = w", "It never ends.")
    verdict = judge(replace(task, wrong=(endless_edit,)), gives(lambda m, t: (m, t + 7)))
    assert (verdict.status, verdict.wrong) == ("failed", None)


# Numbers


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], [0, 0, 0]),
        ([1.0, math.nan, math.inf], [math.nan, 1.0, -math.inf], [math.inf, math.inf, math.inf]),
        ([1.0, 2.0, -math.inf], [math.inf, 2.5, 3.0], [math.inf, 0.5, math.inf]),
    ],
)
def test_errors(expected, got, error):
    assert errors(torch.tensor(expected), torch.tensor(got)).tolist() == error
    for one, other, far in zip(expected, got, error, strict=True):
        assert Tolerance(rtol=0.1, atol=0.1).difference(torch.tensor(one), torch.tensor(other)).close == (far == 0)


def test_largest_error_is_among_those_too_far_off():
    expected, got = torch.tensor([[1e6, 1.0], [2.0, 3.0]]), torch.tensor([[1e6 + 1, 1.0], [2.5, 3.0]])
    assert Tolerance(rtol=1e-5, atol=0).difference(expected, got) == Difference(0.5, (1, 0), close=False)
    assert Tolerance(rtol=1, atol=0).difference(expected, got) == Difference(1.0, (0, 0), close=True)
    assert Tolerance(rtol=0, atol=0).difference(torch.ones(0, 2), torch.ones(0, 2)) == Difference(0.0, (), close=True)


def test_integers_must_be_equal():
    one = torch.tensor([10, 2**60])
    other = one + torch.tensor([1, 0])
    assert Tolerance(rtol=1, atol=5).difference(one, other) == Difference(1.0, (0,), close=False)


def test_half_precision_may_round_to_the_neighbour():
    # 1.0009765625 is the next float16 after 1; 1.001953125 is the one after that
    for got, close in (1.0009765625, True), (1.001953125, False):
        assert (
            Tolerance(rtol=1e-6, atol=0).difference(torch.tensor(1.0).half(), torch.tensor(got).half()).close == close
        )


def test_describe():
    values = {torch.ones(2, 3): "float32[2, 3]", (torch.ones(()), 1): "tuple of float32[], int", (): "tuple of nothing"}
    assert {value: describe(value) for value in values} == values


# Records


def test_check_records_the_attempt(task, store):
    text = "import torch\n\nTWO = 2\n\n\ndef weighted_mean(x, w, *, keepdim=False):\n    return x, w * TWO\n"
    result = check(QUESTION, learner(text), store=store)
    (event,) = store.events()
    assert (event.kind, event.question) == ("attempt", QUESTION)
    assert event.data == {"code": text, "verdict": "failed", "diagnosis": result.verdict.diagnosis, "path": None}


def test_function_of_a_file_is_recorded_with_its_path(task, store):
    check(QUESTION, right, store=store)
    data = store.events()[0].data
    assert (data["verdict"], data["path"]) == ("passed", __file__)
    assert data["code"].startswith("def right(x, w, *, keepdim=False):\n    total")


def test_untouched_stub_is_no_attempt(task, store):
    assert "not attempted yet" in str(check(QUESTION, learner(task.stub), store=store))
    assert store.events() == []


def test_unfinished_code_is_kept(task, store):
    text = task.stub.replace("    raise", "    half = 1\n    raise")
    assert check(QUESTION, learner(text), store=store).verdict.status == "todo"
    assert store.events()[0].data["code"] == text
    assert store.events()[0].data["verdict"] == "kept"


def test_what_is_no_function_is_no_attempt(task, store):
    assert check(QUESTION, 3, store=store).verdict.status == "error"
    assert store.events() == []


def test_function_without_source_is_recorded_with_a_note(task, store):
    result = check(QUESTION, torch.dot, store=store)
    assert result.notes == ("The source of this function can not be found: only the verdict is recorded.",)
    assert store.events()[0].data["code"] == ""


def test_reference_is_not_recorded_as_the_learners_code(task, store):
    check(QUESTION, reference(task), store=store)
    assert (store.events()[0].data["verdict"], store.events()[0].data["code"]) == ("invalid", "")


def test_store_that_fails_does_not_hide_the_verdict(task, store, monkeypatch):
    monkeypatch.setattr(store, "append", lambda *_: raises(StoreError("the disk is full")))
    result = check(QUESTION, right, store=store)
    assert result.verdict.status == "passed"
    assert "This attempt is not recorded: the disk is full" in str(result)
    assert "the disk is full" in str(hint(QUESTION, store=store))


def test_check_uses_the_learners_own_store(task, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path))
    check(QUESTION, right)
    with Store(tmp_path / "study.db") as store:
        assert [event.kind for event in store.events()] == ["attempt"]


def test_hints_come_one_at_a_time(task, store):
    assert [str(hint(QUESTION, store=store)) for _ in range(4)] == [
        "Hint 1 of 3: Multiply.",
        "Hint 2 of 3: Sum.",
        "Hint 3 of 3: Divide.",
        "There are no more hints.\n1. Multiply.\n2. Sum.\n3. Divide.",
    ]
    assert [event.data for event in store.events("hint", QUESTION)] == [{"number": 1}, {"number": 2}, {"number": 3}]


# Display


def test_text_of_a_failure(task):
    text = str(Result(QUESTION, task.signature, judge(task, learner(fill(task, task.wrong[2]))), 3))
    assert text.splitlines()[:3] == [
        "data/mean: not right yet, 5 of 6 cases right",
        "keepdim is ignored in the mean.",
        "  right  vector: one row",
    ]
    assert "         expected  mean float32[2, 1], total float32[2, 1]\n" in text
    assert "         got       mean float32[2, 2], total float32[2, 1]\n" in text


def test_stub_shows_what_to_do(task):
    result = Result(QUESTION, task.signature, judge(task, learner(task.stub)), 3)
    assert (
        str(result)
        == repr(result)
        == (
            "data/mean: not attempted yet\n"
            "Write weighted_mean(x, w, *, keepdim=False) in the exercise cell, run it, and run this cell again."
        )
    )
    assert result._repr_mimebundle_().keys() == {"text/plain", "text/html"}  # no kernel, so no buttons


def test_html_shows_the_learners_text_as_text(task):
    def chatty(x, w, *, keepdim=False):
        print("<script>alert(1)</script>")
        raise ValueError("<b>bold</b>")

    html = Result(QUESTION, task.signature, judge(task, chatty), 3, ("a < b",)).html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;bold" in html
    assert "a &lt; b" in html
    assert "<script" not in html


def test_checker_knows_no_question(task):
    with pytest.raises(ExerciseError, match="no exercise data/man; nearest: data/mean"):
        check("data/man", right)
    assert checker.fill(task, task.wrong[0]).count(" / total") == 0
