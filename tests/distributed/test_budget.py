"""The calculators: published figures, and counts of what really leaves a rank."""

import pytest
import torch

from minillm.distributed.budget import (
    break_even,
    bubble,
    expert_sent,
    ring_attention_sent,
    sending_share,
    share,
    smallest_stage,
    tensor_sent,
    ulysses_sent,
    zero_bytes,
    zero_sent,
)
from minillm.distributed.pipeline import gpipe, idle_share, one_f_one_b, plan, slots
from minillm.finetuning.memory import states


@pytest.mark.parametrize(
    ("parameters", "ranks", "expected"),
    [
        (7.5e9, 64, [120.0, 31.4, 16.6, 1.9]),  # figure 1 of the paper
        (7.5e9, 1024, [120.0, 30.0 + 90 / 1024, 15.0 + 105 / 1024, 120 / 1024]),
    ],
)
def test_bytes_a_rank(parameters, ranks, expected):
    found = [sum(zero_bytes(stage, parameters, ranks)) / 1e9 for stage in range(4)]
    assert found == pytest.approx(expected, abs=0.05)  # the figure has one decimal


def test_which_part_a_stage_shards():
    assert zero_bytes(0, 10, 5) == (20, 20, 120)
    assert zero_bytes(1, 10, 5) == (20, 20, 24)
    assert zero_bytes(2, 10, 5) == (20, 4, 24)
    assert zero_bytes(3, 10, 5) == (4, 4, 24)


@pytest.mark.parametrize("stage", range(4))
def test_states_are_those_of_the_memory_estimate(stage):
    weights, gradients, rest = zero_bytes(stage, 1e9, 8)
    found = states(1e9, zero=stage, ranks=8)
    assert (weights, gradients, rest) == pytest.approx((found.weights, found.gradients, found.master + found.optimizer))


def test_numbers_sent_in_a_step():
    # a ring of 4: reduce-scatter and all-gather send 3/4 of the buffer each
    assert [zero_sent(stage, 100, 4) for stage in range(4)] == [150, 150, 150, 225]
    # two micro-batches: the reduction of stage 2 twice, and all three of stage 3
    assert [zero_sent(stage, 100, 4, micro_batches=2) for stage in range(4)] == [150, 150, 225, 450]
    assert [zero_sent(stage, 100, 1) for stage in range(4)] == [0, 0, 0, 0]


def test_the_smallest_stage_that_fits():
    assert [smallest_stage(1, 4, room) for room in (16, 15.9, 7, 6.9, 5.5, 5.4, 4, 3.9)] == [0, 1, 1, 2, 2, 3, 3, None]


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 1), (4, 8), (5, 3)])
def test_the_bubble_is_that_of_a_timetable(schedule, p, m):
    assert idle_share(slots(plan(schedule, p, m)), p) == pytest.approx(bubble(p, m))


def test_interleaving_divides_the_idle_time():
    # idle to busy: (p - 1)/(v m)
    for v in (1, 2, 4):
        idle = bubble(4, 8, interleaved=v)
        assert idle / (1 - idle) == pytest.approx(3 / (8 * v))


def leaving(before, after, rank):
    """Numbers that a rank has in one layout and another rank needs in the next."""
    return int(((before == rank) & (after != rank)).sum())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ulysses_is_four_changes_of_layout(ranks):
    t, heads, kv_heads, d = 8, 4, 4, 3
    token = torch.arange(t).div(t // ranks, rounding_mode="floor")[:, None, None]
    sent = 0
    for h in (heads, kv_heads, kv_heads, heads):  # queries, keys, values; back: the result
        head = torch.arange(h).div(h // ranks, rounding_mode="floor")[None, :, None]
        by_token, by_head = (x.expand(t, h, d) for x in (token, head))
        sent += leaving(by_token, by_head, 0)
    assert ulysses_sent(t, heads * d, kv_heads * d, ranks) == sent


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_keys_and_values_go_once_around(ranks):
    t, width = 8, 3
    messages = [2 * (t // ranks) * width for _ in range(ranks - 1)]
    assert ring_attention_sent(t, width, ranks) == sum(messages)


def test_tokens_travel_to_their_experts_and_back():
    # 4 ranks with one expert each, every token of rank 0 goes to 2 of them, evenly: of 8 tokens x 2 choices 12 leave
    chosen = torch.tensor([[0, 1], [2, 3]] * 4).flatten()
    assert (chosen != 0).sum() == 12
    assert expert_sent(8, 5, 2, 4) == 2 * 12 * 5


def test_four_all_reduces_a_block():
    assert tensor_sent(10, 3, 2) == 4 * 30  # each sends 2 x 1/2 of 30 numbers


def test_times_are_equal_at_the_break_even():
    flops, bandwidth, n, ranks = 1e14, 1e10, 3e9, 10**9
    for stage in range(4):
        tokens = break_even(stage, flops, bandwidth)
        sending = 2 * zero_sent(stage, n, ranks) / bandwidth
        assert 6 * n * tokens / flops == pytest.approx(sending)
        assert sending_share(stage, tokens, flops, bandwidth) == pytest.approx(0.5)
        assert sending_share(stage, 3 * tokens, flops, bandwidth) == pytest.approx(0.25)


def test_refuses_what_is_none():
    with pytest.raises(ValueError, match="0, 1, 2 or 3, got 4"):
        zero_bytes(4, 1, 1)
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        share(0)
