# mypy: allow-untyped-defs
# (mypy has no types for a kernel's parameters)
"""FlashAttention for GPUs: the same as `flash`, each tile a Triton program.

Idea:        One program owns one tile of queries and walks over the keys with the online softmax, so scores
             exist only on the chip. The backward pass computes each tile's weights again from the log-sum-exp,
             twice: one kernel owns tiles of queries (dQ), one owns tiles of keys (dK, dV). Every sum has one
             owner: no atomic additions, and the same input gives the same bits.
Cost:        4 t s d floating-point operations a head forward, 14 t s d backward (7 products of tiles, where
             one shared kernel would need 5), half of that when causal. Extra memory: 4 bytes a query for the
             log-sum-exp, 4 more during the backward pass.
Paper:       Dao et al. 2022, arXiv:2205.14135 (tiling, recomputation); Dao 2023, arXiv:2307.08691, algorithms
             1 and 2; Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax).
Production:  torch.nn.functional.scaled_dot_product_attention on CUDA; the flash-attn package, whose causal
             mask is aligned at the ends of both sequences, as here.
Leaves out:  dropout, sliding windows, split keys for decoding, tuned tile sizes, tiles without a mask inside
             the triangle, Hopper's asynchronous copies, GPUs before Ampere.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.attention.flash import check_shapes

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "minillm.attention.flash_triton needs the package triton: on Linux, "
        "pip install -c requirements.lock -e .[triton] (CUDA builds of torch bring it)"
    ) from error

LOG2E = tl.constexpr(1 / math.log(2))  # exp(x) = exp2(x * LOG2E); exp2 is what the hardware has
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MAX_HEAD_SIZE = 256


@triton.jit
def _program(ROWS: tl.constexpr):
    """First row, head and batch index of this program's tile; indices are int64, b h t d may exceed 2**31."""
    return tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)


