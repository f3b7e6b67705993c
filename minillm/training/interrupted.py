"""Experiments with an interrupted run: a part forgotten, a process killed in a save, shards, and how often to save.

Idea:        A small Transformer with dropout learns letters of Jane Austen. Its state can be given back whole, or with
             one part as a new run has it: how far the next losses are from those of the run that was not interrupted
             says what the part was for. A child process that trains the same model stops in the middle of writing a
             checkpoint and is killed from outside: what then lies in the folder is what a crash leaves behind. And a
             state that is written while it is trained, without a copy, becomes a file that mixes several steps.
Cost:        One update of the small model takes some milliseconds. A child process imports torch first, 2 to 4 s.
Paper:       Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, a better one for
             failures that are frequent.
Production:  subprocess.Popen.kill, which is SIGKILL, or TerminateProcess on Windows; torch.distributed.tensor.
Leaves out:  kills at random moments, which tests/training/test_checkpoint does fifty times; several machines.
"""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import dropout

from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Loader, documents, pack
from minillm.training import checkpoint
from minillm.training.loop import Run, TrainConfig
from minillm.training.schedule import cosine

STEPS = 60
PARTS = {  # what to forget, and where it is in the state of a Run
    "weights": "model",
    "optimizer": "optimizers",
    "step and schedule": "run",
    "data position": "loader",
    "random numbers": "random",
}
MIDDLE = 100_000  # bytes of a file after which a stuck save goes no further


class Dropped(Transformer):
    """A Transformer with dropout, so that a step depends on random numbers."""

    def hidden(self, ids: Int[Tensor, "b t"], **more: Any) -> Float[Tensor, "b t c"]:
        """Like a Transformer's, a tenth of it dropped in training."""
        return dropout(super().hidden(ids, **more), 0.1, self.training)


def small_run(seed: int = 0) -> Run:
    """A run that begins: 60 steps of AdamW with warm-up and cosine, 8 rows of 64 letters a step."""
    torch.manual_seed(seed)
    model = Dropped(
        Config(vocabulary=128, width=64, layers=2, heads=4, kv_heads=2, head_size=16, hidden=176, context=64)
    )
    text = documents("train")[0].encode("ascii", "replace")[:20_000]
    loader = Loader(pack([list(text)], 64, eos=0), 8, seed=seed)
    config = TrainConfig(steps=STEPS, schedule=lambda step: cosine(step, warmup=10, total=STEPS))
    return Run(model, loader, torch.optim.AdamW(model.parameters(), 0.01), config)


def losses(run: Run, steps: int) -> list[float]:
    """Of the next steps."""
    run.train(until=run.done + steps)
    return [record.loss for record in run.records[-steps:]]


def resumed(state: dict[str, Any], *, seed: int = 0) -> Run:
    """A new run that got the state."""
    run = small_run(seed)
    run.load_state_dict(state)
    return run


def without(state: dict[str, Any], part: str, *, seed: int = 0) -> dict[str, Any]:
    """The state as it comes back if one part, a key of PARTS, was not saved: that part is a beginning run's."""
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    return {**state, PARTS[part]: small_run(seed).state_dict()[PARTS[part]]}


def in_half(state: dict[str, Any]) -> dict[str, Any]:
    """The state from a checkpoint with the weights in float16: half of their bytes, and rounded."""
    return {**state, "model": {name: weight.half().float() for name, weight in state["model"].items()}}


# Written while training goes on


class SlowDisk(io.BytesIO):
    """A file in memory that is so slow that training does something, `meanwhile`, after each tensor is written."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self.meanwhile = meanwhile

    def write(self, data: Any) -> int:
        """Like a file's."""
        written = super().write(data)
        if len(data) >= 1000:  # a tensor's numbers; what torch adds is shorter
            self.meanwhile()
        return written


def steps_in_file(*, copied: bool, tensors: int = 8) -> list[int]:
    """Save some tensors at step 0 while training, which adds 1 to all a step, goes on; the step each one saved is from.

    >>> steps_in_file(copied=False, tensors=4), steps_in_file(copied=True, tensors=4)
    ([0, 1, 2, 3], [0, 0, 0, 0])
    """
    live = {f"layer {i}": torch.zeros(1000) for i in range(tensors)}
    disk = SlowDisk(lambda: [tensor.add_(1) for tensor in live.values()])
    torch.save(checkpoint.snapshot(live) if copied else live, disk)
    disk.seek(0)
    return [int(tensor[0]) for tensor in torch.load(disk, weights_only=True).values()]


