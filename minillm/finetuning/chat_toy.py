"""A toy of conversations on which the loss masks of fine-tuning can be compared in seconds.

Idea:        A user names one of twelve symbols, the assistant counts on from it, four symbols, and ends its message;
             then a second turn. What is no target is never learnt by a model that starts from nothing, so every mask
             shows in which tokens of the answer come out right.
Cost:        Half a second a model on one core: one small block, rows of 22 tokens.
Paper:       none.
Production:  none; masks as they are found in training code, right and wrong.
Leaves out:  a pre-trained model, which already knows what the first token of an answer may be.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.architecture.transformer import Config, Transformer
from minillm.finetuning.loss_mask import label_loss
from minillm.training.objective import IGNORE

SYMBOLS, ANSWER = 12, 4
OPEN, CLOSE, USER, ASSISTANT = range(SYMBOLS, SYMBOLS + 4)
TURN = 5 + 1 + ANSWER + 1  # <open> user x <close> <open> assistant, the answer, <close>
TURNS = 2
STARTS = [turn * TURN + 6 for turn in range(TURNS)]  # where answers begin
SPANS = [(start, start + ANSWER + 1) for start in STARTS]

# Which targets a mask keeps, from where an answer begins and where it ends, one past its end of message.
MASKS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "the answer": lambda start, end: (start, end),
    "starts one late": lambda start, end: (start + 1, end),
    "not shifted": lambda start, end: (start + 1, end + 1),  # mask[i] laid on the loss of token i + 1
    "without its end": lambda start, end: (start, end - 1),
    "all tokens": lambda start, end: (end - TURN, end),
}


def conversations(count: int, generator: torch.Generator) -> Int[Tensor, "b t"]:
    """Conversations of two turns as ids."""
    x = torch.randint(SYMBOLS, (count, TURNS, 1), generator=generator)
    answer = (x + torch.arange(1, ANSWER + 1)) % SYMBOLS

    def fixed(*ids: int) -> Tensor:
        return torch.tensor(ids).expand(count, TURNS, len(ids))

    parts = (fixed(OPEN, USER), x, fixed(CLOSE, OPEN, ASSISTANT), answer, fixed(CLOSE))
    return torch.cat(parts, dim=-1).flatten(1)


def kept(mask: str, ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Labels under a mask: the ids of its targets, IGNORE elsewhere."""
    labels = torch.full_like(ids, IGNORE)
    for span in SPANS:
        start, end = MASKS[mask](*span)
        labels[:, start:end] = ids[:, start:end]
    return labels


class Score(NamedTuple):
    """What a model has learnt, on fresh conversations."""

    answer: Float[Tensor, " k"]  # share of right tokens at each place of the answer, the end of message last
    user_nats: float  # of the symbol that the user names; ln 12 = 2.48 is the best there is
    loss: float  # nats a target of the mask it was trained under


def train(mask: str, *, seed: int, steps: int = 100, batch: int = 32) -> Score:
    """Train a small model from nothing on the targets of a mask, and look at what it says token by token."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    shape = Config(SYMBOLS + 4, 32, layers=1, heads=2, kv_heads=2, head_size=16, hidden=64, tied=False)
    model = Transformer(shape)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        ids = conversations(batch, generator)
        loss = label_loss(model(ids), kept(mask, ids))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return score(model, mask, conversations(256, generator))


@torch.no_grad()
def score(model: Transformer, mask: str, ids: Int[Tensor, "b t"]) -> Score:
    """Greedy tokens, the user's loss and the mask's, each after the true tokens before it."""
    logits = model(ids)
    loss = label_loss(logits, kept(mask, ids)).item()
    logits, right = logits[:, :-1], ids[:, 1:]
    hits = (logits.argmax(dim=-1) == right).float()
    answers = torch.stack([hits[:, start - 1 : end - 1] for start, end in SPANS])
    nats = F.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none").view_as(right)
    named = [turn * TURN + 1 for turn in range(TURNS)]  # the targets one place before the symbol
    return Score(answers.mean(dim=(0, 1)), nats[:, named].mean().item(), loss)
