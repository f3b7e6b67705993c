"""ALiBi: fixed slopes, a penalty in the distance, equal to production after the softmax."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.attention import naive
from minillm.position.alibi import bias, slopes

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_slopes_by_hand():
    assert slopes(1).tolist() == [2**-8]
    assert slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    # 3 heads: those of 2, then every other one of those of 4, which are 2^-2, 2^-4, 2^-6, 2^-8
    assert slopes(3).tolist() == [2**-4, 2**-8, 2**-2]
    assert slopes(6).tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize("h", range(1, 34))
def test_slopes_differ_and_lie_between_0_and_1(h):
    found = slopes(h).tolist()
    assert len(set(found)) == h
    assert all(2**-8 <= x < 1 for x in found)


def test_bias_by_hand():
    # 2 queries at the end of 3 keys, slope 2^-8: the first query is position 1 and does not see key 2.
    unit = 2**-8
    assert bias(2, 3, 1).tolist() == [[[-unit, 0, -math.inf], [-2 * unit, -unit, 0]]]


def test_a_decoding_step_is_the_last_row():
    assert torch.equal(bias(1, 9, 4), bias(9, 9, 4)[:, -1:])


def test_bias_is_the_same_at_every_distance():
    whole = bias(12, 12, 4)
    for shift in (1, 5):
        assert torch.equal(whole[:, shift:, shift:], whole[:, :-shift, :-shift])


def test_weights_of_equal_keys_fall_geometrically():
    # without content only the bias is left: each step back multiplies the weight by exp(-slope)
    weights = bias(20, 20, 8).double().softmax(dim=-1)[:, -1]
    torch.testing.assert_close(weights[:, :-1] / weights[:, 1:], torch.exp(-slopes(8).double())[:, None].expand(8, 19))


def test_a_head_looks_equally_far_in_a_longer_text():
    # 2 times the length changes the output of the last query by less than what lies beyond: exp(-slope * 256)
    v = torch.randn(1, 1, 512, 8, generator=torch.Generator().manual_seed(0)).expand(1, 4, 512, 8)
    q = k = torch.zeros(1, 4, 512, 8)
    long = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(512, 512, 4))[0, :, -1]
    short = F.scaled_dot_product_attention(*(x[..., 256:, :] for x in (q, k, v)), attn_mask=bias(256, 256, 4))[0, :, -1]
    change = (long - short).abs().amax(dim=-1)
    assert change[:2].max() < 1e-5  # slopes 1/4 and 1/16: exp(-16) is beyond
    assert change[3] > 0.01  # slope 1/256 still sees it


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("t", [7, 1])
def test_in_sdpa_it_is_the_whole_mask(t, device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator).to(device) for n in (t, 7, 7))
    mask = bias(t, 7, 4, device=q.device)
    scores = q @ k.mT / math.sqrt(8)
    # entry by entry: slope 2^(-2 (head + 1)), position of query i is i + 7 - t
    for head in range(4):
        for i in range(t):
            for j in range(7):
                scores[:, head, i, j] -= 4.0 ** -(head + 1) * (i + 7 - t - j)
    scores = scores.masked_fill(~naive.visible(t, 7, device=q.device), -math.inf)
    expected = scores.softmax(dim=-1) @ v
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: slopes(0), "at least one head, got h=0"), (lambda: bias(4, 3, 2), "t <= s, got t=4, s=3")],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("h", [1, 2, 3, 8, 12, 20])
def test_equals_transformers_bloom(h):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 9), h, torch.float32).view(h, 1, 9)  # slope x j, without a mask
    torch.testing.assert_close(slopes(h), theirs[:, 0, 1])
    scores = torch.randn(h, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = (scores + theirs).masked_fill(~naive.visible(9, 9), -math.inf).softmax(dim=-1)
    torch.testing.assert_close((scores + bias(9, 9, h)).softmax(dim=-1), expected)
