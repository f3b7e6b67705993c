"""The trials of PPO: what they note is against the policy that sampled, and their updates are the ones stated."""

import copy
import math

import pytest
import torch

from minillm.alignment import tasks
from minillm.alignment.kl import exact_kl, gradient_as_loss, gradient_as_reward, k1, k2, k3
from minillm.alignment.ppo import policy_loss
from minillm.alignment.ppo_trials import (
    PENALTIES,
    attempt,
    drift,
    in_reward,
    mismatch,
    moments,
    outside,
    passes,
    penalised,
    plain_loss,
    recomputed_loss,
    reuse,
)
from minillm.alignment.rollout import rescore
from minillm.architecture.pretrained import load


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def start():
    return load(tasks.START)


@pytest.fixture
def model(start):
    return copy.deepcopy(start)


def samples(model, temperature=1.0):
    rollout, _, advantages = attempt(model, tasks.split().train[:24], seed=0, temperature=temperature)
    return rollout, advantages


# Samples


def test_an_attempt_is_sampled_rewarded_and_compared_with_the_mean(model):
    prompts = tasks.split().train[:20]
    rollout, rewards, advantages = attempt(model, prompts, seed=3, group=2)
    assert rollout.prompts.equal(prompts.repeat_interleave(2, dim=0))
    assert rewards.equal(tasks.rewards(rollout.prompts, rollout.tokens))
    assert 0 < rewards.mean() < 1
    kept = rewards[:, None].expand(rollout.mask.shape)[rollout.mask]
    torch.testing.assert_close(advantages[rollout.mask], (kept - kept.mean()) / kept.std())
    assert (advantages[~rollout.mask] == 0).all()
    assert not advantages.requires_grad
    assert attempt(model, prompts, seed=3, group=2).rollout.tokens.equal(rollout.tokens)
    assert not attempt(model, prompts, seed=4, group=2).rollout.tokens.equal(rollout.tokens)


def test_passes_are_of_each_prompt(model):
    prompts = tasks.split().held_out[:30]
    out = passes(model, prompts, tries=4, seed=1)
    right = attempt(model, prompts, seed=1, group=4).rewards.view(30, 4)
    assert len(out) == 4
    assert out[0] == pytest.approx(right.mean().item())
    assert out[3] == pytest.approx(right.amax(dim=1).mean().item())
    assert out == sorted(out)


# Losses without a ratio


def test_a_recomputed_ratio_gives_the_gradient_of_reinforce(model):
    rollout, gain = samples(model)
    now = (rollout.log_probs - 0.7).requires_grad_()
    losses = [f(now, rollout.log_probs, gain, rollout.mask) for f in (plain_loss, recomputed_loss)]
    expected = -torch.where(rollout.mask, gain, 0) / rollout.mask.sum()
    for loss in losses:
        torch.testing.assert_close(torch.autograd.grad(loss, now)[0], expected)
    torch.testing.assert_close(losses[0], -(now * gain)[rollout.mask].mean())


# Measures


def test_outside_and_drift_by_hand():
    ratio = torch.tensor([[0.7, 0.9, 1.15, 1.3, 50.0]]).double()
    mask = torch.tensor([[True, True, True, True, False]])
    zero = torch.zeros(1, 5).double()
    assert outside(ratio.log(), zero, mask).item() == 0.5
    assert outside(ratio.log(), zero, mask, clip=0.12).item() == 0.75
    expected = sum(r - 1 - math.log(r) for r in (0.7, 0.9, 1.15, 1.3)) / 4
    assert drift(ratio.log(), zero, mask).item() == pytest.approx(expected)


def test_drift_is_the_kl_from_the_sampler_in_the_mean():
    old, now = (torch.randn(5, generator=seeded(i)).double().log_softmax(0) for i in range(2))
    drawn = old.exp().multinomial(200_000, replacement=True, generator=seeded(2))
    mask = torch.ones(1, 200_000, dtype=torch.bool)
    # single terms have a standard deviation near 1, their mean one of 0.003
    assert drift(now[drawn][None], old[drawn][None], mask).item() == pytest.approx(exact_kl(old, now).item(), abs=0.02)


