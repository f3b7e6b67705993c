"""The exercise of alignment/dpo: the loss of DPO from log-probabilities of tokens, and its wrong versions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: alignment/dpo
import torch


def dpo_loss(log_probs, reference, mask, *, beta=0.1):
    """The DPO loss of b pairs of responses, from log-probabilities of their tokens.

    log_probs [2, b, t] are the policy's, reference [2, b, t] the reference model's; [0] are the
    chosen responses, [1] the rejected ones to the same prompts. mask [2, b, t] is True for the
    tokens of the response: prompt and padding do not count, whatever numbers stand there, be they
    infinite. The result is a scalar, the mean over the pairs. Gradient flows into the policy,
    none into the reference.
    """
    raise NotImplementedError
'''


def oracle(log_probs, reference, mask, *, beta=0.1):  # type: ignore[no-untyped-def]
    """Pair by pair and token by token, in float64."""
    total = 0.0
    for b in range(log_probs.shape[1]):
        reward = [0.0, 0.0]
        for side in (0, 1):
            for t in range(log_probs.shape[2]):
                if mask[side, b, t]:
                    reward[side] += beta * (log_probs[side, b, t].item() - reference[side, b, t].item())
        margin = torch.tensor(reward[0] - reward[1], dtype=torch.float64)
        total += torch.logaddexp(torch.zeros((), dtype=torch.float64), -margin).item()
    return torch.tensor(total / log_probs.shape[1])


def responses(b: int, t: int, seed: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference for pairs of t tokens."""
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.empty(2, b, t).exponential_(generator=generator)
    return policy, policy - scale * torch.randn(2, b, t, generator=generator)


def lengths(t: int, chosen: list[int], rejected: list[int], *, start: int = 0) -> Tensor:
    """A mask of responses that begin at `start` and have these numbers of tokens."""
    place, stop = torch.arange(t), start + torch.tensor([chosen, rejected])[..., None]
    return (place >= start) & (place < stop)


def make_cases() -> list[Case]:
    full = torch.ones(2, 3, 4, dtype=torch.bool)
    padded = lengths(6, [3, 5, 2, 6], [4, 5, 6, 1])
    prompt = lengths(9, [3, 4], [5, 2], start=4)
    policy, reference = responses(4, 6, 3)
    infinite = policy.masked_fill(~padded, -torch.inf), reference.masked_fill(~padded, -torch.inf)
    long = lengths(40, [4, 40], [40, 4])
    return [
        Case("no padding", (*responses(3, 4, 0), full), {"beta": 0.5}, "3 pairs of 4 tokens each"),
        Case("padding", (*responses(4, 6, 1), padded), {"beta": 0.3}, "responses of unequal length"),
        Case("prompt before the response", (*responses(2, 9, 2), prompt), {"beta": 0.3}, "4 tokens of prompt"),
        Case("infinite padding", (*infinite, padded), {"beta": 0.3}, "masked tokens hold -inf"),
        Case("beta left out", (*responses(3, 4, 4), full), {}, "beta is 0.1 unless given"),
        Case("long and short", (*responses(2, 40, 5, scale=0.5), long), {"beta": 0.2}, "4 and 40 tokens"),
        Case("policy is the reference", (policy, policy.clone(), padded), {"beta": 0.3}, "nothing learnt yet: ln 2"),
    ]


def reference_detached(function: Callable[..., Any]) -> str | None:
    """No gradient into the reference, one into every token of the policy's responses and into no other."""
    policy, reference = responses(3, 5, 6)
    mask = lengths(5, [2, 3, 5], [4, 1, 2])
    policy.requires_grad_()
    reference.requires_grad_()
    loss = function(policy, reference, mask, beta=0.5)
    if not loss.requires_grad:
        return "No gradient reaches the policy: keep the loss a tensor, without item(), detach() or no_grad()."
    loss.backward()
    if reference.grad is not None and bool(reference.grad.any()):
        return "Gradient flows into the reference: detach its log-probabilities."
    if policy.grad is None or not torch.equal(policy.grad != 0, mask):
        return "The gradient of the policy is not exactly on the response: tokens are missing, or masked ones count."
    return None


