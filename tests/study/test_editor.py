"""The buttons below a verdict: what the kernel answers, and in a real JupyterLab what they do to the open page."""

import functools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import exercise_tree
from exercise_tree import QUESTION
from minillm.study import editor, report, session
from minillm.study.checker import judge
from minillm.study.exercise import load_stub
from minillm.study.report import Result
from minillm.study.store import Store

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_HOME", str(tmp_path))
    task = exercise_tree.use(tmp_path, monkeypatch.setattr)
    monkeypatch.setattr(editor, "load_stub", functools.partial(load_stub, answers=tmp_path / "answers"))
    yield task
    session.log().close()


@pytest.fixture
def buttons(task):
    return editor.Buttons(QUESTION, hints=3)


def kept():
    return [event.data["code"] for event in session.log().events("attempt", QUESTION)]


def test_reset_answers_with_the_stub_once_the_code_is_kept(task, buttons):
    answer = buttons.answer("reset", "mine")
    assert (answer["code"], answer["sent"]) == (task.stub.rstrip(), "mine")
    assert kept() == ["mine"]
    buttons.answer("reset", task.stub)
    buttons.answer("reset", "mine\n")
    assert kept() == ["mine"]  # neither the stub nor the same text again


def test_restore_goes_round_through_all_that_was_kept(task, buttons):
    for code in "first", "second", "third":
        buttons.answer("reset", code)
    seen = ["new"]
    for _ in range(5):
        seen.append(buttons.answer("restore", seen[-1])["code"])
    assert seen == ["new", "third", "second", "first", "new", "third"]
    assert buttons.answer("restore", task.stub)["code"] == "new"


def test_restore_without_earlier_code_replaces_nothing(buttons):
    assert buttons.answer("restore", "mine") == {"kind": "quiet", "text": "There is no earlier code of yours."}
    assert buttons.answer("restore", None).keys() == {"kind", "text"}
    assert buttons.answer("restore", "mine").keys() == {"kind", "text"}


def test_editor_that_is_not_found_loses_nothing(task, buttons):
    assert buttons.answer("reset", None)["code"] == task.stub.rstrip()
    assert kept() == []
    buttons.answer("reset", "mine")
    assert buttons.answer("restore", None)["code"] == "mine"


def test_press_is_answered_to_the_view_that_was_pressed(task, buttons, monkeypatch):
    sent = []
    monkeypatch.setattr(buttons, "send", sent.append)
    buttons._receive(buttons, {"kind": "hint", "text": None, "id": "view"}, [])
    assert sent == [{"kind": "hint", "text": "Hint 1 of 3: Multiply.", "id": "view"}]


def test_nothing_is_replaced_when_the_code_can_not_be_kept(task, buttons, monkeypatch):
    sent = []
    monkeypatch.setattr(buttons, "send", sent.append)
    session.log().close()
    monkeypatch.setenv("MINILLM_HOME", __file__)  # a file, where a folder is needed
    buttons._receive(buttons, {"kind": "reset", "text": "mine", "id": "view"}, [])
    monkeypatch.undo()
    assert sent[0]["kind"] == "error"
    assert sent[0]["text"].startswith("Nothing was changed: ")
    assert "code" not in sent[0]


def test_output_of_a_cell_is_the_verdict_with_buttons_and_without(task, monkeypatch):
    monkeypatch.setattr(report, "_in_notebook", lambda: True)
    result = Result(QUESTION, task.signature, judge(task, 3), 3)
    bundle = result._repr_mimebundle_()
    assert (bundle["text/plain"], bundle["text/html"]) == (str(result), result.html)
    assert bundle[VIEW].keys() == {"model_id", "version_major", "version_minor"}


def test_no_button_for_hints_that_do_not_exist():
    assert list(editor.Buttons(QUESTION, hints=0).buttons) == ["reset", "restore"]


# In a browser

SETUP = """\
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import exercise_tree
from minillm.study import editor
exercise_tree.use(Path({folder!r}))
editor.load_stub = lambda question: exercise_tree.load_exercise(question, Path({folder!r}) / "answers").stub"""