@triton.jit
def _tile(strides, batch, head, start, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Positions of rows start .. start + ROWS of one head, and which of them exist."""
    row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    at = batch * strides[0] + head * strides[1] + row * strides[2] + column * strides[3]
    return at, (row < count) & (column < D)


@triton.jit
def _load(x, strides, batch, head, start, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at, exists = _tile(strides, batch, head, start, count, ROWS, D, WIDTH)
    return tl.load(x + at, mask=exists, other=0.0)


@triton.jit
def _store(x, strides, value, batch, head, start, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at, exists = _tile(strides, batch, head, start, count, ROWS, D, WIDTH)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=exists)


@triton.jit
def _dot(a, b, acc=None):
    """a b + acc in float32, from tiles in their own dtype; float32 tiles are not shortened to tf32."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _finite(x):
    """-inf becomes 0: a row that has seen no key must not compute -inf - (-inf) = NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _scores(a, b, query, key, t, s, offset, scale, CAUSAL: tl.constexpr):
    """Scores a b^T / sqrt(d) in units of ln 2; -inf where a key is hidden from a query or neither exists."""
    visible = (query < t) & (key < s)
    if CAUSAL:
        visible = visible & (key <= query + offset)
    scores = _dot(a, tl.trans(b)) * (scale * LOG2E)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _online_softmax_step(m, l, acc, scores, v):
    """The running maximum, sum and unnormalised output of each row after one more tile of keys."""
    new_m = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - _finite(new_m)[:, None])
    rescale = tl.exp2(m - _finite(new_m))
    acc = _dot(p.to(v.dtype), v, acc * rescale[:, None])
    return new_m, l * rescale + tl.sum(p, 1), acc


@triton.jit
def _end(start_t, t, s, offset, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first key that no query of the tile sees: the tiles from there on are skipped."""
    end = s
    if CAUSAL:
        end = tl.minimum(s, tl.minimum(start_t + BLOCK_T, t) + offset)
    return end


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, heads, group, t, s, offset, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    start_t, head, batch = _program(BLOCK_T)
    query = start_t + tl.arange(0, BLOCK_T)
    q_tile = _load(q, q_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    for start_s in range(0, _end(start_t, t, s, offset, CAUSAL, BLOCK_T), BLOCK_S):
        key = start_s + tl.arange(0, BLOCK_S)
        k_tile = _load(k, k_strides, batch, head // group, start_s, s, BLOCK_S, D, WIDTH)
        v_tile = _load(v, v_strides, batch, head // group, start_s, s, BLOCK_S, D, WIDTH)
        scores = _scores(q_tile, k_tile, query[:, None], key[None, :], t, s, offset, scale, CAUSAL)
        m, l, acc = _online_softmax_step(m, l, acc, scores, v_tile)
    l = tl.where(l == 0.0, 1.0, l)  # no key seen: the output is 0 / 1, the log-sum-exp m = -inf
    _store(out, out_strides, acc / l[:, None], batch, head, start_t, t, BLOCK_T, D, WIDTH)
    tl.store(lse + (batch * heads + head) * t + query, (m + tl.log2(l)) / LOG2E, mask=query < t)


@triton.jit
def _dq_kernel(
    grad, q, k, v, out, lse, delta, dq, grad_strides, q_strides, k_strides, v_strides, out_strides, dq_strides,
    heads, group, t, s, offset, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries. Leaves delta = rowsum(dO * O), which is rowsum(P * dP), to the next kernel."""
    start_t, head, batch = _program(BLOCK_T)
    query = start_t + tl.arange(0, BLOCK_T)
    q_tile = _load(q, q_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
    grad_tile = _load(grad, grad_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
    out_tile = _load(out, out_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
    delta_row = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    at = (batch * heads + head) * t + query
    tl.store(delta + at, delta_row, mask=query < t)
    lse_row = _finite(tl.load(lse + at, mask=query < t, other=0.0)) * LOG2E
    acc = tl.zeros((BLOCK_T, WIDTH), tl.float32)
    for start_s in range(0, _end(start_t, t, s, offset, CAUSAL, BLOCK_T), BLOCK_S):
        key = start_s + tl.arange(0, BLOCK_S)
        k_tile = _load(k, k_strides, batch, head // group, start_s, s, BLOCK_S, D, WIDTH)
        v_tile = _load(v, v_strides, batch, head // group, start_s, s, BLOCK_S, D, WIDTH)
        scores = _scores(q_tile, k_tile, query[:, None], key[None, :], t, s, offset, scale, CAUSAL)
        dp = _dot(grad_tile, tl.trans(v_tile))
        ds = tl.exp2(scores - lse_row[:, None]) * (dp - delta_row[:, None])
        acc = _dot(ds.to(k_tile.dtype), k_tile, acc)
    _store(dq, dq_strides, acc * scale, batch, head, start_t, t, BLOCK_T, D, WIDTH)


@triton.jit
def _dkv_kernel(
    grad, q, k, v, lse, delta, dk, dv, grad_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides,
    heads, group, t, s, offset, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads that read it. Here keys are the rows of a tile."""
    start_s, kv_head, batch = _program(BLOCK_S)
    key = start_s + tl.arange(0, BLOCK_S)
    k_tile = _load(k, k_strides, batch, kv_head, start_s, s, BLOCK_S, D, WIDTH)
    v_tile = _load(v, v_strides, batch, kv_head, start_s, s, BLOCK_S, D, WIDTH)
    dk_acc = tl.zeros((BLOCK_S, WIDTH), tl.float32)
    dv_acc = tl.zeros((BLOCK_S, WIDTH), tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(start_s - offset, 0)  # earlier queries see none of these keys, or none at all
    for member in range(group):
        head = kv_head * group + member
        for start_t in range(first, t, BLOCK_T):
            query = start_t + tl.arange(0, BLOCK_T)
            at = (batch * heads + head) * t + query
            lse_row = tl.load(lse + at, mask=query < t, other=0.0) * LOG2E
            delta_row = tl.load(delta + at, mask=query < t, other=0.0)
            q_tile = _load(q, q_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
            grad_tile = _load(grad, grad_strides, batch, head, start_t, t, BLOCK_T, D, WIDTH)
            scores = _scores(k_tile, q_tile, query[None, :], key[:, None], t, s, offset, scale, CAUSAL)
            p = tl.exp2(scores - lse_row[None, :])
            dv_acc = _dot(p.to(v_tile.dtype), grad_tile, dv_acc)
            dp = _dot(v_tile, tl.trans(grad_tile))
            ds = p * (dp - delta_row[None, :])
            dk_acc = _dot(ds.to(k_tile.dtype), q_tile, dk_acc)
    _store(dk, dk_strides, dk_acc * scale, batch, kv_head, start_s, s, BLOCK_S, D, WIDTH)
    _store(dv, dv_strides, dv_acc, batch, kv_head, start_s, s, BLOCK_S, D, WIDTH)


def tile_sizes(d: int, dtype: torch.dtype, *, backward: bool) -> tuple[int, int, int, int]:
    """Queries a tile, keys a tile, warps, pipeline stages: a program then needs at most 97 KiB of shared memory.

    Ada gives a program 99 KiB, A100 163 KiB, H100 227 KiB; compiled for Blackwell's B200 (227 KiB) it is 129 KiB.
    """
    if dtype == torch.float32:  # no tensor cores: products of exact float32 use many registers
        return (32, 16, 4, 1) if d <= 64 else (16, 16, 4, 1)
    if backward:
        return (64, 64, 4, 2) if d <= 64 else (64, 64, 8, 2) if d <= 128 else (32, 32, 8, 2)
    return (128, 64, 8, 2) if d <= 128 else (64, 32, 8, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shapes(q, k, v)
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"flash_triton takes float32, float16 or bfloat16, got {q.dtype}; flash takes it")
    if not 1 <= q.shape[3] <= MAX_HEAD_SIZE:
        raise ValueError(f"flash_triton takes head sizes 1 to {MAX_HEAD_SIZE}, got {q.shape[3]}; flash takes more")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v need one device, got {q.device}, {k.device}, {v.device}")
    if not q.is_cuda and not INTERPRETED.value:
        raise ValueError(
            f"flash_triton runs on CUDA tensors, got {q.device}; call flash, or set TRITON_INTERPRET=1 before the "
            "first import of triton to step through the kernels on the CPU"
        )


def _settings(q: Tensor, k: Tensor, causal: bool, offset: int | None, *, backward: bool) -> dict[str, Any]:
    """What all kernels are told, by parameter name, and how to compile them."""
    (_, h, t, d), (_, g, s, _) = q.shape, k.shape
    offset = max(-t, min(s - t if offset is None else offset, s))  # beyond these the mask stays, int32 would not
    width = max(16, triton.next_power_of_2(d))  # a product of tiles is at least 16 wide
    block_t, block_s, warps, stages = tile_sizes(d, q.dtype, backward=backward)
    return dict(
        heads=h, group=h // g, t=t, s=s, offset=offset, scale=d**-0.5,
        CAUSAL=causal, D=d, WIDTH=width, BLOCK_T=block_t, BLOCK_S=block_s,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def flash_forward(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
    offset: int | None = None,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h t"]]:
    """Output (dtype of q) and log-sum-exp (float32, nats); 0 and -inf for a query that sees no key."""
    _check(q, k, v)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    settings = _settings(q, k, causal, offset, backward=False)
    grid = (triton.cdiv(q.shape[2], settings["BLOCK_T"]), q.shape[1], q.shape[0])
    with torch.cuda.device_of(q):
        strides = [x.stride() for x in (q, k, v, out)]
        _forward_kernel[grid](q, k, v, out, lse, *strides, **settings)
    return out, lse


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
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
    """Gradients of q, k and v, in their dtypes, from the saved output and log-sum-exp."""
    _check(q, k, v)
    lse = lse.contiguous()
    dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
    settings = _settings(q, k, causal, offset, backward=True)
    query_grid = (triton.cdiv(q.shape[2], settings["BLOCK_T"]), q.shape[1], q.shape[0])
    key_grid = (triton.cdiv(k.shape[2], settings["BLOCK_S"]), k.shape[1], k.shape[0])
    with torch.cuda.device_of(q):
        strides = [x.stride() for x in (grad_out, q, k, v, out, dq)]
        _dq_kernel[query_grid](grad_out, q, k, v, out, lse, delta, dq, *strides, **settings)
        strides = [x.stride() for x in (grad_out, q, k, v, dk, dv)]
        _dkv_kernel[key_grid](grad_out, q, k, v, lse, delta, dk, dv, *strides, **settings)
    return dq, dk, dv


class FlashAttention(torch.autograd.Function):
    """Saves q, k, v, the output and one log-sum-exp a row, like `flash.FlashAttention`."""

    @staticmethod
    def forward(ctx, q, k, v, causal, offset):
        out, lse = flash_forward(q, k, v, causal=causal, offset=offset)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.offset = causal, offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
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
    """Attention like `naive.attention`, differentiable once, on a GPU, without t x s scores in its memory."""
    return FlashAttention.apply(q, k, v, causal, offset)
