"""The exercise of alignment/ppo: the clipped policy loss with k3 to the reference, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: alignment/ppo
import torch


def ppo_loss(log_probs, old, reference, advantages, mask, *, clip=0.2, beta=0.05):
    """PPO's policy loss plus beta times the KL to the reference, for tokens that the old policy sampled.

    All are [b, t], one number for each token: log_probs under the policy, old as stored at sampling,
    reference under the reference, advantages. mask is True for the tokens of the response: prompt and
    padding do not count, whatever numbers stand there, be they infinite. The result is a scalar: minus
    the clipped surrogate plus beta times the estimator k3, averaged over all response tokens of the
    batch. Gradient flows into the policy, none into old, reference and advantages.
    """
    raise NotImplementedError
'''


def oracle(log_probs, old, reference, advantages, mask, *, clip=0.2, beta=0.05):  # type: ignore[no-untyped-def]
    """Token by token, in float64, one region after the other."""
    total, count = 0.0, 0
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            if not mask[i, j]:
                continue
            count += 1
            p, o, r, a = (x[i, j].double().item() for x in (log_probs, old, reference, advantages))
            ratio = torch.tensor(p - o, dtype=torch.float64).exp().item()
            if (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip):
                ratio = 1 + clip if a > 0 else 1 - clip
            total -= ratio * a
            total += beta * (torch.tensor(r - p, dtype=torch.float64).exp().item() - 1 - (r - p))
    return torch.tensor(total / max(count, 1))


def tokens(b: int, t: int, seed: int, *, moved: float = 0.5, far: float = 0.7) -> tuple[Tensor, ...]:
    """Log-probabilities of policy, old policy and reference, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.empty(b, t).exponential_(generator=generator)
    policy = old + moved * torch.randn(b, t, generator=generator)
    reference = old + far * torch.randn(b, t, generator=generator)
    return policy, old, reference, torch.randn(b, t, generator=generator)


def lengths(t: int, several: list[int], *, start: int = 0) -> Tensor:
    """A mask of responses that begin at `start` and have these numbers of tokens."""
    place = torch.arange(t)
    return (place >= start) & (place < start + torch.tensor(several)[:, None])


def make_cases() -> list[Case]:
    full, padded = torch.ones(3, 4, dtype=torch.bool), lengths(6, [3, 6, 1, 4])
    several = tokens(4, 6, 3)
    infinite = [x.masked_fill(~padded, -torch.inf) for x in several]
    corners = torch.tensor([[0.5, 1.1, 1.5], [0.5, 1.1, 1.5]]).log()
    signs, zero = torch.tensor([[1.0], [-1.0]]).expand(2, 3), torch.zeros(2, 3)
    six = (corners, zero, corners, signs, torch.ones(2, 3, dtype=torch.bool))
    policy, old, _, advantages = tokens(4, 6, 6)
    return [
        Case("no padding", (*tokens(3, 4, 0), full), {"clip": 0.3, "beta": 0.5}, "3 responses of 4 tokens each"),
        Case("padding", (*tokens(4, 6, 1), padded), {"clip": 0.2, "beta": 0.3}, "responses of 1 to 6 tokens"),
        Case(
            "prompt before the response",
            (*tokens(2, 9, 2), lengths(9, [3, 5], start=4)),
            {"clip": 0.1, "beta": 0.3},
            "4 tokens of prompt",
        ),
        Case("infinite padding", (*infinite, padded), {"clip": 0.2, "beta": 0.3}, "masked tokens hold -inf"),
        Case("six regions", six, {"beta": 0.0}, "ratios 0.5, 1.1 and 1.5, good and bad tokens; no KL"),
        Case("KL alone", (policy, old, policy - 0.8, 0 * advantages, padded), {"beta": 1.0}, "all advantages are 0"),
        Case("defaults", (*tokens(3, 4, 5), full), {}, "clip is 0.2 and beta 0.05 unless given"),
        Case("first step", (old, old, old - 0.3, advantages, padded), {"beta": 0.4}, "the policy that sampled"),
    ]


