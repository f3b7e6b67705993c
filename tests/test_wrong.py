"""Every wrong-on-purpose edit of a reference module must fail at least one test of that module.

The edit is made in a copy of the package, and the module's own test file runs on the copy in a child process. The
child starts from a server that has imported torch and pytest already, so an edit costs about as much as its tests.
"""

import contextlib
import gc
import multiprocessing
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest

from minillm.study.exercise import edited_source, load_exercise
from minillm.study.paths import ROOT
from minillm.study.registry import load_questions

pytestmark = pytest.mark.apart
PRELOAD = ["torch", "torch.testing", "torch.utils.flop_counter", "torch._dynamo", "einops", "pytest", "beartype"]
PRELOAD += [f"transformers.models.{m}.modeling_{m}" for m in ("llama", "mixtral", "qwen3_moe", "deepseek_v3")]
TIME_LIMIT = 120  # seconds; an edit that makes the tests hang counts as a failure of this test, not of theirs

EXERCISES = {question: load_exercise(question) for question in load_questions()}
EDITS = [(question, wrong) for question, ex in EXERCISES.items() for wrong in (*ex.wrong, *ex.also_wrong)]
MODULES = sorted({wrong.module or EXERCISES[question].module for question, wrong in EDITS})


class Verdict:
    """A pytest plugin that keeps what the tests came to, whatever happens to pytest while it clears up."""

    code = 98  # pytest itself failed, no test did

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.code = int(exitstatus)


def run_tests(copy: str, test_file: str, log: str) -> None:
    """In the child: run one test file of the copied tree, against the package of the same tree."""
    gc.freeze()  # the preloaded heap is not searched when pytest ends, which takes longer than most tests
    os.chdir(copy)
    sys.path.insert(0, copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("minillm", "tests", "conftest")]:
        del sys.modules[name]
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    for name in ("CI", "BUILD_NUMBER"):  # with them pytest compares long lists item by item, for minutes
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with open(log, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        verdict = Verdict()
        try:
            options = ["-x", "-q", "--tb=native", "-p", "no:cacheprovider", f"--basetemp={copy}/temp"]
            pytest.main([*options, test_file], plugins=[verdict])
        except BaseException:
            traceback.print_exc()
        import minillm

        code = verdict.code
        if not Path(minillm.__file__).is_relative_to(copy):
            code = 99  # the copy was not what ran
    os._exit(code)


@pytest.fixture(scope="session")
def context():
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    return server


def outcome(context, tmp_path: Path, module: str, source: str | None) -> tuple[int | None, str]:
    """Exit code and output of the module's tests, run in a copy of the package with the module's text replaced."""
    ignore = shutil.ignore_patterns("__pycache__", "study")
    shutil.copytree(ROOT / "minillm", tmp_path / "minillm", ignore=ignore)
    area, topic = module.split("/")
    shutil.copytree(ROOT / "tests" / area, tmp_path / "tests" / area, ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    known = "filterwarnings = error\nmarkers =\n    slow: as in pyproject\n    gpu: as in pyproject\n"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{known}", encoding="utf-8")
    if source is not None:
        (tmp_path / "minillm" / f"{module}.py").write_text(source, encoding="utf-8")
    log = tmp_path / "log.txt"
    test_file = str(tmp_path / "tests" / area / f"test_{topic}.py")
    child = context.Process(target=run_tests, args=(str(tmp_path), test_file, str(log)))
    child.start()
    child.join(TIME_LIMIT)
    if child.is_alive():
        child.kill()
        child.join()
        return None, "time limit"
    return child.exitcode, log.read_text(encoding="utf-8") if log.exists() else "no output"


@pytest.mark.parametrize("module", MODULES)
def test_unedited_module_passes_in_the_copy(context, tmp_path, module):
    code, output = outcome(context, tmp_path, module, None)
    assert code == 0, output


@pytest.mark.parametrize(("question", "wrong"), EDITS, ids=[f"{q}: {w.name}" for q, w in EDITS])
def test_edit_is_caught(context, tmp_path, question, wrong):
    exercise = EXERCISES[question]
    code, output = outcome(context, tmp_path, wrong.module or exercise.module, edited_source(exercise, wrong))
    assert code == pytest.ExitCode.TESTS_FAILED, f"exit code {code}, {wrong.name!r} is not caught:\n{output[-2000:]}"