def test_measures_have_no_gradient():
    now, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    assert not outside(now, torch.ones(1, 2), mask).requires_grad
    assert not drift(now, torch.ones(1, 2), mask).requires_grad


# Many updates on the same samples


def test_the_first_note_is_at_the_sampler_and_the_last_after_all_updates(model):
    rollout, gain = samples(model)
    trace = reuse(model, rollout, gain, policy_loss, updates=3, lr=1e-3)
    assert trace.outside.shape == trace.kl.shape == (4,)
    assert trace.outside[0] == 0
    assert trace.kl[0].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        now = rescore(model, rollout)
    assert trace.outside[-1] == outside(now, rollout.log_probs, rollout.mask)
    assert trace.kl[-1] == drift(now, rollout.log_probs, rollout.mask)
    assert (trace.kl.diff() > 0).all()


def test_the_loss_gets_the_stored_log_probs_and_the_present_ones(model):
    rollout, gain = samples(model)
    seen = []

    def watched(now, old, advantages, mask):
        seen.append(now.detach())
        assert old is rollout.log_probs
        assert advantages is gain
        assert mask is rollout.mask
        return policy_loss(now, old, advantages, mask)

    reuse(model, rollout, gain, watched, updates=3, lr=1e-3)
    assert len(seen) == 3
    torch.testing.assert_close(seen[0][rollout.mask], rollout.log_probs[rollout.mask], atol=1e-4, rtol=1e-4)
    assert (seen[2] - seen[1])[rollout.mask].abs().max() > 1e-3


def test_updates_are_adam_on_gradients_of_norm_1(model, start):
    rollout, gain = samples(model)
    reuse(model, rollout, gain, lambda *args: 1e3 * policy_loss(*args), updates=2, lr=1e-3)
    twin = copy.deepcopy(start)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(2):
        now = rescore(twin, rollout)
        gradients = torch.autograd.grad(
            1e3 * policy_loss(now, rollout.log_probs, gain, rollout.mask), twin.parameters()
        )
        norm = sum(g.square().sum() for g in gradients).sqrt()
        assert norm > 1
        for p, g in zip(twin.parameters(), gradients, strict=True):
            p.grad = g / norm
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)  # Adam's step is 1e-3 whatever the gradient's size


def test_at_the_temperature_of_sampling_the_ratios_are_1_and_at_another_they_are_not(model):
    rollout, gain = samples(model, temperature=0.6)
    same = reuse(model, rollout, gain, policy_loss, updates=0, temperature=0.6)
    assert same.kl[0].item() == pytest.approx(0, abs=1e-6)
    assert reuse(model, rollout, gain, policy_loss, updates=0).kl[0] > 1e-3


def test_a_ratio_that_is_always_1_lets_the_policy_go_further(start):
    ends = []
    for loss in (policy_loss, recomputed_loss):
        model = copy.deepcopy(start)
        rollout, gain = samples(model)
        ends.append(reuse(model, rollout, gain, loss, updates=12, lr=1e-3).kl[-1])
    assert ends[1] > 1.5 * ends[0]


# A penalty alone


LOGITS, REFERENCE = torch.tensor([2.0, 1.0, 0.0, -1.0]).double(), torch.tensor([0.0, 1.0, 1.5, 0.0]).double()


def follow(surrogate, *, steps=150, lr=0.3, batch=16, seed=0):
    path = penalised(surrogate, LOGITS, REFERENCE, steps=steps, lr=lr, batch=batch, generator=seeded(seed))
    return path, exact_kl(path, REFERENCE.log_softmax(-1).expand_as(path))


def test_the_path_starts_at_the_logits_and_holds_log_probabilities():
    path, _ = follow(k2, steps=5)
    assert path.shape == (6, 4)
    torch.testing.assert_close(path[0], LOGITS.log_softmax(-1))
    torch.testing.assert_close(path.exp().sum(-1), torch.ones(6).double())


