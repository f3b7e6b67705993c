"""From logits to a token: temperature, and the cuts that decide which tokens may be drawn at all.

Idea:        Dividing logits by a temperature sharpens (below 1) or flattens (above 1) the distribution. The cuts give
             minus infinity to unlikely tokens: the k best (top-k), the smallest set that holds the mass p (top-p), or
             what is at least a share of the best token's probability (min-p). All cut the tail and keep the head, so
             none of them breaks a loop of likely tokens. The order counts: a temperature before top-p or min-p changes
             what they keep, as in transformers; top-k does not care.
Cost:        O(v) a sequence and step; top-p sorts, O(v log v).
Paper:       Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2019, arXiv:1904.09751 (top-p); Nguyen et al.
             2024, arXiv:2407.01082 (min-p).
Production:  transformers TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper.
Leaves out:  penalties for repetition.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def temperature(logits: Float[Tensor, "*b v"], value: float) -> Float[Tensor, "*b v"]:
    """Logits of softmax(logits)^(1/value), normalised. ValueError unless value > 0: 0 means greedy, say so instead."""
    if not value > 0:
        raise ValueError(f"temperature must be above 0, got {value}; for the most likely token use greedy")
    return logits / value


def top_k(logits: Float[Tensor, "*b v"], k: int) -> Float[Tensor, "*b v"]:
    """Only the k largest logits (and what equals the smallest of them) stay; the others become -inf.

    >>> top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    if k < 1:
        raise ValueError(f"top_k must keep at least 1 token, got {k}")
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def top_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """The smallest set of most likely tokens whose probabilities reach p stays: the token that crosses p is kept.

    >>> top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {p}")
    if p == 1:  # a sum of rounded probabilities may reach 1 too early
        return logits
    ranked, order = logits.sort(dim=-1, descending=True)
    probabilities = ranked.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(cut, -math.inf)


def min_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Tokens less likely than p times the most likely one become -inf.

    >>> min_p(torch.tensor([0.6, 0.3, 0.1]).log(), 0.4).exp()
    tensor([0.6000, 0.3000, 0.0000])
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be between 0 and 1, got {p}")
    floor = logits.amax(dim=-1, keepdim=True) + (math.log(p) if p > 0 else -math.inf)
    return logits.masked_fill(logits < floor, -math.inf)


def draw(logits: Float[Tensor, "*b v"], *, generator: torch.Generator | None = None) -> Int[Tensor, "*b"]:
    """A token of each row by its probability: the largest logit after adding Gumbel noise, -log(exponential noise).

    The noise is drawn on the generator's device, so a seed gives the same tokens wherever the logits are.
    """
    device = generator.device if generator is not None else logits.device
    noise = torch.empty(logits.shape, device=device).exponential_(generator=generator)
    return (logits.float() - noise.log().to(logits.device)).argmax(dim=-1)
