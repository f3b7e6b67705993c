"""Run notebooks and write them in one normal form, or check the ones that are there.

    python tools/nb.py run [--fresh] [PATH ...]    execute, then save; two at a time
    python tools/nb.py check [PATH ...]            list what a saved notebook may not have

A path is a notebook or a folder, by default notebooks/. Outputs of cells tagged `nbval-ignore-output` (times, mostly)
are kept as long as no such cell of the notebook changed, so that a run changes nothing when nothing changed; `--fresh`
takes them anew.
"""

import argparse
import asyncio
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import same  # noqa: E402

COLOURS = 128  # a third of the size of a full PNG, and text stays as clear
LONGEST = 15  # lines of a code cell
SECONDS = 20  # budget of a notebook on two cores; its metadata may say {"minillm": {"budget": 45}}
IGNORE = "nbval-ignore-output"
TAGS = {IGNORE, "raises-exception"}  # with a meaning to nbval; a misspelt one would have none and nobody would know
CELL_METADATA = {"tags", "minillm", "editable", "deletable", "jupyter"}
NOTEBOOK_METADATA: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


# Nobody listens there: what downloads in spite of the rule fails, and at once.
NOWHERE = "http://127.0.0.1:9"
OFFLINE = {name: NOWHERE for word in ("http", "https", "all") for name in (f"{word}_proxy", f"{word.upper()}_PROXY")}
OFFLINE |= {"no_proxy": "localhost,127.0.0.1", "NO_PROXY": "localhost,127.0.0.1", "HF_HUB_OFFLINE": "1"}


def notebooks(paths: Iterable[Path] = ()) -> list[Path]:
    """The notebooks named, or below the folders named, or below notebooks/."""
    found = []
    for path in list(paths) or [ROOT / "notebooks"]:
        inside = sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
        found += [p for p in inside if ".ipynb_checkpoints" not in p.parts]
    return found


