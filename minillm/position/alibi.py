"""ALiBi: no position embedding, but a penalty on each score that grows with the distance.

Idea:        Subtract slope x distance from every attention score. Each head has its own fixed slope, from steep (sees
             the last few tokens) to flat (sees far back), in a geometric sequence. Nothing is learned and no angle is
             ever new, so a model trained on short texts keeps working on long ones; what a head cannot do is point
             at an exact distance.
Cost:        t s additions a head; as a tensor O(h t s) memory. Kernels add it inside a tile: flash-attn takes the
             slopes alone.
Paper:       Press, Smith and Lewis 2021, "Train Short, Test Long", arXiv:2108.12409, section 3.
Production:  transformers Bloom (build_alibi_tensor), whose bias slope x j differs by a constant in each row, which
             the softmax does not see.
Leaves out:  a form for attention in both directions.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def slopes(h: int, *, device: torch.device | None = None) -> Float[Tensor, " {h}"]:
    """2^(-8/h), 2^(-16/h), ..., 2^-8: the slope of each head, float32, in units of score per token.

    If h is not a power of two: the slopes of the next lower power n, then every other one of those of 2n.

    >>> slopes(3)
    tensor([0.0625, 0.0039, 0.2500])
    """
    if h < 1:
        raise ValueError(f"there must be at least one head, got h={h}")
    n = 2 ** (h.bit_length() - 1)
    exponents = torch.arange(1, n + 1, device=device) / n
    between = torch.arange(1, 2 * n, 2, device=device)[: h - n] / (2 * n)
    return 2.0 ** (-8 * torch.cat([exponents, between]))


def bias(t: int, s: int, h: int, *, device: torch.device | None = None) -> Float[Tensor, "{h} {t} {s}"]:
    """What is added to the scaled scores: -slope x distance for the past, -inf for the future, float32.

    It holds the causal mask too, so it is the whole `attn_mask` of scaled_dot_product_attention. The two sequences
    are aligned at their ends: the last query stands at the last key, as a key/value cache needs it.

    >>> bias(2, 3, 1)[0] * 256
    tensor([[-1., -0., -inf],
            [-2., -1., -0.]])
    """
    if t > s:
        raise ValueError(f"causal attention needs t <= s, got t={t}, s={s}")
    i = torch.arange(s - t, s, device=device)[:, None]
    distance = i - torch.arange(s, device=device)
    return (-slopes(h, device=device)[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
