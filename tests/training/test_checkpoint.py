"""Checkpoints: whole or not there, damage refused, background saves, and runs that are really killed, fifty times."""

import errno
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import minillm
from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Loader, pack
from minillm.training import checkpoint
from minillm.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    Damaged,
    best_interval,
    check_plain,
    checkpoints,
    differences,
    kept,
    load,
    load_latest,
    random_state,
    save,
    set_random_state,
    snapshot,
    verify,
    write,
)
from minillm.training.loop import Run, TrainConfig
from minillm.training.precision import LossScaler

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def state(value=1.0):
    return {
        "weight": torch.full((4, 8), value),
        "half": torch.tensor([value, 2.0], dtype=torch.bfloat16),
        "small": torch.tensor([value]).to(torch.float8_e4m3fn),
        "more": [1, 2.5, (None, True, "three"), {"deep": torch.arange(3)}],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        bits = [x.flatten().view(torch.uint8) for x in (a, b)]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and bits[0].equal(bits[1])
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# One file


def test_what_is_saved_is_loaded(tmp_path):
    path = save(state(), tmp_path / "run" / "a", 42)
    assert path == tmp_path / "run" / "a" / "step-00000042.pt"
    assert same(load(path), state())
    assert files(path.parent) == ["step-00000042.pt"]


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load_reads_the_file_without_us(tmp_path, mmap):
    path = save(state(), tmp_path, 1, run={"text": "x" * 2950})  # the longest last line
    assert same(torch.load(path, weights_only=True, mmap=mmap), state())


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        inside = os.fstat(descriptor)
        done.append(("fsync", inside.st_ino, inside.st_size))
        fsync(descriptor)

    def renamed(a, b):
        done.append(("rename", Path(a).stat().st_ino, Path(a).stat().st_size))
        assert Path(a).parent == Path(b).parent
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = save(state(), tmp_path, 7)
    inode, size = path.stat().st_ino, path.stat().st_size
    expected = [("fsync", inode), ("rename", inode)]
    expected += [("fsync", tmp_path.stat().st_ino)] if os.name != "nt" else []
    assert [x[:2] for x in done] == expected
    assert [x[2] for x in done[:2]] == [size, size]  # nothing is added after the sync


def test_a_new_folder_is_itself_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "sync_folder", synced.append)
    save(state(), tmp_path / "new", 1)
    save(state(), tmp_path / "new", 2)
    assert synced == [tmp_path, tmp_path / "new", tmp_path / "new"]


def test_windows_has_no_sync_of_a_folder(tmp_path, monkeypatch):
    def opened(*_):
        raise PermissionError("what Windows says to a folder")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "name", "nt")
        checkpoint.sync_folder(tmp_path)
        patch.setattr(os, "name", "posix")
        with pytest.raises(PermissionError):
            checkpoint.sync_folder(tmp_path)


