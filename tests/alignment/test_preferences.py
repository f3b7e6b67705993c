"""The tabular laboratory of DPO: closed form, populations of raters, descent, displaced likelihood."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.alignment.dpo import dpo_loss
from minillm.alignment.kl import exact_kl
from minillm.alignment.preferences import descend, every_pair, margins, objective, optimum, population_loss

F64 = torch.float64
REWARD = torch.tensor([1.0, 0.6, 0.2, 0.0, -0.5, -1.0], dtype=F64)
REFERENCE = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.25, 0.1], dtype=F64).log()
PAIRS = every_pair(6)


def bradley_terry():
    return (REWARD[PAIRS[0]] - REWARD[PAIRS[1]]).sigmoid()


def random_policy(seed):
    return torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(seed)).log_softmax(0)


# The optimum of RLHF


def test_the_optimum_by_hand():
    # reference 1/2 1/4 1/4, rewards 0, ln 2, ln 4 at beta 1: 1/2, 2/4, 4/4, divided by their sum 2
    reference, reward = torch.tensor([2.0, 1, 1], dtype=F64), torch.tensor([1.0, 2, 4], dtype=F64)
    policy = optimum((reference / 4).log(), reward.log(), beta=1.0)
    torch.testing.assert_close(policy.exp(), torch.tensor([0.25, 0.25, 0.5], dtype=F64))
    # at beta 1/2 the factors are squared: 1/2, 4/4, 16/4, divided by 5.5
    policy = optimum((reference / 4).log(), reward.log(), beta=0.5)
    torch.testing.assert_close(policy.exp(), torch.tensor([1, 2, 8], dtype=F64) / 11)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_no_policy_beats_the_optimum(beta):
    best = objective(optimum(REFERENCE, REWARD, beta=beta), REFERENCE, REWARD, beta=beta)
    # its value is beta log Z
    torch.testing.assert_close(best, beta * (REFERENCE + REWARD / beta).logsumexp(0))
    for seed in range(50):
        assert objective(random_policy(seed), REFERENCE, REWARD, beta=beta) < best


def test_the_objective_by_hand():
    # rewards 2 and 0 at 3/4 and 1/4: 1.5; KL to 1/2 1/2 is 3/4 ln 3/2 + 1/4 ln 1/2
    policy, reference = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    value = objective(policy, reference, torch.tensor([2.0, 0.0]), beta=2.0)
    assert value.item() == pytest.approx(1.5 - 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


# Pairs and populations


def test_every_pair_is_there_once():
    assert sorted(every_pair(4).T.tolist()) == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]


def test_margins_by_hand():
    policy, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.5])
    pairs = torch.tensor([[0, 2], [1, 0]])  # log ratios 1, 0, -0.5
    assert margins(policy, reference, pairs, beta=2.0).tolist() == [2.0, -3.0]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_if_all_agree_it_is_the_loss_of_dpo(beta):
    policy, mask = random_policy(1), torch.ones(2, 15, 1, dtype=torch.bool)
    ours = population_loss(policy, REFERENCE, PAIRS, torch.ones(15, dtype=F64), beta=beta)
    pairs = policy[PAIRS][..., None], REFERENCE[PAIRS][..., None]
    torch.testing.assert_close(ours, dpo_loss(*pairs, mask, beta=beta))


def test_equals_torch_binary_cross_entropy():
    policy, agreement = random_policy(2), torch.rand(15, dtype=F64, generator=torch.Generator().manual_seed(0))
    ratio = policy - REFERENCE
    expected = F.binary_cross_entropy_with_logits(0.3 * (ratio[PAIRS[0]] - ratio[PAIRS[1]]), agreement)
    torch.testing.assert_close(population_loss(policy, REFERENCE, PAIRS, agreement, beta=0.3), expected)


# Descent


@pytest.mark.parametrize("beta", [0.25, 1.0, 2.0])
def test_dpo_ends_at_the_optimum_of_rlhf(beta):
    path = descend(
        lambda p: population_loss(p, REFERENCE, PAIRS, bradley_terry(), beta=beta),
        REFERENCE,
        lr=15 / beta**2,
        steps=200,
    )
    assert path.shape == (201, 6)
    torch.testing.assert_close(path[0], REFERENCE)
    torch.testing.assert_close(path[-1], optimum(REFERENCE, REWARD, beta=beta))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_certain_preferences_have_no_optimum(beta):
    reference = torch.full((3,), 1 / 3, dtype=F64).log()
    pairs, certain = torch.tensor([[0, 0], [1, 2]]), torch.ones(2, dtype=F64)
    path = descend(lambda p: population_loss(p, reference, pairs, certain, beta=beta), reference, lr=10.0, steps=500)
    margin = torch.stack([margins(p, reference, pairs, beta=beta) for p in path])
    assert (margin.diff(dim=0) > 0).all()  # it never stops
    kl = exact_kl(path, reference.expand_as(path))
    assert 0.95 * math.log(3) < kl[-1] <= math.log(3) + 1e-9  # all on one of three: ln 3


def test_nine_of_ten_have_one():
    # a single pair: the margin ends at the log odds of the agreement, ln 9
    pairs, most = torch.tensor([[0], [1]]), torch.tensor([0.9], dtype=F64)
    path = descend(lambda p: population_loss(p, REFERENCE, pairs, most, beta=0.5), REFERENCE, lr=8.0, steps=300)
    assert margins(path[-1], REFERENCE, pairs, beta=0.5).item() == pytest.approx(math.log(9))


def test_one_step_by_hand():
    # two responses at 1/2, one certain pair, beta 1: the gradient of the logits is -1/2 and 1/2
    reference, pairs = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([[0], [1]])
    certain = torch.ones(1, dtype=F64)
    path = descend(lambda p: population_loss(p, reference, pairs, certain, beta=1.0), reference, lr=2.0, steps=1)
    torch.testing.assert_close(path[1], torch.tensor([1.0, -1.0], dtype=F64).log_softmax(0))


def test_shared_features_displace_the_chosen():
    # chosen (1, 0.2) and rejected (1.5, 0) are alike; the third is their opposite. The step of the logits is
    # features @ (chosen - rejected) = (-0.46, -0.75, 0.5) times the same number: the third gains, both others lose.
    features = torch.tensor([[1.0, 0.2], [1.5, 0.0], [-1.0, 0.0]], dtype=F64)
    reference = torch.tensor([0.6, 0.3, 0.1], dtype=F64).log()
    pairs, certain = torch.tensor([[0], [1]]), torch.ones(1, dtype=F64)

    def loss(log_policy):
        return population_loss(log_policy, reference, pairs, certain, beta=0.1)

    path = descend(loss, reference, lr=2.0, steps=1, features=features)
    moved = (path[1] - reference) - (path[1] - reference)[0]
    torch.testing.assert_close(moved, 2.0 * 0.1 * 0.5 * torch.tensor([0, -0.29, 0.96], dtype=F64))
    path = descend(loss, reference, lr=2.0, steps=200, features=features)
    assert path[-1, 2] > -0.01
    assert path[-1, 0] < path[0, 0] - 5
    # with a logit of its own each, the chosen response gains
    assert (descend(loss, reference, lr=2.0, steps=50)[:, 0].diff() > 0).all()


# Refusals


def test_refuses_a_beta_that_is_not_positive():
    with pytest.raises(ValueError, match="beta is greater than 0, got 0"):
        optimum(REFERENCE, REWARD, beta=0)
    with pytest.raises(ValueError, match="beta is greater than 0, got 0"):
        objective(REFERENCE, REFERENCE, REWARD, beta=0)
    with pytest.raises(ValueError, match="beta is greater than 0, got -1"):
        population_loss(REFERENCE, REFERENCE, PAIRS, bradley_terry(), beta=-1)
