"""Four bits a weight: NF4, blockwise, with scales that are quantised again. The frozen weights of QLoRA.

Idea:        Trained weights are about normally distributed. 16 levels at quantiles of the normal distribution are used
             about equally often, evenly spaced ones are not: the outer ones stay almost empty. Every block of 64
             weights is divided by its largest absolute value and each weight becomes the number of the nearest level.
             The scales would cost half a bit a weight, so they are quantised too, 256 at a time, to 8 bits.
Cost:        4 + 8/64 + 32/(64 x 256) = 4.127 bits a weight, 0.516 bytes. Nothing is computed in 4 bits: a weight is
             read out in its old dtype for each product, forward and backward, and forgotten.
Paper:       Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, sections 2 and 3, equations 4 to 6; Dettmers et al. 2021,
             arXiv:2110.02861, section 2 (blocks, and the 8-bit type of the scales).
Production:  bitsandbytes quantize_4bit(quant_type="nf4", compress_statistics=True) and its Linear4bit.
Leaves out:  a fused kernel, paged optimizers; embeddings, norms and the head, which stay as they are.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minillm.finetuning.lora import MATRICES, LazyWeight

BLOCK, SECOND = 64, 256  # weights that share a scale, scales that share a scale


def nf4_levels() -> Float[Tensor, "16"]:
    """Quantiles of the normal distribution over the largest: 7 below zero, zero itself, 8 above.

    Evenly spaced probabilities from 1/2 to the outermost. That is not 1, whose quantile is infinite, but 1 minus the
    mean of 1/32 and 1/30: half a step for 16 and for 15 levels. Zero is exact, so that padding and pruned weights stay.

    >>> nf4_levels()[[0, 1, 7, 8, 15]]
    tensor([-1.0000, -0.6962,  0.0000,  0.0796,  1.0000])
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(0.5, outermost, 9, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(0.5, outermost, 8, dtype=torch.float64)[1:])
    return (torch.cat([below.flip(0), torch.zeros(1), above]) / above[-1]).float()


def dynamic_levels(*, signed: bool = True) -> Float[Tensor, "256"]:
    """256 levels from 0 to 1 (-1 to 1) over seven decades, finest in relative terms at the top.

    Decade i, ending at 10^(i - 6), has 2^i levels a sign (2^(i + 1) unsigned), the middles of even steps.

    >>> levels = dynamic_levels(signed=False)
    >>> int((levels > 0.1).sum()), int((levels < 1e-4).sum())
    (129, 15)
    """
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        decades.append(10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    above = torch.cat(decades)
    below = -above if signed else above[:0]
    return torch.cat([below, torch.zeros(1), above, torch.ones(1)]).sort().values.float()


def quantise_blocks(
    x: Float[Tensor, " n"], levels: Float[Tensor, " l"], block: int
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " blocks"]]:
    """The number of the nearest level for each value over its block's largest, and those largest absolute values.

    >>> quantise_blocks(torch.tensor([1.0, -4.0, 0.1, 0.2]), torch.tensor([-1.0, 0.0, 1.0]), block=2)
    (tensor([1, 0, 1, 2], dtype=torch.uint8), tensor([4.0000, 0.2000]))
    """
    padded = torch.nn.functional.pad(x.float(), (0, -len(x) % block)).view(-1, block)
    largest = padded.abs().amax(dim=1)
    between = (levels[1:] + levels[:-1]) / 2
    tiny = torch.finfo(torch.float32).tiny  # a block of zeros
    codes = torch.bucketize(padded / largest.clamp(min=tiny)[:, None], between.to(x.device))
    return codes.to(torch.uint8).flatten()[: len(x)], largest


def dequantise_blocks(
    codes: UInt8[Tensor, " n"], largest: Float[Tensor, " blocks"], levels: Float[Tensor, " l"], block: int
) -> Float[Tensor, " n"]:
    """The levels times their block's largest absolute value."""
    values = levels.to(codes.device)[codes.int()]
    return values * largest.repeat_interleave(block)[: len(codes)]


