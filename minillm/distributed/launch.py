"""N processes that run one function together, started from a notebook, a script or torchrun, and always ended.

Idea:        Every rank is a process of its own that runs the same function; only its rank, an integer, tells it apart.
             The ranks find each other through a store, a small table that all can read, and form a process group. One
             rank that fails leaves the others waiting for its messages for ever, so somebody must watch: the parent
             collects results, shows the first failure with its traceback, and kills what is left.
Cost:        2 to 4 s to import torch in each process, all at once. One thread a rank: N ranks with all threads each
             would fight for the cores.
Paper:       Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, section 3.3 (process groups).
Production:  torchrun (python -m torch.distributed.run), which also restarts and spans machines; `process_group` is what
             a program under it needs. torch.multiprocessing.spawn, without results and time limit.
Leaves out:  several machines, restarts, elastic sizes.
"""

import contextlib
import errno
import faulthandler
import io
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ENDING = 5.0  # seconds that a rank has to end after its result is in
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the network interface that does not leave the machine


class LaunchError(RuntimeError):
    """A rank failed or did not end. The first line says which and why, the rest is its traceback.

    `rank` is the one that failed, None for a time-out.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def default_backend(world: int) -> str:
    """NCCL where every rank of this machine has a GPU of its own, Gloo, which runs on the CPU, elsewhere."""
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= world
    return "nccl" if enough and dist.is_nccl_available() else "gloo"


def own_device() -> torch.device:
    """Where the tensors of this rank live: its own GPU in a group of NCCL, the CPU in one of Gloo."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")


def check_backend(backend: str, world: int) -> None:
    """ValueError: this build of torch, or this machine, does not have it."""
    if not (dist.is_available() and dist.is_backend_available(backend)):
        raise ValueError(f"this build of torch has no backend {backend!r}: use 'gloo', which runs on the CPU")
    if backend == "nccl" and torch.cuda.device_count() < world:
        raise ValueError(f"'nccl' needs a GPU a rank, got {torch.cuda.device_count()} for {world} ranks: use 'gloo'")


def check_port(port: int) -> None:
    """ValueError: something listens there."""
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise ValueError(f"port {port} is in use: choose another, or none and the system chooses") from None


@contextlib.contextmanager
def process_group(
    backend: str | None = None, *, timeout: float = 600.0, store: dist.Store | None = None
) -> Iterator[None]:
    """This process as the rank that the environment says it is (RANK, WORLD_SIZE, LOCAL_RANK), as torchrun sets it.

    Inside, torch.distributed works; `timeout` is in seconds, for each collective. RuntimeError: not under a launcher.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} must be set, got nothing: start the program with torchrun")
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = backend or default_backend(int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    if chosen == "nccl":
        torch.cuda.set_device(local)
    where: dict[str, Any] = {} if store is None else {"store": store}
    dist.init_process_group(chosen, rank=rank, world_size=world, timeout=timedelta(seconds=timeout), **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """In the child: end when the parent does, however that came."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _fail(pipe: Connection, rank: int, error: BaseException) -> NoReturn:
    """In the child: tell the parent, and wait for the end, so that no other rank fails before the parent knows."""
    said = " ".join(str(error).split()) or "no message"
    above = error.__traceback__ and error.__traceback__.tb_next  # without the launcher's own frame
    trace = "".join(traceback.format_exception(type(error), error, above or error.__traceback__))
    pipe.send((False, f"rank {rank} failed with {type(error).__name__}: {said}\n\n{trace}"))
    while True:
        time.sleep(60)