def kernel_environment(home: Path) -> dict[str, str]:
    """What a kernel needs in its environment to give the outputs of every machine; `home` is an empty folder.

    The learner's own store and IPython profile are out of reach, and so is the network. PYTEST_CURRENT_TEST makes
    ipykernel leave the output of child processes alone, as it does under nbval.
    """
    return {
        "OMP_NUM_THREADS": "1",
        "MINILLM_DEVICE": "cpu",
        "MINILLM_HOME": str(home / "minillm"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTEST_CURRENT_TEST": "notebook",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        **OFFLINE,
    }


# Normal form


def few_colours(png: str) -> str:
    """The picture with 128 colours; as it is where it has a palette already."""
    if Image.open(io.BytesIO(base64.b64decode(png))).mode == "P":
        return png.strip()
    file = io.BytesIO()
    small = same.picture(png).quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def normal(book: Any) -> Any:
    """The notebook in normal form, changed in place: the same text for the same content, on every machine."""
    own = {"minillm": book.metadata["minillm"]} if "minillm" in book.metadata else {}
    book.metadata = nbformat.from_dict(NOTEBOOK_METADATA | own)
    book.nbformat, book.nbformat_minor = 4, 5
    count = 0
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
        if cell.cell_type == "code":
            if cell.execution_count is not None:
                cell.execution_count = count = count + 1
            cell.outputs = _normal_outputs(cell)
    return book


def _normal_outputs(cell: Any) -> list[Any]:
    merged: list[Any] = []
    for output in cell.outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    for place, output in enumerate(merged):
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = few_colours(data["image/png"])
        if WIDGET in data:
            data[WIDGET] = {
                "model_id": hashlib.sha256(f"{cell.id} {place}".encode()).hexdigest()[:32],
                "version_major": 2,
                "version_minor": 0,
            }
        if output.output_type == "execute_result":
            output.execution_count = cell.execution_count
    return merged


def text(book: Any) -> str:
    """The notebook as the text of its file."""
    return nbformat.writes(book, version=4).rstrip("\n") + "\n"


# Run


def execute(book: Any, folder: Path, seconds: int = 120) -> None:
    """Run the notebook in place, in a fresh kernel whose working directory is `folder`; `seconds` a cell at most.

    nbclient.CellExecutionError where a cell raises that is not tagged raises-exception.
    """
    from nbclient import NotebookClient

    client = NotebookClient(book, timeout=seconds, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        env = dict(os.environ) | kernel_environment(Path(home))
        # stderr: ipykernel's own advice goes there. The loop: Windows' default one cannot wait for ZeroMQ.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(client.async_execute(env=env, stderr=subprocess.DEVNULL))


def run(path: Path, *, fresh: bool = False) -> str:
    """Execute the notebook and save it in normal form; one line on what came of it."""
    before = path.read_text(encoding="utf-8")
    old, book = nbformat.reads(before, as_version=4), nbformat.reads(before, as_version=4)
    began = time.monotonic()
    execute(book, path.parent)
    seconds = time.monotonic() - began
    normal(book)
    _keep(normal(old), book, fresh=fresh)
    after = text(book)
    if after != before:
        path.write_text(after, encoding="utf-8", newline="\n")
    return f"{path}: {seconds:.1f} s, {'saved' if after != before else 'unchanged'}"


def _keep(old: Any, book: Any, *, fresh: bool) -> None:
    """Take over from the old notebook the pictures that look the same, and measured outputs that are still right."""
    former = {cell.id: cell for cell in old.cells if cell.cell_type == "code"}
    measured = [cell for cell in book.cells if IGNORE in cell.metadata.get("tags", [])]
    # All or none: a figure must not show other times than the table above it.
    stay = not fresh and all(cell.id in former and _is_fresh(former[cell.id]) for cell in measured)
    for cell in measured:
        if stay:
            cell.outputs = former[cell.id].outputs
        cell.metadata["minillm"] = cell.metadata.get("minillm", {}) | {"ran": _digest(cell.source)}
    for cell in book.cells:
        if cell.id in former and cell.cell_type == "code":
            for output, was in zip(_pictures(cell), _pictures(former[cell.id]), strict=False):
                if same.same_picture(output["image/png"], was["image/png"]):
                    output["image/png"] = was["image/png"]


def _pictures(cell: Any) -> list[Any]:
    return [o.data for o in cell.outputs if "image/png" in o.get("data", {})]


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _is_fresh(cell: Any) -> bool:
    """Whether the outputs of a measuring cell come from the source it has now."""
    return bool(cell.outputs) and cell.metadata.get("minillm", {}).get("ran") == _digest(cell.source)


# Check


def check(path: Path) -> list[str]:
    """What is wrong with a saved notebook, each as `cell: what and what to do`; nbval finds stale outputs, not this."""
    saved = path.read_text(encoding="utf-8")
    ids = [cell.get("id") for cell in json.loads(saved)["cells"]]
    if len(set(ids)) < len(ids) or None in ids:
        return ["two cells have one id, or one has none; name each"]  # nbformat would give them random ones
    book = nbformat.reads(saved, as_version=4)
    problems = []
    if "widgets" in book.metadata:
        problems.append("metadata.widgets is stored, which GitHub cannot show")
    for kind, several in groupby(book.cells, key=lambda cell: cell.cell_type):
        row = list(several)
        if kind == "code" and len(row) > 2:
            problems.append(f"{row[0].id}: {len(row)} code cells in a row, 2 at most; say something between them")
    for cell in book.cells:
        problems += [f"{cell.id}: {problem}" for problem in _cell_problems(cell)]
    if text(normal(nbformat.reads(saved, as_version=4))) != saved:
        problems.append(f"not in normal form; run: python tools/nb.py run {path.name}")
    return problems


def _cell_problems(cell: Any) -> Iterable[str]:
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", cell.id):
        yield "the id is a random one; give it a name that stays"
    if cell.cell_type != "code":
        return
    tags = cell.metadata.get("tags", [])
    for tag in set(tags) - TAGS:
        if re.search("nbval|ignore|raise|except|skip", tag, re.IGNORECASE):
            yield f"tag {tag} is none of {', '.join(sorted(TAGS))}"
    if re.search(r"^\s*#\s*NBVAL", cell.source, re.MULTILINE):
        yield "an nbval comment, which learners see; use the tag"
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if len(lines) > LONGEST:
        yield f"{len(lines)} lines, {LONGEST} at most"
    if cell.source.rstrip().endswith(";"):
        yield "ends with a semicolon, which nbval does not honour; end with plt.show() or None"
    if cell.execution_count is None:
        yield "was not run"
    if IGNORE in tags:
        if not cell.metadata.get("minillm", {}).get("reason"):
            yield f'tagged {IGNORE} without metadata {{"minillm": {{"reason": "..."}}}}'
        if not _is_fresh(cell):
            yield "its measured outputs come from another source; run it"
    for output in cell.outputs:
        if output.get("name") == "stderr":
            yield f"wrote to stderr: {output.text.splitlines()[0][:80]}"
        if output.output_type == "error" and "raises-exception" not in tags:
            yield f"stopped with {output.ename}"


def main(arguments: list[str]) -> int:
    """Do what the command line asks; 1 where a notebook failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "check"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--fresh", action="store_true", help="take measured outputs anew")
    asked = parser.parse_args(arguments)
    found = notebooks(asked.paths)
    if asked.command == "check":
        problems = [f"{path}: {problem}" for path in found for problem in check(path)]
        print("\n".join(problems) or f"{len(found)} notebooks: nothing to mend")
        return 1 if problems else 0
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        runs = [(path, pool.submit(run, path, fresh=asked.fresh)) for path in found]
        for path, future in runs:
            try:
                print(future.result(), flush=True)
            except Exception as error:
                failed += 1
                print(f"{path}: not saved\n{error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
