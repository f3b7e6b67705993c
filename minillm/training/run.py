"""Train on one process or on many machines with PyTorch's own engine: torchrun -m minillm.training.run --parallel fsdp2

    python -m minillm.training.run --layers 2 --width 64 --steps 20
    torchrun --nproc-per-node 8 -m minillm.training.run --parallel fsdp2 --out runs/a --save-every 100
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m minillm.training.run ...

Idea:        All processes run this program; torchrun tells each its rank, restarts and connects machines. Every process
             knows the whole order of the data and takes its own rows of each batch. DDP keeps the model whole on each
             and averages gradients; FSDP2 keeps a part of each weight and gathers a block's weights when it runs. Both
             give the update of one process with the whole batch, so a run may go on with another number of processes
             or the other engine: checkpoints know names and parts, not ranks.
Cost:        As distributed/zero counts it: DDP like plain data parallelism, FSDP2 like ZeRO stage 3.
Paper:       DDP: Li et al. 2020, arXiv:2006.15704. FSDP: Zhao et al. 2023, arXiv:2304.11277; per-parameter sharding
             (FSDP2) as in TorchTitan, arXiv:2410.06511.
Production:  torch.nn.parallel.DistributedDataParallel, torch.distributed.fsdp.fully_shard,
             torch.distributed.checkpoint; DeepSpeed, for which `--deepspeed-config` writes the same job (`job`).
Leaves out:  tensor and pipeline parallelism in this program, evaluation, float16 (DeepSpeed's config has it),
             compilation, streaming data.
"""

import json
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minillm.architecture.transformer import Transformer
from minillm.data.bpe import Tokenizer, load
from minillm.data.corpus import AUSTEN_2M, Loader, Rows, documents, pack
from minillm.training.checkpoint import CheckpointError
from minillm.training.job import BETAS, EPS, FLOOR, Job, check, config, deepspeed_config, identity, parser
from minillm.training.objective import chunked_cross_entropy, next_tokens
from minillm.training.schedule import cosine
from minillm.training.sharded import agree, load_sharded, save_sharded

# Text and model


def rows(job: Job, tokenizer: Tokenizer) -> Rows:
    """The training text in rows. ValueError: there is none, or too little."""
    if job.data:
        files = sorted(Path(job.data).glob("*.txt"))
        if not files:
            raise ValueError(f"--data must be a folder with .txt files, got {job.data} with none: give another")
        texts = [utf8(file) for file in files]
    else:
        texts = documents("train")
    return pack([tokenizer.encode(text) for text in texts], job.length, eos=tokenizer.special["<|endoftext|>"])


def utf8(file: Path) -> str:
    """A file's text. ValueError: it is none."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8, got {error.reason} at byte {error.start}: convert it") from None


class Learner(nn.Module):
    """The model with its loss as forward pass: engines hook into that and nothing else."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
        """Mean nats of the next tokens."""
        hidden = self.model.hidden(ids)[:, :-1].flatten(0, 1)
        return chunked_cross_entropy(hidden, self.model.unembedding, next_tokens(ids).flatten())


# Processes


@contextmanager
def group() -> Iterator[tuple[int, int, torch.device]]:
    """Rank, world size and device of this process, as torchrun set them; 0 and 1 without it.

    NCCL where every process of this machine has a GPU, Gloo on the CPU elsewhere.
    """
    rank, world, local, here = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= here
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield rank, world, device
    finally:
        if world > 1:
            dist.destroy_process_group()


