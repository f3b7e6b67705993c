"""ZeRO's stages and PyTorch's own, side by side on real processes: bytes held, bytes sent, and the weights at the end.

Idea:        The same small model takes the same steps under plain data parallelism and under each stage. What a rank
             holds is counted from the memory behind its tensors when the backward pass has ended, what it sends in the
             one place where all messages pass. The weights after some steps in float64 tell whether the maths changed.
Cost:        Seconds: most of it for starting the processes. The model is tiny, the ratios are those of a large one.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, sections 5 and 7.
Production:  torch.nn.parallel.DistributedDataParallel, torch.distributed.optim.ZeroRedundancyOptimizer and
             torch.distributed.fsdp.fully_shard (FSDP2), which are run here, too.
Leaves out:  activations, temporary buffers, time.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from minillm.architecture.transformer import Config, Transformer
from minillm.distributed.collectives import Traffic, ring_all_reduce
from minillm.distributed.launch import own_device
from minillm.distributed.zero import Stage1, Stage2, cut, own_rows, storage_bytes
from minillm.distributed.zero3 import Stage3, units
from minillm.training.objective import next_token_loss
from minillm.training.optimizers import adamw_step

ROWS, TOKENS = 12, 16  # of the whole batch
ADAMW: dict[str, Any] = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
CLIP = 0.5
Weights = dict[str, Tensor]


class Run(NamedTuple):
    """What one rank found."""

    size: int  # parameters of the whole model
    held: dict[str, int]  # bytes of parameters, gradients and optimizer states after a backward pass, in bfloat16
    peak: int  # the most bytes of these three, looked at there and at every message
    sent: int  # bytes in a step
    weights: Weights  # after five steps in float64


class Torch(NamedTuple):
    """What one rank found with PyTorch's own."""

    parameters: int  # numbers that the rank holds
    states: int  # numbers of Adam's two moments that it holds
    weights: Weights


