"""A job of `memory` done for real: the model is built, a step is made, and the bytes that it took are counted.

Idea:        An estimate is worth what its test is worth. Weights, gradients and optimizer states are tensors that exist
             between two steps: add up their bytes. Activations exist only within a step: hooks see each tensor that
             autograd keeps, and the profiler sees each allocation, so the peak is known as well. A model too large for
             the machine runs with fake tensors, which have a shape and no memory: PyTorch's tracker counts those.
Cost:        A real step, twice: the gradients and states of the first are there when the second is measured.
Paper:       Chen et al. 2016, arXiv:1604.06174 (checkpointing: what is kept, and what is computed again).
Production:  torch.profiler with profile_memory; torch.distributed._tools.mem_tracker.MemTracker in a FakeTensorMode.
Leaves out:  several ranks, offload, and the unused rest of the blocks that CUDA's allocator reserves.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.architecture.transformer import Transformer
from minillm.finetuning.adam8bit import AdamW8bit
from minillm.finetuning.lora import add_lora
from minillm.finetuning.memory import Job, Memory, checkpointed, measured_states, saved_bytes
from minillm.finetuning.nf4 import quantise_model
from minillm.measure import peak_memory
from minillm.training.objective import chunked_cross_entropy, next_token_loss, next_tokens
from minillm.training.precision import MasterWeights


def build(job: Job) -> Transformer:
    """The model of the job in its precision: as it is, or frozen with adapters, its matrices in 4 bits for "qlora"."""
    model = Transformer(job.model).to(torch.float32 if job.precision == "fp32" else torch.bfloat16)
    if job.method == "qlora":
        quantise_model(model)
    if job.method != "full":
        add_lora(model, rank=job.rank, names=job.adapted)
    return model


@contextmanager
def mode(job: Job, model: Transformer) -> Iterator[None]:
    """Inside, attention builds its scores or not, and blocks are computed again or not, as the job says."""
    kernel = sdpa_kernel(SDPBackend.MATH) if job.attention == "naive" else nullcontext()
    with kernel, checkpointed(model) if job.checkpoint else nullcontext():
        yield


def loss_of(model: Transformer, job: Job, ids: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """The loss of a step, from all logits at once or in chunks."""
    if not job.chunk:
        return next_token_loss(model(ids), ids)
    rows = model.hidden(ids)[:, :-1].flatten(0, 1)
    return chunked_cross_entropy(rows, model.unembedding, next_tokens(ids).flatten(), chunk=job.chunk)


def step(model: Transformer, job: Job, ids: Int[Tensor, "b t"]) -> None:
    """Forward and backward pass: gradients are added to those that are there."""
    with mode(job, model):
        loss_of(model, job, ids).backward()


def measure(job: Job) -> tuple[Memory, int]:
    """Bytes by part as they were counted on the CPU, and at the peak of a second step.

    `activations` is all that autograd kept until the head; `logits` and `layer` are not told apart. ValueError for a
    job of several ranks, with offload, or for another device than the CPU.
    """
    if job.zero or job.ranks > 1 or job.offload != "none" or job.device != "cpu":
        raise ValueError(
            f"measured is one process without offload on the CPU, got zero={job.zero}, ranks={job.ranks}, "
            f"offload={job.offload}, device={job.device}"
        )
    model, ids = build(job), torch.randint(job.model.vocabulary, (job.batch, job.tokens))
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = AdamW8bit if job.optimizer == "adam8bit" else torch.optim.AdamW
    step(model, job, ids)
    if job.precision == "mixed":
        masters = MasterWeights(trained, kind)
        masters.step()
        for copy in masters.copies:
            copy.grad = None  # the float32 copies of the gradients, until the next step
        found = measured_states(model, masters.optimizer)
        found = replace(found, master=sum(master.nbytes for master in masters.copies))
    else:
        optimizer = kind(trained)
        optimizer.step()
        found = measured_states(model, optimizer)
    with mode(job, model):
        kept = saved_bytes(lambda: model.hidden(ids), model)
    peak = peak_memory(lambda: step(model, job, ids))
    return replace(found, activations=kept), found.states + peak


def tracked(job: Job) -> dict[str, int]:
    """Bytes by kind at the peak of a step of any size, counted by PyTorch's MemTracker; nothing is computed.

    Of full fine-tuning with AdamW in "bf16" or "fp32", whose gradients and states are there before; else ValueError.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    if job.method != "full" or job.optimizer != "adamw" or job.precision == "mixed":
        raise ValueError(f"tracked is full, adamw, bf16 or fp32, got {job.method}, {job.optimizer}, {job.precision}")
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if job.precision == "fp32" else torch.bfloat16)
    try:
        with FakeTensorMode():
            model, ids = Transformer(job.model), torch.zeros(job.batch, job.tokens, dtype=torch.long)
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight)
            optimizer.step()
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                step(model, job, ids)
    finally:
        torch.set_default_dtype(usual)
    (kinds,) = tracker.get_tracker_snapshot("peak").values()
    return {getattr(kind, "name", str(kind)).lower(): size for kind, size in kinds.items()}
