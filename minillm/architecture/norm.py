"""Normalisation: bring every token's vector to one size before a layer reads it.

Idea:        LayerNorm takes the mean off a token's channels and divides by their standard deviation. RMSNorm leaves
             the mean alone and divides by the root mean square: one statistic less, no bias, as good in practice.
             Both make a layer blind to the size of its input; a learned weight a channel gives the scale back.
Cost:        one pass over b t c values, limited by memory traffic; c parameters (2 c with a bias).
Paper:       Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; Ba, Kiros and Hinton 2016, arXiv:1607.06450,
             equation 3.
Production:  torch.nn.functional.rms_norm and layer_norm, called here; transformers LlamaRMSNorm.
Leaves out:  batch statistics: every token is normalised alone, in training and afterwards alike.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def rms_norm_formula(
    x: Float[Tensor, "*b c"], weight: Float[Tensor, " c"], *, eps: float = 1e-6
) -> Float[Tensor, "*b c"]:
    """x / sqrt(mean(x^2) + eps) * weight as it is written; statistics in float32 or better.

    >>> rms_norm_formula(torch.tensor([3.0, 4.0]), torch.ones(2))       # root mean square sqrt(12.5) = 3.54
    tensor([0.8485, 1.1314])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def layer_norm_formula(
    x: Float[Tensor, "*b c"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"] | None = None, *, eps: float = 1e-5
) -> Float[Tensor, "*b c"]:
    """(x - mean) / sqrt(var + eps) * weight + bias as it is written; the variance divides by c, not by c - 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    out = rms_norm_formula(centred, weight, eps=eps)
    return (out if bias is None else out + bias).to(x.dtype)


def rms_norm(x: Float[Tensor, "*b c"], weight: Float[Tensor, " c"], *, eps: float = 1e-6) -> Float[Tensor, "*b c"]:
    """Each token over its root mean square, times the weight, in the dtype of x: one call, one kernel on a GPU.

    >>> rms_norm(torch.tensor([[3.0, 4.0], [300.0, 400.0]]), torch.ones(2))       # the size of the input is gone
    tensor([[0.8485, 1.1314],
            [0.8485, 1.1314]])
    """
    check_channels(x, weight)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # of one dtype, or PyTorch leaves that kernel


def layer_norm(
    x: Float[Tensor, "*b c"], weight: Float[Tensor, " c"], bias: Float[Tensor, " c"] | None = None, *, eps: float = 1e-5
) -> Float[Tensor, "*b c"]:
    """Each token without its mean, over its standard deviation, times the weight plus the bias, in the dtype of x.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2))       # mean 2, standard deviation 1
    tensor([[-1.0000,  1.0000]])
    """
    check_channels(x, weight)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def check_channels(x: Tensor, weight: Tensor) -> None:
    """Refuse a weight that is not one number for each channel."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight needs one number a channel, got {tuple(weight.shape)} for x {tuple(x.shape)}")
