"""The exercise of attention/kinds: self-, masked and cross-attention with padding, and its wrong versions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: attention/kinds
import torch
import torch.nn.functional as F


def multi_head(x_q, x_kv, wq, wk, wv, wo, *, heads, causal=False, key_padding=None):
    """What each token of x_q gathers from x_kv: self-attention if both are one text, else cross-attention.

    x_q is [b, t, c], x_kv is [b, s, m]. Weights are as in nn.Linear, rows are output channels: wq [rows, c],
    wk and wv [rows, m], wo [out, rows]. Head i has the i-th block of d = rows / heads neighbouring rows.
    key_padding, bool [b, s], is True at keys that nobody may see. With causal=True the last query sees the
    last key, the one before it all but the last, and so on (t <= s). A query that may see no key at all, say
    in a text of padding alone, gathers zeros: not NaN, and no NaN in any gradient. Return [b, t, out]
    in the dtype of x_q.
    """
    raise NotImplementedError
'''


def definition(x_q, x_kv, wq, wk, wv, wo, *, heads, causal=False, key_padding=None):  # type: ignore[no-untyped-def]
    """In float64, one query after the other: hidden keys are left out, so that nothing has to be masked."""
    (b, t, _), s, d = x_q.shape, x_kv.shape[1], wq.shape[0] // heads
    q, k, v = (x.double() @ w.double().T for x, w in ((x_q, wq), (x_kv, wk), (x_kv, wv)))
    rows = []
    for n in range(b):
        for i in range(t):
            seen = [j for j in range(s) if not (causal and j - s > i - t)]
            if key_padding is not None:
                seen = [j for j in seen if not key_padding[n, j]]
            for head in range(heads):
                part = slice(head * d, head * d + d)
                weights = torch.softmax(k[n, seen, part] @ q[n, i, part] / math.sqrt(d), dim=0)
                rows.append(weights @ v[n, seen, part])
    return torch.stack(rows).view(b, t, -1) @ wo.double().T


def oracle(x_q, x_kv, wq, wk, wv, wo, *, heads, causal=False, key_padding=None):  # type: ignore[no-untyped-def]
    """The definition in the dtype of x_q."""
    out = definition(x_q, x_kv, wq, wk, wv, wo, heads=heads, causal=causal, key_padding=key_padding)
    return out.to(x_q.dtype)


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def tensors(
        b: int, t: int, s: int, *, c: int = 8, m: int = 8, rows: int = 8, out: int = 8, size: float = 1.0
    ) -> tuple[Tensor, ...]:
        x_q, x_kv = torch.randn(b, t, c, generator=generator), torch.randn(b, s, m, generator=generator)
        shapes = [(rows, c), (rows, m), (rows, m), (out, rows)]
        wq, wk, wv, wo = (torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for shape in shapes)
        return x_q, x_kv, size * wq, wk, wv, wo

    def alone(b: int, t: int) -> tuple[Tensor, ...]:
        x, _, *weights = tensors(b, t, t)
        return x, x, *weights

    def hidden() -> tuple[Tensor, ...]:
        """Query and key channels are alike, so that a score is 32 times the mean of a key's four channels."""
        _, noise, _, _, wv, wo = tensors(1, 4, 4)
        x_kv = torch.tensor([-32.0, -32.0, 16.0, 32.0])[:, None] + noise.round() / 8
        return torch.ones(1, 4, 8), x_kv, 16 * torch.eye(8), torch.eye(8), wv, wo

    last = torch.tensor([[False, False, False, True]])
    padding = torch.tensor([[False, False, False, True], [False, True, True, True]])
    left = torch.tensor([[True, True, False, False], [False, False, False, False]])
    nothing = torch.tensor([[True, True, True, True], [False, False, False, True]])
    causal = {"heads": 2, "causal": True}
    return [
        Case("self", alone(1, 4), {"heads": 2}, "self-attention, two heads"),
        Case("masked", alone(1, 4), causal, "masked self-attention"),
        Case("cross", tensors(2, 3, 5), {"heads": 2}, "three queries look at a memory of five tokens"),
        Case("padding", tensors(2, 4, 4), {"heads": 2, "key_padding": padding}, "the memories have 3 tokens and 1"),
        Case("nothing to see", tensors(2, 4, 4), {"heads": 2, "key_padding": nothing}, "one memory is padding alone"),
        Case("masked, padded", alone(2, 4), {**causal, "key_padding": left}, "masked, and one text is padded in front"),
        Case("with a cache", tensors(1, 2, 5), causal, "two new queries after three cached tokens, masked"),
        Case("large scores", tensors(1, 3, 4, size=1e3), {"heads": 2}, "scores of the order of 1,000"),
        Case("widths", tensors(1, 3, 5, m=6, rows=12, out=5), {"heads": 3}, "memory, heads and output differ in width"),
        Case(
            "the largest score hidden",
            hidden(),
            {**causal, "key_padding": last},
            "visible scores near -1,000, hidden ones of +500 and +1,000",
        ),
        Case("double precision", tuple(x.double() for x in tensors(1, 3, 5)), causal, "everything in float64"),
    ]


