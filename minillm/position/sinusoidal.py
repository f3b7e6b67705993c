"""Sinusoidal position encodings: add sines and cosines of the position to the token embeddings.

Idea:        Each position gets a vector of sines and cosines at frequencies from 1 down to 1 / base, added to the
             token's embedding once, below the first layer. The encodings alone are relative: PE(m) . PE(n) depends
             on m - n, and a shift by k is one fixed rotation. After adding content and projecting with W_q and W_k
             that is lost: scores at the same distance differ. RoPE turns by the same angles, but after projecting.
Cost:        c additions a token, once; no parameters.
Paper:       Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.5.
Production:  transformers create_sinusoidal_embeddings (XLM, DistilBERT).
Leaves out:  learned absolute positions, the other absolute scheme: an nn.Embedding of positions, added likewise.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.position.rope import inverse_frequencies, rotations


def encodings(positions: Int[Tensor, "*p"], c: int, *, base: float = 10000.0) -> Float[Tensor, "*p {c}"]:
    """sin(m base^(-2i/c)) in channel 2i and the cosine of the same angle in channel 2i + 1, float32.

    Some implementations put all sines before all cosines; a learned layer behind it cannot tell the difference.

    >>> encodings(torch.tensor([0, 1]), 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    cos, sin = rotations(positions, inverse_frequencies(c, base=base, device=positions.device))
    return torch.stack([sin, cos], dim=-1).flatten(-2)
