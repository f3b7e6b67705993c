"""What the tests of tensor parallelism look at, done by real processes, all in one launch for a world size."""

from functools import cache
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from minillm.architecture.transformer import Config, Transformer
from minillm.distributed.collectives import Traffic, padded, ring_all_gather, ring_all_reduce
from minillm.distributed.launch import launch, own_device
from minillm.distributed.tensor import (
    SplitBlock,
    SplitTransformer,
    column_linear,
    count,
    own_part,
    row_linear,
    split_cross_entropy,
    split_embedding,
    split_swiglu,
)
from minillm.training.objective import IGNORE

C, HIDDEN, V, B, T = 8, 12, 18, 2, 5  # divide by 2 and 3 where they must


def transformer(*, tied=True, seed=0, dtype=torch.float64, **more):
    torch.manual_seed(seed)
    shape = dict(vocabulary=V, width=C, layers=2, heads=12, kv_heads=6, head_size=4, hidden=HIDDEN, context=16)
    return Transformer(Config(**shape | {"tied": tied} | more)).to(dtype)


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_ids(seed=0):
    return torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(seed))


def some_targets():
    """Of the first rank, of the last, at the borders; and some that do not count."""
    return torch.tensor([0, V - 1, 8, 9, 5, 6, 11, 12, IGNORE, 3, IGNORE])


def logits(scale):
    return scale * drawn(len(some_targets()), V, seed=3)


