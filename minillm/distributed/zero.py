"""ZeRO stages 1 and 2: data parallelism in which every rank keeps optimizer states for its own share only.

Idea:        In data parallelism all ranks hold the same weights, gradients and optimizer states: N copies. AdamW works
             on each number alone, so a rank can update one N-th of the weights and needs states for no more. Stage 1:
             gradients are reduce-scattered, each rank steps its shard, the new weights are all-gathered. Stage 2 does
             the first during the backward pass, bucket by bucket, so that the whole gradient never exists. The maths
             does not change: a step is that of one process with the whole batch.
Cost:        Bytes a rank for p parameters in bfloat16 with masters and moments in float32 (2 + 2 + 12 bytes a parameter
             without ZeRO): stage 1 holds 4 p + 12 p/N, stage 2 2 p + 14 p/N and the largest bucket. Each sends
             2 p (N - 1)/N numbers a step, as the all-reduce of plain data parallelism does.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, sections 5.1, 5.2 and 7.
Production:  torch.distributed.optim.ZeroRedundancyOptimizer (stage 1), Megatron's distributed optimizer, DeepSpeed's
             zero_optimization.stage 1 and 2, whose buckets travel while the backward pass goes on.
Leaves out:  overlap, summing bfloat16 gradients in float32, groups with options of their own, frozen parameters,
             offload. In stage 2 a parameter must be used by all ranks or by none, else they wait for different buckets.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minillm.distributed.collectives import (
    Traffic,
    chunks,
    padded,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from minillm.training.optimizers import adamw_step


class Bucket:
    """Some parameters as views of one flat buffer, cut in equal shards, and this rank's share of their AdamW states.

    The masters are float32 or better. Where the weights are that already, the rank's shard of them is the master.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], traffic: Traffic, dtype: torch.dtype | None = None) -> None:
        if not all(p.requires_grad for p in parameters):
            raise ValueError("every parameter must require a gradient, got a frozen one: leave it out of the model")
        self.parameters, self.traffic = list(parameters), traffic
        self.shapes = [p.shape for p in parameters]
        given = padded(torch.cat([p.detach().flatten() for p in parameters]), traffic.world)
        dist.broadcast(given, 0)  # rank 0's weights are everyone's
        self.whole = given.to(dtype or given.dtype)
        self.shard = chunks(self.whole, traffic)[traffic.rank]
        wide = torch.promote_types(self.whole.dtype, torch.float32)
        self.master = self.shard
        if self.shard.dtype != wide:
            self.master = chunks(given, traffic)[traffic.rank].to(wide, copy=True)  # not rounded
        self.mean, self.square = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.gradient: Tensor | None = None  # this rank's shard of the sum over ranks
        self.attach()

    def pieces(self, flat: Shaped[Tensor, " n"]) -> Iterator[Tensor]:
        """The parameters' parts of a buffer, in their shapes; what is left at the end is padding."""
        sizes = [shape.numel() for shape in self.shapes]
        for part, shape in zip(flat[: sum(sizes)].split(sizes), self.shapes, strict=True):
            yield part.view(shape)

    def attach(self) -> None:
        """Let the parameters be views of the buffer."""
        for parameter, piece in zip(self.parameters, self.pieces(self.whole), strict=True):
            parameter.data = piece

    @torch.no_grad()
    def reduce(self) -> None:
        """Add this rank's shard of the gradients' sum over ranks to `gradient`; the parameters' own are freed."""
        flat = torch.zeros(self.whole.shape, dtype=self.whole.dtype, device=self.whole.device)
        for parameter, piece in zip(self.parameters, self.pieces(flat), strict=True):
            if parameter.grad is not None:
                piece.copy_(parameter.grad)
                parameter.grad = None
        own = ring_reduce_scatter(flat, self.traffic)
        self.gradient = own.clone() if self.gradient is None else self.gradient + own

    @torch.no_grad()
    def update(self, step: int, scale: Float[Tensor, ""], **adamw: Any) -> None:
        """AdamW on this rank's shard, with its gradient times `scale`, which is freed."""
        assert self.gradient is not None
        grad = self.gradient.to(self.master.dtype) * scale
        adamw_step(self.master, grad, self.mean, self.square, step, **adamw)
        self.shard.copy_(self.master)
        self.gradient = None


