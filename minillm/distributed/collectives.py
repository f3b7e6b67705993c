"""Ring reduce-scatter, all-gather and all-reduce, written on messages between neighbours, every byte counted.

Idea:        N ranks stand in a ring, and the buffer is cut in N chunks. In a reduce-scatter each chunk travels once
             around the ring and every rank adds its own part, so that after N - 1 messages each rank holds one finished
             chunk. In an all-gather the finished chunks travel around once more. Both together are an all-reduce. All
             links are busy all the time, and nobody sends more than anybody else.
Cost:        Each rank sends (N - 1)/N of the buffer for reduce-scatter and for all-gather, 2 (N - 1)/N for all-reduce:
             nearly independent of N. Time: bytes sent / bandwidth + 2 (N - 1) latencies, which is why trees win for
             small buffers.
Paper:       Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"
             (doi.org/10.1016/j.jpdc.2008.09.002).
Production:  torch.distributed.reduce_scatter_single, all_gather_single, all_reduce; NCCL's ring algorithm.
Leaves out:  trees, several rings at once, pipelining within a chunk, reductions other than the sum.
"""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


class Traffic:
    """This rank's place in the ring, and a count of what it sends: all messages of an algorithm pass through here."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sent = 0  # bytes
        self.messages = 0

    def exchange(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send one tensor to the right neighbour while the left neighbour's arrives; both are done on return."""
        right, left = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        messages = [dist.P2POp(dist.isend, outgoing, right), dist.P2POp(dist.irecv, incoming, left)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        self.sent += outgoing.numel() * outgoing.element_size()
        self.messages += 1


def padded(x: Shaped[Tensor, "*shape"], world: int) -> Shaped[Tensor, " n"]:
    """A flat copy with zeros at the end, so that it can be cut in `world` equal chunks.

    >>> padded(torch.tensor([[1, 2], [3, 4]]), 3)
    tensor([1, 2, 3, 4, 0, 0])
    """
    flat = x.new_zeros(-(-x.numel() // world) * world)
    flat[: x.numel()] = x.detach().flatten()
    return flat


def chunks(buffer: Shaped[Tensor, " n"], traffic: Traffic) -> Shaped[Tensor, "w m"]:
    """Views of the buffer, one for each rank. ValueError: it cannot be cut evenly."""
    if buffer.ndim != 1 or len(buffer) % traffic.world or not buffer.is_contiguous():
        given = f"shape {tuple(buffer.shape)}"
        raise ValueError(f"the buffer must be flat and divide into {traffic.world} chunks, got {given}: use padded()")
    return buffer.view(traffic.world, len(buffer) // traffic.world)


@torch.no_grad()
def ring_reduce_scatter(buffer: Shaped[Tensor, " n"], traffic: Traffic) -> Shaped[Tensor, " m"]:
    """This rank's chunk of the sum over all ranks: a view. The rest of the buffer holds sums that are not finished.

    Chunk c starts at rank c + 1 and ends at rank c. So in step s, rank r passes on chunk r - 1 - s.
    """
    parts, rank, world = chunks(buffer, traffic), traffic.rank, traffic.world
    arriving = torch.empty_like(parts[0])
    for step in range(world - 1):
        traffic.exchange(parts[(rank - 1 - step) % world], arriving)
        parts[(rank - 2 - step) % world] += arriving
    return parts[rank]


@torch.no_grad()
def ring_all_gather(buffer: Shaped[Tensor, " n"], traffic: Traffic) -> None:
    """Fill the buffer, of which each rank has its own chunk, with those of all ranks, in place.

    In step s, rank r passes on chunk r - s, which it got in the step before.
    """
    parts, rank, world = chunks(buffer, traffic), traffic.rank, traffic.world
    for step in range(world - 1):
        traffic.exchange(parts[(rank - step) % world], parts[(rank - step - 1) % world])


@torch.no_grad()
def ring_all_reduce(x: Shaped[Tensor, "*shape"], traffic: Traffic) -> Shaped[Tensor, "*shape"]:
    """The sum over all ranks, the same bits on each: reduce-scatter, then all-gather. Any shape, size and number type.

    Of a size that does not divide, zeros fill up the last chunk and travel along.
    """
    buffer = padded(x, traffic.world)
    ring_reduce_scatter(buffer, traffic)
    ring_all_gather(buffer, traffic)
    return buffer[: x.numel()].view(x.shape)
