"""The exercise of alignment/grpo: GRPO's loss from rewards and log-probabilities of tokens, and its wrong versions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: alignment/grpo
import torch


def loss_of_groups(log_probs, old, reference, rewards, mask, *, clip=0.2, beta=0.04):
    """The GRPO loss of n groups of g responses of at most t tokens, a scalar.

    log_probs, old and reference [n, g, t] are log-probabilities of the written tokens under the
    policy, under the policy that sampled, and under the reference. mask [n, g, t] is True for the
    responses' tokens; elsewhere stands anything, be it infinite. rewards [n, g].

    Advantage: reward minus the mean of its group, over its standard deviation (g - 1 in the
    variance) plus 1e-4. Each token: the clipped surrogate, minus beta times k3 to the reference.
    Mean over the tokens of each response, then over all responses, with the sign of a loss.
    Gradient flows into log_probs only.
    """
    raise NotImplementedError
'''


def oracle(log_probs, old, reference, rewards, mask, *, clip=0.2, beta=0.04):  # type: ignore[no-untyped-def]
    """Group by group and token by token, in Python's floats."""
    total, (n, g, t) = 0.0, log_probs.shape
    for i in range(n):
        row = [float(r) for r in rewards[i]]
        mean = sum(row) / g
        deviation = math.sqrt(sum((r - mean) ** 2 for r in row) / (g - 1))
        for j in range(g):
            advantage = (row[j] - mean) / (deviation + 1e-4)
            gains = []
            for k in range(t):
                if mask[i, j, k]:
                    policy, before, start = (x[i, j, k].item() for x in (log_probs, old, reference))
                    ratio = math.exp(policy - before)
                    cut = min(max(ratio, 1 - clip), 1 + clip)
                    kl = math.exp(start - policy) - 1 - (start - policy)
                    gains.append(min(ratio * advantage, cut * advantage) - beta * kl)
            total -= sum(gains) / len(gains) / (n * g)
    return torch.tensor(total)


