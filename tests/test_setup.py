"""Set-up: the lock, environment.yml and pyproject.toml say the same, and start.py does what its help says.

start.py runs here against a machine that is imitated (no venv is made, nothing is installed): what it would start is
recorded. That it works on real ones is what the jobs for Linux, macOS and Windows show.
"""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import jupyterlab
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [Requirement(text) for text in [*PROJECT["dependencies"], *(d for extra in EXTRAS.values() for d in extra)]]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = [Requirement(line) for line in LOCK.splitlines() if line and not line.startswith("#")]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
SETTINGS = Path("etc/jupyter/labconfig/default_setting_overrides.json")


def pins_for(name, python, platform):
    """The pins of a package that hold for a Python and a platform (sys.platform)."""
    systems = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    here = {
        "python_version": python,
        "python_full_version": f"{python}.8",
        "sys_platform": platform,
        "platform_system": systems[platform],
        "os_name": "nt" if platform == "win32" else "posix",
        "extra": "",
    }
    held = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(name)]
    return [pin for pin in held if pin.marker is None or pin.marker.evaluate(here)]


# The lock


def test_the_lock_holds_exact_pins_and_nothing_else():
    assert len(PINS) > 50
    for pin in PINS:
        assert re.fullmatch(r"==[\w.!]+", str(pin.specifier)), pin
        assert pin.url is None
    assert "://" not in LOCK
    assert "--" not in LOCK


def test_the_lock_leaves_torch_and_cuda_to_start_py():
    assert [pin.name for pin in PINS if re.match("torch|nvidia|cuda", pin.name)] == []


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_direct_dependency_has_one_pin_in_its_range(python, platform):
    for requirement in DIRECT:
        if requirement.name == "torch" or (
            requirement.marker and not requirement.marker.evaluate({"sys_platform": platform})
        ):
            continue
        (pin,) = pins_for(requirement.name, python, platform)
        (version,) = (clause.version for clause in pin.specifier)
        assert requirement.specifier.contains(version), f"{pin} is not in {requirement}"


def test_what_torch_needs_is_pinned_too():
    needs = [Requirement(text) for text in metadata.requires("torch")]
    for requirement in needs:
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and not re.match(
            "nvidia|cuda|triton", requirement.name
        ):
            assert pins_for(requirement.name, "{}.{}".format(*sys.version_info[:2]), sys.platform), requirement


def test_torch_is_pinned_to_one_version_wherever_it_is_named():
    (pinned,) = (str(r.specifier) for r in DIRECT if r.name == "torch")
    assert pinned == "==2.13.0"
    named = [
        ROOT / name for name in ("environment.yml", "start.py", "README.md", "README.zh.md", ".github/workflows/ci.yml")
    ]
    found = {v for path in named for v in re.findall(r"torch={2,3}(\d[\w.]*\d)", path.read_text(encoding="utf-8"))}
    assert found == {"2.13.0"}
    assert metadata.version("torch").partition("+")[0] == "2.13.0"


# environment.yml


def test_environment_yml_is_the_lock_for_conda(start):
    (pip,) = (part["pip"] for part in ENVIRONMENT["dependencies"] if isinstance(part, dict))
    listed = {canonicalize_name(Requirement(line).name): line for line in pip if not line.startswith("-")}
    assert {"jupyterlab", "torch", "matplotlib", "nbval", "ipywidgets", "einops"} <= set(listed)
    lines = LOCK.splitlines()
    assert [line for name, line in listed.items() if name != "torch" and line not in lines] == []
    wanted = {canonicalize_name(r.name) for r in DIRECT} - {"triton", "trl", "peft"}  # Linux only; tests only
    assert set(listed) == wanted
    assert [line for line in pip if line.startswith("-")] == [
        f"--extra-index-url {start.CPU_INDEX}",  # 2.13.0+cpu from there goes before PyPI's 2.13.0
        "-c requirements.lock",
        "-e .",
    ]
    assert (ROOT / "environment.yml").read_text(encoding="utf-8") == start.environment_yml(PROJECT, LOCK)


def test_conda_brings_a_python_that_will_do_and_pip():
    assert PROJECT["requires-python"] == ">=3.11"
    assert ENVIRONMENT["dependencies"][:2] == ["python=3.11", "pip"]


