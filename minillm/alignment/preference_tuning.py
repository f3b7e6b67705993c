"""DPO on a real model: pairs that it wrote itself, a rule that prefers one of the two, and the loop that tunes.

Idea:        Let the model write two responses to each prompt. A rule (here: the shorter one, its end token included)
             says which is preferred; ties say nothing and are dropped. The reference's log-probabilities do not
             change, so they are computed once. Then every step is one forward and backward pass over chosen and
             rejected responses: nothing is sampled any more. What to watch is not the loss but both log-probabilities,
             and the samples of the tuned model.
Cost:        Writing the pairs once, 2 responses a prompt; a step costs as much as supervised training on both.
Paper:       Rafailov et al. 2023, arXiv:2305.18290, section 4 (outline of DPO).
Production:  TRL DPOTrainer with precompute_ref_log_probs.
Leaves out:  prompts of unequal length, labels from people, schedules, clipping, evaluation by a judge.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.alignment.dpo import dpo_loss
from minillm.alignment.log_probs import next_token_log_probs, sequence_sum
from minillm.architecture.transformer import Cache, Transformer


class Pairs(NamedTuple):
    """Two texts for each of b prompts, the chosen ones first, and which of their tokens are the response's."""

    ids: Int[Tensor, "2 b t"]
    mask: Bool[Tensor, "2 b t"]


class Record(NamedTuple):
    """What each step of DPO saw, before it moved."""

    loss: Float[Tensor, " n"]
    chosen: Float[Tensor, " n"]  # mean log-probability of the chosen responses minus the reference's, in nats
    rejected: Float[Tensor, " n"]  # the same of the rejected ones


@torch.no_grad()
def write(
    model: Transformer, prompts: Int[Tensor, "b p"], *, new_tokens: int, generator: torch.Generator
) -> Int[Tensor, "b t"]:
    """The prompts, each with `new_tokens` more, drawn at temperature 1."""
    ids, cache = [prompts], Cache(model.config, len(prompts), prompts.shape[1] + new_tokens, like=model.embedding)
    for _ in range(new_tokens):
        probabilities = model(ids[-1], cache=cache)[:, -1].softmax(dim=-1)
        ids.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(ids, dim=1)


def openings(
    ids: Int[Tensor, " n"], ends: Bool[Tensor, " v"], *, length: int, count: int, generator: torch.Generator
) -> Int[Tensor, "{count} {length}"]:
    """The first `length` tokens of some sentences of a text: what stands behind a token that `ends` marks.

    >>> text, ends = torch.tensor([5, 0, 7, 8, 9]), torch.arange(10) == 0       # token 0 is the full stop
    >>> openings(text, ends, length=3, count=1, generator=torch.Generator())
    tensor([[7, 8, 9]])
    """
    begins = ends[ids[: len(ids) - length]].nonzero().squeeze(1) + 1
    if len(begins) < count:
        raise ValueError(f"{count} openings are asked for, the text has {len(begins)}")
    drawn = torch.randperm(len(begins), generator=generator)[:count]
    return torch.stack([ids[i : i + length] for i in begins[drawn].tolist()])


def first_end(ids: Int[Tensor, "*b t"], ends: Bool[Tensor, " v"], *, start: int) -> Bool[Tensor, "*b t"]:
    """True from `start` up to and including the first token that `ends` marks, else to the row's end.

    >>> ends = torch.tensor([False, False, True])               # token 2 ends a sentence
    >>> first_end(torch.tensor([[2, 0, 1, 2, 1]]), ends, start=1).int()
    tensor([[0, 1, 1, 1, 0]], dtype=torch.int32)
    """
    written = torch.arange(ids.shape[-1], device=ids.device) >= start
    stops = (ends[ids] & written).int()
    return written & (stops.cumsum(dim=-1) - stops == 0)


def shorter_first(texts: Int[Tensor, "2 b t"], mask: Bool[Tensor, "2 b t"]) -> Pairs:
    """Pairs with the shorter response as the chosen one; two of equal length are dropped."""
    length = mask.sum(dim=-1)
    rows = (length[0] != length[1]).nonzero().squeeze(1)
    order = length[:, rows].argsort(dim=0)
    return Pairs(texts[order, rows], mask[order, rows])


