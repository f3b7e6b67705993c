"""DPO with nothing hidden: one prompt, a handful of responses, every probability known.

Idea:        The best policy for a reward minus beta KL(policy, reference) is known in closed form: the reference times
             exp(reward / beta), normalised. If people prefer as Bradley and Terry say, the minimum of DPO's loss over
             all pairs is this very policy. If every one of them always prefers the same response, there is no minimum:
             the margin grows for ever, and beta only changes the pace. And the loss sees differences only: where
             responses share features, both log-probabilities of a pair may fall and a third response gains.
Cost:        n numbers for n responses; a step of descent is O(pairs).
Paper:       Rafailov et al. 2023, arXiv:2305.18290, equation 4 (optimum); Azar et al. 2023, arXiv:2310.12036 (no
             minimum); Razin et al. 2024, arXiv:2410.08847 (likelihood displacement).
Production:  none; tests compare the loss with torch.nn.functional.binary_cross_entropy_with_logits.
Leaves out:  sampling, several prompts, tokens: see `preference_tuning`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.alignment.dpo import check_beta
from minillm.alignment.kl import exact_kl


def optimum(log_reference: Float[Tensor, " n"], reward: Float[Tensor, " n"], *, beta: float) -> Float[Tensor, " n"]:
    """Log-probabilities of the policy that maximises `objective`: reference times exp(reward / beta), normalised.

    >>> optimum(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 3.0]).log(), beta=1.0).exp()    # rewards 0 and ln 3
    tensor([0.2500, 0.7500])
    """
    check_beta(beta)
    return (log_reference + reward / beta).log_softmax(dim=-1)


def objective(
    log_policy: Float[Tensor, " n"], log_reference: Float[Tensor, " n"], reward: Float[Tensor, " n"], *, beta: float
) -> Float[Tensor, ""]:
    """What RLHF maximises: the mean reward minus beta KL(policy, reference)."""
    check_beta(beta)
    return log_policy.exp() @ reward - beta * exact_kl(log_policy, log_reference)


def every_pair(n: int) -> Int[Tensor, "2 k"]:
    """The n (n - 1) / 2 pairs of different responses, each once.

    >>> every_pair(3)
    tensor([[0, 0, 1],
            [1, 2, 2]])
    """
    return torch.triu_indices(n, n, offset=1)


def margins(
    log_policy: Float[Tensor, " n"], log_reference: Float[Tensor, " n"], pairs: Int[Tensor, "2 k"], *, beta: float
) -> Float[Tensor, " k"]:
    """The implicit reward of the first response of each pair minus that of the second."""
    first, second = beta * (log_policy - log_reference)[pairs]
    return first - second


def population_loss(
    log_policy: Float[Tensor, " n"],
    log_reference: Float[Tensor, " n"],
    pairs: Int[Tensor, "2 k"],
    agreement: Float[Tensor, " k"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """DPO's loss where a share `agreement` of endlessly many people prefers the first response of each pair, the mean
    over pairs. With an agreement of 1 it is `dpo_loss`.
    """
    check_beta(beta)
    margin = margins(log_policy, log_reference, pairs, beta=beta)
    return -(agreement * F.logsigmoid(margin) + (1 - agreement) * F.logsigmoid(-margin)).mean()


def descend(
    loss: Callable[[Tensor], Tensor],
    log_reference: Float[Tensor, " n"],
    *,
    lr: float,
    steps: int,
    features: Float[Tensor, "n d"] | None = None,
) -> Float[Tensor, "{steps}+1 n"]:
    """Log-probabilities before and after each step of gradient descent on `loss`, from the reference on.

    The logits are the reference's plus features @ weights, and only the d weights are trained. Without features each
    response has a logit of its own; with them, to move one response moves those that resemble it.
    """
    features = torch.eye(len(log_reference), dtype=log_reference.dtype) if features is None else features
    weights = torch.zeros(features.shape[1], dtype=features.dtype, requires_grad=True)
    path = []
    for _ in range(steps):
        log_policy = (log_reference + features @ weights).log_softmax(dim=-1)
        (gradient,) = torch.autograd.grad(loss(log_policy), weights)
        path.append(log_policy.detach())
        with torch.no_grad():
            weights -= lr * gradient
    path.append((log_reference + features @ weights.detach()).log_softmax(dim=-1))
    return torch.stack(path)