def nothing_else_learns(function: Callable[..., Any]) -> str | None:
    """Gradient for the policy, in the response only, and for nothing else."""
    mask = lengths(5, [2, 5, 3])
    several = [x.masked_fill(~mask, -torch.inf).requires_grad_() for x in tokens(3, 5, 7)]
    policy, old, reference, advantages = several
    loss = function(policy, old, reference, advantages, mask, clip=0.2, beta=0.3)
    if not loss.requires_grad:
        return "No gradient reaches the policy: keep the loss a tensor, without item(), detach() or no_grad()."
    loss.backward()
    names = ("the old policy", "the reference", "the advantages")
    for name, x in zip(names, (old, reference, advantages), strict=True):
        if x.grad is not None and bool(x.grad.any()):
            return f"Gradient flows into {name}: detach."
    if policy.grad is not None and bool(policy.grad.isnan().any()):
        return "The gradient is NaN where masked tokens are infinite: put 0 there before you subtract and take exp."
    if policy.grad is not None and bool(policy.grad[~mask].any()):
        return "Gradient flows into tokens that the mask leaves out."
    return None


def pull_of_the_surrogate(function: Callable[..., Any]) -> str | None:
    """Without KL the gradient is -A ratio where nothing is clipped, and 0 elsewhere."""
    policy, old, reference, advantages = tokens(3, 5, 9)
    policy.requires_grad_()
    mask = lengths(5, [2, 5, 3])
    loss = function(policy, old, reference, advantages, mask, clip=0.2, beta=0.0)
    if loss.requires_grad:
        loss.backward()
    ratio = (policy.detach() - old).exp()
    cut = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    wanted = torch.where(mask & ~cut, -advantages * ratio, 0) / mask.sum()
    if policy.grad is None or not torch.allclose(policy.grad, wanted, rtol=1e-3, atol=1e-5):
        return "The surrogate has the right value and another gradient: the ratio must stay attached to the policy."
    return None


def pull_of_the_kl(function: Callable[..., Any]) -> str | None:
    """Without advantages the gradient is that of k3 alone, 1 - reference / policy for each token."""
    policy, old, reference, advantages = tokens(3, 5, 8)
    policy.requires_grad_()
    mask = lengths(5, [2, 5, 3])
    loss = function(policy, old, reference, 0 * advantages, mask, clip=0.2, beta=10.0)
    if loss.requires_grad:
        loss.backward()
    wanted = torch.where(mask, 1 - (reference - policy.detach()).exp(), 0)
    if policy.grad is None or not torch.allclose(policy.grad, wanted, rtol=1e-3, atol=1e-4):
        return "The KL term has the right value and another gradient: k3 must stay attached to the policy."
    return None


SURROGATE = "return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)"
RATIO = "    ratio = log_ratios(log_probs, old, mask).exp()\n    return -token_mean"
REFERENCE = "d = log_ratios(log_probs, reference, mask)"
KL = "kl = token_mean(k3(d, torch.zeros_like(d)), mask)"
SUM = "return policy_loss(log_probs, old, advantages, mask, clip=clip) + beta * kl"
LOSS = "return -token_mean(clipped_surrogate(ratio, advantages.detach(), low=clip, high=clip), mask)"
KINDS = "alignment/kl"
ROLLOUT = "alignment/rollout"
TRIALS = "alignment/ppo_trials"

