"""Multi-head attention with the source spelled out: self-, masked and cross-attention are one operator.

Idea:        Queries come from one sequence, keys and values from another. Two independent choices make all the kinds:
             where keys and values come from (the same sequence: self-attention; another one, such as an encoder's
             output: cross-attention) and who may look at whom (everyone, only the past, no padding).
Cost:        projections (2 t + 2 s) c^2, scores and sums 2 t s c multiply-adds. Keys and values of a fixed source are
             computed once and kept.
Paper:       Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, sections 3.2.2 and 3.2.3.
Production:  torch.nn.MultiheadAttention (batch_first, without biases); same meaning of key_padding.
Leaves out:  biases, dropout, and the key/value cache; decoder-only models have no cross-attention.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.attention.naive import visible


def split_heads(x: Float[Tensor, "b t c"], weight: Float[Tensor, "rows c"], heads: int) -> Float[Tensor, "b h t d"]:
    """x projected by `weight`, and the result cut into heads of d = rows / heads channels."""
    return rearrange(F.linear(x, weight), "b t (h d) -> b h t d", h=heads)


def may_look(
    t: int, s: int, *, causal: bool, key_padding: Bool[Tensor, "b s"] | None, device: torch.device | None = None
) -> Bool[Tensor, "..."] | None:
    """True where query i may look at key j, to be broadcast to b h t s; None if everyone may look everywhere.

    >>> may_look(2, 2, causal=True, key_padding=torch.tensor([[True, False]])).int().tolist()   # the first is padding
    [[[[0, 0], [0, 1]]]]
    """
    past = visible(t, s, device=device) if causal else None
    real = None if key_padding is None else ~key_padding[:, None, None, :]
    if past is None or real is None:
        return real if past is None else past
    return past & real


def multi_head(
    x_q: Float[Tensor, "b t c"],
    x_kv: Float[Tensor, "b s m"],
    wq: Float[Tensor, "rows c"],
    wk: Float[Tensor, "rows m"],
    wv: Float[Tensor, "rows m"],
    wo: Float[Tensor, "out rows"],
    *,
    heads: int,
    causal: bool = False,
    key_padding: Bool[Tensor, "b s"] | None = None,
) -> Float[Tensor, "b t out"]:
    """What each token of x_q gathers from x_kv. Self-attention is `multi_head(x, x, ...)`.

    Weights are as in nn.Linear: rows are output channels. `key_padding` is True at keys that nobody may see. Causal is
    aligned at the ends; a query that sees no key gathers zeros.

    >>> x, eye = torch.eye(2)[None], torch.eye(2)
    >>> multi_head(x, x, 0 * eye, eye, eye, eye, heads=1, causal=True)[0]       # no preference: the mean of the past
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    check_weights(x_q, x_kv, wq, wk, wv, wo, heads, key_padding)
    q, k, v = split_heads(x_q, wq, heads), split_heads(x_kv, wk, heads), split_heads(x_kv, wv, heads)
    t, s = q.shape[2], k.shape[2]
    plain = causal and t == s and key_padding is None  # PyTorch's own mask starts at the start: the same if t = s
    mask = None if plain else may_look(t, s, causal=causal, key_padding=key_padding, device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain)
    return F.linear(rearrange(out, "b h t d -> b t (h d)"), wo)


def check_weights(
    x_q: Tensor, x_kv: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, heads: int, key_padding: Tensor | None
) -> None:
    """Refuse sources, weights and padding that do not fit together."""
    rows = wq.shape[0]
    if x_q.ndim != 3 or x_kv.ndim != 3 or x_q.shape[0] != x_kv.shape[0]:
        raise ValueError(f"sources are b t c with one batch size, got {tuple(x_q.shape)} and {tuple(x_kv.shape)}")
    fits = wq.shape[1] == x_q.shape[2] and wk.shape == wv.shape == (rows, x_kv.shape[2]) and wo.shape[1] == rows
    if not fits:
        got = ", ".join(
            f"{name} {tuple(w.shape)}" for name, w in zip(("wq", "wk", "wv", "wo"), (wq, wk, wv, wo), strict=True)
        )
        raise ValueError(f"weights do not fit queries of {x_q.shape[2]} and keys of {x_kv.shape[2]} channels: {got}")
    if rows % heads:
        raise ValueError(f"the rows of wq must be a multiple of the heads, got {rows} rows, {heads} heads")
    if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != x_kv.shape[:2]):
        got = f"{key_padding.dtype} {tuple(key_padding.shape)}"
        raise ValueError(f"key_padding is bool {tuple(x_kv.shape[:2])}, True where there is padding, got {got}")
