"""Online softmax: the running state equals the softmax over everything seen, however the keys are cut."""

import itertools
import math

import pytest
import torch

from minillm.attention.online_softmax import (
    State,
    attention_in_blocks,
    empty_state,
    finish,
    merge,
    merge_outputs,
    online_softmax_step,
)


def qkv(t=5, s=13, d=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, t, d), (2, s, d), (2, s, d)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def oracle(q, k, v):
    """The definition, in float64: weights from torch.softmax, normaliser from torch.logsumexp."""
    scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v.double(), torch.logsumexp(scores, dim=-1)


def test_two_keys_by_hand():
    # d = 1, so the scale is 1. q = 1, keys 0 and ln 3: exponentials 1 and 3, sum 4, weights 1/4 and 3/4.
    # Output 1/4 * 10 + 3/4 * 2 = 4; log-sum-exp ln 4.
    q = torch.tensor([[1.0]])
    k = torch.tensor([[0.0], [math.log(3)]])
    v = torch.tensor([[10.0], [2.0]])
    out, lse = attention_in_blocks(q, k, v, block_size=1)
    torch.testing.assert_close(out, torch.tensor([[4.0]]))
    torch.testing.assert_close(lse, torch.tensor([math.log(4)]))


def test_state_after_each_key_by_hand():
    # Scores 1 then 3, values 10 and 20. After the first: m=1, l=1, acc=10. The second raises m to 3, so what was
    # there shrinks by e^(1-3) = e^-2: l = e^-2 + 1, acc = 10 e^-2 + 20.
    state = empty_state(torch.zeros(1, 1), 1)
    state = online_softmax_step(state, torch.tensor([[1.0]]), torch.tensor([[10.0]]))
    assert (state.m.item(), state.l.item(), state.acc.item()) == (1.0, 1.0, 10.0)
    state = online_softmax_step(state, torch.tensor([[3.0]]), torch.tensor([[20.0]]))
    shrink = math.exp(-2)
    torch.testing.assert_close(state.m, torch.tensor([3.0]))
    torch.testing.assert_close(state.l, torch.tensor([shrink + 1]))
    torch.testing.assert_close(state.acc, torch.tensor([[10 * shrink + 20]]))


@pytest.mark.parametrize("block_size", [1, 2, 5, 13, 100])
def test_any_block_size_gives_the_softmax(block_size):
    q, k, v = qkv()
    for got, expected in zip(attention_in_blocks(q, k, v, block_size=block_size), oracle(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_equals_pytorch_sdpa():
    q, k, v = qkv(dtype=torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_in_blocks(q, k, v, block_size=4)[0], expected)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_large_scores_do_not_overflow(size):
    q, k, v = qkv()
    for got, expected in zip(attention_in_blocks(q * size, k, v, block_size=3), oracle(q * size, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_scores_far_below_zero_do_not_underflow():
    # exp(-2000) is 0 in float64: without subtracting the running maximum the normaliser would be 0 and the output nan.
    q, k, v = torch.full((1, 1, 1), -2000.0), torch.ones(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
    out, lse = attention_in_blocks(q, k, v, block_size=1)
    torch.testing.assert_close(out, torch.full((1, 1, 1), 2.0))
    torch.testing.assert_close(lse, torch.full((1, 1), -2000 + math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_float32_statistics(dtype):
    # 4096 equal keys with values 1: a half-precision sum of ones stops at 2048 (fp16) or 256 (bf16).
    q, k = torch.zeros(1, 1, 8, dtype=dtype), torch.zeros(1, 4096, 8, dtype=dtype)
    out, lse = attention_in_blocks(q, k, torch.ones_like(k), block_size=64)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full((1, 1), math.log(4096)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_result_is_the_exact_one_rounded_once(dtype):
    q, k, v = (x.to(dtype) for x in qkv(t=16, s=64))
    out, _ = attention_in_blocks(q, k, v, block_size=16)
    # products and sums are float32, so only the last rounding to half precision is left: at most one unit
    torch.testing.assert_close(out.double(), oracle(q, k, v)[0], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_row_without_visible_keys_is_zero_and_stays_mergeable():
    state = empty_state(torch.zeros(1, 4), 2)
    state = online_softmax_step(state, torch.full((1, 3), -math.inf), torch.ones(3, 2))
    out, lse = finish(state)
    assert out.tolist() == [[0.0, 0.0]]
    assert lse.item() == -math.inf
    later = online_softmax_step(state, torch.zeros(1, 1), torch.full((1, 2), 7.0))
    assert finish(later)[0].tolist() == [[7.0, 7.0]]


def block_states(cuts=((0, 2), (2, 5), (5, 6), (6, 13))):
    q, k, v = qkv()
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    empty = empty_state(q, v.shape[-1])
    return [online_softmax_step(empty, scores[..., a:b], v[..., a:b, :]) for a, b in cuts], (q, k, v)


def test_merge_in_every_order_is_the_same():
    states, (q, k, v) = block_states()
    expected = oracle(q, k, v)
    for order in itertools.permutations(states):
        left = order[0]
        for other in order[1:]:
            left = merge(left, other)
        pairs = merge(merge(order[0], order[1]), merge(order[2], order[3]))  # associative: a tree instead of a chain
        for got in (left, pairs):
            for a, b in zip(finish(got), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_the_empty_state_is_neutral():
    states, (q, _, v) = block_states()
    empty = empty_state(q, v.shape[-1])
    for merged in (merge(states[0], empty), merge(empty, states[0])):
        torch.testing.assert_close(State(*merged), states[0])
    assert not torch.isnan(merge(empty, empty).acc).any()


def test_finished_outputs_merge_by_log_sum_exp():
    states, (q, k, v) = block_states()
    out, lse = finish(states[0])
    for state in states[1:]:
        out, lse = merge_outputs(out, lse, *finish(state))
    for got, expected in zip((out, lse), oracle(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_merging_with_a_part_that_saw_nothing_changes_nothing():
    states, (q, _, v) = block_states()
    part, nothing = finish(states[0]), finish(empty_state(q, v.shape[-1]))
    for got in (merge_outputs(*part, *nothing), merge_outputs(*nothing, *part)):
        torch.testing.assert_close(got, part)
    assert merge_outputs(*nothing, *nothing)[0].abs().max() == 0


def test_inputs_are_left_alone():
    inputs = qkv()
    before = [x.clone() for x in inputs]
    attention_in_blocks(*inputs, block_size=4)
    for now, then in zip(inputs, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
