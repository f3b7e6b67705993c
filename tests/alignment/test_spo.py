"""SPO: the tracker of each prompt, forgetting by the policy's movement, advantages over the batch, which prompts."""

import math

import pytest
import torch

from minillm.alignment.log_probs import span_mask
from minillm.alignment.spo import (
    Tracker,
    advantages,
    baseline,
    draw_prompts,
    forgetting,
    movement,
    priorities,
    start_tracker,
    update,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tracker(p=6, seed=0):
    return Tracker(1 + 5 * rand(p, seed=seed), 1 + 5 * rand(p, seed=seed + 1))


# The tracker


def test_the_start_by_hand():
    # 1 / (1 - 0.875) = 8 responses in all, of which (3 + 0.5) / (4 + 1) good
    start = start_tracker(torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(start.good, torch.tensor([5.6, 0.8]))
    torch.testing.assert_close(start.bad, torch.tensor([2.4, 7.2]))


def test_the_start_without_responses_knows_nothing():
    start = start_tracker(torch.zeros(3, 0))
    assert start.good.tolist() == start.bad.tolist() == [0.5, 0.5, 0.5]


def test_an_update_by_hand():
    # prompt 2: counts 4 and 2 fade to 3.6 and 1.8, and a good response is added; prompt 0: 1 and 3 fade to 0.5 and 1.5,
    # and a reward of 1/4 counts as a quarter of a good one. Prompt 1 was not asked.
    old = Tracker(torch.tensor([1.0, 7.0, 4.0]), torch.tensor([3.0, 8.0, 2.0]))
    new = update(old, torch.tensor([2, 0]), torch.tensor([1.0, 0.25]), torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(new.good, torch.tensor([0.75, 7.0, 4.6]))
    torch.testing.assert_close(new.bad, torch.tensor([2.25, 8.0, 1.8]))
    assert old.good.tolist() == [1, 7, 4]  # left as it was
    assert old.bad.tolist() == [3, 8, 2]


def test_one_step_moves_the_baseline_further_the_more_is_forgotten():
    # good 4, bad 4, then a success: (4 rho + 1) / (8 rho + 1)
    old = Tracker(torch.full((3,), 4.0), torch.full((3,), 4.0))
    new = update(old, torch.arange(3), torch.ones(3), torch.tensor([0.96, 0.875, 0.5]))
    moved = baseline(new) - 0.5
    expected = [(4 * rho + 1) / (8 * rho + 1) - 0.5 for rho in (0.96, 0.875, 0.5)]
    torch.testing.assert_close(moved, torch.tensor(expected))
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("rho", [0.875, 0.96])
def test_in_the_long_run_the_counts_are_the_length_of_the_memory(rho):
    state = Tracker(torch.tensor([0.5]), torch.tensor([0.5]))
    for _ in range(600):
        state = update(state, torch.tensor([0]), torch.tensor([0.3]), torch.tensor([rho]))
    torch.testing.assert_close(state.good + state.bad, torch.tensor([1 / (1 - rho)]))  # 8 and 25
    torch.testing.assert_close(baseline(state), torch.tensor([0.3]))


def test_the_baseline_follows_a_policy_that_changes():
    # a fast memory of 8 responses and a slow one of 25, success going from never to always
    state = start_tracker(torch.zeros(2, 8))
    for _ in range(20):
        state = update(state, torch.arange(2), torch.ones(2), torch.tensor([0.875, 0.96]))
    assert baseline(state)[0] > baseline(state)[1] > 0.5


def test_prompts_do_not_share_a_tracker():
    old, new = tracker(), update(tracker(), torch.tensor([3]), torch.ones(1).double(), torch.tensor([0.9]).double())
    changed = (old.good != new.good) | (old.bad != new.bad)
    assert changed.nonzero().flatten().tolist() == [3]


# Forgetting


def test_movement_by_hand():
    # |differences| 0.5, 0.1 and a masked 9; 0.3 alone: means 0.3 and 0.3. A prompt that is new has no tokens: 0
    then = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    now = torch.tensor([[-1.5, -1.9, -10.0], [-0.7, -10.0, -10.0], [-9.0, -9.0, -9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    torch.testing.assert_close(movement(then, now, mask), torch.tensor([0.3, 0.3, 0.0]))


def test_ups_and_downs_do_not_cancel():
    then, mask = randn(1, 2), torch.ones(1, 2, dtype=torch.bool)
    now = then + torch.tensor([[0.4, -0.4]])
    torch.testing.assert_close(movement(then, now, mask), torch.tensor([0.4]).double())


def test_forgetting_by_hand():
    # a movement of `half` halves, twice that quarters; within the limits
    moved = torch.tensor([0.0, 0.06, 0.12, 0.012])
    torch.testing.assert_close(forgetting(moved, least=0.01, most=0.99), torch.tensor([0.99, 0.5, 0.25, 2**-0.2]))
    torch.testing.assert_close(forgetting(moved), torch.tensor([0.96, 0.875, 0.875, 0.875]))


def test_a_policy_that_stands_still_forgets_least():
    then, mask = randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    assert forgetting(movement(then, then, mask)).tolist() == [0.96] * 4
    # the difference of the means of two different responses is noise: it forgets although nothing has moved
    assert (forgetting(movement(then, then.flip(0), mask)) < 0.96).all()


# Advantages


def test_advantages_by_hand():
    # baselines 1/2, 1/4 and 3/4; rewards 1, 0 and 1 minus them: 1/2, -1/4, 1/4. Mean 1/6; deviations 1/3, -5/12, 1/12:
    # squares (16 + 25 + 1) / 144, over 2: 21/144
    state = Tracker(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 3.0, 1.0]))
    out = advantages(state, torch.arange(3), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(out, torch.tensor([4.0, -5.0, 1.0]) / math.sqrt(21))


def test_advantages_belong_to_the_prompts_that_were_asked():
    state, prompts, rewards = tracker(), torch.tensor([4, 1, 3]), torch.tensor([1.0, 0.0, 1.0]).double()
    raw = rewards - baseline(state)[[4, 1, 3]]
    torch.testing.assert_close(advantages(state, prompts, rewards), (raw - raw.mean()) / raw.std())


def test_one_response_a_prompt_is_enough_where_a_group_of_equal_rewards_says_nothing():
    state = Tracker(torch.tensor([7.0, 1.0]), torch.tensor([1.0, 7.0]))
    out = advantages(state, torch.arange(2), torch.ones(2))
    assert out[1] > 0 > out[0]  # a success that was not to be expected, and one that was


def test_nothing_here_has_a_gradient():
    state = Tracker(*(x.requires_grad_() for x in tracker(3)))
    prompts, rewards = torch.arange(3), torch.tensor([1.0, 0.0, 1.0]).double().requires_grad_()
    then, now = randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    rho = forgetting(movement(then, now, torch.ones(3, 4, dtype=torch.bool)))
    assert not rho.requires_grad
    assert not advantages(state, prompts, rewards).requires_grad
    assert not any(x.requires_grad for x in update(state, prompts, rewards, rho))


# Which prompts


def test_priorities_by_hand():
    # deviations of success: 1/2 for an even chance, sqrt(0.09) = 0.3 for 0.9, 0 for a sure one; plus 0.1 each, of 1.1
    state = Tracker(torch.tensor([1.0, 9.0, 5.0]), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(priorities(state, explore=0.1), torch.tensor([0.6, 0.4, 0.1]) / 1.1)


def test_a_sure_prompt_is_still_asked_sometimes():
    state = Tracker(torch.tensor([5.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert priorities(state)[0] > 0
    assert priorities(state, explore=0.0)[0] == 0


def test_prompts_are_drawn_by_priority_and_never_twice():
    state, n = Tracker(torch.tensor([1.0, 9.0, 99.0, 1e6]), torch.ones(4)), 4000  # priorities 0.50, 0.32, 0.14, 0.05
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([draw_prompts(state, 1, generator=generator) for _ in range(n)]).flatten()
    share = torch.bincount(first, minlength=4) / n
    # a share of n draws is off by at most 0.5 / sqrt(n) = 0.008 in standard deviations; four of them
    torch.testing.assert_close(share, priorities(state), rtol=0, atol=0.032)
    for _ in range(20):
        assert draw_prompts(state, 4, generator=generator).sort().values.tolist() == list(range(4))


# Loops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_a_step_equals_the_authors_recipe(seed, device):
    # one pass of the recipe's loop over dictionaries of prompts, in plain numbers
    names, batch = list("abcdef"), [4, 0, 3]
    outcomes = (rand(6, 5, seed=seed) < 0.4).double()
    then, now = -randn(3, 7, seed=seed + 1).abs(), -randn(3, 7, seed=seed + 1).abs() + 0.01 * randn(3, 7, seed=seed + 2)
    mask = span_mask(torch.zeros(3, dtype=torch.long), torch.tensor([7, 2, 4]), 7)
    rewards = (rand(3, seed=seed + 3) < 0.5).double()

    size = 1 / (1 - 0.875)
    alpha = {k: size * (sum(v) + 0.5) / (5 + 1) for k, v in zip(names, outcomes.tolist(), strict=True)}
    beta = {k: size * (5 - sum(v) + 0.5) / (5 + 1) for k, v in zip(names, outcomes.tolist(), strict=True)}
    weight = {k: (alpha[k] / size * (1 - alpha[k] / size)) ** 0.5 + 0.05 for k in names}
    raw = [r - alpha[names[i]] / size for i, r in zip(batch, rewards.tolist(), strict=True)]
    mean = sum(raw) / 3
    deviation = (sum((x - mean) ** 2 for x in raw) / 2) ** 0.5
    rhos = []
    for row, i in enumerate(batch):
        kept = [j for j in range(7) if mask[row, j]]
        moved = sum(abs(then[row, j].item() - now[row, j].item()) for j in kept) / len(kept)
        rhos.append(min(max(2.0 ** (-moved / 0.06), 0.875), 0.96))
        alpha[names[i]] = rhos[-1] * alpha[names[i]] + rewards[row].item()
        beta[names[i]] = rhos[-1] * beta[names[i]] + 1 - rewards[row].item()

    start, prompts, rewards = start_tracker(outcomes.to(device)), torch.tensor(batch, device=device), rewards.to(device)
    assert priorities(start).tolist() == pytest.approx([weight[k] / sum(weight.values()) for k in names])
    ours = advantages(start, prompts, rewards)
    assert ours.tolist() == pytest.approx([(x - mean) / (deviation + 1e-8) for x in raw])
    rho = forgetting(movement(then.to(device), now.to(device), mask.to(device)))
    assert rho.tolist() == pytest.approx(rhos)
    end = update(start, prompts, rewards, rho)
    assert end.good.tolist() == pytest.approx(list(alpha.values()))
    assert end.bad.tolist() == pytest.approx(list(beta.values()))


# Refusals


@pytest.mark.parametrize("reward", [-2.0, 10.0, math.nan])
def test_refuses_rewards_that_are_no_success_or_failure(reward):
    rewards = torch.tensor([0.5, reward])
    state, prompts = Tracker(torch.ones(2), torch.ones(2)), torch.arange(2)
    with pytest.raises(ValueError, match="rewards are from 0 to 1, got"):
        update(state, prompts, rewards, torch.full((2,), 0.9))
    with pytest.raises(ValueError, match="rescale or threshold them"):
        advantages(state, prompts, rewards)
    with pytest.raises(ValueError, match="rewards are from 0 to 1"):
        start_tracker(rewards[:, None])


def test_refuses_two_responses_to_a_prompt_in_one_update():
    state = Tracker(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="one response a prompt, got 3 responses to 2 prompts"):
        update(state, torch.tensor([1, 3, 1]), torch.ones(3), torch.full((3,), 0.9))


def test_refuses_factors_and_half_lives_without_sense():
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.0"):
        start_tracker(torch.zeros(1, 2), least=1.0)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        forgetting(torch.zeros(1), least=0)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        forgetting(torch.zeros(1), most=1.5)
    with pytest.raises(ValueError, match="halves the counts is greater than 0, got 0"):
        forgetting(torch.zeros(1), half=0)


def test_refuses_a_batch_of_one_and_more_prompts_than_there_are():
    state = Tracker(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="at least 2 responses, got 1"):
        advantages(state, torch.tensor([0]), torch.ones(1))
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and 2 different prompts can be drawn, got {count}"):
            draw_prompts(state, count)
