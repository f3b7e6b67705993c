"""How many bytes a training step takes, part by part, before anything is bought or started.

Idea:        States are counted by the weight: in mixed precision 2 bytes for it, 2 for its gradient, 4 for a master
             copy and 8 for Adam's two means. Frozen weights need the first number only, quantised ones 0.516.
             Activations are counted by the token: what a layer's backward pass needs is kept until then. Attention
             adds the square of the length, unless its kernel computes the scores again. At the end stand the logits,
             three float32 tensors of tokens times vocabulary. Each remedy shrinks one part and leaves the others:
             adapters and ZeRO the states, checkpointing the activations, a loss in chunks the logits.
Cost:        bytes, whole numbers. A card of "80 GB" has 80 x 2^30; papers and prices mostly count 10^9.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, section 3 and figure 1; Korthikanti et al. 2022,
             arXiv:2205.05198, equations 1 to 4 (activations of a GPT layer); Dettmers et al. 2023, arXiv:2305.14314
             (QLoRA); Ren et al. 2021, "ZeRO-Offload", arXiv:2101.06840; Dettmers et al. 2021, arXiv:2110.02861.
Production:  deepspeed estimate_zero3_model_states_mem_needs (states only); torch.cuda.max_memory_allocated.
Leaves out:  mixtures of experts, qk_norm, autocast, tensor and pipeline parallelism; the CUDA context, gaps between
             tensors and communication buffers, for which 1 to 2 GB of a card should stay free.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.architecture.transformer import Config, Transformer
from minillm.finetuning import adam8bit, nf4
from minillm.finetuning.lora import MATRICES, adapter_parameters

# bytes a number: weight, gradient, fp32 master copy, each of Adam's means
PRECISIONS = {"mixed": (2, 2, 4, 4), "bf16": (2, 2, 0, 2), "fp32": (4, 4, 0, 4)}
CHOICES = {
    "method": ("full", "lora", "qlora"),
    "precision": tuple(PRECISIONS),
    "optimizer": ("adamw", "adam8bit"),
    "attention": ("flash", "naive"),
    "device": ("cuda", "cpu"),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "optimizer", "all"),
}


@dataclass(frozen=True)
class Job:
    """What is trained, and how. ValueError for a choice that is none."""

    model: Config
    batch: int = 1  # sequences of a micro-batch, on each rank
    tokens: int = 2048  # of a sequence
    method: str = "full"  # or "lora", "qlora"
    precision: str = "mixed"  # bf16 with fp32 master weights and means; or "bf16", "fp32" for everything
    optimizer: str = "adamw"  # or "adam8bit"
    rank: int = 16  # of the adapters
    adapted: tuple[str, ...] = MATRICES  # which matrices of a block have them
    attention: str = "flash"  # a kernel that keeps no scores; or "naive": PyTorch's, float32
    checkpoint: bool = False  # keep the inputs of blocks only, and compute the rest again
    device: str = "cuda"  # or "cpu", where the norm is not one kernel: it keeps float32 copies
    chunk: int = 0  # rows of logits at a time in `objective.chunked_cross_entropy`; 0 for all at once
    zero: int = 0  # stage: 1 shards masters and means, 2 gradients, too, 3 weights, too
    ranks: int = 1  # that share them
    offload: str = "none"  # to main memory: "optimizer" with the gradients (ZeRO-Offload), or "all" (ZeRO-Infinity)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)}")
        for name in ("batch", "tokens", "rank", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens > self.model.context:
            raise ValueError(f"tokens must be at most the model's context, {self.model.context}, got {self.tokens}")
        if self.model.experts or self.model.qk_norm:
            raise ValueError("only dense layers without qk_norm are counted, got experts or qk_norm")
        if not set(self.adapted) <= set(MATRICES):
            raise ValueError(f"adapted must be some of {', '.join(MATRICES)}, got {', '.join(self.adapted)}")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part; `host` are bytes of main memory for this device."""

    weights: int = 0
    gradients: int = 0
    master: int = 0  # float32 copies of the weights
    optimizer: int = 0  # Adam's means
    gathered: int = 0  # weights and gradients of one block that are whole for a moment, where they are sharded
    activations: int = 0  # kept by the blocks from the forward to the backward pass
    logits: int = 0  # with the norm before them, and what the loss makes of them
    layer: int = 0  # what one block's backward pass makes: gradients, and what checkpointing computes again
    host: int = 0

    @property
    def states(self) -> int:
        """What is there between two steps."""
        return self.weights + self.gradients + self.master + self.optimizer

    @property
    def total(self) -> int:
        """The peak of a step on the device: the logits are gone when a block's backward pass begins."""
        return self.states + self.gathered + self.activations + max(self.logits, self.layer)


