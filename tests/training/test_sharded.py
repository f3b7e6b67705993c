"""Sharded checkpoints: worlds of 1, 2 and 4 real processes save, and load what the others saved, bit for bit."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from minillm.training.checkpoint import CheckpointError, Damaged
from minillm.training.sharded import Reader, Unpickler, flat, load_sharded, save_sharded
from sharded_ranks import RUN, equal, rank_main, whole

SECONDS = 120  # for a world to start, work and end


def launch(world, folder):
    """Run `rank_main` in processes of their own, and get the ranks' answers; none is left at the end."""
    context = torch.multiprocessing.spawn(rank_main, (world, str(folder)), nprocs=world, join=False)
    try:
        for _ in range(SECONDS):
            if context.join(timeout=1):
                break
        else:
            raise TimeoutError(f"the ranks have not ended after {SECONDS} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    answers = [torch.load(folder / f"answer{world}.{rank}", weights_only=True) for rank in range(world)]
    for answer in answers:
        assert "error" not in answer, answer["error"]
    return answers


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Answers of the ranks of a world of 2, then one of 4, and the folder. The second loads what the first saved."""
    folder = tmp_path_factory.mktemp("sharded")
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    try:
        save_sharded(whole(), folder / "from one", 1, rest="alone", run=RUN)
        two = launch(2, folder)
        (folder / "from 2").mkdir()
        shutil.copytree(folder / "run" / "step-00000002", folder / "from 2" / "step-00000002")
        four = launch(4, folder)
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return {2: two, 4: four}, folder


def test_one_process_alone(tmp_path):
    path = save_sharded(whole(), tmp_path, 3, rest={"done": 3}, run=RUN)
    assert path == tmp_path / "step-00000003"
    blank = whole(0.0)
    assert load_sharded(blank, path, run=RUN) == {"done": 3}
    assert equal(blank, whole())
    assert [x.name for x in tmp_path.iterdir()] == ["step-00000003"]


def test_a_missing_part_is_named(tmp_path):
    path = save_sharded(whole(), tmp_path, 1)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(Damaged, match=r"__0_0.distcp is damaged or missing"):
        load_sharded(whole(), path)


def test_nothing_is_there_before_the_rename(tmp_path, monkeypatch):
    """A run that dies before the last step leaves a folder with another name."""

    rename = Path.rename

    def died(self, target):
        if self.name.startswith(".step"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", died)
    with pytest.raises(KeyboardInterrupt):
        save_sharded(whole(), tmp_path, 1)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".step-00000001.")
    assert {".metadata", "__0_0.distcp", "step-00000001.pt"} <= {x.name for x in left.iterdir()}


def test_refuses_other_shapes_and_dtypes(tmp_path):
    path = save_sharded({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path, 1)
    message = r"another model: a is float32 \[2, 3\] there, float32 \[3, 2\] here; b is float32 \[2\] there, bfloat16"
    with pytest.raises(CheckpointError, match=message):
        load_sharded({"a": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}, path)


def test_refuses_what_is_no_tensor(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.0\.step is a int, not a tensor: give plain values as rest"):
        save_sharded({"optimizer": [{"step": 1}]}, tmp_path, 1)


RAN = []


class Evil:
    def __reduce__(self):
        return attack, ()


def attack():
    RAN.append(1)


def test_refuses_a_list_of_parts_with_code_in_it(tmp_path):
    path = save_sharded(whole(), tmp_path, 1)
    metadata = Reader(path).read_metadata()
    metadata.planner_data = Evil()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"holds test_sharded\.attack, which is none of DCP's"):
        Reader(path).read_metadata()
    assert RAN == []


def test_names_are_those_of_dcp(tmp_path):
    path = save_sharded(whole(), tmp_path, 1)
    with (path / ".metadata").open("rb") as file:
        assert set(Unpickler(file).load().state_dict_metadata) == {name for name, _ in flat(whole())}


# Several ranks


def test_each_rank_writes_its_share(worlds):
    """Of an 8 x 6 matrix: 24 numbers of 2 ranks, 12 of 4; and nobody's file is as large as that of one alone."""
    answers, folder = worlds
    [alone] = (folder / "from one" / "step-00000001").glob("*.distcp")
    for world, ranks in answers.items():
        assert [x["held"] for x in ranks] == [48 // world] * world
        assert all(x["file"] < alone.stat().st_size for x in ranks)
        assert {x["path"] for x in ranks} == {str(folder / "run" / f"step-{world:08d}")}


@pytest.mark.parametrize(("source", "world", "rest"), [
    ("one", 2, "alone"), ("one", 4, "alone"), ("2", 4, "again"),
])  # fmt: skip
def test_a_larger_world_goes_on(worlds, source, world, rest):
    for answer in worlds[0][world]:
        assert answer[f"equal {source}"]
        assert answer[f"rest {source}"] == rest


@pytest.mark.parametrize("world", [2, 4])
def test_a_smaller_world_goes_on(worlds, world):
    blank = whole(0.0)
    assert load_sharded(blank, worlds[1] / "run" / f"step-{world:08d}", run=RUN) == "again"
    assert equal(blank, whole())


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_hears_what_is_wrong(worlds, world):
    for answer in worlds[0][world]:
        assert "is of another run: seed is 0 there, 1 here" in answer["other run"]
        assert "is of another model: half.even is only there; half.uneven is only there" in answer["other model"]
        assert f"__{world - 1}_0.distcp is damaged or missing: use another checkpoint" in answer["damaged"]
        assert answer["damaged"].startswith("Damaged")
        assert answer["untouched"]
        assert "cannot be written" in answer["blocked"]


@pytest.mark.parametrize("world", [2, 4])
def test_a_save_over_a_damaged_one(worlds, world):
    for answer in worlds[0][world]:
        assert answer["again"] == ("again", True)
    assert not list((worlds[1] / "run").glob(".*"))
