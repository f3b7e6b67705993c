"""Checkpoints: files that are whole or not there, refused when damaged, and a state from which a run goes on.

Idea:        A run may die at any moment, in the middle of a save too. So a save writes a new file under a temporary
             name, makes the disk have it (fsync), and only then renames it, which happens wholly or not at all: the
             checkpoints before it are never touched. The file ends in a checksum of all before it, because disks and
             copies do fail, and torch.load takes a flipped bit for a weight. To go on as if nothing had happened, the
             state needs weights, the optimizer's memory, schedule, loss scale, random numbers, position in the data
             and the step. An asynchronous save copies the state, which takes as long as memory does, and writes
             the copy while training goes on; without the copy the file would mix the weights of several steps.
Cost:        AdamW in float32: 12 bytes a parameter in the file, no gradients. An asynchronous save holds as much again
             in memory. Best interval between saves of C seconds for a mean time M between failures: sqrt(2 C M).
Paper:       Young 1974 (the interval); Mohan et al. 2021, "CheckFreq" (snapshot, then write); Pillai et al. 2014, "All
             file systems are not created equal" (what a rename needs to survive a crash).
Production:  torch.save and torch.load(weights_only=True): the file is theirs, with a line after its end;
             torch.distributed.checkpoint.async_save.
Leaves out:  sharded state (training/sharded), copies to pinned memory, other machines' disks, two runs in one folder.
"""

import errno
import hashlib
import json
import math
import os
import pickle
import random
import re
import uuid
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NAME = re.compile(r"step-(\d{8,})\.pt")
MARK = b"\nminillm checkpoint "  # begins the last line of a file
LINE = 3000  # bytes that line may have: torch.load finds the end of its own part in the last 4096


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or is one of something else; one sentence with its path."""


class Damaged(CheckpointError):
    """A file is not what was saved."""


# One file


class Hashed:
    """A file to write to that keeps a checksum, and the error that torch.save hides behind one of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Like a file's."""
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        """Like a file's."""
        self.file.flush()


def save(state: Any, folder: Path, step: int, *, run: dict[str, Any] | None = None) -> Path:
    """Write `folder/step-00000042.pt` so that it is whole or not there, even if the machine stops; its path.

    `run` says what it is a checkpoint of, in words and numbers that JSON knows: `load` refuses it for another one.
    CheckpointError: the disk is full or does not take it; earlier checkpoints are as they were. TypeError: there is
    something in the state that `load` would refuse.
    """
    check_plain(state)
    line = json.dumps({"step": step, "run": run or {}})
    if len(line) > LINE:
        raise ValueError(f"run may take {LINE} bytes as JSON, got {len(line)}: leave out what does not identify it")
    path = folder / f"step-{step:08d}.pt"
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"  # in the same folder: a rename cannot cross disks
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        with temporary.open("xb") as file:
            write(state, file, line)
            file.flush()
            os.fsync(file.fileno())  # the data, before the name says that it is there
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room or choose another folder" if full else "see to the disk or choose another folder"
        why = error.strerror or error
        raise CheckpointError(
            f"{path} cannot be written ({why}), {advice}: checkpoints before it are intact"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


PLAIN = (Tensor, str, bytes, bool, int, float, type(None), torch.dtype)


def check_plain(state: Any, name: str = "state") -> None:
    """TypeError: something in it is neither a tensor nor plain; where. Found at the resume, it would be too late."""
    if type(state) in (dict, OrderedDict):
        for key, value in state.items():
            check_plain(value, f"{name}[{key!r}]")
    elif type(state) in (list, tuple):
        for i, value in enumerate(state):
            check_plain(value, f"{name}[{i}]")
    elif type(state) not in (*PLAIN, torch.nn.Parameter):
        given = f"{type(state).__module__}.{type(state).__qualname__}"
        raise TypeError(f"{name} is a {given}, which weights_only=True does not load: save tensors and plain values")


def write(state: Any, file: IO[bytes], line: str) -> None:
    """torch.save's bytes, then one line with what they are and the checksum of them and of it."""
    hashed = Hashed(file)
    try:
        torch.save(state, hashed)  # type: ignore[arg-type]  # write and flush are all it calls
        hashed.write(MARK + line.encode())
        hashed.write(f" {hashed.sha.hexdigest()}\n".encode())
    except Exception:
        if hashed.error is not None:
            raise hashed.error from None
        raise


def sync_folder(folder: Path) -> None:
    """Make the disk have the folder's names. Windows has no such call and writes them by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> dict[str, Any]:
    """The file's last line, `step` and `run`, after reading the whole file. Damaged: it is not what was saved."""
    sha, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2 * LINE))
        tail = file.read()
        line, _, digest = tail[tail.rfind(MARK) + len(MARK) : -1].rpartition(b" ")
        if MARK not in tail or not tail.endswith(b"\n"):
            raise Damaged(f"{path} is cut off, its last line is missing: use another checkpoint")
        file.seek(0)
        left = size - len(digest) - 2  # all before the checksum
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            sha.update(part)
            left -= len(part)
    if sha.hexdigest().encode() != digest:
        raise Damaged(f"{path} is damaged, its checksum does not match: use another checkpoint")
    return json.loads(line)


