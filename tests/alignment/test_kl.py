"""KL from samples: values by hand and in the mean, and what gradient each estimator has, exactly and from samples."""

import math

import pytest
import torch

from minillm.alignment.kl import exact_kl, gradient_as_loss, gradient_as_reward, k1, k2, k3, k3_weighted

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def policies(v=6, seed=0):
    """Logits of a policy and of a reference."""
    return randn(v, seed=seed), randn(v, seed=seed + 100)


def expectation(values, logits):
    """The mean over the policy's tokens."""
    return (logits.softmax(-1) * values).sum()


def kl_gradient(logits, reference, *, reverse=False):
    """Gradient of KL(policy, reference), or of KL(reference, policy), with respect to the policy's logits."""
    leaf = logits.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), reference.log_softmax(-1)
    if reverse:
        return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), leaf)[0]
    return torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), leaf)[0]


# Values


def test_the_estimators_by_hand():
    # policy 1/2, reference 1/8: d = ln 4; k2 = (ln 4)^2 / 2; k3 = 1/4 - 1 + ln 4. Then the other way round: d = -ln 4
    log_p, log_q = torch.tensor([0.5, 0.125]).double().log(), torch.tensor([0.125, 0.5]).double().log()
    ln4 = math.log(4)
    torch.testing.assert_close(k1(log_p, log_q), torch.tensor([ln4, -ln4]).double())
    torch.testing.assert_close(k2(log_p, log_q), torch.tensor([ln4**2 / 2] * 2).double())
    torch.testing.assert_close(k3(log_p, log_q), torch.tensor([-0.75 + ln4, 3 - ln4]).double())


def test_exact_kl_by_hand():
    # p = 3/4, 1/4 and q = 1/2, 1/2: 3/4 ln 3/2 + 1/4 ln 1/2
    log_p, log_q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    assert exact_kl(log_p, log_q).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))


def test_exact_kl_equals_torch():
    p, q = randn(3, 5, 7), randn(3, 5, 7, seed=1)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(exact_kl(p.log_softmax(-1), q.log_softmax(-1)), theirs)


def test_a_token_that_the_policy_excludes_costs_nothing_and_one_that_only_the_reference_excludes_everything():
    sure, open_ = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert exact_kl(sure, open_).item() == pytest.approx(math.log(2))
    assert exact_kl(open_, sure).item() == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_have_the_mean_kl_and_k2_has_not(seed):
    logits, reference = policies(seed=seed)
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    kl = exact_kl(log_p, log_q)
    torch.testing.assert_close(expectation(k1(log_p, log_q), logits), kl)
    torch.testing.assert_close(expectation(k3(log_p, log_q), logits), kl)
    assert abs(expectation(k2(log_p, log_q), logits) - kl) > 0.02 * kl


def test_k2_and_k3_are_never_negative_and_vary_less_where_the_policies_are_near():
    reference = randn(50)
    logits = reference + 0.1 * randn(50, seed=1)
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    assert (k1(log_p, log_q) < 0).any()
    assert k2(log_p, log_q).min() >= 0
    assert k3(log_p, log_q).min() >= 0
    variance = {
        name: expectation(k(log_p, log_q).square(), logits) - expectation(k(log_p, log_q), logits) ** 2
        for name, k in ESTIMATORS.items()
    }
    # k1's is of the order of d^2, the others' of d^4
    assert max(variance["k2"], variance["k3"]) < 0.05 * variance["k1"]


def test_equal_policies_are_exactly_zero_apart():
    log_p = randn(3, 4)
    for k in ESTIMATORS.values():
        assert k(log_p, log_p).abs().max() == 0


def test_k3_keeps_its_digits_where_the_policies_are_near():
    # e^-d - 1 + d is d^2 / 2 - d^3 / 6 for small d; e^-d alone would lose it to the 1 in float32
    d = torch.tensor([1e-3])
    torch.testing.assert_close(k3(d, torch.zeros(1)), d**2 / 2 - d**3 / 6, rtol=1e-3, atol=0)


# Gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_each_estimator_as_a_loss(seed, device):
    logits, reference = (x.to(device) for x in policies(seed=seed))
    right, other = kl_gradient(logits, reference), kl_gradient(logits, reference, reverse=True)
    torch.testing.assert_close(gradient_as_loss(k1, logits, reference), torch.zeros_like(logits))
    torch.testing.assert_close(gradient_as_loss(k2, logits, reference), right)
    torch.testing.assert_close(gradient_as_loss(k3, logits, reference), other)
    assert (right - other).norm() > 0.05 * right.norm()  # the two are different things


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_each_estimator_in_the_reward(seed, device):
    logits, reference = (x.to(device) for x in policies(seed=seed))
    right = kl_gradient(logits, reference)
    torch.testing.assert_close(gradient_as_reward(k1, logits, reference), right)
    for k in (k2, k3):
        assert (gradient_as_reward(k, logits, reference) - right).norm() > 0.05 * right.norm()


@pytest.mark.parametrize("seed", range(5))
def test_k3_times_the_ratio_has_value_and_gradient_of_kl_under_any_sampler(seed):
    logits, reference = policies(seed=seed)
    sampler = randn(6, seed=seed + 200)
    leaf = logits.clone().requires_grad_()
    log_p, log_q, log_old = leaf.log_softmax(-1), reference.log_softmax(-1), sampler.log_softmax(-1)
    loss = (log_old.exp() * k3_weighted(log_p, log_q, log_old)).sum()
    torch.testing.assert_close(loss, exact_kl(log_p, log_q))
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], kl_gradient(logits, reference))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_exact_gradients_are_the_means_of_sampled_ones(name):
    k = ESTIMATORS[name]
    logits, reference = policies()
    n = 100_000
    sampled = logits.softmax(-1).multinomial(n, replacement=True, generator=torch.Generator().manual_seed(0))
    leaf = logits.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1)[sampled], reference.log_softmax(-1)[sampled]
    as_loss = torch.autograd.grad(k(log_p, log_q).mean(), leaf, retain_graph=True)[0]
    as_reward = torch.autograd.grad((log_p * k(log_p, log_q).detach()).mean(), leaf)[0]
    # single gradients have standard deviations below 1.2, means of 100,000 below 0.0038; five of them
    torch.testing.assert_close(as_loss, gradient_as_loss(k, logits, reference), rtol=0, atol=0.02)
    torch.testing.assert_close(as_reward, gradient_as_reward(k, logits, reference), rtol=0, atol=0.02)


def test_descending_k2_and_k3_brings_the_policy_back_and_descending_k1_does_not():
    for k, comes_back in [(k1, False), (k2, True), (k3, True)]:
        logits, reference = policies()
        start = exact_kl(logits.log_softmax(-1), reference.log_softmax(-1))
        for _ in range(300):
            logits = logits - 0.5 * gradient_as_loss(k, logits, reference)
        end = exact_kl(logits.log_softmax(-1), reference.log_softmax(-1))
        assert (end < 0.01 * start) == comes_back
        if not comes_back:
            torch.testing.assert_close(end, start)  # it has not moved at all


def test_no_gradient_flows_into_reference_and_sampler():
    log_p, log_q, old = (randn(5, seed=i).requires_grad_() for i in range(3))
    for out in (*(k(log_p, log_q) for k in ESTIMATORS.values()), k3_weighted(log_p, log_q, old)):
        out.sum().backward()
    assert log_q.grad is None
    assert old.grad is None
    assert log_p.grad is not None


def test_the_gradients_can_be_asked_for_where_gradients_are_off():
    logits, reference = policies()
    with torch.no_grad():
        assert gradient_as_loss(k2, logits, reference).abs().max() > 0
        assert gradient_as_reward(k1, logits, reference).abs().max() > 0
    assert not logits.requires_grad
