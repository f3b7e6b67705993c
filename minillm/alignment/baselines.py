"""What a reward is compared with, counted out: nothing, one mean for all prompts, a group, a memory of each prompt.

Idea:        A reward of 1 or 0 with probability p of success is a coin, so all about baselines can be computed: the
             mean square of reward minus baseline is p (1 - p), which nobody can remove, plus the square of the
             baseline's error. One mean for all prompts errs by how far a prompt is from it; a group's mean is right
             but for noise, and costs g responses, all of them in vain if they are all right or all wrong. A memory
             costs one response, and lags behind a policy that moves; how fast it forgets decides how far.
Cost:        Nothing by formula. Watching a policy costs the responses that it writes.
Paper:       Shao et al. 2024, arXiv:2402.03300 (groups); Liu et al. 2025, "Dr. GRPO", arXiv:2503.20783 (what the
             standard deviation does); Yu et al. 2025, "DAPO", arXiv:2503.14476 (groups in vain); Xu and Ding 2025,
             arXiv:2509.13232 (the memory).
Production:  No library has this; it is here to be looked at. The advantages and the tracker are those of `grpo`, `spo`.
Leaves out:  rewards between 0 and 1, and the gradient's size, which weighs each square by that of its log-probability.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.alignment import spo, tasks
from minillm.alignment.grpo import grpo_loss
from minillm.alignment.ppo_trials import attempt
from minillm.alignment.rollout import rescore, sample
from minillm.architecture.transformer import Transformer


def silent(p: Float[Tensor, "*b"], g: int) -> Float[Tensor, "*b"]:
    """The share of groups of g responses that are all right or all wrong, for prompts solved with probability p.

    >>> silent(torch.tensor([0.5, 0.05]), 8)                    # 2 / 2^8, and hardly more than 0.95^8
    tensor([0.0078, 0.6634])
    """
    return p**g + (1 - p) ** g


def mean_square(p: Float[Tensor, "*b"], baseline: Float[Tensor, "*#b"]) -> Float[Tensor, "*b"]:
    """The mean square of reward - baseline: p (1 - p) from the coin, and the square of the baseline's error.

    >>> mean_square(torch.tensor(0.9), torch.tensor(0.5)), mean_square(torch.tensor(0.9), torch.tensor(0.9))
    (tensor(0.2500), tensor(0.0900))
    """
    return p * (1 - p) + (p - baseline) ** 2


def agreement(
    model: Transformer,
    prompts: Int[Tensor, "k n p"],
    g: int,
    several: Sequence[Callable[[Tensor], Tensor]],
    *,
    seed: int,
) -> list[float]:
    """The mean cosine between the gradients of k batches, for each function from rewards to advantages.

    1 if chance plays no part, 0 if nothing else is left. A gradient is that of g responses to each of n prompts of
    `tasks`, the mean over tokens and responses.
    """
    generator, weights = torch.Generator().manual_seed(seed), list(model.parameters())
    gradients: list[list[Tensor]] = [[] for _ in several]
    for batch in prompts:
        drawn = sample(model, batch, group=g, new_tokens=tasks.NEW_TOKENS, end=tasks.END, generator=generator)
        rewards, now = tasks.rewards(drawn.prompts, drawn.tokens).view(-1, g), rescore(model, drawn)
        for rows, advantages in zip(gradients, several, strict=True):
            loss = grpo_loss(now, drawn.log_probs, advantages(rewards).flatten(), drawn.mask)
            rows.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, weights, retain_graph=True)]))
    cosines = []
    for rows in gradients:
        unit, k = F.normalize(torch.stack(rows), dim=1), len(rows)
        cosines.append(((unit @ unit.mT).sum().item() - k) / (k * (k - 1)))
    return cosines


class Makeup(NamedTuple):
    """Shares of groups; only the mixed ones teach."""

    wrong: float  # all of their responses
    mixed: float
    right: float


def makeup(rewards: Float[Tensor, "n g"]) -> Makeup:
    """How many of n groups are all wrong, mixed, all right.

    >>> makeup(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    Makeup(wrong=0.5, mixed=0.25, right=0.25)
    """
    wrong, right = (rewards.amax(dim=1) == 0).float().mean().item(), (rewards.amin(dim=1) == 1).float().mean().item()
    return Makeup(wrong, 1 - wrong - right, right)


def attempts(model: Transformer, prompts: Int[Tensor, "n p"], g: int, *, seed: int) -> Float[Tensor, "n {g}"]:
    """The rewards of g responses to each prompt of `tasks`, at temperature 1."""
    return attempt(model, prompts, seed=seed, group=g).rewards.view(-1, g)


def follow(
    truth: Float[Tensor, "n p"], rho: Float[Tensor, " n"], tracker: spo.Tracker, *, generator: torch.Generator
) -> Float[Tensor, "n p"]:
    """The tracker's mean of p prompts before each of n responses, whose rewards are coins of probability `truth`.

    Before the response of step i is counted, the old counts are multiplied by rho[i].
    """
    every, means = torch.arange(truth.shape[1]), []
    for p, factor in zip(truth, rho, strict=True):
        means.append(spo.baseline(tracker))
        reward = torch.bernoulli(p, generator=generator)
        tracker = spo.update(tracker, every, reward, factor.expand(len(every)))
    return torch.stack(means)