def twins(model: Transformer, prompts: Int[Tensor, "b p"], *, new_tokens: int, generator: torch.Generator) -> Pairs:
    """Pairs that differ in their last token only, which the model drew twice; equal draws are dropped."""
    texts = write(model, prompts, new_tokens=new_tokens, generator=generator)
    again = write(model, texts[:, :-1], new_tokens=1, generator=generator)
    both = torch.stack([texts, again])[:, texts[:, -1] != again[:, -1]]
    return Pairs(both, (torch.arange(texts.shape[1]) >= prompts.shape[1]).expand(both.shape))


def response_log_probs(model: Transformer, pairs: Pairs) -> Float[Tensor, "2 b s"]:
    """log p of every token but the first, of both texts of each pair in one pass. Its mask is `pairs.mask[..., 1:]`."""
    flat = pairs.ids.flatten(0, 1)
    return next_token_log_probs(model(flat), flat).unflatten(0, pairs.ids.shape[:2])


def tune(
    model: Transformer, pairs: Pairs, *, beta: float, lr: float, steps: int, batch: int, generator: torch.Generator
) -> Record:
    """Tune the model in place, itself as it was being the reference: Adam on the DPO loss of `batch` pairs a step."""
    with torch.no_grad():
        reference = response_log_probs(model, pairs)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    rows: list[list[float]] = []
    for _ in range(steps):
        drawn = torch.randperm(pairs.ids.shape[1], generator=generator)[:batch]
        part = Pairs(pairs.ids[:, drawn], pairs.mask[:, drawn])
        log_probs, mask = response_log_probs(model, part), part.mask[..., 1:]
        loss = dpo_loss(log_probs, reference[:, drawn], mask, beta=beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ratios = sequence_sum(log_probs.detach() - reference[:, drawn], mask).mean(dim=1)
        rows.append([loss.item(), *ratios.tolist()])
    return Record(*torch.tensor(rows).T)


@torch.no_grad()
def divergence(
    policy: Transformer, reference: Transformer, texts: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> float:
    """KL(policy, reference) of whole responses in nats, estimated on `texts` that the policy wrote."""
    ratio = next_token_log_probs(policy(texts), texts) - next_token_log_probs(reference(texts), texts)
    return sequence_sum(ratio, mask[:, 1:]).mean().item()


class Shift(NamedTuple):
    """A model tuned to write shorter responses: what each step saw, and lengths in tokens before and after."""

    record: Record
    before: Int[Tensor, " n"]
    after: Int[Tensor, " n"]
    texts: Int[Tensor, "n t"]  # written after tuning
    kl: float  # from the model as it was, of responses written after tuning, in nats


def shorten(
    model: Transformer,
    prompts: Int[Tensor, "b p"],
    ends: Bool[Tensor, " v"],
    *,
    beta: float = 0.1,
    lr: float = 3e-4,
    steps: int = 16,
    batch: int = 8,
    new_tokens: int = 20,
    seed: int = 0,
) -> Shift:
    """Two responses to each prompt, the shorter one preferred, DPO on a copy of the model, and what the copy writes."""
    generator = torch.Generator().manual_seed(seed)
    texts = write(model, prompts.repeat(2, 1), new_tokens=new_tokens, generator=generator)
    texts = texts.unflatten(0, (2, len(prompts)))
    mask = first_end(texts, ends, start=prompts.shape[1])
    policy = copy.deepcopy(model)
    pairs = shorter_first(texts, mask)
    record = tune(policy, pairs, beta=beta, lr=lr, steps=steps, batch=batch, generator=generator)
    after = write(policy, prompts.repeat(2, 1), new_tokens=new_tokens, generator=generator)
    kept = first_end(after, ends, start=prompts.shape[1])
    kl = divergence(policy, model, after, kept)
    return Shift(record, mask.sum(dim=-1).flatten(), kept.sum(dim=-1), after, kl)
