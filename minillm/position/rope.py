"""Rotary position embedding: turn queries and keys by their position, so that a score depends on the distance.

Idea:        Read the d channels of a head as d/2 points in the plane and turn point i of the token at position m by
             the angle m theta_i. A dot product of two turned points depends on the difference of their angles,
             (m - n) theta_i, so the score of a query at m and a key at n knows their distance and the content, but
             not where the pair stands. Values are not turned.
Cost:        2 d multiplications a token and head, no parameters. The table of cosines and sines is shared by all
             heads and layers.
Paper:       Su et al. 2021, "RoFormer", arXiv:2104.09864, equations 15 and 34.
Production:  transformers LlamaRotaryEmbedding and apply_rotary_pos_emb (half layout); Meta's Llama code, a complex
             multiplication (interleaved layout).
Leaves out:  anything that stretches the trained range: the frequencies stay as given.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def inverse_frequencies(
    d: int, *, base: float = 10000.0, device: torch.device | None = None
) -> Float[Tensor, " {d}//2"]:
    """base^(-2i/d) for pair i: radians per position, float32, the fastest pair first (1 radian).

    Pair i is back where it was after 2 pi base^(2i/d) positions, its wavelength.

    >>> inverse_frequencies(4, base=100.0)
    tensor([1.0000, 0.1000])
    """
    if d < 2 or d % 2:
        raise ValueError(f"channels are turned in pairs: their number must be even and positive, got {d}")
    return 1.0 / base ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)


def rotations(
    positions: Int[Tensor, "*p"], frequencies: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "*p half"], Float[Tensor, "*p half"]]:
    """Cosine and sine of every position's angle for every pair, in the dtype of the frequencies.

    The angles must not be computed in half precision: bfloat16 has 8 bits, so positions 256 and 257 are the same.
    """
    if frequencies.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"angles need float32 or float64 frequencies, got {frequencies.dtype}")
    angles = positions[..., None] * frequencies
    return angles.cos(), angles.sin()


def turn(
    a: Float[Tensor, "*b n"], b: Float[Tensor, "*b n"], cos: Float[Tensor, "*#b #n"], sin: Float[Tensor, "*#b #n"]
) -> tuple[Float[Tensor, "*b n"], Float[Tensor, "*b n"]]:
    """The points (a, b) turned counter-clockwise: the whole idea. The same as (a + ib)(cos + i sin).

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> turn(one, zero, cos=zero, sin=one)            # (1, 0) by 90 degrees
    (tensor([0.]), tensor([1.]))
    """
    return a * cos - b * sin, a * sin + b * cos


def apply_rope_interleaved(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*#b #t half"], sin: Float[Tensor, "*#b #t half"]
) -> Float[Tensor, "*b t d"]:
    """Queries or keys turned, in the dtype of x. Channels 2i and 2i + 1 are pair i, as in the paper and Meta's code."""
    check_pairs(x, cos, sin)
    return torch.stack(turn(x[..., 0::2], x[..., 1::2], cos, sin), dim=-1).flatten(-2).to(x.dtype)


def apply_rope(
    x: Float[Tensor, "*b t d"], cos: Float[Tensor, "*#b #t half"], sin: Float[Tensor, "*#b #t half"]
) -> Float[Tensor, "*b t d"]:
    """Queries or keys turned, in the dtype of x. Channels i and i + d/2 are pair i, as in transformers' Llama.

    Rolling by d/2 swaps the two halves; the minus sign of `turn` sits in the small table instead of a copy of x.

    >>> cos, sin = rotations(torch.tensor([0, 1]), inverse_frequencies(2))
    >>> apply_rope(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), cos, sin)      # position 0 stays, position 1 by 1 radian
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    check_pairs(x, cos, sin)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    turned = torch.addcmul(x * torch.cat([cos, cos], dim=-1), swapped, torch.cat([-sin, sin], dim=-1))
    return turned.to(x.dtype)


def half_to_interleaved(weight: Float[Tensor, " rows *c"], heads: int) -> Float[Tensor, " rows *c"]:
    """The rows of a query or key projection (or its bias, or the weight of a norm on q or k) in the other order.

    Scores stay what they were if q and k are reordered together and turned by the function of their new layout.

    >>> half_to_interleaved(torch.tensor([0.0, 1.0, 2.0, 3.0]), heads=1)
    tensor([0., 2., 1., 3.])
    """
    check_rows(weight, heads)
    return rearrange(weight, "(h two n) ... -> (h n two) ...", h=heads, two=2)


def interleaved_to_half(weight: Float[Tensor, " rows *c"], heads: int) -> Float[Tensor, " rows *c"]:
    """The inverse of `half_to_interleaved`: what a conversion from Meta's to Hugging Face's checkpoints does."""
    check_rows(weight, heads)
    return rearrange(weight, "(h n two) ... -> (h two n) ...", h=heads, two=2)


def check_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse tables that do not hold one angle for each pair of channels."""
    if cos.shape != sin.shape or x.shape[-1] != 2 * cos.shape[-1]:
        got = f"got d={x.shape[-1]}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"cos and sin need d/2 angles each, {got}")


def check_rows(weight: Tensor, heads: int) -> None:
    """Refuse a projection whose rows are not heads of an even size."""
    if weight.shape[0] % (2 * heads):
        raise ValueError(f"rows must be heads times an even head size, got {weight.shape[0]} rows, {heads} heads")
