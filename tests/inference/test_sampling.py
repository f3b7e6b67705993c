"""Sampling: what each cut keeps, by hand and as in transformers; draws that follow their distribution."""

import math

import pytest
import torch

from minillm.inference.sampling import draw, min_p, temperature, top_k, top_p

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def kept(logits):
    """Numbers of the tokens that are left."""
    return torch.isfinite(logits).nonzero().flatten().tolist()


PROBABILITIES = [0.1, 0.4, 0.05, 0.25, 0.2]  # ranked: tokens 1, 3, 4, 0, 2; their sums 0.4, 0.65, 0.85, 0.95, 1
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0  # a constant in all logits changes nothing


@pytest.mark.parametrize(
    ("p", "tokens"),
    [(0.39, [1]), (0.41, [1, 3]), (0.6, [1, 3]), (0.7, [1, 3, 4]), (0.9, [0, 1, 3, 4]), (0.96, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_token_that_crosses(p, tokens):
    assert kept(top_p(LOGITS, p)) == tokens


@pytest.mark.parametrize(
    ("k", "tokens"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_largest(k, tokens):
    assert kept(top_k(LOGITS, k)) == tokens


@pytest.mark.parametrize(
    ("p", "tokens"),  # 0.4 times p: 0.38, 0.22, 0.18, 0.08, 0
    [(0.95, [1]), (0.55, [1, 3]), (0.45, [1, 3, 4]), (0.2, [0, 1, 3, 4]), (0.0, [0, 1, 2, 3, 4]), (1.0, [1])],
)
def test_min_p_is_a_share_of_the_most_likely(p, tokens):
    assert kept(min_p(LOGITS, p)) == tokens


def test_temperature_by_hand():
    # probabilities 1/4, 3/4; at 1/2 squared, 1/10 and 9/10; at 2 their roots, 1 : sqrt(3)
    logits = torch.tensor([0.25, 0.75]).log()
    torch.testing.assert_close(temperature(logits, 0.5).softmax(0), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(temperature(logits, 2.0).softmax(0), torch.tensor([1, 3**0.5]) / (1 + 3**0.5))


@pytest.mark.parametrize("cut", [lambda x: top_k(x, 3), lambda x: top_p(x, 0.6), lambda x: min_p(x, 0.3)])
def test_what_is_kept_is_unchanged_and_rows_are_apart(cut):
    logits = randn(2, 5, 50, seed=1) * 2
    out = cut(logits)
    left = torch.isfinite(out)
    assert torch.equal(out[left], logits[left])
    assert (out[~left] == -math.inf).all()
    assert left.any(dim=-1).all()
    assert not left.all(dim=-1).any()
    for i in range(2):
        for j in range(5):
            assert torch.equal(cut(logits[i, j]), out[i, j])


def test_cuts_do_not_change_their_input():
    logits = randn(3, 20)
    before = logits.clone()
    top_k(logits, 2), top_p(logits, 0.5), min_p(logits, 0.5), temperature(logits, 0.5)
    assert torch.equal(logits, before)


def test_the_most_likely_token_always_stays():
    logits = torch.tensor([0.0, 30.0, 1.0])  # its probability rounds to 1
    for out in (top_p(logits, 1e-9), top_p(logits, 0.999999), top_k(logits, 1), min_p(logits, 1.0)):
        assert kept(out) == [1]


def test_ties_with_the_last_one_kept_stay_in_top_k_and_min_p():
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert kept(top_k(logits, 2)) == [0, 1, 2]
    assert kept(min_p(torch.zeros(3), 1.0)) == [0, 1, 2]


def test_cuts_that_keep_everything_do():
    logits = randn(4, 20000, seed=2)
    for out in (top_p(logits, 1.0), top_k(logits, 20000), min_p(logits, 0.0), temperature(logits, 1.0)):
        assert torch.equal(out, logits)


def test_cuts_follow_each_other():
    logits = top_p(top_k(LOGITS, 3), 0.8)  # of 0.4, 0.25, 0.2: 0.47, 0.29, 0.24; the sums before are 0, 0.47, 0.76
    assert kept(logits) == [1, 3, 4]
    assert kept(top_p(top_k(LOGITS, 3), 0.75)) == [1, 3]
    assert kept(top_k(top_p(LOGITS, 0.6), 4)) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_top_p_adds_up_in_float32(dtype):
    # 1,000 equal tokens of 0.001: in 8 bits the sum stops growing at 0.5 or earlier
    assert len(kept(top_p(torch.zeros(1000, dtype=dtype), 0.8))) == pytest.approx(800, abs=1)


# draws


def shares(logits, n, **more):
    """How often each token is drawn, of n draws."""
    tokens = draw(logits.expand(n, -1), **more)
    return torch.bincount(tokens, minlength=len(logits)) / n


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_distribution(device):
    n, p = 40_000, torch.tensor(PROBABILITIES)
    seen = shares(LOGITS.to(device), n, generator=torch.Generator().manual_seed(0)).cpu()
    # Pearson's statistic has mean 4 and deviation sqrt(8) with 5 tokens; above 20 in 1 of 2,000 runs
    assert (n * (seen - p).square() / p).sum() < 20
    assert draw(LOGITS.to(device)[None]).device.type == device


def test_draws_follow_the_cuts():
    n = 20_000
    seen = shares(top_p(temperature(LOGITS, 0.5), 0.7), n, generator=torch.Generator().manual_seed(0))
    # squares 0.16, 0.0625, 0.04, 0.01, 0.0025: 0.58, 0.23, ...; 0.7 is crossed by the second
    expected = torch.tensor([0, 0.16, 0, 0.0625, 0]) / 0.2225
    assert (seen == 0).tolist() == [True, False, True, False, True]
    # deviation of a share: sqrt(p (1 - p) / n) = 0.0032; 4 of them
    assert (seen - expected).abs().max() < 0.013


def test_draws_of_rows_are_independent():
    tokens = draw(torch.zeros(10_000, 2, 2), generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (10_000, 2)
    same = (tokens[:, 0] == tokens[:, 1]).float().mean()
    assert abs(same - 0.5) < 0.02  # deviation 0.005, 4 of them


def test_a_seed_gives_the_same_tokens_and_the_next_draw_others():
    logits = torch.zeros(8, 1000)
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    first, again = draw(logits, generator=one), draw(logits, generator=two)
    assert torch.equal(first, again)
    assert not torch.equal(draw(logits, generator=one), first)
    torch.manual_seed(1)
    default = draw(logits)
    torch.manual_seed(1)
    assert torch.equal(draw(logits), default)


def test_a_token_that_was_cut_is_never_drawn():
    logits = torch.full((1000, 50), -math.inf)
    logits[:, 7] = -20.0
    assert (draw(logits, generator=torch.Generator().manual_seed(0)) == 7).all()


# production


@pytest.mark.parametrize("value", [0.3, 1.0, 1.7])
def test_temperature_equals_transformers(value):
    from transformers import TemperatureLogitsWarper

    logits = randn(5, 1000)
    torch.testing.assert_close(temperature(logits, value), TemperatureLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("k", [1, 10, 1000, 2000])
def test_top_k_equals_transformers(k):
    from transformers import TopKLogitsWarper

    logits = randn(5, 1000)
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_transformers(p):
    from transformers import TopPLogitsWarper

    logits = randn(5, 1000) * 3
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.9])
def test_min_p_equals_transformers(p):
    from transformers import MinPLogitsWarper

    logits = randn(5, 1000) * 3
    assert torch.equal(min_p(logits, p), MinPLogitsWarper(p)(None, logits))


# refusals


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_of_zero(value):
    with pytest.raises(ValueError, match=r"temperature must be above 0, got .*greedy"):
        temperature(LOGITS, value)


def test_refuses_cuts_that_keep_nothing():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        top_k(LOGITS, 0)
    for p in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=f"top_p must be above 0 and at most 1, got {p}"):
            top_p(LOGITS, p)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"min_p must be between 0 and 1, got {p}"):
            min_p(LOGITS, p)