EXERCISE = Exercise(
    question="alignment/ppo",
    module="alignment/ppo",
    function="ppo_loss",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-4,  # sums of 40 float32 numbers
    atol=1e-5,
    wrong=(
        Wrong(
            "the larger",
            SURROGATE,
            SURROGATE.replace("minimum", "maximum"),
            "You took the larger of the two terms: PPO is pessimistic, the surrogate is the smaller one.",
        ),
        Wrong(
            "the smaller ratio",
            SURROGATE,
            "return torch.minimum(ratio, ratio.clamp(1 - low, 1 + high)) * advantage",
            "You took the smaller ratio and multiplied then: for a negative advantage the smaller product has the "
            "larger ratio. Multiply first.",
        ),
        Wrong(
            "clipped term only",
            SURROGATE,
            "return ratio.clamp(1 - low, 1 + high) * advantage",
            "Only the clipped term is there: a token that went the wrong way loses its gradient, too. Take the smaller "
            "of both.",
        ),
        Wrong(
            "never clipped",
            SURROGATE,
            "return ratio * advantage",
            "Nothing is clipped: take the smaller of ratio A and clipped ratio A.",
        ),
        Wrong(
            "clipped above only",
            "ratio.clamp(1 - low, 1 + high)",
            "ratio.clamp(max=1 + high)",
            "The ratio is clipped above only: a bad token that has fallen below 1 - clip must be left alone, too.",
        ),
        Wrong(
            "ratio upside down",
            RATIO,
            "    ratio = (-log_ratios(log_probs, old, mask)).exp()\n    return -token_mean",
            "The ratio is upside down: policy / old, so exp(log_probs - old).",
        ),
        Wrong(
            "difference for ratio",
            RATIO,
            "    ratio = 1 + log_ratios(log_probs, old, mask)\n    return -token_mean",
            "The ratio is the exponential of the difference of log-probabilities, you left the exponential out.",
        ),
        Wrong(
            "ratio always 1",
            RATIO,
            "    ratio = log_ratios(log_probs, log_probs, mask).exp()\n    return -token_mean",
            "The ratio is always 1: divide by the stored old policy, not by the present one.",
        ),
        Wrong(
            "ratio of the response",
            RATIO,
            "    ratio = log_ratios(log_probs, old, mask).sum(1, keepdim=True).exp().expand(mask.shape)\n"
            "    return -token_mean",
            "Each token has its own ratio, you took that of the whole response.",
        ),
        Wrong(
            "sign of the loss",
            LOSS,
            LOSS.replace("-token", "token"),
            "The surrogate is to be maximised: the loss is minus it.",
        ),
        Wrong(
            "mask forgotten",
            SUM,
            "gain = clipped_surrogate((log_probs - old.detach()).exp(), advantages.detach(), low=clip, high=clip)\n"
            "    return (beta * k3(log_probs, reference) - gain).mean()",
            "Prompt and padding are averaged with the response: only tokens that the mask marks count.",
        ),
        Wrong(
            "masked by multiplication",
            SUM,
            "gain = clipped_surrogate((log_probs - old.detach()).exp(), advantages.detach(), low=clip, high=clip)\n"
            "    return ((beta * k3(log_probs, reference) - gain) * mask).sum() / mask.sum()",
            "What is infinite at a masked token comes through, as inf times 0 is no number: masked_fill before exp.",
        ),
        Wrong(
            "mean over all columns",
            SUM,
            SUM.replace("return ", "return mask.float().mean() * (") + ")",
            "Masked tokens are zeroed but counted: divide by the number of response tokens, not by b x t.",
        ),
        Wrong(
            "divided by the responses",
            SUM,
            SUM.replace("return ", "return mask.sum() / len(mask) * (") + ")",
            "You divide by the number of responses: divide by the number of their tokens.",
        ),
        Wrong(
            "advantages whitened",
            LOSS,
            LOSS.replace("advantages.detach()", "whiten(advantages, mask)"),
            "You normalise the advantages: they are used as they are given.",
        ),
        Wrong(
            "mean of means",
            SUM,
            "ratio = log_ratios(log_probs, old, mask).exp()\n"
            "    gain = clipped_surrogate(ratio, advantages.detach(), low=clip, high=clip)\n"
            "    each = (beta * k3(d, torch.zeros_like(d)) - gain).masked_fill(~mask, 0).sum(1)\n"
            "    return (each / mask.sum(1).clamp(min=1)).mean()",
            "You averaged in each response, then over responses, which is GRPO's way: here all tokens weigh the same.",
        ),
        Wrong(
            "k1 for k3",
            KL,
            "kl = token_mean(d, mask)",
            "This is k1, the plain difference: as a loss its mean gradient is 0. k3 is exp(-d) - 1 + d.",
        ),
        Wrong(
            "k2 for k3",
            KL,
            "kl = token_mean(d.square() / 2, mask)",
            "This is k2, half the square: k3 = exp(-d) - 1 + d is asked.",
        ),
        Wrong(
            "k3 flipped",
            KL,
            "kl = token_mean(k3(-d, torch.zeros_like(d)), mask)",
            "k3 is flipped: exp(-d) - 1 + d with d = log(policy / reference): the ratio in it is reference / policy.",
        ),
        Wrong(
            "k3 without -1",
            KL,
            "kl = 1 + token_mean(k3(d, torch.zeros_like(d)), mask)",
            "Your k3 is 1 where policy and reference agree, and must be 0 there: exp(-d) - 1 + d.",
        ),
        Wrong(
            "KL to the old policy",
            REFERENCE,
            "d = log_ratios(log_probs, old, mask)",
            "The KL is to the reference, you took that to the old policy.",
        ),
        Wrong(
            "KL rewarded",
            SUM,
            SUM.replace("+ beta", "- beta"),
            "The KL is a cost: add it to the loss.",
        ),
        Wrong(
            "beta not used",
            SUM,
            SUM.replace("+ beta * kl", "+ kl"),
            "beta is not used: the KL is weighed with it.",
        ),
        Wrong(
            "no KL",
            SUM,
            SUM.replace(" + beta * kl", ""),
            "The KL to the reference is missing.",
        ),
    ),
    also_wrong=(
        Wrong(
            "old policy not detached",
            "return (log_probs - old.detach()).masked_fill(~mask, 0)",
            "return (log_probs - old).masked_fill(~mask, 0)",
            "No gradient flows into the old policy.",
        ),
        Wrong(
            "advantages not detached",
            LOSS,
            LOSS.replace("advantages.detach()", "advantages"),
            "Advantages have no gradient: it would teach the critic to be wrong.",
        ),
        Wrong(
            "KL without gradient",
            KL,
            "kl = token_mean(k3(d, torch.zeros_like(d)), mask).detach()",
            "The KL must pull at the policy.",
        ),
        Wrong(
            "KL paid",
            "torch.where(mask, -beta * k1(log_probs, reference), 0)",
            "torch.where(mask, beta * k1(log_probs, reference), 0)",
            "KL is a cost in the reward.",
        ),
        Wrong(
            "score at every token",
            "last = mask & (later == 1)",
            "last = mask",
            "The score is given once, at the last token.",
        ),
        Wrong(
            "lambda missing",
            "return error + gamma * lam * next_advantage",
            "return error + gamma * next_advantage",
            "Later errors fade by gamma lambda.",
        ),
        Wrong(
            "value of padding",
            "next_value = torch.where(mask[:, i], values[:, i], next_value)",
            "next_value = values[:, i]",
            "After the last token the value is 0, whatever the critic says of the padding.",
        ),
        Wrong(
            "returns without values",
            "return Gae(advantages, advantages + values.masked_fill(~mask, 0))",
            "return Gae(advantages, advantages)",
            "The critic learns advantages plus values.",
        ),
        Wrong(
            "whitened over all columns",
            "centred = (x - token_mean(x, mask)).masked_fill(~mask, 0)",
            "centred = (x - x.mean()).masked_fill(~mask, 0)",
            "The mean is that of the response's tokens.",
        ),
        Wrong(
            "clip fraction without the sign",
            "cut = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))",
            "cut = (ratio > 1 + clip) | (ratio < 1 - clip)",
            "Outside is not yet clipped: that depends on the advantage.",
        ),
        Wrong(
            "the smaller error of the value",
            "error = torch.maximum(",
            "error = torch.minimum(",
            "The larger of the two errors counts.",
        ),
        Wrong(
            "k3 without the linear term",
            "return torch.expm1(-d) + d",
            "return torch.expm1(-d)",
            "e^-d - 1 alone has mean 0.",
            KINDS,
        ),
        Wrong(
            "probabilities differentiated",
            "loss = (log_p.detach().exp() * estimator",
            "loss = (log_p.exp() * estimator",
            "Samples are drawn, not differentiated.",
            KINDS,
        ),
        Wrong(
            "log-probabilities at temperature 1",
            "return Drawn(tokens[:, 0], log_p.gather(1, tokens)[:, 0]",
            "return Drawn(tokens[:, 0], logits.log_softmax(dim=-1).gather(1, tokens)[:, 0]",
            "Drawn at one temperature, stored at another: the ratio is no importance weight.",
            ROLLOUT,
        ),
        Wrong(
            "biased pass@k",
            "1 - math.comb(w, k) / math.comb(c, k)",
            "1 - (w / c) ** k",
            "Too small: the tries are drawn without putting back.",
            ROLLOUT,
        ),
        Wrong(
            "drift of the other policy",
            "k3(torch.zeros_like(d), d)",
            "k3(d, torch.zeros_like(d))",
            "The samples are the old policy's, so the mean is over them.",
            TRIALS,
        ),
        Wrong(
            "samples of the reference",
            "log_p.detach().exp().multinomial(batch, replacement=True, generator=generator)",
            "log_q.exp().multinomial(batch, replacement=True, generator=generator)",
            "The penalty is estimated from the policy's own samples.",
            TRIALS,
        ),
        Wrong(
            "temperature forgotten",
            "now = rescore(model, rollout, temperature=temperature)",
            "now = rescore(model, rollout)",
            "Samples are scored at the temperature at which they were drawn.",
            TRIALS,
        ),
    ),
    probes=(
        Probe("gradient", nothing_else_learns),
        Probe("gradient of the surrogate", pull_of_the_surrogate),
        Probe("gradient of the KL", pull_of_the_kl),
    ),
    hints=(
        "Subtract first, then put 0 where the mask is False (masked_fill), then take exp: so padding never matters.",
        "ratio = exp(log_probs - old.detach()); the surrogate is torch.minimum(ratio * A, ratio.clamp(...) * A).",
        "d = log_probs - reference.detach(); k3 = exp(-d) - 1 + d, which is 0 where the two agree.",
        "Sum both over the masked-in tokens, divide by their number: -surrogate + beta * k3.",
    ),
)
