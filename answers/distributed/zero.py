"""The exercise of distributed/zero: one step of ZeRO on stacked tensors, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: distributed/zero
import math

import torch

from minillm.training.optimizers import adamw_step


def zero_step(gradients, masters, mean, square, step, *, lr, betas=(0.9, 0.999), eps=1e-8,
              weight_decay=0.0, clip=math.inf):
    """Share AdamW's step number `step` (from 1) among N ranks; row r of a tensor is rank r's.

    gradients [N, n]: of its own rows of the batch, a mean, maybe in bfloat16. The others [N, m]: its
    shard of the float32 weights and moments, in order; m = n / N rounded up, zeros fill up the end.
    Reduce-scatter the mean, added in float32; clip it as a whole, by clip / (norm + 1e-6) if below 1;
    let each rank do adamw_step(weight, grad, mean, square, step, lr=..., ...), which works in place;
    all-gather. Return weights [n] in the gradients' type, masters, mean, square; change no argument.
    """
    raise NotImplementedError
'''


def oracle(  # type: ignore[no-untyped-def]
    gradients, masters, mean, square, step, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=float("inf")
):
    """torch.optim.AdamW on one process that has all shards in one piece, and the mean gradient."""
    n = gradients.shape[1]
    given = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    weight = torch.nn.Parameter(masters.flatten().clone())
    weight.grad = torch.cat([given.sum(dim=0) / len(given), given.new_zeros(weight.numel() - n)])
    torch.nn.utils.clip_grad_norm_([weight], clip)
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    states = {"exp_avg": mean.flatten().clone(), "exp_avg_sq": square.flatten().clone()}
    optimizer.state[weight] = {"step": torch.tensor(float(step - 1)), **states}
    optimizer.step()
    new = weight.detach()
    shards = [x.view(masters.shape) for x in (new, states["exp_avg"], states["exp_avg_sq"])]
    return (new[:n].to(gradients.dtype), *shards)


def drawn(ranks: int, n: int, step: int, *, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of a step: gradients, shards with zeros at the end, the step."""
    generator = torch.Generator().manual_seed(seed)
    m = -(-n // ranks)

    def shards(scale: float, sign: bool = True) -> Tensor:
        flat = torch.zeros(ranks * m)
        values = torch.randn(n, generator=generator) * scale
        flat[:n] = values if sign else values.abs()
        return flat.view(ranks, m)

    gradients = torch.randn(ranks, n, generator=generator).to(dtype)
    first = step == 1
    mean = torch.zeros(ranks, m) if first else shards(0.3)
    square = torch.zeros(ranks, m) if first else shards(0.3, sign=False)
    return gradients, shards(1.0), mean, square, step


ADAMW = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def make_cases() -> list[Case]:
    return [
        Case("two ranks", drawn(2, 6, 4, seed=0), ADAMW, "6 weights, 2 ranks"),
        Case("padding", drawn(3, 7, 4, seed=1), ADAMW, "7 weights on 3 ranks: shards of 3"),
        Case("clipped", drawn(3, 9, 5, seed=2), ADAMW | {"clip": 0.4}, "the gradient is longer than clip"),
        Case("not clipped", drawn(2, 4, 5, seed=3), ADAMW | {"clip": 100.0}, "the gradient is shorter than clip"),
        Case("clipped with padding", drawn(4, 10, 3, seed=4), ADAMW | {"clip": 0.2}, "10 weights on 4 ranks"),
        Case("first step", drawn(2, 5, 1, seed=5), ADAMW, "step=1, moments of 0"),
        Case("bfloat16", drawn(4, 32, 6, seed=6, dtype=torch.bfloat16), ADAMW, "16-bit gradients, 32-bit masters"),
        Case("more ranks than weights", drawn(5, 3, 2, seed=7), ADAMW | {"clip": 0.5}, "two ranks hold zeros only"),
        Case("one rank", drawn(1, 5, 2, seed=8), ADAMW | {"clip": 0.5}, "no other rank: plain AdamW"),
    ]


def keeps_its_arguments(function: Callable[..., Any]) -> str | None:
    """adamw_step works in place, and a row is a view."""
    given = drawn(2, 6, 4, seed=0)
    copies = [x.clone() for x in given[:4]]
    function(*given, **ADAMW)
    names = ("gradients", "masters", "mean", "square")
    changed = [name for name, x, y in zip(names, given, copies, strict=False) if not torch.equal(x, y)]
    if changed:
        return f"{', '.join(changed)} changed: adamw_step works in place, so give it copies."
    return None


def shards_are_apart(function: Callable[..., Any]) -> str | None:
    """What a rank's new shard may depend on: its own states, and everybody's gradients."""
    gradients, masters, mean, square, step = drawn(3, 9, 4, seed=2)
    before = function(gradients, masters, mean, square, step, clip=1.0, **ADAMW)
    masters = masters.clone()
    masters[1:] += 1
    after = function(gradients, masters, mean, square, step, clip=1.0, **ADAMW)
    if not torch.equal(before[1][0], after[1][0]):
        return "Rank 0's new shard depends on other ranks' masters: a rank may use its own states only."
    return None


MEAN = "return cut(wide.mean(dim=0), len(gradients))"
WIDE = "wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))"
ROWS = "    rows[: len(flat)] = flat\n"
NORM = "norm = squares.sum().sqrt()"
CLIP = "own = own * (clip / (norm + 1e-6)).clamp(max=1)"
STATES = "states = masters[rank], own[rank], mean[rank], square[rank]"
GATHER = "return shards.flatten()[:n]"
RETURN = "return all_gather(masters.to(gradients.dtype), n), masters, mean, square"
CALL = "adamw_step(*states, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)"
CLONES = "masters, mean, square = masters.clone(), mean.clone(), square.clone()"
BUDGET = "distributed/budget"
RING = "distributed/collectives"
ZERO = "distributed/zero"

EXERCISE = Exercise(
    question="distributed/zero",
    module="distributed/partition",
    function="zero_step",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("weights", "masters", "mean", "square"),
    rtol=1e-4,  # float32: a sum of up to 32 numbers, then a quotient of two small ones
    atol=1e-6,
    wrong=(
        Wrong(
            "sum instead of mean",
            MEAN,
            "return cut(wide.sum(dim=0), len(gradients))",
            "The gradients are added up but not divided by the number of ranks: each is a mean over its own rows "
            "already, so the whole batch's is the mean over ranks.",
        ),
        Wrong(
            "no reduction",
            MEAN,
            "return torch.stack([cut(g, len(gradients))[rank] for rank, g in enumerate(wide)])",
            "Each rank steps with its own gradient only: its shard must be reduced over all ranks first.",
        ),
        Wrong(
            "everybody rank 0's gradient",
            MEAN,
            "return cut(wide[0], len(gradients))",
            "All shards come from rank 0's gradient: the other ranks' rows of the batch are lost.",
        ),
        Wrong(
            "averaged in 16 bits",
            MEAN,
            "return cut(gradients.mean(dim=0), len(gradients)).to(wide.dtype)",
            "The mean is rounded to bfloat16 on the way: take it in float32 and leave it there.",
        ),
        Wrong(
            "added in 16 bits",
            MEAN,
            "return cut(sum(gradients) / len(gradients), len(gradients)).to(wide.dtype)",
            "Every partial sum is rounded to bfloat16: widen the gradients before adding them up.",
        ),
        Wrong(
            "every N-th number",
            MEAN,
            "return cut(wide.mean(dim=0), len(gradients)).flatten().view(-1, len(gradients)).T.contiguous()",
            "Rank r has numbers r, r + N, r + 2N ... of the gradient, but its master shard is in one piece: cut the "
            "gradient in the same order.",
        ),
        Wrong(
            "zeros in front",
            ROWS,
            "    rows[world * m - len(flat) :] = flat\n",
            "The zeros that fill up the shards are in front: they belong at the end, or every shard is moved.",
        ),
        Wrong(
            "each shard clipped by its own norm",
            NORM,
            "norm = squares.sqrt()[:, None]",
            "Every rank clips by its own shard's norm, so that shards shrink by different factors and the direction "
            "changes: add the squares over all ranks first.",
        ),
        Wrong(
            "norms added up",
            NORM,
            "norm = squares.sqrt().sum()",
            "Norms do not add up: add the shards' squares over ranks, then take the root.",
        ),
        Wrong(
            "mean of squares",
            NORM,
            "norm = squares.mean().sqrt()",
            "The squares are averaged over ranks, so the norm is too small by a factor of sqrt(N): add them.",
        ),
        Wrong(
            "root mean square",
            NORM,
            "norm = own.square().mean().sqrt()",
            "You took the root of the mean square: a norm is the root of the sum of all squares.",
        ),
        Wrong(
            "clipped up",
            CLIP,
            "own = own * (clip / (norm + 1e-6) if clip < math.inf else 1)",
            "A short gradient is made longer: clipping never scales up, the factor is at most 1.",
        ),
        Wrong(
            "not clipped",
            CLIP,
            "own = own * 1",
            "`clip` is not used: scale the whole gradient by clip / norm where it is longer.",
        ),
        Wrong(
            "clipped before the mean",
            "    own = reduce_scatter(gradients)  # w m\n",
            "    lengths = gradients.float().norm(dim=1, keepdim=True)\n"
            "    own = reduce_scatter(gradients.float() * (clip / (lengths + 1e-6)).clamp(max=1))  # w m\n",
            "Each rank's own gradient is clipped before the mean: the limit is for the norm of the mean gradient.",
        ),
        Wrong(
            "only rank 0 steps",
            "    for rank in range(world):\n        states",
            "    for rank in range(1):\n        states",
            "Only the first shard is updated: every rank steps its own.",
        ),
        Wrong(
            "same shard for all",
            STATES,
            "states = masters[rank], own[0], mean[rank], square[rank]",
            "Every rank steps with shard 0 of the gradient: rank r needs shard r.",
        ),
        Wrong(
            "masters rounded",
            RETURN,
            "weights = all_gather(masters.to(gradients.dtype), n)\n"
            "    return weights, masters.to(gradients.dtype).to(masters.dtype), mean, square",
            "The masters come back rounded to 16 bits: only the gathered weights are, or small steps are lost.",
        ),
        Wrong(
            "weights not rounded",
            RETURN,
            "return all_gather(masters, n), masters, mean, square",
            "The gathered weights are float32: they have the type of the gradients.",
        ),
        Wrong(
            "first shard everywhere",
            GATHER,
            "return shards[0].repeat(len(shards))[:n]",
            "The weights are shard 0 repeated: gather every rank's shard, in order.",
        ),
        Wrong(
            "step counts from 0",
            CALL,
            "adamw_step(*states, step + 1, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)",
            "AdamW's bias correction is one step off: `step` counts from 1 already.",
        ),
    ),
    also_wrong=(
        Wrong(
            "ring adds in the all-gather",
            "after[rank, chunk] = before[left, chunk]",
            "after[rank, chunk] += before[left, chunk]",
            "An all-gather overwrites; adding is the first half.",
        ),
        Wrong(
            "ring starts at the wrong chunk",
            "chunk = (left - 1 - step) % world",
            "chunk = (left - step) % world",
            "Chunk c must end at rank c.",
        ),
        Wrong(
            "stage 1 shards gradients",
            "for first in (1, 2, 3))",
            "for first in (1, 1, 3))",
            "Stage 1 shards the optimizer's states only; gradients follow in stage 2.",
            BUDGET,
        ),
        Wrong(
            "stage 3 gathers once",
            "gathers = 2 * micro_batches if stage == 3 else 1",
            "gathers = micro_batches if stage == 3 else 1",
            "Stage 3 frees the weights after the forward pass and gathers them again for the backward pass.",
            BUDGET,
        ),
        Wrong(
            "bubble over busy time",
            "return (stages - 1) / (interleaved * micro_batches + stages - 1)",
            "return (stages - 1) / (interleaved * micro_batches)",
            "The share is of all time: (p - 1)/(m + p - 1).",
            BUDGET,
        ),
        Wrong(
            "sum instead of mean on real processes",
            "scale = (self.clip / (norm + 1e-6)).clamp(max=1.0) / world",
            "scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)",
            "Each rank's loss is a mean over its rows: the sum over ranks is divided by their number.",
            ZERO,
        ),
        Wrong(
            "clips by the norm of its own shard on real processes",
            "return ring_all_reduce(squares.sum(), traffic).sqrt()",
            "return squares.sum().sqrt()",
            "All ranks scale by the same, global norm: the squares of the shards are added up over ranks.",
            ZERO,
        ),
        Wrong(
            "weights not gathered",
            "            ring_all_gather(bucket.whole, self.traffic)\n",
            "            pass\n",
            "After the step a rank has new weights for its shard only: all-gather them.",
            ZERO,
        ),
        Wrong(
            "all-reduce, then slice",
            "own = ring_reduce_scatter(flat, self.traffic)\n",
            "own = chunks(ring_all_reduce(flat, self.traffic), self.traffic)[self.traffic.rank]\n",
            "A reduce-scatter is enough: the all-reduce sends twice as much and holds a second copy.",
            ZERO,
        ),
        Wrong(
            "one message too few",
            "    for step in range(world - 1):\n        traffic.exchange(parts[(rank - 1 - step) % world], arriving)",
            "    for step in range(world - 2):\n        traffic.exchange(parts[(rank - 1 - step) % world], arriving)",
            "A chunk needs N - 1 messages to pass all ranks.",
            RING,
        ),
    ),
    probes=(Probe("arguments stay", keeps_its_arguments), Probe("own states only", shards_are_apart, wrong_too=True)),
    hints=(
        "m = -(-n // N). Put the mean gradient into zeros of N * m numbers and view them as [N, m]: row r is shard r.",
        "The norm of the whole gradient is the root of the sum of all shards' squares: a number that all ranks share.",
        "Copy masters, mean and square first. Then adamw_step(masters[r], shard[r], mean[r], square[r], step, lr=lr, "
        "betas=betas, eps=eps, weight_decay=weight_decay): rows are views, so the copies change.",
        "The weights are masters.flatten()[:n] in the gradients' dtype.",
    ),
)