def passes(function, inputs, traffic):
    """Output, gradients of the inputs under a fixed weighting, and bytes and messages sent forward and backward."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    counts = [(traffic.sent, traffic.messages)]
    out = function(*leaves)
    counts.append((traffic.sent, traffic.messages))
    (out * drawn(*out.shape, seed=99)).sum().backward()
    counts.append((traffic.sent, traffic.messages))
    sent = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(counts)]
    return out.detach(), [x.grad for x in leaves], sent


def linear_pair(traffic):
    """Two linear layers with biases and an activation between: one cut by columns, one by rows."""
    x, (up, up_bias, down, down_bias) = drawn(B, T, C), linear_weights()
    parts = [own_part(up, 0, traffic), own_part(up_bias, 0, traffic), own_part(down, 1, traffic), down_bias]

    def function(x, up, up_bias, down, down_bias):
        return row_linear(torch.tanh(column_linear(x, up, traffic, up_bias)), down, traffic, down_bias)

    return passes(function, [x, *parts], traffic)


def linear_weights():
    return drawn(HIDDEN, C, seed=1), drawn(HIDDEN, seed=2), drawn(C, HIDDEN, seed=3), drawn(C, seed=4)


def feedforward(traffic):
    block = transformer().blocks[0]
    parts = [own_part(block.gate_up, 0, traffic, stacked=2), own_part(block.down, 1, traffic)]
    return passes(lambda x, gate_up, down: split_swiglu(x, gate_up, down, traffic), [drawn(B, T, C), *parts], traffic)


def attention(traffic):
    model = transformer()
    block, x = SplitBlock(model.blocks[0], traffic), drawn(B, T, C)
    found = passes(lambda x: block.attention(x, model.cos[:T].double(), model.sin[:T].double()), [x], traffic)
    return *found, {"qkv": block.part.qkv.grad, "out": block.part.out.grad}


def embedding(traffic):
    table, ids = own_part(transformer().embedding, 0, traffic), token_ids()
    return passes(lambda table: split_embedding(ids, table, traffic), [table], traffic)


def cross_entropy(traffic, scale):
    part = own_part(logits(scale), 1, traffic)
    return passes(lambda x: split_cross_entropy(x, some_targets(), traffic), [part], traffic)


def bytes_of_the_loss(traffic):
    """Bytes sent for 30 tokens with a small and with a large vocabulary in float32, and to gather the large logits."""
    found = []
    for v in (6, 6000):
        part, start = torch.zeros(30, v // traffic.world, requires_grad=True), traffic.sent
        split_cross_entropy(part, torch.zeros(30, dtype=torch.int64), traffic).backward()
        found.append(traffic.sent - start)
    start = traffic.sent
    ring_all_gather(padded(torch.zeros(30 * 6000), traffic.world), traffic)
    return *found, traffic.sent - start


def whole_model(traffic, tied):
    """Loss and gradients, each with the name it has in the whole model, and bytes sent forward and backward."""
    split, ids = SplitTransformer(transformer(tied=tied), traffic), token_ids()
    start = traffic.sent
    loss = split_cross_entropy(split(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), traffic)
    middle = traffic.sent
    loss.backward()
    gradients = {name.replace(".part.", "."): p.grad for name, p in split.named_parameters()}
    return loss.detach(), gradients, (middle - start, traffic.sent - middle)


def trained(traffic):
    """The loss of five steps of AdamW."""
    split, losses = SplitTransformer(transformer(), traffic), []
    optimizer = torch.optim.AdamW(split.parameters(), 0.01)
    for step in range(5):
        ids = token_ids(step)
        loss = split_cross_entropy(split(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), traffic)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_whole():
    model, losses = transformer(), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(5):
        ids = token_ids(step)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def by_torch():
    """The pair of linear layers by PyTorch: output, gradients of x and of this rank's weights, and collectives."""
    up, up_bias, down, down_bias = linear_weights()
    layers = nn.Sequential(nn.Linear(C, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, C)).double()
    layers.load_state_dict({"0.weight": up, "0.bias": up_bias, "2.weight": down, "2.bias": down_bias})
    mesh = init_device_mesh(own_device().type, (dist.get_world_size(),))
    layers = parallelize_module(layers, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x = drawn(B, T, C).requires_grad_()
    counts = []
    with CommDebugMode() as mode:
        out = layers(x)
        counts.append(mode.get_total_counts())
        (out * drawn(*out.shape, seed=99)).sum().backward()
        counts.append(mode.get_total_counts())
    own = [p.grad.to_local() for p in (layers[0].weight, layers[0].bias, layers[2].weight, layers[2].bias)]
    return out.detach(), [x.grad, *own], (counts[0], counts[1] - counts[0])


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def refusals(traffic):
    odd = dict(vocabulary=19, heads=7, hidden=13)
    found = {
        name: refusal(lambda n=name, v=v: _cut(traffic, **{n: v})) for name, v in odd.items() if name != "kv_heads"
    }
    found["kv_heads"] = refusal(lambda: _cut(traffic, kv_heads=1))
    found["experts"] = refusal(lambda: _cut(traffic, experts=2))
    found["qk_norm"] = refusal(lambda: _cut(traffic, qk_norm=True))
    found["weight"] = refusal(lambda: own_part(torch.zeros(7, 4), 0, traffic))
    return found


def _cut(traffic, **more):
    if "heads" in more:
        more["kv_heads"] = more["heads"]
    return SplitTransformer(transformer(**more), traffic)


def work(torch_too=True):
    """All that the tests look at."""
    traffic = Traffic()
    plain = Traffic()
    ring_all_reduce(drawn(B, T, C), plain)
    return {
        "all-reduce": (plain.sent, plain.messages),
        "linear pair": linear_pair(traffic),
        "by torch": by_torch() if torch_too else None,
        "feedforward": feedforward(traffic),
        "attention": attention(traffic),
        "embedding": embedding(traffic),
        "loss": {scale: cross_entropy(traffic, scale) for scale in (1, 1000)},
        "bytes": bytes_of_the_loss(traffic),
        "model": {tied: whole_model(traffic, tied) for tied in (True, False)},
        "trained": trained(traffic),
        "count": count(transformer().config, B, T),
        "refusals": refusals(traffic),
    }


@cache
def results(world):
    """By rank, what `work` found."""
    return launch(work, world, backend="gloo", timeout=120.0)