def test_a_save_over_a_file_replaces_it_whole(tmp_path):
    save(state(1.0), tmp_path, 3)
    path = save(state(2.0), tmp_path, 3)
    assert same(load(path), state(2.0))
    assert files(tmp_path) == ["step-00000003.pt"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = save(state(), tmp_path, 5)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 120, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged, match=r"step-00000005.pt is (cut off|damaged).*use another checkpoint"):
            load(path)
    path.write_bytes(whole)
    assert same(load(path), state())


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path = save(state(), tmp_path, 5)
    whole = path.read_bytes()
    for place in [*range(0, len(whole) - 200, 53), *range(len(whole) - 200, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"step-00000005.pt is (cut off|damaged)"):
            load(path)


def test_torch_takes_a_flipped_bit_for_a_weight(tmp_path):
    """Why there is a checksum of our own."""
    path = save({"weight": torch.full((8,), 1.0)}, tmp_path, 1)
    path.write_bytes(path.read_bytes().replace(np.float32(1.0).tobytes(), np.float32(-1.0).tobytes(), 1))
    assert torch.load(path, weights_only=True)["weight"].tolist() == [-1.0] + [1.0] * 7
    with pytest.raises(Damaged, match="checksum does not match"):
        load(path)


def test_a_plain_file_of_torch_is_refused(tmp_path):
    torch.save(state(), tmp_path / "step-00000001.pt")
    with pytest.raises(Damaged, match="its last line is missing"):
        load(tmp_path / "step-00000001.pt")


def test_large_files_are_read_in_pieces(tmp_path):
    big = {"weight": torch.arange(700_000)}  # 5.6 MB, pieces have 1 MiB
    path = save(big, tmp_path, 1, run={"a": 1})
    assert same(load(path), big)
    assert verify(path) == {"step": 1, "run": {"a": 1}}


RAN = []


class Evil:
    def __reduce__(self):
        return attack, ("code",)


def attack(word):
    RAN.append(word)


def test_a_file_from_elsewhere_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_plain", lambda state: None)
    path = save({"weight": Evil()}, tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001.pt holds more than tensors and plain values"):
        load(path)
    assert RAN == []
    torch.load(path, weights_only=False)
    assert RAN == ["code"]


@pytest.mark.parametrize(
    ("value", "name"), [(np.ones(2), "numpy.ndarray"), (np.float64(1.0), "numpy.float64"), (Path("x"), "pathlib")]
)
def test_refuses_to_save_what_it_would_not_load(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"state\['random'\]\[1\] is a {name}.*save tensors and plain values"):
        save({"random": [1, value]}, tmp_path, 1)
    assert files(tmp_path) == []


def test_what_is_plain_is_loaded(tmp_path):
    odd = {"a": torch.bfloat16, 3: b"bytes", "p": torch.nn.Parameter(torch.ones(2)), "i": 1 << 70, "f": float("inf")}
    check_plain(odd)
    again = load(save(odd, tmp_path, 1))
    assert again.pop("p").equal(odd.pop("p"))
    assert again == odd


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-00000009.pt cannot be read \(No such file"):
        load(tmp_path / "step-00000009.pt")


# Another run, another model


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    run = {"model": {"width": 8, "layers": (1, 2)}, "data": "austen", "seed": 0}
    path = save(state(), tmp_path, 1, run=run)
    assert same(load(path, run=run), state())
    assert same(load(path), state())
    other = {"model": {"width": 16, "layers": (1, 2)}, "data": "austen", "rows": 7}
    for call in (lambda: load(path, run=other), lambda: load_latest(tmp_path, run=other)):
        with pytest.raises(CheckpointError) as caught:
            call()
        message = f"{path} is of another run: model.width is 8 there, 16 here; seed is only there; rows is only here"
        assert str(caught.value) == message
        assert not isinstance(caught.value, Damaged)


def test_another_run_is_refused_before_its_tensors_are_read(tmp_path, monkeypatch):
    path = save(state(), tmp_path, 1, run={"width": 8})
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match="width is 8 there, 16 here"):
        load(path, run={"width": 16})


def test_differences_of_tensors():
    saved = {"a": torch.ones(2, 3), "b": torch.ones(2), "c": torch.ones(2)}
    here = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2, 1)}
    assert differences(saved, here) == [
        "b is float32 [2] there, bfloat16 [2] here",
        "c is float32 [2] there, float32 [2, 1] here",
    ]


