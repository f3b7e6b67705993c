"""Baselines counted out: silent groups, mean squares, agreement of gradients, and a tracker that follows the truth."""

import itertools

import pytest
import torch

from minillm.alignment import spo, tasks
from minillm.alignment.baselines import agreement, attempts, follow, makeup, mean_square, silent
from minillm.alignment.rollout import rescore, sample
from minillm.architecture.pretrained import load

F64 = torch.float64
P = torch.tensor([0.0, 0.05, 0.5, 0.9, 1.0], dtype=F64)


def outcomes(p, g):
    """Every row of g rewards and its probability, one by one."""
    for row in itertools.product([0.0, 1.0], repeat=g):
        yield torch.tensor([row], dtype=F64), p ** sum(row) * (1 - p) ** (g - sum(row))


@pytest.mark.parametrize("g", [2, 3, 5])
def test_silent_groups_equal_enumeration(g):
    for p in P.tolist():
        rows = list(outcomes(p, g))
        assert silent(torch.tensor(p, dtype=F64), g).item() == pytest.approx(
            sum(w for r, w in rows if r.min() == r.max())
        )


def test_mean_squares_by_hand():
    # p = 1/4, baseline 1/2: a quarter of (1/2)^2 and three quarters of (1/2)^2
    assert mean_square(torch.tensor(0.25), torch.tensor(0.5)).item() == pytest.approx(0.25)
    # the best baseline is p itself
    around = mean_square(torch.tensor([0.25] * 3), torch.tensor([0.15, 0.25, 0.35]))
    assert around[1] < around[0]
    assert around[1] < around[2]


def test_makeup_by_hand():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert makeup(rewards) == pytest.approx((0.4, 0.4, 0.2))


def test_attempts_are_those_of_the_policy():
    model, prompts = load(tasks.START), tasks.split().train[:40]
    rewards = attempts(model, prompts, 6, seed=1)
    assert rewards.shape == (40, 6)
    assert set(rewards.unique().tolist()) == {0.0, 1.0}
    assert rewards.equal(attempts(model, prompts, 6, seed=1))
    assert not rewards.equal(attempts(model, prompts, 6, seed=2))
    # rows are prompts: between them the rate differs more than within, as it would not if they were mixed up
    more = attempts(model, prompts, 64, seed=3).mean(dim=1)
    assert (rewards.mean(dim=1) - more).abs().mean() < 0.5 * (rewards.mean(dim=1) - more.flip(0)).abs().mean()


def test_agreement_is_that_of_the_policy_gradient():
    model, prompts = load(tasks.START), tasks.split().train[:48].view(3, 16, 6)
    generator, gradients = torch.Generator().manual_seed(4), []
    for batch in prompts:
        drawn = sample(model, batch, group=2, new_tokens=7, end=tasks.END, generator=generator)
        reward = tasks.rewards(drawn.prompts, drawn.tokens)
        each = (rescore(model, drawn) * drawn.mask).sum(dim=1) / drawn.mask.sum(dim=1)
        model.zero_grad()
        (-(reward - 0.3) * each).mean().backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(gradients, 2)]
    ours = agreement(model, prompts, 2, [lambda rewards: 0 * rewards + 1, lambda rewards: rewards - 0.3], seed=4)
    assert ours[1] == pytest.approx(sum(cosines) / 3, abs=1e-3)  # float32, ratios near 1


def test_the_tracker_that_follows_by_hand():
    # one sure success, one sure failure, from 1/2 of 2 counts: 2/3 and 1/3 after one, then faded by 1/2 before the next
    truth = torch.tensor([1.0, 0.0]).expand(3, 2)
    start = spo.Tracker(torch.ones(2), torch.ones(2))
    means = follow(truth, torch.tensor([1.0, 0.5, 0.5]), start, generator=torch.Generator())
    torch.testing.assert_close(means, torch.tensor([[1 / 2, 1 / 2], [2 / 3, 1 / 3], [2 / 2.5, 0.5 / 2.5]]))
    assert start.good.tolist() == [1, 1]


def test_the_one_that_forgets_fast_lags_less_and_wavers_more():
    truth = torch.cat([torch.full((80, 500), 0.3), torch.full((10, 500), 0.8)])
    start = spo.Tracker(torch.full((500,), 2.4), torch.full((500,), 5.6))
    slow, fast = (
        follow(truth, torch.full((90,), rho), start, generator=torch.Generator().manual_seed(0)) for rho in (0.96, 0.8)
    )
    assert fast[60:80].std(dim=1).mean() > 1.5 * slow[60:80].std(dim=1).mean()
    assert 0.8 - fast[-1].mean() < 0.5 * (0.8 - slow[-1].mean())
