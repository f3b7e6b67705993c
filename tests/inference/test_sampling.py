"""What may be drawn, and how often: equal to transformers' warpers, and by hand."""

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minillm.inference.sampling import draw, min_p, temperature, top_k, top_p

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
IDS = torch.zeros(4, 1, dtype=torch.long)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((lambda x, t=t: temperature(x, t), TemperatureLogitsWarper(t)) for t in (0.3, 1.0, 2.5)),
        *((lambda x, k=k: top_k(x, k), TopKLogitsWarper(k)) for k in (1, 5, 50, 80)),
        *((lambda x, p=p: top_p(x, p), TopPLogitsWarper(p)) for p in (0.1, 0.5, 0.9, 0.999)),
        *((lambda x, p=p: min_p(x, p), MinPLogitsWarper(p)) for p in (0.01, 0.1, 0.5, 1.0)),
    ],
)
def test_equals_transformers(ours, theirs):
    torch.testing.assert_close(ours(LOGITS), theirs(IDS, LOGITS.clone()))


def test_the_token_that_crosses_p_is_kept():
    # 0.5 alone is short of 0.6, 0.5 + 0.3 reaches it
    assert top_p(torch.tensor([0.2, 0.5, 0.3]).log(), 0.6).isfinite().tolist() == [False, True, True]


def test_the_most_likely_token_always_stays():
    for cut in (top_k(LOGITS, 1), top_p(LOGITS, 1e-9), min_p(LOGITS, 1.0)):
        assert torch.equal(cut.argmax(-1), LOGITS.argmax(-1))
        assert cut.isfinite().sum() == len(LOGITS)


def test_drawing_follows_the_probabilities_and_the_seed():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    tokens = draw(logits, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=3) / len(tokens)
    # the standard deviation of a share is at most sqrt(0.25 / 20,000) = 0.0035; four of them
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015)
    assert torch.equal(tokens, draw(logits, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(tokens, draw(logits, generator=torch.Generator().manual_seed(1)))


def test_what_is_cut_is_never_drawn():
    cut = top_k(LOGITS, 2).repeat(500, 1)
    allowed = cut.isfinite()
    assert allowed.gather(1, draw(cut, generator=torch.Generator().manual_seed(0))[:, None]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temperature(LOGITS, 0), "above 0, got 0"),
        (lambda: top_k(LOGITS, 0), "at least 1 token, got 0"),
        (lambda: top_p(LOGITS, 0), "above 0 and at most 1, got 0"),
        (lambda: top_p(LOGITS, 1.5), "at most 1, got 1.5"),
        (lambda: min_p(LOGITS, -0.1), "between 0 and 1, got -0.1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
