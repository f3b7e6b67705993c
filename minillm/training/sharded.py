"""Checkpoints of a state that no process holds whole: each writes its shards, any number of processes reads them.

Idea:        Every rank writes the parts of the tensors that it holds into a file of its own, and one file says which
             part of which tensor lies where. A rank that loads has tensors laid out for its own world size: of every
             part that overlaps with its own it reads the overlap. So a run of 8 goes on with 4, and nobody ever
             gathers the model. It is one checkpoint only when all files are there: they are written into a folder with
             a temporary name, which one rank renames after the last.
Cost:        Each rank writes its share, 1/N of the bytes, at the same time as the others, and reads the parts that
             overlap with its own.
Paper:       The format is PyTorch's; ByteDance's system of the same kind: Wan et al. 2024, "ByteCheckpoint".
Production:  torch.distributed.checkpoint (DCP), used here for layout and files; its async_save.
Leaves out:  the background, retention, storage without rename; random numbers and data position of another world size:
             each rank's are its own, and nothing says what 4 ranks should make of those of 8.
"""

import hashlib
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from minillm.training import checkpoint
from minillm.training.checkpoint import CheckpointError, Damaged, brief, differences


def save_sharded(
    tensors: dict[str, Any], folder: Path, step: int, *, rest: Any = None, run: dict[str, Any] | None = None
) -> Path:
    """Write the folder `step-00000042` from all ranks; its path. All of them call it, and all of them get its errors.

    `tensors` are nested dicts and lists of tensors, DTensors where they are sharded, under the same names on all
    ranks; plain tensors are the same everywhere. `rest` is plain values, those of rank 0 count.
    """
    check_tensors(tensors)
    final = folder / f"step-{step:08d}"
    temporary = folder / agree(f".{final.name}.{uuid.uuid4().hex}.tmp")
    failed = f"{final} cannot be written"
    with together(failed):
        temporary.mkdir(parents=True, exist_ok=True)
    with together(failed), quiet():
        writer = dcp.FileSystemWriter(temporary, sync_files=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    with together(failed):
        mine = {path.name: digest(path) for path in temporary.glob(f"__{rank()}_*.distcp")}
    sums = {name: value for part in gather(mine) for name, value in part.items()}
    with together(failed):
        if rank() == 0:
            sums[".metadata"] = digest(temporary / ".metadata")
            checkpoint.save({"files": sums, "rest": rest}, temporary, step, run=run)  # syncs the folder, too
            old = folder / f".{final.name}.{uuid.uuid4().hex}.tmp"
            if final.exists():  # a folder cannot be renamed over another
                final.rename(old)
            temporary.rename(final)
            checkpoint.sync_folder(folder)
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_sharded(tensors: dict[str, Any], path: Path, *, run: dict[str, Any] | None = None) -> Any:
    """Fill the tensors in place, however they are laid out over these ranks, and give back `rest`.

    CheckpointError on all ranks: the files are damaged, of another run, or have other tensors; what differs.
    """
    check_tensors(tensors)
    with together(f"{path} cannot be loaded"):
        step = int(path.name.removeprefix("step-"))
        whole = checkpoint.load(path / f"step-{step:08d}.pt", run=run)
        for name in sorted(whole["files"])[rank() :: world()]:  # each rank checks a part
            if not (path / name).is_file() or digest(path / name) != whole["files"][name]:
                raise Damaged(f"{path / name} is damaged or missing: use another checkpoint")
    with together(f"{path} cannot be loaded"):
        reader = Reader(path)
        saved = {name: shape_of(entry) for name, entry in reader.read_metadata().state_dict_metadata.items()}
        if different := differences(saved, {name: torch.empty_like(x, device="meta") for name, x in flat(tensors)}):
            raise CheckpointError(f"{path} is of another model: {brief(different)}")
    with together(f"{path} cannot be loaded"), quiet():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return whole["rest"]


class Reader(dcp.FileSystemReader):
    """Reads the list of parts without running what a file from elsewhere may hold: it is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list of parts."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's list, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Of what the list is made. CheckpointError: something else."""
        if module.startswith("pathlib"):
            return PurePath  # one saved on Linux loads on Windows
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        allowed = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
        allowed |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        if dtype or (module, name) in allowed or module == "torch.distributed.checkpoint.metadata":
            return super().find_class(module, name)
        raise CheckpointError(f"the list of parts holds {module}.{name}, which is none of DCP's: it is not loaded")


def shape_of(entry: Any) -> Tensor:
    """An empty tensor of the shape and dtype of a saved one."""
    return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")


def flat(tensors: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names, as DCP makes them, and tensors of nested dicts and lists."""
    if isinstance(tensors, (dict, list)):
        pairs = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
        for key, value in pairs:
            yield from flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tensors


def check_tensors(tensors: dict[str, Any]) -> None:
    """Refuse what is no tensor."""
    for name, value in flat(tensors):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, not a tensor: give plain values as rest")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Ranks


def rank() -> int:
    """Of this process; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Everyone's value, on all ranks."""
    found = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


def agree(value: Any) -> Any:
    """Rank 0's value."""
    return gather(value)[0]


@contextmanager
def together(what: str) -> Iterator[None]:
    """Wait for all ranks at the end; an error on any of them is raised on all, so that none waits for ever.

    What is inside must not wait for others where one may have failed before.
    """
    error: BaseException | None = None
    try:
        yield
    except dcp.CheckpointException as caught:  # not an Exception, of DCP's own: the ranks' errors
        error = next(iter(caught.failures.values()))[0]
    except Exception as caught:
        error = caught
    said = gather(None if error is None else (isinstance(error, Damaged), str(error).strip().splitlines()[0]))
    first = next((number for number, one in enumerate(said) if one is not None), None)
    if first is not None:
        kind = Damaged if said[first][0] else CheckpointError
        raise kind(f"{what}, says rank {first}: {said[first][1]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without DCP's warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
