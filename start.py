"""Set minillm up and start it. Needs Python 3.11 or newer and, the first time, a network; nothing else.

    python start.py           install what is missing, open JupyterLab on the start page
    python start.py setup     install what is missing, open nothing
    python start.py test      the whole proof: lint, types, tests, every notebook, a real browser
    python start.py bench     speed and memory, as ratios
    python start.py lock      write requirements.lock and environment.yml anew

Everything goes into .venv beside this file. A second run installs nothing, an interrupted one resumes.
"""

# Old syntax only, down to Python 3.6: an old Python must get the sentence below and not a SyntaxError.
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = "{}.{}".format(*sys.version_info[:2])
if sys.version_info < (3, 11):
    sys.exit(
        f"minillm needs Python 3.11 or newer and this is Python {HERE} ({sys.executable}); "
        "install one from https://www.python.org/downloads/ and run start.py with it."
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = "minillm.json"  # in .venv, written last: set-up came to its end
LOCK = "requirements.lock"
STUDY = ["study"]
TEST = ["dev", "parity", "study", "triton"]
PIP = ("--no-input", "--no-compile")  # compiled on first import: compiling everything is half of set-up's time
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LINUX = sys.platform.startswith("linux")
DISK = {"cpu": 3, "cuda": 10}  # GB that .venv takes, rounded up
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_NETWORK = re.compile(
    "NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError"
    "|ConnectionResetError|Max retries exceeded|Read timed out|IncompleteRead"
)
DISK_FULL = re.compile(r"No space left on device|Errno 28\b|not enough space|Disk quota exceeded")


class SetupError(Exception):
    """What keeps a command from its end, as one sentence for the person at the keyboard."""


# Running things


def python() -> str:
    """The interpreter of .venv."""
    return str(VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def environment(**extra: str) -> dict:
    """The environment of everything started here: nothing foreign on Python's path, compiled files kept, UTF-8."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PIP_USER")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return dict(kept, PYTHONUTF8="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **extra)


def run(*command: str, **extra: str) -> int:
    """Exit status of a command started in the checkout, with `extra` in its environment and its output shown."""
    return subprocess.call(list(command), cwd=str(ROOT), env=environment(**extra))


def ask(*command: str) -> "tuple[bool, str]":
    """Whether a command succeeds, and what it prints; shows nothing."""
    try:
        done = subprocess.run(
            list(command), cwd=str(ROOT), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return False, ""
    return done.returncode == 0, done.stdout.decode("utf-8", "replace").strip()


def say(text: str) -> None:
    """Print a line at once, before the output of what is started next."""
    print(text, flush=True)


# Set-up


def pyproject() -> dict:
    """What pyproject.toml says."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def torch_version() -> str:
    """The version that pyproject.toml pins torch to; it is written nowhere else by hand."""
    listed = pyproject()["project"]["dependencies"]
    return next(d.split("==")[1] for d in listed if d.startswith("torch=="))


def read_stamp() -> dict:
    """What the last finished set-up wrote; empty where none finished."""
    try:
        stamp = json.loads((VENV / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def new_stamp(extras: list, torch: str) -> dict:
    """What set-up writes when it comes to its end now."""
    said = pyproject()
    parts = [said["build-system"], said["project"], said["tool"]["hatch"], (ROOT / LOCK).read_text(encoding="utf-8")]
    return {
        "python": HERE,
        "root": str(ROOT),
        "torch": torch,
        "extras": sorted(extras),
        "inputs": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
    }


def unusable(stamp: dict, torch: str) -> str:
    """Why the .venv that is there cannot be used; empty where it can."""
    runs, version = ask(python(), "-c", "import sys; print('{}.{}'.format(*sys.version_info[:2]))")
    if not runs:
        return "its Python does not run"
    if version != HERE:
        return f"it has Python {version} and this is {HERE}"
    if not stamp:
        return "" if ask(python(), "-m", "pip", "--version")[0] else "it is half made"
    if stamp.get("root") != str(ROOT):
        return f"it was made for {stamp.get('root')}"
    if stamp.get("torch") != torch:
        return f"its torch is for {stamp.get('torch')}"
    return ""


def make_venv(torch: str) -> None:
    """Make .venv anew."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        raise SetupError(
            f"{sys.executable} cannot make virtual environments; install that part of it (on Debian and Ubuntu: "
            f"apt install python{HERE}-venv) and run this again."
        )
    try:
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        elif VENV.exists():
            shutil.rmtree(str(VENV))
    except OSError as error:
        raise SetupError(
            f"{VENV} is in use and cannot be removed ({error}); close JupyterLab, deactivate it, and run this again."
        ) from error
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < DISK[torch]:
        raise SetupError(
            f"set-up takes {DISK[torch]} GB and {free:.1f} GB are free where {ROOT} is; free some and run this again."
        )
    base = getattr(sys, "_base_executable", None) or sys.executable
    if run(base, "-m", "venv", str(VENV)):
        raise SetupError(f"{base} could not make {VENV}; its message is above.")


def forget_half_installed() -> None:
    """Make pip install anew what an interrupted run left half unpacked, or there in two versions."""
    found: dict = {}
    for info in VENV.glob("[Ll]ib/**/site-packages/*.dist-info"):
        found.setdefault(info.name.split("-")[0].lower(), []).append(info)
    for infos in found.values():
        if len(infos) > 1 or not (infos[0] / "INSTALLER").exists():  # pip writes that file last
            for info in infos:
                shutil.rmtree(str(info))


def explain(log: str, what: str) -> str:
    """One sentence, from pip's log, on why `what` could not be installed."""
    if DISK_FULL.search(log):
        return f"the disk is full, so {what} could not be installed; free some space and run this again."
    if NO_NETWORK.search(log):
        return (
            f"the network is missing or blocked, so {what} could not be downloaded; connect (or set HTTPS_PROXY) "
            "and run this again: it goes on where it stopped."
        )
    if "No matching distribution found" in log:
        return f"there is no {what} for Python {HERE} on this machine; pip's message is above."
    return f"pip could not install {what}; its message is above, its log is {VENV / 'pip.log'}."


def pip(what: str, *arguments: str) -> None:
    """Install with pip; `what` names it for people."""
    log = VENV / "pip.log"
    log.write_text("", encoding="utf-8")
    if run(python(), "-m", "pip", "--log", str(log), "install", *PIP, *arguments):
        raise SetupError(explain(log.read_text(encoding="utf-8", errors="replace"), what))


def install_torch(torch: str) -> None:
    """Install the pinned torch. PyPI's build for Linux brings CUDA, 5 GB: only for who asks for it."""
    version = torch_version()
    what = f"torch {version} ({torch})"
    say(f"Installing {what} ...")
    if torch == "cuda":
        pip(what, "-c", LOCK, f"torch==={version}")  # == would take a +cpu build for the same
    elif not LINUX:
        pip(what, "--no-deps", f"torch=={version}")
    else:
        # A configured index or wheel directory may have the CPU build; PyPI has not and says so at once.
        quiet = ("-q", "--no-deps", "--retries", "1", f"torch=={version}+cpu")
        if not ask(python(), "-m", "pip", "install", *PIP, *quiet)[0]:
            pip(what, "--no-deps", "--index-url", CPU_INDEX, f"torch=={version}+cpu")


def check_torch(torch: str) -> None:
    """Refuse an environment in which something replaced the pinned torch."""
    found = ask(python(), "-c", "from importlib.metadata import version; print(version('torch'))")[1]
    build = "+cpu" if torch == "cpu" and LINUX else ""
    if not (found == torch_version() or found.startswith(torch_version() + "+")) or not found.endswith(build):
        raise SetupError(
            f"torch {found or '(none)'} is installed and {torch_version()}{build} is pinned; "
            f"delete {VENV} and run this again."
        )


def prepare(extras: list, torch: "str | None" = None) -> None:
    """Bring .venv to what the lock says, with the extras; does nothing where it is there already."""
    stamp = read_stamp()
    torch = torch or stamp.get("torch", "cpu")
    wanted = new_stamp(sorted(set(extras) | set(stamp.get("extras", []))), torch)
    problem = unusable(stamp, torch) if VENV.exists() else "there is none"
    if not problem and stamp == wanted:
        return
    began = time.monotonic()
    if problem:
        say(f"Making {VENV} ({problem}) ...")
        make_venv(torch)
    forget_half_installed()
    (VENV / STAMP).unlink(missing_ok=True)
    install_torch(torch)
    say("Installing the packages of requirements.lock, about a minute ...")
    project = ".[{}]".format(",".join(wanted["extras"]))
    pip("what requirements.lock lists", "-q", "--progress-bar", "off", "-c", LOCK, "-e", project)
    check_torch(torch)
    written = VENV / (STAMP + ".new")
    written.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    written.replace(VENV / STAMP)
    say(f"Set up in {time.monotonic() - began:.0f} s.")


# Commands


def sync() -> None:
    """Bring the learner's copies of the notebooks up to date."""
    code = (
        "from minillm.study.overview import snapshot\nfrom minillm.study.paths import WORK\n"
        "from minillm.study.workspace import sync\nfor line in sync(): print(line)\n"
        "snapshot(WORK / 'start.ipynb')"  # what is due is there before any cell runs
    )
    if run(python(), "-c", code):
        raise SetupError(f"your notebooks in {ROOT / 'work'} could not be brought up to date; the reason is above.")


def open_lab() -> int:
    """JupyterLab on the start page until it is stopped; its exit status."""
    command = [python(), "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}"]
    command += ["--LabApp.default_url=/lab/tree/work/start.ipynb"]
    # Else a notebook saved with its widgets shows "model not found" in their place once the kernel is gone.
    command += ["--NotebookNotary.db_file=:memory:"]
    if LINUX and not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
        command += ["--no-browser"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["--allow-root"]  # in a container; the token is asked for all the same
    # Waiting threads that spin make torch 10 times slower on a busy laptop.
    env = environment(OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "PASSIVE"))
    lab = subprocess.Popen(command, cwd=str(ROOT), env=env)
    while True:
        try:
            return lab.wait()
        except KeyboardInterrupt:  # Jupyter got it too and asks whether to stop
            continue


def install_browser() -> None:
    """Install Debian's Chromium for the browser tests where there is none and this may."""
    if any(shutil.which(name) for name in BROWSERS) or not (LINUX and shutil.which("apt-get")):
        return
    if os.geteuid() != 0:
        say("No Chromium, and only root may install it: apt-get install chromium")
        return
    say("Installing Chromium for the browser tests ...")
    packages = ["chromium", "fonts-noto-cjk"]
    if run("apt-get", "-qq", "update", DEBIAN_FRONTEND="noninteractive") or run(
        "apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages, DEBIAN_FRONTEND="noninteractive"
    ):
        say("Chromium could not be installed.")


def cores() -> int:
    """Processors that this process may use, 8 at most: a notebook's kernel takes half a GB."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def test() -> int:
    """The whole proof, every part of it even if one fails; 0 where all hold."""
    install_browser()
    parts = {
        "lint": ["ruff", "check", "."],
        "format": ["ruff", "format", "--check", "."],
        "types": ["mypy"],
        "tests and notebooks": ["pytest", "-n", "auto", "--nbval", "tests", "notebooks"],
    }
    workers = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS", str(cores()))
    began = time.monotonic()
    failed = []
    for name, command in parts.items():
        say(f"\n== {name}: {' '.join(command)}")
        if run(python(), "-m", *command, OMP_NUM_THREADS="1", PYTEST_XDIST_AUTO_NUM_WORKERS=workers):
            failed.append(name)
    verdict = "FAILED: " + ", ".join(failed) if failed else "all hold: " + ", ".join(parts)
    say(f"\nminillm, {time.monotonic() - began:.0f} s, {verdict}")
    return 1 if failed else 0


def name_of(requirement: str) -> str:
    """The normalised name in a requirement: 'Foo_bar>=1; marker' is foo-bar."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


def environment_yml(listed: dict, lock: str) -> str:
    """environment.yml for the [project] table and the lock: conda brings Python, pip what the lock says."""
    direct = [*listed["dependencies"]]
    for extra in ("study", "dev"):
        direct += listed["optional-dependencies"][extra]
    pins = [line for line in lock.splitlines() if name_of(line) in {name_of(d) for d in direct} - {"torch"}]
    lines = [
        "# Written by `python start.py lock`: the lock's pins for conda and Binder.",
        "name: minillm",
        "channels: [conda-forge]",
        "dependencies:",
        "  - python=3.11",
        "  - pip",
        "  - pip:",
        f"      - --extra-index-url {CPU_INDEX}",
        f"      - -c {LOCK}",
        *(f"      - {pin}" for pin in [next(d for d in direct if name_of(d) == "torch"), *pins]),
        "      - -e .",
    ]
    return "\n".join(lines) + "\n"


def lock() -> int:
    """Write requirements.lock and environment.yml anew from pyproject.toml, newest versions, with uv."""
    prepare(STUDY)
    pip("uv", "-q", "uv")
    listed = pyproject()["project"]
    extras = [word for extra in TEST for word in ("--extra", extra)]
    options = ["--universal", "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links"]
    done, text = ask(python(), "-m", "uv", "pip", "compile", "-q", "pyproject.toml", *extras, *options)
    if not done:
        raise SetupError("uv could not resolve pyproject.toml; run 'uv pip compile pyproject.toml' for its reasons.")
    # torch is chosen by build (start.py), and its CUDA packages come with the build that needs them.
    pins = [line for line in text.splitlines() if not re.match(r"(torch|nvidia-|cuda-)", line)]
    head = "# Written by `python start.py lock`: constraints for pip, all but torch and its CUDA packages.\n"
    (ROOT / LOCK).write_text(head + "\n".join(pins) + "\n", encoding="utf-8", newline="\n")
    (ROOT / "environment.yml").write_text(environment_yml(listed, "\n".join(pins)), encoding="utf-8", newline="\n")
    say(f"{LOCK}: {len(pins)} pins; environment.yml follows it.")
    return 0


def main(arguments: "list[str]") -> int:
    """Do what the command line asks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["setup", "test", "bench", "lock"])
    builds = parser.add_mutually_exclusive_group()
    builds.add_argument("--cuda", dest="torch", action="store_const", const="cuda", help="torch with CUDA (Linux)")
    builds.add_argument("--cpu", dest="torch", action="store_const", const="cpu", help="torch without, the default")
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.command != "bench":
        parser.error("unknown: " + " ".join(rest))
    if asked.torch == "cuda" and not LINUX:
        parser.error("PyPI has CUDA builds of torch for Linux only; README.md says how to get one elsewhere")
    try:
        if asked.command == "lock":
            return lock()
        prepare(TEST if asked.command == "test" else STUDY, asked.torch)
        if asked.command == "test":
            return test()
        if asked.command == "bench":
            return run(python(), "tools/bench.py", *rest)
        sync()
        if asked.command == "setup":
            say("Ready: python start.py opens JupyterLab.")
            return 0
        return open_lab()
    except SetupError as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstart.py: stopped; run it again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
