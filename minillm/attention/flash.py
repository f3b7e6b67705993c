"""FlashAttention: exact attention that never builds the score matrix.

Idea:        Cut queries and keys into tiles that fit in fast memory. For a tile of queries walk over the
             tiles of keys with the online softmax, then divide once. For the backward pass store one number a
             row, the log-sum-exp, and compute each tile's weights again from q and k.
Cost:        4 t s d floating-point operations a head, as many as the naive way; backward more (5 products of
             tiles where stored weights would need 4). Extra memory O(t) instead of O(t s). Traffic to main
             memory O(t s d^2 / M) for fast memory of M elements, against O(t d + t s) for the naive way.
Paper:       Dao et al. 2022, arXiv:2205.14135, algorithm 1, theorems 1 and 2; Dao 2023, arXiv:2307.08691,
             algorithm 1 (outer loop over queries and unnormalised sums, as here).
Production:  torch.nn.functional.scaled_dot_product_attention; the flash-attn package, whose causal mask is
             aligned at the ends of both sequences, as here.
Leaves out:  dropout, sliding windows, sequences of unequal length in one batch. `flash_triton` is the same on
             a GPU.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minillm.attention.online_softmax import empty_state, finish, online_softmax_step


def block_scores(
    rows: Float[Tensor, "b g r n d"], keys: Float[Tensor, "b g 1 c d"], first_hidden: int | None
) -> Float[Tensor, "b g r n c"]:
    """Scores of n scaled queries and c keys. Row 0 sees the keys before `first_hidden`, each next row one more."""
    scores = rows @ keys.mT
    n, c = scores.shape[-2:]
    if first_hidden is not None and first_hidden < c:
        hidden = torch.ones(n, c, dtype=torch.bool, device=rows.device).triu(first_hidden)
        scores.masked_fill_(hidden, -math.inf)
    return scores


def flash_forward(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
    offset: int | None = None,
    block_q: int = 256,
    block_k: int = 512,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """Output (dtype of q) and log-sum-exp (float32, nats), from tiles of block_q x block_k scores.

    Causal: query i sees keys j <= i + offset, by default offset = s - t; tiles hidden entirely are skipped.
    """
    t, s = q.shape[2], k.shape[2]
    offset = s - t if offset is None else offset
    grouped = rearrange(q, "b (g r) t d -> b g r t d", g=k.shape[1])
    keys, values = k[:, :, None], v[:, :, None]
    out = torch.empty_like(grouped)
    lse = torch.empty(grouped.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for i in range(0, t, block_q):
        rows = grouped[..., i : i + block_q, :].to(lse.dtype) / math.sqrt(q.shape[-1])
        state = empty_state(rows, v.shape[-1])
        end = min(s, i + rows.shape[-2] + offset) if causal else s  # no query of this tile sees a later key
        for j in range(0, end, block_k):
            stop = min(j + block_k, end)
            first_hidden = i + offset + 1 - j if causal else None
            scores = block_scores(rows, keys[..., j:stop, :].to(rows.dtype), first_hidden)
            state = online_softmax_step(state, scores, values[..., j:stop, :])
        out[..., i : i + block_q, :], lse[..., i : i + block_q] = finish(state)
    return rearrange(out, "b g r t d -> b (g r) t d"), rearrange(lse, "b g r t -> b (g r) t")


def flash_backward(
    grad_out: Float[Tensor, "b h t d"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    out: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h t"],
    *,
    causal: bool = False,
    offset: int | None = None,
    block_q: int = 256,
    block_k: int = 512,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
    """Gradients of q, k, v from the saved output and log-sum-exp; each tile's weights are computed again.

    With P the weights and D = rowsum(dO * O): dV = P^T dO, dP = dO V^T, dS = P * (dP - D),
    dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).
    """
    t, s, scale = q.shape[2], k.shape[2], 1 / math.sqrt(q.shape[-1])
    offset = s - t if offset is None else offset
    split = "b (g r) t ... -> b g r t ..."
    qs, dos, outs, lses = (rearrange(x, split, g=k.shape[1]) for x in (q, grad_out, out, lse))
    dq = torch.zeros_like(qs, dtype=lse.dtype)
    dk, dv = torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    for i in range(0, t, block_q):
        rows = qs[..., i : i + block_q, :].to(lse.dtype) * scale
        do = dos[..., i : i + block_q, :].to(lse.dtype)
        delta = (do * outs[..., i : i + block_q, :]).sum(dim=-1, keepdim=True)
        row_lse = lses[..., i : i + block_q, None]
        row_lse = torch.where(row_lse == -math.inf, 0.0, row_lse)
        end = min(s, i + rows.shape[-2] + offset) if causal else s
        for j in range(0, end, block_k):
            stop = min(j + block_k, end)
            keys, values = (x[:, :, None, j:stop].to(lse.dtype) for x in (k, v))
            scores = block_scores(rows, keys, i + offset + 1 - j if causal else None)
            p = torch.exp(scores - row_lse)
            ds = p * (do @ values.mT - delta)
            dv[:, :, j:stop] += (p.mT @ do).sum(dim=2)
            dk[:, :, j:stop] += (ds.mT @ rows).sum(dim=2)  # rows carry the scale already
            dq[..., i : i + block_q, :] += ds @ keys * scale
    return rearrange(dq, "b g r t d -> b (g r) t d").to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and a log-sum-exp a row: nothing of size t x s waits for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, causal, offset):  # type: ignore[no-untyped-def]
        out, lse = flash_forward(q, k, v, causal=causal, offset=offset)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.offset = causal, offset
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        grads = flash_backward(grad_out, *ctx.saved_tensors, causal=ctx.causal, offset=ctx.offset)
        return *grads, None, None


def flash_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
    offset: int | None = None,
) -> Float[Tensor, "b h t d"]:
    """Attention like `naive.attention`, differentiable, without ever holding t x s scores.

    >>> q, k, v = torch.randn(3, 1, 2, 600, 16).unbind()
    >>> reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> bool((flash_attention(q, k, v, causal=True) - reference).abs().max() < 1e-5)
    True
    """
    check_shapes(q, k, v)
    return FlashAttention.apply(q, k, v, causal, offset)


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that are not b h t d, b g s d, b g s d of one dtype with g dividing h."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape:
        raise ValueError(f"attention needs q as b h t d and k, v alike as b g s d, {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v need the same batch and head size, {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"h must be a multiple of the key/value heads g, got h={q.shape[1]}, g={k.shape[1]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
