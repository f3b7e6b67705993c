"""Where the norm stands: before each layer (pre-norm) or after each addition (post-norm), compared at the start.

Idea:        A layer adds to the residual stream. Post-norm normalises the sum, so the stream keeps its size, but every
             norm also scales what comes through from below, and the skip path fades with depth. Pre-norm normalises
             only what the layer reads: the skip path is the identity, the stream grows like the square root of the
             depth (variances of independent additions add up), later layers weigh less, and one norm is needed at the
             end. There the gradient of the last layers shrinks as 1/sqrt(depth); with post-norm it does not, after
             Xiong et al. the reason why it needs a warm-up of the learning rate.
Cost:        one norm a layer in either place; pre-norm needs one more at the end.
Paper:       Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745.
Production:  torch.nn.TransformerEncoderLayer with norm_first=True and False.
Leaves out:  training: everything here is measured on random weights.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.architecture.norm import rms_norm
from minillm.attention.causal import causal_attention

Layer = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Layer], Tensor]


def unit(x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Each token at a root mean square of 1."""
    return rms_norm(x, x.new_ones(x.shape[-1]))


def pre_norm(x: Tensor, layer: Layer, norm: Layer = unit) -> Tensor:
    """The stream after a layer that reads it normalised.

    >>> pre_norm(torch.tensor([3.0, 3.0]), lambda x: 2 * x)
    tensor([5., 5.])
    """
    return x + layer(norm(x))


def post_norm(x: Tensor, layer: Layer, norm: Layer = unit) -> Tensor:
    """The stream after a layer whose sum with it is normalised.

    >>> post_norm(torch.tensor([3.0, 3.0]), lambda x: 2 * x)
    tensor([1., 1.])
    """
    return norm(x + layer(x))


class RandomAttention(nn.Module):
    """Causal attention of one head; weights keep the size of what they multiply."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.out = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Float[Tensor, "*b t c"]) -> Float[Tensor, "*b t c"]:
        q, k, v = (x @ self.qkv.T).chunk(3, dim=-1)
        return causal_attention(q, k, v) @ self.out.T


class RandomFeedForward(nn.Module):
    """Two matrices with a ReLU between them, four times as wide; what comes out is as large as what goes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4 * width, width) * (2 / width) ** 0.5)  # the ReLU halves the mean square
        self.out = nn.Parameter(torch.randn(width, 4 * width) / (4 * width) ** 0.5)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return (x @ self.up.T).relu() @ self.out.T


def random_layers(count: int, width: int) -> list[nn.Module]:
    """Layers of a stack at its start, attention and feed-forward in turn."""
    return [RandomFeedForward(width) if i % 2 else RandomAttention(width) for i in range(count)]


def streams(step: Step, x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """The stream before the first layer and after each."""
    found = [x]
    for layer in layers:
        found.append(step(found[-1], layer))
    return found


def sizes(step: Step, x: Tensor, layers: Sequence[Layer]) -> list[float]:
    """Root mean square of the stream before the first layer and after each."""
    with torch.no_grad():
        return [stream.square().mean().sqrt().item() for stream in streams(step, x, layers)]


def skip_share(step: Step, x: Tensor, layers: Sequence[Layer]) -> float:
    """What comes down of a gradient along the skip path alone: its norm at the input over its norm at the output.

    No gradient flows through the layers, as if their outputs were constants.
    """
    x = x.detach().requires_grad_()
    constant: list[Layer] = [lambda y, layer=layer: layer(y).detach() for layer in layers]  # type: ignore[misc]
    out = streams(step, x, constant)[-1]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    (gradient,) = torch.autograd.grad(out, x, direction)
    return (gradient.norm() / direction.norm()).item()


def gradient_norms(step: Step, x: Tensor, layers: Sequence[nn.Module], target: Tensor) -> list[float]:
    """Norm of the gradient of each layer's output matrix, for the mean square distance of the normalised end."""
    loss = (unit(streams(step, x, layers)[-1]) - target).square().mean()
    gradients = torch.autograd.grad(loss, [layer.get_parameter("out") for layer in layers])
    return [gradient.norm().item() for gradient in gradients]