def cut(
    model: nn.Module, traffic: Traffic, *, limit: int = 25 * 2**20, dtype: torch.dtype | None = None
) -> list[Bucket]:
    """The model's parameters in buckets of at least `limit` bytes, the last one first, as gradients come in backward.

    From here on the parameters are views of the buckets, in `dtype` if one is given, with the values of rank 0.
    """
    groups: list[list[nn.Parameter]] = [[]]
    for parameter in reversed(list(model.parameters())):
        if sum(p.numel() * p.element_size() for p in groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(parameter)
    return [Bucket(group, traffic, dtype) for group in groups]


def own_rows(batch: Shaped[Tensor, "b ..."], traffic: Traffic) -> Shaped[Tensor, "m ..."]:
    """This rank's rows of a batch. ValueError: it does not divide, and the mean of means would not be the mean."""
    if len(batch) % traffic.world:
        raise ValueError(f"the batch must divide by the {traffic.world} ranks, got {len(batch)} rows: add or drop some")
    return batch.view(traffic.world, -1, *batch.shape[1:])[traffic.rank]


def global_norm(shards: Iterable[Float[Tensor, "..."]], traffic: Traffic) -> Float[Tensor, ""]:
    """The norm of a vector whose shards lie on all ranks: squares add up, norms do not."""
    squares = torch.stack(
        [shard.to(torch.promote_types(shard.dtype, torch.float32)).square().sum() for shard in shards]
    )
    return ring_all_reduce(squares.sum(), traffic).sqrt()


def storage_bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Bytes of the memory behind the tensors that is not `seen` yet; views of the same memory count once."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


class Stage1:
    """AdamW with its states sharded. After `backward` of the mean loss over the rank's own rows, call `step`."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip: float = math.inf,
    ) -> None:
        self.buckets, self.traffic = list(buckets), buckets[0].traffic
        self.lr, self.clip, self.done = lr, clip, 0  # lr may be changed between steps
        self.options: dict[str, Any] = dict(betas=betas, eps=eps, weight_decay=weight_decay)

    def collect(self) -> None:
        """See to it that each bucket holds this rank's shard of the gradient: all of it happens now."""
        for bucket in self.buckets:
            bucket.reduce()

    def publish(self) -> None:
        """Let all ranks have all new weights."""
        for bucket in self.buckets:
            ring_all_gather(bucket.whole, self.traffic)

    def step(self) -> Float[Tensor, ""]:
        """Update the weights; the norm of the gradient before clipping, that of the mean loss over the whole batch."""
        self.collect()
        world = self.traffic.world
        norm = global_norm([b.gradient for b in self.buckets if b.gradient is not None], self.traffic) / world
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) / world  # the mean over ranks, clipped as torch does
        self.done += 1
        for bucket in self.buckets:
            bucket.update(self.done, scale, lr=self.lr, **self.options)
        self.publish()
        return norm

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds now, by kind, counted from the memory behind the tensors."""
        seen: set[int] = set()
        whole = [p.grad for b in self.buckets for p in b.parameters if p.grad is not None]
        reduced = [b.gradient for b in self.buckets if b.gradient is not None]
        return {
            "parameters": storage_bytes([t for b in self.buckets for t in (b.whole, b.shard)], seen),
            "gradients": storage_bytes([*whole, *reduced], seen),
            "optimizer": storage_bytes([t for b in self.buckets for t in (b.master, b.mean, b.square)], seen),
        }


class Stage2(Stage1):
    """Stage 1, with gradients sharded as well: a bucket is reduce-scattered as soon as all its gradients are there.

    Every backward pass sends its gradients, so that accumulating over k micro-batches sends them k times.
    """

    def __init__(self, buckets: Sequence[Bucket], **options: Any) -> None:
        super().__init__(buckets, **options)
        self.arrived: Counter[Bucket] = Counter()  # gradients since the bucket was last sent
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, bucket))

    def _arrive(self, bucket: Bucket, parameter: Tensor) -> None:
        self.arrived[bucket] += 1
        if self.arrived[bucket] == len(bucket.parameters):
            self.finish(bucket)

    def finish(self, bucket: Bucket) -> None:
        """Send what the bucket has."""
        self.arrived[bucket] = 0
        bucket.reduce()

    def collect(self) -> None:
        """Only buckets with parameters that no rank used are left to send; their gradient counts as zero."""
        for bucket in self.buckets:
            if self.arrived[bucket] or bucket.gradient is None:
                self.finish(bucket)
