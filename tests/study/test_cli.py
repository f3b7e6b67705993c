"""The command line: what each command prints, its exit code, and what it does not import."""

import argparse
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from answer_tree import EN, ZH, write_question
from minillm import __main__ as cli
from minillm.study import checker, doctor, paths, workspace  # noqa: F401  (paths are bound before tests change them)
from minillm.study.exercise import load_exercise
from minillm.study.store import Store

ID = "attention/flash"
ROOT = paths.ROOT
HEAVY = {"torch", "numpy", "IPython", "matplotlib", "ipywidgets"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The learner's data directory, not there yet."""
    folder = tmp_path / "home"
    monkeypatch.setenv("MINILLM_HOME", str(folder))
    return folder


@pytest.fixture
def three(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of three questions in two areas; its root."""
    root = tmp_path / "checkout"
    write_question(root, ID)
    write_question(root, "attention/gqa", order=2, en="What is GQA?", zh="什么是 GQA？")
    write_question(root, "position/rope", en="What does RoPE rotate?", zh="RoPE 旋转什么？")
    monkeypatch.setattr(paths, "ANSWERS", root / "answers")
    monkeypatch.setattr(paths, "WORK", root / "work")
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> "type[Run]":
    Run.capsys = capsys
    return Run


class Run:
    """Runs one command in this process: its exit code and what it printed."""

    capsys: pytest.CaptureFixture[str]

    def __init__(self, *arguments: str | Path) -> None:
        try:
            self.code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            self.code = int(end.code or 0)
        self.out, self.err = self.capsys.readouterr()


def rate(home: Path, id: str, rating: int, days_ago: float) -> None:
    with Store(home / "study.db") as store:
        at = datetime.now(UTC) - timedelta(days=days_ago)
        store.append("rating", id, {"rating": rating, "ticked": []}, at=at)


def attempts(home: Path) -> list[dict]:
    with Store(home / "study.db") as store:
        return [event.data for event in store.events("attempt", ID)]


# --- list, find, answer ---


def test_list_without_study_data(three: Path, home: Path, run: type[Run]) -> None:
    listed = run("list")
    assert listed.code == 0
    assert listed.out == (
        "attention\n"
        "  attention/flash   30 min  Why is flash attention faster?\n"
        "  attention/gqa     30 min  What is GQA?\n"
        "\n"
        "position\n"
        "  position/rope     30 min  What does RoPE rotate?\n"
    )
    assert not home.exists()  # looking creates nothing


def test_list_marks_what_is_due_and_solved(three: Path, home: Path, run: type[Run]) -> None:
    rate(home, ID, 1, days_ago=30)
    rate(home, "attention/gqa", 4, days_ago=0)
    with Store(home / "study.db") as store:
        for id, verdict in ((ID, "passed"), (ID, "failed"), ("position/rope", "failed")):
            store.append("attempt", id, {"code": "", "verdict": verdict, "diagnosis": None, "path": None})
    flash, gqa, rope = (line for line in run("list").out.splitlines() if "min" in line)
    assert "30 min  due, solved  Why is" in flash  # a later failed attempt does not undo it
    assert "due" not in gqa  # rated just now
    assert "solved" not in rope  # never passed


def test_list_goes_on_without_marks_when_the_store_is_unusable(three: Path, home: Path, run: type[Run]) -> None:
    (home / "study.db").mkdir(parents=True)
    listed = run("list")
    assert listed.code == 0
    assert "attention/flash   30 min  Why" in listed.out
    assert "study.db" in listed.err
    assert run("progress").code == 1
    assert run("due").code == 1


def test_a_malformed_answer_is_named(three: Path, run: type[Run]) -> None:
    (three / "answers" / "attention" / "gqa.md").write_text("", encoding="utf-8")
    listed = run("list")
    assert (listed.code, listed.out) == (1, "")
    assert listed.err.startswith("answers/attention/gqa.md:1: front matter is missing")
    assert run("answer", ID).code == 0  # the others can be read


def test_find(three: Path, run: type[Run]) -> None:
    found = run("find", "RoPE", "rotate")
    assert (found.code, found.out) == (0, "  position/rope   30 min  What does RoPE rotate?\n")
    assert run("find", "旋转").out == "  position/rope   30 min  RoPE 旋转什么？\n"


def test_find_nothing(three: Path, run: type[Run]) -> None:
    found = run("find", "ropes")
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("no question fits ropes; nearest: position/rope, ")


@pytest.mark.parametrize("command", ["answer", "stub", "open"])
def test_an_unknown_id_names_the_nearest(three: Path, run: type[Run], command: str) -> None:
    unknown = run(command, "attention/flsh")
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err == "no question attention/flsh; nearest: attention/flash, attention/gqa, position/rope\n"


def test_check_with_an_unknown_id(three: Path, run: type[Run]) -> None:
    unknown = run("check", "flash", three / "no.py")
    assert unknown.code == 2
    assert unknown.err.startswith("no question flash; nearest: attention/flash")


def test_answer(three: Path, run: type[Run]) -> None:
    assert run("answer", ID).out == f"# Why is flash attention faster?\n\n{EN.strip()}\n"
    assert run("answer", ID, "--zh").out == f"# 为什么更快？\n\n{ZH.strip()}\n"
    assert run("answer", ID, "--short").out == (
        "# Why is flash attention faster?\n\nIt never writes the score matrix.\n"
    )
    assert run("answer", "--zh", "--short", ID).out == "# 为什么更快？\n\n从不写出分数矩阵。\n"


def test_alone_it_prints_help(run: type[Run]) -> None:
    shown = run()
    assert shown.code == 0
    commands = re.findall(r"^    (\w+) ", shown.out, re.MULTILINE)
    assert " ".join(commands) == "list find open answer stub check due progress export import doctor"


@pytest.mark.parametrize("arguments", [["study"], ["answer"], ["check", ID], ["find"], ["list", "x"]])
def test_wrong_usage(run: type[Run], arguments: list[str]) -> None:
    wrong = run(*arguments)
    assert wrong.code == 2
    assert wrong.err.startswith("usage: minillm")


# --- stub ---


def test_stub_is_a_runnable_file(home: Path, run: type[Run]) -> None:
    printed = run("stub", ID)
    assert printed.code == 0
    names: dict[str, object] = {}
    exec(compile(printed.out, "stub.py", "exec"), names)
    from minillm.study.exercise import load_exercise

    exercise = load_exercise(ID)
    assert callable(names[exercise.function])
    assert exercise.stub in printed.out  # with its docstring, the contract


EXERCISE = '''"""An exercise."""
import math
import os, json as j
from collections.abc import Callable, Iterable as It

import no_such_package

from minillm.attention.flash import f
raise SystemExit("a stub is read, not run")
STUB = {stub}
'''
STUB = "def f(x: Callable, y: It = j.loads('1')):\n    raise NotImplementedError\n"


def write_exercise(root: Path, stub: str) -> None:
    (root / "answers" / "attention" / "flash.py").write_text(EXERCISE.format(stub=stub), encoding="utf-8")


def test_stub_brings_the_imports_that_it_needs(three: Path, run: type[Run]) -> None:
    write_exercise(three, repr(STUB))
    # neither math nor os nor the reference, which the stub does not name
    assert run("stub", ID).out == (
        f"import json as j\nfrom collections.abc import Callable, Iterable as It\n\n\n{STUB}"
    )


def test_stub_keeps_its_own_imports(three: Path, run: type[Run]) -> None:
    stub = "import json as j\nfrom typing import Callable\nfrom collections.abc import Iterable as It\n" + STUB
    write_exercise(three, repr(stub))
    assert run("stub", ID).out == stub


def test_a_question_without_exercise_or_stub(three: Path, run: type[Run]) -> None:
    assert run("stub", ID).code == 1
    write_exercise(three, "str(1)")
    refused = run("stub", ID)
    assert (refused.code, refused.out) == (1, "")
    assert "STUB must be one string literal" in refused.err


# --- check, against the exercise of attention/flash ---


@pytest.fixture
def solution(home: Path) -> str:
    """A right solution: the reference's source, as if the learner had written it."""
    from minillm.study.exercise import load_exercise

    return load_exercise(ID).path.read_text(encoding="utf-8")


def check(run: type[Run], tmp_path: Path, text: str | bytes) -> Run:
    file = tmp_path / "my solution.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return run("check", ID, file)


def test_check_passes_a_right_solution(home: Path, tmp_path: Path, run: type[Run], solution: str) -> None:
    checked = check(run, tmp_path, solution)
    assert checked.code == 0, checked.out
    count = len(load_exercise(ID).make_cases())
    assert checked.out.startswith(f"attention/flash: passed, {count} of {count} cases right\n")
    assert checked.out.count("\n  right  ") == count
    assert attempts(home) == [
        {"code": solution, "verdict": "passed", "diagnosis": None, "path": str(tmp_path / "my solution.py")}
    ]


def test_check_names_the_mistake(home: Path, tmp_path: Path, run: type[Run]) -> None:
    from minillm.study.exercise import edited_source, load_exercise

    exercise = load_exercise(ID)
    wrong = exercise.wrong[0]
    source = edited_source(exercise, wrong)
    checked = check(run, tmp_path, source)
    assert checked.code == 1
    assert wrong.diagnosis in checked.out
    assert "WRONG" in checked.out
    assert "largest error" in checked.out
    (attempt,) = attempts(home)
    assert (attempt["verdict"], attempt["diagnosis"], attempt["code"]) == ("failed", wrong.diagnosis, source)


def test_check_of_the_stub(home: Path, tmp_path: Path, run: type[Run]) -> None:
    checked = check(run, tmp_path, run("stub", ID).out)
    assert checked.code == 1
    assert checked.out.startswith("attention/flash: not attempted yet; write attention_in_blocks in ")
    assert not home.exists()  # no attempt, nothing to record


def test_check_of_the_reference_imported(home: Path, tmp_path: Path, run: type[Run]) -> None:
    checked = check(run, tmp_path, "from minillm.attention.online_softmax import attention_in_blocks\n")
    assert checked.code == 1
    assert "does not count" in checked.out


BROKEN = [
    ("syntax", "import math\n\ndef f(:\n    pass\n", ":3: SyntaxError: invalid syntax"),
    ("indent", "def f():\npass\n", ":2: IndentationError: expected an indented block"),
    ("name", "import math\nx = 1\ny = z + x\n", ":3: NameError: name 'z' is not defined"),
    ("own function", "def g():\n    return 1 / 0\n\n\ng()\n", ":2: ZeroDivisionError: division by zero"),
    ("library", "import json\njson.loads('')\n", ":2: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ("two lines", "raise ValueError('a\\nb')\n", ":1: ValueError: a b"),
    ("exit", "import sys\nsys.exit()\n", ":2: SystemExit"),
    ("silent", "raise ValueError\n", ":1: ValueError"),
    ("no message", "class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E\n", ":4: E: (its message"),
    ("encoding", b"# -*- coding: utf-8 -*-\nx = '\xff'\n", "can't decode byte 0xff"),
    ("binary", b"x = 1\x00\n", "source code string cannot contain null bytes"),
    ("missing", "def attention():\n    pass\n", " defines no function attention_in_blocks; `minillm stub"),
    ("empty", "", " defines no function attention_in_blocks; "),
    ("no function", "attention_in_blocks = 3\n", "attention_in_blocks in {file} is no function, it is of type int"),
]


@pytest.mark.parametrize(("text", "sentence"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_check_of_a_file_that_does_not_run(
    home: Path, tmp_path: Path, run: type[Run], text: str | bytes, sentence: str
) -> None:
    checked = check(run, tmp_path, text)
    file = tmp_path / "my solution.py"
    assert checked.code == 1
    assert checked.err == ""  # so no traceback either
    assert checked.out.count("\n") == 1
    assert checked.out.startswith(f"{ID}: ")
    assert sentence.format(file=file) in checked.out
    assert str(file) in checked.out
    (attempt,) = attempts(home)  # what they wrote is kept all the same
    assert attempt["verdict"] == "error"
    assert attempt["code"] == (text if isinstance(text, str) else text.decode("utf-8", "replace"))
    assert f"{ID}: {attempt['diagnosis']}\n" == checked.out


@pytest.mark.parametrize(("name", "sentence"), [("none.py", "no such file"), ("folder", "directory|denied")])
def test_check_of_no_file(home: Path, tmp_path: Path, run: type[Run], name: str, sentence: str) -> None:
    (tmp_path / "folder").mkdir()
    checked = run("check", ID, tmp_path / name)
    assert (checked.code, checked.out) == (2, "")
    assert re.search(sentence, checked.err)
    assert name in checked.err
    assert checked.err.count("\n") == 1
    assert not home.exists()


def test_a_verdict_stands_without_a_store(home: Path, tmp_path: Path, run: type[Run], solution: str) -> None:
    (home / "study.db").mkdir(parents=True)
    checked = check(run, tmp_path, solution)
    assert checked.code == 0
    assert "passed" in checked.out
    assert checked.err.startswith("this attempt is not recorded: ")


def test_a_main_guard_does_not_run(home: Path, tmp_path: Path, run: type[Run], solution: str) -> None:
    assert check(run, tmp_path, f"{solution}\nif __name__ == '__main__':\n    raise SystemExit(3)\n").code == 0


def test_a_dataclass_in_the_file(home: Path, tmp_path: Path, run: type[Run], solution: str) -> None:
    more = "import dataclasses as d\n@d.dataclass\nclass A:\n    x: int\n    _: 'd.KW_ONLY'\n    y: int\nA(1, y=2)\n"
    assert check(run, tmp_path, f"{solution}\n{more}").code == 0  # looks its module up in sys.modules


# --- due, progress, export, import ---


def test_due(three: Path, home: Path, run: type[Run]) -> None:
    assert run("due").out == "nothing is due: no question is rated yet\n"
    rate(home, "attention/gqa", 3, days_ago=0)
    assert run("due").out == "nothing is due\n"
    rate(home, "position/rope", 1, days_ago=20)
    rate(home, ID, 1, days_ago=40)
    rate(home, "attention/gone", 1, days_ago=60)  # a question that no longer exists
    lines = run("due").out.splitlines()
    assert [line.split()[0] for line in lines] == [ID, "position/rope"]  # the longest overdue first
    assert re.search(r"Why is flash attention faster\?  \(since \d{4}-\d\d-\d\d\)$", lines[0])


def test_progress(three: Path, home: Path, run: type[Run]) -> None:
    rate(home, ID, 1, days_ago=40)
    with Store(home / "study.db") as store:
        store.append("attempt", "attention/gqa", {"code": "", "verdict": "passed", "diagnosis": None, "path": None})
    rows = [line.split() for line in run("progress").out.splitlines()]
    assert rows == [
        ["questions", "rated", "solved", "due"],
        ["attention", "2", "1", "1", "1"],
        ["position", "1", "0", "0", "0"],
        ["all", "3", "1", "1", "1"],
    ]


def test_export_and_import(
    three: Path, home: Path, tmp_path: Path, run: type[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    rate(home, ID, 1, days_ago=40)
    file = tmp_path / "study.json"
    assert run("export", file).out == f"1 events written to {file}\n"
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path / "other"))
    assert run("due").out.startswith("nothing is due")
    assert run("import", file).out == f"1 new events from {file}\n"
    assert run("import", file).out == f"0 new events from {file}\n"
    assert ID in run("due").out


def test_import_of_what_is_no_export(home: Path, tmp_path: Path, run: type[Run]) -> None:
    missing = run("import", tmp_path / "none.json")
    assert (missing.code, missing.out) == (2, "")
    assert not home.exists()
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    bad = run("import", tmp_path / "bad.json")
    assert (bad.code, bad.out) == (1, "")
    assert "bad.json" in bad.err
    assert bad.err.count("\n") == 1


# --- open ---


@pytest.fixture
def synced(three: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The learner's notebook of attention/flash, which workspace.sync has just copied."""
    import minillm.study

    notebook = three / "work" / "attention" / "flash.ipynb"

    def sync() -> list[str]:
        notebook.parent.mkdir(parents=True, exist_ok=True)
        notebook.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding="utf-8")
        return ["attention/flash: copied"]

    fake = SimpleNamespace(sync=sync, WorkspaceError=RuntimeError)
    monkeypatch.setitem(sys.modules, "minillm.study.workspace", fake)
    monkeypatch.setattr(minillm.study, "workspace", fake, raising=False)
    return notebook


def test_open_print(synced: Path, run: type[Run]) -> None:
    opened = run("open", ID, "--print")
    assert (opened.code, opened.out, opened.err) == (0, f"{synced}\n", "attention/flash: copied\n")
    assert synced.is_file()


def test_open_a_question_without_notebook(synced: Path, run: type[Run]) -> None:
    opened = run("open", "attention/gqa")
    assert (opened.code, opened.out) == (1, "")
    assert "attention/gqa has no notebook" in opened.err


def test_open_starts_lab_on_the_notebook(
    synced: Path, three: Path, run: type[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Lab:
        def __init__(self, command: list[str], cwd: Path, env: dict[str, str]) -> None:
            started.append((command, cwd, env))
            self.interrupts = 1

        def wait(self) -> int:
            if self.interrupts:
                self.interrupts = 0
                raise KeyboardInterrupt
            return 7

    monkeypatch.setattr(paths, "ROOT", three)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=""))
    monkeypatch.setattr(subprocess, "Popen", Lab)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run("open", ID).code == 7  # Lab's own, after one Ctrl-C that Lab answered itself
    ((command, cwd, env),) = started
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--LabApp.default_url=/lab/tree/work/attention/flash.ipynb" in command
    assert f"--ServerApp.root_dir={three}" in command
    assert cwd == three
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.fixture
def server(tmp_path: Path, three: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real Jupyter server on the checkout; its token."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    token = "a-token-of-the-test"
    command = [sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={three}", f"--IdentityProvider.token={token}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):  # up to a minute on a busy machine
            if list((tmp_path / "runtime").glob("jpserver-*.json")) or process.poll() is not None:
                break
            time.sleep(0.1)
        yield token
    finally:
        process.terminate()
        process.wait(60)


def test_open_goes_to_a_lab_that_runs(
    synced: Path, server: str, tmp_path: Path, run: type[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    import webbrowser

    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    monkeypatch.setattr(cli, "_start_lab", lambda notebook: pytest.fail("a second Lab"))
    shown = run("open", ID)
    assert shown.code == 0
    assert shown.out == f"{opened[0]}\n"
    assert re.fullmatch(rf"http://\S+:\d+/lab/tree/work/attention/flash\.ipynb\?token={server}", opened[0])
    # the same place through the server's interface: the address names a file that it serves
    contents = opened[0].replace("/lab/tree/", "/api/contents/")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(contents) as answer:
        assert json.load(answer)["path"] == "work/attention/flash.ipynb"
    assert cli._running_lab(tmp_path / "elsewhere" / "flash.ipynb") is None  # it does not serve that folder


# --- doctor ---


def test_doctor_here(home: Path, run: type[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    examined = run("doctor")
    assert examined.code == 0, examined.out
    assert "ok    Python 3." in examined.out
    assert re.search(r"(ok|warn)  +torch \d", examined.out)
    assert "ok    threads: OMP_NUM_THREADS=1" in examined.out
    assert f"ok    your study data: nothing yet in {home}" in examined.out
    assert re.search(r"ok    \d+ questions in ", examined.out)
    for line in examined.out.splitlines():
        assert re.match(r"(ok   |warn |fail |     ) \S", line)
    # every warning says what to do
    assert examined.out.count("\nwarn") + examined.out.count("\nfail") == examined.out.count("\n      ")


def test_doctor_fails_when_something_is_broken(three: Path, home: Path, run: type[Run]) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the folder should be", encoding="utf-8")
    (three / "answers" / "attention" / "gqa.md").write_text("", encoding="utf-8")
    examined = run("doctor")
    assert examined.code == 1
    assert f"fail  your study data: {home} can not be written" in examined.out
    assert "fail  the questions can not be read\n      answers/attention/gqa.md:1: front matter" in examined.out


def test_doctor_reads_the_store(home: Path, run: type[Run]) -> None:
    rate(home, ID, 3, days_ago=1)
    assert f"ok    your study data: 1 events in {home}" in run("doctor").out


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with a pyproject.toml that wants little."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch==2.13.0", "numpy>=2"]\n'
        '[project.optional-dependencies]\nstudy = ["PyYAML>=6"]\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return tmp_path


def test_doctor_on_packages(checkout: Path) -> None:
    here = {"numpy": "2.4.6", "pyyaml": "6.0.3", "torch": "2.13.0"}
    (missing,) = doctor._packages({"numpy": "2.4.6"})
    assert (missing.mark, missing.what) == ("fail", "packages missing: pyyaml")
    (no_lock,) = doctor._packages(here)
    assert no_lock.mark == "warn"
    lock = "# a comment\nnumpy==2.4.6 \\\n    --hash=sha256:0\nPyYAML==6.0.2 ; python_version >= '3.0'\n"
    lock += "numpy==9 ; sys_platform == 'none'\nabsent==1\ntorch==2.13.0+cpu\n"
    (checkout / "requirements.lock").write_text(lock, encoding="utf-8")
    (other,) = doctor._packages(here)
    assert (other.mark, other.what) == ("warn", "packages of another version: pyyaml 6.0.3 (locked 6.0.2)")
    (same,) = doctor._packages(here | {"pyyaml": "6.0.2"})
    assert (same.mark, same.what) == ("ok", "3 packages, of the versions in requirements.lock")


@pytest.mark.parametrize(
    ("version", "gpu", "mark", "text"),
    [
        (None, None, "fail", "torch is not installed"),
        ("2.13.0", None, "ok", "torch 2.13.0, no NVIDIA GPU"),
        ("2.13.0+cpu", None, "ok", "torch 2.13.0+cpu, no NVIDIA GPU"),
        ("2.13.0+cu130", "/bin/nvidia-smi", "ok", "an NVIDIA GPU"),
        ("2.13.0+cpu", "/bin/nvidia-smi", "warn", "an NVIDIA GPU"),
        ("2.12.1", None, "warn", "torch 2.12.1"),
    ],
)
def test_doctor_on_torch(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, gpu: str | None, mark: str, text: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: gpu)
    finding = doctor._torch({"torch": version} if version else {})
    assert finding.mark == mark
    assert text in finding.what
    assert bool(finding.advice) == (mark != "ok")


def test_doctor_on_browser_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "INSTALLED_BROWSERS", ())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._browser().mark == "warn"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "google-chrome" else None)
    assert doctor._browser() == doctor.Finding("ok", "browser for the browser test: /usr/bin/google-chrome")
    monkeypatch.setattr(sys, "platform", "linux")
    assert [doctor._triton(x).mark for x in ({}, {"triton": "3.9.0"})] == ["warn", "ok"]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor._triton({}).mark == "ok"


def test_doctor_finds_the_installed_versions() -> None:
    assert doctor._installed()["pytest"] == importlib.metadata.version("pytest")


# --- a process of its own: imports, encodings, pipes ---


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own: this package, 32 small questions, and a store with ratings."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "minillm", root / "minillm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    areas = ("attention", "position", "training", "inference")
    for number in range(32):
        write_question(root, f"{areas[number % 4]}/topic{number}", order=number + 1)
    shutil.copy(ROOT / "answers" / f"{ID}.py", root / "answers" / "attention" / "topic0.py")
    notebook = root / "notebooks" / "attention" / "topic0.ipynb"
    notebook.parent.mkdir(parents=True)
    notebook.write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', encoding="utf-8")
    for days in range(10, 20):
        rate(root / "home", "attention/topic0", 1, days)
    with Store(root / "home" / "study.db") as store:
        store.export_json(root / "study.json")
    return root


def start(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "MINILLM_HOME": str(project / "home"), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=project, env=env, capture_output=True)


LIGHT = [
    ["list"],
    ["find", "attention"],
    ["answer", "attention/topic0"],
    ["stub", "attention/topic0"],
    ["due"],
    ["progress"],
    ["open", "attention/topic0", "--print"],
    ["export", "out.json"],
    ["import", "study.json"],
    ["doctor"],
    ["answer", "nothing"],
    [],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=lambda arguments: " ".join(arguments[:1]) or "help")
def test_starts_without_heavy_imports(project: Path, arguments: list[str]) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from minillm import __main__ as cli\n"
        f"code = cli.main({arguments!r})\n"
        "names = ' '.join(sys.modules)\n"
        "print(code, cli.__file__, time.perf_counter() - start, names, sep='\\n', file=sys.stderr)\n"
    )
    began = time.perf_counter()
    done = start(project, "-c", code)
    wall = time.perf_counter() - began
    exit_code, file, seconds, names = done.stderr.decode().splitlines()[-4:]
    assert Path(file).is_relative_to(project)  # this copy, of 32 questions
    assert int(exit_code) == (2 if arguments == ["answer", "nothing"] else 0)
    assert not HEAVY & set(names.split())
    print(f"minillm {' '.join(arguments)}: {float(seconds):.3f} s in Python, {wall:.3f} s for the process")


def test_as_a_module_it_lists_every_question(project: Path) -> None:
    listed = start(project, "-m", "minillm", "list")
    assert (listed.returncode, listed.stderr) == (0, b"")
    assert listed.stdout.count(b" min ") == 32
    assert b"attention/topic0    30 min  due" in listed.stdout


def test_open_print_brings_the_copy_up_to_date(project: Path) -> None:
    shutil.rmtree(project / "work", ignore_errors=True)
    opened = start(project, "-m", "minillm", "open", "attention/topic0", "--print")
    copy = project / "work" / "attention" / "topic0.ipynb"
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout.decode().splitlines() == [str(copy)]  # and nothing else, so that $(...) can use it
    assert copy.is_file()
    (project / "notebooks").rename(project / "away")
    refused = start(project, "-m", "minillm", "open", "attention/topic0", "--print")
    (project / "away").rename(project / "notebooks")
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert b"notebooks: the checkout is not complete" in refused.stderr
    assert b"Traceback" not in refused.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "gbk"])
def test_chinese_on_a_console_that_is_not_utf8(project: Path, encoding: str) -> None:
    shown = start(project, "-m", "minillm", "answer", "attention/topic0", "--zh", PYTHONIOENCODING=encoding)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert "从不写出分数矩阵".encode() in shown.stdout
    refused = start(project, "-m", "minillm", "answer", "注意力", PYTHONIOENCODING=encoding)
    assert refused.returncode == 2
    assert "no question 注意力".encode() in refused.stderr


def test_main_leaves_a_stream_that_can_not_be_set_alone(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["answer", ID, "--zh", "--short"]) == 0
    assert "从不写出分数矩阵" in stream.getvalue()


def test_a_reader_that_leaves_is_no_error(project: Path) -> None:
    env = {**os.environ, "MINILLM_HOME": str(project / "home")}
    command = [sys.executable, "-m", "minillm", "list"]
    with subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_ctrl_c_ends_quietly(three: Path, run: type[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_list", interrupted)
    assert run("list").code == 130