def tiny_run(*, width=16, layers=1, scaler=None):
    torch.manual_seed(0)
    model = Transformer(
        Config(vocabulary=16, width=width, layers=layers, heads=2, kv_heads=1, head_size=8, hidden=24, context=16)
    )
    loader = Loader(pack([[1, 2, 3, 4, 5, 6, 7] * 20], 8, eos=0), 4)
    config = TrainConfig(steps=12, autocast=True)
    return Run(model, loader, torch.optim.AdamW(model.parameters(), 0.01), config, scaler=scaler)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            dict(width=32),
            r"another model: embedding is float32 \[16, 16\] there, float32 \[16, 32\] here; .*; and 5 more",
        ),
        (dict(layers=2), r"another model: blocks\.1\.\S+ is only here"),
        (dict(scaler=LossScaler()), "the state has no loss scaler, this run has a loss scaler"),
    ],
)
def test_refuses_the_state_of_another_model(tmp_path, other, message):
    path = save(tiny_run().train(until=2).state_dict(), tmp_path, 2)
    run = tiny_run(**other)
    before, place = snapshot(run.model.state_dict()), run.loader.state_dict()
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(load(path))
    assert same(before, snapshot(run.model.state_dict()))
    assert run.loader.state_dict() == place


def test_a_run_with_a_scaler_goes_on_bit_for_bit(tmp_path):
    """float16, and a scale that is too large at first: its steps are skipped."""
    make = lambda: tiny_run(scaler=LossScaler(scale=2.0**24, interval=3))  # noqa: E731
    straight = make().train()
    assert straight.scaler.value < 2.0**24
    steps = straight.optimizers[0].state_dict()["state"][0]["step"].item()
    assert 1 < steps < 12
    path = save(make().train(until=7).state_dict(), tmp_path, 7)
    resumed = make()
    resumed.load_state_dict(load(path))
    resumed.train()
    assert [r.loss for r in resumed.records] == [r.loss for r in straight.records]
    assert same(snapshot(resumed.model.state_dict()), snapshot(straight.model.state_dict()))
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()


# The newest good one


def test_the_newest_good_one_is_found_and_the_others_named(tmp_path):
    paths = [save(state(step), tmp_path, step) for step in (9, 10, 100, 99)]
    assert checkpoints(tmp_path) == [paths[0], paths[1], paths[3], paths[2]]
    found = load_latest(tmp_path)
    assert (found.step, found.path, found.skipped) == (100, paths[2], [])
    paths[2].write_bytes(paths[2].read_bytes()[:500])
    damaged = bytearray(paths[3].read_bytes())
    damaged[300] ^= 4
    paths[3].write_bytes(damaged)
    found = load_latest(tmp_path)
    assert (found.step, found.path) == (10, paths[1])
    assert same(found.state, state(10))
    assert [re.search(r"step-\d+\.pt is (cut off|damaged)", x)[0] for x in found.skipped] == [
        "step-00000100.pt is cut off",
        "step-00000099.pt is damaged",
    ]


def test_no_checkpoint_at_all(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "not there") is None
    (tmp_path / "step-1.pt").write_text("other")
    (tmp_path / ".step-00000001.pt.abc.tmp").write_text("half")
    assert load_latest(tmp_path) is None


def test_only_damaged_ones_are_no_fresh_start(tmp_path):
    for step in (1, 2):
        save(state(), tmp_path, step).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole: .*0002.pt is cut off.*; .*0001.pt is cut"
    ):
        load_latest(tmp_path)


# Retention


def test_kept_by_hand():
    assert kept([1, 2, 3, 4, 5], last=1, every=0) == {5}
    assert kept([5, 3, 4, 1, 2], last=2, every=0) == {4, 5}
    assert kept([10, 20, 25, 30, 35], last=1, every=10) == {10, 20, 30, 35}
    assert kept([1], last=3, every=0) == {1}


def test_old_ones_are_removed_when_the_new_one_is_there(tmp_path):
    with Checkpoints(tmp_path, last=2, every=4) as saver:
        for step in range(1, 12):
            saver.save(state(step), step)
    assert [int(name[5:13]) for name in files(tmp_path)] == [4, 8, 10, 11]
    (tmp_path / "notes.txt").write_text("mine")
    with Checkpoints(tmp_path, last=1) as saver:
        saver.save(state(12), 12)
    assert files(tmp_path) == ["notes.txt", "step-00000012.pt"]


