"""Tensor parallelism: every matrix cut over the ranks, so that a layer needs one sum over them each way.

Idea:        Cut the first matrix of a layer by columns (of x W): each rank has its own hidden channels, and what works
             on channels one by one, the activation, or on heads one by one, attention, needs no other rank. Cut the
             second by rows: each rank's product is one part of the output, and the sum of the parts, an all-reduce, is
             the output. Two conjugate functions hold all the communication: f, the identity whose backward pass sums
             gradients, before the first matrix, and g, the sum whose backward pass is the identity, after the second.
             The embedding and the head are cut by the vocabulary. The loss then needs of each rank its maximum, its
             sum of exponentials and the target's logit, a few numbers a token, never the logits.
Cost:        1/N of the weights, gradients and hidden activations a rank; the residual stream is whole on each. A layer
             sends 2 (N - 1)/N of the stream (b t c numbers) forward and as much backward, two layers a block, and
             nothing hides it: the next product needs the sum. So N is kept within a node.
Paper:       Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, section 3.
Production:  torch.distributed.tensor.parallel: ColwiseParallel, RowwiseParallel, loss_parallel; Megatron-LM's
             ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy.
Leaves out:  sequence parallelism (norms cut by tokens), key/value heads copied where N is larger, experts, building a
             part without the whole.
"""

from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from minillm.architecture.feedforward import swiglu_fused
from minillm.architecture.norm import rms_norm
from minillm.architecture.transformer import Block, Config, Transformer
from minillm.distributed.collectives import Traffic, chunks, ring_all_gather, ring_all_reduce
from minillm.distributed.launch import own_device
from minillm.training.objective import IGNORE

# f and g


class Copied(torch.autograd.Function):
    """f: every rank reads the same x; backward, x's gradient is the sum of what the ranks found."""

    @staticmethod
    def forward(ctx, x, traffic):  # type: ignore[no-untyped-def]
        ctx.traffic = traffic
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ring_all_reduce(grad, ctx.traffic), None


class Summed(torch.autograd.Function):
    """g: the sum of the ranks' parts; backward, the gradient of a sum is that of each part."""

    @staticmethod
    def forward(ctx, part, traffic):  # type: ignore[no-untyped-def]
        return ring_all_reduce(part, traffic)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def copied(x: Float[Tensor, "*b"], traffic: Traffic) -> Float[Tensor, "*b"]:
    """x, the same on all ranks, at the entrance of what is cut."""
    return Copied.apply(x, traffic)


def summed(part: Float[Tensor, "*b"], traffic: Traffic) -> Float[Tensor, "*b"]:
    """The sum over ranks, at the exit of what is cut: the same on all."""
    return Summed.apply(part, traffic)


# Cutting


def share(size: int, world: int, what: str) -> int:
    """Each rank's number of something. ValueError: it does not divide."""
    if size % world:
        raise ValueError(f"{what} must divide by the number of ranks, got {size} for {world}: choose another number")
    return size // world


def own_part(weight: Shaped[Tensor, "*s"], dim: int, traffic: Traffic, *, stacked: int = 1) -> Shaped[Tensor, "*p"]:
    """This rank's part of a weight along a dimension, a copy; of each of the `stacked` matrices in it, if several.

    Gate and up in one matrix are two: a plain cut in halves would give one rank all gates and the other none.
    """
    each = share(weight.shape[dim], stacked, f"dimension {dim} of a weight")
    size = share(each, traffic.world, f"the width of dimension {dim}")
    pieces = [piece.narrow(dim, traffic.rank * size, size) for piece in weight.detach().split(each, dim)]
    return torch.cat(pieces, dim)


# Layers: `weight` is this rank's part


def column_linear(
    x: Float[Tensor, "*b c"],
    weight: Float[Tensor, "part c"],
    traffic: Traffic,
    bias: Float[Tensor, " part"] | None = None,
) -> Float[Tensor, "*b part"]:
    """This rank's output channels of a linear layer whose output is cut (columns of x W; rows of PyTorch's weight)."""
    return F.linear(copied(x, traffic), weight, bias)


