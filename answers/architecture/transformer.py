"""The exercise of architecture/transformer: causal attention behind a key/value cache, and its wrong versions."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: architecture/transformer
import math

import torch


def causal_attention(q, k, v):
    """Attention of the last t of s tokens over everything up to themselves.

    q is [..., t, d], k is [..., s, d], v is [..., s, e], with t <= s: the queries are the newest
    t tokens, the keys are those of the cache followed by theirs. A token sees itself and all
    before it. Return [..., t, e] in the dtype of q. Scores of +-30,000 must work. All queries at
    once: no loop over them.
    """
    raise NotImplementedError
'''


def oracle(q, k, v):  # type: ignore[no-untyped-def]
    """The definition in float64, one query after the other: each reads the keys up to its own and no others."""
    t, s = q.shape[-2], k.shape[-2]
    rows = []
    for i in range(t):
        end = s - t + i + 1
        scores = (k[..., :end, :].double() @ q[..., i, :, None].double()).squeeze(-1) / math.sqrt(q.shape[-1])
        rows.append((torch.softmax(scores, dim=-1)[..., None] * v[..., :end, :].double()).sum(dim=-2))
    return torch.stack(rows, dim=-2).to(q.dtype)


def inputs(
    *batch: int, t: int, s: int, d: int = 8, e: int = 8, size: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Random queries, keys and values; `size` multiplies the queries."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(x, generator=generator) for x in ((*batch, t, d), (*batch, s, d), (*batch, s, e)))
    return size * q, k, v


def low() -> tuple[torch.Tensor, ...]:
    """Every score lies between -32,768 and -32,764; all of their parts are exact in float32."""
    q, _, v = inputs(t=2, s=5, d=4)
    steps = torch.arange(20).view(5, 4) * 7 % 3
    return torch.full_like(q, 128.0), steps / 128 - 128, v


def future() -> tuple[torch.Tensor, ...]:
    """What the first query sees scores near -30,464; the key that is hidden from it scores +30,464."""
    k = torch.tensor([-119.0, -118.0, -119.0, 119.0])[:, None].expand(4, 4).clone()
    return torch.full((2, 4), 128.0), k, inputs(t=2, s=4)[2]


def make_cases() -> list[Case]:
    return [
        Case("no cache", inputs(t=5, s=5), {}, "as many queries as keys, as in training"),
        Case("behind a cache", inputs(t=2, s=6), {}, "two new tokens after four cached ones"),
        Case("one new token", inputs(t=1, s=7), {}, "a decoding step: the query sees all seven keys"),
        Case("the first token", inputs(t=1, s=1), {}, "one query, one key: the output is its value"),
        Case("heads", inputs(2, 3, t=3, s=8, d=16), {}, "a batch of 2 with 3 heads"),
        Case("values of another size", inputs(t=3, s=5, d=8, e=5), {}, "e = 5 while d = 8"),
        Case("large scores", inputs(t=3, s=6, size=1e4), {}, "scores of the order of 10,000"),
        Case("all scores very low", low(), {}, "every score is near -32,768, whatever the query sees"),
        Case("the largest score hidden", future(), {}, "visible scores near -30,000, a hidden one of +30,000"),
    ]


def loops(function) -> str | None:  # type: ignore[no-untyped-def]
    """A loop over the queries takes eight times the operations for eight times as many of them."""
    count = 0

    class Counter(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # or torch imports its compiler first

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for t in (8, 64):
        count, made = 0, inputs(t=t, s=70, seed=2)
        with Counter():
            function(*made)
        counts.append(count)
    few, many = counts
    return "It loops over the queries: give all t rows one mask and one product." if many > 2 * few else None


POSITIONS = "seen(positions[s - t :], positions)"
SCORES = "scores = q @ k.mT / math.sqrt(q.shape[-1])  # *b t s"
MASK = f"scores = scores.masked_fill(~{POSITIONS}, -math.inf)"
OUT = "return torch.softmax(scores, dim=-1) @ v"
INVERTED = f"torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill({POSITIONS}, -math.inf), dim=-1)"
SEEN = "return keys <= queries[:, None]"

ATTENTION = "x = x + self.attention(rms_norm(x, self.attention_norm, eps=eps), cos, sin, cache, visible)"
ROTATE = "q, k = apply_rope(qk, cos, sin).split((h, g), dim=1)  # queries and keys in one pass"
ROWS = "rows = slice(start, start + t) if positions is None else positions"
DECODER = "architecture/transformer"
FILES = "architecture/pretrained"
STACK = "architecture/residual"

EXERCISE = Exercise(
    question="architecture/transformer",
    module="attention/causal",
    function="causal_attention",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("out",),
    rtol=1e-4,  # float32; scores of 10,000 are rounded by 1e-3, and the nearest two of a row here are further apart
    atol=1e-5,
    wrong=(
        Wrong(
            "mask aligned at the start",
            POSITIONS,
            "seen(positions[:t], positions)",
            "The mask is aligned at the top left: new query i sees keys 0 to i, as if there were no cache. The queries "
            "are the last tokens, so query i stands at position s - t + i. (PyTorch's is_causal=True does the same.)",
        ),
        Wrong(
            "square mask",
            POSITIONS,
            "torch.ones(t, t, dtype=torch.bool).tril()",
            "The mask is t x t, the scores are t x s: with a cache there are more keys than queries. Build it from the "
            "positions of both.",
        ),
        Wrong(
            "only the new keys",
            POSITIONS,
            "(seen(positions[s - t :], positions) & (positions >= s - t))",
            "The new tokens see each other but not the cache: everything before them is visible too.",
        ),
        Wrong(
            "a token does not see itself",
            SEEN,
            "return keys < queries[:, None]",
            "A query sees the keys strictly before it, so the first token sees nothing and its softmax is 0/0 = nan. "
            "It sees itself as well.",
        ),
        Wrong(
            "one key too many",
            SEEN,
            "return keys <= queries[:, None] + 1",
            "Each query sees one key after its own: in training that is the token it has to predict.",
        ),
        Wrong(
            "the past hidden",
            SEEN,
            "return keys >= queries[:, None]",
            "The mask is the wrong way round: it hides the past and shows the future.",
        ),
        *(
            Wrong(
                name,
                OUT,
                f"return {weights} @ v",
                "The mask is inverted: what a query may see is hidden from it. masked_fill hides where its mask is "
                "True, scaled_dot_product_attention where it is False.",
            )
            for name, weights in (
                ("mask inverted", INVERTED),
                ("mask inverted, no key gives zeros", f"{INVERTED}.nan_to_num(0.0)"),
            )
        ),
        Wrong(
            "no mask",
            MASK,
            "pass",
            "There is no mask: every query sees all keys, the later ones included.",
        ),
        Wrong(
            "hidden scores set to zero",
            MASK,
            f"scores = scores.masked_fill(~{POSITIONS}, 0.0)",
            "Hidden scores are set to 0, but e^0 = 1: they keep a weight. Set them to -inf before the softmax.",
        ),
        Wrong(
            "masked after the softmax",
            OUT,
            f"return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).masked_fill(~{POSITIONS}, 0.0) @ v",
            "The mask comes after the softmax: the weights left over sum to less than 1, and how much less depends on "
            "the future. Mask the scores first.",
        ),
        *(
            Wrong(
                name,
                OUT,
                f"p = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).masked_fill(~{POSITIONS}, 0.0)\n"
                f"    return p / {total} @ v",
                "The exponentials are taken relative to a maximum over hidden keys too: where a hidden score is far "
                "larger, those of all visible keys become 0. Mask the scores first.",
            )
            for name, total in (
                ("maximum over hidden keys", "p.sum(dim=-1, keepdim=True)"),
                ("maximum over hidden keys, guarded", "p.sum(dim=-1, keepdim=True).clamp(min=1e-9)"),
            )
        ),
        Wrong(
            "a large number added",
            MASK,
            f"scores = scores - 1e4 * ~{POSITIONS}",
            "A large negative number is added to hidden scores, and they can be larger by more than that: use -inf.",
        ),
        Wrong(
            "a large number instead of infinity",
            MASK,
            f"scores = scores.masked_fill(~{POSITIONS}, -1e4)",
            "Hidden scores are set to a large negative number, and real scores can be lower: use -inf.",
        ),
        Wrong(
            "no scale",
            SCORES,
            "scores = q @ k.mT",
            "The scores are not divided by sqrt(d): their variance grows with d and the softmax saturates.",
        ),
        Wrong(
            "scale by d",
            SCORES,
            "scores = q @ k.mT / q.shape[-1]",
            "The scores are divided by d instead of sqrt(d).",
        ),
        Wrong(
            "softmax over the queries",
            OUT,
            "return torch.softmax(scores, dim=-2).nan_to_num(0.0) @ v",
            "The softmax runs over the queries (dim=-2): each query's weights over the keys must sum to 1.",
        ),
    ),
    also_wrong=(
        Wrong(
            "more queries than keys let through",
            "if t > s:",
            "if t > s + 1:",
            "Queries are among the tokens whose keys are there: more of them than keys is a mistake of the caller.",
        ),
        Wrong(
            "decoder: mask aligned at the start",
            "mask = causal_mask(t, s, device=q.device)",
            "mask = causal_mask(t, s, offset=0, device=q.device)",
            "With a cache the queries are the last of the keys: query i sees key j if j <= i + s - t, not if j <= i.",
            module=DECODER,
        ),
        Wrong(
            "decoder: no causal mask in training",
            "is_causal=mask is None)",
            "is_causal=False)",
            "Without the mask every token sees the one that it must predict.",
            module=DECODER,
        ),
        Wrong(
            "decoder: positions start again with each call",
            ROWS,
            "rows = slice(0, t) if positions is None else positions",
            "The new tokens stand after those in the cache: their positions go on from its length.",
            module=DECODER,
        ),
        Wrong(
            "decoder: values rotated",
            ROTATE,
            f"v = apply_rope(v, cos, sin)\n        {ROTATE}",
            "Only queries and keys are turned: scores need the distance, values must not depend on the position.",
            module=DECODER,
        ),
        Wrong(
            "decoder: cache overwritten",
            "self.k[layer, :, :, self.length : end] = k",
            "self.k[layer, :, :, : k.shape[2]] = k",
            "New keys go behind the old ones, not over them.",
            module=DECODER,
        ),
        Wrong(
            "decoder: no final norm",
            "return rms_norm(x, self.norm, eps=self.config.eps)",
            "return x",
            "A pre-norm stream is normalised once more before the head.",
            module=DECODER,
        ),
        Wrong(
            "decoder: normalised stream carried on",
            ATTENTION,
            "x = rms_norm(x, self.attention_norm, eps=eps)\n        "
            "x = x + self.attention(x, cos, sin, cache, visible)",
            "What is added to is the stream itself; only what the layer reads is normalised (pre-norm).",
            module=DECODER,
        ),
        Wrong(
            "decoder: no residual around attention",
            ATTENTION,
            ATTENTION.replace("x = x + self", "x = self"),
            "The layer's output is added to the stream.",
            module=DECODER,
        ),
        Wrong(
            "decoder: feed-forward beside attention",
            "normed = rms_norm(x, self.feedforward_norm, eps=eps)",
            "normed = rms_norm(x - self.attention(rms_norm(x, self.attention_norm, eps=eps), cos, sin, None, visible), "
            "self.feedforward_norm, eps=eps)",
            "Llama's feed-forward layer reads the stream after attention, not beside it.",
            module=DECODER,
        ),
        Wrong(
            "decoder: head not tied",
            "self.head = None if config.tied else nn.Parameter",
            "self.head = nn.Parameter",
            "A tied head is the embedding itself, one parameter with the sum of both gradients.",
            module=DECODER,
        ),
        Wrong(
            "decoder: initial weights not scaled with depth",
            'residual = name.endswith((".out", ".down"))',
            "residual = False",
            "Every layer adds to the stream: without the factor 1/sqrt(2 layers) it grows with depth.",
            module=DECODER,
        ),
        Wrong(
            "decoder: mask dropped when decoding",
            "q.reshape(b, g, h // g, d), k, v, attn_mask=mask)",
            "q.reshape(b, g, h // g, d), k, v)",
            "A new token must not look at padding.",
            module=DECODER,
        ),
        Wrong(
            "decoder: one cache for all layers",
            "self.config, self.layer = config, layer",
            "self.config, self.layer = config, 0",
            "Each layer has keys and values of its own.",
            module=DECODER,
        ),
        Wrong(
            "checkpoint: gate and up swapped",
            "tensors = (*gate_up.chunk(2), down)",
            "tensors = (*gate_up.chunk(2)[::-1], down)",
            "silu is on the gate: the two are not interchangeable.",
            module=FILES,
        ),
        Wrong(
            "checkpoint: base not read",
            'base=number("rope_theta", default=BASE.get(family, 10000.0)),',
            "base=10000.0,",
            "The base of the rotation belongs to the checkpoint: Llama 3 has 500,000.",
            module=FILES,
        ),
        Wrong(
            "checkpoint: head size always width / heads",
            'head_size=number("head_dim", default=HEAD_SIZE.get(family, width // heads)),',
            "head_size=width // heads,",
            "Qwen3's heads are wider than that.",
            module=FILES,
        ),
        Wrong(
            "checkpoint: missing tensors left as they are",
            "if missing := sorted(views.keys() - files.keys()):",
            "if not files and (missing := sorted(views.keys() - files.keys())):",
            "A parameter that the file does not fill would be read as whatever is in memory.",
            module=FILES,
        ),
        Wrong(
            "checkpoint: unused tensors ignored",
            "if unused := files.keys() - views.keys() - old_table",
            "if unused := set() & files.keys() - views.keys() - old_table",
            "A tensor that nothing uses means that the model is another one.",
            module=FILES,
        ),
        Wrong(
            "checkpoint: scaled rotation read as plain",
            '"rope_parameters": bool(rope.keys() - turned)\n',
            '"rope_parameters": False and bool(rope.keys() - turned)\n',
            "Scaled frequencies make another model.",
            module=FILES,
        ),
        Wrong(
            "stack: the stream itself normalised",
            "return x + layer(norm(x))",
            "return norm(x) + layer(norm(x))",
            "Pre-norm leaves the stream alone; only the layer's input is normalised.",
            module=STACK,
        ),
        Wrong(
            "stack: no norm before the layer",
            "return x + layer(norm(x))",
            "return x + layer(x)",
            "The layer reads the normalised stream: otherwise the stream doubles its variance with every layer.",
            module=STACK,
        ),
        Wrong(
            "stack: only the addition normalised",
            "return norm(x + layer(x))",
            "return x + norm(layer(x))",
            "Post-norm normalises the sum, skip path included.",
            module=STACK,
        ),
        Wrong(
            "stack: gradients through the layers counted",
            "layer(y).detach() for",
            "layer(y) for",
            "The skip path alone is meant: what layers compute must be a constant.",
            module=STACK,
        ),
        Wrong(
            "stack: loss on the raw stream",
            "loss = (unit(streams(step, x, layers)[-1]) - target)",
            "loss = (streams(step, x, layers)[-1] - target)",
            "Pre-norm needs its last norm: the head reads the normalised stream.",
            module=STACK,
        ),
    ),
    probes=(Probe("loop over the queries", loops),),
    hints=(
        "Give every token its position: the keys have 0 to s - 1. Which have the queries?",
        "A query at position p sees key j if j <= p; compare a column of t positions with a row of s.",
        "masked_fill(~mask, -math.inf) on the scores q @ k.mT / sqrt(d), then softmax over the last axis, then @ v.",
    ),
)
