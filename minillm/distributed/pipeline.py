"""Pipeline parallelism: layers spread over ranks, micro-batches that follow each other, and where ranks stand idle.

Idea:        Each of p ranks has some layers, a stage. A batch is cut in m micro-batches, so that a stage can work on
             one while the next stage works on the one before. A schedule is each stage's order of forward and backward
             passes; what it can start when follows from the messages it waits for. GPipe does all forward passes, then
             all backward passes, and keeps the activations of all m until then. 1F1B takes in only as many as it needs
             to keep the last stage busy, then does one backward pass for each forward pass: the same idle time, at
             most p - stage micro-batches alive.
Cost:        Idle share (p - 1)/(m + p - 1) for both: filling and draining the pipe, p - 1 passes each. A stage sends
             b t c numbers forward and backward to its neighbours, the least of all ways to split a model. More
             micro-batches, less idle time, smaller products; the activations of GPipe grow with m.
Paper:       GPipe: Huang et al. 2018, arXiv:1811.06965, section 2. 1F1B: PipeDream, Harlap et al. 2018,
             arXiv:1806.03377; with a flush after each batch, so that gradients are exact: Narayanan et al. 2021,
             arXiv:2104.04473, section 2.2.
Production:  torch.distributed.pipelining: ScheduleGPipe, Schedule1F1B; Megatron-LM, which interleaves several stages
             a rank; DeepSpeed's pipeline engine.
Leaves out:  interleaved stages, backward passes in two halves (zero bubble), tied embeddings on two stages, recomputing
             activations, overlap of messages with work.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.architecture.norm import rms_norm
from minillm.architecture.transformer import Config, Transformer
from minillm.distributed.collectives import Traffic
from minillm.distributed.launch import own_device
from minillm.training.objective import next_token_loss

# Schedules as data


class Op(NamedTuple):
    """One pass of a micro-batch through a stage."""

    stage: int
    micro: int
    kind: Literal["forward", "backward"]


def gpipe(stage: int, p: int, m: int) -> list[Op]:
    """What a stage does, in order: all forward passes, then all backward passes."""
    return [Op(stage, i, "forward") for i in range(m)] + [Op(stage, i, "backward") for i in range(m)]


def one_f_one_b(stage: int, p: int, m: int) -> list[Op]:
    """What a stage does, in order: as many forward passes as stages follow, one forward and one backward in turn, rest.

    >>> "".join(op.kind[0] for op in one_f_one_b(0, 3, 4)), "".join(op.kind[0] for op in one_f_one_b(2, 3, 4))
    ('fffbfbbb', 'fbfbfbfb')
    """
    ahead = min(p - 1 - stage, m)
    order = [Op(stage, i, "forward") for i in range(ahead)]
    for i in range(m - ahead):
        order += [Op(stage, ahead + i, "forward"), Op(stage, i, "backward")]
    return order + [Op(stage, i, "backward") for i in range(m - ahead, m)]


def plan(schedule: Callable[[int, int, int], list[Op]], p: int, m: int) -> list[list[Op]]:
    """The orders of all stages. ValueError: no stage or no micro-batch."""
    if p < 1 or m < 1:
        raise ValueError(f"a pipeline needs at least 1 stage and 1 micro-batch, got {p} and {m}: give more")
    return [schedule(stage, p, m) for stage in range(p)]


def needs(op: Op, p: int) -> Op | None:
    """The pass whose result this one waits for: the neighbour's; the last stage turns around, the first needs none."""
    before = op.stage - 1 if op.kind == "forward" else op.stage + 1
    if before == p:
        return op._replace(kind="forward")
    return op._replace(stage=before) if before >= 0 else None


def slots(orders: Sequence[Sequence[Op]]) -> list[list[Op]]:
    """The passes that run at the same time, slot by slot: each as early as its stage and its message allow.

    A forward and a backward pass take one slot each. ValueError: the orders wait for each other for ever.

    >>> for slot in slots(plan(gpipe, 2, 1)):
    ...     print(slot)
    [Op(stage=0, micro=0, kind='forward')]
    [Op(stage=1, micro=0, kind='forward')]
    [Op(stage=1, micro=0, kind='backward')]
    [Op(stage=0, micro=0, kind='backward')]
    """
    waiting, done, found = [list(order) for order in orders], set[Op](), list[list[Op]]()
    while any(waiting):
        first = [order[0] for order in waiting if order]
        ready = [op for op in first if (need := needs(op, len(orders))) is None or need in done]
        if not ready:
            raise ValueError(f"after {len(found)} slots all stages wait for each other, next are {first}: reorder them")
        for op in ready:
            waiting[op.stage].pop(0)
        done |= set(ready)
        found.append(ready)
    return found


def idle_share(timetable: Sequence[Sequence[Op]], p: int) -> float:
    """Slots in which a stage does nothing, of all slots of all stages: the bubble, counted."""
    return 1 - sum(len(slot) for slot in timetable) / (p * len(timetable))


def most_alive(order: Sequence[Op]) -> int:
    """The largest number of micro-batches whose activations a stage holds at once, counted along its order."""
    alive = most = 0
    for op in order:
        alive += 1 if op.kind == "forward" else -1
        most = max(most, alive)
    return most


# Stages of a model


def spread(layers: int, p: int) -> list[range]:
    """The layers of each stage; the first stages have one more where it does not divide.

    >>> spread(7, 3)
    [range(0, 3), range(3, 5), range(5, 7)]
    """
    if not 1 <= p <= layers:
        raise ValueError(f"every stage needs a layer, got {layers} layers for {p} stages: use fewer stages")
    size, more = divmod(layers, p)
    starts = [stage * size + min(stage, more) for stage in range(p + 1)]
    return [range(start, end) for start, end in pairwise(starts)]