def test_nothing_is_removed_when_the_save_fails(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, last=1, background=False) as saver:
        saver.save(state(1), 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fails_with(errno.EIO))
            with pytest.raises(CheckpointError, match="see to the disk or choose another folder"):
                saver.save(state(2), 2)
        assert same(saver.load_latest().state, state(1))
    assert files(tmp_path) == ["step-00000001.pt"]


def test_a_resume_from_before_a_damaged_one_keeps_what_it_saves(tmp_path):
    """Step 10 is damaged, the run goes on from 8: 9 must stay although 10 has the higher number."""
    save(state(8), tmp_path, 8)
    save(state(10), tmp_path, 10).write_bytes(b"")
    with Checkpoints(tmp_path, last=1) as saver:
        assert saver.load_latest().step == 8
        saver.save(state(9), 9)
        assert saver.load_latest().step == 9


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / ".step-00000001.pt.abc.tmp").write_text("half")
    Checkpoints(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("options", [dict(last=0), dict(every=-1)])
def test_refuses_to_keep_nothing(tmp_path, options):
    with pytest.raises(ValueError, match="keep at least the last one, and every 0"):
        Checkpoints(tmp_path, **options)


def test_refuses_a_long_name_of_the_run(tmp_path):
    with pytest.raises(ValueError, match="run may take 3000 bytes as JSON, got 4032"):
        save(state(), tmp_path, 1, run={"text": "x" * 4000})


def test_youngs_interval_loses_least():
    """Of each second, C / T is spent on saves and T / 2 M on what is lost: half an interval a failure."""
    cost, between = 30.0, 3600.0
    loss = lambda interval: cost / interval + interval / (2 * between)  # noqa: E731
    best = best_interval(cost, between)
    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.9, 1.1, 2))


# In the background


class Slow:
    """A save that waits until it is let go."""

    def __init__(self, monkeypatch):
        self.begun, self.go, self.running, self.most = threading.Event(), threading.Event(), 0, 0
        self.save, self.steps = checkpoint.save, []
        monkeypatch.setattr(checkpoint, "save", self)

    def __call__(self, state, folder, step, *, run):
        self.running += 1
        self.most = max(self.most, self.running)
        self.steps.append(step)
        self.begun.set()
        assert self.go.wait(60)
        self.save(state, folder, step, run=run)
        self.running -= 1


def test_training_goes_on_and_the_file_has_the_state_of_the_save(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    run = tiny_run().train(until=3)
    live = {"model": run.model.state_dict(), "optimizer": run.optimizers[0].state_dict(), "list": [run.done]}
    then = snapshot(live)
    with Checkpoints(tmp_path) as saver:
        saver.save(live, 3)
        assert slow.begun.wait(60)
        run.train(until=6)  # while the save waits
        live["list"].append(6)
        assert not same(snapshot(live), then)
        slow.go.set()
        saver.wait()
        assert same(saver.load_latest().state, then)


def test_a_copy_is_not_the_tensor():
    live = {"a": torch.zeros(3), "b": [torch.zeros(3)], "c": (torch.nn.Parameter(torch.zeros(3)),)}
    copied = snapshot(live)
    with torch.no_grad():
        for x in (live["a"], live["b"][0], live["c"][0]):
            x += 1
    assert copied["a"].sum() + copied["b"][0].sum() + copied["c"][0].sum() == 0
    assert not copied["c"][0].requires_grad


def test_a_view_is_copied_without_the_rest(tmp_path):
    rows = torch.arange(100_000.0)
    saver = Checkpoints(tmp_path, background=False)
    saver.save({"first": rows[:10]}, 1)
    assert checkpoints(tmp_path)[0].stat().st_size < 10_000 < save({"first": rows[:10]}, tmp_path, 2).stat().st_size


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    with Checkpoints(tmp_path, last=9) as saver:
        saver.save(state(1), 1)
        second = threading.Thread(target=lambda: [saver.save(state(step), step) for step in (2, 3)])
        second.start()
        assert slow.begun.wait(60)
        second.join(0.2)
        waits, steps = second.is_alive(), list(slow.steps)
        slow.go.set()
        second.join(60)
    assert waits  # for the first
    assert steps == [1]
    assert slow.most == 1
    assert slow.steps == [1, 2, 3]
    assert len(files(tmp_path)) == 3


def fails_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("ask", ["save", "wait", "load_latest", "exit"])
def test_what_goes_wrong_behind_is_said_at_the_next_call(tmp_path, monkeypatch, ask):
    saver = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_with(errno.ENOSPC))
        saver.save(state(1), 1)  # raises nothing
        saver.pending.exception(60)
    calls = {
        "save": lambda: saver.save(state(2), 2),
        "wait": saver.wait,
        "load_latest": saver.load_latest,
        "exit": lambda: saver.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointError, match=r"step-00000001.pt cannot be written \(No space left on device\)"):
        calls[ask]()
    saver.wait()  # once
    if ask != "exit":
        saver.save(state(2), 2)
        assert saver.load_latest().step == 2


