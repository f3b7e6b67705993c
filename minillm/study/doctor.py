"""Looks for what is missing on this machine, without importing torch."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.study import paths
from minillm.study.registry import AnswerError, load_questions

SET_UP = "Run `python start.py`: it installs what requirements.lock names."
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
INSTALLED_BROWSERS = (  # where macOS and Windows put them, outside PATH
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    mark: str  # "ok", "warn" (something works less well) or "fail" (the app does not work)
    what: str
    advice: str = ""  # what to do; empty when ok


def examine() -> list[Finding]:
    """Everything that was looked at, in the order in which to read it."""
    installed = _installed()
    return [
        _python(),
        _torch(installed),
        _threads(),
        *_packages(installed),
        _data(),
        _questions(),
        _browser(),
        _triton(installed),
    ]


def _python() -> Finding:
    return Finding("ok", f"Python {platform.python_version()} at {sys.executable}")  # an older one starts nothing here


def _torch(installed: dict[str, str]) -> Finding:
    version = installed.get("torch")
    if not version:
        return Finding("fail", "torch is not installed", SET_UP)
    gpu = shutil.which("nvidia-smi")
    what = f"torch {version}, {'an NVIDIA GPU' if gpu else 'no NVIDIA GPU'} (nvidia-smi {'' if gpu else 'not '}found)"
    pins = re.findall(r"^torch==([\w.]+)$", "\n".join(_project()["dependencies"]), re.MULTILINE)
    if pins and version.split("+")[0] != pins[0]:
        return Finding("warn", what, f"torch {pins[0]} is what this was tested with. {SET_UP}")
    if gpu and version.endswith("+cpu"):
        return Finding("warn", what, "This torch is built for the CPU only; the README says how to get CUDA.")
    return Finding("ok", what)


def _project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((paths.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _threads() -> Finding:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    what = ", ".join(f"{name}={value}" for name, value in given.items()) or f"none of {', '.join(names)} is set"
    what = f"threads: {what}; {os.cpu_count()} CPUs"
    if given.get("OMP_NUM_THREADS") == "1" or given.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return Finding("ok", what)
    advice = "Several kernels at once can slow each other down by far; `python start.py` sets OMP_WAIT_POLICY=PASSIVE."
    return Finding("warn", what, advice)


def _packages(installed: dict[str, str]) -> list[Finding]:
    """Whether what studying needs is there, and whether versions are those of the lock."""
    project = _project()
    names = [_name(line) for line in project["dependencies"] + project["optional-dependencies"]["study"]]
    missing = [name for name in names if name not in installed and name != "torch"]
    if missing:
        return [Finding("fail", f"packages missing: {', '.join(missing)}", SET_UP)]
    file = paths.ROOT / "requirements.lock"
    if not file.is_file():
        return [Finding("warn", f"{file} is missing: versions are not compared", "Get a complete checkout.")]
    locked = {name: version for name, version in _locked(file) if name in installed}
    other = [
        f"{name} {installed[name]} (locked {version})"
        for name, version in locked.items()
        if installed[name].split("+")[0] != version.split("+")[0]
    ]
    if other:
        return [Finding("warn", f"packages of another version: {', '.join(other)}", SET_UP)]
    return [Finding("ok", f"{len(locked)} packages, of the versions in requirements.lock")]


def _locked(file: Path) -> Iterator[tuple[str, str]]:
    """Name and version of each package that the lock pins on this platform."""
    from packaging.markers import Marker

    for line in file.read_text(encoding="utf-8").splitlines():
        pin = re.match(r"[A-Za-z0-9._-]+(?:\[[^]]*\])?==([^\s;\\]+)\s*(?:;([^\\#]*))?", line)
        if pin and (not pin[2] or Marker(pin[2].strip()).evaluate()):
            yield _name(line), pin[1]


def _installed() -> dict[str, str]:
    """Version by name; the first found counts, as it does for import."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # parsed anew at each access
        if metadata["Name"]:
            versions.setdefault(_name(metadata["Name"]), metadata["Version"])
    return versions


def _name(requirement: str) -> str:
    """The name a requirement starts with, in the one spelling in which two spellings of it are equal."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def _data() -> Finding:
    folder = paths.data_dir()
    choose = "Make it writable, or set MINILLM_HOME to a folder that is."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("fail", f"your study data: {folder} can not be written ({error.strerror or error})", choose)
    if not any(folder.glob("study.db*")):
        return Finding("ok", f"your study data: nothing yet in {folder}")
    from minillm.study.store import Store, StoreError

    try:
        with Store() as store:
            count = len(store.events())
            notice = store.notice
    except StoreError as error:
        return Finding("fail", "your study data can not be read", str(error))
    if notice:
        return Finding("warn", f"your study data: {count} events in {folder}", notice)
    return Finding("ok", f"your study data: {count} events in {folder}")


def _questions() -> Finding:
    try:
        return Finding("ok", f"{len(load_questions(paths.ANSWERS))} questions in {paths.ANSWERS}")
    except AnswerError as error:
        return Finding("fail", "the questions can not be read", str(error))


def _browser() -> Finding:
    found = [path for path in map(shutil.which, BROWSERS) if path]
    found += [path for path in INSTALLED_BROWSERS if Path(path).is_file()]
    if found:
        return Finding("ok", f"browser for the browser test: {found[0]}")
    return Finding(
        "warn", "no Chromium or Chrome found", "Only the browser test needs one; without it that test is skipped."
    )


def _triton(installed: dict[str, str]) -> Finding:
    if "triton" in installed:
        return Finding("ok", f"triton {installed['triton']}")
    if sys.platform == "linux":
        advice = "Only the Triton kernels need it: `pip install triton` in the environment of this project."
        return Finding("warn", "triton is not installed", advice)
    return Finding("ok", "triton is not installed; it exists for Linux only")