def read(path: Path, run: dict[str, Any] | None) -> tuple[Any, int]:
    """State and step."""
    said = verify(path)
    if run is not None and (different := differences(said["run"], json.loads(json.dumps(run)))):
        raise CheckpointError(f"{path} is of another run: {brief(different)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True), said["step"]
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values: it is not loaded") from error


def load(path: Path, *, run: dict[str, Any] | None = None) -> Any:
    """The state, on the CPU, read with weights_only=True: a file from elsewhere runs no code.

    CheckpointError: the file is not there, damaged, or was saved for another `run`; then it says what differs.
    """
    try:
        return read(path, run)[0]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): give the path of a file") from error


def differences(saved: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two nested dicts of plain values or tensors, by name; of tensors shape and dtype.

    >>> differences({"width": 8, "norm": {"w": torch.ones(2)}}, {"width": 16, "norm": {"w": torch.ones(3)}})
    ['width is 8 there, 16 here', 'norm.w is float32 [2] there, float32 [3] here']
    """
    if isinstance(saved, dict) and isinstance(here, dict):
        found = []
        for key in dict.fromkeys([*saved, *here]):
            full = f"{name}.{key}" if name else str(key)
            if key in saved and key in here:
                found += differences(saved[key], here[key], full)
            else:
                found.append(f"{full} is only {'there' if key in saved else 'here'}")
        return found
    a, b = describe(saved), describe(here)
    return [] if a == b else [f"{name} is {a} there, {b} here"]


def describe(value: Any) -> str:
    """A value, or a tensor's dtype and shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def brief(different: list[str]) -> str:
    """The first three of what differs, and how many more there are."""
    more = [f"and {len(different) - 3} more"] if len(different) > 3 else []
    return "; ".join(different[:3] + more)


# A folder of them


class Loaded(NamedTuple):
    """The newest checkpoint that is whole, and why newer ones were skipped, a sentence for each."""

    state: Any
    step: int
    path: Path
    skipped: list[str]


def checkpoints(folder: Path) -> list[Path]:
    """The files of a folder, oldest step first, damaged or not."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.pt") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def load_latest(folder: Path, *, run: dict[str, Any] | None = None) -> Loaded | None:
    """The newest good checkpoint; None if the folder has none at all.

    CheckpointError: all of them are damaged, or the newest good one is of another run.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            state, step = read(path, run)
            return Loaded(state, step, path, skipped)
        except (Damaged, OSError) as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(skipped)}")
    return None


def kept(steps: list[int], last: int, every: int) -> set[int]:
    """The steps to keep of those saved: the `last` newest, and all multiples of `every` (0 for none).

    >>> sorted(kept([10, 20, 30, 40, 50, 60], last=2, every=20))
    [20, 40, 50, 60]
    """
    return set(sorted(steps)[-last:]) | {step for step in steps if every and step % every == 0}


def best_interval(save_seconds: float, between_failures: float) -> float:
    """Seconds between saves that lose least time, to saving and to doing again what was lost: Young's rule.

    >>> round(best_interval(save_seconds=30.0, between_failures=24 * 3600.0) / 60)                   # minutes
    38
    """
    return math.sqrt(2 * save_seconds * between_failures)


class Checkpoints:
    """The checkpoints of one run in a folder of its own: saves in the background, old ones removed.

    One thread writes, one save after the other. What goes wrong in it is raised by the next `save` or `wait`; `with`
    waits at the end.
    """

    def __init__(
        self, folder: Path, *, last: int = 2, every: int = 0, run: dict[str, Any] | None = None, background: bool = True
    ) -> None:
        if last < 1 or every < 0:
            raise ValueError(f"keep at least the last one, and every 0 (none) or more, got last={last}, every={every}")
        self.folder, self.last, self.every, self.run = folder, last, every, run
        self.background = background
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        for path in folder.glob(".step-*.tmp"):  # of a run that was killed in a save
            path.unlink(missing_ok=True)

    def save(self, state: Any, step: int) -> None:
        """Copy the state and have it written; waits for the save before. CheckpointError: that one, or this, failed."""
        self.wait()
        self.pending = self.writer.submit(self._write, snapshot(state), step)
        if not self.background:
            self.wait()

    def _write(self, state: Any, step: int) -> None:
        save(state, self.folder, step, run=self.run)
        steps = {int(NAME.fullmatch(path.name)[1]): path for path in checkpoints(self.folder)}  # type: ignore[index]
        for old in steps.keys() - kept(list(steps), self.last, self.every) - {step}:
            steps[old].unlink(missing_ok=True)

    def wait(self) -> None:
        """Until the last save is on the disk. CheckpointError: it failed; said once."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def load_latest(self) -> Loaded | None:
        """The newest good one of this run."""
        self.wait()
        return load_latest(self.folder, run=self.run)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self.writer.shutdown()


# What goes in


def snapshot(state: Any) -> Any:
    """A copy on the CPU that does not change any more: dicts, lists and tuples of tensors and plain values."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    return type(state)(map(snapshot, state)) if isinstance(state, (list, tuple)) else state


def random_state() -> dict[str, Any]:
    """The states of all generators that a training step may draw from, as weights_only=True can read them."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
