"""Causal attention: by hand, equal to the oracle and to PyTorch's, and blind to what comes later."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from minillm.attention import naive
from minillm.attention.causal import causal_attention, seen

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(5, 5), (2, 7), (1, 9), (1, 1), (6, 7)]


def inputs(t, s, *batch, d=8, e=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, t, d), (*batch, s, d), (*batch, s, e)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(device, dtype) for x in shapes]


def test_a_token_sees_itself_and_what_is_before_it():
    # positions need not be consecutive: keys 0, 3, 4 of queries at 3 and 2
    assert seen(torch.tensor([3, 2]), torch.tensor([0, 3, 4])).tolist() == [[True, True, False], [True, False, False]]


def test_by_hand():
    # d = 4, so scores are q k / 2. The first query stands at position 1 and sees scores 0 and ln 3: weights 1/4, 3/4.
    k = torch.zeros(3, 4)
    k[1, 0], k[2, 0] = math.log(3), 100
    q = torch.tensor([[2.0, 0, 0, 0], [0.0, 0, 0, 0]])
    v = torch.tensor([[4.0], [8.0], [30.0]])
    torch.testing.assert_close(causal_attention(q, k, v), torch.tensor([[7.0], [14.0]]))  # 1 + 6; the plain mean


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("t", "s"), SHAPES)
def test_equals_the_oracle_and_sdpa(t, s, device):
    q, k, v = inputs(t, s, 2, 3, device=device)
    out = causal_attention(q, k, v)
    torch.testing.assert_close(out, naive.attention(q, k, v, causal=True))
    close = dict(rtol=1e-4, atol=1e-5)  # fused kernels of a GPU round float32 products in their own way
    sdpa = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(t, s))
    torch.testing.assert_close(out, sdpa, **close)
    if t == s:
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), **close)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_any_axes_in_front_and_values_of_another_size(batch):
    q, k, v = inputs(3, 6, *batch, e=5)
    out = causal_attention(q, k, v)
    assert out.shape == (*batch, 3, 5)
    alone = [causal_attention(*rows) for rows in zip(*(x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(out.reshape(-1, 3, 5), torch.stack(alone))


def test_a_prefix_gives_the_first_rows():
    q, k, v = inputs(9, 9)
    whole = causal_attention(q, k, v)
    for n in (1, 4, 8):
        torch.testing.assert_close(causal_attention(q[:n], k[:n], v[:n]), whole[:n])


def test_the_last_queries_alone_give_the_last_rows():
    q, k, v = inputs(9, 9)
    whole = causal_attention(q, k, v)
    for t in (1, 4, 8):
        torch.testing.assert_close(causal_attention(q[-t:], k, v), whole[-t:])


def test_no_gradient_from_the_future():
    q, k, v = (x.requires_grad_() for x in inputs(3, 6))
    causal_attention(q, k, v)[0].sum().backward()  # the first new token stands at position 3
    for x in (k, v):
        assert x.grad[:4].abs().amin() > 0
        assert x.grad[4:].abs().max() == 0
    assert q.grad[1:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = inputs(3, 6, dtype=dtype)
    out = causal_attention(q, k, v)
    assert out.dtype == dtype
    expected = causal_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)  # numbers with 8 bits, 3 roundings


def test_large_scores():
    q, k, v = inputs(4, 7)
    expected = causal_attention(1e4 * q.double(), k.double(), v.double())
    assert expected.isfinite().all()
    # one weight is nearly 1 in each row: float32 rounds scores of 10,000 by 1e-3, which shifts weights by as much
    torch.testing.assert_close(causal_attention(1e4 * q, k, v).double(), expected, rtol=1e-2, atol=1e-2)


def test_what_is_hidden_gets_no_weight_however_low_the_scores_are():
    q, k, v = torch.full((2, 4), 300.0), torch.full((4, 4), -300.0), inputs(2, 4)[2]
    # all scores are -180,000: the weights are equal among what is seen
    torch.testing.assert_close(causal_attention(q, k, v), torch.stack([v[:3].mean(dim=0), v.mean(dim=0)]))


def test_inputs_are_not_changed():
    q, k, v = inputs(3, 6)
    copies = [x.clone() for x in (q, k, v)]
    causal_attention(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="t <= s is needed, got t=3, s=2"):
        causal_attention(*inputs(3, 2))
