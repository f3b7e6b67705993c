"""The oracle itself, against PyTorch and by hand."""

import pytest
import torch
import torch.nn.functional as F

from minillm.attention.naive import attention, visible


def test_mask_is_aligned_at_the_ends():
    # 2 queries at the end of 4 keys: the first of them is position 2 and sees keys 0, 1, 2.
    assert visible(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 4, offset=0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_sdpa_with_grouped_heads(causal, groups):
    q = torch.randn(2, 4, 7, 8)
    k, v = torch.randn(2, 2, groups, 7, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, causal=causal), expected)


def test_offset_equals_sdpa_with_an_explicit_mask():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 9, dtype=torch.bool).tril(2))
    torch.testing.assert_close(attention(q, k, v, causal=True, offset=2), expected)


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    out = attention(q, k, v, causal=True)  # offset -1: query 0 is before every key
    assert out[0, 0, 0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 0])
