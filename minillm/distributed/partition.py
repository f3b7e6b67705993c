"""One step of ZeRO on one process: stacked tensors stand for the ranks, so that every shard can be looked at.

Idea:        AdamW works on each number alone. So N ranks can share a step: the mean of their gradients is cut in N
             shards (reduce-scatter), rank r steps shard r of the float32 masters with its own shard of the moments, and
             the new weights are put together again (all-gather). Only one thing looks across shards: the norm that
             clips, whose squares are added over the ranks. Zeros make the last shard as long as the rest.
Cost:        A rank holds 12 n/N bytes of masters and moments for n weights instead of 12 n. Counted by the rank, the
             reduce-scatter and the all-gather send n (N - 1)/N numbers each. Here nothing is sent.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, sections 5.1 and 7.
Production:  torch.optim.AdamW on the mean gradient: the same weights. On real processes: `distributed/zero`.
Leaves out:  buckets, when gradients travel, parameters of several shapes.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from minillm.training.optimizers import adamw_step

# A ring, all ranks at once: row r of `buffers` is what rank r holds


def ring_pass(buffers: Shaped[Tensor, "w n"], step: int) -> Shaped[Tensor, "w n"]:
    """What every rank holds after message `step`: 0 ... N - 2 reduce-scatter, N - 1 ... 2 N - 3 all-gather.

    In the first half a rank adds the chunk that arrives to its own, in the second it overwrites its own.

    >>> buffers = torch.tensor([[1, 1], [10, 10]])
    >>> ring_pass(buffers, 0), ring_pass(ring_pass(buffers, 0), 1)
    (tensor([[11,  1],
            [10, 11]]), tensor([[11, 11],
            [11, 11]]))
    """
    world, n = buffers.shape
    if n % world:
        raise ValueError(f"the buffer must divide into {world} chunks, got {n} numbers: fill it up with zeros")
    before = buffers.unflatten(1, (world, n // world))
    after = before.clone()
    for rank in range(world):
        left = (rank - 1) % world
        if step < world - 1:
            chunk = (left - 1 - step) % world
            after[rank, chunk] += before[left, chunk]
        else:
            chunk = (left - (step - (world - 1))) % world
            after[rank, chunk] = before[left, chunk]
    return after.flatten(1)


# A step of AdamW that the ranks share


def cut(flat: Float[Tensor, " n"], world: int) -> Float[Tensor, "w m"]:
    """The numbers as one row a rank, in order; zeros fill up the last rows.

    >>> cut(torch.tensor([1.0, 2.0, 3.0]), 2)
    tensor([[1., 2.],
            [3., 0.]])
    """
    m = -(-len(flat) // world)
    rows = flat.new_zeros(world * m)
    rows[: len(flat)] = flat
    return rows.view(world, m)


def reduce_scatter(gradients: Float[Tensor, "w n"]) -> Float[Tensor, "w m"]:
    """Row r is rank r's shard of the mean over ranks, in float32 or better: 16 bits would round at each addition."""
    wide = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    return cut(wide.mean(dim=0), len(gradients))


def all_gather(shards: Float[Tensor, "w m"], n: int) -> Float[Tensor, " n"]:
    """The shards one after the other, without the zeros at the end: what every rank has then."""
    return shards.flatten()[:n]


def zero_step(
    gradients: Float[Tensor, "w n"],
    masters: Float[Tensor, "w m"],
    mean: Float[Tensor, "w m"],
    square: Float[Tensor, "w m"],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = math.inf,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "w m"], Float[Tensor, "w m"], Float[Tensor, "w m"]]:
    """New weights, in the gradients' type, and each rank's new masters and moments; nothing is changed in place.

    Row r of `gradients` is the mean over rank r's rows of the batch. `step` counts from 1. Gradients are clipped to the
    norm `clip` of the whole, as torch does. ValueError: the shards do not fit.

    >>> shards = cut(torch.ones(3), 2)
    >>> gradients = torch.tensor([[1.0, 2.0, -1.0], [3.0, -2.0, -1.0]])           # mean 2, 0, -1
    >>> weights, *_ = zero_step(gradients, shards, 0 * shards, 0 * shards, 1, lr=0.1)
    >>> weights
    tensor([0.9000, 1.0000, 1.1000])
    """
    world, n = gradients.shape
    if masters.shape != (world, -(-n // world)):
        said = f"{n} weights on {world} ranks need shards of shape {(world, -(-n // world))}"
        raise ValueError(f"{said}, got {tuple(masters.shape)}: cut them with cut()")
    own = reduce_scatter(gradients)  # w m
    squares = own.square().sum(dim=1)  # w: each rank's own
    norm = squares.sum().sqrt()  # an all-reduce of one number
    own = own * (clip / (norm + 1e-6)).clamp(max=1)
    masters, mean, square = masters.clone(), mean.clone(), square.clone()
    for rank in range(world):
        states = masters[rank], own[rank], mean[rank], square[rank]
        adamw_step(*states, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return all_gather(masters.to(gradients.dtype), n), masters, mean, square
