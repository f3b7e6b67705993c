"""One entry point for attention without a score matrix: Triton on a GPU, tiled PyTorch elsewhere.

Idea:        The same call runs everywhere; where the tensors live decides which implementation answers.
Cost:        That of `flash` or `flash_triton`.
Paper:       Dao et al. 2022, arXiv:2205.14135.
Production:  torch.nn.functional.scaled_dot_product_attention chooses a backend in the same way.
Leaves out:  a choice by shape or by hardware generation.
"""

from importlib.util import find_spec

from jaxtyping import Float
from torch import Tensor

from minillm.attention import flash


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    *,
    causal: bool = False,
    offset: int | None = None,
) -> Float[Tensor, "b h t d"]:
    """Exact attention, differentiable; query head i reads key/value head i // (h / g), causal at the ends."""
    if q.is_cuda and find_spec("triton"):
        from minillm.attention.flash_triton import flash_attention

        return flash_attention(q, k, v, causal=causal, offset=offset)
    return flash.flash_attention(q, k, v, causal=causal, offset=offset)