@pytest.mark.slow
def test_the_pip_part_of_environment_yml_resolves(tmp_path):
    """pip accepts the list beside what is installed. Torch's index is left out: it may be out of reach here."""
    (pip,) = (part["pip"] for part in ENVIRONMENT["dependencies"] if isinstance(part, dict))
    kept = [line for line in pip if not line.startswith("--extra-index-url")]
    listed = tmp_path / "requirements.txt"
    kept[kept.index("-c requirements.lock")] = f"-c {(ROOT / 'requirements.lock').as_uri()}"
    kept[kept.index("-e .")] = f"-e {ROOT.as_uri()}"
    listed.write_text("\n".join(kept), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "-r", str(listed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"Would install.*\btorch-", done.stdout)


# JupyterLab's settings


def test_settings_are_jupyterlabs_and_installed():
    """A misspelt key or value would be ignored without a word, and the pop-ups be back."""
    settings = json.loads((ROOT / SETTINGS).read_text(encoding="utf-8"))
    schemas = Path(jupyterlab.__file__).parent / "schemas"
    if not schemas.exists():
        schemas = Path(sys.prefix) / "share/jupyter/lab/schemas"
    for plugin, values in settings.items():
        package, name = plugin.split(":")
        properties = json.loads((schemas / package / f"{name}.json").read_text(encoding="utf-8"))["properties"]
        for key, value in values.items():
            choices = [choice["const"] for choice in properties[key].get("oneOf", [])]
            assert value in choices if choices else isinstance(value, bool)
    assert settings["@jupyterlab/apputils-extension:notification"] == {"fetchNews": "false", "checkForUpdates": False}
    assert json.loads((Path(sys.prefix) / SETTINGS).read_text(encoding="utf-8")) == settings


# start.py


def test_start_py_parses_on_an_old_python():
    ast.parse((ROOT / "start.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_old_python_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer and this is Python 3\.10 "):
        runpy.run_path(str(ROOT / "start.py"), run_name="__main__")


class Machine:
    """A computer on which start.py runs: what it starts is recorded, and torch and .venv are pretended."""

    def __init__(self, start, root):
        self.start, self.root, self.commands = start, root, []
        self.torch, self.version, self.pip_works = "", start.HERE, True
        self.wheel_directory = False  # whether a configured index has the CPU build
        self.stop_at = 0  # the number of the command that is interrupted
        self.replaced_by = ""  # the torch that the second pip puts in place of the first one's

    def run(self, *command, **extra):
        words = " ".join(command)
        self.commands.append(words)
        if len(self.commands) == self.stop_at:
            raise KeyboardInterrupt
        if " -m venv " in words:
            Path(self.start.python()).parent.mkdir(parents=True)
            Path(self.start.python()).write_text("", encoding="utf-8")
            self.pip_works = True
        torch = re.search(r"torch={2,3}(\S+)", words)
        if torch:
            self.torch = torch[1]
        elif "requirements.lock" in words and self.replaced_by:
            self.torch = self.replaced_by
        return 0

    def ask(self, *command):
        words = " ".join(command)
        if "pip --version" in words:
            return self.pip_works, "pip"
        if "torch==" in words:
            if self.wheel_directory:
                self.torch = "2.13.0+cpu"
            return self.wheel_directory, ""
        if "metadata" in words:
            return bool(self.torch), self.torch
        return Path(self.start.python()).exists() and bool(self.version), self.version

    def kinds(self):
        """What was started, in a word each."""
        patterns = {"venv": " -m venv ", "torch": "torch==", "packages": r"-e \.\["}
        return [next((kind for kind, p in patterns.items() if re.search(p, c)), c) for c in self.commands]


@pytest.fixture
def start(monkeypatch):
    """The module start."""
    monkeypatch.syspath_prepend(str(ROOT))
    import start

    return start


@pytest.fixture
def machine(start, monkeypatch, tmp_path):
    """A Linux machine with nothing installed, the checkout in a folder with a blank in its name."""
    root = tmp_path / "my apps"
    root.mkdir()
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root)
    machine = Machine(start, root)
    for name, value in {"ROOT": root, "VENV": root / ".venv", "LINUX": True}.items():
        monkeypatch.setattr(start, name, value)
    monkeypatch.setattr(start, "run", machine.run)
    monkeypatch.setattr(start, "ask", machine.ask)
    return machine


def test_a_first_run_installs_and_a_second_nothing(start, machine):
    start.prepare(start.STUDY)
    assert machine.kinds() == ["venv", "torch", "packages"]
    machine.commands.clear()
    start.prepare(start.STUDY)
    assert machine.commands == []


@pytest.mark.parametrize("stop_at", [1, 2, 3], ids=["venv", "torch", "packages"])
def test_an_interrupted_run_resumes(start, machine, stop_at):
    machine.stop_at = stop_at
    assert start.main(["setup"]) == 130
    machine.stop_at = 0
    machine.commands.clear()
    start.prepare(start.STUDY)
    # pip is asked for torch again, finds it and does nothing
    assert machine.kinds() == (["venv", "torch", "packages"] if stop_at == 1 else ["torch", "packages"])
    machine.commands.clear()
    start.prepare(start.STUDY)
    assert machine.commands == []


def test_a_package_that_was_being_unpacked_or_replaced_is_installed_anew(start, machine):
    start.prepare(start.STUDY)
    packages = start.VENV / "lib" / "python3.11" / "site-packages"
    for name in ("whole-1", "half-1", "two-1", "two-2"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        if name != "half-1":
            (packages / f"{name}.dist-info" / "INSTALLER").write_text("pip", encoding="utf-8")
    (start.VENV / start.STAMP).unlink()
    start.prepare(start.STUDY)
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_a_venv_without_pip_is_made_anew(start, machine):
    start.make_venv("cpu")
    machine.commands.clear()
    machine.pip_works = False
    start.prepare(start.STUDY)
    assert machine.kinds() == ["venv", "torch", "packages"]


@pytest.mark.parametrize("version", ["", "3.99"], ids=["does not run", "another Python"])
def test_a_venv_of_a_python_that_is_not_this_one_is_made_anew(start, machine, version):
    start.prepare(start.STUDY)
    machine.commands.clear()
    machine.version = version
    start.prepare(start.STUDY)
    assert machine.kinds() == ["venv", "torch", "packages"]


def test_a_moved_checkout_gets_a_new_venv(start, machine, monkeypatch, tmp_path):
    start.prepare(start.STUDY)
    machine.commands.clear()
    moved = machine.root.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(start, "ROOT", moved)
    monkeypatch.setattr(start, "VENV", moved / ".venv")
    start.prepare(start.STUDY)
    assert machine.kinds() == ["venv", "torch", "packages"]


@pytest.mark.parametrize(
    ("name", "old", "new", "kinds"),
    [
        ("requirements.lock", "fsrs==", "fsrs==9", ["torch", "packages"]),
        ("pyproject.toml", "numpy>=2", "numpy>=2.1", ["torch", "packages"]),
        ("pyproject.toml", "line-length = 120", "line-length = 90", []),
    ],
)
def test_new_pins_are_installed_into_the_same_venv(start, machine, name, old, new, kinds):
    start.prepare(start.STUDY)
    machine.commands.clear()
    path = machine.root / name
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    start.prepare(start.STUDY)
    assert machine.kinds() == kinds


def test_tests_need_more_and_studying_after_them_nothing(start, machine):
    start.prepare(start.STUDY)
    machine.commands.clear()
    start.prepare(start.TEST)
    assert machine.commands[-1].endswith("-c requirements.lock -e .[dev,parity,study,triton]")
    machine.commands.clear()
    start.prepare(start.STUDY)
    assert machine.commands == []


def test_linux_gets_cuda_only_when_asked(start, machine):
    start.prepare(start.STUDY)
    (torch,) = (c for c in machine.commands if "torch==" in c)
    assert torch.endswith(f"--no-deps --index-url {start.CPU_INDEX} torch==2.13.0+cpu")
    machine.commands.clear()
    start.prepare(start.STUDY, "cuda")
    assert machine.kinds() == ["venv", "torch", "packages"]
    assert machine.commands[1].endswith("-c requirements.lock torch===2.13.0")
    machine.commands.clear()
    start.prepare(start.TEST)
    assert "+cpu" not in " ".join(machine.commands), "the choice must stay"


def test_a_configured_wheel_directory_is_enough(start, machine):
    machine.wheel_directory = True
    start.prepare(start.STUDY)
    assert machine.kinds() == ["venv", "packages"]


def test_other_platforms_get_pypis_build(start, machine, monkeypatch):
    monkeypatch.setattr(start, "LINUX", False)
    start.prepare(start.STUDY)
    (torch,) = (c for c in machine.commands if "torch==" in c)
    assert torch.endswith("--no-deps torch==2.13.0")
    with pytest.raises(SystemExit):
        start.main(["--cuda"])


@pytest.mark.parametrize("found", ["2.15.0", "2.13.0", ""])
def test_another_torch_is_refused(start, machine, found):
    machine.replaced_by = found or "gone"
    with pytest.raises(start.SetupError, match=r"2\.13\.0\+cpu is pinned"):
        start.prepare(start.STUDY)
    assert start.read_stamp() == {}


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("NewConnectionError('...'): /simple/fsrs/\nNo matching distribution found for fsrs", "the network is missing"),
        ("ReadTimeoutError(\"HTTPSConnectionPool(host='...'): Read timed out.\")", "the network is missing"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "there is no torch for Python"),
        ("ERROR: something else", "pip could not install torch; its message is above"),
    ],
)
def test_why_pip_failed_is_one_sentence(start, log, said):
    sentence = start.explain(log, "torch")
    assert sentence.startswith(said)
    assert "\n" not in sentence