def far_apart(function: Callable[..., Any]) -> str | None:
    """A pair in the wrong order by 1,999 nats costs 1,999: not infinity, nor what a small constant in the log makes."""
    policy, mask = torch.tensor([[[-2000.0]], [[-1.0]]]), torch.ones(2, 1, 1, dtype=torch.bool)
    loss = function(policy, torch.full_like(policy, -1.0), mask, beta=1.0).item()
    if not math.isclose(loss, 1999.0, rel_tol=1e-3):
        return (
            f"A margin of -1,999 costs 1,999, in your loss {loss:.4g}: the sigmoid is 0 there, and exp(1,999) "
            "infinite. Use torch.nn.functional.logsigmoid."
        )
    return None


REWARD = "return beta * sequence_sum(log_probs - reference.detach(), mask)"
BOTH = "chosen, rejected = implicit_reward(log_probs, reference, mask, beta=beta)"
LOSS = "return -F.logsigmoid(chosen - rejected).mean()"
PREFERENCES = "alignment/preferences"
TUNING = "alignment/preference_tuning"

EXERCISE = Exercise(
    question="alignment/dpo",
    module="alignment/dpo",
    function="dpo_loss",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-4,  # sums of 40 float32 numbers
    atol=1e-5,
    wrong=(
        Wrong(
            "mask forgotten",
            REWARD,
            "return beta * (log_probs - reference.detach()).sum(dim=-1)",
            "Prompt and padding are summed with the response: only tokens that the mask marks count.",
        ),
        Wrong(
            "masked by multiplication",
            REWARD,
            "return beta * ((log_probs - reference.detach()) * mask).sum(dim=-1)",
            "What is infinite at a masked token comes through, as inf times 0 is no number: use masked_fill or where.",
        ),
        Wrong(
            "mean over tokens",
            REWARD,
            "return beta * sequence_mean(log_probs - reference.detach(), mask)",
            "The log-probability of a response is the sum over its tokens, you took the mean.",
        ),
        Wrong(
            "mean over all columns",
            REWARD,
            "return beta * (log_probs - reference.detach()).masked_fill(~mask, 0).mean(dim=-1)",
            "The log-probability of a response is the sum over its tokens, you divided by the width of the batch.",
        ),
        Wrong(
            "reference added",
            REWARD,
            "return beta * sequence_sum(log_probs + reference.detach(), mask)",
            "The reference's log-probabilities are added: a log of a ratio is the policy's minus the reference's.",
        ),
        Wrong(
            "no reference",
            REWARD,
            "return beta * sequence_sum(log_probs, mask)",
            "The reference is not used: the reward is beta log(policy / reference).",
        ),
        Wrong(
            "beta outside",
            LOSS,
            "return -beta * F.logsigmoid((chosen - rejected) / beta).mean()",
            "beta stands outside the sigmoid, where it only scales the loss: it multiplies the log ratios inside.",
        ),
        Wrong(
            "beta twice",
            LOSS,
            "return -F.logsigmoid(beta * (chosen - rejected)).mean()",
            "beta is applied twice.",
        ),
        Wrong(
            "beta not used",
            REWARD,
            "return sequence_sum(log_probs - reference.detach(), mask)",
            "beta is not used: the reward is beta log(policy / reference).",
        ),
        Wrong(
            "divided by beta",
            REWARD,
            "return sequence_sum(log_probs - reference.detach(), mask) / beta",
            "The log ratio is divided by beta: it is multiplied by it.",
        ),
        Wrong(
            "chosen and rejected exchanged",
            BOTH,
            "rejected, chosen = implicit_reward(log_probs, reference, mask, beta=beta)",
            "Chosen and rejected are exchanged: the loss would teach the opposite.",
        ),
        Wrong(
            "token by token",
            LOSS,
            "each = beta * (log_probs - reference.detach()).masked_fill(~mask, 0)\n"
            "    return -F.logsigmoid(each[0] - each[1]).mean()",
            "Tokens are compared one by one, the third with the third: sum each response first, then compare the two.",
        ),
        Wrong(
            "no logarithm",
            LOSS,
            "return -(chosen - rejected).sigmoid().mean()",
            "This is minus a probability: the loss is minus its logarithm.",
        ),
        Wrong(
            "sign of the loss",
            LOSS,
            "return F.logsigmoid(chosen - rejected).mean()",
            "The sign is missing: a loss is minus the log-probability, so that less is better.",
        ),
        Wrong(
            "summed over the pairs",
            LOSS,
            "return -F.logsigmoid(chosen - rejected).sum()",
            "The pairs are summed: the mean over the pairs is asked.",
        ),
    ),
    also_wrong=(
        Wrong(
            "gradient into the reference",
            REWARD,
            "return beta * sequence_sum(log_probs - reference, mask)",
            "The reference is fixed: detach it.",
        ),
        Wrong(
            "target of IPO",
            "1 / (2 * beta)).square()",
            "1 / beta).square()",
            "IPO's target is half of 1 / beta.",
        ),
        Wrong(
            "margin of SimPO added",
            "rejected - gamma",
            "rejected + gamma",
            "The chosen response must be ahead by gamma: subtract it.",
        ),
        Wrong(
            "point of reference below zero",
            ".mean().clamp(min=0)",
            ".mean()",
            "KTO's point of reference estimates a KL, which is never negative.",
        ),
        Wrong(
            "reward times beta",
            "log_reference + reward / beta)",
            "log_reference + reward * beta)",
            "A small beta trusts the reward more: divide.",
            PREFERENCES,
        ),
        Wrong(
            "reference forgotten in the optimum",
            "(log_reference + reward / beta).log_softmax",
            "(reward / beta).log_softmax",
            "The optimum tilts the reference.",
            PREFERENCES,
        ),
        Wrong(
            "KL rewarded",
            "@ reward - beta *",
            "@ reward + beta *",
            "The KL is a cost.",
            PREFERENCES,
        ),
        Wrong(
            "raters who disagree are left out",
            "return -(agreement * F.logsigmoid(margin) + (1 - agreement) * F.logsigmoid(-margin)).mean()",
            "return -(agreement * F.logsigmoid(margin)).mean()",
            "Those who prefer the second response count as well.",
            PREFERENCES,
        ),
        Wrong(
            "reference left out of the logits",
            "log_policy = (log_reference + features @ weights)",
            "log_policy = (features @ weights)",
            "Descent starts at the reference.",
            PREFERENCES,
        ),
        Wrong(
            "longer first",
            "argsort(dim=0)",
            "argsort(dim=0, descending=True)",
            "The shorter response is the chosen one.",
            TUNING,
        ),
        Wrong(
            "ties kept",
            "(length[0] != length[1])",
            "(length[0] >= 0)",
            "A tie says nothing about the preference.",
            TUNING,
        ),
        Wrong(
            "end token left out",
            "stops.cumsum(dim=-1) - stops == 0",
            "stops.cumsum(dim=-1) == 0",
            "The end token is part of the response, or the model does not learn to stop.",
            TUNING,
        ),
        Wrong(
            "reference of other pairs",
            "loss = dpo_loss(log_probs, reference[:, drawn], mask, beta=beta)",
            "loss = dpo_loss(log_probs, reference[:, : len(drawn)], mask, beta=beta)",
            "The stored log-probabilities are those of the drawn pairs.",
            TUNING,
        ),
    ),
    probes=(Probe("gradient", reference_detached), Probe("far apart", far_apart)),
    hints=(
        "Subtract the reference's log-probabilities (detached) from the policy's, token by token: logs of ratios.",
        "Put 0 where the mask is False, with masked_fill, then sum over the tokens: one number a response, [2, b].",
        "margin = beta * (chosen - rejected); the loss is the mean of -logsigmoid(margin), from torch.nn.functional.",
    ),
)
