"""The exercise of attention/flash: attention over blocks of keys with an online softmax, and its wrong versions."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.study.checker import forbidden_ops, no_large_tensor
from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: attention/flash
import math

import torch


def attention_in_blocks(q, k, v, *, block_size=128):
    """Attention of every query over all keys, looking at `block_size` keys at a time.

    q is [..., t, d]; k and v are [..., s, d]; s need not be a multiple of block_size.
    Return (out, lse): out [..., t, d] in the dtype of q, and lse [..., t], the log-sum-exp
    of each row's scaled scores. Never hold more than t x block_size scores. Scores of
    +-10,000 must work, and the running statistics are float32 when the inputs are half precision.
    Write the softmax yourself: no torch.softmax, logsumexp or scaled_dot_product_attention.
    """
    raise NotImplementedError
'''


def oracle(q, k, v, *, block_size=128):  # type: ignore[no-untyped-def]
    """The definition in float64, in one piece."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    out = torch.softmax(scores, dim=-1) @ v.double()
    return out.to(q.dtype), torch.logsumexp(scores, dim=-1).to(torch.promote_types(q.dtype, torch.float32))


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def tensors(*shape: int, t: int, s: int, d: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
        shapes = [(*shape, t, d), (*shape, s, d), (*shape, s, d)]
        q, k, v = (torch.randn(x, generator=generator) for x in shapes)
        return q * size, k, v

    low = torch.full((3, 4), 64.0), -78 - torch.arange(6.0)[:, None].expand(6, 4) / 64, torch.arange(24.0).view(6, 4)
    half = torch.zeros(1, 8, dtype=torch.float16), torch.zeros(2560, 8, dtype=torch.float16)
    return [
        Case("one block", tensors(t=3, s=4, d=8), {"block_size": 4}, "all keys fit in one block"),
        Case("even blocks", tensors(t=5, s=12, d=8), {"block_size": 4}, "three blocks of four keys"),
        Case("ragged", tensors(t=5, s=11, d=8), {"block_size": 4}, "eleven keys in blocks of four"),
        Case("one key at a time", tensors(t=4, s=6, d=8), {"block_size": 1}, "blocks of a single key"),
        Case("block larger than s", tensors(t=4, s=6, d=8), {"block_size": 64}, "a block size beyond the keys"),
        Case("heads", tensors(2, 3, t=5, s=9, d=16), {"block_size": 4}, "a batch of 2 with 3 heads"),
        Case("large scores", tensors(t=5, s=12, d=8, size=1e4), {"block_size": 4}, "scores of the order of 10,000"),
        Case("all scores very low", low, {"block_size": 2}, "every score is near -10,000"),
        Case("half precision", (*half, torch.ones_like(half[1])), {"block_size": 1}, "2,560 equal float16 keys"),
    ]


def long_inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(512, 16, generator=generator) for _ in range(3)), {"block_size": 32}


