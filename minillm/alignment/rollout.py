"""Sampling for reinforcement learning: completions, and the log-probabilities with which they were really drawn.

Idea:        Every importance ratio of PPO and its kin has in its denominator the probability with which the token was
             drawn. So it is taken from the very distribution that is drawn from, temperature included, at the moment of
             drawing; a later copy of the model, or the same model at another temperature, gives another number. A
             prompt is read once for its whole group: its keys and values are copied, and from there on each completion
             grows one token a step. What follows the end token is no action and is masked.
Cost:        One pass over the prompts, then a step a token that reads all weights: here a third of what learning from
             the completions takes. Per token a log-probability and an entropy are kept.
Paper:       Schulman et al. 2017, arXiv:1707.06347, section 3 (the ratio); Chen et al. 2021, arXiv:2107.03374,
             section 2.1 (the estimate of pass@k).
Production:  vLLM under TRL or verl; its log-probabilities differ a little from the trainer's: TRL corrects for that
             by default (vllm_importance_sampling_correction), verl on request (rollout_correction).
Leaves out:  top-k and top-p (the log-probabilities would need the same cuts), prompts of unequal length, new requests
             in the place of finished ones.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.alignment.log_probs import check_temperature, token_log_probs
from minillm.architecture.transformer import Cache, Transformer


class Rollout(NamedTuple):
    """Completions, those of one prompt one after the other. Without gradient; numbers are 0 outside of the mask."""

    prompts: Int[Tensor, "b p"]
    tokens: Int[Tensor, "b n"]  # after the end there are only ends
    mask: Bool[Tensor, "b n"]  # what was drawn, the end included
    log_probs: Float[Tensor, "b n"]  # of the drawn tokens, at the temperature of the drawing
    entropies: Float[Tensor, "b n"]  # of the distributions they were drawn from, in nats

    def part(self, rows: Int[Tensor, " k"]) -> "Rollout":
        """Some of the completions."""
        return Rollout(*(x[rows] for x in self))


class Drawn(NamedTuple):
    """One token for each row, and what it was drawn from."""

    tokens: Int[Tensor, " b"]
    log_probs: Float[Tensor, " b"]
    entropies: Float[Tensor, " b"]


def draw(logits: Float[Tensor, "b v"], *, temperature: float, generator: torch.Generator) -> Drawn:
    """A token of each row from softmax(logits / temperature), and its log-probability under that same distribution.

    >>> logits, generator = torch.tensor([[1.0, 9.0]]).log(), torch.Generator().manual_seed(0)
    >>> drawn = draw(logits, temperature=2.0, generator=generator)      # odds 1 : 9, at temperature 2 they are 1 : 3
    >>> drawn.tokens, drawn.log_probs.exp()
    (tensor([1]), tensor([0.7500]))
    """
    check_temperature(temperature)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = wide.log_softmax(dim=-1)
    p = log_p.exp()
    tokens = p.multinomial(1, generator=generator)
    return Drawn(tokens[:, 0], log_p.gather(1, tokens)[:, 0], -(p * log_p).sum(dim=-1))


def shared_cache(cache: Cache, model: Transformer, group: int, room: int) -> Cache:
    """The cache of n prompts for n x group completions: the same keys and values, and `room` more tokens each."""
    wide = Cache(model.config, cache.k.shape[1] * group, cache.length + room, like=cache.k)
    for many, few in ((wide.k, cache.k), (wide.v, cache.v)):
        many[..., : cache.length, :] = few[..., : cache.length, :].repeat_interleave(group, dim=1)
    wide.length = cache.length
    return wide


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: Int[Tensor, "n p"],
    *,
    group: int,
    new_tokens: int,
    end: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Rollout:
    """`group` completions of each prompt, of at most `new_tokens` tokens, the generator on the device of the model."""
    if group < 1 or new_tokens < 1:
        raise ValueError(f"a prompt gets at least 1 completion of 1 token, got {group} of {new_tokens}")
    cache = Cache(model.config, *prompts.shape, like=model.embedding)
    hidden = model.hidden(prompts, cache=cache)[:, -1:].repeat_interleave(group, dim=0)
    cache = shared_cache(cache, model, group, new_tokens)
    tokens = torch.full((len(hidden), new_tokens), end, device=prompts.device)
    wide = torch.promote_types(model.embedding.dtype, torch.float32)
    log_probs = torch.zeros(tokens.shape, dtype=wide, device=prompts.device)
    entropies, mask = log_probs.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    writing = torch.ones_like(mask[:, 0])
    for i in range(new_tokens):
        drawn = draw(F.linear(hidden[:, -1], model.unembedding), temperature=temperature, generator=generator)
        mask[:, i] = writing
        tokens[:, i] = torch.where(writing, drawn.tokens, end)
        log_probs[:, i] = torch.where(writing, drawn.log_probs, 0)
        entropies[:, i] = torch.where(writing, drawn.entropies, 0)
        writing = writing & (drawn.tokens != end)
        if i + 1 == new_tokens or not writing.any():
            break
        hidden = model.hidden(tokens[:, i : i + 1], cache=cache)
    return Rollout(prompts.repeat_interleave(group, dim=0), tokens, mask, log_probs, entropies)


def states(model: Transformer, rollout: Rollout) -> Float[Tensor, "b n c"]:
    """The final stream of the model before each token of the completions, from one pass over the whole texts."""
    ids = torch.cat([rollout.prompts, rollout.tokens], dim=1)
    return model.hidden(ids[:, :-1])[:, rollout.prompts.shape[1] - 1 :]


def rescore(model: Transformer, rollout: Rollout, *, temperature: float = 1.0) -> Float[Tensor, "b n"]:
    """log p of the completions' tokens under a model as it is now, with gradient. Masked tokens have some value, too.

    For the model that sampled, at the same temperature, these are the stored ones: the ratio is 1.
    """
    return token_log_probs(F.linear(states(model, rollout), model.unembedding), rollout.tokens, temperature=temperature)


@torch.no_grad()
def greedy(model: Transformer, prompts: Int[Tensor, "b p"], *, new_tokens: int, end: int) -> Int[Tensor, "b n"]:
    """The most likely token, step by step; after the end only ends."""
    cache, ids = Cache(model.config, len(prompts), prompts.shape[1] + new_tokens, like=model.embedding), prompts
    tokens = torch.full((len(prompts), new_tokens), end, device=prompts.device)
    writing = torch.ones_like(tokens[:, 0], dtype=torch.bool)
    for i in range(new_tokens):
        best = F.linear(model.hidden(ids, cache=cache)[:, -1], model.unembedding).argmax(dim=-1)
        tokens[:, i] = torch.where(writing, best, end)
        writing = writing & (best != end)
        ids = tokens[:, i : i + 1]
    return tokens


def pass_at_k(right: Bool[Tensor, "n c"], k: int) -> float:
    """The probability that at least one of k completions is right, estimated from c >= k, averaged over n prompts.

    For a prompt with w wrong ones: 1 - (w choose k) / (c choose k), without bias. 1 - (w / c)^k would be too small.

    >>> right = torch.tensor([[True, False, False, False]])
    >>> pass_at_k(right, 1), pass_at_k(right, 2)                # 1 - 3/4 and 1 - (3 of 6 pairs are all wrong)
    (0.25, 0.5)
    """
    n, c = right.shape
    if not 1 <= k <= c:
        raise ValueError(f"k is from 1 to the {c} completions of each prompt, got {k}")
    wrong = (~right).sum(dim=1).tolist()
    return sum(1 - math.comb(w, k) / math.comb(c, k) for w in wrong) / n
