"""What each way of splitting a training run holds and sends, before a machine is rented.

Idea:        Data parallelism splits the batch and sends gradients; ZeRO splits what it holds besides, and in stage 3
             sends weights as well: volumes in proportion to the weights, whatever the batch. Tensor, sequence, context
             and expert parallelism split the computation and send activations: volumes in proportion to the tokens.
             A pipeline sends least and waits instead. So the choice hangs on three ratios: states to memory, tokens a
             rank to weights, and computing speed to bandwidth.
Cost:        Numbers (times 2 bytes in bfloat16) that one rank sends in a step; ring algorithms, even loads.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, figure 1 and section 7; Shoeybi et al. 2019,
             arXiv:1909.08053, section 3; Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Liu et al. 2023, "Ring
             Attention", arXiv:2310.01889; Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509.
Production:  DeepSpeed's estimate_zero2_model_states_mem_needs and its zero3 sibling, for states.
Leaves out:  activations, latencies, overlap of messages with work, links of different speed inside and between nodes.
"""

STAGES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
WEIGHT, GRADIENT, STATES = 2, 2, 12  # bytes a parameter: bfloat16, bfloat16, float32 master and two moments


def share(ranks: int) -> float:
    """(N - 1)/N: the part of a buffer that a ring's reduce-scatter or all-gather sends. ValueError: no rank."""
    if ranks < 1:
        raise ValueError(f"there must be at least 1 rank, got {ranks}")
    return (ranks - 1) / ranks


def zero_bytes(stage: int, parameters: int | float, ranks: int) -> tuple[float, float, float]:
    """Bytes a rank of weights, gradients, and masters with moments; stage 0 is plain data parallelism.

    >>> [round(sum(zero_bytes(stage, 7.5e9, 64)) / 1e9, 1) for stage in range(4)]      # GB, figure 1 of the paper
    [120.0, 31.4, 16.6, 1.9]
    """
    if stage not in range(4):
        raise ValueError(f"the stage must be 0, 1, 2 or 3, got {stage}")
    states, gradients, weights = (ranks if stage >= first else 1 for first in (1, 2, 3))
    return WEIGHT * parameters / weights, GRADIENT * parameters / gradients, STATES * parameters / states


def zero_sent(stage: int, parameters: int | float, ranks: int, *, micro_batches: int = 1) -> float:
    """Numbers that a rank sends in a step of so many accumulated micro-batches.

    Stages 0 and 1 reduce once, at the end. From stage 2 on every micro-batch's gradients travel, and in stage 3 weights
    are gathered twice for each.

    >>> [round(zero_sent(stage, 1.0, 64), 2) for stage in range(4)], zero_sent(2, 1.0, 2, micro_batches=4)
    ([1.97, 1.97, 1.97, 2.95], 2.5)
    """
    gathers = 2 * micro_batches if stage == 3 else 1
    reductions = micro_batches if stage >= 2 else 1
    return (gathers + reductions) * share(ranks) * parameters


def smallest_stage(parameters: int | float, ranks: int, room: int | float) -> int | None:
    """The first stage whose states fit in `room` bytes a rank; None: split the model as well, or offload.

    >>> [smallest_stage(p, n, 60e9) for p, n in ((1e9, 8), (7e9, 8), (70e9, 64), (405e9, 64))]
    [0, 1, 3, None]
    """
    return next((stage for stage in range(4) if sum(zero_bytes(stage, parameters, ranks)) <= room), None)


def tensor_sent(tokens: int, width: int, ranks: int) -> float:
    """Numbers that a rank sends for one block: an all-reduce of the stream after attention and after the feed-forward
    layer, and two more backward. With sequence parallelism each is a reduce-scatter and an all-gather: as many.

    >>> tensor_sent(4096, 4096, 8) / (4096 * 4096)
    7.0
    """
    return 4 * 2 * share(ranks) * tokens * width


def bubble(stages: int, micro_batches: int, *, interleaved: int = 1) -> float:
    """The idle share of a pipeline, of all time, GPipe's and 1F1B's; `interleaved` pieces of the model on each rank.

    >>> [round(bubble(4, m), 3) for m in (1, 4, 8, 32)], round(bubble(4, 8, interleaved=2), 3)
    ([0.75, 0.429, 0.273, 0.086], 0.158)
    """
    return (stages - 1) / (interleaved * micro_batches + stages - 1)


def ring_attention_sent(tokens: int, kv_width: int, ranks: int) -> float:
    """Numbers that a rank sends for one block's forward pass: its share of keys and of values once around the ring.

    `tokens` are those of the whole sequence, `kv_width` is kv_heads x head_size.
    """
    return 2 * share(ranks) * tokens * kv_width


def ulysses_sent(tokens: int, width: int, kv_width: int, ranks: int) -> float:
    """Numbers that a rank sends for one block's forward pass: all-to-all from tokens to heads for queries, keys and
    values, and back for the result. `tokens` are those of the whole sequence."""
    return share(ranks) * tokens / ranks * 2 * (width + kv_width)


def expert_sent(tokens: int, width: int, chosen: int, ranks: int) -> float:
    """Numbers that a rank with so many tokens sends for the forward pass of one mixture: each token to `chosen` experts
    on even ranks, and as much back."""
    return 2 * share(ranks) * tokens * chosen * width


def break_even(stage: int, flops: int | float, bandwidth: int | float) -> float:
    """Tokens a rank and step at which sending takes as long as computing, for large N.

    Computing 6 n operations a token at `flops` a second, sending 2-byte numbers at `bandwidth` bytes a second: the
    number of weights n is in both and drops out.

    >>> round(break_even(3, 400e12, 50e9)), round(break_even(1, 400e12, 50e9))
    (8000, 5333)
    """
    return zero_sent(stage, 1.0, 2) / share(2) * 2 / bandwidth / (6 / flops)


def sending_share(stage: int, tokens: int | float, flops: int | float, bandwidth: int | float) -> float:
    """The part of a step's time that goes to sending, if nothing overlaps.

    >>> [round(sending_share(3, t, 400e12, 50e9), 2) for t in (1e3, 8e3, 64e3)]
    [0.89, 0.5, 0.11]
    """
    even = break_even(stage, flops, bandwidth)
    return even / (even + tokens)