def responses(n: int, g: int, t: int, seed: int, *, scale: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under policy, old policy and reference."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.empty(n, g, t).exponential_(generator=generator)
    policy, reference = (old + scale * torch.randn(n, g, t, generator=generator) for _ in range(2))
    return policy, old, reference


def lengths(t: int, rows: list[list[int]]) -> Tensor:
    """A mask of responses of these lengths."""
    return torch.arange(t) < torch.tensor(rows)[..., None]


def make_cases() -> list[Case]:
    full = torch.ones(2, 4, 3, dtype=torch.bool)
    binary = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    uneven = lengths(8, [[1, 8, 3], [5, 2, 7]])
    graded = torch.tensor([[0.5, 2.0, -1.0], [3.0, 2.5, 2.75]])
    infinite = tuple(x.masked_fill(~uneven, -torch.inf) for x in responses(2, 3, 8, 3))
    silent = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    nearly = torch.tensor([[0.5, 0.50004, 0.49998], [0.2, 0.2001, 0.2]])
    first, *others = responses(2, 4, 3, 6)
    return [
        Case("two groups", (*responses(2, 4, 3, 0), binary, full), {}, "all responses have 3 tokens"),
        Case("lengths", (*responses(2, 3, 8, 1), graded, uneven), {"beta": 0.0}, "1 to 8 tokens, no KL"),
        Case("with KL", (*responses(2, 3, 8, 2, scale=0.7), graded, uneven), {"beta": 0.5}, "a large beta"),
        Case("infinite padding", (*infinite, graded, uneven), {"beta": 0.1}, "masked tokens hold -inf"),
        Case("a silent group", (*responses(2, 3, 8, 4), silent, uneven), {}, "a group of equal rewards"),
        Case("nearly equal", (*responses(2, 3, 8, 10), nearly, uneven), {}, "rewards that differ by 1e-4 and less"),
        Case("little room", (first, *others, binary, full), {"clip": 0.05}, "clip is 0.05"),
        Case("the first step", (first, first, others[1], binary, full), {"beta": 0.0}, "all ratios are 1"),
    ]


def only_the_policy(function: Callable[..., Any]) -> str | None:
    """Gradient into the policy's responses, and nowhere else."""
    mask = lengths(4, [[2, 4, 1]])
    old = (-torch.ones(1, 3, 4)).masked_fill(~mask, -torch.inf)
    policy, reference = old.clone().requires_grad_(), (old - 0.1).requires_grad_()
    old.requires_grad_()
    rewards = torch.tensor([[1.0, 0.0, 0.25]], requires_grad=True)
    loss = function(policy, old, reference, rewards, mask)
    if not loss.requires_grad:
        return "No gradient reaches the policy: keep the loss a tensor, without item(), detach() or no_grad()."
    loss.backward()
    for name, x in (("old", old), ("reference", reference), ("rewards", rewards)):
        if x.grad is not None and bool(x.grad.any()):
            return f"Gradient flows into {name}, which is fixed: detach it."
    if policy.grad is not None and bool(policy.grad.isnan().any()):
        return "The gradient is NaN where masked tokens are infinite: put 0 there before you subtract and take exp."
    if policy.grad is not None and bool(policy.grad[~mask].any()):
        return "Gradient flows into tokens that the mask leaves out."
    return None


def pull_of_the_surrogate(function: Callable[..., Any]) -> str | None:
    """Without KL the gradient is -A ratio where nothing is clipped, and 0 elsewhere."""
    policy, old, reference = responses(1, 3, 4, 7)
    policy.requires_grad_()
    mask, rewards = lengths(4, [[2, 4, 1]]), torch.tensor([[1.0, 0.0, 0.25]])
    loss = function(policy, old, reference, rewards, mask, clip=0.2, beta=0.0)
    if loss.requires_grad:
        loss.backward()
    advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[..., None]
    ratio = (policy.detach() - old).exp()
    cut = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    wanted = torch.where(mask & ~cut, -advantage * ratio, 0) / mask.sum(dim=-1, keepdim=True) / 3
    if policy.grad is None or not torch.allclose(policy.grad, wanted, rtol=1e-3, atol=1e-5):
        return "The surrogate has the right value and another gradient: the ratio must stay attached to the policy."
    return None


def pull_of_the_kl(function: Callable[..., Any]) -> str | None:
    """Without advantages the gradient is that of k3 alone, 1 - reference / policy for each token."""
    policy, old, reference = responses(1, 3, 4, 8)
    policy.requires_grad_()
    mask = lengths(4, [[2, 4, 1]])
    loss = function(policy, old, reference, torch.zeros(1, 3), mask, clip=0.2, beta=1.0)
    if loss.requires_grad:
        loss.backward()
    wanted = torch.where(mask, 1 - (reference - policy.detach()).exp(), 0) / mask.sum(dim=-1, keepdim=True) / 3
    if policy.grad is None or not torch.allclose(policy.grad, wanted, rtol=1e-3, atol=1e-5):
        return "The KL term has the right value and another gradient: k3 must stay attached to the policy."
    return None


SCALED = "return centred_advantages(rewards) / (rewards.std(dim=1, keepdim=True) + eps)"
CENTRED = "return rewards - rewards.mean(dim=1, keepdim=True)"
MEAN = "low=clip, high=clip)\n    return -sequence_mean(gain, mask).mean()"
KL = "return sequence_mean(k3(log_probs.masked_fill(~mask, 0), reference.masked_fill(~mask, 0)), mask).mean()"
LOSS = "loss = grpo_loss(policy, old, group_advantages(rewards).flatten(), mask, clip=clip)"
SUM = "return loss + beta * reference_kl(policy, reference, mask)"
WHOLE = f"{LOSS}\n    {SUM}"
GAIN = "gain = clipped_surrogate(ratio, each_token(advantages, mask), low=clip, high=clip)"
AVERAGE = f"{GAIN}\n    return -sequence_mean(gain, mask).mean()"
RATIO = f"ratio = log_ratios(log_probs, old, mask).exp()\n    {AVERAGE}"
EACH = (
    "each = each_token(group_advantages(rewards).flatten(), mask)\n"
    "    gain = clipped_surrogate(log_ratios(policy, old, mask).exp(), each, low=clip, high=clip)\n"
    "    gain = gain - beta * k3(policy.masked_fill(~mask, 0), reference.masked_fill(~mask, 0))\n"
)
SPO = "alignment/spo"
BASELINES = "alignment/baselines"
LENGTH = "alignment/length_bias"

EXERCISE = Exercise(
    question="alignment/grpo",
    module="alignment/grpo",
    function="loss_of_groups",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-4,  # nearly equal rewards lose digits in float32
    atol=1e-4,
    wrong=(
        Wrong(
            "no standard deviation",
            SCALED,
            "return centred_advantages(rewards)",
            "You left out the standard deviation: reward minus mean alone is Dr. GRPO's advantage.",
        ),
        Wrong(
            "standard deviation of the batch",
            SCALED,
            "return centred_advantages(rewards) / (rewards.std() + eps)",
            "You divide by the standard deviation of all rewards: each group has its own.",
        ),
        Wrong(
            "g in the variance",
            SCALED,
            "return centred_advantages(rewards) / (rewards.std(dim=1, keepdim=True, correction=0) + eps)",
            "Your variance divides by g: here it is g - 1, as torch's std does unless told otherwise.",
        ),
        Wrong(
            "eps too small",
            "eps: float = 1e-4",
            "eps: float = 1e-8",
            "What is added to the standard deviation is too small: rewards equal but for noise get advantages near 1.",
        ),
        Wrong(
            "eps left out",
            "eps: float = 1e-4",
            "eps: float = 0.0",
            "A group of equal rewards is divided 0 by 0: add 1e-4 to the standard deviation.",
        ),
        Wrong(
            "mean of the batch",
            CENTRED,
            "return rewards - rewards.mean()",
            "You subtract the mean of all rewards: the baseline is the mean of the response's own group.",
        ),
        Wrong(
            "mean across the groups",
            CENTRED,
            "return rewards - rewards.mean(dim=0, keepdim=True)",
            "You take the mean across prompts: a group is a row of rewards.",
        ),
        Wrong(
            "normalised across the groups",
            SCALED,
            "return (rewards - rewards.mean(dim=0)) / (rewards.std(dim=0) + eps)",
            "You take mean and standard deviation across prompts: a group is a row of rewards.",
        ),
        Wrong(
            "normalised over the batch",
            SCALED,
            "return (rewards - rewards.mean()) / (rewards.std() + eps)",
            "You take mean and standard deviation of all rewards: each group has its own.",
        ),
        Wrong(
            "eps as a floor",
            SCALED,
            "return centred_advantages(rewards) / rewards.std(dim=1, keepdim=True).clamp(min=eps)",
            "1e-4 is added to the standard deviation, you took it as its smallest value.",
        ),
        Wrong(
            "advantages in another order",
            "group_advantages(rewards).flatten(), mask, clip=clip)",
            "group_advantages(rewards).T.flatten(), mask, clip=clip)",
            "The advantages meet the wrong responses: flatten them in the same order as the log-probabilities.",
        ),
        Wrong(
            "mean over tokens",
            WHOLE,
            f"{EACH}    return -token_mean(gain, mask)",
            "You average over all tokens, as DAPO does: GRPO first averages over each response's own.",
        ),
        Wrong(
            "divided by the width",
            WHOLE,
            f"{EACH}    return -sequence_sum(gain, mask).mean() / mask.shape[1]",
            "You divide each response by the width of the batch (Dr. GRPO divides by a constant, too): GRPO divides by "
            "its own length.",
        ),
        Wrong(
            "mask forgotten",
            WHOLE,
            "each = each_token(group_advantages(rewards).flatten(), mask)\n"
            "    gain = clipped_surrogate((policy - old.detach()).exp(), each, low=clip, high=clip)\n"
            "    return (beta * k3(policy, reference) - gain).mean()",
            "Padding is averaged with the responses: only tokens that the mask marks count.",
        ),
        Wrong(
            "masked by multiplication",
            KL,
            "return ((k3(log_probs, reference) * mask).sum(dim=-1) / mask.sum(dim=-1)).mean()",
            "What is infinite at a masked token comes through, as inf times 0 is no number: masked_fill before exp.",
        ),
        Wrong(
            "the larger",
            AVERAGE,
            AVERAGE.replace("clipped_surrogate(", "-clipped_surrogate(").replace("each_token(", "-each_token("),
            "You took the larger of the two terms: PPO is pessimistic, the surrogate is the smaller one.",
        ),
        Wrong(
            "the smaller ratio",
            AVERAGE,
            AVERAGE.replace(GAIN, "gain = ratio.clamp(max=1 + clip) * each_token(advantages, mask)"),
            "You took the smaller ratio and multiplied then: for a negative advantage the smaller product has the "
            "larger ratio. Multiply first.",
        ),
        Wrong(
            "clipped term only",
            AVERAGE,
            AVERAGE.replace(GAIN, "gain = ratio.clamp(1 - clip, 1 + clip) * each_token(advantages, mask)"),
            "Only the clipped term is there: a token that went the wrong way loses its gradient, too. Take the smaller "
            "of both.",
        ),
        Wrong(
            "ratio upside down",
            RATIO,
            RATIO.replace("log_ratios", "(-log_ratios").replace("mask).exp", "mask)).exp"),
            "The ratio is upside down: policy / old, so exp(log_probs - old).",
        ),
        Wrong(
            "difference for ratio",
            RATIO,
            RATIO.replace("log_ratios", "1 + log_ratios").replace("mask).exp()", "mask)"),
            "The ratio is the exponential of the difference of log-probabilities, you left the exponential out.",
        ),
        Wrong(
            "no clipping",
            MEAN,
            "low=1e9, high=1e9)\n    return -sequence_mean(gain, mask).mean()",
            "Nothing is clipped: take the smaller of ratio x advantage and clipped ratio x advantage.",
        ),
        Wrong(
            "ratio always 1",
            LOSS,
            "loss = grpo_loss(policy, policy.detach(), group_advantages(rewards).flatten(), mask, clip=clip)",
            "Your ratio is always 1: its denominator is the policy that sampled, old.",
        ),
        Wrong(
            "sign of the surrogate",
            LOSS,
            "loss = -grpo_loss(policy, old, group_advantages(rewards).flatten(), mask, clip=clip)",
            "The sign of the surrogate is that of an objective: a loss is minus it.",
        ),
        Wrong(
            "sign of the loss",
            WHOLE,
            f"{EACH}    return sequence_mean(gain, mask).mean()",
            "The sign is that of an objective, which is to be maximised: the loss is minus it.",
        ),
        Wrong(
            "beta not used",
            SUM,
            SUM.replace("beta * ", ""),
            "beta is not used: the KL is weighed with it.",
        ),
        Wrong(
            "no KL",
            SUM,
            "return loss",
            "The KL to the reference is missing: add beta times k3.",
        ),
        Wrong(
            "KL rewarded",
            SUM,
            "return loss - beta * reference_kl(policy, reference, mask)",
            "The KL is subtracted from the loss, which pays for leaving the reference: add it.",
        ),
        Wrong(
            "KL flipped",
            KL,
            "return sequence_mean(k3(reference.masked_fill(~mask, 0), log_probs.masked_fill(~mask, 0)), mask).mean()",
            "Policy and reference are exchanged in k3: it is e^-d - 1 + d with d = log(policy / reference).",
        ),
        Wrong(
            "k1 for k3",
            KL,
            "return sequence_mean((log_probs - reference).masked_fill(~mask, 0), mask).mean()",
            "Your KL is the plain log ratio, k1, whose gradient is 0 in the mean: k3 is e^-d - 1 + d.",
        ),
    ),
    also_wrong=(
        Wrong(
            "KL of masked infinities",
            KL,
            "return sequence_mean(k3(log_probs, reference), mask).mean()",
            "Infinite numbers of masked tokens come through: put 0 there before you subtract and take exp.",
        ),
        Wrong(
            "informative the other way",
            "rewards.amax(dim=1) > rewards.amin(dim=1)",
            "rewards.amax(dim=1) == rewards.amin(dim=1)",
            "The groups that teach are those with a difference.",
        ),
        Wrong(
            "DAPO without clip-higher",
            "high: float = 0.28",
            "high: float = 0.2",
            "DAPO has more room above.",
        ),
        Wrong(
            "GSPO's product",
            "ratio = sequence_mean(log_ratios(log_probs, old, mask), mask).exp()",
            "ratio = sequence_sum(log_ratios(log_probs, old, mask), mask).exp()",
            "The geometric mean of the ratios, not their product.",
        ),
        Wrong(
            "CISPO's weight with gradient",
            ".clamp(max=most).detach()",
            ".clamp(max=most)",
            "The weight is detached.",
        ),
        Wrong(
            "forgets less after a large move",
            "torch.exp2(-moved / half)",
            "(1 - torch.exp2(-moved / half))",
            "A large movement means to forget more.",
            SPO,
        ),
        Wrong(
            "a frozen policy never forgets",
            ".clamp(least, most)",
            ".clamp(min=least)",
            "The factor has an upper limit below 1.",
            SPO,
        ),
        Wrong(
            "moving average",
            "good[prompts] = rho * tracker.good[prompts] + rewards",
            "good[prompts] = rho * tracker.good[prompts] + (1 - rho) * rewards",
            "Counts are kept, not averages.",
            SPO,
        ),
        Wrong(
            "mean of the batch as baseline",
            "raw = rewards - baseline(tracker)[prompts]",
            "raw = rewards - rewards.mean()",
            "The baseline is the prompt's own.",
            SPO,
        ),
        Wrong(
            "movement with signs",
            "return sequence_mean((now - then).abs(), mask)",
            "return sequence_mean(now - then, mask).abs()",
            "Ups and downs of tokens must not cancel.",
            SPO,
        ),
        Wrong(
            "easy prompts first",
            "weight = (mean * (1 - mean)).sqrt() + explore",
            "weight = mean + explore",
            "Prompts that are neither sure nor hopeless come first.",
            SPO,
        ),
        Wrong(
            "only hopeless groups are silent",
            "return p**g + (1 - p) ** g",
            "return (1 - p) ** g",
            "A group that is all right says nothing, either.",
            BASELINES,
        ),
        Wrong(
            "error not squared",
            "return p * (1 - p) + (p - baseline) ** 2",
            "return p * (1 - p) + (p - baseline).abs()",
            "It is the square of the baseline's error that is added.",
            BASELINES,
        ),
        Wrong(
            "the reward counted before its baseline",
            "        means.append(spo.baseline(tracker))\n        reward = torch.bernoulli(p, generator=generator)\n",
            "        reward = torch.bernoulli(p, generator=generator)\n"
            "        means.append(spo.baseline(spo.update(tracker, every, reward, factor.expand(len(every)))))\n",
            "The baseline is that before the reward is counted.",
            BASELINES,
        ),
        Wrong(
            "the stopping token left out",
            "mask = ends.cumsum(dim=1) - ends.int() == 0",
            "mask = ends.cumsum(dim=1) == 0",
            "The token after which it stops is written, too.",
            LENGTH,
        ),
        Wrong(
            "stop and go on exchanged",
            "torch.where(stops, F.logsigmoid(logits)[:, None], F.logsigmoid(-logits)[:, None])",
            "torch.where(stops, F.logsigmoid(-logits)[:, None], F.logsigmoid(logits)[:, None])",
            "The logit is that of stopping.",
            LENGTH,
        ),
    ),
    probes=(
        Probe("gradient", only_the_policy),
        Probe("gradient of the surrogate", pull_of_the_surrogate),
        Probe("gradient of the KL", pull_of_the_kl),
    ),
    hints=(
        "rewards.mean(dim=1, keepdim=True) and rewards.std(dim=1, keepdim=True): one baseline and scale a group.",
        "Put 0 where the mask is False, in all three log-probabilities, before you take exp; detach old and reference.",
        "torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A), A with a new last axis for the tokens.",
        "Subtract beta * (exp(-d) - 1 + d), zero what is masked, sum over tokens, divide by each length, mean, minus.",
    ),
)