# A full disk


SENTENCE = (
    r"step-00000002.pt cannot be written \(.+\), make room or choose another folder: checkpoints before it are int"
)


def test_the_disk_fills_at_any_write(tmp_path, monkeypatch):
    save(state(1), tmp_path, 1)
    real = checkpoint.Hashed.write
    writes = []
    monkeypatch.setattr(checkpoint.Hashed, "write", lambda self, data: (writes.append(1), real(self, data))[1])
    path = save(state(2), tmp_path, 2)
    path.unlink()
    assert len(writes) > 20

    class Full(io.FileIO):
        left = 0

        def write(self, data):
            if Full.left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            Full.left -= 1
            return super().write(data)

    monkeypatch.setattr(checkpoint.Hashed, "write", real)
    monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode.replace("b", "")))
    for number in range(len(writes)):
        Full.left = number
        with pytest.raises(CheckpointError, match=SENTENCE):
            save(state(2), tmp_path, 2)
        assert files(tmp_path) == ["step-00000001.pt"]
    monkeypatch.undo()
    assert same(load_latest(tmp_path).state, state(1))


def big_state():
    return {"weight": torch.rand(100_000)}  # 400 kB


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size")
def test_a_file_may_not_grow_further(tmp_path):
    import resource

    save(state(1), tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=SENTENCE):
            save(big_state(), tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == ["step-00000001.pt"]
    assert load_latest(tmp_path).step == 1


@LINUX
@pytest.mark.parametrize("buffering", [0, -1])
def test_the_full_device_says_that_it_is_full(buffering):
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb", buffering) as file:
        write(big_state(), file, "{}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB of its own; where this process may not mount one, the test is left out."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    saver = Checkpoints(small_disk, last=2)
    saver.save(state(1), 1)
    saver.save(big_state(), 2)
    with pytest.raises(CheckpointError, match=SENTENCE):
        saver.wait()
    assert files(small_disk) == ["step-00000001.pt"]
    assert same(saver.load_latest().state, state(1))
    saver.save(state(3), 3)  # there is room again for a small one
    assert saver.load_latest().step == 3


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \(.+\), see to the disk or choose another folder"):
        save(state(), tmp_path / "taken", 1)


# Random numbers


DRAWS = {
    "torch": lambda: torch.rand(5).tolist(),
    "numpy": lambda: np.random.rand(5).tolist() + np.random.standard_normal(3).tolist(),  # keeps one of a pair
    "python": lambda: [random.random(), random.gauss(0, 1), random.random()],
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_go_on(tmp_path, draw):
    before = random_state()
    try:
        draw()
        path = save(random_state(), tmp_path, 1)
        expected = draw()
        draw()
        set_random_state(load(path))
        assert draw() == expected
    finally:
        set_random_state(before)


# Kill -9

SERVER = sys.platform == "linux"  # others do not fork with torch in the process: a few kills, each a fresh start
KILLS = 50 if SERVER else 6
STAGES = {"write": 300, "fsync": 12, "replace": 6, "unlink": 4}


@pytest.fixture(scope="module")
def start():
    """start(options, wait): a run to its end or its death; how it ended."""
    script = Path(__file__).with_name("killed_run.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(minillm.__file__).parents[1])}
    if not SERVER:

        def once(options, wait):
            log = Path(options["log"])
            begun = len(attempts(log))
            child = subprocess.Popen([sys.executable, str(script), json.dumps(options)], env=env)
            while wait is not None and len(attempts(log)) == begun and child.poll() is None:
                time.sleep(0.01)
            if wait is not None:
                time.sleep(wait)
                child.kill()
            return child.wait(120)

        yield once
        return
    server = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert server.stdout.readline() == "ready\n"

    def forked(options, wait):
        print(json.dumps(options | {"wait": wait}), file=server.stdin, flush=True)
        return int(server.stdout.readline())

    yield forked
    server.stdin.close()
    assert server.wait(60) == 0
    server.stdout.close()


def attempts(log):
    """What each process of a run wrote: where it began, and its steps with their losses."""
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        first, second = line.split()
        if first == "from":
            found.append((int(second), []))
        else:
            found[-1][1].append((int(first), second))
    return found


def test_fifty_kills_change_no_bit_of_the_losses(tmp_path, start):
    def options(name, *, background=False, die_at=None):
        (tmp_path / f"{name}.log").touch()
        paths = {"folder": tmp_path / name, "log": tmp_path / f"{name}.log", "done": tmp_path / f"{name}.json"}
        return {key: str(path) for key, path in paths.items()} | {"background": background, "die_at": die_at}

    assert start(options("straight"), None) == 0
    expected = json.loads((tmp_path / "straight.json").read_text())
    [(begun, steps)] = attempts(tmp_path / "straight.log")
    truth = dict(steps)
    assert (begun, list(truth.values())) == (0, expected[:-1])
    assert len(set(truth.values())) == len(truth) == 60

    generator, killed, halves, runs = random.Random(0), 0, 0, []
    while killed < KILLS:
        name, background = f"run {len(runs)}", len(runs) % 2 == 1
        runs.append((name, background))
        for attempt in range(25):
            wait, die_at = None, None
            if attempt % 2 and killed < KILLS:
                stage = generator.choice(list(STAGES))
                die_at = (stage, generator.randrange(STAGES[stage]))
            elif killed < KILLS:
                wait = generator.uniform(0, 0.15)
            end = start(options(name, background=background, die_at=die_at), wait)
            if end == 0:
                break
            assert end == 9 or not SERVER, end
            killed += 1
            halves += any((tmp_path / name).glob(".*.tmp"))
        else:
            assert start(options(name, background=background), None) == 0
    assert killed == KILLS
    assert halves >= KILLS // 6  # kills in the middle of a file; the other stages leave whole ones

    for name, background in runs:
        assert json.loads((tmp_path / f"{name}.json").read_text()) == expected
        tries = attempts(tmp_path / f"{name}.log")
        reached = 0
        for begun, steps in tries:
            # A line is written before its step is saved; the next line says that a save in the foreground is done, the
            # one after it that one in the background is.
            assert max(0, reached - 1 - background) <= begun <= reached
            assert [step for step, _ in steps] == list(range(begun + 1, begun + 1 + len(steps)))
            assert all(loss == truth[step] for step, loss in steps)
            reached = begun + len(steps)
        assert reached == 60
        found, asked = files(tmp_path / name), [f"step-{step:08d}.pt" for step in (20, 40, 59, 60)]
        if tries[-1][0] == 60:  # killed after the last save, before an old one was removed; then nothing was left to do
            found = [file for file in found if file != "step-00000058.pt"]
        assert found == asked
        assert len(tries) > 1
    assert (
        Counter(len(steps) > 0 for name, _ in runs for _, steps in attempts(tmp_path / f"{name}.log"))[True] > KILLS / 2
    )
