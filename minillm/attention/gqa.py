"""Grouped-query attention: several query heads share one key/value head.

Idea:        Keep h query heads, but only g key/value heads: query heads of a group read the same keys and values.
             With g = h this is multi-head attention, with g = 1 multi-query attention. The key/value cache, and what
             a decoding step reads from memory, shrink by h / g; the queries of a group stay different, so do their
             weights. The shared head is never copied: its group of queries is multiplied with it at once.
Cost:        time O(t s d) a query head, as before; only the projections of k and v get cheaper. Cache:
             2 layers g d tokens values. Decoding is limited by reading that cache; prefill is not.
Paper:       Ainslie et al. 2023, "GQA", arXiv:2305.13245, sections 2.1 (pooling) and 2.2; Shazeer 2019,
             arXiv:1911.02150 (one head for all).
Production:  torch.nn.functional.scaled_dot_product_attention(enable_gqa=True); transformers repeat_kv.
Leaves out:  what avoids the score matrix (`flash`), which groups in the same way.
"""

import math

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from minillm.attention.flash import check_shapes
from minillm.attention.naive import visible


def grouped_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
) -> Float[Tensor, "b h t d"]:
    """Attention in which query head i reads key/value head i // (h / g), without a copy of k or v.

    Causal is aligned at the ends: the last query sees the last key. A query that sees no key gets zeros.

    >>> q, k, v = torch.zeros(1, 4, 1, 2), torch.zeros(1, 2, 3, 2), torch.ones(1, 2, 3, 2)
    >>> v[0, 1] = 5
    >>> grouped_attention(q, k, v)[0, :, 0, 0]            # heads 0, 1 read the first values, 2, 3 the second
    tensor([1., 1., 5., 5.])
    """
    check_shapes(q, k, v)
    grouped = rearrange(q / math.sqrt(q.shape[-1]), "b (g r) t d -> b g r t d", g=k.shape[1])
    scores = einsum(grouped, k, "b g r t d, b g s d -> b g r t s")
    if causal:
        scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], device=q.device), -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if causal and q.shape[2] > k.shape[2]:
        weights = weights.nan_to_num(0.0)  # the first queries are before every key: rows of -inf only
    out = einsum(weights, v, "b g r t s, b g s d -> b g r t d")
    return rearrange(out, "b g r t d -> b (g r) t d")


def repeat_heads(k: Float[Tensor, "b g s d"], r: int) -> Float[Tensor, "b h s d"]:
    """Every key/value head r times in a row: after it, any multi-head attention is a grouped one.

    It costs what grouping saves: r times the memory, though not in the cache. For training that can still be the
    fastest way on a CPU.

    >>> repeat_heads(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), 2).flatten()
    tensor([1., 1., 2., 2.])
    """
    return repeat(k, "b g s d -> b (g r) s d", r=r)


def pool_heads(weight: Float[Tensor, " rows *c"], h: int, g: int) -> Float[Tensor, " pooled *c"]:
    """A key or value projection of h heads (rows h d) made one of g heads: the mean over each group.

    The start of a conversion; the model is trained on for a while afterwards (5% of the steps in the paper).

    >>> pool_heads(torch.tensor([1.0, 3.0, 10.0, 30.0]), h=4, g=2)
    tensor([ 2., 20.])
    """
    if h % g or weight.shape[0] % h:
        raise ValueError(f"g must divide h, and h the rows, got g={g}, h={h}, {weight.shape[0]} rows")
    return reduce(weight, "(g r d) ... -> (g d) ...", "mean", g=g, r=h // g)


def cache_bytes(
    *, layers: int, kv_heads: int, head_size: int, tokens: int, batch: int = 1, bytes_per_value: int = 2
) -> int:
    """Bytes of the key/value cache: keys and values, of every layer, for every token.

    >>> shape = dict(layers=32, head_size=128, tokens=4096)
    >>> [cache_bytes(kv_heads=g, **shape) // 2**20 for g in (32, 8, 1)]      # MiB in bfloat16
    [2048, 512, 64]
    """
    return 2 * layers * kv_heads * head_size * tokens * batch * bytes_per_value