def gradients(function: Callable[..., Any]) -> str | None:
    """The gradients of every input where one memory is padding alone, against the definition's."""
    inputs, options = next((case.args, case.kwargs) for case in make_cases() if case.name == "nothing to see")

    def of(multi_head: Callable[..., Any]) -> tuple[Tensor, ...]:
        leaves = [x.double().requires_grad_() for x in inputs]
        return torch.autograd.grad(multi_head(*leaves, **options).square().sum(), leaves)

    got = of(function)
    if any(x.isnan().any() for x in got):
        return (
            "The result is right, but where a query sees no key the gradient is NaN: it comes back through the "
            "softmax of a row of -inf. Put the -inf there with masked_fill, which sends no gradient back, or take the "
            "softmax of finite scores and set the weights to 0 afterwards."
        )
    if not all(
        torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6) for ours, theirs in zip(got, of(definition), strict=True)
    ):
        return "The result is right but its gradients are not: every projection must stay attached to the graph."
    return None


SDPA = "out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain)"
SCORES = "q @ k.mT / q.shape[-1] ** 0.5"
SEEN = "look = torch.ones(t, s, dtype=torch.bool).tril(s - t) if plain else mask"


def by_hand(scores: str, weights: str) -> str:
    """The attention written out: what the scores become where one may not look, then the weights."""
    return (
        f"{SEEN}\n    scores = {SCORES}\n    look = scores == scores if look is None else look\n"
        f"    scores = {scores}\n    out = {weights} @ v"
    )


PAST = "torch.ones(t, s, dtype=torch.bool).tril(s - t)"
REAL = "torch.ones(s, dtype=torch.bool) if key_padding is None else ~key_padding[:, None, None]"
INVERTED = {  # what is hidden by a mask the wrong way round
    "mask inverted": "look",  # made always
    "mask inverted where there is one": "look & ~look.all()",  # made only if something is to be hidden
    "causal mask inverted": f"{PAST} | ~({REAL}) if causal else ~look",
}