class Stage0:
    """Plain data parallelism: weights, gradients and AdamW's states whole on every rank, gradients all-reduced."""

    def __init__(
        self, model: nn.Module, traffic: Traffic, *, dtype: torch.dtype | None = None, clip: float, **adamw: Any
    ) -> None:
        self.parameters, self.traffic, self.clip, self.adamw = list(model.parameters()), traffic, clip, adamw
        self.masters, self.done = [], 0
        for p in self.parameters:
            dist.broadcast(p.data, 0)
            same = dtype in (None, p.dtype)
            self.masters.append(p.data if same else p.detach().clone())
            p.data = p.data.to(dtype or p.dtype)
        self.means, self.squares = ([torch.zeros_like(m) for m in self.masters] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        """One all-reduce of all gradients, then the same AdamW on every rank."""
        whole = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
        flat = ring_all_reduce(whole, self.traffic).to(self.masters[0].dtype) / self.traffic.world
        flat *= (self.clip / (flat.norm() + 1e-6)).clamp(max=1)
        self.done += 1
        grads = flat.split([p.numel() for p in self.parameters])
        for p, master, mean, square, g in zip(
            self.parameters, self.masters, self.means, self.squares, grads, strict=True
        ):
            adamw_step(master, g.view_as(p), mean, square, self.done, **self.adamw)
            p.copy_(master)
            p.grad = None

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds now, by kind."""
        seen: set[int] = set()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return {
            "parameters": storage_bytes(self.parameters, seen),
            "gradients": storage_bytes(gradients, seen),
            "optimizer": storage_bytes([*self.masters, *self.means, *self.squares], seen),
        }


class Watched(Traffic):
    """Looks at the bytes held before every message."""

    def __init__(self) -> None:
        super().__init__()
        self.zero: Stage0 | Stage1 | None = None
        self.peak = 0

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> None:
        if self.zero is not None:
            self.peak = max(self.peak, sum(self.zero.held().values()))
        super().exchange(outgoing, incoming)


def small_model(dtype: torch.dtype) -> Transformer:
    """Four blocks of 48 channels: the same weights at each call."""
    torch.manual_seed(0)
    config = Config(vocabulary=48, width=48, layers=4, heads=3, kv_heads=3, head_size=16, hidden=96, context=TOKENS)
    return Transformer(config).to(own_device() if dist.is_initialized() else "cpu", dtype)


def batch(step: int) -> Int[Tensor, "b t"]:
    """The ids of a step, the same everywhere."""
    ids = torch.randint(0, 48, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    return ids.to(own_device()) if dist.is_initialized() else ids


def loss_of(model: nn.Module, ids: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean nats of the next token."""
    return next_token_loss(model(ids), ids)


def alone(steps: int = 5) -> Weights:
    """The weights after so many steps of torch.optim.AdamW on one process with the whole batch, in float64."""
    model = small_model(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(steps):
        loss_of(model, batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return copied(model)


def copied(model: nn.Module) -> Weights:
    """The whole weights by name, on the CPU."""
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: p.detach().cpu().clone() for name, p in whole.items()}


def largest_difference(found: Weights, expected: Weights) -> float:
    """Over all weights of two models. KeyError: one lacks a name."""
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


def stage(number: int, model: Transformer, traffic: Traffic, *, dtype: torch.dtype | None = None) -> Stage0 | Stage1:
    """The model under stage 0 (plain data parallelism), 1, 2 or 3; a bucket is about a block."""
    options: dict[str, Any] = ADAMW | {"clip": CLIP}
    if number == 0:
        return Stage0(model, traffic, dtype=dtype, **options)
    if number == 3:
        return Stage3(units(model, model.blocks, traffic, dtype=dtype), **options)
    return (Stage1, Stage2)[number - 1](cut(model, traffic, limit=2**15, dtype=dtype), **options)


def by_stage(number: int, steps: int = 5) -> Run:
    """Bytes of a step in bfloat16 with float32 masters, and the weights after so many in float64."""
    traffic, model = Watched(), small_model(torch.float32)
    zero = traffic.zero = stage(number, model, traffic, dtype=torch.bfloat16)
    loss_of(model, own_rows(batch(0), traffic)).backward()
    held = zero.held()
    zero.step()
    counts = held, max(traffic.peak, sum(held.values())), traffic.sent

    exact, plain = small_model(torch.float64), Traffic()
    zero = stage(number, exact, plain)
    for step in range(steps):
        loss_of(exact, own_rows(batch(step), plain)).backward()
        zero.step()
    size = sum(p.numel() for p in small_model(torch.float32).parameters())
    if isinstance(zero, Stage3):
        with zero.whole():
            return Run(size, *counts, copied(exact))
    return Run(size, *counts, copied(exact))


def by_torch(name: str, steps: int = 5) -> Torch:
    """The same with PyTorch's "DDP", "ZeroRedundancyOptimizer" (under DDP) or "FSDP2"."""
    model, traffic = small_model(torch.float64), Traffic()
    trained: nn.Module = model
    if name == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # slow to import

        mesh = init_device_mesh(own_device().type, (traffic.world,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    else:
        trained = DistributedDataParallel(model)
    optimizer: Any = torch.optim.AdamW(trained.parameters(), **ADAMW)
    if name == "ZeroRedundancyOptimizer":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(trained.parameters(), torch.optim.AdamW, **ADAMW)
    for step in range(steps):
        loss_of(trained, own_rows(batch(step), traffic)).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    own = optimizer.optim if name == "ZeroRedundancyOptimizer" else optimizer
    moments = [state[key] for state in own.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return Torch(numbers(trained.parameters()), numbers(moments), copied(model))


def numbers(tensors: Any) -> int:
    """Numbers that this rank has of them; of a sharded tensor, its own shard."""
    return sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)


def compare() -> dict[int | str, Any]:
    """All of it on this rank: a `Run` for stages 0 to 3, a `Torch` for PyTorch's own. For `launch`."""
    found: dict[int | str, Any] = {number: by_stage(number) for number in range(4)}
    return found | {name: by_torch(name) for name in ("DDP", "ZeroRedundancyOptimizer", "FSDP2")}
