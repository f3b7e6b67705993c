"""Listing facts: a task with a true quality, people who show how they do it, and people who compare.

Idea:        To see what optimising a learned reward does to the true quality, that must be known, so both people and
             their judgement are made up. An answer lists facts; a new one is worth 1, one said before costs 1. People
             show short answers. When they compare two, the better one wins with the probability of Bradley and Terry:
             they err, the more often the closer the two are. In short answers longer is mostly better, as few facts
             are said twice; in long ones it is worse.
Cost:        Some milliseconds for thousands of answers.
Paper:       Gao et al. 2022, arXiv:2210.10760 (a known gold reward in the place of people). The task is ours.
Production:  none.
Leaves out:  prompts (there is one question), an order of the facts, people who differ from each other.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.alignment.reward_model import preference
from minillm.alignment.rollout import Rollout

FACTS = 20  # there are so many to say: the ids 0 to 19
END, ASK = 20, 21
ROOM = 32  # tokens of an answer, END included, at most
STOP = 0.25  # the probability with which people stop after each fact


def gold(tokens: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """The true quality of answers: facts that are in it, minus repetitions. What stands outside the mask is ignored.

    >>> gold(torch.tensor([[3, 5, 3, 20, 9]]), torch.tensor([[True, True, True, True, False]]))     # 2 facts, 3 twice
    tensor([1.])
    """
    said = tokens.masked_fill(~mask, END)
    times = F.one_hot(said.clamp(max=END), END + 1)[..., :FACTS].sum(dim=1)
    return (2 * (times > 0).sum(dim=1) - times.sum(dim=1)).float()


def people(count: int, *, generator: torch.Generator) -> Rollout:
    """Answers as people write them: facts at random, one at least, an end after each with probability STOP."""
    tokens = torch.randint(0, FACTS, (count, ROOM), generator=generator)
    stop = torch.rand(count, ROOM, generator=generator) < STOP
    stop[:, 0] = False
    ended = stop.cumsum(dim=1) - stop.int() > 0  # strictly behind the first stop
    log_probs = torch.where(stop, math.log(STOP), math.log((1 - STOP) / FACTS))
    log_probs[:, 0] = -math.log(FACTS)
    entropies = torch.full_like(log_probs, -STOP * math.log(STOP) - (1 - STOP) * math.log((1 - STOP) / FACTS))
    entropies[:, 0] = math.log(FACTS)
    numbers = (x.masked_fill(ended, 0) for x in (log_probs, entropies))
    return Rollout(torch.full((count, 1), ASK), tokens.masked_fill(stop | ended, END), ~ended, *numbers)


def random_answers(count: int, facts: int, *, generator: torch.Generator) -> Rollout:
    """Answers of so many random facts and an end; without log-probabilities, as nobody drew them."""
    if not 1 <= facts < ROOM:
        raise ValueError(f"an answer has room for 1 to {ROOM - 1} facts and an end, got {facts}")
    tokens = torch.full((count, ROOM), END)
    tokens[:, :facts] = torch.randint(0, FACTS, (count, facts), generator=generator)
    mask = (torch.arange(ROOM) <= facts).expand(count, ROOM)
    return Rollout(torch.full((count, 1), ASK), tokens, mask, *torch.zeros(2, count, ROOM))


def compare(first: Rollout, second: Rollout, *, generator: torch.Generator) -> tuple[Rollout, Rollout]:
    """The answers that people prefer and those they do not, by Bradley and Terry with the gold as score: they err."""
    odds = preference(gold(first.tokens, first.mask), gold(second.tokens, second.mask))
    prefers = torch.rand(len(odds), generator=generator) < odds
    rows = torch.arange(len(odds)) + len(odds) * torch.stack([~prefers, prefers])
    both = Rollout(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    return both.part(rows[0]), both.part(rows[1])