def test_a_step_of_many_samples_is_one_of_the_mean_gradient():
    path, _ = follow(k3, steps=1, lr=0.5, batch=200_000)
    expected = (LOGITS - 0.5 * gradient_as_loss(k3, LOGITS, REFERENCE)).log_softmax(-1)
    # the mean of 200,000 samples has standard errors below 0.005
    torch.testing.assert_close(path[1], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_k2_and_k3_as_a_loss_and_k1_as_a_reward_bring_the_policy_back_and_k1_as_a_loss_does_not(seed):
    ends = {name: follow(surrogate, seed=seed)[1][-1].item() for name, surrogate in PENALTIES.items()}
    assert max(ends[name] for name in ("k2 as a loss", "k3 as a loss", "k1 in the reward")) < 0.02
    assert ends["k1 as a loss"] > 0.1
    assert ends["k3 in the reward"] > 0.1


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_a_penalty_in_the_reward_has_the_gradient_of_one_in_the_reward(estimator):
    step = follow(in_reward(estimator), steps=1, lr=0.5, batch=200_000)[0][1]
    expected = (LOGITS - 0.5 * gradient_as_reward(estimator, LOGITS, REFERENCE)).log_softmax(-1)
    torch.testing.assert_close(step, expected, atol=0.03, rtol=0)  # standard errors below 0.006


def test_each_penalty_has_the_gradient_of_its_name():
    logits, reference = torch.tensor([[0.0, 1.0, 2.0, -1.0], [2.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    for name, penalty in PENALTIES.items():
        kind, _, place = name.partition(" ")
        asked = gradient_as_loss if place == "as a loss" else gradient_as_reward
        expected = asked({"k1": k1, "k2": k2, "k3": k3}[kind], logits, reference)
        torch.testing.assert_close(gradient_as_loss(penalty, logits, reference), expected)


def test_k3_in_the_reward_has_the_gradient_of_the_difference_of_the_two_kls():
    leaf, log_q = LOGITS.clone().requires_grad_(), REFERENCE.log_softmax(-1)
    log_p = leaf.log_softmax(-1)
    expected = torch.autograd.grad(exact_kl(log_p, log_q) - exact_kl(log_q, log_p), leaf)[0]
    torch.testing.assert_close(gradient_as_reward(k3, LOGITS, REFERENCE), expected)


def test_another_seed_is_another_way():
    assert follow(k2, steps=5, seed=1)[0].equal(follow(k2, steps=5, seed=1)[0])
    assert not follow(k2, steps=5, seed=1)[0].equal(follow(k2, steps=5, seed=2)[0])


# Exact means


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_moments_are_those_of_many_samples(estimator):
    log_p, log_q = LOGITS.log_softmax(-1), REFERENCE.log_softmax(-1)
    drawn = log_p.exp().multinomial(200_000, replacement=True, generator=seeded())
    values = estimator(log_p, log_q)[drawn]
    mean, deviation = moments(estimator, LOGITS, REFERENCE)
    assert mean == pytest.approx(values.mean().item(), abs=0.02)
    assert deviation == pytest.approx(values.std().item(), abs=0.02)


def test_with_the_stored_ratio_the_gradient_is_exact_and_with_1_it_is_not():
    worth = torch.tensor([1.0, 2.0, 3.0, 5.0]).double()
    as_if, stored = mismatch(LOGITS, worth, temperature=0.8)
    # of sum q log p A, with q the sampler: q A - p sum(q A)
    p, q = LOGITS.softmax(0), (LOGITS / 0.8).softmax(0)
    gain = worth - (p * worth).sum()
    wrong, right = q * gain - p * (q * gain).sum(), p * gain
    assert as_if == pytest.approx(((wrong - right).norm() / right.norm()).item())
    assert as_if > 0.05
    assert stored < 1e-9
    assert mismatch(LOGITS, worth, temperature=1.0) == pytest.approx((0, 0), abs=1e-9)
