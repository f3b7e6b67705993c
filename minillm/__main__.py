"""The command line: `python -m minillm`, or `minillm` once installed. Only `check` imports torch."""

import argparse
import ast
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minillm.study import paths, registry
from minillm.study.registry import Question

if TYPE_CHECKING:
    from minillm.study.store import Event, Store

DONE, NO, USAGE = 0, 1, 2  # exit codes: done or passed; failed; the command does not fit what is there


class Refusal(Exception):
    """The command can not be carried out: the sentence for the user and the exit code."""

    def __init__(self, sentence: str, code: int = NO) -> None:
        super().__init__(sentence)
        self.code = code


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that is not UTF-8 must not stop on Chinese
            stream.reconfigure(encoding="utf-8", errors="replace")
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.command:
        parser.print_help()
        return DONE
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except registry.UnknownQuestion as error:
        print(error, file=sys.stderr)
        return USAGE
    except (Refusal, registry.AnswerError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "code", NO)
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO
    except KeyboardInterrupt:
        return 130  # what a shell gives for Ctrl-C


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minillm", description="LLM-engineering interview questions that you can run."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, help: str, **arguments: dict[str, Any]) -> None:
        command = commands.add_parser(name, help=help, description=help)
        for argument, options in arguments.items():
            command.add_argument(argument if "metavar" in options else f"--{argument}", **options)
        command.set_defaults(run=run)

    id: dict[str, Any] = {"metavar": "ID", "help": "a question, such as attention/flash"}
    file: dict[str, Any] = {"metavar": "FILE", "type": Path}
    flag: dict[str, Any] = {"action": "store_true"}
    add("list", _list, "all questions by area; what is due, what is solved")
    add("find", _find, "search the questions, in English or Chinese", words={"metavar": "WORDS", "nargs": "+"})
    add("open", _open, "open your copy of a notebook", id=id, print={**flag, "help": "print its path, open nothing"})
    short = {**flag, "help": "what to say in 30 seconds"}
    add("answer", _answer, "the model answer", id=id, zh={**flag, "help": "in Chinese"}, short=short)
    add("stub", _stub, "the exercise as a Python file to fill in", id=id)
    add("check", _check, "check a file with your solution; exit code 0 if it passes", id=id, file=file)
    add("due", _due, "what to review now")
    add("progress", _progress, "how far you are, by area")
    add("export", _export, "write your study data to a JSON file", file=file)
    add("import", _import, "add the study data of an exported file", file=file)
    add("doctor", _doctor, "look for what is missing on this machine")
    return parser


# --- reading ----------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    questions = _questions()
    try:
        events = _events()
    except Refusal as refusal:  # the list is of use without the marks
        print(refusal, file=sys.stderr)
        events = []
    marks = _marks(events)
    area = ""
    for question in questions.values():
        if question.area != area:
            print(("\n" if area else "") + question.area)
            area = question.area
        print(_row(question, questions.values(), marks))
    return DONE


def _find(args: argparse.Namespace) -> int:
    words = " ".join(args.words)
    found = registry.find(words, paths.ANSWERS)
    if not found:
        raise Refusal(f"no question fits {words}; nearest: {', '.join(registry.nearest(words, answers=paths.ANSWERS))}")
    for question in found:
        print(_row(question, found, {}, "en" if words.isascii() else "zh"))
    return DONE


def _row(question: Question, beside: Iterable[Question], marks: dict[str, str], language: str = "en") -> str:
    """One line about a question, its columns as wide as those `beside` it need."""
    width = max(len(other.id) for other in beside)
    mark = f"{marks.get(question.id, ''):<13}" if marks else ""
    return (
        f"  {question.id:<{width}}  {question.minutes:>3} min  {mark}{question.zh if language == 'zh' else question.en}"
    )


def _marks(events: "list[Event]") -> dict[str, str]:
    """By question "due", "solved" or both; empty when nothing was done yet."""
    solved = {e.question for e in events if e.kind == "attempt" and e.data.get("verdict") == "passed"}
    due = set(_overdue(events))
    both = {"due": due, "solved": solved}
    return {id: ", ".join(word for word, ids in both.items() if id in ids) for id in due | solved}


def _answer(args: argparse.Namespace) -> int:
    question = registry.load_question(args.id, paths.ANSWERS)
    language = "zh" if args.zh else "en"
    asked = question.zh if args.zh else question.en
    text = question.answers[language].short if args.short else registry.markdown(question, language)
    print(f"# {asked}\n\n{text.rstrip()}")
    return DONE