def parallel(learner: Learner, job: Job, world: int, device: torch.device) -> nn.Module:
    """The same for several processes: a replica on each, or a shard. One process needs neither."""
    if world == 1:
        return learner
    if job.parallel == "ddp":
        return DistributedDataParallel(learner)
    mesh = init_device_mesh(device.type, (world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if job.precision == "bf16" else MixedPrecisionPolicy()
    for block in learner.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(learner, mesh=mesh, mp_policy=policy)  # changes the module itself
    return learner


def update(
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Int[Tensor, "b t"],
    job: Job,
    rank: int,
    world: int,
) -> tuple[float, float]:
    """One update with this rank's rows of the batch: loss of the whole batch, norm of its gradient before clipping.

    Gradients travel with the last micro-batch only.
    """
    parts, total = ids.chunk(world)[rank].chunk(job.accumulate), torch.zeros((), device=ids.device)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(trained, FSDPModule):
            trained.set_requires_gradient_sync(last)
        alone = trained.no_sync() if isinstance(trained, DistributedDataParallel) and not last else nullcontext()
        cast = torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16")
        with alone:
            with cast:
                loss = trained(part) / job.accumulate
            loss.backward()
        total += loss.detach() / world
    if world > 1:
        dist.all_reduce(total)
    norm = nn.utils.clip_grad_norm_(trained.parameters(), job.clip)
    optimizer.step()
    optimizer.zero_grad()
    return total.item(), (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# Checkpoints


def newest(out: Path) -> Path | None:
    """The last checkpoint in a folder."""
    found = [path for path in out.glob("step-*") if path.is_dir()]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def tensors(trained: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], Any]:
    """Weights and the optimizer's memory by name, without the engine's prefixes; and its groups of parameters."""
    model, memory = get_state_dict(trained, optimizer)
    return {"model": model, "optimizer": memory["state"]}, memory["param_groups"]


def resume(trained: nn.Module, optimizer: torch.optim.Optimizer, path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint of any number of processes; the rest of it. CheckpointError: damaged, or of another run."""
    state, groups = tensors(trained, optimizer)
    rest = load_sharded(state, path, run=run)
    memory = {"state": state["optimizer"], "param_groups": groups}
    set_state_dict(trained, optimizer, model_state_dict=state["model"], optim_state_dict=memory)
    return rest


class Log:
    """A line a step: on the screen, and as JSON in the folder. Only rank 0 writes."""

    def __init__(self, out: Path | None, rank: int, done: int) -> None:
        self.path = out / "log.jsonl" if out is not None and rank == 0 else None
        self.speaks = rank == 0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            old = self.path.read_text(encoding="utf-8").splitlines() if done and self.path.exists() else []
            self.path.write_text("".join(line + "\n" for line in old[:done]), encoding="utf-8")  # later ones are redone

    def __call__(self, step: int, **record: float) -> None:
        if self.speaks:
            print(f"step {step:5d}", *(f"{name} {value:.5g}" for name, value in record.items()), sep="  ", flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")


# The program


def train(job: Job, rank: int, world: int, device: torch.device) -> None:
    """From the beginning, or the newest checkpoint, to the end. ValueError, CheckpointError: one sentence."""
    out = Path(job.out) if job.out else None
    start = agree(newest(out)) if out is not None else None
    if job.resume and start is None:
        raise ValueError(f"--resume needs a checkpoint, got {job.out} with none: leave it out to begin")
    if start is not None and not job.resume:
        raise ValueError(f"{job.out} holds a run, got no --resume: add it to go on, or choose another folder")
    tokenizer = load(AUSTEN_2M / "tokenizer.json")
    text = rows(job, tokenizer)
    loader, run = (
        Loader(text, job.batch, seed=job.seed),
        identity(job) | {"text": zlib.crc32(text.ids.numpy().tobytes())},
    )
    torch.manual_seed(job.seed)  # the same weights everywhere
    trained = parallel(Learner(Transformer(config(job, tokenizer.size))).to(device), job, world, device)
    optimizer = torch.optim.AdamW(trained.parameters(), job.lr, betas=BETAS, eps=EPS, weight_decay=job.weight_decay)
    done = 0
    if start is not None:
        rest = resume(trained, optimizer, start, run)
        done = rest["done"]
        loader.load_state_dict(rest["loader"])
    log = Log(out, rank, done)
    while done < job.steps:
        lr = job.lr * cosine(done, warmup=job.warmup, total=job.steps, floor=FLOOR)
        for one in optimizer.param_groups:
            one["lr"] = lr
        loss, norm = update(trained, optimizer, next(loader).ids.to(device), job, rank, world)
        done += 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done}: begin with a lower --lr")
        log(done, loss=loss, norm=norm, lr=lr)
        due = job.save_every and done % job.save_every == 0
        if out is not None and (due or done == job.steps):
            state, _ = tensors(trained, optimizer)
            save_sharded(state, out, done, rest={"done": done, "loader": loader.state_dict()}, run=run)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. What a user can change is said in one sentence on rank 0; the exit code is then 2."""
    job = Job(**vars(parser().parse_args(argv)))
    rank = int(os.environ.get("RANK", 0))
    try:
        if job.deepspeed_config:
            world = job.world or int(os.environ.get("WORLD_SIZE", 1))
            check(job, world)
            if rank == 0:
                text = json.dumps(deepspeed_config(job, world), indent=2)
                Path(job.deepspeed_config).write_text(text + "\n", encoding="utf-8")
            return 0
        check(job, int(os.environ.get("WORLD_SIZE", 1)))
        with group() as (rank, world, device):
            train(job, rank, world, device)
        return 0
    except (ValueError, CheckpointError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # not of a path that was given
        said = f"{error.filename} cannot be used ({error.strerror})" if isinstance(error, OSError) else error
        if rank == 0:
            print(f"minillm.training.run: {said}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of torch's process groups were seen to abort the interpreter's own end, all being saved
