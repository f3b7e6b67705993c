"""Causal attention from positions: a query sees the keys that do not come after it, itself included.

Idea:        Every token has a position. With a key/value cache the t new queries stand at the end of the s keys, at
             positions s - t to s - 1, and a query at position p sees the keys at 0 to p. The mask is this comparison
             and nothing else, so one function does for training (t = s), for a prompt behind a cache and for a single
             new token. Hidden scores become -inf before the softmax, so that the weights of a row still sum to 1.
Cost:        time and memory O(t s) a head, as without a mask: the hidden half is computed too.
Paper:       Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
Production:  torch.nn.functional.scaled_dot_product_attention with torch.nn.attention.bias.causal_lower_right; its
             `is_causal` alone aligns the mask at the start (causal_upper_left), which is the same only for t = s.
Leaves out:  shared heads (`gqa`), skipping what is hidden (`flash`), padding.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def seen(queries: Int[Tensor, " t"], keys: Int[Tensor, " s"]) -> Bool[Tensor, "t s"]:
    """True where a key's position is not after the query's.

    >>> seen(torch.tensor([2, 3]), torch.arange(4)).int().tolist()      # two new tokens behind a cache of two
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    return keys <= queries[:, None]


def causal_attention(
    q: Float[Tensor, "*b t d"], k: Float[Tensor, "*b s d"], v: Float[Tensor, "*b s e"]
) -> Float[Tensor, "*b t e"]:
    """Attention of the last t of s tokens over everything up to themselves, in the dtype of q.

    >>> q, v = torch.zeros(2, 4), torch.tensor([[1.0], [3.0], [8.0]])       # equal scores: plain means
    >>> causal_attention(q, torch.zeros(3, 4), v).flatten()                 # of 1 and 3; of 1, 3 and 8
    tensor([2., 4.])
    """
    t, s = q.shape[-2], k.shape[-2]
    if t > s:
        raise ValueError(f"the queries are the last t of the s tokens: t <= s is needed, got t={t}, s={s}")
    positions = torch.arange(s, device=q.device)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # *b t s
    scores = scores.masked_fill(~seen(positions[s - t :], positions), -math.inf)
    return torch.softmax(scores, dim=-1) @ v