def row_linear(
    part: Float[Tensor, "*b part"],
    weight: Float[Tensor, "c part"],
    traffic: Traffic,
    bias: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, "*b c"]:
    """The whole output of a linear layer whose input is cut. The bias is whole, too, and added once, after the sum."""
    out = summed(F.linear(part, weight), traffic)
    return out if bias is None else out + bias


def split_swiglu(
    x: Float[Tensor, "*b c"], gate_up: Float[Tensor, "two_f c"], down: Float[Tensor, "c f"], traffic: Traffic
) -> Float[Tensor, "*b c"]:
    """The feed-forward layer with this rank's hidden channels: f, two products, g."""
    return summed(swiglu_fused(copied(x, traffic), gate_up, down), traffic)


class SplitBlock(nn.Module):
    """A block of which this rank has some heads and hidden channels: a smaller `Block` between f and g, twice.

    The norms are outside of f: whole on each rank, and so is their gradient.
    """

    def __init__(self, block: Block, traffic: Traffic) -> None:
        super().__init__()
        config, world = block.config, traffic.world
        for name in ("experts", "qk_norm"):
            if given := getattr(config, name):
                raise ValueError(f"a split block must have no {name}, got {given}: choose {name}={type(given)()}")
        h, g = share(config.heads, world, "heads"), share(config.kv_heads, world, "kv_heads")
        small = replace(config, heads=h, kv_heads=g, hidden=share(config.hidden, world, "hidden"))
        self.part, self.traffic = Block(small, block.layer), traffic
        rows = [config.heads * config.head_size, *[config.kv_heads * config.head_size] * 2]
        qkv = torch.cat([own_part(matrix, 0, traffic) for matrix in block.qkv.detach().split(rows)])
        own = {"qkv": qkv, "out": own_part(block.out, 1, traffic), "down": own_part(block.down, 1, traffic)}
        own["gate_up"] = own_part(block.gate_up, 0, traffic, stacked=2)
        for name in ("attention_norm", "feedforward_norm"):
            own[name] = getattr(block, name).detach()
        self.part.to(block.qkv).load_state_dict(own)

    def attention(
        self, x: Float[Tensor, "b t c"], cos: Float[Tensor, "*p half"], sin: Float[Tensor, "*p half"]
    ) -> Float[Tensor, "b t c"]:
        """The attention layer with this rank's heads: f, projections, attention and output product, g."""
        return summed(self.part.attention(copied(x, self.traffic), cos, sin, None, None), self.traffic)

    def forward(
        self, x: Float[Tensor, "b t c"], cos: Float[Tensor, "*p half"], sin: Float[Tensor, "*p half"]
    ) -> Float[Tensor, "b t c"]:
        """The stream after the block: two all-reduces, and two more backward."""
        part, eps = self.part, self.part.config.eps
        x = x + self.attention(rms_norm(x, part.attention_norm, eps=eps), cos, sin)
        normed = rms_norm(x, part.feedforward_norm, eps=eps)
        return x + split_swiglu(normed, part.gate_up, part.down, self.traffic)


# The vocabulary


def own_ids(ids: Int[Tensor, "*b"], rows: int, traffic: Traffic) -> tuple[Int[Tensor, "*b"], Shaped[Tensor, "*b"]]:
    """Ids as rows of this rank's part of the vocabulary, 0 where they are another's, and where they are its own."""
    local = ids - traffic.rank * rows
    own = (local >= 0) & (local < rows)
    return local.where(own, 0), own


def split_embedding(ids: Int[Tensor, "*b"], table: Float[Tensor, "part c"], traffic: Traffic) -> Float[Tensor, "*b c"]:
    """Rows of a table cut by the vocabulary: each rank looks up its own, the others' are zeros, and g adds."""
    local, own = own_ids(ids, len(table), traffic)
    return summed(F.embedding(local, table) * own.unsqueeze(-1), traffic)


