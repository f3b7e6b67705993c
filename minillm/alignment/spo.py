"""SPO, Single-stream Policy Optimization: one response a prompt, and a memory of how often each prompt is solved.

Idea:        GRPO throws its group away after one step and samples it anew. SPO keeps for each prompt a Beta
             distribution of its success, and takes its mean before the update as the baseline for a single response:
             no group, nobody waits for the slowest of it, none is wasted because all rewards are equal. The policy
             moves, so the tracker forgets: the further the prompt's previous response has moved in probability, the
             smaller the factor on the old counts. Advantages are normalised over the batch, and prompts that are
             neither sure nor hopeless are sampled more. No self-play and no opponent, although some code spells the
             name so.
Cost:        Two numbers a prompt, and one more forward pass over the prompt's previous response, which is kept.
Paper:       Xu and Ding 2025, arXiv:2509.13232.
Production:  The authors' recipe for verl, recipe/spo: half-life 0.06, factors from 0.875 to 0.96, exploration 0.05.
             The policy loss is PPO's, with more room above: `grpo.dapo_loss`.
Leaves out:  rewards that are no success or failure: map them to 0 to 1 first.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.alignment.log_probs import sequence_mean

LEAST, MOST = 0.875, 0.96  # of the factor on old counts: memories of 8 and of 25 responses


class Tracker(NamedTuple):
    """For each prompt a Beta distribution of the probability that its response is good: counts, old ones faded."""

    good: Tensor  # p, alpha
    bad: Tensor  # p, beta


@torch.no_grad()
def start_tracker(rewards: Float[Tensor, "p n"], *, least: float = LEAST) -> Tracker:
    """The tracker after n responses to each prompt before training; n = 0 knows nothing and gives 1/2 and 1/2.

    Half a good and half a bad response are added to the counts, which are then scaled to 1 / (1 - least) responses in
    all: what the tracker would hold in the long run if it always forgot as fast as it can.

    >>> start_tracker(torch.tensor([[1.0, 1.0, 0.0]]), least=0.75)      # (2 + 0.5, 1 + 0.5) / 4 of 4 responses
    Tracker(good=tensor([2.5000]), bad=tensor([1.5000]))
    """
    check_rewards(rewards)
    check_factor(least)
    n = rewards.shape[1]
    size = 1 / (1 - least) if n else 1
    good = (rewards.sum(dim=1) + 0.5) * (size / (n + 1))
    return Tracker(good, size - good)


def baseline(tracker: Tracker) -> Float[Tensor, " p"]:
    """The expected reward of each prompt: good / (good + bad)."""
    return tracker.good / (tracker.good + tracker.bad)


@torch.no_grad()
def movement(then: Float[Tensor, "b t"], now: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Mean |log p now - log p then| over the tokens of the response that the prompt got last time, in nats.

    Both of the same tokens: between different responses the difference would be their noise, not the policy's way.
    A prompt without a previous response has a masked row and has moved by 0.
    """
    return sequence_mean((now - then).abs(), mask)


@torch.no_grad()
def forgetting(
    moved: Float[Tensor, " b"], *, half: float = 0.06, least: float = LEAST, most: float = MOST
) -> Float[Tensor, " b"]:
    """The factor on the old counts, 2^(-moved / half) kept between `least` and `most`: small after a large move.

    >>> forgetting(torch.tensor([0.0, 0.006, 9.0]))                     # 1, 2^-0.1 and nearly 0 before the limits
    tensor([0.9600, 0.9330, 0.8750])
    """
    check_factor(least)
    check_factor(most)
    if not half > 0:
        raise ValueError(f"the movement that halves the counts is greater than 0, got {half}")
    return torch.exp2(-moved / half).clamp(least, most)


@torch.no_grad()
def update(
    tracker: Tracker, prompts: Int[Tensor, " b"], rewards: Float[Tensor, " b"], rho: Float[Tensor, " b"]
) -> Tracker:
    """The tracker after one response to each of `prompts`: old counts times rho, plus the reward and its complement.

    Prompts that were not sampled keep their counts. Call it after `advantages`, which want the state before.

    >>> tracker = Tracker(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
    >>> update(tracker, torch.tensor([0]), torch.tensor([0.0]), torch.tensor([0.9]))
    Tracker(good=tensor([2.7000, 1.0000]), bad=tensor([1.9000, 1.0000]))
    """
    check_rewards(rewards)
    if len(prompts.unique()) < len(prompts):
        raise ValueError(f"one response a prompt, got {len(prompts)} responses to {len(prompts.unique())} prompts")
    good, bad = tracker.good.clone(), tracker.bad.clone()
    good[prompts] = rho * tracker.good[prompts] + rewards
    bad[prompts] = rho * tracker.bad[prompts] + (1 - rewards)
    return Tracker(good, bad)


@torch.no_grad()
def advantages(
    tracker: Tracker, prompts: Int[Tensor, " b"], rewards: Float[Tensor, " b"], *, eps: float = 1e-8
) -> Float[Tensor, " b"]:
    """Reward minus the prompt's baseline, then mean 0 and standard deviation 1 over the batch (b - 1 in the variance).

    >>> tracker = Tracker(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))           # baselines 1/2 and 3/4
    >>> advantages(tracker, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]))             # 1/2 and 1/4
    tensor([ 0.7071, -0.7071])
    """
    check_rewards(rewards)
    if len(rewards) < 2:
        raise ValueError(f"normalising over the batch needs at least 2 responses, got {len(rewards)}")
    raw = rewards - baseline(tracker)[prompts]
    return (raw - raw.mean()) / (raw.std() + eps)


def priorities(tracker: Tracker, *, explore: float = 0.05) -> Float[Tensor, " p"]:
    """The probability to sample each prompt: its standard deviation of success, plus `explore`, normalised.

    >>> priorities(Tracker(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 1.0])))         # 0.5 and 0.3, plus 0.05
    tensor([0.6111, 0.3889])
    """
    mean = baseline(tracker)
    weight = (mean * (1 - mean)).sqrt() + explore
    return weight / weight.sum()


def draw_prompts(
    tracker: Tracker, count: int, *, explore: float = 0.05, generator: torch.Generator | None = None
) -> Int[Tensor, " {count}"]:
    """The numbers of `count` different prompts, drawn by `priorities`."""
    if not 0 < count <= len(tracker.good):
        raise ValueError(f"between 1 and {len(tracker.good)} different prompts can be drawn, got {count}")
    return priorities(tracker, explore=explore).multinomial(count, generator=generator)


def check_rewards(rewards: Tensor) -> None:
    """Refuse rewards that are no probabilities: counts would become negative."""
    if rewards.numel() and not (rewards.min() >= 0 and rewards.max() <= 1):
        raise ValueError(
            f"rewards are from 0 to 1, got {rewards.min():g} to {rewards.max():g}: rescale or threshold them"
        )


def check_factor(factor: float) -> None:
    """Refuse a memory that is empty or without end."""
    if not 0 < factor < 1:
        raise ValueError(f"the factor on old counts is between 0 and 1, got {factor}")
