"""The exercise of architecture/llama: RMSNorm as it is written, and wrong versions of it and of the configurations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: architecture/llama
import torch


def rms_norm_formula(x, weight, *, eps=1e-6):
    """Every token over the root of its mean square, times the weight: x / sqrt(mean(x^2) + eps) * weight.

    x [..., c] holds one token in its last axis; each token is normalised alone. weight [c] is one
    number a channel. The statistics are computed in float32 for half-precision x (in float64 for
    float64), the result has the dtype of x. Write it out: no ready-made norm of PyTorch.
    """
    raise NotImplementedError
'''


def oracle(x, weight, *, eps=1e-6):  # type: ignore[no-untyped-def]
    """The definition in float64, one token after the other."""
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        size = (token.dot(token) / len(token) + eps) ** 0.5
        rows.append(token / size * weight.double())
    return torch.stack(rows).view(x.shape).to(x.dtype)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_cases() -> list[Case]:
    halves = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(16)  # exact factors: the order of rounding does not show
    loud = torch.tensor([300.0, -300.0, 300.0, 300.0], dtype=torch.float16).repeat(2, 16)
    silent = torch.stack([torch.zeros(6), torch.arange(6.0)])
    return [
        Case("by hand", (torch.tensor([[1.0, 7.0], [3.0, 4.0]]), torch.ones(2)), {}, "two tokens of two channels"),
        Case("weights", (randn(5, 8, seed=0), randn(8, seed=1)), {}, "a weight for each channel"),
        Case("shifted", (randn(4, 16, seed=2) + 3, torch.ones(16)), {}, "tokens whose mean is far from 0"),
        Case("batch", (randn(2, 3, 10, seed=3) * 5, randn(10, seed=4)), {}, "a batch of sequences"),
        Case("faint", (randn(3, 8, seed=5) * 1e-3, torch.ones(8)), {}, "tokens so small that eps counts"),
        Case("large eps", (randn(3, 8, seed=6), randn(8, seed=7)), {"eps": 0.5}, "another eps"),
        Case("silent token", (silent, torch.ones(6)), {}, "a token of zeros"),
        Case("loud half precision", (loud, halves.half()), {}, "float16 values whose square is not finite"),
        Case("bfloat16", (randn(3, 64, seed=8, dtype=torch.bfloat16), halves.bfloat16()), {}, "bfloat16"),
        Case("float64", (randn(3, 8, seed=9).double(), torch.ones(8).double()), {}, "float64"),
        Case("loud float64", (randn(3, 8, seed=14).double() * 1e30, torch.ones(8).double()), {}, "1e60 is no float32"),
    ]


class Norms(TorchFunctionMode):
    """Notes calls of PyTorch's own norms."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in ("rms_norm", "layer_norm", "group_norm", "batch_norm", "instance_norm"):
            self.called.add(name)
        return func(*args, **(kwargs or {}))


def by_hand(function: Callable[..., Any]) -> str | None:
    """The formula is asked for, not the call."""
    with Norms() as norms:
        function(randn(2, 8, seed=10), torch.ones(8))
    if norms.called:
        return f"The numbers are right, but torch's {min(norms.called)} did the work: write the formula out."
    return None


def gradient(function: Callable[..., Any]) -> str | None:
    """The size of a token does not matter, so the gradient has no part along it."""
    x, weight = randn(3, 8, seed=11).double().requires_grad_(), randn(8, seed=12).double().requires_grad_()
    out = function(x, weight, eps=0.0)
    if not out.requires_grad:
        return "No gradient reaches x: keep the computation attached to the graph."
    grads = torch.autograd.grad((out * randn(3, 8, seed=13).double()).sum(), (x, weight), allow_unused=True)
    if any(grad is None for grad in grads):
        return "No gradient reaches x or the weight: both are learnt through."
    if (grads[0] * x).sum(dim=-1).abs().max() > 1e-9:
        return "Part of it was detached: growing x must not change the result, so its gradient must be across x."
    return None


SCALE = "scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)"
MEAN = "wide.square().mean(dim=-1, keepdim=True) + eps"
RETURN = "return (wide * scale * weight).to(x.dtype)"
FUSED = "return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)  # of"
LLAMA = "architecture/llama"

