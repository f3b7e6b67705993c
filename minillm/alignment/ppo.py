"""PPO for language models: advantages from a critic, and a policy that is not rewarded for going far in one step.

Idea:        The responses were sampled by the old policy; its log-probabilities were stored then. The ratio policy /
             old makes their advantages count for the present policy, and clipping takes the gradient away where the
             ratio has left 1 +- clip in the direction that the advantage asks for. It is a pessimistic bound, not a
             wall: where the policy went the wrong way the full gradient stays. The critic says what is to be expected
             at each token; GAE mixes its one-step errors into advantages. KL to the reference is a cost in the reward;
             the other place for it is the loss, as k3.
Cost:        Four models: policy, critic, reference, reward model. Per token three stored numbers (log-probability,
             value, reward), and several optimizer steps for each response.
Paper:       Schulman et al. 2017, arXiv:1707.06347, equation 7 (clip); Schulman et al. 2015, "GAE", arXiv:1506.02438,
             equation 16; Ouyang et al. 2022, "InstructGPT", arXiv:2203.02155, equation 2 (KL in the reward).
Production:  TRL's PPOTrainer up to its removal (whitened advantages, 0.5 of the larger squared error of the value);
             verl compute_gae_advantage_return (tokens of tools in the middle are skipped).
Leaves out:  entropy bonus, adaptive KL coefficient, dual clip, early stop on KL, bootstrapping of responses cut off.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.alignment.kl import k1, k3
from minillm.alignment.log_probs import check_mask, token_mean


@torch.no_grad()
def kl_rewards(
    score: Float[Tensor, " b"],
    log_probs: Float[Tensor, "b t"],
    reference: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    beta: float = 0.05,
) -> Float[Tensor, "b t"]:
    """The reward of each token: -beta k1, and the response's score on top at its last token. 0 where masked.

    `log_probs` are those of the policy that sampled. Without gradient.

    >>> policy, reference = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    >>> kl_rewards(torch.tensor([2.0]), policy, reference, torch.tensor([[True, True, False]]), beta=0.1)
    tensor([[-0.0500,  2.1000,  0.0000]])
    """
    check_mask(log_probs, mask)
    later = mask.flip(1).cumsum(dim=1).flip(1)  # response tokens from here on, this one included
    last = mask & (later == 1)
    return torch.where(mask, -beta * k1(log_probs, reference), 0) + torch.where(last, score[:, None], 0)


class Gae(NamedTuple):
    advantages: Tensor  # b t
    returns: Tensor  # b t, what the critic is to learn: advantages + values


def gae_step(
    reward: Float[Tensor, " b"],
    value: Float[Tensor, " b"],
    next_value: Float[Tensor, " b"],
    next_advantage: Float[Tensor, " b"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, " b"]:
    """The advantage of a token from that of the next: the critic's error here, and a fading part of the later ones."""
    error = reward + gamma * next_value - value
    return error + gamma * lam * next_advantage


