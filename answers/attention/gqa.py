"""The exercise of attention/gqa: attention whose query heads share key/value heads, and its wrong versions."""

import math

import torch

from minillm.study.checker import forbidden_ops, no_large_tensor
from minillm.study.exercise import Case, Exercise, Wrong

STUB = '''\
# exercise: attention/gqa
import math

import torch


def grouped_attention(q, k, v, *, causal=False):
    """Attention in which h query heads share g key/value heads; h is a multiple of g.

    q is [b, h, t, d]; k and v are [b, g, s, d]. Neighbouring query heads share: with r = h / g the first
    r read key/value head 0, the next r head 1. Return [b, h, t, d] in the dtype of q. With causal=True
    the last query sees every key, the one before it all but the last (t <= s). Do not copy k or v for
    each query head: work with q as g groups of r heads, without scaled_dot_product_attention. Scores
    of +-10,000 must work.
    """
    raise NotImplementedError
'''


def oracle(q, k, v, *, causal=False):  # type: ignore[no-untyped-def]
    """The definition in float64, one query head after the other."""
    heads = []
    for i in range(q.shape[1]):
        j = i * k.shape[1] // q.shape[1]
        scores = q[:, i].double() @ k[:, j].double().mT / math.sqrt(q.shape[-1])
        if causal:
            t, s = scores.shape[-2:]
            scores[:, torch.ones(t, s, dtype=torch.bool).triu(s - t + 1)] = -math.inf
        heads.append(torch.softmax(scores, dim=-1) @ v[:, j].double())
    return torch.stack(heads, dim=1).to(q.dtype)


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def tensors(b: int, h: int, g: int, t: int, s: int, d: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
        shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d)]
        q, k, v = (torch.randn(x, generator=generator) for x in shapes)
        return q * size, k, v

    causal = {"causal": True}
    low = torch.tensor([-40.25, -40.0, -40.25, 40.25])[:, None].expand(1, 2, 4, 4).clone()
    future = torch.full((1, 4, 2, 4), 128.0), low, torch.arange(32.0).view(1, 2, 4, 4)
    half = torch.arange(64.0).view(1, 2, 4, 8).half()
    means = torch.zeros(1, 4, 2, 8).half(), half, half
    return [
        Case("multi-head", tensors(1, 4, 4, t=3, s=5, d=8), {}, "a key/value head for every query head"),
        Case("multi-query", tensors(1, 4, 1, t=3, s=5, d=8), {}, "one key/value head for all"),
        Case("two groups", tensors(1, 4, 2, t=3, s=5, d=8), {}, "four query heads, two key/value heads"),
        Case("groups of three", tensors(2, 6, 2, t=4, s=7, d=16), {}, "a batch of 2, six query heads, two groups"),
        Case("causal", tensors(1, 6, 3, t=5, s=5, d=8), causal, "as many queries as keys, causal"),
        Case("causal with a cache", tensors(2, 4, 2, t=2, s=6, d=8), causal, "two new queries after four cached keys"),
        Case("one new token", tensors(1, 8, 2, t=1, s=9, d=4), causal, "a decoding step: the query sees all nine keys"),
        Case("large scores", tensors(1, 4, 2, t=3, s=6, d=8, size=1e4), {}, "scores of the order of 10,000"),
        Case("the largest score hidden", future, causal, "visible scores near -10,000, a hidden one of +10,000"),
        Case("half precision", means, {}, "equal scores in float16: plain means"),
    ]


def decoding_step() -> tuple[tuple[torch.Tensor, ...], dict[str, bool]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 16, 1, 64), (1, 4, 256, 64), (1, 4, 256, 64)]
    return tuple(torch.randn(x, generator=generator) for x in shapes), {}


