"""The feed-forward layer: widen every token, apply a nonlinearity, come back.

Idea:        Each token is multiplied up to f channels, bent by an activation and multiplied down again, alone. Row i
             of the up-projection is a key that the token is compared with, column i of the down-projection the value
             added when it matches. Without the activation the two products are one matrix of rank at most c. SwiGLU
             lets one product gate another, silu(x G) * (x U), for a third matrix.
Cost:        2 c f parameters and multiply-adds a token, 3 c f for SwiGLU; with f = 4c, or 8c/3 for SwiGLU, 8 c^2:
             two thirds of a decoder layer.
Paper:       Vaswani et al. 2017, arXiv:1706.03762, equation 2 (ReLU); Hendrycks and Gimpel 2016, arXiv:1606.08415
             (GELU); Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, equations 5 and 6.
Production:  transformers LlamaMLP (SwiGLU), GPT2MLP (GELU, tanh), BertIntermediate and BertOutput (GELU).
Leaves out:  dropout; `moe` has many of these layers and uses a few.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def relu_feedforward(
    x: Float[Tensor, "*b c"],
    up: Float[Tensor, "f c"],
    down: Float[Tensor, "c f"],
    up_bias: Float[Tensor, " f"] | None = None,
    down_bias: Float[Tensor, " c"] | None = None,
) -> Float[Tensor, "*b c"]:
    """max(0, x up + b) down + b: the layer of the first Transformer. At random weights about half of the hidden
    channels are exactly 0.

    >>> import torch
    >>> up, down = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0]])
    >>> relu_feedforward(torch.tensor([[-2.0], [3.0]]), up, down).flatten()         # |x|, from two neurons
    tensor([2., 3.])
    """
    check_weights(x, down, up)
    return F.linear(F.relu(F.linear(x, up, up_bias)), down, down_bias)


def gelu_feedforward(
    x: Float[Tensor, "*b c"],
    up: Float[Tensor, "f c"],
    down: Float[Tensor, "c f"],
    up_bias: Float[Tensor, " f"] | None = None,
    down_bias: Float[Tensor, " c"] | None = None,
    *,
    approximate: str = "none",
) -> Float[Tensor, "*b c"]:
    """The layer of BERT (`approximate="none"`: x Phi(x)) and of GPT-2 (`"tanh"`: within 0.0005 of it)."""
    check_weights(x, down, up)
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate=approximate), down, down_bias)


def swiglu(
    x: Float[Tensor, "*b c"], gate: Float[Tensor, "f c"], up: Float[Tensor, "f c"], down: Float[Tensor, "c f"]
) -> Float[Tensor, "*b c"]:
    """(silu(x gate) * (x up)) down, with silu(z) = z sigmoid(z): the layer of Llama, Mistral and Qwen, without biases.

    >>> import torch
    >>> one = torch.ones(1, 1)
    >>> swiglu(one, 100 * one, 2 * one, 3 * one)            # an open gate: silu(100) = 100, so 100 * 2 * 3
    tensor([[600.]])
    """
    check_weights(x, down, gate, up)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu_fused(
    x: Float[Tensor, "*b c"], gate_up: Float[Tensor, "two_f c"], down: Float[Tensor, "c f"]
) -> Float[Tensor, "*b c"]:
    """`swiglu` with gate and up stacked (gate first): one product instead of two, x is read once."""
    if gate_up.shape[0] != 2 * down.shape[1]:
        raise ValueError(f"gate_up needs 2 f rows, got {gate_up.shape[0]} for f={down.shape[1]}")
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def matched_hidden(c: int, *, multiple: int = 1) -> int:
    """The hidden width at which SwiGLU has the parameters of a two-matrix layer of width 4c: 8c/3, as Llama rounds it.

    3 c f = 2 c (4c). The fraction is dropped, then the next multiple is taken: widths of 256 suit the hardware.

    >>> matched_hidden(4096), matched_hidden(4096, multiple=256)            # Llama 7B has 11008
    (10922, 11008)
    """
    return multiple * -(-(8 * c // 3) // multiple)


def check_weights(x: Tensor, down: Tensor, *ups: Tensor) -> None:
    """Refuse weights that are not f c going up and c f coming down."""
    c, f = x.shape[-1], down.shape[-1]
    if any(up.shape != (f, c) for up in ups) or down.shape != (c, f):
        got = ", ".join(str(tuple(w.shape)) for w in (*ups, down))
        raise ValueError(f"weights go up as f c and down as c f, got {got} for x with c={c}")
