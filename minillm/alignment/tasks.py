"""Sorting five digits: a task whose answers a rule can check, with prompts of which only a hundred have answers.

Idea:        Reinforcement learning on verifiable rewards needs prompts and a rule that says right or wrong, but nobody
             who writes the answers. Here a prompt is five digits and "=", the answer the digits in order and an end,
             and the reward is 1 for exactly that, else 0: a digit too many, one too few or no end count as wrong. The
             held-out prompts are those of certain answers, so no rearrangement of their digits is trained on.
Cost:        100,000 prompts of 6 tokens, made in some milliseconds.
Paper:       The reward is what Lambert et al. 2024, "Tulu 3", arXiv:2411.15124 call verifiable; the task is ours.
Production:  TRL reward functions, verl compute_score: a function of prompt and completion outside of the model.
Leaves out:  partial credit, rewards for the format, tasks in which a right answer can be reached by wrong steps.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

DIGITS = 5
SYMBOLS = "0123456789=."  # the ids 0 to 11 as text
EQUALS, END = 10, 11
NEW_TOKENS = DIGITS + 2  # a right answer has one less: there is room for being too long
SHOWN = 100  # prompts whose answers the starting policy has seen
HELD_OUT = 1000  # prompts for measuring
START = Path(__file__).parents[1] / "data" / "sort-87k"  # a policy to start from: tools/start_policy.py


class Split(NamedTuple):
    """Prompts, five digits and EQUALS each. No answer of a held-out prompt is one of the other prompts."""

    shown: Int[Tensor, "b p"]  # for demonstrations
    train: Int[Tensor, "b p"]  # for reinforcement: a reward, no answers
    held_out: Int[Tensor, "b p"]


def split() -> Split:
    """All prompts whose answer, read as a number, is not 3 modulo 7, and a thousand of the others, in a fixed order."""
    digits = torch.cartesian_prod(*[torch.arange(10)] * DIGITS)
    prompts = torch.cat([digits, torch.full((len(digits), 1), EQUALS)], dim=1)
    prompts = prompts[torch.from_numpy(np.random.default_rng(0).permutation(len(prompts)))]
    number = (answers(prompts)[:, :DIGITS] * 10 ** torch.arange(DIGITS).flip(0)).sum(dim=1)
    kept, rest = prompts[number % 7 != 3], prompts[number % 7 == 3]
    return Split(kept[:SHOWN], kept[SHOWN:], rest[:HELD_OUT])


def answers(prompts: Int[Tensor, "b p"]) -> Int[Tensor, "b a"]:
    """The right completion of each prompt: its digits in order, then END.

    >>> text(answers(encode("31415="))[0])
    '11345.'
    """
    check_prompts(prompts)
    digits = prompts[:, :DIGITS].sort(dim=1).values
    return torch.cat([digits, torch.full_like(prompts[:, :1], END)], dim=1)


def rewards(prompts: Int[Tensor, "b p"], tokens: Int[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """1 where the completion is the answer up to its first END, else 0. What stands after the first END is ignored.

    >>> rewards(encode("31415="), encode("11345.."))
    tensor([1.])
    >>> rewards(encode("31415="), encode("113455."))            # a digit too many
    tensor([0.])
    """
    right = answers(prompts)
    if len(tokens) != len(prompts) or tokens.shape[1] < right.shape[1]:
        raise ValueError(
            f"each of {len(prompts)} prompts needs a completion with room for {right.shape[1]} tokens, "
            f"got {tuple(tokens.shape)}"
        )
    return (tokens[:, : right.shape[1]] == right).all(dim=1).float()


def encode(line: str) -> Int[Tensor, "1 t"]:
    """A row of ids from text of digits, "=" and "." for END. ValueError: another symbol.

    >>> encode("90=")
    tensor([[ 9,  0, 10]])
    """
    if odd := set(line) - set(SYMBOLS):
        raise ValueError(f"the task is written in {SYMBOLS}, got {min(odd)!r}")
    return torch.tensor([[SYMBOLS.index(symbol) for symbol in line]])


def text(ids: Int[Tensor, " t"]) -> str:
    """A row of ids as text."""
    return "".join(SYMBOLS[i] for i in ids.tolist())


def check_prompts(prompts: Tensor) -> None:
    """Refuse what is no prompt of this task."""
    if prompts.shape[1:] != (DIGITS + 1,) or not bool((prompts[:, -1] == EQUALS).all()):
        raise ValueError(f"a prompt is {DIGITS} digits and the id {EQUALS} of '=', got {tuple(prompts.shape)} ids")