class Stage(nn.Module):
    """Some layers of a model: the first stage embeds ids, the last ends in logits, in between the stream is passed on.

    The layers are the model's own. ValueError: a tied head would be on two stages.
    """

    def __init__(self, model: Transformer, stage: int, p: int) -> None:
        super().__init__()
        if model.head is None and p > 1:
            raise ValueError(f"embedding and head are on stages 0 and {p - 1}, got a tied one: choose tied=False")
        own = spread(len(model.blocks), p)[stage]
        self.config, self.blocks = model.config, nn.ModuleDict({str(i): model.blocks[i] for i in own})
        self.embedding = model.embedding if stage == 0 else None
        last = stage == p - 1
        self.norm, self.head = (model.norm if last else None), (model.unembedding if last else None)
        self.cos: Tensor
        self.sin: Tensor
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(model, name), persistent=False)

    def forward(self, x: Int[Tensor, "b t"] | Float[Tensor, "b t c"]) -> Float[Tensor, "b t last"]:
        """The stream after this stage's layers, or logits."""
        if self.embedding is not None:
            x = F.embedding(x, self.embedding)
        cos, sin = (table[: x.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        for block in self.blocks.values():
            x = block(x, cos, sin)
        if self.norm is None or self.head is None:
            return x
        return F.linear(rms_norm(x, self.norm, eps=self.config.eps), self.head)


# Execution


class Span(NamedTuple):
    """When a pass ran, without the wait for its input: seconds of `time.perf_counter`, one clock for a machine."""

    op: Op
    start: float
    end: float


class Execution(NamedTuple):
    """What one rank did in a batch."""

    loss: float | None  # mean over micro-batches, on the last stage
    timeline: list[Span]
    most_alive: int  # micro-batches whose activations were held at once, counted


class Line(Traffic):
    """This rank's place in a line of stages. Each direction has a process group of its own, so that a message forward
    never waits behind one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = {+1: dist.new_group(), -1: dist.new_group()}  # all ranks make both, in the same order
        self.under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, x: Tensor, way: int) -> None:
        """Start a message to the next stage (+1) or the one before (-1); it goes on while this rank works."""
        x = x.detach().contiguous()
        work = dist.isend(x, self.rank + way, group=self.groups[way])
        assert work is not None
        self.under_way.append((work, x))
        self.sent += x.numel() * x.element_size()
        self.messages += 1

    def receive(self, x: Tensor, way: int) -> Tensor:
        """Fill x with the next message that travels forward (+1) or backward (-1), and wait for it."""
        dist.recv(x, self.rank - way, group=self.groups[way])
        return x

    def finish(self) -> None:
        """Wait until all messages have left."""
        for work, _ in self.under_way:
            work.wait()
        self.under_way.clear()


def now() -> float:
    """Seconds, when what was asked of this rank's device is done."""
    if own_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run(
    stage: nn.Module,
    order: Sequence[Op],
    ids: Sequence[Int[Tensor, "b t"]],
    line: Line,
    *,
    width: int,
    dtype: torch.dtype = torch.float32,
    loss: Callable[[Tensor, Tensor], Tensor] = next_token_loss,
) -> Execution:
    """One batch through this rank's stage, in the given order; gradients of the mean over micro-batches are added up.

    All ranks have the ids: the first stage reads them, the last compares with them, the stream (b t `width`) travels.
    """
    first, last, device = line.rank == 0, line.rank == line.world - 1, own_device()
    alive: dict[int, tuple[Tensor, Tensor]] = {}  # input and output of each micro-batch, until its backward pass
    timeline, losses, most = [], [], 0
    dist.barrier()  # start together
    for op in order:
        batch = ids[op.micro].to(device)
        if op.kind == "forward":
            x = batch if first else line.receive(torch.empty(*batch.shape, width, dtype=dtype, device=device), +1)
            start = now()
            out = stage(x if first else x.requires_grad_())
            if last:
                out = loss(out, batch) / len(ids)
                losses.append(out.detach())
            alive[op.micro] = x, out
            most = max(most, len(alive))
            timeline.append(Span(op, start, now()))
            if not last:
                line.send(out, +1)
        else:
            grad = None if last else line.receive(torch.empty_like(alive[op.micro][1]), -1)
            start = now()
            x, out = alive.pop(op.micro)
            out.backward(grad)
            timeline.append(Span(op, start, now()))
            if not first:
                assert x.grad is not None
                line.send(x.grad, -1)
    line.finish()
    return Execution(torch.stack(losses).sum().item() if last else None, timeline, most)


def idle_time(timelines: Sequence[Sequence[Span]]) -> float:
    """The share of time, from the first start to the last end, in which ranks computed nothing; waits included."""
    spans = [span for timeline in timelines for span in timeline]
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (len(timelines) * whole)


def rehearse(
    schedule: Callable[[int, int, int], list[Op]], m: int, *, width: int = 256, rows: int = 4, length: int = 64
) -> Execution:
    """One batch of m micro-batches through a random model of two layers a stage: for `launch`, as many ranks as stages.

    A batch before it, which is not recorded, warms up.
    """
    line = Line()
    torch.manual_seed(0)
    config = Config(
        vocabulary=256,
        width=width,
        layers=2 * line.world,
        heads=width // 32,
        kv_heads=width // 32,
        head_size=32,
        hidden=2 * width,
        context=length,
        tied=False,
    )
    stage = Stage(Transformer(config), line.rank, line.world).to(own_device())
    ids = [torch.randint(0, 256, (rows, length)) for _ in range(m)]
    run(stage, schedule(line.rank, line.world, 1), ids[:1], line, width=width)
    stage.zero_grad()
    return run(stage, schedule(line.rank, line.world, m), ids, line, width=width)
