"""The experiments: what is given back goes on bit for bit, what is forgotten shows, a killed save leaves no half."""

import math
import sys

import pytest
import torch

from minillm.distributed.launch import launch
from minillm.training.checkpoint import CheckpointError, Damaged, best_interval, load, load_latest, save
from minillm.training.interrupted import (
    MIDDLE,
    PARTS,
    Stuck,
    flip_bit,
    in_half,
    kill_in_a_save,
    losses,
    lost_share,
    resumed,
    save_shards,
    simulated_loss,
    small_run,
    steps_in_file,
    without,
)
from minillm.training.sharded import load_sharded


@pytest.fixture(scope="module")
def straight():
    return losses(small_run(), 26)


@pytest.fixture(scope="module")
def state():
    return small_run().train(until=20).state_dict()


def test_a_resumed_run_is_the_run_bit_for_bit(straight, state):
    assert losses(resumed(state), 6) == straight[20:]


def test_it_learns(straight):
    assert straight[0] > 4.5  # ln 128 = 4.85
    assert straight[-1] < 3.2


@pytest.mark.parametrize("part", PARTS)
def test_what_is_forgotten_shows(straight, state, part):
    other = losses(resumed(without(state, part)), 6)
    apart = max(abs(a - b) for a, b in zip(other, straight[20:], strict=True))
    assert apart > 1e-3  # a bit of float32 is 2e-7 here
    assert losses(resumed(state), 1) == straight[20:21]  # the state itself is as it was


def test_half_precision_shows_a_little(straight, state):
    rounded = in_half(state)
    error = max(
        (a - b).abs().max() / a.abs().max()
        for a, b in zip(state["model"].values(), rounded["model"].values(), strict=True)
    )
    assert 0 < error <= 2**-11
    assert losses(resumed(rounded), 6) != straight[20:]


def test_refuses_a_part_that_is_none():
    with pytest.raises(ValueError, match=r"part must be one of weights, optimizer, .*, got 'scheduler'"):
        without({}, "scheduler")


def test_a_file_of_live_tensors_mixes_steps():
    """One step a tensor written: 0 in the first, 1 in the second, and so on. A copy has the step of the save in all."""
    assert steps_in_file(copied=False, tensors=5) == [0, 1, 2, 3, 4]
    assert steps_in_file(copied=True, tensors=5) == [0] * 5


def test_a_flipped_bit_is_one_bit_of_one_number(tmp_path):
    """1.0 has the exponent 127, 0111 1111: with its highest bit it is 255, infinity."""
    path = save({"a": torch.arange(100.0), "b": torch.ones(100)}, tmp_path, 1)
    before = path.read_bytes()
    flip_bit(path, torch.ones(100))
    after = path.read_bytes()
    assert [(a ^ b).bit_count() for a, b in zip(before, after, strict=True) if a != b] == [1]
    changed = torch.load(path, weights_only=True)
    assert changed["a"].equal(torch.arange(100.0))
    assert changed["b"][0] == math.inf
    assert changed["b"][1:].eq(1).all()
    with pytest.raises(Damaged, match="checksum"):
        load(path)


def test_killed_in_the_middle_of_a_save(tmp_path, straight):
    folders = {"atomic": tmp_path / "a", "in place": tmp_path / "b"}
    codes = kill_in_a_save(folders, [2, 4, 6])
    killed = -9 if sys.platform != "win32" else 1
    assert codes == {"atomic": killed, "in place": killed}
    names = sorted(path.name for path in folders["atomic"].iterdir())
    assert len(names) == 3
    assert names[0].startswith(".step-00000006.pt.")
    assert names[1:] == ["step-00000002.pt", "step-00000004.pt"]
    found = load_latest(folders["atomic"])
    assert (found.step, found.skipped) == (4, [])
    again = losses(resumed(found.state), 6)
    assert torch.tensor(again).allclose(torch.tensor(straight[4:10]))  # another process, and perhaps its threads
    [last] = folders["in place"].iterdir()
    assert last.stat().st_size == MIDDLE
    with pytest.raises(RuntimeError, match="zip archive"):
        torch.load(last, weights_only=True)


def test_a_child_that_fails_is_noticed(tmp_path, capfd):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="the process that saves atomic ended before the save of step 2"):
        kill_in_a_save({"atomic": tmp_path / "file"}, [1, 2])
    assert "CheckpointError" in capfd.readouterr().err


def test_a_stuck_file_takes_the_first_bytes(tmp_path, monkeypatch):
    class Ended(Exception):
        pass

    def ends(code):
        raise Ended

    class Stdin:
        def read(self):
            return ""

    monkeypatch.setattr("os._exit", ends)
    monkeypatch.setattr("sys.stdin", Stdin())
    with (tmp_path / "a").open("wb") as file:
        stuck = Stuck(file)
        stuck.write(b"x" * (MIDDLE - 10))
        with pytest.raises(Ended):
            stuck.write(b"y" * 20)
    assert (tmp_path / "a").read_bytes() == b"x" * (MIDDLE - 10) + b"y" * 10


def test_shards_of_two_ranks_are_loaded_by_one(tmp_path):
    held = launch(save_shards, 2, tmp_path, 5, backend="gloo", timeout=120.0)
    weights = small_run().model.state_dict()
    assert sum(rank["weights"] for rank in held) == sum(x.numel() for x in weights.values())
    assert all(rank["bytes"] >= 4 * rank["weights"] for rank in held)
    blank = {name: torch.zeros_like(x) for name, x in weights.items()}
    load_sharded({"model": blank}, tmp_path / "step-00000005")
    assert all(blank[name].equal(weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match="is of another model"):
        load_sharded({"model": {"embedding": torch.zeros(3)}}, tmp_path / "step-00000005")


def test_the_formula_is_near_the_measured_loss():
    """Young's formula drops terms of the order of (T / M) squared."""
    cost, between = 30.0, 20_000.0
    best = best_interval(cost, between)
    for interval in (best / 2, best, 2 * best):
        assert math.isclose(simulated_loss(interval, cost, between), lost_share(interval, cost, between), rel_tol=0.05)
    measured = [simulated_loss(best * factor, cost, between) for factor in (0.4, 1.0, 2.5)]
    assert measured[1] < min(measured[0], measured[2])


def test_losses_by_hand():
    assert lost_share(100.0, 10.0, 500.0) == 0.1 + 0.1
