"""What dividing by the length does: a policy of two numbers whose reward has nothing to do with length.

Idea:        A response is right or wrong by a coin, and after each token it stops with a probability of its own: one
             for right responses, one for wrong ones. Nothing is to be gained by length, so a fair loss leaves both
             lengths alone. GRPO's mean over each response makes the tokens of a long one weigh less: a long wrong
             response is punished less for each token than a short one, a long right one rewarded less. So wrong
             responses grow and right ones shrink. A sum divided by a constant has no such pull.
Cost:        A step is a few operations on n responses of at most `limit` tokens.
Paper:       Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv:2503.20783, section 3.1 (the bias and the
             repair); Yu et al. 2025, "DAPO", arXiv:2503.14476 (the mean over tokens).
Production:  No library has this; the losses are those of `grpo`, which equal TRL's.
Leaves out:  that a longer response may be better, and everything else that a response says.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.alignment.grpo import group_advantages

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of log_probs, old, advantages, mask


def mean_length(stop: Float[Tensor, "*b"], limit: int) -> Float[Tensor, "*b"]:
    """Tokens of a response that stops after each with probability `stop`, and at `limit` anyway, in the mean.

    >>> mean_length(torch.tensor([0.5, 1.0]), 3)                # 1 + 1/2 + 1/4
    tensor([1.7500, 1.0000])
    """
    return (1 - (1 - stop) ** limit) / stop


def write(
    logits: Float[Tensor, " b"], limit: int, *, generator: torch.Generator
) -> tuple[Bool[Tensor, "b {limit}"], Bool[Tensor, "b {limit}"]]:
    """For each response which tokens were written, and after which it stopped (none if it was cut at the limit)."""
    ends = torch.rand(len(logits), limit, generator=generator) < logits.detach().sigmoid()[:, None]
    mask = ends.cumsum(dim=1) - ends.int() == 0
    return mask, ends & mask


def log_probs(logits: Float[Tensor, " b"], stops: Bool[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """log p of having stopped or gone on after each token."""
    return torch.where(stops, F.logsigmoid(logits)[:, None], F.logsigmoid(-logits)[:, None])


def race(
    loss: Loss,
    *,
    steps: int = 150,
    prompts: int = 64,
    group: int = 8,
    limit: int = 64,
    length: float = 8.0,
    lr: float = 0.01,
    seed: int = 0,
) -> Float[Tensor, "{steps}+1 2"]:
    """Mean lengths of wrong and of right responses over the steps of Adam, both from about `length` tokens.

    Half of the responses are right, whatever the policy does; groups get GRPO's advantages. The losses differ in
    scale, which Adam takes out.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = torch.full((2,), 1 / length).logit().requires_grad_()  # to stop: wrong responses, right ones
    optimizer, lengths = torch.optim.Adam([policy], lr), []
    for _ in range(steps):
        lengths.append(mean_length(policy.detach().sigmoid(), limit))
        right = torch.rand(prompts, group, generator=generator) < 0.5
        logits = policy[right.flatten().long()]
        mask, stops = write(logits, limit, generator=generator)
        now = log_probs(logits, stops)
        optimizer.zero_grad()
        loss(now, now.detach(), group_advantages(right.float()).flatten(), mask).backward()
        optimizer.step()
    return torch.stack([*lengths, mean_length(policy.detach().sigmoid(), limit)])