def _child(
    pipe: Connection, job: bytes, environment: Mapping[str, str], backend: str, folder: Path, deadline: float
) -> None:
    """Run the job as one rank, send back (succeeded, text of the error or result), wait for the parent's word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ.update(environment)
    rank, world, left = int(environment["RANK"]), int(environment["WORLD_SIZE"]), max(0.1, deadline - time.time())
    with (folder / f"stack{rank}").open("w") as stack:
        faulthandler.dump_traceback_later(left, file=stack)  # where it hangs, if it does
        try:
            function, args = torch.load(io.BytesIO(job), map_location="cpu", weights_only=False)
            store = None if "MASTER_PORT" in environment else dist.FileStore(str(folder / "store"), world)
            with process_group(backend, timeout=left + 60, store=store):  # the parent's limit comes first
                try:
                    result = io.BytesIO()
                    torch.save(function(*args), result)
                    pipe.send((True, result.getvalue()))
                    pipe.recv()  # all have their results: nobody needs this rank's connections any more
                except BaseException as error:
                    _fail(pipe, rank, error)  # still in the group: its connections stay open
        except BaseException as error:
            _fail(pipe, rank, error)
        faulthandler.cancel_dump_traceback_later()


def _pack(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Function and arguments as bytes. ValueError: another process cannot import the function."""
    main = sys.modules["__main__"]
    name = getattr(function, "__qualname__", repr(function))
    packed = io.BytesIO()
    if function.__module__ == "__main__" and not hasattr(main, "__file__") and getattr(main, "__spec__", None) is None:
        raise ValueError(f"every rank must import the function, and {name} was typed in here: put it in a file")
    try:
        torch.save(function, io.BytesIO())
    except (AttributeError, pickle.PicklingError):
        raise ValueError(f"every rank must import the function, and {name} is inside another: move it out") from None
    torch.save((function, args), packed)
    return packed.getvalue()


def _first_failure(rank: int, said: str, processes: list[Any]) -> LaunchError:
    """What to tell: a rank that was killed says nothing, and others fail because of it."""
    connection.wait([p.sentinel for p in processes], timeout=0.2)
    for r, process in enumerate(processes):
        if process.exitcode is not None:
            return LaunchError(f"rank {r} ended without a result, exit code {process.exitcode}", r)
    return LaunchError(said, rank)


def _collect(pipes: list[Connection], processes: list[Any], deadline: float, timeout: float, folder: Path) -> list[Any]:
    """The results by rank. LaunchError: a rank failed, died or did not end in time."""
    results: dict[int, Any] = {}
    ranks: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    while ranks:
        ready = connection.wait(list(ranks), timeout=max(0.0, deadline - time.time()))
        if not ready:
            time.sleep(0.5)  # the ranks write down where they are
            late = sorted(ranks.values())
            stacks = "".join(f"\nrank {r}:\n{(folder / f'stack{r}').read_text()}" for r in late)
            names = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
            raise LaunchError(f"{names} of {len(pipes)} did not end within {timeout:g} s and were stopped\n{stacks}")
        for pipe in ready:
            rank = ranks.pop(pipe)
            try:
                succeeded, content = pipes[rank].recv()
            except (EOFError, ConnectionError):
                processes[rank].join(ENDING)
                code = processes[rank].exitcode
                raise LaunchError(f"rank {rank} ended without a result, exit code {code}", rank) from None
            if not succeeded:
                raise _first_failure(rank, content, processes)
            results[rank] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def launch(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    backend: str | None = None,
    timeout: float = 60.0,
    port: int | None = None,
) -> list[Any]:
    """Call `function(*args)` in `world` processes that form a process group; what each returns, by rank.

    The function must be importable: it lives in a module, not in a notebook cell. Tensors come back on the CPU.
    `timeout` is in seconds from the start, which itself takes some, to the last result. Without a port the ranks meet
    through a file. LaunchError: a rank failed, died or hangs; all others are ended, too.

    >>> import torch.distributed
    >>> launch(torch.distributed.get_rank, 2)
    [0, 1]
    """
    if world < 1:
        raise ValueError(f"world, the number of processes, must be at least 1, got {world}")
    backend = backend or default_backend(world)
    check_backend(backend, world)
    if port is not None:
        check_port(port)
    job, context, deadline = _pack(function, args), get_context("spawn"), time.time() + timeout
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    if sys.platform in LOOPBACK:
        shared["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    if port is not None:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes: list[Any] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="minillm-", ignore_cleanup_errors=True) as folder:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                given = (theirs, job, environment, backend, Path(folder), deadline)
                processes.append(context.Process(target=_child, args=given, daemon=True))
                processes[-1].start()
                theirs.close()
            results = _collect(pipes, processes, deadline, timeout, Path(folder))
            for pipe in pipes:
                pipe.send("end")
            for process in processes:
                process.join(ENDING)
            return results
        finally:
            for process in processes:
                if process.pid is not None:  # it was started
                    process.kill()
                    process.join()
                    process.close()
            for pipe in pipes:
                pipe.close()