def flip_bit(path: Path, tensor: Float[Tensor, "..."]) -> None:
    """Damage a file that holds this float32 tensor: the highest bit of its first number's exponent changes."""
    whole, found = bytearray(path.read_bytes()), tensor.flatten()[:64].numpy().tobytes()
    whole[whole.index(found) + 3] ^= 0x40  # the last byte of four has the sign and seven bits of the exponent
    path.write_bytes(whole)


# Killed


class Stuck(checkpoint.Hashed):
    """A file that takes so many bytes, says so to the parent, and never goes on."""

    def write(self, data: bytes | memoryview) -> int:
        """Like a file's, up to the middle."""
        room = MIDDLE - self.size
        if len(data) <= room:
            return super().write(data)
        super().write(data[:room])
        self.flush()
        print("in the middle", flush=True)
        sys.stdin.read()  # waits to be killed; if the parent ends without that, so does this
        os._exit(1)


def in_place(state: Any, folder: Path, step: int) -> Path:
    """Save as many scripts do: always under the same name, over the checkpoint before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "last.pt"
    with path.open("wb") as file:
        torch.save(state, checkpoint.Hashed(file))  # type: ignore[arg-type]  # write and flush are all it calls
    return path


WAYS = {"atomic": checkpoint.save, "in place": in_place}


def train_and_get_stuck(folder: Path, way: str, steps: Sequence[int]) -> None:
    """In the child: save after each of these steps; the last save does not end."""
    run = small_run()
    for step in steps:
        run.train(until=step)
        if step == steps[-1]:
            checkpoint.Hashed = Stuck  # type: ignore[misc]
        WAYS[way](run.state_dict(), folder, step)


def kill_in_a_save(folders: dict[str, Path], steps: Sequence[int]) -> dict[str, int]:
    """Train in a child process for each way of saving, and kill it in the middle of the last save; its exit code.

    `folders` has a folder for each way, "atomic" or "in place". RuntimeError: a child ended before.
    """
    root = str(Path(checkpoint.__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": paths}
    children: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}
    try:
        for way, folder in folders.items():
            given = [str(folder), way, str(torch.get_num_threads()), *map(str, steps)]
            command = [sys.executable, "-m", "minillm.training.interrupted", *given]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            assert child.stdout is not None
            children[way] = child, child.stdout
        for way, (_, says) in children.items():
            if says.readline().strip() != "in the middle":
                raise RuntimeError(f"the process that saves {way} ended before the save of step {steps[-1]}")
    finally:
        for child, _ in children.values():
            child.kill()  # no handler, no clean-up, no last words
            child.communicate()
    return {way: child.returncode for way, (child, _) in children.items()}


# Sharded


def save_shards(folder: Path, step: int) -> dict[str, int]:
    """On each rank: save its part of the small model's weights; how many weights and bytes of a file that were."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from minillm.training.sharded import save_sharded

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weights = {
        name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in small_run().model.state_dict().items()
    }
    path = save_sharded({"model": weights}, folder, step)
    file = path / f"__{dist.get_rank()}_0.distcp"
    return {"weights": sum(x.to_local().numel() for x in weights.values()), "bytes": file.stat().st_size}


# How often


def lost_share(interval: float, save_seconds: float, between_failures: float) -> float:
    """The share of time lost to saving and to doing again, as Young's formula has it: C / T + T / 2M.

    >>> round(lost_share(interval=600.0, save_seconds=30.0, between_failures=6000.0), 3)      # 5% and 5%
    0.1
    """
    return save_seconds / interval + interval / (2 * between_failures)


def simulated_loss(
    interval: float, save_seconds: float, between_failures: float, *, failures: int = 100_000, seed: int = 0
) -> float:
    """The same measured: failures at random times, each undoing what was done since the last whole checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.empty(failures, dtype=torch.float64).exponential_(1 / between_failures, generator=generator)
    kept = (up / (interval + save_seconds)).floor() * interval
    return 1 - (kept.sum() / up.sum()).item()


if __name__ == "__main__":
    folder, way, threads, *steps = sys.argv[1:]
    torch.set_num_threads(int(threads))
    train_and_get_stuck(Path(folder), way, [int(step) for step in steps])