EXERCISE = Exercise(
    question="architecture/llama",
    module="architecture/norm",
    function="rms_norm_formula",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("normalised",),
    rtol=1e-5,  # float32 sums of up to 64 squares
    atol=1e-6,
    wrong=(
        Wrong(
            "mean taken off",
            SCALE,
            "wide = wide - wide.mean(dim=-1, keepdim=True)\n    " + SCALE,
            "You subtracted the mean first: that is LayerNorm. RMSNorm leaves the mean where it is.",
        ),
        Wrong(
            "sum for mean",
            MEAN,
            "wide.square().sum(dim=-1, keepdim=True) + eps",
            "The squares are summed, not averaged: each token comes out with length 1 instead of sqrt(c).",
        ),
        Wrong(
            "standard deviation",
            SCALE,
            "scale = torch.rsqrt(wide.var(dim=-1, keepdim=True, correction=0) + eps)",
            "You divided by the standard deviation, which takes the mean off; RMSNorm divides by the root mean square.",
        ),
        Wrong(
            "eps outside the root",
            SCALE,
            "scale = 1 / (wide.square().mean(dim=-1, keepdim=True).sqrt() + eps)",
            "eps was added after the root: it belongs to the mean square, under the root.",
        ),
        Wrong(
            "eps forgotten",
            MEAN,
            "wide.square().mean(dim=-1, keepdim=True)",
            "eps is missing: a token of zeros becomes NaN.",
        ),
        Wrong(
            "eps fixed",
            MEAN,
            MEAN.replace("+ eps", "+ 1e-6"),
            "eps is fixed at its default: use the argument, models differ in it.",
        ),
        Wrong(
            "no root",
            "scale = torch.rsqrt(",
            "scale = 1 / (",
            "You divided by the mean square itself: take its root.",
        ),
        Wrong(
            "weight forgotten",
            RETURN,
            "return (wide * scale).to(x.dtype)",
            "The weight is not applied: multiply each channel by its own number at the end.",
        ),
        Wrong(
            "weight around 1",
            RETURN,
            "return (wide * scale * (1 + weight)).to(x.dtype)",
            "You multiplied by 1 + weight: Gemma stores its weights so, Llama does not.",
        ),
        Wrong(
            "over all tokens",
            MEAN,
            "wide.square().mean() + eps",
            "One mean square was taken over all tokens: each token is normalised alone, over its last axis.",
        ),
        Wrong(
            "mean down the columns",
            MEAN,
            "wide.square().mean(dim=0, keepdim=True) + eps",
            "The mean runs along the first axis, over other tokens: a token's channels are the last axis, dim=-1.",
        ),
        Wrong(
            "always in float32",
            "wide = x.to(torch.promote_types(x.dtype, torch.float32))\n    scale",
            "wide = x.float()\n    scale",
            "float64 is computed in float32, where 1e30 squared is infinite: keep float64 as it is.",
        ),
        Wrong(
            "statistics in half precision",
            "wide = x.to(torch.promote_types(x.dtype, torch.float32))\n    scale",
            "wide = x\n    scale",
            "The squares are taken in half precision, where 300^2 is infinite: convert to float32 first.",
        ),
        Wrong(
            "result in float32",
            RETURN,
            "return wide * scale * weight",
            "A half-precision input comes back as float32: convert the result to the dtype of x.",
        ),
    ),
    also_wrong=(
        Wrong(
            "eps forgotten in the fused call",
            FUSED,
            FUSED.replace(", eps)", ")"),
            "Without eps F.rms_norm takes the smallest step of the dtype.",
        ),
        Wrong(
            "weight forgotten in the fused call",
            FUSED,
            FUSED.replace("weight.to(x.dtype)", "None"),
            "The learned weight is not applied.",
        ),
        Wrong(
            "fused LayerNorm",
            FUSED,
            FUSED.replace(
                "F.rms_norm(x, weight.shape, weight.to(x.dtype)",
                "F.layer_norm(x, weight.shape, weight.to(x.dtype), None",
            ),
            "RMSNorm leaves the mean where it is.",
        ),
        Wrong(
            "feed-forward width rounded down",
            "multiple * math.ceil(int(wider * matched_hidden(width)) / multiple)",
            "multiple * (int(wider * matched_hidden(width)) // multiple)",
            "The width goes up to the next multiple: 10,922 becomes 11,008.",
            LLAMA,
        ),
        Wrong(
            "grouped heads lost",
            "kv_heads=kv_heads or heads",
            "kv_heads=heads",
            "Llama 2 70B and all of Llama 3 have 8 key/value heads.",
            LLAMA,
        ),
        Wrong(
            "the base stays at 10,000",
            "base=5e5, kv_heads=8)",
            "base=1e4, kv_heads=8)",
            "Llama 3 has a base of 500,000 from the start; 3.1 does not change it.",
            LLAMA,
        ),
        Wrong(
            "grouped heads counted in full",
            "(config.heads + config.kv_heads)",
            "(2 * config.heads)",
            "Key and value projections have kv_heads heads, query and output projections have heads.",
            LLAMA,
        ),
        Wrong(
            "two matrices in SwiGLU",
            "n * 3 * c * config.hidden",
            "n * 2 * c * config.hidden",
            "SwiGLU has three matrices: gate, up and down.",
            LLAMA,
        ),
        Wrong(
            "last norm forgotten",
            "(2 * n + 1) * c",
            "2 * n * c",
            "There is one more norm, before the head.",
            LLAMA,
        ),
        Wrong(
            "tied head counted twice",
            "0 if config.tied else table",
            "table",
            "A tied head is the embedding.",
            LLAMA,
        ),
        Wrong(
            "cache of the query heads",
            "kv_heads=config.kv_heads, head_size",
            "kv_heads=config.heads, head_size",
            "Keys and values are kept for key/value heads only.",
            LLAMA,
        ),
        Wrong(
            "cache always in 16 bits",
            "tokens=1, bytes_per_value=bytes_per_value",
            "tokens=1",
            "The bytes of a value are the caller's.",
            LLAMA,
        ),
        Wrong(
            "every pair slowed",
            "return kept * frequencies + (1 - kept) * frequencies / factor",
            "return frequencies / factor + 0 * kept",
            "That is position interpolation: 3.1 leaves the fast pairs alone.",
            LLAMA,
        ),
        Wrong(
            "fast pairs slowed",
            "return kept * frequencies + (1 - kept) * frequencies / factor",
            "return (1 - kept) * frequencies + kept * frequencies / factor",
            "The slow pairs, those that turn less than once in the original context, are slowed.",
            LLAMA,
        ),
        Wrong(
            "slow pairs sped up",
            "(1 - kept) * frequencies / factor",
            "(1 - kept) * frequencies * factor",
            "A longer context needs slower rotations: divide.",
            LLAMA,
        ),
        Wrong(
            "no mixing",
            "((turns - low) / (high - low)).clamp(0, 1)",
            "(turns > low).to(turns.dtype)",
            "Between low and high turns the two are mixed.",
            LLAMA,
        ),
        Wrong(
            "turns in radians",
            "turns = frequencies * original / (2 * math.pi)",
            "turns = frequencies * original",
            "A full turn is 2 pi radians.",
            LLAMA,
        ),
        Wrong(
            "LayerNorm that is none",
            "return layer_norm(x, weight, eps=self.config.eps)",
            "return rms_norm(x, weight, eps=self.config.eps)",
            "The variant must take the mean off, or it shows nothing.",
            LLAMA,
        ),
        Wrong(
            "more parameters for SwiGLU",
            "self.down = nn.Parameter(torch.empty(config.width, 3 * config.hidden // 2))",
            "self.down = nn.Parameter(torch.empty(config.width, config.hidden))\n"
            "        self.gate_up = nn.Parameter(self.gate_up[: config.hidden].detach())",
            "A comparison needs equal parameters: two matrices must be half as wide again.",
            LLAMA,
        ),
        Wrong(
            "attention reads the stream raw",
            "self.attention(self.normalise(x, self.attention_norm), cos",
            "self.attention(x, cos",
            "Both layers read the normalised stream.",
            LLAMA,
        ),
        Wrong(
            "post-norm",
            "return x + self.feedforward(self.normalise(x, self.feedforward_norm))",
            "return self.normalise(x + self.feedforward(x), self.feedforward_norm)",
            "Llama normalises what a layer reads, not the stream.",
            LLAMA,
        ),
    ),
    probes=(Probe("written out", by_hand), Probe("gradient", gradient)),
    hints=(
        "The mean of the squares is x.square().mean(dim=-1, keepdim=True): keepdim lets it divide every channel.",
        "Add eps to that mean, then take the root: torch.rsqrt gives one over the root at once.",
        "For half precision start with x.to(torch.promote_types(x.dtype, torch.float32)), end with .to(x.dtype).",
    ),
)