def _questions() -> dict[str, Question]:
    return registry.load_questions(paths.ANSWERS)


# --- notebook and exercise --------------------------------------------------------------------------------


def _open(args: argparse.Namespace) -> int:
    question = registry.load_question(args.id, paths.ANSWERS)
    from minillm.study import workspace

    try:
        done = workspace.sync()
    except workspace.WorkspaceError as error:
        raise Refusal(str(error)) from None
    for line in done:
        print(line, file=sys.stderr)
    notebook = paths.WORK / f"{question.id}.ipynb"
    if not notebook.is_file():
        raise Refusal(f"{question.id} has no notebook: {notebook} does not exist")
    if args.print:
        print(notebook)
        return DONE
    from importlib.util import find_spec

    if not find_spec("jupyterlab"):
        raise Refusal("JupyterLab is not installed in this Python; `python start.py` sets everything up")
    address = _running_lab(notebook)
    if address:
        import webbrowser

        print(address)
        webbrowser.open(address)
        return DONE
    return _start_lab(notebook)


def _running_lab(notebook: Path) -> str | None:
    """The address of the notebook in a Jupyter server of this user that serves its folder, or None."""
    import json
    import subprocess
    from urllib.parse import quote

    command = [sys.executable, "-m", "jupyter_server", "list", "--json"]
    servers = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
    for line in servers.splitlines():
        if not line.startswith("{"):
            continue
        server = json.loads(line)
        folder = Path(server["root_dir"]).resolve()
        if notebook.resolve().is_relative_to(folder):
            place = quote(notebook.resolve().relative_to(folder).as_posix())
            return f"{server['url']}lab/tree/{place}" + (f"?token={server['token']}" if server["token"] else "")
    return None


def _start_lab(notebook: Path) -> int:
    """Runs JupyterLab in the foreground until it ends; its exit code."""
    import subprocess
    from urllib.parse import quote

    # threads that wait must sleep: otherwise several kernels on one machine slow each other down by far
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    place = quote(notebook.relative_to(paths.ROOT).as_posix())
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={paths.ROOT}"]
    command.append(f"--LabApp.default_url=/lab/tree/{place}")  # so that the address it prints is the notebook's
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container; the token is asked for all the same
    lab = subprocess.Popen(command, cwd=paths.ROOT, env=environment)
    while True:
        try:
            return lab.wait()
        except KeyboardInterrupt:  # Lab got it too, and asks whether to stop
            continue


def _stub(args: argparse.Namespace) -> int:
    question = registry.load_question(args.id, paths.ANSWERS)
    from minillm.study.exercise import ExerciseError, load_stub

    try:
        stub = load_stub(question.id, paths.ANSWERS)
    except ExerciseError as error:
        raise Refusal(str(error)) from None
    path = paths.ANSWERS / f"{question.id}.py"
    print(_with_imports(stub, path.read_text(encoding="utf-8")).rstrip())
    return DONE


def _with_imports(stub: str, source: str) -> str:
    """The stub, with those imports of the exercise's source in front that it needs and does not have."""
    tree = ast.parse(stub)
    own = {name for node in ast.walk(tree) for name in _imported(node)}
    missing = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - own
    lines = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [name for name in node.names if _bound(name) in missing]
            if node.names:
                lines.append(ast.unparse(node))
    return "\n".join([*lines, "", "", stub]) if lines else stub


