"""Three versions of a notebook made one, cell by cell; the rules are those of `workspace`. Nothing here reads files."""

import json
from collections.abc import Iterable
from copy import deepcopy
from hashlib import sha256
from typing import Any

Cell = dict[str, Any]
Notebook = dict[str, Any]
NEW_VERSION = "New version of the cell above, which is as you left it. Delete the one that you do not want."


def parse(data: bytes) -> Notebook | None:
    """The notebook, or None if this is not one."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
    except ValueError:  # not UTF-8, or not JSON
        return None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or not isinstance(notebook.get("cells"), list):
        return None
    return notebook if all(map(_is_cell, notebook["cells"])) and _has_metadata(notebook) else None


def dump(notebook: Notebook) -> bytes:
    """The notebook as Jupyter writes it."""
    return (json.dumps(notebook, ensure_ascii=False, indent=1) + "\n").encode()


def merge(base: Notebook, theirs: Notebook, mine: Notebook) -> tuple[Notebook, str]:
    """The merged notebook, and what happened in one sentence."""
    old, new, own = by_id(base), by_id(theirs), by_id(_with_ids(mine, base))
    out: dict[str, Cell] = {}
    count = dict.fromkeys(("updated", "new", "removed", "kept beside a new version", "kept though removed"), 0)
    said = []
    for id, cell in own.items():
        before, after = old.get(id), new.get(id)
        if after is None:
            if before is None or not _same(cell, before):
                out[id] = cell
                count["kept though removed"] += before is not None
            else:
                count["removed"] += 1
        elif _same(cell, after) or (before and _same(after, before)):  # the text stays
            out[id] = cell | {"metadata": _three_way(before, after, cell)}
        elif before and _same(cell, before):
            out[id] = after
            count["updated"] += 1
        elif is_exercise(cell) or is_exercise(after):
            out[id] = cell | {"metadata": _three_way(before, after, cell)}
            said.append("the exercise has a new stub, your code stays (reset shows the stub)")
        else:
            out[id] = cell
            _add_copy(out, own, id, before, after)
            count["kept beside a new version"] += 1
    for id, cell in new.items():
        deleted = id not in own and id in old and _same(cell, old[id])  # by the learner, and not changed since
        if id not in own and not deleted:
            out[id] = cell
            count["new"] += 1
    cells = [out[id] for id in _order(list(old), list(new), list(own), out)]
    merged = mine | {"cells": cells, "metadata": _three_way(base, theirs, mine)}
    merged["nbformat_minor"] = max(mine.get("nbformat_minor", 0), theirs.get("nbformat_minor", 0))
    if counted := ", ".join(f"{n} {what}" for what, n in count.items() if n):
        said.insert(0, f"cells: {counted}")
    return merged, "; ".join(said) or "metadata updated"


def _add_copy(out: dict[str, Cell], own: dict[str, Cell], id: str, before: Cell | None, after: Cell) -> None:
    """Puts the new version of a cell behind the learner's; an earlier such copy is replaced unless it was edited."""
    copy = _copy(id, after)
    for other, cell in own.items():
        if cell.get("metadata", {}).get("minillm", {}).get("new_version_of") == id:
            if _same(cell, copy):
                return
            if before and _same(cell, _copy(id, before)):
                own[other] = out[other] = copy | {"id": other}
                return
    copy["id"] = _free(copy["id"], own)
    out[copy["id"]] = copy


def _copy(id: str, cell: Cell) -> Cell:
    mark = f"# {NEW_VERSION}\n" if cell["cell_type"] == "code" else f"> {NEW_VERSION}\n\n"
    copy = deepcopy(cell) | {"id": f"{id[:50]}-new", "source": (mark + text(cell)).splitlines(keepends=True)}
    copy["metadata"] = copy.get("metadata", {}) | {"minillm": {"new_version_of": id}}
    return copy


def _order(old: list[str], new: list[str], own: list[str], out: dict[str, Cell]) -> list[str]:
    """Our order with the learner's cells behind those they followed; where the learner moved cells, theirs."""
    shared = set(old) & set(own)
    moved = [id for id in old if id in shared] != [id for id in own if id in shared]
    copies = {id: cell["metadata"]["minillm"]["new_version_of"] for id, cell in out.items() if id not in {*new, *own}}
    first, second = (own, new) if moved else (new, own)
    order = [id for id in first if id in out]
    for rest in (second, list(copies)):
        for at, id in enumerate(rest):
            if id in out and id not in order:
                ahead = [copies[id]] if id in copies else rest[:at]
                place = next((order.index(other) + 1 for other in reversed(ahead) if other in order), 0)
                order.insert(place, id)
    return order


def _with_ids(notebook: Notebook, base: Notebook) -> Notebook:
    """The notebook with one id for each cell: other programs may have dropped or doubled some."""
    cells: dict[str, Cell] = {}
    lost = []
    for cell in notebook["cells"]:
        id = cell.get("id")
        if not isinstance(id, str) or not id or id in cells:
            lost.append(id)
        cells[id if isinstance(id, str) and id and id not in cells else f"?{len(cells)}"] = cell
    if not lost:
        return notebook
    for key, cell in list(cells.items()):
        if key.startswith("?"):
            known = (id for id, other in by_id(base).items() if id not in cells and _same(cell, other))
            fresh = next(known, None) or _free(f"own-{sha256(text(cell).encode()).hexdigest()[:8]}", cells)
            cells = {fresh if k == key else k: c for k, c in cells.items()}
    return notebook | {"cells": [cell | {"id": id} for id, cell in cells.items()]}


def _free(id: str, taken: Iterable[str]) -> str:
    names = set(taken)
    return next(name for name in (id, *(f"{id}-{n}" for n in range(2, len(names) + 3))) if name not in names)


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("cell_type"), str) or not _has_metadata(cell):
        return False
    source = cell.get("source", "")
    return all(isinstance(line, str) for line in (source if isinstance(source, list) else [source]))


def _has_metadata(part: dict[str, Any]) -> bool:
    """Whether its metadata, if there is any, is of the kind that is looked into here."""
    metadata = part.get("metadata", {})
    return isinstance(metadata, dict) and isinstance(metadata.get("minillm", {}), dict)


def _three_way(before: dict[str, Any] | None, after: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """Our changes of metadata made in the learner's, key by key."""
    old, new = (before or {}).get("metadata", {}), after.get("metadata", {})
    merged = {key: value for key, value in mine.get("metadata", {}).items() if key in new or key not in old}
    return merged | {key: value for key, value in new.items() if key not in old or old[key] != value}


def by_id(notebook: Notebook) -> dict[str, Cell]:
    """The cells that have an id."""
    return {cell["id"]: cell for cell in notebook["cells"] if cell.get("id")}


def text(cell: Cell) -> str:
    """The source of a cell, with \\n at the ends of lines."""
    source = cell.get("source", "")
    return ("".join(source) if isinstance(source, list) else source).replace("\r\n", "\n")


def texts(notebook: Notebook) -> list[tuple[str, str]]:
    """Types and sources of the cells: what a learner edits."""
    return [(cell["cell_type"], text(cell)) for cell in notebook["cells"]]


def _same(one: Cell, other: Cell) -> bool:
    return one["cell_type"] == other["cell_type"] and text(one) == text(other)


def is_exercise(cell: Cell) -> bool:
    """Whether the learner is asked to write in this cell."""
    return "exercise" in cell.get("metadata", {}).get("tags", [])
