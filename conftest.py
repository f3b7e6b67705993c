"""For tests and notebooks: one environment, and nbval made strict where it is blind and tolerant where machines differ.

nbval runs each cell and compares what it shows with what is saved. Added here: printed numbers may differ by rounding,
pictures are compared, a kernel that died is noticed at once, each notebook has an empty home, and its time is printed
beside its budget.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict, deque
from functools import cache
from pathlib import Path
from queue import Empty

import nbformat
import pytest
from nbval import kernel, plugin

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import nb, same  # noqa: E402

_homes = tempfile.mkdtemp(prefix="minillm-")
atexit.register(shutil.rmtree, _homes, ignore_errors=True)
os.environ |= nb.kernel_environment(Path(_homes))  # before torch is imported, and never the learner's store
del os.environ["PYTEST_CURRENT_TEST"]  # pytest sets its own

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read at its first import, which torch.compile may cause

OUTPUT_SECONDS = 60  # nbval's 5 s is too short on a busy machine


def _texts(outputs):
    """(key, holder, name) of each text in the outputs, keyed as nbval pairs them."""
    for output in outputs:
        if output.output_type == "stream":
            yield output.name, output, "text"
        elif output.output_type == "error":
            yield "evalue", output, "evalue"
        for kind, value in output.get("data", {}).items():
            if isinstance(value, str) and not kind.startswith("image/"):
                yield kind, output.data, kind


def _pictures(outputs):
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def _strict_outputs(original):
    def compare_outputs(self, test, ref, skip_compare=None):
        new, saved = _pictures(test), _pictures(ref)
        shares = [same.difference(a, b) for a, b in zip(new, saved, strict=False)]
        if len(new) != len(saved) or max(shares, default=0) > same.SHARE:
            said = [f"{len(saved)} pictures are saved, {len(new)} were drawn"]
            said += [f"picture {i}: {share:.2%} of the pixels differ strongly" for i, share in enumerate(shares, 1)]
            self.comparison_traceback = said
            return False
        # Where only rounding differs the new text is replaced by the saved one, and nbval sees them equal.
        former = defaultdict(deque)
        for key, holder, name in _texts(ref):
            former[key].append(self.sanitize(holder[name]))
        test = nbformat.from_dict(test)
        for key, holder, name in _texts(test):
            was = former[key].popleft() if former[key] else None
            if was is not None and same.same_text(was, self.sanitize(holder[name])):
                holder[name] = was
        return original(self, test, ref, skip_compare)

    return compare_outputs


def _watchful_reply(original):
    def await_reply(self, msg_id, timeout=None):
        end = time.monotonic() + (timeout or 1e9)
        while True:
            try:
                return original(self, msg_id, timeout=1)
            except Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died") from None
                if time.monotonic() > end:
                    raise

    return await_reply


def _own_home(original):
    def setup(self):
        home = Path(tempfile.mkdtemp(dir=_homes))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in nb.kernel_environment(home).items():
                patch.setenv(name, value)
            original(self)

    return setup


plugin.IPyNbCell.compare_outputs = _strict_outputs(plugin.IPyNbCell.compare_outputs)
plugin.IPyNbFile.setup = _own_home(plugin.IPyNbFile.setup)
kernel.RunningKernel.await_reply = _watchful_reply(kernel.RunningKernel.await_reply)


def pytest_configure(config):
    """Find the file of patterns from any working directory."""
    patterns = config.option.nbval_sanitize_with
    if patterns:
        config.option.nbval_sanitize_with = str(config.rootpath / patterns)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file's tests on one worker, as a notebook's kernel needs it, but those of files marked `apart`.

    --dist=loadgroup is made for that and groups nothing under pytest 9.2 (pytest-xdist issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    @cache
    def is_apart(file):
        path = config.rootpath / file
        return path.suffix == ".py" and "pytestmark = pytest.mark.apart" in path.read_text(encoding="utf-8")

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if is_apart(file) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """Give cells time to show what they print, and reports the budget of their notebook."""
    for item in items:
        if isinstance(item, plugin.IPyNbCell):
            item.output_timeout = OUTPUT_SECONDS
            budget = item.parent.nb.metadata.get("minillm", {}).get("budget", nb.SECONDS)
            item.user_properties.append(("budget", budget))


_seconds: dict[str, float] = defaultdict(float)
_budgets: dict[str, float] = {}


def pytest_runtest_logreport(report):
    """Add up the time of each notebook, the start of its kernel included."""
    for name, budget in report.user_properties:
        if name == "budget":
            file = report.nodeid.partition("::")[0]
            _seconds[file] += report.duration
            _budgets[file] = budget


def pytest_terminal_summary(terminalreporter):
    """Print each notebook's time beside its budget; a slow machine is no error."""
    if _seconds:
        terminalreporter.section("time of notebooks")
    for file, seconds in sorted(_seconds.items()):
        over = "   OVER BUDGET" if seconds > _budgets[file] else ""
        terminalreporter.line(f"{seconds:7.1f} s of {_budgets[file]} s   {file}{over}")