def held_together(function) -> str | None:  # type: ignore[no-untyped-def]
    """Scores kept block by block are t x s together, and no tensor of them is large: all that is alive is counted."""
    t, s, d = 256, 4096, 8
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Memory(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # or torch imports its compiler first

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal most
            out = func(*args, **(kwargs or {}))
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            made += [x for ref in alive if (x := ref()) is not None]
            alive[:] = map(weakref.ref, made)
            memory = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() // x.element_size() for x in made}
            most = max(most, sum(memory.values()))
            return out

    q, k, v = torch.ones(t, d), torch.ones(s, d), torch.ones(s, d)
    with Memory():
        function(q, k, v, block_size=64)
    much = "At one moment it holds more than t x s numbers, the scores of all blocks, say: use a block and let it go."
    return much if most > t * s else None


STEP = "state = online_softmax_step(state, rows @ keys.mT, v[..., start : start + block_size, :])"
LOCAL = (
    "local = online_softmax_step(empty_state(q, v.shape[-1]), rows @ keys.mT, v[..., start : start + block_size, :])"
)
FINISH = f"{STEP}\n    out, lse = finish(state)"
UNGUARDED = "out, lse = state.acc / state.l[..., None], state.m + torch.log(state.l)"  # 0/0 is nan, as anybody has it
NO_MAXIMUM = f"""p = torch.exp(rows @ keys.mT)
        acc = state.acc + p @ v[..., start : start + block_size, :].to(p.dtype)
        state = State(torch.zeros_like(state.m), state.l + p.sum(dim=-1), acc)
    {UNGUARDED}"""
FROM_ZERO = f"""state = state._replace(m=state.m.clamp(min=0.0))
        {STEP}
    {UNGUARDED}"""
NOT_SHORT = f"""if keys.shape[-2] < block_size:
            break
        {STEP}
    {UNGUARDED}"""
LSE_GUARD = "shift = torch.where(m == -math.inf, 0.0, m)  # a row with no key yet: exp(-inf - 0) = 0, not exp(nan)"
MAXIMUM = "m = torch.maximum(state.m, scores.amax(dim=-1))"
SCALE = "rows = q.to(state.m.dtype) / math.sqrt(q.shape[-1])"
ACC = "acc = state.acc * rescale[..., None] + p @ v.to(p.dtype)"
FIRST_HIDDEN = "first_hidden = i + offset + 1 - j if causal else None"

EXERCISE = Exercise(
    question="attention/flash",
    module="attention/online_softmax",
    function="attention_in_blocks",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("out", "lse"),
    rtol=1e-4,  # float32 with scores up to 10,000: the score itself is rounded by about 1e-3 of a unit in the exponent
    atol=1e-5,
    wrong=(
        Wrong(
            "output not rescaled",
            ACC,
            "acc = state.acc + p @ v.to(p.dtype)",
            "The output sum keeps the old maximum: when m grows, what was added before must shrink by "
            "exp(m_old - m_new).",
        ),
        Wrong(
            "normaliser not rescaled",
            "state.l * rescale + p.sum(dim=-1)",
            "state.l + p.sum(dim=-1)",
            "The output sum is rescaled but the normaliser l is not: both were taken relative to the old maximum.",
        ),
        Wrong(
            "maximum of the block alone",
            MAXIMUM,
            "m = scores.amax(dim=-1)",
            "m is the maximum of this block, not the running one: when a block's scores lie far below the old maximum, "
            "exp(m_old - m_new) overflows.",
        ),
        Wrong(
            "no maximum",
            FINISH,
            NO_MAXIMUM,
            "Exponentials are taken without subtracting the running maximum: large scores overflow to inf and the "
            "output becomes nan.",
        ),
        Wrong(
            "maximum from zero",
            FINISH,
            FROM_ZERO,
            "The running maximum starts at a number such as 0 instead of -inf: where all scores are far below it, "
            "every exponential becomes 0, and the output is 0/0 = nan.",
        ),
        Wrong(
            "no scale",
            SCALE,
            "rows = q.to(state.m.dtype)",
            "The scores are not divided by the square root of the head size.",
        ),
        Wrong(
            "scale by d",
            SCALE,
            "rows = q.to(state.m.dtype) / q.shape[-1]",
            "The scores are divided by the head size itself, not by its square root.",
        ),
        Wrong(
            "lse is the maximum",
            "return out, state.m + torch.log(state.l)",
            "return out, state.m",
            "The second result is the maximum m; the log-sum-exp is m + log(l).",
        ),
        Wrong(
            "lse without the maximum",
            "return out, state.m + torch.log(state.l)",
            "return out, torch.log(state.l)",
            "The second result is log(l) alone; l was taken relative to m, so the log-sum-exp is m + log(l).",
        ),
        Wrong(
            "ragged block dropped",
            "range(0, k.shape[-2], block_size)",
            "range(0, k.shape[-2] - block_size + 1, block_size)",
            "The keys after the last full block are never read.",
        ),
        Wrong(
            "short block dropped, 0/0 without a full one",
            FINISH,
            NOT_SHORT,
            "The keys after the last full block are never read; with fewer keys than block_size none is, and 0/0 is "
            "nan.",
        ),
        Wrong(
            "block outputs averaged",
            STEP,
            f"{LOCAL}\n        state = State(local.m, state.l + 1, state.acc + finish(local)[0])",
            "Each block got a softmax of its own and the block outputs were averaged: blocks must be weighted by their "
            "share of the whole normaliser, exp(lse_block - lse).",
        ),
        Wrong(
            "block outputs summed",
            STEP,
            f"{LOCAL}\n        state = State(local.m, torch.ones_like(state.l), state.acc + finish(local)[0])",
            "Each block got a softmax of its own and the block outputs were added up: the weights of a row then sum to "
            "the number of blocks instead of 1.",
        ),
        Wrong(
            "never divided",
            "out = state.acc / torch.where(state.l == 0, 1.0, state.l)[..., None]",
            "out = state.acc",
            "The output sum is never divided by the normaliser l.",
        ),
        Wrong(
            "divided in every block and at the end",
            ACC,
            ACC.replace("= ", "= (", 1) + ") / (state.l * rescale + p.sum(dim=-1))[..., None]",
            "The output is divided by l in every block and again at the end: keep it unnormalised until the end, "
            "or multiply by the old l before adding.",
        ),
        Wrong(
            "factor upside down",
            "rescale = torch.exp(state.m - shift)",
            "rescale = torch.exp((shift - state.m).nan_to_num(posinf=0.0))",
            "The factor is exp(m_new - m_old); old sums must shrink when the maximum grows: exp(m_old - m_new).",
        ),
        Wrong(
            "factor upside down from -inf",
            "rescale = torch.exp(state.m - shift)",
            "rescale = torch.exp(shift - state.m)",
            "All is nan from the first block on, as when the factor is exp(m_new - m_old): with m_old = -inf that is "
            "inf, and 0 * inf is nan. Old sums must shrink when the maximum grows: exp(m_old - m_new).",
        ),
        Wrong(
            "statistics in half precision",
            "dtype = torch.promote_types(q.dtype, torch.float32)",
            "dtype = q.dtype",
            "m, l and the output sum are kept in the inputs' half precision: a float16 sum of ones stops at 2,048.",
        ),
    ),
    also_wrong=(
        Wrong(
            "no guard for rows without keys",
            LSE_GUARD,
            "shift = m",
            "exp(-inf - (-inf)) is nan: guard a row without keys.",
        ),
        Wrong(
            "merge adds normalisers",
            "a.l * wa + b.l * wb",
            "a.l + b.l",
            "Normalisers of two parts have different maxima.",
        ),
        Wrong(
            "merge averages outputs",
            "out = out_a * torch.exp(lse_a - shift)[..., None] + out_b * torch.exp(lse_b - shift)[..., None]",
            "out = (out_a + out_b) / 2",
            "Parts are weighted by exp(lse_part - lse), not equally.",
        ),
        Wrong(
            "mask off by one",
            FIRST_HIDDEN,
            FIRST_HIDDEN.replace(" + 1", ""),
            "A query sees itself.",
            module="attention/flash",
        ),
        Wrong(
            "mask aligned at the start",
            FIRST_HIDDEN,
            FIRST_HIDDEN.replace(" + offset", ""),
            "With a cache the mask is aligned at the ends, offset s - t.",
            module="attention/flash",
        ),
        Wrong(
            "mask of the tile transposed",
            ".triu(first_hidden)",
            ".tril(first_hidden)",
            "The past is hidden.",
            module="attention/flash",
        ),
        Wrong(
            "last tile cut short",
            "end = min(s, i + rows.shape[-2] + offset) if causal else s  # no query",
            "end = min(s, i + offset + 1) if causal else s  # no query",
            "The last query of the tile, not the first, decides where the keys end.",
            module="attention/flash",
        ),
        Wrong(
            "hidden tiles computed",
            "end = min(s, i + rows.shape[-2] + offset) if causal else s  # no query",
            "end = s  # no query",
            "Tiles above the diagonal are skipped: half of the work.",
            module="attention/flash",
        ),
        Wrong(
            "head taken modulo the groups",
            '"b (g r) t d -> b g r t d", g=k.shape[1])\n    keys',
            '"b (r g) t d -> b g r t d", g=k.shape[1])\n    keys',
            "Query head i reads group i // (h / g), not i % g.",
            module="attention/flash",
        ),
        Wrong(
            "backward without D",
            "(do @ values.mT - delta)",
            "(do @ values.mT)",
            "The softmax's own derivative subtracts D = rowsum(dO * O).",
            module="attention/flash",
        ),
        Wrong(
            "dq not scaled",
            "+= ds @ keys * scale",
            "+= ds @ keys",
            "dQ carries the factor 1 / sqrt(d).",
            module="attention/flash",
        ),
        Wrong(
            "dk scaled twice",
            "(ds.mT @ rows).sum(dim=2)",
            "(ds.mT @ rows).sum(dim=2) * scale",
            "The scaled queries carry the factor already.",
            module="attention/flash",
        ),
        Wrong(
            "dv from dS", "(p.mT @ do).sum(dim=2)", "(ds.mT @ do).sum(dim=2)", "dV = P^T dO.", module="attention/flash"
        ),
        Wrong(
            "weights of the tile alone",
            "p = torch.exp(scores - row_lse)",
            "p = torch.softmax(scores, dim=-1)",
            "The weights of a tile are exp(S - LSE) with the row's LSE.",
            module="attention/flash",
        ),
        Wrong(
            "backward without the guard",
            "row_lse = torch.where(row_lse == -math.inf, 0.0, row_lse)",
            "pass",
            "exp(-inf - (-inf)) is nan in the backward pass too.",
            module="attention/flash",
        ),
        Wrong(
            "gradients of the group not summed",
            "(p.mT @ do).sum(dim=2)",
            "(p.mT @ do).mean(dim=2)",
            "All query heads of a group add to the gradient of their shared values.",
            module="attention/flash",
        ),
    ),
    probes=(
        no_large_tensor(
            long_inputs,
            512 * 32,
            "A tensor of more than t x block_size elements was built: take the keys block by block.",
        ),
        Probe("all blocks held", held_together),
        forbidden_ops(
            long_inputs,
            ("_scaled_dot_product", "_softmax", "logsumexp"),
            "The library did the softmax: write the running maximum and sums yourself.",
        ),
    ),
    hints=(
        "Start with m = -inf, l = 0 and acc = 0 for every query, in float32 or better.",
        "For each block: scores, then m_new = max(m, largest score of the block), then p = exp(scores - m_new).",
        "Everything added so far was relative to the old maximum: multiply l and acc by exp(m - m_new) before adding.",
        "After the last block: out = acc / l and lse = m + log(l).",
    ),
)