class Packed(NamedTuple):
    """A weight in 4.127 bits a number."""

    codes: UInt8[Tensor, " half"]  # two weights a byte, the first in the upper four bits
    scales: UInt8[Tensor, " blocks"]  # one for 64 weights: the 8-bit code of its distance from the mean of all scales
    second: Float[Tensor, " seconds"]  # one for 256 scales
    mean: Float[Tensor, ""]  # of the scales, which are positive: without it the sign bit would be wasted

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(part.nbytes for part in self)


def quantise(weight: Float[Tensor, "*w"]) -> Packed:
    """A weight as codes; `dequantise` reads it out."""
    codes, scales = quantise_blocks(weight.flatten(), nf4_levels(), BLOCK)
    pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
    mean = scales.mean()
    return Packed(pairs[:, 0] << 4 | pairs[:, 1], *quantise_blocks(scales - mean, dynamic_levels(), SECOND), mean)


def dequantise(packed: Packed, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Float[Tensor, "*w"]:
    """The weight that the codes stand for.

    >>> weight = torch.randn(128, 128)
    >>> packed = quantise(weight)
    >>> error = dequantise(packed, (128, 128), torch.float32) - weight
    >>> round(packed.nbytes / weight.numel(), 3), bool(error.pow(2).mean().sqrt() < 0.1)      # of weights of size 1
    (0.516, True)
    """
    codes = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).flatten()[: torch.Size(shape).numel()]
    scales = dequantise_blocks(packed.scales, packed.second, dynamic_levels(), SECOND) + packed.mean
    return dequantise_blocks(codes, scales, nf4_levels(), BLOCK).view(shape).to(dtype)


class PackedLinear(torch.autograd.Function):
    """x W^T that keeps nothing for the backward pass: the weight is read out again, and it has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: "NF4Weight") -> Tensor:
        ctx.weight = weight
        return x @ weight.dense().mT.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.dense().to(grad.dtype), None


class NF4Weight(LazyWeight):
    """A quantised weight; read out where it is used."""

    packed: Packed

    def linear(self, x: Tensor) -> Tensor:
        """x times the weight read out."""
        return PackedLinear.apply(x, self)

    def dense(self) -> Tensor:
        """The weight read out."""
        return dequantise(self.packed, self.shape, self.dtype)


class NF4(nn.Module):
    """A parametrization: the module keeps the codes and reads an `NF4Weight`. The codes are in its state dict."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype

    def right_inverse(self, weight: Tensor) -> Packed:
        """The codes to keep in place of the weight."""
        return quantise(weight)

    def forward(self, *packed: Tensor) -> Tensor:
        """The weight that the codes stand for."""
        weight = NF4Weight.like(self.shape, dtype=self.dtype, device=packed[0].device)
        weight.packed = Packed(*packed)
        return weight


@torch.no_grad()
def quantise_model(model: nn.Module, *, names: Iterable[str] = MATRICES) -> nn.Module:
    """Freeze the model and quantise every matrix with one of the names. `lora.add_lora` makes it learn: QLoRA.

    The model itself comes back, changed. Bring it to its device and dtype before: casting it afterwards would cast the
    scales.

    >>> from minillm.architecture.transformer import Config, Transformer
    >>> model = Transformer(Config(width=64, layers=2, heads=2, head_size=32, hidden=128, tied=False))
    >>> model = quantise_model(model)
    >>> type(model.blocks[0].qkv).__name__, tuple(model.blocks[0].qkv.shape)
    ('NF4Weight', (192, 64))
    """
    names = set(names)
    found = [
        (m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if n in names and p.ndim == 2
    ]
    if not found:
        raise ValueError(f"no matrix of the model has one of the names {sorted(names)}")
    model.requires_grad_(False)
    for module, name in found:
        parametrize.register_parametrization(module, name, NF4(getattr(module, name)), unsafe=True)
    return model


def bits_per_weight(*, block: int = BLOCK, second: int | None = SECOND) -> float:
    """Bits that a weight takes with its share of the scales; `second=None` keeps the scales in float32.

    >>> bits_per_weight(second=None), round(bits_per_weight(), 3)
    (4.5, 4.127)
    """
    return 4 + 32 / block if second is None else 4 + 8 / block + 32 / (block * second)