EXERCISE = Exercise(
    question="attention/kinds",
    module="attention/cross",
    function="multi_head",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("out",),
    rtol=1e-4,  # float32; with scores of the order of 1,000 a score is rounded by about 1e-4 in the exponent
    atol=2e-5,
    wrong=(
        Wrong(
            "keys and values from the queries' text",
            "split_heads(x_kv, wk, heads), split_heads(x_kv, wv, heads)",
            "split_heads(x_q, wk, heads), split_heads(x_q, wv, heads)",
            "Keys and values are made from x_q: that is self-attention. In cross-attention both come from the memory, "
            "x_kv.",
        ),
        Wrong(
            "values from another token",
            "split_heads(x_kv, wv, heads)",
            "split_heads(x_kv.roll(1, dims=1), wv, heads)",
            "The weight of token j is given to the value of another token: keys and values must stay in step.",
        ),
        Wrong(
            "heads interleaved",
            '"b t (h d) -> b h t d", h=heads',
            '"b t (d h) -> b h t d", h=heads',
            "A head is a block of d neighbouring channels, (h d); here it takes every h-th channel.",
        ),
        Wrong(
            "heads merged in another order",
            '"b h t d -> b t (h d)"',
            '"b h t d -> b t (d h)"',
            "The heads come back interleaved before the output projection: put them side by side, (h d).",
        ),
        Wrong(
            "no output projection",
            'return F.linear(rearrange(out, "b h t d -> b t (h d)"), wo)',
            'return rearrange(out, "b h t d -> b t (h d)")',
            "The heads are only put side by side; the output projection wo, which mixes them, is missing.",
        ),
        Wrong(
            "padding the wrong way round",
            "~key_padding[:, None, None, :]",
            "key_padding[:, None, None, :]",
            "Only the padding is looked at. key_padding is True where there is padding, but the bool mask of "
            "scaled_dot_product_attention is True where one may look: negate it.",
        ),
        Wrong(
            "padding hides queries",
            "~key_padding[:, None, None, :]",
            "~key_padding[:, None, :, None]",
            "The padding mask lies along the queries: it must hide columns, the keys, as [b, 1, 1, s].",
        ),
        Wrong(
            "padding ignored",
            "real = None if key_padding is None else",
            "real = None if True else",
            "key_padding has no effect: padding is looked at like any other token.",
        ),
        Wrong(
            "padding forgotten under a causal mask",
            "plain = causal and t == s and key_padding is None",
            "plain = causal and t == s",
            "With causal=True the padding is forgotten: a key must be in the past and not be padding.",
        ),
        Wrong(
            "causal forgotten with padding",
            "causal=causal, key_padding=key_padding, device=q.device)",
            "causal=causal and key_padding is None, key_padding=key_padding, device=q.device)",
            "Where key_padding is given, causal=True is forgotten: a key must be in the past and not be padding.",
        ),
        Wrong(
            "past or real",
            "return past & real",
            "return past | real",
            "A key is seen if it is in the past or no padding; it must be both.",
        ),
        Wrong(
            "causal ignored",
            "causal=causal, key_padding=key_padding, device=q.device)\n    out = F.scaled_dot_product_attention"
            "(q, k, v, attn_mask=mask, is_causal=plain)",
            "causal=False, key_padding=key_padding, device=q.device)\n    out = F.scaled_dot_product_attention"
            "(q, k, v, attn_mask=mask)",
            "The future is visible although causal=True.",
        ),
        Wrong(
            "PyTorch's causal mask with a cache",
            "plain = causal and t == s and key_padding is None",
            "plain = causal and key_padding is None",
            "With fewer queries than keys the mask starts at the first key (so does is_causal of "
            "scaled_dot_product_attention): the last query must see the last key.",
        ),
        Wrong(
            "a NaN where nothing is seen",
            SDPA,
            by_hand("scores.masked_fill(~look, float('-inf'))", "torch.softmax(scores, dim=-1)"),
            "A query whose keys are all hidden has a row of -inf, and its softmax is 0/0 = NaN. It gathers zeros.",
        ),
        Wrong(
            "a large negative number",
            SDPA,
            by_hand("scores.masked_fill(~look, -1e9)", "torch.softmax(scores, dim=-1)"),
            "Hidden scores are a large negative number instead of -inf: where all keys are hidden they are all equal, "
            "and the query gathers the mean of the padding. It gathers zeros.",
        ),
        Wrong(
            "mask after the softmax",
            SDPA,
            by_hand("scores", "(torch.softmax(scores, dim=-1) * look)"),
            "The mask was applied after the softmax: what hidden keys took is lost, and the weights do not sum to 1.",
        ),
        Wrong(
            "hidden scores set to 0",
            SDPA,
            by_hand("scores * look", "torch.softmax(scores, dim=-1)"),
            "Hidden scores were set to 0, but exp(0) is 1: hidden keys keep a weight. They must be -inf.",
        ),
        *(
            Wrong(
                name + ending,
                SDPA,
                by_hand(f"scores.masked_fill({hidden}, float('-inf'))", f"torch.softmax(scores, dim=-1){guard}"),
                "The mask is inverted: what a query may see is hidden from it. masked_fill hides where its mask is "
                "True, scaled_dot_product_attention where it is False.",
            )
            for name, hidden in INVERTED.items()
            for ending, guard in (("", ""), (", no key gives zeros", ".nan_to_num(0.0)"))
        ),
        *(
            Wrong(
                name,
                SDPA,
                by_hand("torch.softmax(scores, dim=-1) * look", f"(scores / {total})"),
                "The exponentials are taken relative to a maximum over hidden keys too: where a hidden score is far "
                "larger, those of all visible keys become 0. Mask the scores before the softmax, with -inf or a number "
                "far below every score.",
            )
            for name, total in (
                ("maximum over hidden keys", "scores.sum(dim=-1, keepdim=True)"),
                ("maximum over hidden keys, guarded", "scores.sum(dim=-1, keepdim=True).clamp(min=1e-9)"),
            )
        ),
        Wrong(
            "mask added as a number",
            SDPA,
            by_hand("scores + look", "torch.softmax(scores, dim=-1)"),
            "The mask was added to the scores as 0 and 1: that hides nothing. Add 0 and -inf, or use masked_fill.",
        ),
        Wrong(
            "softmax over queries",
            SDPA,
            by_hand("scores.masked_fill(~look, float('-inf'))", "torch.softmax(scores, dim=-2).nan_to_num(0.0)"),
            "The softmax runs over the queries; the weights of one query over its keys must sum to 1.",
        ),
        Wrong(
            "scale by the width",
            SDPA,
            SDPA.replace("is_causal=plain", "is_causal=plain, scale=wq.shape[0] ** -0.5"),
            "The scores are divided by the square root of the whole width; it is the head size d that counts.",
        ),
        Wrong(
            "no scale",
            SDPA,
            SDPA.replace("is_causal=plain", "is_causal=plain, scale=1.0"),
            "The scores are not divided by the square root of the head size.",
        ),
    ),
    also_wrong=(
        Wrong(
            "mask aligned at the start",
            "past = visible(t, s, device=device)",
            "past = visible(t, s, offset=0, device=device)",
            "With t < s the last query sees the last key: the mask is aligned at the ends.",
        ),
        Wrong(
            "own position hidden",
            "past = visible(t, s, device=device)",
            "past = visible(t, s, offset=s - t - 1, device=device)",
            "A token sees itself: strictly earlier keys leave the first query without any.",
        ),
        *(
            Wrong(name, find, replace, diagnosis, module="attention/kinds")
            for name, find, replace, diagnosis in (
                (
                    "weights without scale",
                    "scores = q @ k.mT / math.sqrt(q.shape[-1])",
                    "scores = q @ k.mT",
                    "The weights shown are not those that multi_head uses: the scale is missing.",
                ),
                (
                    "weights of hidden keys",
                    "scores = scores.masked_fill(~look, -math.inf)",
                    "scores = scores.masked_fill(look, -math.inf)",
                    "look is True where one may look.",
                ),
                (
                    "weights that are NaN",
                    "torch.softmax(scores, dim=-1).nan_to_num(0.0)",
                    "torch.softmax(scores, dim=-1)",
                    "A query that may look nowhere has zeros, not NaN.",
                ),
                (
                    "prefix one too long",
                    "(torch.arange(t) < n)",
                    "(torch.arange(t) <= n)",
                    "A prefix of n tokens are those numbered 0 to n - 1.",
                ),
                (
                    "window one too long",
                    "offset=-n)",
                    "offset=-n - 1)",
                    "A window of n tokens includes the token itself.",
                ),
                (
                    "decoder reads the answer",
                    "F.pad(text[:, :-1], (1, 0), value=START)",
                    "text",
                    "The decoder's input is the text moved by one: else it reads the symbol that it has to write.",
                ),
                (
                    "encoder sees padding",
                    "*self.encoder, heads=HEADS, key_padding=padding)",
                    "*self.encoder, heads=HEADS)",
                    "Padding has no part in the source: the encoder must not look at it either.",
                ),
                (
                    "encoder masked",
                    "*self.encoder, heads=HEADS, key_padding=padding)",
                    "*self.encoder, heads=HEADS, causal=True, key_padding=padding)",
                    "The source is known as a whole: the encoder sees both sides.",
                ),
                (
                    "decoder not masked",
                    "*self.decoder, heads=HEADS, causal=True)",
                    "*self.decoder, heads=HEADS)",
                    "Without the mask the decoder reads the answer in its own input.",
                ),
                (
                    "cross-attention to itself",
                    "multi_head(x, memory, *self.cross, heads=HEADS, key_padding=padding)",
                    "multi_head(x, x, *self.cross, heads=HEADS, causal=True)",
                    "Cross-attention takes keys and values from the memory.",
                ),
                (
                    "cross-attention sees padding",
                    "multi_head(x, memory, *self.cross, heads=HEADS, key_padding=padding)",
                    "multi_head(x, memory, *self.cross, heads=HEADS)",
                    "The padding of the memory must be hidden from every query.",
                ),
                (
                    "queries from before the self-attention",
                    "return norm(x + self.look_back(x))",
                    "return x",
                    "Cross-attention asks with the output of the block's first sub-layer, not with the block's input.",
                ),
                (
                    "no places",
                    "self.symbols[ids] + self.places[: ids.shape[1]]",
                    "self.symbols[ids]",
                    "Without places the memory is a bag of symbols: cross-attention does not see their order.",
                ),
                (
                    "padding counted",
                    "source, ignore_index=PAD)",
                    "source.clamp(max=SYMBOLS - 1))",
                    "Padding is not to be predicted: leave it out of the loss.",
                ),
            )
        ),
    ),
    probes=(Probe("gradients", gradients),),
    hints=(
        "Project first: q = F.linear(x_q, wq), k = F.linear(x_kv, wk), v = F.linear(x_kv, wv). Then view the channels "
        "as [heads, d] and move the heads in front: b h t d.",
        "look is True where query i may see key j: j <= i + s - t if causal, and ~key_padding[:, None, None, :].",
        "masked_fill(~look, -inf) the scores, softmax over the keys, and set NaN rows to 0 (nan_to_num) before "
        "the product with v. Or hand look to F.scaled_dot_product_attention as attn_mask.",
        "Back to b t (h d), then F.linear with wo.",
    ),
)
