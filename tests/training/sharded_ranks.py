"""What each rank of a small world does for test_sharded: save a sharded state, or load it into its own layout."""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from minillm.training.checkpoint import CheckpointError
from minillm.training.sharded import load_sharded, save_sharded

SHAPES = {"even": (8, 6), "uneven": (7, 5), "columns": (3, 10), "few": (2, 4), "all": (5,)}
PLACES = {"even": Shard(0), "uneven": Shard(0), "columns": Shard(1), "few": Shard(0), "all": Replicate()}
RUN = {"model": "small", "seed": 0}


def whole(scale=1.0):
    """Weights and an optimizer's memory of different dtypes, as one process has them."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    memory = [{"mean": x.square(), "step": torch.tensor(9.0)} for x in weights.values()]
    return {"model": weights, "half": {k: x.bfloat16() for k, x in weights.items()}, "optimizer": memory}


def sharded(state, mesh):
    """The same laid out over the ranks: each holds its part."""
    lay = lambda name, x: distribute_tensor(x, mesh, [PLACES[name]])  # noqa: E731
    memory = [
        {"mean": lay(name, part["mean"]), "step": part["step"]}
        for name, part in zip(SHAPES, state["optimizer"], strict=True)
    ]
    return {key: {n: lay(n, x) for n, x in state[key].items()} for key in ("model", "half")} | {"optimizer": memory}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    a, b = (x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b))
    return a.dtype == b.dtype and a.equal(b)


def rank_main(rank, world, folder):
    """Do what `folder` asks for; the answer goes into a file of the rank."""
    os.environ.update(OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    folder = Path(folder)
    store = dist.FileStore(str(folder / f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        mesh = init_device_mesh("cpu", (world,))
        answers = work(rank, world, folder, mesh)
    except Exception:
        answers = {"error": traceback.format_exc()}
    torch.save(answers, folder / f"answer{world}.{rank}")
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # now and then the exit of the interpreter aborts: gloo still has a thread


def refused(call):
    try:
        call()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return None


def work(rank, world, folder, mesh):
    answers, checkpoints = {}, folder / "run"
    mine = sharded(whole(), mesh)
    answers["held"] = mine["model"]["even"].to_local().numel()
    path = save_sharded(mine, checkpoints, world, rest={"rank": rank, "done": 5}, run=RUN)
    answers["path"] = str(path)
    answers["file"] = (path / f"__{rank}_0.distcp").stat().st_size
    for name in ("one", "2", "4"):  # saved by worlds of other sizes before
        source = folder / f"from {name}"
        if source.exists():
            blank = sharded(whole(0.0), mesh)
            [found] = source.iterdir()
            answers[f"rest {name}"] = load_sharded(blank, found, run=RUN)
            answers[f"equal {name}"] = equal(blank, sharded(whole(), mesh))
    blank = sharded(whole(0.0), mesh)
    answers["other run"] = refused(lambda: load_sharded(blank, path, run=RUN | {"seed": 1}))
    smaller = {"model": blank["model"]}
    answers["other model"] = refused(lambda: load_sharded(smaller, path))
    dist.barrier()
    shard = path / f"__{world - 1}_0.distcp"  # the last rank's; all must hear of it
    if rank == 0:
        data = bytearray(shard.read_bytes())
        data[-9] ^= 1
        shard.write_bytes(data)
    dist.barrier()
    answers["damaged"] = refused(lambda: load_sharded(blank, path))
    answers["untouched"] = equal(blank, sharded(whole(0.0), mesh))
    dist.barrier()
    again = save_sharded(mine, checkpoints, world, rest="again", run=RUN)  # over the damaged one
    answers["again"] = load_sharded(blank, again, run=RUN), equal(blank, mine)
    blocked = folder / f"blocked{world}"
    if rank == 0:
        blocked.write_text("a file where a folder should be")
    dist.barrier()
    answers["blocked"] = refused(lambda: save_sharded(mine, blocked, 1))
    return answers
