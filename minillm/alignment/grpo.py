"""GRPO: no critic, the other responses to the same prompt say what was to be expected. And four ways to change it.

Idea:        Sample g responses to each prompt. A response's advantage is its reward minus the group's mean, divided by
             the group's standard deviation; all its tokens share it. The loss is PPO's, averaged over the tokens of
             each response and then over responses, so a token of a long response weighs less: long wrong answers are
             punished less for each token than short ones. DAPO averages over all tokens and has more room above; Dr.
             GRPO divides by a constant and drops the standard deviation; GSPO clips the ratio of whole responses;
             CISPO clips the weight and keeps every token's gradient.
Cost:        g responses a prompt; no critic. Groups of equal rewards teach nothing.
Paper:       Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, equations 3 and 4; Yu et al. 2025, "DAPO",
             arXiv:2503.14476; Liu et al. 2025, "Dr. GRPO", arXiv:2503.20783; Zheng et al. 2025, "GSPO",
             arXiv:2507.18071; MiniMax 2025, "MiniMax-M1", arXiv:2506.13585 (CISPO).
Production:  TRL GRPOTrainer: loss_type "grpo", "dapo", "dr_grpo", "cispo", and importance_sampling_level "sequence".
Leaves out:  leave-one-out baselines, correction for an inference engine with other log-probabilities, entropy masks.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.alignment.kl import k3
from minillm.alignment.log_probs import sequence_mean, sequence_sum, token_mean
from minillm.alignment.ppo import clipped_surrogate, log_ratios


@torch.no_grad()
def group_advantages(rewards: Float[Tensor, "n g"], *, eps: float = 1e-4) -> Float[Tensor, "n g"]:
    """(reward - mean) / (standard deviation + eps) in each group of g responses, with g - 1 in the variance as in TRL.

    Rewards that are equal but for rounding get advantages near 0 because of `eps`; with 1e-8 they would be near 1.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]]), eps=0.0)[0]    # 0.5 / 3^-0.5
    tensor([ 0.8660, -0.8660, -0.8660,  0.8660])
    """
    return centred_advantages(rewards) / (rewards.std(dim=1, keepdim=True) + eps)


@torch.no_grad()
def centred_advantages(rewards: Float[Tensor, "n g"]) -> Float[Tensor, "n g"]:
    """Reward - mean in each group: Dr. GRPO's advantage. Without the division, prompts that are nearly always or
    hardly ever solved do not get extra weight.

    >>> centred_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    tensor([[ 0.5000, -0.5000, -0.5000,  0.5000]])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are [prompts, responses] with at least 2 responses, got {tuple(rewards.shape)}")
    return rewards - rewards.mean(dim=1, keepdim=True)


@torch.no_grad()
def informative(rewards: Float[Tensor, "n g"]) -> Bool[Tensor, " n"]:
    """True for the groups whose rewards differ. DAPO samples on until the batch is full of them.

    >>> informative(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([False,  True])
    """
    return rewards.amax(dim=1) > rewards.amin(dim=1)


@torch.no_grad()
def overlong_penalty(length: Int[Tensor, "*b"], *, limit: int, buffer: int) -> Float[Tensor, "*b"]:
    """DAPO's addition to the reward: 0, in the last `buffer` tokens before `limit` falling to -1, beyond it -1.

    >>> overlong_penalty(torch.tensor([60, 80, 90, 100, 120]), limit=100, buffer=20)
    tensor([ 0.0000,  0.0000, -0.5000, -1.0000, -1.0000])
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"the buffer is from 1 token to the limit of {limit}, got {buffer}")
    return ((limit - buffer - length) / buffer).clamp(-1, 0)


def grpo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """Minus PPO's clipped surrogate: mean over the tokens of each response, then over responses.

    The paper's objective adds 0.04 `reference_kl`. No gradient into old and advantages.
    """
    ratio = log_ratios(log_probs, old, mask).exp()
    gain = clipped_surrogate(ratio, each_token(advantages, mask), low=clip, high=clip)
    return -sequence_mean(gain, mask).mean()


def reference_kl(
    log_probs: Float[Tensor, "b t"], reference: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """GRPO's KL term, to be added to the loss: k3 in nats, averaged as in `grpo_loss`. See `kl` for its gradient."""
    return sequence_mean(k3(log_probs.masked_fill(~mask, 0), reference.masked_fill(~mask, 0)), mask).mean()