@torch.no_grad()
def gae(
    rewards: Float[Tensor, "b t"],
    values: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Gae:
    """Advantages and returns of the response's tokens, 0 elsewhere, without gradient.

    `values[:, i]` is the critic's estimate before token i is written. After the last token nothing follows: value 0,
    also for a response that was cut off. Masked tokens between others are stepped over. lam = 0 is the one-step error
    (least variance, the critic's bias), lam = 1 all rewards to come minus the value (no bias).

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    >>> gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), lam=1.0)
    Gae(advantages=tensor([[0.5000, 0.7500, 0.2500]]), returns=tensor([[1., 1., 1.]]))
    >>> gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), lam=0.0).advantages
    tensor([[-0.2500,  0.5000,  0.2500]])
    """
    check_mask(rewards, mask)
    check_mask(values, mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam are from 0 to 1, got {gamma} and {lam}")
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.zeros_like(values)
    for i in reversed(range(values.shape[1])):
        here = gae_step(rewards[:, i], values[:, i], next_value, next_advantage, gamma=gamma, lam=lam)
        next_advantage = torch.where(mask[:, i], here, next_advantage)
        next_value = torch.where(mask[:, i], values[:, i], next_value)
        advantages[:, i] = torch.where(mask[:, i], here, 0)
    return Gae(advantages, advantages + values.masked_fill(~mask, 0))


@torch.no_grad()
def whiten(x: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Mean 0 and standard deviation 1 over the masked-in tokens of the batch (n - 1 in the variance), 0 elsewhere."""
    check_mask(x, mask)
    count = int(mask.sum())
    if count < 2:
        raise ValueError(f"whitening needs at least 2 tokens, got {count}")
    centred = (x - token_mean(x, mask)).masked_fill(~mask, 0)
    variance = centred.square().sum() / (count - 1)
    return centred * (variance + 1e-8).rsqrt()


def clipped_surrogate(
    ratio: Float[Tensor, "*b"], advantage: Float[Tensor, "*b"], *, low: float = 0.2, high: float = 0.2
) -> Float[Tensor, "*b"]:
    """What each token contributes to the objective, to be maximised: the smaller of ratio A and clipped ratio A.

    >>> r = torch.tensor([0.5, 1.0, 1.5])
    >>> clipped_surrogate(r, torch.ones(3)), clipped_surrogate(r, -torch.ones(3))
    (tensor([0.5000, 1.0000, 1.2000]), tensor([-0.8000, -1.0000, -1.5000]))
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def log_ratios(
    log_probs: Float[Tensor, "b t"], old: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """log(policy / old) of the masked-in tokens, 0 elsewhere; gradient for the policy only."""
    check_mask(log_probs, mask)
    check_mask(old, mask)
    return (log_probs - old.detach()).masked_fill(~mask, 0)


def policy_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """Minus the clipped surrogate, averaged over all response tokens of the batch.

    `old` was stored when the responses were sampled. In the first step on them the ratios are 1: the value is minus
    the mean advantage, the gradient that of REINFORCE, and nothing is clipped. No gradient into old and advantages.
    """
    check_mask(advantages, mask)
    ratio = log_ratios(log_probs, old, mask).exp()
    return -token_mean(clipped_surrogate(ratio, advantages.detach(), low=clip, high=clip), mask)


def ppo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    reference: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    clip: float = 0.2,
    beta: float = 0.05,
) -> Float[Tensor, ""]:
    """The policy loss plus beta k3 to the reference, both averaged over all response tokens: for KL in the loss.

    Then the rewards hold the score alone. No gradient into old, reference and advantages.

    >>> half, quarter = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()      # ratio 1, log ratio ln 2
    >>> ppo_loss(half, half, quarter, torch.tensor([[2.0]]), torch.tensor([[True]]), beta=1.0)  # -2 + 1/2 - 1 + ln 2
    tensor(-1.8069)
    """
    d = log_ratios(log_probs, reference, mask)
    kl = token_mean(k3(d, torch.zeros_like(d)), mask)
    return policy_loss(log_probs, old, advantages, mask, clip=clip) + beta * kl


@torch.no_grad()
def clip_fraction(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """The share of response tokens from which clipping takes the gradient away, in either direction."""
    ratio = log_ratios(log_probs, old, mask).exp()
    cut = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return token_mean(cut.to(log_probs.dtype), mask)


def value_loss(
    values: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    returns: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """Half the mean over response tokens of the larger squared error: of the value, or of it kept within old +- clip.

    So a value that has moved further than `clip` and is nearer to its return than the clipped one gets no gradient.
    None flows into old and returns.
    """
    check_mask(values, mask)
    check_mask(returns, mask)
    moved = (values - old.detach()).masked_fill(~mask, 0)
    wanted = (returns - old).detach().masked_fill(~mask, 0)
    error = torch.maximum((moved - wanted).square(), (moved.clamp(-clip, clip) - wanted).square())
    return token_mean(error, mask) / 2
