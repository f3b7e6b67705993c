"""Log-probabilities of given tokens: temperature, one shift, head in chunks, masks that let nothing through."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.alignment.log_probs import (
    head_log_probs,
    next_token_log_probs,
    response_mask,
    sequence_mean,
    sequence_sum,
    span_mask,
    token_log_probs,
    token_mean,
)
from minillm.training.objective import next_token_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(*shape, v=11, seed=0):
    return torch.randint(v, shape, generator=torch.Generator().manual_seed(seed))


# Of single tokens


def test_token_log_probs_by_hand():
    # odds 1 : 2 : 5, so probabilities 1/8, 2/8, 5/8; at temperature 1/2 the odds are squared: 1 : 4 : 25, of 30
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log().expand(3, 3)
    ids = torch.tensor([0, 1, 2])
    torch.testing.assert_close(token_log_probs(logits, ids).exp(), torch.tensor([1, 2, 5]).double() / 8)
    cold = token_log_probs(logits, ids, temperature=0.5)
    torch.testing.assert_close(cold.exp(), torch.tensor([1, 4, 25]).double() / 30)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_token_log_probs_are_those_of_the_sampler(temperature, device):
    logits, ids = randn(4, 5, 11).to(device), tokens(4, 5).to(device)
    sampler = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(token_log_probs(logits, ids, temperature=temperature), sampler.log_prob(ids))


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1000.0, 999.0]])
    # the log softmax of (1, 0), to the last bits: the largest logit is taken off before anything is added
    expected = torch.tensor([-math.log1p(math.exp(-1))])
    torch.testing.assert_close(token_log_probs(logits, torch.tensor([0])), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(dtype):
    logits, ids = randn(4, 50, 300, dtype=dtype), tokens(4, 50, v=300)
    ours = token_log_probs(logits, ids, temperature=0.7)
    assert ours.dtype == torch.float32
    # the logits are exact in float32; only the rounding of float32 is left
    exact = token_log_probs(logits.double(), ids, temperature=0.7)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)


def test_the_shift_is_made_once():
    logits, ids = randn(3, 6, 11), tokens(3, 6)
    ours = next_token_log_probs(logits, ids)
    for row in range(3):
        for i in range(5):
            expected = F.log_softmax(logits[row, i], dim=-1)[ids[row, i + 1]]
            torch.testing.assert_close(ours[row, i], expected)
    torch.testing.assert_close(-ours.mean(), next_token_loss(logits, ids))


# From hidden states and head


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_head_in_chunks_equals_the_plain_way_in_value_and_gradient(chunk, device):
    hidden, weight = (x.to(device).requires_grad_() for x in (randn(3, 5, 6), randn(11, 6, seed=1)))
    ids = tokens(3, 5).to(device)
    ours = head_log_probs(hidden, weight, ids, temperature=0.7, chunk=chunk)
    theirs = token_log_probs(hidden @ weight.mT, ids, temperature=0.7)
    torch.testing.assert_close(ours, theirs)
    pull = randn(3, 5, seed=2).to(device)  # another weight for each token, as in a policy's loss
    for a, b in zip(*(torch.autograd.grad((x * pull).sum(), (hidden, weight)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_logits_of_more_than_a_chunk_are_never_held():
    hidden, weight, ids = randn(40, 4).requires_grad_(), randn(64, 4, seed=1).requires_grad_(), tokens(40, v=64)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    with Sizes():
        head_log_probs(hidden, weight, ids, chunk=8).sum().backward()
    assert max(sizes) == 8 * 64  # the logits of a chunk, forward and backward; all of them would be 40 * 64


# Masks


@pytest.mark.parametrize("device", DEVICES)
def test_response_mask_by_hand(device):
    end = 7
    ids = torch.tensor(
        [
            [7, 1, 2, 7, 7, 0],  # the end token in the prompt does not count; only the first of the response does
            [7, 7, 7, 3, 4, 5],  # the response begins with it
            [1, 1, 2, 3, 4, 5],  # cut off: no end
        ]
    )
    mask = response_mask(ids.to(device), torch.tensor([1, 2, 4], device=device), end=end)
    assert mask.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_span_mask_is_the_slice(device):
    for start, stop in [(0, 0), (0, 5), (2, 3), (1, 9)]:
        mask = span_mask(torch.tensor([start], device=device), torch.tensor([stop], device=device), 5)
        assert mask[0].nonzero().flatten().tolist() == list(range(5))[start:stop]


# Sums and means


def test_sums_and_means_by_hand():
    x = torch.tensor([[-1.0, -2.0, -3.0], [-10.0, -20.0, -30.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert sequence_sum(x, mask).tolist() == [-4, -20, 0]  # -1 - 3; -20; nothing
    assert sequence_mean(x, mask).tolist() == [-2, -20, 0]
    assert token_mean(x, mask).item() == -8  # -24 over 3 tokens; the mean of the rows' means is another number


def test_without_any_token_the_mean_is_zero():
    x = randn(2, 3).requires_grad_()
    loss = token_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("function", [sequence_sum, sequence_mean, token_mean])
def test_masked_tokens_are_not_seen_even_if_they_are_no_numbers(function):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = randn(2, 3).masked_fill(~mask, -torch.inf).requires_grad_()
    out = function(x, mask)
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad == 0).equal(~mask)


# Production


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_equals_trl(temperature):
    trl = pytest.importorskip("trl.trainer.utils", reason="TRL comes with the extra parity, for its tests alone")
    logits, ids = randn(3, 5, 11, dtype=torch.float32), tokens(3, 5)
    theirs = trl.selective_log_softmax(logits, ids, temperature=temperature)
    torch.testing.assert_close(token_log_probs(logits, ids, temperature=temperature), theirs)


# Refusals


def test_refuses_a_temperature_that_is_not_positive():
    with pytest.raises(ValueError, match="greater than 0, got 0"):
        token_log_probs(randn(2, 3), tokens(2, v=3), temperature=0)
    with pytest.raises(ValueError, match=r"greater than 0, got -1\.0"):
        head_log_probs(randn(2, 3), randn(5, 3), tokens(2, v=5), temperature=-1.0)


def test_refuses_ids_that_do_not_belong_to_the_logits():
    with pytest.raises(ValueError, match=r"each id needs its own logits, got logits \(2, 4, 3\) and ids \(2, 3\)"):
        token_log_probs(randn(2, 4, 3), tokens(2, 3, v=3))
    with pytest.raises(ValueError, match="each id needs its own hidden state"):
        head_log_probs(randn(4, 3), randn(5, 3), tokens(3, v=5))
    with pytest.raises(ValueError, match="at least 2 tokens in a row, got 1"):
        next_token_log_probs(randn(2, 1, 3), tokens(2, 1, v=3))
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        head_log_probs(randn(4, 3), randn(5, 3), tokens(4, v=5), chunk=0)


def test_refuses_a_mask_that_would_be_broadcast_or_multiplied():
    with pytest.raises(ValueError, match=r"one bool for each token of \(2, 3\), got \(3,\)"):
        sequence_sum(randn(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(2, 3\) of torch.float32"):
        token_mean(randn(2, 3), torch.ones(2, 3))
