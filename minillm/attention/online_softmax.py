"""Online softmax: a softmax-weighted mean computed block by block, in any order, exactly.

Idea:        For each query keep three things: the largest score so far m, the sum l of exponentials taken
             relative to m, and the sum acc of values under the same weights. A new block may raise m;
             multiplying l and acc by exp(m_old - m_new) repairs everything added before. At the end acc / l
             is the softmax-weighted mean. Two states over disjoint keys merge the same way, so blocks, split
             caches and ring attention all combine.
Cost:        2 s d multiply-adds a query, as without blocks; memory O(d) a query instead of O(s).
Paper:       Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (m and l); Rabe and Staats 2021,
             arXiv:2112.05682 (the output sum as well); Dao 2023, arXiv:2307.08691, section 3.1 (acc is
             divided once, at the end).
Production:  torch.nn.functional.scaled_dot_product_attention; torch.logsumexp for the second result.
Leaves out:  the tiling over queries, masks and gradients: `flash`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class State(NamedTuple):
    """What is known of each query after some of the keys: float32 (float64 for float64 inputs)."""

    m: Float[Tensor, "*b t"]  # largest score so far, -inf before any visible key
    l: Float[Tensor, "*b t"]  # sum of exp(score - m)
    acc: Float[Tensor, "*b t d"]  # sum of exp(score - m) v, not yet divided by l


def empty_state(q: Float[Tensor, "*b t d"], d: int) -> State:
    """The state of queries that have seen no key: the neutral element of `merge`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    m = torch.full(q.shape[:-1], -math.inf, dtype=dtype, device=q.device)
    return State(m, torch.zeros_like(m), torch.zeros(*q.shape[:-1], d, dtype=dtype, device=q.device))


def online_softmax_step(state: State, scores: Float[Tensor, "*b t s"], v: Float[Tensor, "*#b s d"]) -> State:
    """The state after one more block of keys: the whole trick. A masked score is -inf.

    >>> s = empty_state(torch.zeros(1, 4), 1)
    >>> for score, value in [(0.0, 1.0), (math.log(3), 5.0)]:
    ...     s = online_softmax_step(s, torch.tensor([[score]]), torch.tensor([[value]]))
    >>> round((s.acc / s.l[..., None]).item(), 4)        # weights 1/4 and 3/4: (1 + 3 * 5) / 4
    4.0
    """
    m = torch.maximum(state.m, scores.amax(dim=-1))
    shift = torch.where(m == -math.inf, 0.0, m)  # a row with no key yet: exp(-inf - 0) = 0, not exp(nan)
    p = torch.exp(scores - shift[..., None])
    rescale = torch.exp(state.m - shift)
    acc = state.acc * rescale[..., None] + p @ v.to(p.dtype)
    return State(m, state.l * rescale + p.sum(dim=-1), acc)


def merge(a: State, b: State) -> State:
    """The state over the union of two disjoint sets of keys: associative, commutative, exact."""
    m = torch.maximum(a.m, b.m)
    shift = torch.where(m == -math.inf, 0.0, m)
    wa, wb = torch.exp(a.m - shift), torch.exp(b.m - shift)
    return State(m, a.l * wa + b.l * wb, a.acc * wa[..., None] + b.acc * wb[..., None])


def finish(state: State) -> tuple[Float[Tensor, "*b t d"], Float[Tensor, "*b t"]]:
    """The attention output and the log-sum-exp of each row's scores in nats; 0 and -inf for no key at all."""
    out = state.acc / torch.where(state.l == 0, 1.0, state.l)[..., None]
    return out, state.m + torch.log(state.l)


def merge_outputs(
    out_a: Float[Tensor, "*b t d"],
    lse_a: Float[Tensor, "*b t"],
    out_b: Float[Tensor, "*b t d"],
    lse_b: Float[Tensor, "*b t"],
) -> tuple[Float[Tensor, "*b t d"], Float[Tensor, "*b t"]]:
    """Two finished attentions over disjoint keys made one: weights exp(lse_a - lse) and exp(lse_b - lse).

    This is how split-key decoding and ring attention combine what different workers computed.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse == -math.inf, 0.0, lse)
    out = out_a * torch.exp(lse_a - shift)[..., None] + out_b * torch.exp(lse_b - shift)[..., None]
    return out, lse


def attention_in_blocks(
    q: Float[Tensor, "*b t d"],
    k: Float[Tensor, "*b s d"],
    v: Float[Tensor, "*b s d"],
    *,
    block_size: int = 128,
) -> tuple[Float[Tensor, "*b t d"], Float[Tensor, "*b t"]]:
    """Output and log-sum-exp of every query over all keys, `block_size` at a time (the last may be short)."""
    state = empty_state(q, v.shape[-1])
    rows = q.to(state.m.dtype) / math.sqrt(q.shape[-1])
    for start in range(0, k.shape[-2], block_size):
        keys = k[..., start : start + block_size, :].to(rows.dtype)
        state = online_softmax_step(state, rows @ keys.mT, v[..., start : start + block_size, :])
    out, lse = finish(state)
    return out.to(q.dtype), lse
