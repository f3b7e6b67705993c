"""How far a policy is from a reference: three estimators from one sample, and what the gradient of each one is.

Idea:        KL(policy, reference) is the mean of log(policy / reference) over the policy's own samples. With d that
             log of one sampled token, k1 = d has the right mean and both signs; k2 = d^2 / 2 is
             never negative but biased; k3 = e^-d - 1 + d is never negative and has the right mean. That a number has
             the right mean says nothing about its gradient, because the samples depend on the policy, too. As a loss:
             k1 has gradient 0 in the mean, k2 that of KL(policy, reference), k3 that of KL(reference, policy), the
             other one. Subtracted from the reward, without gradient, k1 is right and k3 is not.
Cost:        A forward pass of the reference. The exact KL of a token needs its v logits of both.
Paper:       Tang and Munos 2025, arXiv:2506.09477 (gradients); Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300,
             equation 4 (k3 in a loss); DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556 (k3 times the ratio).
             The names are from J. Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
Production:  TRL GRPOTrainer (k3 times the ratio; alone without use_bias_correction_kl); verl kl_penalty ("kl", "mse",
             "low_var_kl").
Leaves out:  the KL of whole sequences, for which later tokens' KL counts as an earlier token's reward.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(log_probs: Float[Tensor, "*b"], reference: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """log(policy / reference) of each sampled token in nats: right in the mean, of both signs. For the reward."""
    return log_probs - reference.detach()


def k2(log_probs: Float[Tensor, "*b"], reference: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Half the square of k1. As a loss it has the gradient of KL(policy, reference), though its own mean is biased."""
    return k1(log_probs, reference).square() / 2


def k3(log_probs: Float[Tensor, "*b"], reference: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """e^-d - 1 + d for d = k1: right in the mean and never negative. As a loss: gradient of KL(reference, policy).

    >>> log_p, log_q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> k1(log_p, log_q), k3(log_p, log_q)                      # ln 2 and ln 2/3; 1/2 - 1 + ln 2 and 3/2 - 1 + ln 2/3
    (tensor([ 0.6931, -0.4055]), tensor([0.1931, 0.0945]))
    >>> k1(log_p, log_q).mean(), k3(log_p, log_q).mean(), exact_kl(log_p, log_q)        # both tokens equally likely
    (tensor(0.1438), tensor(0.1438), tensor(0.1438))
    """
    d = k1(log_probs, reference)
    return torch.expm1(-d) + d


def k3_weighted(
    log_probs: Float[Tensor, "*b"], reference: Float[Tensor, "*b"], old: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    """k3 times policy / old for tokens that `old` sampled. As a loss: value and gradient of KL(policy, reference)."""
    return (log_probs - old.detach()).exp() * k3(log_probs, reference)


def exact_kl(log_p: Float[Tensor, "*b v"], log_q: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """KL(p, q) in nats from all v log-probabilities of both; what q excludes and p does not makes it infinite."""
    return torch.where(log_p == -torch.inf, 0, log_p.exp() * (log_p - log_q)).sum(dim=-1)


def gradient_as_loss(
    estimator: Estimator, logits: Float[Tensor, " v"], reference: Float[Tensor, " v"]
) -> Float[Tensor, " v"]:
    """The mean gradient, over the policy's own samples, of an estimator that is minimised as a loss.

    With respect to the logits and exact: each of the v tokens counts with its probability, which gets no gradient
    because samples are drawn, not differentiated.

    >>> logits, reference = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 0.0, 1.0])
    >>> bool(gradient_as_loss(k1, logits, reference).abs().max() < 1e-6)
    True
    """
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        log_p = leaf.log_softmax(dim=-1)
        loss = (log_p.detach().exp() * estimator(log_p, reference.log_softmax(dim=-1))).sum()
    return torch.autograd.grad(loss, leaf)[0]


def gradient_as_reward(
    estimator: Estimator, logits: Float[Tensor, " v"], reference: Float[Tensor, " v"]
) -> Float[Tensor, " v"]:
    """The mean gradient of an estimator that is a cost in the reward: of log p of the sample, times its detached value.

    With respect to the logits and exact, to be minimised like `gradient_as_loss`.
    """
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        log_p = leaf.log_softmax(dim=-1)
        cost = estimator(log_p, reference.log_softmax(dim=-1)).detach()
        loss = (log_p.detach().exp() * log_p * cost).sum()
    return torch.autograd.grad(loss, leaf)[0]
