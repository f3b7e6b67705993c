"""What the tests of pipelines look at, done by real processes, all in one launch for a number of stages."""

from functools import cache

import torch
import torch.distributed as dist

from minillm.architecture.transformer import Config, Transformer
from minillm.distributed.launch import launch
from minillm.distributed.pipeline import Line, Stage, gpipe, one_f_one_b, rehearse, run
from minillm.training.objective import next_token_loss

SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}
LAYERS, WIDTH, V, ROWS, T = 4, 8, 11, 2, 6
MICROS = (1, 2, 5)  # fewer than stages, and more


def transformer(dtype=torch.float64, **more):
    torch.manual_seed(0)
    shape = dict(vocabulary=V, width=WIDTH, layers=LAYERS, heads=2, kv_heads=1, head_size=4, hidden=12, context=16)
    return Transformer(Config(**shape | {"tied": False} | more)).to(dtype)


def batches(m, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (ROWS, T), generator=generator) for _ in range(m)]


def gradients(model):
    """Of the parameters that this rank has, by the name they have in the whole model."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def executed(schedule, m):
    line, model = Line(), transformer()
    stage = Stage(model, line.rank, line.world)
    found = run(stage, schedule(line.rank, line.world, m), batches(m), line, width=WIDTH, dtype=torch.float64)
    return {
        "loss": found.loss,
        "gradients": gradients(model),
        "timeline": found.timeline,
        "most alive": found.most_alive,
        "sent": (line.sent, line.messages),
        "parameters": sum(p.numel() for p in stage.parameters()),
    }


def by_torch(name, m):
    """Loss, gradients and the order of passes of PyTorch's schedule."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, p = dist.get_rank(), dist.get_world_size()
    model, order, losses = transformer(), [], []
    stage = Stage(model, rank, p)
    stage.register_forward_hook(lambda *_: order.append("forward"))
    stage.register_full_backward_hook(lambda *_: order.append("backward"))
    stream = torch.zeros(ROWS, T, WIDTH, dtype=torch.float64)
    first = batches(m)[0] if rank == 0 else stream.clone().requires_grad_()
    out = stream if rank < p - 1 else torch.zeros(ROWS, T, V, dtype=torch.float64)
    staged = PipelineStage(stage, rank, p, torch.device("cpu"), input_args=first, output_args=out.requires_grad_())
    kind = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[name]
    schedule, ids = kind(staged, m, loss_fn=next_token_loss), torch.cat(batches(m))
    schedule.step(*[ids][: 1 if rank == 0 else 0], **(dict(target=ids, losses=losses) if rank == p - 1 else {}))
    return {"gradients": gradients(model), "order": order, "losses": [loss.item() for loss in losses]}


def trained(schedule, m=3):
    """The losses of four updates."""
    line, model = Line(), transformer()
    stage, losses = Stage(model, line.rank, line.world), []
    optimizer = torch.optim.AdamW(stage.parameters(), 0.01)
    order = schedule(line.rank, line.world, m)
    for step in range(4):
        losses.append(run(stage, order, batches(m, step), line, width=WIDTH, dtype=torch.float64).loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def work():
    found = {(name, m): executed(schedule, m) for name, schedule in SCHEDULES.items() for m in MICROS}
    for name, schedule in SCHEDULES.items():
        found["trained", name] = trained(schedule)
        found["busy", name] = rehearse(schedule, 4, width=64)
        found["torch", name] = by_torch(name, 5)
    return found


@cache
def results(p):
    """By rank, what `work` found."""
    return launch(work, p, backend="gloo", timeout=120.0)
