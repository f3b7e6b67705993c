"""What the tests of ZeRO look at, done by real processes: training by each stage and by PyTorch's own, and counts.

Run once for a world size: starting processes costs more than all the steps.
"""

import gc
import math
import time
from collections import OrderedDict
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from minillm.architecture.transformer import Config, Transformer
from minillm.distributed.collectives import Traffic, ring_all_reduce
from minillm.distributed.launch import launch, own_device
from minillm.distributed.zero import Stage1, Stage2, cut, own_rows
from minillm.distributed.zero3 import Stage3, units

STEPS, BATCH, LIMIT = 5, 12, 2000  # updates, rows of the whole batch, bytes a bucket
ADAMW = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
CLIP = 0.5  # below the norms of these gradients


def transformer(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    shape = dict(vocabulary=11, width=8, layers=3, heads=2, kv_heads=1, head_size=4, hidden=12, context=16)
    return Transformer(Config(**shape)).to(dtype)


def perceptron(seed=0, dtype=torch.float64, width=5):
    """Layers whose sizes do not divide by 2 or 3."""
    torch.manual_seed(seed)
    layers = OrderedDict(first=nn.Linear(7, width), second=nn.Linear(width, width), last=nn.Linear(width, 1))
    return nn.Sequential(OrderedDict((n, nn.Sequential(x, nn.Tanh())) for n, x in layers.items())).to(dtype)


def tokens(step):
    return torch.randint(0, 11, (BATCH, 6), generator=torch.Generator().manual_seed(step))


def vectors(step):
    return torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def next_token(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def regression(model, rows):
    return 10 * F.mse_loss(model(rows[:, :7])[:, 0], rows[:, 7])


TASKS = {
    "transformer": (transformer, tokens, next_token, lambda model: list(model.blocks)),
    "perceptron": (perceptron, vectors, regression, lambda model: list(model)),
    "perceptron in two units": (perceptron, vectors, regression, lambda model: [model.second]),
}


def weights(model):
    """A copy of all weights by name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = value.detach().clone()
    return found


def alone(build, batch, loss, clip):
    """One process, the whole batch, torch's optimizer: weights after five steps, and the norms."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    norms = []
    for step in range(STEPS):
        loss(model, batch(step)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), torch.stack(norms)


def by_torch(kind, build, batch, loss, layers, traffic):
    """PyTorch's own: "ddp", "zero" (ZeroRedundancyOptimizer under DDP) or "fsdp2"."""
    model = build()
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(own_device().type, (dist.get_world_size(),))
        for layer in layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = model if kind == "fsdp2" else DistributedDataParallel(model)
    if kind == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of its own imports

        optimizer = ZeroRedundancyOptimizer(trained.parameters(), torch.optim.AdamW, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(trained.parameters(), **ADAMW)
    for step in range(STEPS):
        loss(trained, own_rows(batch(step), traffic)).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def stage(number, model, layers, traffic, *, dtype=None, limit=LIMIT, **options):
    if number == 3:
        return Stage3(units(model, layers, traffic, dtype=dtype), **ADAMW | options)
    return (None, Stage1, Stage2)[number](cut(model, traffic, limit=limit, dtype=dtype), **ADAMW | options)


def whole(zero, model):
    """All weights of the model on this rank."""
    if isinstance(zero, Stage3):
        with zero.whole():
            return weights(model)
    return weights(model)


def by_stage(number, build, batch, loss, layers, *, clip=CLIP):
    traffic = Traffic()
    model = build(seed=dist.get_rank())  # rank 0's are everyone's
    zero = stage(number, model, layers(model), traffic, clip=clip)
    norms = []
    for step in range(STEPS):
        loss(model, own_rows(batch(step), traffic)).backward()
        norms.append(zero.step())
    return whole(zero, model), torch.stack(norms)


def everything_alive():
    """Bytes behind all tensors made since gc.freeze(), whoever holds them."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class Watched(Traffic):
    """Looks at the memory before every message."""

    def __init__(self):
        super().__init__()
        self.look = None

    def exchange(self, outgoing, incoming):
        if self.look is not None:
            self.look()
        super().exchange(outgoing, incoming)


def bytes_of(number, width=48, layers=6):
    """Bytes held and sent by a step in bfloat16 with masters, of a model whose sizes divide by 2 and 3."""
    gc.collect()
    gc.freeze()  # tensors of before do not count
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)))
    traffic = Watched()
    zero = stage(number, model, list(model), traffic, dtype=torch.bfloat16, limit=1)
    rows = torch.randn(6, width, dtype=torch.bfloat16)
    before = rows.untyped_storage().nbytes()
    found = {"size": layers * width * width, "layer": width * width}

    def held():
        until, expected = time.monotonic() + 5, zero.held()
        alive = everything_alive() - before
        while alive != sum(expected.values()) and time.monotonic() < until:  # Gloo's thread lets go a moment later
            time.sleep(0.05)
            alive = everything_alive() - before
        return {"alive": alive, **expected}

    found["start"] = held()
    for _ in range(2):
        start, moments = traffic.sent, []
        with torch.no_grad():
            model(rows)
        found["sent forward"], start = traffic.sent - start, traffic.sent
        traffic.look = lambda moments=moments: moments.append(everything_alive() - before)
        loss = model(rows).float().square().mean()
        loss.backward()
        del loss
        found["after backward"] = held()
        zero.step()
        traffic.look = None
        found["after step"] = held()
        found["sent"] = traffic.sent - start
        found["peak"] = max(moments)
    plain = Traffic()
    ring_all_reduce(torch.zeros(found["size"], dtype=torch.bfloat16), plain)  # what plain data parallelism sends
    found["plain"] = plain.sent
    gc.unfreeze()
    return found


def sums_of_rounding(number, build=transformer):
    """Five steps in bfloat16, with masters: the weights on this rank, and all ranks' masters put together."""
    traffic = Traffic()
    model = build(dtype=torch.float32)
    exact = weights(model)
    zero = stage(number, model, list(model.blocks), traffic, dtype=torch.bfloat16, lr=1e-4, weight_decay=0.0)
    start = {name: value.float() for name, value in whole(zero, model).items()}
    masters = masters_of(zero, model)
    for step in range(STEPS):
        next_token(model, own_rows(tokens(step), traffic)).backward()
        zero.step()
    return {
        "exact": exact,
        "start": start,
        "first masters": masters,
        "masters": masters_of(zero, model),
        "weights": whole(zero, model),
    }


def masters_of(zero, model):
    """All ranks' masters as weights by name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for bucket in zero.buckets:
        parts = [torch.empty_like(bucket.master) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, bucket.master.contiguous())
        for parameter, piece in zip(bucket.parameters, bucket.pieces(torch.cat(parts)), strict=True):
            found[names[parameter]] = piece.clone()
    return found


def accumulated(number):
    """Two micro-batches of half the rows each: weights, and bytes sent by the backward passes of one step."""
    traffic = Traffic()
    model = transformer()
    zero = stage(number, model, list(model.blocks), traffic, clip=CLIP)
    for step in range(STEPS):
        start = traffic.sent
        for half in own_rows(tokens(step), traffic).chunk(2):
            (next_token(model, half) / 2).backward()
        sent = traffic.sent - start
        zero.step()
    return whole(zero, model), sent


class Spare(nn.Module):
    """One of its layers is never used."""

    def __init__(self):
        super().__init__()
        self.body = perceptron()
        self.spare = nn.Linear(3, 5).double()

    def forward(self, x):
        return self.body(x)


def unused(number):
    """Weights of a model with a layer that no rank uses."""
    torch.manual_seed(0)
    traffic = Traffic()
    model = Spare()
    zero = stage(number, model, [model.body, model.spare], traffic, limit=10**6)
    for step in range(STEPS):
        regression(model, own_rows(vectors(step), traffic)).backward()
        zero.step()
    return whole(zero, model)


def freed(number=3):
    """What a parameter of stage 3 is outside its layer, and what the model says without gradients."""
    traffic = Traffic()
    model, same = transformer(), transformer()
    zero = stage(number, model, list(model.blocks), traffic)
    with torch.no_grad():
        out = model(tokens(0))
    sizes = {p.numel() for p in model.parameters()}
    held = zero.held()
    model.blocks[0].register_forward_hook(lambda module, args, out: {"out": out}, prepend=True)
    try:
        model(tokens(0))
        said = None
    except TypeError as error:
        said = str(error)
    return {"sizes": sizes, "out": (out, same(tokens(0)).detach()), "held": held, "dict": said}


def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def refusals():
    traffic = Traffic()
    frozen = perceptron()
    frozen.last.requires_grad_(False)
    model = perceptron()
    return {
        "rows": refusal(lambda: own_rows(torch.zeros(7, 2), traffic)),
        "frozen": refusal(lambda: cut(frozen, traffic)),
        "twice": refusal(lambda: units(model, [model, model.first], traffic)),
    }


def clipping():
    """Gradients known by heart, on shards: the norm, and that of the rank's own shard."""
    traffic = Traffic()
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    zero = Stage2(cut(model, traffic), lr=1.0, clip=math.inf)
    model(torch.tensor([[3.0, 4.0]], dtype=torch.float64)).sum().backward()
    own = zero.buckets[0].gradient.norm() / traffic.world
    return own, zero.step()


def by_us(number):
    """All that the tests of a stage look at."""
    return {
        "weights": {name: by_stage(number, *task) for name, task in TASKS.items()},
        "unclipped": by_stage(number, *TASKS["transformer"], clip=math.inf),
        "bytes": bytes_of(number),
        "bfloat16": sums_of_rounding(number),
        "accumulated": accumulated(number),
        "unused": unused(number),
        "freed": freed() if number == 3 else None,
    }


def work(numbers):
    """All that the tests look at."""
    found = {number: by_us(number) for number in numbers}
    for name in ("transformer", "perceptron"):
        for kind in ("ddp", "zero", "fsdp2"):
            found[name, kind] = by_torch(kind, *TASKS[name], Traffic())
    return found | {"refusals": refusals(), "clipping": clipping()}


@cache
def results(numbers, world):
    """By rank, what `work` found for the stages."""
    return launch(work, world, numbers, backend="gloo", timeout=100.0)
