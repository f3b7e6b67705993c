"""Self-, masked and cross-attention as one operator: what depends on what, and what order means."""

import math

import jaxtyping
import pytest
import torch
from torch import nn

from minillm.attention.cross import may_look, multi_head, split_heads

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def sources(b=2, t=4, s=6, c=8, m=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, width, generator=generator, dtype=dtype) for n, width in ((t, c), (s, m))]


def weights(c=8, m=8, rows=8, out=8, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, c), (rows, m), (rows, m), (out, rows)]
    return [torch.randn(shape, generator=generator, dtype=dtype) / math.sqrt(shape[1]) for shape in shapes]


def test_cross_attention_by_hand():
    # One head, d = 1: q = 1, keys 0 and ln 3, so weights 1/4 and 3/4; values are 4 times the keys' source, wo doubles.
    x_q, x_kv = torch.tensor([[[1.0]]]), torch.tensor([[[0.0], [math.log(3)]]])
    one = torch.ones(1, 1)
    out = multi_head(x_q, x_kv, one, one, 4 * one, 2 * one, heads=1)
    torch.testing.assert_close(out, torch.tensor([[[2 * (0.75 * 4 * math.log(3))]]]))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("t", "s", "causal"), [(4, 6, False), (4, 4, True), (4, 6, True), (1, 6, True)])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_the_formula_head_by_head(heads, t, s, causal, padded):
    (x_q, x_kv), (wq, wk, wv, wo) = sources(t=t, s=s, m=5), weights(m=5)
    padding = torch.zeros(2, s, dtype=torch.bool)
    if padded:
        padding[0, 1] = padding[1, 0] = True
    out = multi_head(x_q, x_kv, wq, wk, wv, wo, heads=heads, causal=causal, key_padding=padding if padded else None)
    d, parts = 8 // heads, []
    for head in range(heads):
        rows = slice(head * d, (head + 1) * d)
        scores = (x_q @ wq[rows].mT) @ (x_kv @ wk[rows].mT).mT / math.sqrt(d)
        for i in range(t):
            for j in range(s):
                if causal and j > i + s - t:
                    scores[:, i, j] = -math.inf
        scores = scores.masked_fill(padding[:, None], -math.inf)
        p = (scores.softmax(dim=-1)).nan_to_num(0.0)  # where the only key of the past is padding
        parts.append(p @ (x_kv @ wv[rows].mT))
    torch.testing.assert_close(out, torch.cat(parts, dim=-1) @ wo.mT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["self", "masked", "cross", "padded"])