def _imported(node: ast.AST) -> list[str]:
    return [_bound(name) for name in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []


def _bound(name: ast.alias) -> str:
    return name.asname or name.name.split(".")[0]


def _check(args: argparse.Namespace) -> int:
    question = registry.load_question(args.id, paths.ANSWERS)
    source = _read(args.file)
    from minillm.study.checker import judge
    from minillm.study.exercise import ExerciseError, load_exercise
    from minillm.study.report import Result

    try:
        exercise = load_exercise(question.id, paths.ANSWERS)
    except ExerciseError as error:
        raise Refusal(str(error)) from None
    try:
        function = _function(_run_file(args.file, source), exercise.function, args.file, question.id)
    except Refusal as refusal:
        print(f"{question.id}: {refusal}")
        _record(question.id, source, "error", str(refusal), args.file)
        return NO
    verdict = judge(exercise, function)
    if verdict.status == "todo":
        print(f"{question.id}: not attempted yet; write {exercise.function} in {args.file}")
        return NO
    print(Result(question.id, exercise.signature, verdict))
    _record(question.id, source, verdict.status, verdict.diagnosis, args.file)
    return DONE if verdict.status == "passed" else NO


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Refusal(f"{file}: {(error.strerror or str(error)).lower()}", USAGE) from None


def _run_file(file: Path, source: bytes) -> ModuleType:
    """The module that the file defines; Refusal with the line if it does not run."""
    module = ModuleType("solution")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and typing look a class's module up here
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        where = f":{error.lineno}" if error.lineno else ""
        raise Refusal(f"{error.filename or file}{where}: {type(error).__name__}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = []
        trace = error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == str(file):
                lines.append(trace.tb_lineno)
            trace = trace.tb_next
        where = f":{lines[-1]}" if lines else ""
        try:
            text = " ".join(str(error).split())
        except Exception:
            text = "(its message can not be read)"
        raise Refusal(f"{file}{where}: {type(error).__name__}" + (f": {text}" if text else "")) from None
    return module


def _function(module: ModuleType, name: str, file: Path, id: str) -> Any:
    if not hasattr(module, name):
        raise Refusal(f"{file} defines no function {name}; `minillm stub {id}` prints the file to start from")
    function = getattr(module, name)
    if not callable(function):
        raise Refusal(f"{name} in {file} is no function, it is of type {type(function).__name__}")
    return function


def _record(id: str, source: bytes, status: str, diagnosis: str | None, file: Path) -> None:
    data = {
        "code": source.decode("utf-8", errors="replace"),
        "verdict": status,
        "diagnosis": diagnosis,
        "path": str(file.resolve()),
    }
    try:
        with _store() as store:
            store.append("attempt", id, data)
    except Refusal as refusal:  # the verdict stands all the same
        print(f"this attempt is not recorded: {refusal}", file=sys.stderr)


# --- the learner's data -----------------------------------------------------------------------------------


def _due(args: argparse.Namespace) -> int:
    questions, events = _questions(), _events()
    ids = [id for id in _overdue(events) if id in questions]
    if not ids:
        rated = any(event.kind == "rating" for event in events)
        print("nothing is due" if rated else "nothing is due: no question is rated yet")
        return DONE
    from minillm.study.schedule import due_at

    late = [questions[id] for id in ids]
    for question in late:
        since = due_at(events, question.id) or datetime.now(UTC)
        print(f"{_row(question, late, {})}  (since {since.astimezone():%Y-%m-%d})")
    return DONE


def _progress(args: argparse.Namespace) -> int:
    from minillm.study.schedule import progress

    counts = progress(_events(), _questions())
    columns = ("questions", "rated", "solved", "due")
    rows = [(area, [c.total, c.seen, c.solved, c.due]) for area, c in counts.items()]
    rows.append(("all", [sum(column) for column in zip(*(row for _, row in rows), strict=True)]))
    print(f"{'':<14}" + "".join(f"{column:>10}" for column in columns))
    for area, row in rows:
        print(f"{area:<14}" + "".join(f"{count:>10}" for count in row))
    return DONE


def _export(args: argparse.Namespace) -> int:
    with _store() as store:
        print(f"{store.export_json(args.file)} events written to {args.file}")
    return DONE


def _import(args: argparse.Namespace) -> int:
    _read(args.file)
    with _store() as store:
        print(f"{store.import_json(args.file)} new events from {args.file}")
    return DONE


def _overdue(events: "list[Event]") -> list[str]:
    if not any(event.kind == "rating" for event in events):
        return []
    from minillm.study.schedule import due

    return due(events, datetime.now(UTC))


def _events() -> "list[Event]":
    """What the learner did; nothing, and nothing created, where there is no store yet."""
    if not any(paths.data_dir().glob("study.db*")):
        return []
    with _store() as store:
        return store.events()


@contextmanager
def _store() -> "Iterator[Store]":
    from minillm.study.store import Store, StoreError

    try:
        with Store() as store:
            if store.notice:
                print(store.notice, file=sys.stderr)
            yield store
    except StoreError as error:
        raise Refusal(str(error)) from None


def _doctor(args: argparse.Namespace) -> int:
    from minillm.study.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.mark:<5} {finding.what}")
        if finding.advice:
            print(f"      {finding.advice}")
    return NO if any(finding.mark == "fail" for finding in findings) else DONE


if __name__ == "__main__":
    sys.exit(main())