def test_a_failure_is_one_sentence_and_status_1(start, machine, monkeypatch, capsys):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    assert start.main(["setup"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("start.py: ")
    assert "cannot make virtual environments" in said
    assert said.count("\n") == 1


def test_a_full_disk_is_said_before_the_download(start, machine, monkeypatch):
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    with pytest.raises(start.SetupError, match=r"set-up takes 3 GB and 1\.0 GB are free"):
        start.prepare(start.STUDY)


@pytest.fixture
def lab(start, monkeypatch):
    """The command line and the environment that JupyterLab is started with."""
    started = {}

    class Lab:
        def __init__(self, command, cwd, env):
            started.update(command=command, env=env)

        def wait(self):
            return 0

    monkeypatch.setattr(start.subprocess, "Popen", Lab)
    monkeypatch.setattr(start, "LINUX", True)
    return started


def test_lab_opens_the_start_page_with_its_token_on(start, lab, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    assert start.open_lab() == 0
    assert "--LabApp.default_url=/lab/tree/work/start.ipynb" in lab["command"]
    assert "--no-browser" not in lab["command"]
    assert not any("token" in word or "password" in word for word in lab["command"])
    assert lab["env"]["OMP_WAIT_POLICY"] == "PASSIVE"


def test_lab_prints_its_address_where_no_browser_can_open(start, lab, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    start.open_lab()
    assert "--no-browser" in lab["command"]


def test_the_proof_runs_every_part_and_says_which_failed(start, machine, monkeypatch, capsys):
    monkeypatch.setattr(start, "install_browser", lambda: None)
    monkeypatch.setattr(
        start, "run", lambda *command, **extra: machine.run(*command, **extra) or int("mypy" in command)
    )
    assert start.test() == 1
    assert [re.search(r"-m (\w+)", command)[1] for command in machine.commands] == ["ruff", "ruff", "mypy", "pytest"]
    assert machine.commands[-1].endswith("--nbval tests notebooks")
    assert capsys.readouterr().out.strip().endswith("FAILED: types")


@pytest.mark.skipif(os.name == "nt", reason="apt-get is Debian's")
@pytest.mark.parametrize(
    ("tools", "user", "commands"),
    [
        (["chromium", "apt-get"], 0, []),
        (
            ["apt-get"],
            0,
            ["apt-get -qq update", "apt-get -qq install -y --no-install-recommends chromium fonts-noto-cjk"],
        ),
        (["apt-get"], 1000, []),
        ([], 0, []),
    ],
    ids=["there already", "missing", "not allowed", "not Debian"],
)
def test_chromium_is_installed_where_it_may(start, machine, monkeypatch, tools, user, commands):
    monkeypatch.setattr(start.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.setattr(start.os, "geteuid", lambda: user)
    start.install_browser()
    assert machine.commands == commands


def test_ci_runs_the_proof_and_nothing_else():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"start\.py.*", text) == ["start.py test"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert runs == {"proof": [".ci/run"], "tests": ["python start.py test"]}