# States


def state_bytes(
    trained: int | float,
    frozen: int | float = 0,
    packed: int | float = 0,
    *,
    precision: str = "mixed",
    optimizer: str = "adamw",
    zero: int = 0,
    ranks: int = 1,
) -> Int[Tensor, "4"]:
    """Bytes on one device of weights, gradients, float32 masters and Adam's means, each rounded up to a whole one.

    >>> state_bytes(8_030_261_248).tolist()                           # Llama 3 8B, 16 bytes a weight
    [16060522496, 16060522496, 32121044992, 64242089984]
    >>> state_bytes(41_943_040, 8_030_261_248).tolist()               # adapters of rank 16
    [16144408576, 83886080, 167772160, 335544320]
    """
    weight, gradient, master, mean = PRECISIONS[precision]
    means = 2 * mean if optimizer == "adamw" else 2 * (1 + 4 / adam8bit.BLOCK)

    def share(stage: int, size: int | float) -> int:
        return ceil(size / ranks if zero >= stage else size)

    parts = [
        share(3, weight * (trained + frozen) + nf4.bits_per_weight() / 8 * packed),
        share(2, gradient * trained),
        share(1, master * trained),
        share(1, means * trained),
    ]
    return torch.tensor(parts)


def states(
    trained: int | float,
    *,
    frozen: int | float = 0,
    packed: int | float = 0,
    precision: str = "mixed",
    optimizer: str = "adamw",
    zero: int = 0,
    ranks: int = 1,
    offload: str = "none",
) -> Memory:
    """Bytes of weights, gradients, masters and means from numbers of weights: trained, frozen, frozen in 4 bits.

    >>> [round(states(7.5e9, zero=stage, ranks=64).total / 1e9, 1) for stage in range(4)]      # GB, ZeRO's figure 1
    [120.0, 31.4, 16.6, 1.9]
    """
    counts: dict[str, int | float] = {"trained": trained, "frozen": frozen, "packed": packed}
    sizes = state_bytes(**counts, precision=precision, optimizer=optimizer, zero=zero, ranks=ranks).tolist()
    parts = dict(zip(("weights", "gradients", "master", "optimizer"), sizes, strict=True))
    kept = {"none": tuple(parts), "optimizer": ("weights",), "all": ()}[offload]
    away = sum(size for name, size in parts.items() if name not in kept)
    return Memory(**{name: size for name, size in parts.items() if name in kept}, host=away)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, without building the model.

    >>> llama2 = Config(vocabulary=32000, width=4096, layers=32, heads=32, kv_heads=32, head_size=128, hidden=11008,
    ...                 tied=False)
    >>> sum(map(prod, shapes(llama2).values()))
    6738415616
    """
    c, d = config.width, config.head_size
    block = {
        "attention_norm": (c,),
        "qkv": ((config.heads + 2 * config.kv_heads) * d, c),
        "out": (c, config.heads * d),
        "feedforward_norm": (c,),
        "gate_up": (2 * config.hidden, c),
        "down": (c, config.hidden),
    }
    found: dict[str, tuple[int, ...]] = {"embedding": (config.vocabulary, c), "norm": (c,)}
    if not config.tied:
        found["head"] = (config.vocabulary, c)
    return found | {f"blocks.{i}.{name}": shape for i in range(config.layers) for name, shape in block.items()}


def weight_counts(job: Job) -> dict[str, int]:
    """How many numbers are trained, frozen, and frozen in 4 bits.

    >>> lora = Job(Config(), method="lora", rank=8)
    >>> weight_counts(lora)
    {'trained': 483328, 'frozen': 25829888, 'packed': 0}
    """
    sizes = {name: prod(shape) for name, shape in shapes(job.model).items()}
    if job.method == "full":
        return {"trained": sum(sizes.values()), "frozen": 0, "packed": 0}
    matrices = {name: shape for name, shape in shapes(job.model).items() if name.rpartition(".")[2] in MATRICES}
    adapted = [shape for name, shape in matrices.items() if name.rpartition(".")[2] in job.adapted]
    trained = sum(adapter_parameters((shape[0], shape[1]), job.rank) for shape in adapted)
    packed = sum(sizes[name] for name in matrices) if job.method == "qlora" else 0
    return {"trained": trained, "frozen": sum(sizes.values()) - packed, "packed": packed}


def gathered(job: Job) -> int:
    """The largest part that is whole for a moment: a block, or the embedding; its weights, gradients, or both."""
    counts = {"embedding": prod(shapes(job.model)["embedding"])}
    counts["block"] = sum(prod(s) for name, s in shapes(job.model).items() if name.startswith("blocks.0."))
    weight, gradient = PRECISIONS[job.precision][:2]
    shared = job.ranks > 1
    weights_away = (job.zero == 3 and shared) or job.offload == "all"
    gradients_away = (job.zero >= 2 and shared) or job.offload != "none"
    whole = weight * weights_away + gradient * (gradients_away and job.method == "full")
    return max(counts.values()) * whole


# Activations


def block_tensors(job: Job, *, first: bool = False) -> dict[str, int]:
    """Bytes of every tensor that the forward pass of one block keeps for its backward pass, by name.

    A product keeps its input for the weight's gradient: not where the weight is frozen and has no adapter. What is not
    linear keeps its input in any case, since the gradient must pass through it. Only the `first` block of a model whose
    embedding is frozen keeps nothing before its first adapter: no gradient goes further down.

    >>> sum(block_tensors(Job(Config())).values()) / (512 * 2048)          # bytes a channel and token
    39.078125
    """
    config, full, n = job.model, job.method == "full", job.batch * job.tokens
    c, h, g, d, f = config.width, config.heads, config.kv_heads, config.head_size, config.hidden
    e = PRECISIONS[job.precision][0]
    kept: dict[str, int] = {}

    def norm(name: str, live: bool) -> None:
        if live:
            kept[f"{name} input"] = n * c * (e if job.device == "cuda" else 4)
            kept[f"{name} factor"] = n * 4
        if full and job.device == "cpu":
            kept[f"{name} result in float32"] = n * c * 4  # for the gradient of its weight

    def linear(name: str, channels: int, live: bool, *, kept_anyway: bool = False) -> bool:
        adapted = not full and name in job.adapted
        if (full or adapted) and not kept_anyway:
            kept[f"{name} input"] = n * channels * e
        if adapted:
            kept[f"{name} low-rank"] = n * job.rank * e
        return live or full or adapted

    live = full or not first
    norm("attention norm", live)
    flows = linear("qkv", c, live)
    flash = job.attention == "flash"
    if flows:
        kept["rotation tables"] = 2 * job.tokens * d * e
        if flash:
            repeated = h > g > 1  # shared heads are copied; otherwise v is a view, and all of qkv's result stays
            kept["queries and keys"] = n * (h + g) * d * e  # turned, in one tensor
            kept["keys and values repeated" if repeated else "qkv result"] = (
                n * (2 * h if repeated else h + 2 * g) * d * e
            )
            kept["attention result"] = n * h * d * e
            kept["log-sum-exp"] = n * h * 4
        else:
            kept["queries, keys, values in float32"] = n * 3 * h * d * 4
            kept["attention weights in float32"] = n * job.tokens * h * 4
    live = linear("out", h * d, flows, kept_anyway=flows and flash) or live
    norm("feed-forward norm", live)
    live = linear("gate_up", c, live)
    if live:
        kept["gate and up"] = n * 2 * f * e
        kept["silu(gate)"] = n * f * e
    linear("down", f, live)
    return kept


def activations(job: Job) -> int:
    """Bytes that the blocks keep from the forward to the backward pass, and the embedding."""
    config, n = job.model, job.batch * job.tokens
    ids = n * 8 if job.method == "full" else 0
    if job.checkpoint:
        return ids + config.layers * n * config.width * PRECISIONS[job.precision][0]
    first, other = (sum(block_tensors(job, first=first).values()) for first in (True, False))
    return ids + first + (config.layers - 1) * other


def last_norm(job: Job) -> int:
    """Bytes that the norm after the blocks keeps."""
    kept = block_tensors(job)
    return sum(size for name, size in kept.items() if name.startswith("attention norm"))


def logits_peak(job: Job) -> int:
    """Bytes at the peak of last norm, head and loss.

    All at once: logits, log-probabilities and a gradient of either, of which three are there at a time, in float32. In
    chunks: the gradients of the hidden states and of the head, which are made at once, and one chunk of logits.

    >>> llama3 = Config(vocabulary=128256, width=4096, context=8192)
    >>> [round(logits_peak(Job(llama3, tokens=4096, chunk=chunk)) / 1e9, 1) for chunk in (0, 512)]         # GB
    [6.4, 3.4]
    """
    e, v, c = PRECISIONS[job.precision][0], job.model.vocabulary, job.model.width
    n, rows = job.batch * job.tokens, job.batch * (job.tokens - 1)
    if job.chunk:
        chunk = min(job.chunk, rows)
        softmax = chunk * v * (8 if e == 4 else 10)
        copied = 4 if job.device == "cpu" and e != 4 else 0  # to add 16-bit numbers to float32
        loss = 2 * rows * c * e + v * c * 4 + max(softmax, chunk * v * e + v * c * (e + copied))
    else:
        loss = rows * v * 12 + (n * c * e if job.method == "full" else 0)
    norm_backward = 6 * n * c * 4 if job.device == "cpu" else 0  # in float32, operation by operation
    return max(last_norm(job) + loss, norm_backward)


def layer_peak(job: Job) -> int:
    """Bytes that the last block's backward pass holds besides what the blocks keep, at the worst of four moments.

    Gradients of activations, of which what they were made from is freed; of a weight; and all that checkpointing
    computes again. A head that is the embedding has a gradient that waits for the embedding's own, to the end.
    """
    config, n, e, full = job.model, job.batch * job.tokens, PRECISIONS[job.precision][0], job.method == "full"
    c, f = n * config.width * e, n * config.hidden * e
    kept = block_tensors(job)
    product = 0 if "down input" in kept else f
    moments = [c + 2 * f + product]  # in front of the down-projection: gradients of its input, silu(gate), up
    if job.method != "lora":  # at gate_up: the gradient of its weight, or the weight read out of 4 bits
        moments.append(2 * c - 2 * f + product + 2 * config.hidden * config.width * e)
    if job.attention == "naive":  # gradients of scores and weights; of the feed-forward layer everything is freed
        freed = list(kept.values())[list(kept).index("feed-forward norm input") :]
        moments.append(c + 8 * n * job.tokens * config.heads - sum(freed))
    waiting = config.vocabulary * config.width * e if full and config.tied else 0
    if not job.checkpoint:
        return waiting + max(moments)
    copied = job.device == "cpu" and e != 4
    if not full and "gate_up" in job.adapted:  # computed again: gate_up's result, the adapter's, and their sum
        moments.append(c + 2 * f + product + c * ("down" in job.adapted) + c * copied)
    own_input = 0 if copied else kept["attention norm input"]  # is kept by the block anyway
    return waiting + sum(kept.values()) - own_input + max(moments)


# The whole


def estimate(job: Job) -> Memory:
    """Bytes of every part, at the peak of a step whose gradients are already there, as with accumulation."""
    options: dict[str, Any] = {
        name: getattr(job, name) for name in ("precision", "optimizer", "zero", "ranks", "offload")
    }
    options |= weight_counts(job)
    return replace(
        states(**options),
        gathered=gathered(job),
        activations=activations(job),
        logits=logits_peak(job),
        layer=layer_peak(job),
    )


def budget(job: Job) -> dict[str, int]:
    """Bytes by part, in order, the parts that are there at the peak: their sum is `estimate(job).total`.

    >>> parts = budget(Job(Config(), batch=8, tokens=512, chunk=512))
    >>> {name: round(size / 2**20) for name, size in parts.items()}          # MiB
    {'weights': 49, 'gradients': 49, 'master': 99, 'optimizer': 197, 'activations': 618, 'logits': 56}
    """
    memory = estimate(job)
    parts = asdict(memory)
    del parts["host"], parts["layer" if memory.logits >= memory.layer else "logits"]
    return {name: size for name, size in parts.items() if size}


def fits(card_bytes: int, job: Job, *, vary: str = "batch", reserve: int = 0) -> int:
    """The largest batch (or `tokens`, to the model's context) that fits a card less `reserve` bytes; 0 if none does.

    >>> llama3 = Config(vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, head_size=128, hidden=14336,
    ...                 context=8192, tied=False)
    >>> job = Job(llama3, tokens=2048, chunk=512)
    >>> [fits(80 * 2**30, replace(job, method=method)) for method in ("full", "lora", "qlora")]
    [0, 5, 6]
    """
    if vary not in ("batch", "tokens"):
        raise ValueError(f"vary must be batch or tokens, got {vary}")

    def enough(size: int) -> bool:
        small = vary == "batch" or size <= job.model.context
        return small and estimate(replace(job, **{vary: size})).total <= card_bytes - reserve  # type: ignore[arg-type]

    low, high = 0, 1
    while enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def gpt_layer(
    s: int, b: int, h: int, a: int, *, tensor: int = 1, sequence: bool = False, selective: bool = False
) -> float:
    """Bytes of activations of a GPT layer in 16 bits as Korthikanti et al. count them: 34 s b h + 5 a s^2 b.

    LayerNorm, GELU and dropout, which our blocks have not. `tensor` ranks share the products (equation 2), with
    `sequence` parallelism the rest, too (equation 4); `selective` recomputes attention's square part.

    >>> round(1 - gpt_layer(2048, 1, 12288, 96, selective=True) / gpt_layer(2048, 1, 12288, 96), 2)       # GPT-3
    0.7
    """
    square = 0.0 if selective else 5 * a * s / h
    if sequence:
        return s * b * h * (34 + square) / tensor
    return s * b * h * (10 + (24 + square) / tensor)


# Measured


def saved_tensors(function: Callable[[], Any], model: nn.Module) -> list[tuple[tuple[int, ...], torch.dtype, int]]:
    """Shape, dtype and bytes of every memory block that autograd keeps in the call, the model's own tensors excepted.

    A view counts with all of the block it lies in, and each block once.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found, alive = [], []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)  # so that its address is not used again
            found.append((tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return found


def saved_bytes(function: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps in the call, the model's own tensors excepted."""
    return sum(size for _, _, size in saved_tensors(function, model))


def measured_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Memory:
    """Bytes of the weights, gradients and optimizer states that exist now."""

    def tensors(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for one in value:
                yield from tensors(one)

    kept = [x for state in optimizer.state.values() for value in state.values() for x in tensors(value)]
    return Memory(
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        optimizer=sum(x.nbytes for x in kept),
    )


@contextmanager
def checkpointed(model: Transformer) -> Iterator[Transformer]:
    """Inside, every block of the model keeps its input only, and runs forward again when its backward pass comes."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield model
    finally:
        for block in model.blocks:
            del block.forward