CHECK = "check_shapes(q, k, v)"
SPLIT = '"b (g r) t d -> b g r t d", g=k.shape[1])'
SCORES = 'scores = einsum(grouped, k, "b g r t d, b g s d -> b g r t s")'
OUT = 'out = einsum(weights, v, "b g r t s, b g s d -> b g r t d")'
SCALED = "rearrange(q / math.sqrt(q.shape[-1]), "
VISIBLE = "visible(q.shape[2], k.shape[2], device"
MASK = "scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], device=q.device), -math.inf)"
WEIGHTS = f"    if causal:\n        {MASK}\n    weights = torch.softmax(scores, dim=-1)"
MASKED_LATE = (
    "    weights = torch.softmax(scores, dim=-1)\n    if causal:\n"
    "        weights = weights * visible(q.shape[2], k.shape[2], device=q.device)\n        weights = weights / "
)
TILED = "r = q.shape[1] // k.shape[1]\n    k, v = k.repeat(1, r, 1, 1), v.repeat(1, r, 1, 1)"

EXERCISE = Exercise(
    question="attention/gqa",
    module="attention/gqa",
    function="grouped_attention",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("out",),
    rtol=1e-4,  # float32 with scores up to 10,000: the score itself is rounded by about 1e-3 of a unit in the exponent
    atol=1e-5,
    wrong=(
        Wrong(
            "heads dealt in turn",
            CHECK,
            f"{CHECK}\n    {TILED}",
            "Query head i reads key/value head i % g, as after k.repeat. Neighbours share a head: i // (h / g), which "
            "is repeat_interleave.",
        ),
        Wrong(
            "queries dealt in turn",
            SPLIT,
            SPLIT.replace("(g r)", "(r g)"),
            "The query heads were split as (r, g), not as (g, r): group 0 is the first r heads, not every g-th one.",
        ),
        Wrong(
            "result's heads in another order",
            'return rearrange(out, "b g r t d -> b (g r) t d")',
            'return rearrange(out, "b g r t d -> b (r g) t d")',
            "The result's heads come back in another order than the queries went in: merge them as (g, r).",
        ),
        Wrong(
            "multi-query by mistake",
            CHECK,
            f"{CHECK}\n    k, v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)",
            "Every query head reads key/value head 0: that is multi-query attention.",
        ),
        Wrong(
            "heads averaged",
            CHECK,
            f"{CHECK}\n    k, v = (x.mean(dim=1, keepdim=True).expand_as(x) for x in (k, v))",
            "The key/value heads were averaged into one. Pooling is for weights when a model is converted, not for "
            "the attention itself.",
        ),
        Wrong(
            "keys of the first group",
            SCORES,
            SCORES.replace("k,", "k[:, :1].expand_as(k),", 1),
            "Every query head is scored against the keys of head 0; the values are those of its own group.",
        ),
        Wrong(
            "values of the first group",
            OUT,
            OUT.replace("v,", "v[:, :1].expand_as(v),", 1),
            "Every group sums the values of the first one; the weights are right.",
        ),
        Wrong(
            "queries of a group averaged",
            SCORES,
            f"grouped = grouped.mean(dim=2, keepdim=True).expand_as(grouped)\n    {SCORES}",
            "The queries of a group were averaged. They share keys and values, but each keeps weights of its own.",
        ),
        Wrong(
            "no scale",
            SCALED,
            "rearrange(q, ",
            "The scores are not divided by the square root of the head size.",
        ),
        Wrong(
            "scale by d",
            SCALED,
            "rearrange(q / q.shape[-1], ",
            "The scores are divided by the head size itself, not by its square root.",
        ),
        Wrong(
            "scale by the width",
            SCALED,
            "rearrange(q / math.sqrt(q.shape[1] * q.shape[-1]), ",
            "The scores are divided by the square root of the model's width h * d; it is the square root of the head "
            "size d.",
        ),
        Wrong(
            "softmax over queries",
            "torch.softmax(scores, dim=-1)",
            "torch.softmax(scores, dim=-2)",
            "The softmax runs over the queries; the weights of one query over its keys must sum to 1.",
        ),
        Wrong(
            "mask aligned at the start",
            VISIBLE,
            VISIBLE.replace("device", "offset=0, device"),
            "With a cache the last query sees the last key: the mask is aligned at the ends, offset s - t.",
        ),
        Wrong(
            "a query does not see itself",
            VISIBLE,
            VISIBLE.replace("device", "offset=k.shape[2] - q.shape[2] - 1, device"),
            "A query must see the key of its own position; this mask also hides that one.",
        ),
        Wrong(
            "hidden scores set to 0",
            "device=q.device), -math.inf)",
            "device=q.device), 0.0)",
            "exp(0) is 1: a hidden score must be -inf, not 0.",
        ),
        Wrong(
            "mask inverted",
            "~visible(",
            "visible(",
            "The mask is inverted: what a query may see is hidden from it, and the last query, which sees every key, "
            "is left with none. masked_fill hides where its mask is True.",
        ),
        *(
            Wrong(
                name,
                WEIGHTS,
                MASKED_LATE + total,
                "The exponentials are taken relative to a maximum over hidden keys too: where a hidden score is far "
                "larger, those of all visible keys become 0. Mask the scores before the softmax.",
            )
            for name, total in (
                ("maximum over hidden keys", "weights.sum(dim=-1, keepdim=True)"),
                ("maximum over hidden keys, guarded", "weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)"),
            )
        ),
        Wrong(
            "a large number instead of infinity",
            "device=q.device), -math.inf)",
            "device=q.device), -1e4)",
            "A large negative number hides scores instead of -inf: if it is put in their place, real scores can be "
            "lower; if it is added, the hidden ones can be larger by more than that.",
        ),
        Wrong(
            "causal ignored",
            "    if causal:\n        scores",
            "    if False:\n        scores",
            "The future is visible although causal=True.",
        ),
    ),
    also_wrong=(
        Wrong(
            "keys repeated",
            SCORES,
            "keys = repeat_heads(k, grouped.shape[2]).unflatten(1, (k.shape[1], -1))\n    "
            'scores = einsum(grouped, keys, "b g r t d, b g r s d -> b g r t s")',
            "The result is right, but k was copied for every query head: the memory that grouping saves is spent.",
        ),
        Wrong(
            "no guard for queries without keys",
            "weights = weights.nan_to_num(0.0)",
            "pass",
            "A row of -inf only gives 0/0: a query before every key needs a guard.",
        ),
        Wrong(
            "repeated in turn",
            'repeat(k, "b g s d -> b (g r) s d", r=r)',
            'repeat(k, "b g s d -> b (r g) s d", r=r)',
            "That is repeat; the heads of a group are neighbours, which is repeat_interleave.",
        ),
        Wrong(
            "pooled across groups",
            '"(g r d) ... -> (g d) ..."',
            '"(r g d) ... -> (g d) ..."',
            "Neighbouring heads form a group; here every g-th head was pooled.",
        ),
        Wrong(
            "summed instead of averaged",
            '"mean", g=g',
            '"sum", g=g',
            "Pooling is the mean: with the sum all scores grow by h / g.",
        ),
        Wrong(
            "cache of keys alone",
            "return 2 * layers",
            "return layers",
            "Keys and values are both kept: a factor of 2.",
        ),
    ),
    probes=(
        no_large_tensor(
            decoding_step,
            4 * 256 * 64,  # a copy of k as it is, say a scaled or transposed one, is allowed; r copies are not
            "k or v was copied for every query head: the result may be right, but that spends the memory that sharing "
            "saves. expand is free, but reshape and a broadcast product copy what it made; multiply each shared head "
            "with its whole group of queries.",
        ),
        forbidden_ops(
            decoding_step,
            ("_scaled_dot_product",),
            "The library did the attention: write scores, softmax and weighted sum yourself.",
        ),
    ),
    hints=(
        "With r = h // g, q.reshape(b, g, r, t, d) puts the heads that share a key/value head beside each other.",
        'Scores: torch.einsum("bgrtd,bgsd->bgrts", q, k) / sqrt(d). The letter r is in q only, so k is not copied.',
        "Causal: key j is hidden from query i when j > i + s - t. Put -inf there, then take the softmax over s.",
        'Output: torch.einsum("bgrts,bgsd->bgrtd", weights, v), then reshape to b, h, t, d.',
    ),
)
