"""A real JupyterLab and a real Chromium: one of each for all browser tests, on copies that the tests may change."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from minillm.study.paths import ROOT
from minillm.study.workspace import sync

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARTIFACTS = ROOT / "artifacts"  # screenshots, kept after the run and not in git
TOKEN = "browser-test"
OPEN = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await panel.context.ready;
  await panel.revealed;
  await panel.sessionContext.ready;
  window.panel = panel;
}"""
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
SHOW_CELL = """async (id) => {
  const notebook = window.panel.content;
  notebook.activeCellIndex = notebook.widgets.findIndex(cell => cell.model.id === id);
  await notebook.scrollToItem(notebook.activeCellIndex, 'start');
}"""
RUN_CELL = "() => window.jupyterapp.commands.execute('notebook:run-cell')"
WRITE_CELL = """([id, text]) => {
  window.panel.content.widgets.find(cell => cell.model.id === id).model.sharedModel.setSource(text);
}"""
READ_CELL = "(id) => window.panel.content.widgets.find(cell => cell.model.id === id).model.sharedModel.getSource()"
ERRORS = """() => window.panel.content.widgets.flatMap(cell => {
  const outputs = cell.model.outputs ? cell.model.outputs.toJSON() : [];
  return outputs.filter(o => o.output_type === 'error' || o.name === 'stderr')
                .map(o => cell.model.id + ': ' + (o.evalue || o.text));
})"""


@pytest.fixture(scope="session")
def chromium():
    """The path of a browser; without one the test is skipped, but not in CI."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("no browser, and CI=true: the browser test must run")
    if found is None:
        pytest.skip("no browser")
    return found


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of a JupyterLab over a fresh copy of the learner's folder, and where it keeps the learner's data."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("answers", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    sync(ROOT / "notebooks", folder / "work")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}"]
    settings = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = os.environ | settings | {"MINILLM_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.2)
        else:
            pytest.fail("JupyterLab did not answer within a minute: " + (folder / "lab.log").read_text()[-2000:])
        yield address, folder / "home"
    finally:
        server.terminate()
        server.wait(30)


class Page:
    """A browser page with JupyterLab in it, in the words of these tests."""

    def __init__(self, page, address: str, home: Path) -> None:
        self.page, self.address, self.home = page, address, home
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))

    def open(self, path: str) -> None:
        """Open a notebook, also after a reload."""
        self.page.goto(f"{self.address}/lab/tree/{path}?token={TOKEN}")
        self.page.wait_for_function("window.jupyterapp")
        self.page.evaluate(OPEN, path)

    def reload(self, path: str) -> None:
        self.page.reload()
        self.page.wait_for_function("window.jupyterapp")
        self.page.evaluate(OPEN, path)

    def run_all(self) -> None:
        self.page.evaluate(RUN_ALL)
        assert self.page.evaluate(ERRORS) == []

    def run_cell(self, cell: str) -> None:
        self.show(cell)
        self.page.evaluate(RUN_CELL)

    def show(self, cell: str) -> None:
        """Scroll to a cell and make it the active one."""
        self.page.evaluate(SHOW_CELL, cell)

    def write(self, cell: str, text: str) -> None:
        self.page.evaluate(WRITE_CELL, [cell, text])

    def read(self, cell: str) -> str:
        return self.page.evaluate(READ_CELL, cell)

    def shot(self, name: str, of=None) -> Path:
        """A picture of the page or of a part of it, under artifacts/."""
        ARTIFACTS.mkdir(exist_ok=True)
        self.page.wait_for_timeout(300)  # fonts and images settle
        path = ARTIFACTS / f"{name}.png"
        (of or self.page).screenshot(path=str(path))
        return path


@pytest.fixture
def page(chromium, lab):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"],
        )
        try:
            tab = browser.new_page(viewport={"width": 1280, "height": 1900})
            tab.set_default_timeout(60_000)
            shown = Page(tab, *lab)
            yield shown
            assert shown.problems == []
        finally:
            browser.close()
