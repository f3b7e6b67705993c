"""The exercise of architecture/feedforward: the SwiGLU layer, and its wrong versions."""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: architecture/feedforward
import torch


def swiglu(x, gate, up, down):
    """The feed-forward layer of Llama: silu of the gate, times the other branch, brought back to c channels.

    x is [..., c]; gate and up are [f, c] and down is [c, f], as nn.Linear stores its
    weights: rows are output channels. f may be larger or smaller than c.
    Return [..., c] in the dtype of x; there are no biases.
    silu(z) = z * sigmoid(z); hidden values of +-1,000 must work.
    """
    raise NotImplementedError
'''


def oracle(x, gate, up, down):  # type: ignore[no-untyped-def]
    """The definition in float64."""
    return defined(x.double(), gate.double(), up.double(), down.double()).to(x.dtype)


def defined(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The definition, written with an exponential; the probe of the gradients may call it, the oracle it may not."""
    wide = torch.einsum("...c,fc->...f", x, gate)
    other = torch.einsum("...c,fc->...f", x, up)
    return torch.einsum("...f,cf->...c", wide / (1 + torch.exp(-wide)) * other, down)


def tensors(*shape: int, f: int, seed: int, size: float = 1.0) -> tuple[Tensor, ...]:
    """x of this shape and gate, up, down for it; `size` scales the gate, and not the output."""
    generator, c = torch.Generator().manual_seed(seed), shape[-1]
    x, gate, up, down = (torch.randn(s, generator=generator) for s in (shape, (f, c), (f, c), (c, f)))
    return x, gate * size / c**0.5, up / size / c**0.5, down / f**0.5


def make_cases() -> list[Case]:
    one = torch.ones(1, 1)
    exact = tuple(x.double() for x in tensors(2, 8, f=16, seed=6))
    x, gate, up, down = tensors(3, 8, f=16, seed=5)
    return [
        Case("by hand", (one, 2 * one, 3 * one, 10 * one), {}, "one channel: 10 * 3 * silu(2)"),
        Case("widened", tensors(2, 3, 12, f=32, seed=1), {}, "a batch of 2 with 3 tokens, f = 32 for c = 12"),
        Case("as wide as the token", tensors(4, 8, f=8, seed=2), {}, "f = c: a transposed weight still fits"),
        Case("narrowed", tensors(4, 8, f=4, seed=3), {}, "f = 4 for c = 8"),
        Case("a single token", tensors(8, f=16, seed=4), {}, "x without batch dimensions"),
        Case("closed gate", (x, 0 * gate, up, down), {}, "a gate of zeros: silu(0) = 0, nothing passes"),
        Case("large values", tensors(4, 8, f=16, seed=7, size=1000.0), {}, "gate values of the order of 1,000"),
        Case("float64", exact, {}, "float64 in, float64 out"),
    ]


def gradients(function: Callable[..., Tensor]) -> str | None:
    """Which of the arguments get no gradient, or another one than that of the definition."""
    inputs = [x.double().requires_grad_() for x in tensors(3, 6, f=10, seed=8)]
    names = ("x", "gate", "up", "down")
    out = function(*inputs)
    grads = torch.autograd.grad(out.sum(), inputs, allow_unused=True) if out.requires_grad else [None] * 4
    right = torch.autograd.grad(defined(*inputs).sum(), inputs)
    lost, bad = [], []
    for name, grad, asked in zip(names, grads, right, strict=True):
        if grad is None:
            lost.append(name)
        elif not torch.allclose(grad, asked, rtol=1e-3, atol=1e-4):
            bad.append(name)
    if lost:
        return f"The numbers are right, but no gradient reaches {', '.join(lost)}: the layer could not be trained."
    if bad:
        return (
            f"The numbers are right, but the gradient that reaches {', '.join(bad)} is not: part of the way to it is "
            "cut off. Detach nothing."
        )
    return None


SWIGLU = "return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)"
RELU = "return F.linear(F.relu(F.linear(x, up, up_bias)), down, down_bias)"
HIDDEN = "return multiple * -(-(8 * c // 3) // multiple)"

EXERCISE = Exercise(
    question="architecture/feedforward",
    module="architecture/feedforward",
    function="swiglu",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("out",),
    rtol=1e-4,  # float32 sums of 32 products of rounded numbers
    atol=1e-4,
    wrong=(
        Wrong(
            "activation on the wrong branch",
            SWIGLU,
            "return F.linear(F.linear(x, gate) * F.silu(F.linear(x, up)), down)",
            "silu belongs to the gate; the other branch stays linear. With the two exchanged, the weights of a "
            "checkpoint take each other's place.",
        ),
        Wrong(
            "activation on both branches",
            SWIGLU,
            "return F.linear(F.silu(F.linear(x, gate)) * F.silu(F.linear(x, up)), down)",
            "Only the gate is bent by silu; the other branch stays linear.",
        ),
        Wrong(
            "activation on the product",
            SWIGLU,
            "return F.linear(F.silu(F.linear(x, gate) * F.linear(x, up)), down)",
            "silu is applied to the gate before the two branches are multiplied, not to their product.",
        ),
        Wrong(
            "sigmoid for silu",
            SWIGLU,
            "return F.linear(F.linear(x, gate).sigmoid() * F.linear(x, up), down)",
            "A sigmoid gate is the older GLU; SwiGLU takes silu(z) = z * sigmoid(z).",
        ),
        Wrong(
            "gelu for silu",
            SWIGLU,
            "return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down)",
            "A GELU gate is GEGLU; SwiGLU takes silu(z) = z * sigmoid(z).",
        ),
        Wrong(
            "relu for silu",
            SWIGLU,
            "return F.linear(F.relu(F.linear(x, gate)) * F.linear(x, up), down)",
            "A ReLU gate is ReGLU; SwiGLU takes silu(z) = z * sigmoid(z).",
        ),
        Wrong(
            "no activation",
            SWIGLU,
            "return F.linear(F.linear(x, gate) * F.linear(x, up), down)",
            "The gate is not bent: this is the bilinear layer, without silu.",
        ),
        Wrong(
            "branches added",
            SWIGLU,
            "return F.linear(F.silu(F.linear(x, gate)) + F.linear(x, up), down)",
            "The branches are multiplied, not added: the gate decides how much of the other branch passes.",
        ),
        Wrong(
            "gate alone",
            SWIGLU,
            "return F.linear(F.silu(F.linear(x, gate)), down)",
            "The branch x up is missing: this is the two-matrix layer with silu, nothing is gated.",
        ),
        Wrong(
            "gate times itself",
            SWIGLU,
            "return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, gate), down)",
            "Both branches use the gate's weight: the second one is x up.",
        ),
    ),
    also_wrong=(
        Wrong(
            "halves exchanged",
            "gate, up = F.linear(x, gate_up)",
            "up, gate = F.linear(x, gate_up)",
            "In the stacked weight the gate comes first.",
        ),
        Wrong(
            "halves interleaved",
            "gate, up = F.linear(x, gate_up).chunk(2, dim=-1)",
            "gate, up = F.linear(x, gate_up).unflatten(-1, (-1, 2)).unbind(dim=-1)",
            "Gate and up are stacked one after the other, not row by row.",
        ),
        Wrong(
            "ReLU forgotten",
            RELU,
            "return F.linear(F.linear(x, up, up_bias), down, down_bias)",
            "Without the activation the two products are one matrix of rank at most c.",
        ),
        Wrong(
            "ReLU at the end",
            RELU,
            "return F.relu(F.linear(F.linear(x, up, up_bias), down, down_bias))",
            "The activation stands between the two products.",
        ),
        Wrong(
            "bias of the hidden layer forgotten",
            RELU,
            RELU.replace(", up_bias", ""),
            "The first bias sets when a neuron fires.",
        ),
        Wrong(
            "approximation ignored",
            ", approximate=approximate)",
            ")",
            "GPT-2 was trained with the tanh form of GELU.",
        ),
        Wrong(
            "width 4c with three matrices",
            HIDDEN,
            "return multiple * -(-4 * c // multiple)",
            "Three matrices of width 4c have one and a half times the parameters: the matched width is 8c/3.",
        ),
        Wrong(
            "rounded down",
            HIDDEN,
            "return multiple * (8 * c // 3 // multiple)",
            "Llama takes the next multiple above 8c/3.",
        ),
        Wrong(
            "two thirds of c",
            HIDDEN,
            HIDDEN.replace("8 * c // 3", "2 * c // 3"),
            "The matched width is two thirds of 4c.",
        ),
    ),
    probes=(Probe("gradients", gradients),),
    hints=(
        "Weights are stored as [out, in]: x @ gate.mT, or F.linear(x, gate), takes c channels to f.",
        "Make two hidden tensors of width f from the same x, one with gate and one with up.",
        "Bend the first with silu, torch.nn.functional.silu(z) = z * torch.sigmoid(z), and multiply it with the "
        "second, element by element.",
        "Bring the product back to c channels with down.",
    ),
)
