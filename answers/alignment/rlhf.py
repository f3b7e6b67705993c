"""The exercise of alignment/rlhf: the reward model's loss from a number for each token, and its wrong versions."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: alignment/rlhf
import torch


def reward_loss(values, real, *, margin=0.0):
    """The loss of Bradley and Terry of b pairs of texts, from the reward model's number for each token.

    values [2, b, t]: [0] are the chosen texts, [1] the rejected ones. real [2, b, t] is True for
    tokens and False for padding, which may stand on either side and hold anything. A text's score
    is its value at the last real token. The loss of a pair is minus the log of the probability
    that the chosen one is preferred, sigmoid(chosen - rejected - margin); margin is a number or
    one for each pair. The result is a scalar, the mean over the pairs.
    """
    raise NotImplementedError
'''


def oracle(values, real, *, margin=0.0):  # type: ignore[no-untyped-def]
    """Pair by pair, the last real token found by walking backwards."""
    pairs = values.shape[1]
    margins = [float(margin)] * pairs if not isinstance(margin, Tensor) else margin.tolist()
    total = 0.0
    for b in range(pairs):
        score = []
        for side in (0, 1):
            t = values.shape[2] - 1
            while not real[side, b, t]:
                t -= 1
            score.append(values[side, b, t].item())
        x = score[0] - score[1] - margins[b]
        total += max(-x, 0.0) + math.log1p(math.exp(-abs(x)))
    return torch.tensor(total / pairs)


def numbers(b: int, t: int, seed: int) -> Tensor:
    """Values of b pairs of t tokens."""
    return torch.randn(2, b, t, generator=torch.Generator().manual_seed(seed))


def spans(t: int, starts: list[list[int]], stops: list[list[int]]) -> Tensor:
    """True from start to before stop, for both sides of each pair."""
    place = torch.arange(t)
    return (place >= torch.tensor(starts)[..., None]) & (place < torch.tensor(stops)[..., None])


def make_cases() -> list[Case]:
    full = torch.ones(2, 3, 4, dtype=torch.bool)
    right = spans(6, [[0] * 4, [0] * 4], [[3, 5, 2, 6], [4, 1, 6, 2]])
    left = spans(6, [[2, 0, 4], [1, 3, 5]], [[6] * 3, [6] * 3])
    both = spans(7, [[1, 0], [2, 3]], [[4, 6], [6, 5]])
    spoilt = numbers(4, 6, 5).masked_fill(~right, torch.nan)
    return [
        Case("no padding", (numbers(3, 4, 0), full), {}, "3 pairs of 4 tokens"),
        Case("padding on the right", (numbers(4, 6, 1), right), {}, "texts of unequal length"),
        Case("padding on the left", (numbers(3, 6, 2), left), {}, "padding stands before the texts"),
        Case("padding on both sides", (numbers(2, 7, 3), both), {}, "padding before and after"),
        Case("padding that is no number", (spoilt, right), {}, "padding holds NaN"),
        Case("a margin", (numbers(3, 4, 6), full), {"margin": 0.8}, "one margin for all pairs"),
        Case(
            "margins",
            (numbers(4, 6, 7), right),
            {"margin": torch.tensor([0.0, 1.0, 2.0, 0.5])},
            "a margin for each pair",
        ),
        Case("one pair of one token", (numbers(1, 1, 8), torch.ones(2, 1, 1, dtype=torch.bool)), {}, "b = t = 1"),
    ]


def pulls_one_token(function: Callable[..., Any]) -> str | None:
    """The gradient: one token of each text, downhill raises the chosen one."""
    values = numbers(3, 5, 9).requires_grad_()
    real = spans(5, [[0, 1, 0], [0, 0, 2]], [[2, 4, 5], [3, 5, 4]])
    loss = function(values, real)
    if not loss.requires_grad:
        return "No gradient reaches the values: keep the loss a tensor, without item(), detach() or no_grad()."
    loss.backward()
    reached = torch.zeros(2, 3) if values.grad is None else (values.grad != 0).sum(dim=-1)
    for side, pulled in zip(("chosen", "rejected"), reached, strict=True):
        if not bool(pulled.all()):
            return f"No gradient reaches the {side} texts: both scores of a pair learn, neither is detached."
    if bool((reached > 1).any()):
        return "More than one token of a text gets a gradient: the score is the value at one token, the last real one."
    return None


def far_apart(function: Callable[..., Any]) -> str | None:
    """A pair in the wrong order by 2,000 costs 2,000: not infinity, nor what a small constant in the log makes."""
    values = torch.tensor([[[-1000.0]], [[1000.0]]])
    loss = function(values, torch.ones(2, 1, 1, dtype=torch.bool)).item()
    if not math.isclose(loss, 2000.0, rel_tol=1e-3):
        return (
            f"A difference of -2,000 costs 2,000, in your loss {loss:.4g}: the sigmoid is 0 there, and exp(2,000) "
            "infinite. Use torch.nn.functional.logsigmoid."
        )
    return None


READ = "return values.gather(1, last[:, None]).squeeze(1)"
PLACE = "last = place.masked_fill(~real, -1).amax(dim=1)"
LOSS = "return -F.logsigmoid(chosen - rejected - margin).mean()"
SPLIT = "chosen, rejected = last_real(values.flatten(0, 1), real.flatten(0, 1)).unflatten(0, (2, -1))"
BEST, TASK, TOY = "alignment/best_of_n", "alignment/fact_lists", "alignment/rlhf"

EXERCISE = Exercise(
    question="alignment/rlhf",
    module="alignment/reward_model",
    function="reward_loss",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-5,
    atol=1e-6,
    wrong=(
        Wrong(
            "last column",
            READ,
            "return values[:, -1]",
            "You read the last column, which may be padding: the score is read at the last real token.",
        ),
        Wrong(
            "right padding only",
            PLACE,
            "last = real.sum(dim=1) - 1",
            "The number of real tokens minus 1 is the place of the last one only if all padding is on the right.",
        ),
        Wrong(
            "one too early",
            READ,
            "return values.gather(1, (last - 1).clamp(min=0)[:, None]).squeeze(1)",
            "You read one token before the last real one: it has not seen the end of the text.",
        ),
        Wrong(
            "first real token",
            PLACE,
            "last = place.masked_fill(~real, 10**9).amin(dim=1)",
            "You read the first real token: it has seen nothing of the text but itself.",
        ),
        Wrong(
            "mean over the tokens",
            READ,
            "return values.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)",
            "You took the mean over the real tokens: the score is the value at the last one only.",
        ),
        Wrong(
            "sum over the tokens",
            READ,
            "return values.masked_fill(~real, 0).sum(dim=1)",
            "You summed over the real tokens: the score is the value at the last one only.",
        ),
        Wrong(
            "read by multiplication",
            READ,
            "return (values * F.one_hot(last, values.shape[1])).sum(dim=1)",
            "What padding holds comes through, as NaN times 0 is NaN: read the last real token with gather.",
        ),
        Wrong(
            "chosen and rejected exchanged",
            "return -F.logsigmoid(chosen - rejected - margin)",
            "return -F.logsigmoid(rejected - chosen - margin)",
            "Chosen and rejected are exchanged: the model would learn to score high what people did not want.",
        ),
        Wrong(
            "no logarithm",
            LOSS,
            "return -(chosen - rejected - margin).sigmoid().mean()",
            "This is minus a probability: the loss is minus its logarithm.",
        ),
        Wrong(
            "log of the mean",
            LOSS,
            "return -(chosen - rejected - margin).sigmoid().mean().log()",
            "You took the log of the mean probability: take the log of each pair, then the mean.",
        ),
        Wrong(
            "sign of the loss",
            LOSS,
            "return F.logsigmoid(chosen - rejected - margin).mean()",
            "The sign is missing: a loss is minus the log-probability, so that less is better.",
        ),
        Wrong(
            "summed over the pairs",
            LOSS,
            "return -F.logsigmoid(chosen - rejected - margin).sum()",
            "The pairs are summed: the mean over the pairs is asked.",
        ),
        Wrong(
            "margin added",
            "logsigmoid(chosen - rejected - margin)",
            "logsigmoid(chosen - rejected + margin)",
            "The margin is added: it makes the pair harder, so it is subtracted from the difference.",
        ),
        Wrong(
            "margin not used",
            "logsigmoid(chosen - rejected - margin)",
            "logsigmoid(chosen - rejected)",
            "The margin is not used.",
        ),
        Wrong(
            "scores one by one",
            LOSS,
            "return -(F.logsigmoid(chosen - margin) + F.logsigmoid(-rejected)).mean()",
            "Each score is judged by itself, as good or bad: only the difference of the two is known.",
        ),
        Wrong(
            "sides split after the pairs",
            SPLIT,
            "chosen, rejected = last_real(values.flatten(0, 1), real.flatten(0, 1)).unflatten(0, (-1, 2)).mT",
            "Rows are paired with their neighbours: row i of values[0] belongs to row i of values[1].",
        ),
    ),
    also_wrong=(
        Wrong("ties are right", "(chosen > rejected)", "(chosen >= rejected)", "Equal scores do not order a pair."),
        Wrong(
            "bound of the wrong sign",
            "return math.log(n) - (n - 1) / n",
            "return math.log(n) + (n - 1) / n",
            "The second term is subtracted: for n = 1 nothing changes, for large n it is log n - 1.",
            BEST,
        ),
        Wrong(
            "a share of n instead of its power",
            "(up_to**n - below**n)",
            "(up_to - below) ** n",
            "That is the probability that all n draws are this one; the best of n is at most s if all are at most s.",
            BEST,
        ),
        Wrong(
            "ties all count in full",
            "share = p / (up_to - below)",
            "share = p / p",
            "Equal scores share what comes out, each by its probability.",
            BEST,
        ),
        Wrong(
            "the best of all",
            "math.comb(i, n - 1) / total",
            "math.comb(i, n) / total",
            "With i answers below, n - 1 of them are chosen beside it.",
            BEST,
        ),
        Wrong(
            "repetition is free",
            "(2 * (times > 0).sum(dim=1) - times.sum(dim=1))",
            "((times > 0).sum(dim=1))",
            "A fact that is said before costs 1.",
            TASK,
        ),
        Wrong(
            "padding is read",
            "said = tokens.masked_fill(~mask, END)",
            "said = tokens",
            "What stands outside the mask is no part of the answer.",
            TASK,
        ),
        Wrong(
            "the worse is preferred",
            "prefers = torch.rand(len(odds), generator=generator) < odds",
            "prefers = torch.rand(len(odds), generator=generator) > odds",
            "The first is preferred with the probability that Bradley and Terry give it.",
            TASK,
        ),
        Wrong(
            "the end is no token",
            "tokens.masked_fill(stop | ended, END), ~ended",
            "tokens.masked_fill(stop | ended, END), ~(stop | ended)",
            "The end is written, too, or the model does not learn to stop.",
            TASK,
        ),
        Wrong(
            "read before the token",
            "[:, answers.prompts.shape[1] :] @ self.head",
            "[:, answers.prompts.shape[1] - 1 : -1] @ self.head",
            "The number of a token is read after the model has seen it: the end counts.",
            TOY,
        ),
        Wrong(
            "the start itself becomes the reward model",
            "self.body = copy.deepcopy(start)",
            "self.body = start",
            "Fitting would change the reference.",
            TOY,
        ),
        Wrong(
            "KL rewarded",
            "(score - beta * away)",
            "(score + beta * away)",
            "The distance from the start is a cost.",
            TOY,
        ),
        Wrong(
            "KL forgotten",
            "(score - beta * away)",
            "(score)",
            "The distance from the start is part of the objective.",
            TOY,
        ),
        Wrong(
            "KL of the other sign",
            "sequence_sum(answers.log_probs - rescore(start, answers), answers.mask)",
            "sequence_sum(rescore(start, answers) - answers.log_probs, answers.mask)",
            "It is log(policy / start).",
            TOY,
        ),
        Wrong(
            "KL a token",
            "return sequence_sum(answers.log_probs - rescore(start, answers), answers.mask)",
            "return sequence_sum(answers.log_probs - rescore(start, answers), answers.mask) / answers.mask.sum(dim=1)",
            "The KL is that of whole answers: the mean over tokens would make long ones cheap.",
            TOY,
        ),
        Wrong(
            "other answers' advantages",
            "advantages[drawn], part.mask)",
            "advantages[: len(drawn)], part.mask)",
            "The advantages are those of the drawn answers.",
            TOY,
        ),
        Wrong(
            "rejected first",
            "torch.cat([w[drawn], l[drawn]])",
            "torch.cat([l[drawn], w[drawn]])",
            "The chosen answers come first.",
            TOY,
        ),
    ),
    probes=(Probe("gradient", pulls_one_token), Probe("far apart", far_apart)),
    hints=(
        "Find each text's last real token: of torch.arange(t), put -1 where real is False, and take the largest.",
        "gather that token's value: scores [2, b]. values.gather(-1, last[..., None]) keeps the axis, squeeze it.",
        "The loss is the mean over pairs of -logsigmoid(scores[0] - scores[1] - margin), from torch.nn.functional.",
    ),
)
