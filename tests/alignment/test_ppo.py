"""PPO: the six regions of its gradient, GAE, KL in the reward, and nothing through masks, old policy and targets."""

import math

import pytest
import torch

from minillm.alignment.log_probs import span_mask
from minillm.alignment.ppo import (
    clip_fraction,
    clipped_surrogate,
    gae,
    gae_step,
    kl_rewards,
    policy_loss,
    ppo_loss,
    value_loss,
    whiten,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rollout(b=5, t=7, seed=0):
    """Log-probabilities of policy and old policy, advantages, and masks with holes (the output of tools)."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 3, (b,), generator=generator)
    mask = span_mask(start, start + torch.randint(1, t - 2, (b,), generator=generator), t)
    mask &= torch.rand(b, t, generator=generator) < 0.8
    mask[0, 1] = mask[1, 2] = True
    old = -randn(b, t, seed=seed + 1).abs()
    policy = (old + 0.4 * randn(b, t, seed=seed + 2)).requires_grad_()
    return policy, old, randn(b, t, seed=seed + 3), mask


# The clip


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [
        (1.0, 0.5, -0.5),  # good tokens: raised, however unlikely they have become
        (1.0, 0.9, -0.9),
        (1.0, 1.1, -1.1),
        (1.0, 1.5, 0.0),  # risen enough
        (-1.0, 0.5, 0.0),  # bad tokens: fallen enough
        (-1.0, 0.9, 0.9),
        (-1.0, 1.1, 1.1),
        (-1.0, 1.5, 1.5),  # lowered, however likely they have become
        (-1.0, 20.0, 20.0),
    ],
)
def test_the_gradient_in_every_region(advantage, ratio, slope):
    # of minus the surrogate with respect to log p: minus ratio times advantage where it is not cut
    log_p = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    policy_loss(
        log_p, torch.zeros_like(log_p), torch.full_like(log_p, advantage), torch.ones(1, 1, dtype=torch.bool)
    ).backward()
    assert log_p.grad.item() == pytest.approx(slope)


def test_the_surrogate_by_hand():
    # clip 0.2: the smaller of r A and (r in 0.8 .. 1.2) A
    ratio = torch.tensor([0.5, 1.1, 1.5, 0.5, 1.1, 1.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    # min(1, 1.6); 2.2; min(3, 2.4); min(-1, -1.6); -2.2; min(-3, -2.4)
    expected = torch.tensor([1.0, 2.2, 2.4, -1.6, -2.2, -3.0])
    torch.testing.assert_close(clipped_surrogate(ratio, advantage), expected)


def test_there_may_be_more_room_above_than_below():
    ratio, advantage = torch.tensor([1.25, 0.75]), torch.tensor([1.0, -1.0])
    torch.testing.assert_close(clipped_surrogate(ratio, advantage, low=0.2, high=0.28), torch.tensor([1.25, -0.8]))


def test_the_loss_by_hand():
    # three tokens: 2.4, 1, -3 (see above) and a masked one: minus 0.4 / 3
    ratio = torch.tensor([[1.5, 1.0, 9.0], [1.5, 9.0, 9.0]])
    advantages = torch.tensor([[2.0, 1.0, 5.0], [-2.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = policy_loss(ratio.log(), torch.zeros(2, 3), advantages, mask)
    assert loss.item() == pytest.approx(-0.4 / 3)
    # cut are the 1.5 with a positive advantage, not that with a negative one: 1 token of 3
    assert clip_fraction(ratio.log(), torch.zeros(2, 3), advantages, mask).item() == pytest.approx(1 / 3)


def test_the_first_step_is_reinforce_and_cuts_nothing():
    policy, _, advantages, mask = rollout()
    loss = policy_loss(policy, policy.detach(), advantages, mask)
    reinforce = -(policy * advantages)[mask].mean()
    torch.testing.assert_close(*(torch.autograd.grad(x, policy)[0] for x in (loss, reinforce)))
    torch.testing.assert_close(loss, -advantages[mask].mean())
    assert clip_fraction(policy, policy.detach(), advantages, mask).item() == 0


def test_the_clip_fraction_is_the_share_of_tokens_without_gradient():
    policy, old, advantages, mask = rollout()
    policy_loss(policy, old, advantages, mask).backward()
    silent = (policy.grad == 0) & mask
    assert 0 < silent.sum() < mask.sum()
    assert clip_fraction(policy, old, advantages, mask).item() == pytest.approx((silent.sum() / mask.sum()).item())


def test_the_ratio_makes_old_samples_count_for_the_present_policy():
    # without clipping, the loss over all tokens weighed as the old policy samples them has the gradient of the
    # present policy's expected advantage
    logits, old, advantages = randn(6).requires_grad_(), randn(6, seed=1).log_softmax(0), randn(6, seed=2)
    log_p = logits.log_softmax(0)
    weights = old.exp() * 6  # policy_loss takes the mean of 6 tokens
    mask = torch.ones(1, 6, dtype=torch.bool)
    loss = policy_loss(log_p[None], old[None], (weights * advantages)[None], mask, clip=1e9)
    expected = -(log_p.exp() * advantages).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


# KL in the loss


def test_the_loss_with_kl_by_hand():
    # ratios 1.5 and 0.5 with advantages 2 and -2: surrogates 2.4 and -1.6 (see above), the mean 0.4. The reference is
    # at half and at twice the policy: d = ln 2 and -ln 2, k3 = 1/2 - 1 + ln 2 and 2 - 1 - ln 2, the mean 1/4
    policy = torch.tensor([[1.5, 0.5, 7.0]]).log()
    reference = policy - torch.tensor([[2.0, 0.5, 9.0]]).log()
    advantages, mask = torch.tensor([[2.0, -2.0, 3.0]]), torch.tensor([[True, True, False]])
    loss = ppo_loss(policy, torch.zeros(1, 3), reference, advantages, mask, beta=0.4)
    assert loss.item() == pytest.approx(-0.4 + 0.4 * 0.25)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_with_kl_equals_a_loop(seed, device):
    policy, old, advantages, mask = (x.to(device) for x in rollout(seed=10 * seed))
    reference = (old - 0.5 * randn(*old.shape, seed=seed).to(device).abs()).tolist()
    p, o, a, total = policy.tolist(), old.tolist(), advantages.tolist(), 0.0
    kept = mask.nonzero().tolist()
    for i, j in kept:
        ratio = math.exp(p[i][j] - o[i][j])
        d = p[i][j] - reference[i][j]
        total += -min(ratio * a[i][j], min(max(ratio, 0.7), 1.3) * a[i][j]) + 0.3 * (math.exp(-d) - 1 + d)
    loss = ppo_loss(policy, old, torch.tensor(reference).to(old), advantages, mask, clip=0.3, beta=0.3)
    assert loss.item() == pytest.approx(total / len(kept), rel=1e-5)  # the reference passes through float32


def test_the_loss_with_kl_has_gradient_at_response_tokens_of_the_policy_only():
    policy, old, advantages, mask = rollout()
    reference = old - 0.3
    others = [old, reference, advantages]
    for x in others:
        x.requires_grad_()
    clean = ppo_loss(policy, *others, mask)
    clean.backward()
    assert all(x.grad is None for x in others)
    assert torch.equal(policy.grad != 0, mask)  # KL pulls also where clipping silences the rest
    for nothing in (torch.nan, -torch.inf):
        dirty = [x.detach().masked_fill(~mask, nothing).requires_grad_() for x in (policy, *others)]
        value = ppo_loss(*dirty, mask)
        torch.testing.assert_close(value, clean)
        value.backward()
        torch.testing.assert_close(dirty[0].grad, policy.grad)


def test_without_weight_the_kl_does_not_count_and_at_the_reference_it_is_0():
    policy, old, advantages, mask = rollout()
    loss = policy_loss(policy, old, advantages, mask)
    torch.testing.assert_close(ppo_loss(policy, old, old - 9, advantages, mask, beta=0.0), loss)
    torch.testing.assert_close(ppo_loss(policy, old, policy.detach(), advantages, mask, beta=9.0), loss)


# Rewards with KL


def test_rewards_with_kl_by_hand():
    # log ratios 1, -2, 3: -0.1 times that, and the score 5 at the last response token of each row
    policy, reference = torch.tensor([[1.0, -2.0, 3.0, 9.0]] * 2), torch.zeros(2, 4)
    mask = torch.tensor([[True, True, True, False], [False, True, False, False]])
    rewards = kl_rewards(torch.tensor([5.0, -1.0]), policy, reference, mask, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.2, 4.7, 0.0], [0.0, -0.8, 0.0, 0.0]]))


@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_of_the_rewards_is_the_score_minus_beta_log_ratio_of_the_response(device):
    policy, reference, score, mask = (x.to(device) for x in rollout())
    rewards = kl_rewards(score[:, 0], policy, reference, mask, beta=0.3)
    any_token = mask.any(1)
    expected = score[:, 0] * any_token - 0.3 * ((policy - reference) * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1), expected.detach())
    assert not rewards.requires_grad


# GAE


def test_gae_by_hand():
    # gamma 1/2, lam 1/2, so errors fade by 1/4. Backwards: error 2 = 3 - 4 = -1, advantage -1;
    # error 1 = 2 + 4/2 - 1 = 3, advantage 3 - 1/4 = 2.75; error 0 = 1 + 1/2 - 2 = -0.5, advantage -0.5 + 2.75/4
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 1.0, 4.0]])
    out = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    torch.testing.assert_close(out.advantages, torch.tensor([[0.1875, 2.75, -1.0]]))
    torch.testing.assert_close(out.returns, torch.tensor([[2.1875, 3.75, 3.0]]))
    step = gae_step(*torch.tensor([[2.0], [1.0], [4.0], [-1.0]]), gamma=0.5, lam=0.5)
    assert step.item() == 2.75


def test_lam_1_is_all_that_comes_minus_the_value_and_lam_0_one_step():
    rewards, values = randn(4, 6), randn(4, 6, seed=1)
    mask = torch.ones(4, 6, dtype=torch.bool)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, lam=1.0).advantages, to_come - values)
    torch.testing.assert_close(gae(rewards, values, mask, lam=1.0).returns, to_come)
    after = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(gae(rewards, values, mask, lam=0.0).advantages, rewards + after - values)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, mask = randn(4, 6), torch.ones(4, 6, dtype=torch.bool)
    values = rewards.flip(1).cumsum(1).flip(1)
    out = gae(rewards, values, mask, lam=0.7)
    torch.testing.assert_close(out.advantages, torch.zeros_like(values))
    torch.testing.assert_close(out.returns, values)


def test_the_same_reward_tells_every_token_with_lam_1_and_only_the_last_with_lam_0():
    rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
    values = torch.zeros(1, 4)
    assert gae(rewards, values, mask, lam=1.0).advantages.tolist() == [[1, 1, 1, 1]]
    assert gae(rewards, values, mask, lam=0.0).advantages.tolist() == [[0, 0, 0, 1]]
    assert gae(rewards, values, mask, gamma=0.5, lam=1.0).advantages.tolist() == [[0.125, 0.25, 0.5, 1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_gae_equals_the_sum_over_errors_of_the_unmasked_tokens(seed, device):
    _, rewards, values, mask = (x.to(device) for x in rollout(seed=10 * seed))
    gamma, lam = 0.9, 0.8
    out = gae(rewards, values, mask, gamma=gamma, lam=lam)
    advantages = torch.zeros_like(rewards)
    for row in range(5):
        kept = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row, kept].tolist(), [*values[row, kept].tolist(), 0.0]
        errors = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(kept))]
        for i, place in enumerate(kept):
            advantages[row, place] = sum((gamma * lam) ** j * e for j, e in enumerate(errors[i:]))
    torch.testing.assert_close(out.advantages, advantages)
    torch.testing.assert_close(out.returns, torch.where(mask, advantages + values, 0))


def test_what_is_masked_does_not_matter():
    _, rewards, values, mask = rollout()
    clean = gae(rewards, values, mask)
    dirty = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.nan), mask)
    torch.testing.assert_close(dirty.advantages, clean.advantages)
    torch.testing.assert_close(dirty.returns, clean.returns)


def test_equals_the_formula_of_trl():
    # TRL's PPOTrainer, before it was removed: responses from the left, padded right, rewards and values set to 0 there,
    # the recursion over all columns, advantages whitened over the response's tokens afterwards
    _, rewards, values, _ = rollout()
    mask = span_mask(torch.zeros(5, dtype=torch.long), torch.tensor([7, 3, 1, 5, 6]), 7)
    rewards, values = rewards * mask, values * mask
    last, reverse = 0, []
    for t in reversed(range(7)):
        next_values = values[:, t + 1] if t < 6 else 0.0
        delta = rewards[:, t] + 1.0 * next_values - values[:, t]
        last = delta + 1.0 * 0.95 * last
        reverse.append(last)
    advantages = torch.stack(reverse[::-1], dim=1)
    returns = advantages + values
    out = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(out.advantages, advantages * mask)
    torch.testing.assert_close(out.returns, returns * mask)
    kept = advantages[mask]
    whitened = (advantages - kept.mean()) * torch.rsqrt(kept.var(unbiased=True) + 1e-8)
    torch.testing.assert_close(whiten(out.advantages, mask), whitened * mask)


@pytest.mark.parametrize("device", DEVICES)
def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_response_tokens(device):
    _, _, advantages, mask = (x.to(device) for x in rollout())
    out = whiten(100 * advantages + 7, mask)
    assert out[mask].mean().item() == pytest.approx(0, abs=1e-12)  # rounding of float64
    assert out[mask].std().item() == pytest.approx(1)
    assert (out[~mask] == 0).all()


# The critic


def test_the_value_loss_by_hand():
    # clip 0.2, old value 0, return 1. Value 0.5 went further than allowed: (0.5 - 1)^2 = 0.25 and (0.2 - 1)^2 = 0.64,
    # the larger 0.64. Value -0.5: 2.25 and (-0.2 - 1)^2 = 1.44, the larger 2.25. Value 0.1: 0.81 both.
    values = torch.tensor([[0.5, -0.5, 0.1, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss = value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask)
    assert loss.item() == pytest.approx((0.64 + 2.25 + 0.81) / 3 / 2)


@pytest.mark.parametrize(("value", "slope"), [(0.5, 0.0), (0.1, -0.9), (-0.1, -1.1), (-0.5, -1.5), (1.5, 0.0)])
def test_a_value_that_went_far_towards_its_return_is_not_pulled_further(value, slope):
    # old value 0, return 1, clip 0.2; 1.5 went past it: (1.5 - 1)^2 < (0.2 - 1)^2, so it is not pulled back either
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    value_loss(values, zero, one, torch.ones(1, 1, dtype=torch.bool)).backward()
    assert values.grad.item() == pytest.approx(slope)


def test_with_a_wide_clip_the_value_loss_is_half_the_mean_square():
    values, old, returns, mask = rollout()
    expected = (values - returns)[mask].square().mean() / 2
    torch.testing.assert_close(value_loss(values, old, returns, mask, clip=1e9), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_losses_equal_loops(seed, device):
    policy, old, advantages, mask = (x.to(device) for x in rollout(seed=10 * seed))
    p, o, a = policy.tolist(), old.tolist(), advantages.tolist()
    kept = mask.nonzero().tolist()
    surrogate = square = 0.0
    for i, j in kept:
        ratio = math.exp(p[i][j] - o[i][j])
        near = min(max(ratio, 0.7), 1.3)
        surrogate += min(ratio * a[i][j], near * a[i][j])
        close = min(max(p[i][j], o[i][j] - 0.3), o[i][j] + 0.3)
        square += max((p[i][j] - a[i][j]) ** 2, (close - a[i][j]) ** 2)
    assert policy_loss(policy, old, advantages, mask, clip=0.3).item() == pytest.approx(-surrogate / len(kept))
    assert value_loss(policy, old, advantages, mask, clip=0.3).item() == pytest.approx(square / len(kept) / 2)


# Where gradients go


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_masked_tokens_have_no_gradient_even_if_they_are_no_numbers(loss):
    policy, old, target, mask = rollout()
    clean = loss(policy, old, target, mask)
    clean.backward()
    assert (policy.grad[~mask] == 0).all()
    assert (policy.grad[mask] != 0).any()
    for nothing in (torch.nan, torch.inf):
        dirty = [x.detach().masked_fill(~mask, nothing).requires_grad_() for x in (policy, old, target)]
        value = loss(*dirty, mask)
        torch.testing.assert_close(value, clean)
        value.backward()
        torch.testing.assert_close(dirty[0].grad, policy.grad)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_no_gradient_flows_into_old_and_target(loss):
    policy, old, target, mask = rollout()
    old.requires_grad_()
    target.requires_grad_()
    loss(policy, old, target, mask).backward()
    assert old.grad is None
    assert target.grad is None


def test_advantages_and_returns_have_no_gradient():
    values, rewards, _, mask = rollout()
    assert not any(x.requires_grad for x in gae(rewards, values, mask))
    assert not whiten(values, mask).requires_grad
    assert not clip_fraction(values, rewards, rewards, mask).requires_grad


# Refusals


def test_refuses_one_advantage_for_a_response_where_tokens_have_their_own():
    policy, old, advantages, mask = rollout(b=7, t=7)
    # [b] against [b, t] would be read as one advantage a column where b == t
    with pytest.raises(ValueError, match=r"one bool for each token of \(7,\), got \(7, 7\)"):
        policy_loss(policy, old, advantages[:, 0], mask)


def test_refuses_old_values_and_rewards_of_another_shape():
    policy, old, advantages, mask = rollout()
    with pytest.raises(ValueError, match=r"\(5, 1\), got \(5, 7\)"):
        policy_loss(policy, old[:, :1], advantages, mask)
    with pytest.raises(ValueError, match=r"\(5, 1\), got \(5, 7\)"):
        value_loss(policy, old, advantages[:, :1], mask)
    with pytest.raises(ValueError, match=r"\(5, 6\), got \(5, 7\)"):
        gae(old[:, :6], old, mask)
    with pytest.raises(ValueError, match=r"\(5, 6\), got \(5, 7\)"):
        gae(old, old[:, :6], mask)


@pytest.mark.parametrize(("gamma", "lam"), [(1.1, 0.9), (-0.1, 0.9), (1.0, 2.0), (1.0, -1.0)])
def test_refuses_discounts_that_grow(gamma, lam):
    _, rewards, values, mask = rollout()
    with pytest.raises(ValueError, match=f"from 0 to 1, got {gamma} and {lam}"):
        gae(rewards, values, mask, gamma=gamma, lam=lam)


def test_refuses_to_whiten_one_token():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        whiten(randn(1, 3), torch.tensor([[True, False, False]]))