OPEN = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  const widget = await app.commands.execute("docmanager:open", { path, factory: "Notebook" });
  await widget.context.ready;
  await widget.revealed;
  await widget.sessionContext.ready;
  window.opened = widget;
}"""
RUN = "async () => await window.jupyterapp.commands.execute('notebook:run-all-cells')"
SAVE = "async () => await window.opened.context.save()"
TEXT = "(index) => window.opened.content.widgets[index].model.sharedModel.getSource()"


@pytest.fixture
def page(tmp_path):
    """A page of a browser on a JupyterLab of its own, which shows a notebook with the small exercise."""
    missing = "no browser"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing, browser = "no playwright", None
    else:
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, home = secrets.token_hex(16), tmp_path / "home"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path / 'served'}"]
    command += [f"--IdentityProvider.token={token}"] + ["--allow-root"] * (getattr(os, "geteuid", lambda: 1)() == 0)
    places = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "RUNTIME")}
    places |= {f"JUPYTERLAB_{name}_DIR": str(home / name) for name in ("SETTINGS", "WORKSPACES")}
    environment = os.environ | places | {"MINILLM_HOME": str(home), "IPYTHONDIR": str(home / "ipython")}
    with open(tmp_path / "lab.txt", "w+b") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/api/status?token={token}", server, tmp_path / "lab.txt")
            with sync_playwright() as playwright:
                options = ["--disable-dev-shm-usage", "--disable-background-networking"]
                with playwright.chromium.launch(executable_path=browser, args=options) as chromium:
                    page = chromium.new_page(viewport={"width": 1200, "height": 1000})
                    page.set_default_timeout(60_000)
                    page.goto(f"{address}/lab?token={token}")
                    page.wait_for_function("window.jupyterapp")
                    yield page
        finally:
            server.terminate()
            server.wait()


def wait_for(address, server, log):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text(encoding="utf-8", errors="replace")
            time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace"))


@pytest.fixture
def served(tmp_path):
    """The notebook's file: set-up, text, exercise, check."""
    stub = exercise_tree.ANSWER.split('STUB = """\\\n')[1].split('"""\n\n\ndef')[0].replace('\\"', '"').rstrip("\n")
    setup = SETUP.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "tree"))
    check = f'from minillm.study.checker import check\n\ncheck("{QUESTION}", weighted_mean)'
    cells = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": text, "outputs": [], "execution_count": None}
        for n, text in enumerate((setup, "1 + 1", stub, check))
    ]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path = tmp_path / "served" / "data" / "mean.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(book), encoding="utf-8")
    return path


def write(page, text):
    """Types into the exercise cell in place of what is there."""
    page.locator(".jp-Cell").nth(2).locator(".cm-content").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.insert_text(text)
    assert page.evaluate(TEXT, 2) == text


def test_buttons_in_jupyterlab(tmp_path, served, page):
    stub = json.loads(served.read_text(encoding="utf-8"))["cells"][2]["source"]
    mine = stub.replace("raise NotImplementedError", "return x.mean(), w.sum()  # 中文")
    page.evaluate(OPEN, "data/mean.ipynb")
    page.evaluate(RUN)
    said = page.locator(".minillm-app [role=status]")
    page.get_by_text("not attempted yet").wait_for()

    page.get_by_role("button", name="Hint").click()
    page.get_by_text("Hint 1 of 3: Multiply.").wait_for()
    page.get_by_role("button", name="Hint").click()
    page.get_by_text("Hint 2 of 3: Sum.").wait_for()
    assert said.inner_text() == "Hint 1 of 3: Multiply.\nHint 2 of 3: Sum."

    page.get_by_role("button", name="Restore").click()
    page.get_by_text("There is no earlier code of yours.").wait_for()

    write(page, mine)
    page.get_by_role("button", name="Reset").click()
    page.get_by_text("This is the stub again.").wait_for()
    assert page.evaluate(TEXT, 2) == stub
    page.get_by_role("button", name="Restore").click()
    page.get_by_text("This is your earlier code.").wait_for()
    assert page.evaluate(TEXT, 2) == mine
    page.evaluate(SAVE)
    assert "".join(json.loads(served.read_text(encoding="utf-8"))["cells"][2]["source"]) == mine
    assert page.evaluate(TEXT, 1) == "1 + 1"

    page.evaluate(RUN)
    page.get_by_text("not right yet").first.wait_for()
    page.screenshot(path=os.environ.get("MINILLM_SHOTS", served.parent) / Path("check.png"))

    with Store(tmp_path / "home" / "study.db") as store:
        codes = [event.data["code"].rstrip() for event in store.events("attempt", QUESTION)]
    assert codes == [mine, mine]  # kept by reset, and by check as the whole cell

    write(page, "gone = 1")  # without the line that marks the cell
    page.get_by_role("button", name="Reset").click()
    page.get_by_text("The exercise cell is not in reach here.").wait_for()
    assert page.locator(".minillm-app textarea").input_value() == stub
    assert page.evaluate(TEXT, 2) == "gone = 1"
    page.get_by_role("button", name=re.compile("^Copy$")).click()
    page.get_by_role("button", name="Copied").wait_for()
