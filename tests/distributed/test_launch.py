"""The launcher: results by rank, the failing rank's own traceback, time limits, and nothing left running."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minillm.distributed.launch import LaunchError, default_backend, launch, own_device, process_group

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and process ids of POSIX")


def facts(tensor, label):
    """What a rank knows of itself, and a sum over all."""
    total = torch.tensor([float(dist.get_rank() + 1)], device=own_device())
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "environment": [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")],
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "backend": dist.get_backend(),
        "nested": [(total, {"given": tensor + dist.get_rank(), "label": label})],
    }


def note(folder):
    """Write down that this process lives."""
    (Path(folder) / str(os.getpid())).touch()


def fail_on(rank, folder):
    note(folder)
    if dist.get_rank() == rank:
        raise KeyError("the reason\nof it")
    dist.barrier()  # never answered


def die_on(rank, folder):
    note(folder)
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.recv(torch.zeros(1), rank)


def hang_on(rank, folder):
    note(folder)
    if dist.get_rank() == rank:
        time.sleep(1000)
    return dist.get_rank()


def stay(folder):
    note(folder)
    time.sleep(1000)


def running(folder):
    """The noted processes that still exist."""
    assert multiprocessing.active_children() == []
    alive = []
    for path in Path(folder).iterdir():
        try:
            os.kill(int(path.name), 0)
        except ProcessLookupError:
            continue
        alive.append(path.name)
    return alive


def test_results_come_back_by_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = launch(facts, 3, torch.arange(3), "x", backend="gloo", port=port)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert {r["world"] for r in results} == {3}
    assert [r["environment"] for r in results] == [[str(rank), str(rank), "3", "1"] for rank in range(3)]
    assert {r["threads"] for r in results} == {1}
    assert {r["backend"] for r in results} == {"gloo"}
    assert len({r["pid"] for r in results} | {os.getpid()}) == 4
    for rank, result in enumerate(results):
        total, inner = result["nested"][0]
        assert total.item() == 1 + 2 + 3
        assert inner["label"] == "x"
        assert inner["given"].tolist() == [rank, rank + 1, rank + 2]
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_a_rank_with_a_gpu_of_its_own_uses_nccl_and_returns_to_the_cpu():
    assert default_backend(1) == "nccl"
    assert default_backend(torch.cuda.device_count() + 1) == "gloo"
    (result,) = launch(facts, 1, torch.arange(3), "x")
    assert result["backend"] == "nccl"
    total, inner = result["nested"][0]
    assert total.device.type == inner["given"].device.type == "cpu"


@POSIX
def test_a_failing_rank_ends_the_others_and_shows_its_traceback(tmp_path):
    with pytest.raises(LaunchError) as caught:
        launch(fail_on, 3, 1, str(tmp_path), backend="gloo")
    first, *rest = str(caught.value).split("\n")
    assert first == r"rank 1 failed with KeyError: 'the reason\nof it'"
    assert caught.value.rank == 1
    assert any("in fail_on" in line for line in rest)
    assert 'raise KeyError("the reason' in "".join(rest)
    assert "Connection" not in str(caught.value)  # what the others would say
    assert running(tmp_path) == []


@POSIX
def test_a_rank_that_is_killed_is_named_not_those_that_miss_it(tmp_path):
    with pytest.raises(LaunchError, match=r"^rank 1 ended without a result, exit code -9$") as caught:
        launch(die_on, 2, 1, str(tmp_path), backend="gloo")
    assert caught.value.rank == 1
    assert running(tmp_path) == []


@POSIX
def test_a_hang_ends_with_the_place_where_it_hangs(tmp_path):
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"^rank 1 of 2 did not end within 12 s and were stopped") as caught:
        launch(hang_on, 2, 1, str(tmp_path), backend="gloo", timeout=12.0)
    assert "in hang_on" in str(caught.value)
    assert caught.value.rank is None
    assert time.monotonic() - start < 60  # not the 1000 s of the rank
    assert running(tmp_path) == []


@POSIX
def test_an_interrupted_parent_leaves_nothing_running(tmp_path):
    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            launch(stay, 2, str(tmp_path), backend="gloo")
    finally:
        signal.signal(signal.SIGINT, before)
    assert running(tmp_path) == []


PARENT = """
from test_launch import stay
from minillm.distributed.launch import launch

if __name__ == "__main__":
    launch(stay, 2, {folder!r}, backend="gloo")
"""


@POSIX
def test_a_killed_parent_leaves_nothing_running(tmp_path):
    script = tmp_path / "parent.py"
    notes = tmp_path / "notes"
    notes.mkdir()
    script.write_text(PARENT.format(folder=str(notes)))
    parent = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    until = time.monotonic() + 60
    while len(list(notes.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while running(notes) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(list(notes.iterdir())) == 2
    assert running(notes) == []


SCRIPT = """
import torch
import torch.distributed as dist
from minillm.distributed.launch import process_group

if __name__ == "__main__":
    with process_group("gloo", timeout=60):
        total = torch.tensor([dist.get_rank() + 1])
        dist.all_reduce(total)
        open({folder!r} + "/" + str(dist.get_rank()), "w").write(str(total.item()))
    assert not dist.is_initialized()
"""


def test_a_program_joins_a_group_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3", "3"]


# Refusals: before any process is started


def test_refuses_no_process():
    with pytest.raises(ValueError, match=r"^world, the number of processes, must be at least 1, got 0$"):
        launch(stay, 0, "")


def test_refuses_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^port {port} is in use: choose another, or none"):
            launch(stay, 2, "", backend="gloo", port=port)


def test_refuses_a_missing_backend():
    with pytest.raises(ValueError, match=r"^this build of torch has no backend 'carrier': use 'gloo'"):
        launch(stay, 2, "", backend="carrier")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'nccl'.*use 'gloo'"):
            launch(stay, 2, "", backend="nccl")


def test_refuses_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^'nccl' needs a GPU a rank, got 1 for 2 ranks: use 'gloo'$"):
        launch(stay, 2, "", backend="nccl")


def test_refuses_a_function_that_cannot_be_imported(monkeypatch):
    with pytest.raises(ValueError, match=r"every rank must import the function, and .*<lambda> is inside another"):
        launch(lambda: 1, 2, backend="gloo")
    typed = type(sys)("__main__")  # a notebook's: no file, no spec
    exec("def cell(): pass", typed.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", typed)
    with pytest.raises(ValueError, match=r"and cell was typed in here: put it in a file$"):
        launch(typed.cell, 2, backend="gloo")


def test_refuses_to_join_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(RuntimeError, match=r"^WORLD_SIZE, LOCAL_RANK must be set, got nothing: start .* torchrun$"),
        process_group("gloo"),
    ):
        pass