def largest(x: Float[Tensor, " n"], traffic: Traffic) -> Float[Tensor, " n"]:
    """The largest of all ranks' numbers: all of them, gathered."""
    everyone = x.new_empty(traffic.world * len(x))
    chunks(everyone, traffic)[traffic.rank].copy_(x)
    ring_all_gather(everyone, traffic)
    return chunks(everyone, traffic).amax(dim=0)


class SplitCrossEntropy(torch.autograd.Function):
    """Nats of each target from this rank's logits; the gradient, softmax minus one-hot, needs nobody else."""

    @staticmethod
    def forward(ctx, logits, targets, traffic):  # type: ignore[no-untyped-def]
        local, own = own_ids(targets, logits.shape[1], traffic)
        shifted = logits - largest(logits.amax(dim=1), traffic)[:, None]
        exponentials = shifted.exp()  # n part
        at_target = shifted.gather(1, local[:, None])[:, 0] * own
        total, at_target = ring_all_reduce(torch.stack([exponentials.sum(dim=1), at_target]), traffic)
        ctx.save_for_backward(exponentials / total[:, None], local, own)
        return total.log() - at_target

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        softmax, local, own = ctx.saved_tensors
        error = softmax.scatter_add(1, local[:, None], -own[:, None].to(softmax.dtype))
        return error * grad[:, None], None, None


def split_cross_entropy(
    logits: Float[Tensor, "n part"], targets: Int[Tensor, " n"], traffic: Traffic
) -> Float[Tensor, ""]:
    """Mean nats of the targets that are not IGNORE, 0 if there is none, from logits cut by the vocabulary.

    In float32 or better. Each rank sends (N - 1) numbers a token for the maximum and 4 (N - 1)/N for the two sums.
    """
    kept = targets != IGNORE
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = SplitCrossEntropy.apply(wide, targets.where(kept, 0), traffic)
    return (nats * kept).sum() / kept.sum().clamp(min=1)


class SplitTransformer(nn.Module):
    """This rank's part of a model, cut from the whole: its forward pass gives its own columns of the logits."""

    def __init__(self, model: Transformer, traffic: Traffic) -> None:
        super().__init__()
        share(model.config.vocabulary, traffic.world, "vocabulary")
        self.config, self.traffic = model.config, traffic
        self.embedding = nn.Parameter(own_part(model.embedding, 0, traffic))
        self.blocks = nn.ModuleList(SplitBlock(cast(Block, block), traffic) for block in model.blocks)
        self.norm = nn.Parameter(model.norm.detach().clone())
        self.head = None if model.head is None else nn.Parameter(own_part(model.head, 0, traffic))
        self.cos: Tensor
        self.sin: Tensor
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(model, name), persistent=False)

    def forward(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t part"]:
        """This rank's logits."""
        x = split_embedding(ids, self.embedding, self.traffic)
        cos, sin = (table[: ids.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        normed = rms_norm(x, self.norm, eps=self.config.eps)
        return column_linear(normed, self.embedding if self.head is None else self.head, self.traffic)


class Counts(NamedTuple):
    """What a rank holds, in numbers, and sends, in bytes."""

    parameters: int
    forward: int  # with the loss
    backward: int


def count(config: Config, b: int, t: int) -> Counts:
    """This rank's share of a step of a random model on b rows of t targets, in float32: for `launch`."""
    traffic = Traffic()
    torch.manual_seed(0)
    split, ids = SplitTransformer(Transformer(config), traffic).to(own_device()), torch.zeros(b, t, dtype=torch.int64)
    loss = split_cross_entropy(split(ids.to(own_device())).flatten(0, 1), ids.flatten().to(own_device()), traffic)
    forward = traffic.sent
    loss.backward()
    return Counts(sum(p.numel() for p in split.parameters()), forward, traffic.sent - forward)
