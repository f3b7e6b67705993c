"""Attention as the formula says it: build every score, softmax the row, average the values.

Idea:        softmax(q k^T / sqrt(d)) v. Each query scores all keys, the softmax turns a row of scores into
             weights that sum to 1, and the output is the weighted mean of the values.
Cost:        time O(t s d); memory O(t s) per head, for the scores and again for the weights.
Paper:       Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, equation 1.
Production:  torch.nn.functional.scaled_dot_product_attention.
Leaves out:  dropout, arbitrary masks. This is the oracle the other modules are tested against.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def visible(t: int, s: int, *, offset: int | None = None, device: torch.device | None = None) -> Bool[Tensor, "t s"]:
    """True where query i may look at key j: j <= i + offset.

    The default offset, s - t, aligns the two sequences at their ends: the last query sees the last key, as a
    key/value cache needs it. PyTorch's `is_causal` aligns at the start (offset 0); both agree when t = s.

    >>> visible(2, 3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    if offset is None:
        offset = s - t
    i = torch.arange(t, device=device)[:, None]
    j = torch.arange(s, device=device)
    return j <= i + offset


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
    offset: int | None = None,
) -> Float[Tensor, "b h t d"]:
    """The attention output, in the dtype of q. Query head i reads key/value head i // (h / g).

    A query that sees no key gets zeros, the value that every block-wise implementation can reproduce.

    >>> q = torch.zeros(1, 1, 1, 4); k = torch.zeros(1, 1, 2, 4)
    >>> v = torch.tensor([[[[1.0, 0, 0, 0], [3.0, 0, 0, 0]]]])
    >>> attention(q, k, v)[0, 0, 0, 0].item()       # equal scores: the plain mean of 1 and 3
    2.0
    """
    grouped = rearrange(q, "b (g r) t d -> b g r t d", g=k.shape[1])
    scores = grouped @ rearrange(k, "b g s d -> b g 1 d s") / math.sqrt(q.shape[-1])  # b g r t s
    if causal:
        mask = visible(q.shape[2], k.shape[2], offset=offset, device=q.device)
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a row of -inf only is 0/0
    out = weights @ rearrange(v, "b g s d -> b g 1 s d")
    return rearrange(out, "b g r t d -> b (g r) t d")