def loss_of_groups(
    log_probs: Float[Tensor, "n g t"],
    old: Float[Tensor, "n g t"],
    reference: Float[Tensor, "n g t"],
    rewards: Float[Tensor, "n g"],
    mask: Bool[Tensor, "n g t"],
    *,
    clip: float = 0.2,
    beta: float = 0.04,
) -> Float[Tensor, ""]:
    """GRPO as a whole, from rewards: group advantages, clipped surrogate, and beta times the KL to the reference.

    >>> log_p, mask = torch.zeros(1, 2, 1, requires_grad=True), torch.ones(1, 2, 1, dtype=torch.bool)
    >>> loss_of_groups(log_p, log_p, log_p, torch.tensor([[1.0, 0.0]]), mask).backward()
    >>> log_p.grad.flatten()                                            # 0.5 / (0.7071 + 1e-4) over two responses
    tensor([-0.3535,  0.3535])
    """
    policy, old, reference, mask = (x.flatten(0, 1) for x in (log_probs, old, reference, mask))
    loss = grpo_loss(policy, old, group_advantages(rewards).flatten(), mask, clip=clip)
    return loss + beta * reference_kl(policy, reference, mask)


def dapo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    *,
    low: float = 0.2,
    high: float = 0.28,
) -> Float[Tensor, ""]:
    """GRPO with the mean over all tokens of the batch, and more room above: an unlikely token may rise further.

    The paper divides by the tokens of each prompt's group; the batch is TRL's and verl's reading. No KL term.
    """
    ratio = log_ratios(log_probs, old, mask).exp()
    return -token_mean(clipped_surrogate(ratio, each_token(advantages, mask), low=low, high=high), mask)


def dr_grpo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    *,
    limit: int,
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    """GRPO with the sum over each response's tokens divided by the constant `limit`, the most tokens of a response.

    Every token weighs the same, in any batch. Goes with `centred_advantages`.
    """
    if limit < 1:
        raise ValueError(f"a response has at least 1 token at most, got a limit of {limit}")
    ratio = log_ratios(log_probs, old, mask).exp()
    gain = clipped_surrogate(ratio, each_token(advantages, mask), low=clip, high=clip)
    return -sequence_sum(gain, mask).mean() / limit


def gspo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    *,
    low: float = 3e-4,
    high: float = 4e-4,
) -> Float[Tensor, ""]:
    """One ratio for each response, the geometric mean of its tokens' ratios, clipped as a whole; mean over responses.

    The reward is given to responses, so the ratio is theirs, too. It stays far nearer to 1 than a token's, hence the
    narrow range.
    """
    check_advantages(advantages, mask)
    ratio = sequence_mean(log_ratios(log_probs, old, mask), mask).exp()
    return -clipped_surrogate(ratio, advantages.detach(), low=low, high=high).mean()


def cispo_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, " b"],
    mask: Bool[Tensor, "b t"],
    *,
    most: float = 5.0,
) -> Float[Tensor, ""]:
    """Minus weight x advantage x log p, averaged over all tokens, the weight min(ratio, most) without gradient.

    Where PPO's clip silences a token, this one keeps its gradient with a bounded weight. `most` is 1 + epsilon of the
    paper. The value means nothing; its gradient does.
    """
    if not most > 0:
        raise ValueError(f"the largest weight is greater than 0, got {most}")
    weight = log_ratios(log_probs, old, mask).exp().clamp(max=most).detach()
    return -token_mean(weight * each_token(advantages, mask) * log_probs, mask)


def each_token(advantages: Float[Tensor, " b"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The response's advantage at each of its tokens, without gradient."""
    check_advantages(advantages, mask)
    return advantages.detach()[:, None].expand(mask.shape)


def check_advantages(advantages: Tensor, mask: Tensor) -> None:
    """Refuse advantages that would be broadcast."""
    if advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"one advantage for each of {mask.shape[0]} responses, got {tuple(advantages.shape)}: flatten the groups"
        )