def test_equals_pytorch_multihead_attention(kind, device):
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True, device=device)
    x, memory = (x.to(device) for x in sources(dtype=torch.float32))
    wq, wk, wv = theirs.in_proj_weight.chunk(3)
    source = memory if kind in ("cross", "padded") else x
    options, masks = {}, {}
    if kind == "masked":
        options["causal"] = True
        masks["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(4, device=device)
    if kind == "padded":
        padding = torch.arange(6, device=device) >= torch.tensor([[4], [6]], device=device)
        options["key_padding"] = masks["key_padding_mask"] = padding
    got = multi_head(x, source, wq, wk, wv, theirs.out_proj.weight, heads=2, **options)
    torch.testing.assert_close(got, theirs(x, source, source, need_weights=False, **masks)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    (x_q, x_kv), ws = sources(b=1, t=3, s=3, c=4, m=4), weights(c=4, m=4, rows=4, out=4)
    inputs = [x.requires_grad_() for x in (x_q, x_kv, *ws)]
    assert torch.autograd.gradcheck(lambda *args: multi_head(*args, heads=2, causal=causal), inputs)


def dependency(function, x):
    """True at (i, j) where output token i changes with input token j of the first sequence."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x)[0], x)[:, :, 0]  # t out s c
    return (jacobian.abs().amax(dim=(1, 3)) > 0).int().tolist()


def test_what_depends_on_what():
    (x, memory), ws = sources(b=1, t=3, s=4), weights()
    padding = torch.tensor([[False, True, False, False]])
    everything, past = [[1, 1, 1]] * 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert dependency(lambda x: multi_head(x, x, *ws, heads=2), x) == everything
    assert dependency(lambda x: multi_head(x, x, *ws, heads=2, causal=True), x) == past
    assert dependency(lambda x: multi_head(x, memory, *ws, heads=2), x) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert dependency(lambda y: multi_head(x, y, *ws, heads=2), memory) == [[1, 1, 1, 1]] * 3
    assert dependency(lambda y: multi_head(x, y, *ws, heads=2, key_padding=padding), memory) == [[1, 0, 1, 1]] * 3


def test_order_of_tokens():
    (x, memory), ws = sources(t=6), weights()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain, masked = multi_head(x, x, *ws, heads=2), multi_head(x, x, *ws, heads=2, causal=True)
    shuffled = x[:, order]
    # self-attention is equivariant: the outputs are shuffled with the inputs; it is not invariant
    torch.testing.assert_close(multi_head(shuffled, shuffled, *ws, heads=2), plain[:, order])
    assert (plain[:, order] - plain).abs().max() > 0.1
    # with a causal mask it is not even that
    assert (multi_head(shuffled, shuffled, *ws, heads=2, causal=True) - masked[:, order]).abs().max() > 0.1
    # cross-attention is invariant to the order of the memory
    cross = multi_head(x, memory, *ws, heads=2)
    torch.testing.assert_close(multi_head(x, memory[:, order], *ws, heads=2), cross)


def test_keys_and_values_come_from_the_memory():
    (x, memory), ws = sources(), weights()
    assert (multi_head(x, memory, *ws, heads=2) - multi_head(x, x, *ws, heads=2)).abs().max() > 0.1
    constant = memory[:, :1].expand_as(memory)  # one memory token, repeated: whatever the query, its value comes back
    expected = (constant @ ws[2].mT @ ws[3].mT)[:, :1].expand(2, 4, 8)
    torch.testing.assert_close(multi_head(x, constant, *ws, heads=2), expected)


def test_the_last_queries_of_a_cache_are_the_last_rows():
    (x, _), ws = sources(t=6), weights()
    whole = multi_head(x, x, *ws, heads=2, causal=True)
    torch.testing.assert_close(multi_head(x[:, 4:], x, *ws, heads=2, causal=True), whole[:, 4:])
    # a single new query needs no mask at all
    torch.testing.assert_close(multi_head(x[:, 5:], x, *ws, heads=2), whole[:, 5:])


def test_padding_is_as_if_it_were_not_there():
    (x, memory), ws = sources(), weights()
    padding = torch.arange(6) >= 4
    got = multi_head(x, memory, *ws, heads=2, key_padding=padding.expand(2, 6))
    torch.testing.assert_close(got, multi_head(x, memory[:, :4], *ws, heads=2))


def test_a_query_that_sees_no_key_gathers_zeros():
    (x, memory), ws = sources(b=1), weights()
    memory.requires_grad_()
    out = multi_head(x, memory, *ws, heads=2, key_padding=torch.ones(1, 6, dtype=torch.bool))
    assert out.abs().max() == 0
    out.sum().backward()
    assert memory.grad.abs().max() == 0


def test_who_may_look():
    padding = torch.tensor([[False, False, True], [True, False, False]])
    assert may_look(2, 3, causal=False, key_padding=None) is None
    assert may_look(2, 3, causal=True, key_padding=None).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert may_look(2, 3, causal=False, key_padding=padding).int().tolist() == [[[[1, 1, 0]]], [[[0, 1, 1]]]]
    both = may_look(2, 3, causal=True, key_padding=padding)[:, 0].int().tolist()
    assert both == [[[1, 1, 0], [1, 1, 0]], [[0, 1, 0], [0, 1, 1]]]


def test_heads_are_neighbouring_channels():
    x = torch.arange(6.0).view(1, 1, 6)
    assert split_heads(x, torch.eye(6), 2)[0, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    (x, memory), ws = sources(dtype=dtype), weights(dtype=dtype)
    got = multi_head(x, memory, *ws, heads=2)
    exact = multi_head(x.double(), memory.double(), *(w.double() for w in ws), heads=2)
    assert got.dtype == dtype
    # rounded four times: projections, weighted sum, output; entries of size 1
    assert (got.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


def wrong(**changes):
    (x, memory), (wq, wk, wv, wo) = sources(), weights()
    arguments = dict(x_q=x, x_kv=memory, wq=wq, wk=wk, wv=wv, wo=wo, heads=2) | changes
    return lambda: multi_head(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wrong(x_kv=torch.ones(3, 6, 8)), r"one batch size, got \(2, 4, 8\) and \(3, 6, 8\)"),
        (wrong(x_q=torch.ones(4, 8)), r"b t c .*got \(4, 8\)"),
        (wrong(x_kv=torch.ones(2, 6, 5)), r"keys of 5 channels: .*wk \(8, 8\)"),
        (wrong(wv=torch.ones(4, 8)), r"wv \(4, 8\)"),
        (wrong(wo=torch.ones(8, 4)), r"wo \(8, 4\)"),
        (wrong(heads=3), "got 8 rows, 3 heads"),
        (wrong(key_padding=torch.zeros(2, 4, dtype=torch.bool)), r"bool \(2, 6\), .*got torch.bool \(2, 4\)"),
        (wrong(key_padding=torch.ones(2, 6)), "True where there is padding, got torch.float32"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_to_one_graph(padded):
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    (x, _), ws = sources(), weights()
    options = dict(heads=2, causal=True, key_padding=torch.arange(4).expand(2, 4) < 1 if padded else None)
    compiled = torch.compile(multi_head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, *ws, **options), multi_head(x, x, *ws, **options))
