"""Best-of-n: what comes out, how far that is from the start, and what n would give, from more answers."""

import itertools
import math

import pytest
import torch

from minillm.alignment.best_of_n import best_of_n, expected_best, kl_bound
from minillm.alignment.kl import exact_kl

F64 = torch.float64


def policy(k, seed=0):
    return torch.randn(k, dtype=F64, generator=torch.Generator().manual_seed(seed)).log_softmax(0)


def scores(k, seed=1):
    return torch.randn(k, dtype=F64, generator=torch.Generator().manual_seed(seed))


# What comes out


def test_by_hand():
    # 1/2, 1/4, 1/4 with rising scores, best of 2: (1/2)^2, (3/4)^2 - (1/2)^2, 1 - (3/4)^2
    out = best_of_n(torch.tensor([0.5, 0.25, 0.25], dtype=F64).log(), torch.tensor([1.0, 2, 3], dtype=F64), 2).exp()
    torch.testing.assert_close(out, torch.tensor([4, 5, 7], dtype=F64) / 16)


@pytest.mark.parametrize("score", [[0.3, -1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], ids=["apart", "tie", "equal"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_every_sequence_of_draws(score, n):
    log_p, expected = policy(3), torch.zeros(3, dtype=F64)
    for drawn in itertools.product(range(3), repeat=n):
        best = max(drawn, key=lambda i: score[i])  # the first of the highest
        expected[best] += math.exp(sum(log_p[i].item() for i in drawn))
    torch.testing.assert_close(best_of_n(log_p, torch.tensor(score, dtype=F64), n).exp(), expected)


def test_one_draw_changes_nothing_and_many_leave_the_best():
    log_p, score = policy(5), scores(5)
    torch.testing.assert_close(best_of_n(log_p, score, 1), log_p)
    assert best_of_n(log_p, score, 1000).argmax() == score.argmax()
    assert best_of_n(log_p, score, 1000).exp().max() > 0.999


def test_only_the_order_of_scores_counts():
    log_p, score = policy(6), scores(6)
    torch.testing.assert_close(best_of_n(log_p, score.exp() * 7 - 3, 5), best_of_n(log_p, score, 5))


# How far from the start


def test_the_bound_by_hand():
    assert kl_bound(1) == 0
    assert kl_bound(2) == pytest.approx(math.log(2) - 1 / 2)
    assert kl_bound(64) == pytest.approx(6 * math.log(2) - 63 / 64)


@pytest.mark.parametrize("n", [2, 5, 20, 100])
@pytest.mark.parametrize("seed", range(4))
def test_the_kl_is_never_above_the_bound(n, seed):
    log_p = policy(7, seed)
    assert exact_kl(best_of_n(log_p, scores(7, seed + 10), n), log_p) < kl_bound(n)


@pytest.mark.parametrize("n", [2, 8, 32])
def test_the_bound_is_reached_where_no_answer_is_likely(n):
    log_p = torch.full((4000,), -math.log(4000), dtype=F64)
    # each interval of 1/4000 adds an error of the second order: some n / 4000
    assert exact_kl(best_of_n(log_p, scores(4000), n), log_p).item() == pytest.approx(kl_bound(n), abs=n / 4000)


# What n would give


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_estimate_is_the_mean_over_all_choices(n):
    score, value = scores(6), scores(6, seed=2)
    several = [max(chosen, key=lambda i: score[i].item()) for chosen in itertools.combinations(range(6), n)]
    expected = sum(value[i].item() for i in several) / len(several)
    assert expected_best(score, value, n) == pytest.approx(expected)


def test_of_one_it_is_the_mean_and_of_all_the_best():
    score, value = scores(9), scores(9, seed=2)
    assert expected_best(score, value, 1) == pytest.approx(value.mean().item())
    assert expected_best(score, value, 9) == value[score.argmax()].item()


def test_the_estimate_is_what_the_policy_gives():
    log_p, score = policy(4), scores(4)
    drawn = log_p.exp().multinomial(20000, replacement=True, generator=torch.Generator().manual_seed(3))
    exact = best_of_n(log_p, score, 3).exp() @ score
    # the standard deviation of one best answer is below 1, of 6,666 separate ones 0.012
    assert expected_best(score[drawn], score[drawn], 3) == pytest.approx(exact.item(), abs=0.04)


# Refusals


def test_refuses_to_choose_among_none_or_more_than_there_are():
    with pytest.raises(ValueError, match="best-of-n needs n of at least 1, got 0"):
        kl_bound(0)
    with pytest.raises(ValueError, match="best-of-n needs n of at least 1, got -1"):
        best_of_n(policy(3), scores(3), -1)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n is from 1 to the 3 answers, got {n}"):
            expected_best(scores(3), scores(3), n)
