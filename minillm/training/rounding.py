"""Training in half precision by rounding: which gradients vanish, measured on a small model of letters.

Idea:        A tensor core reads 16-bit numbers, adds up in float32 and writes 16 bits. On any processor that is a
             matrix product in float32 whose operands and result go through 16 bits and back; autograd sends the
             gradients through the same 16 bits. So one can train as in float16 where float16 is slow, see every
             gradient of an activation before it is rounded, and count those that become zero. The loss is a mean
             over n tokens, its gradients are in proportion to 1/n: large batches underflow, a factor brings them back.
Cost:        The float32 product, and a pass over its operands and its result.
Paper:       Micikevicius et al. 2017, arXiv:1710.03740, section 3.2.
Production:  torch.autocast with float16 or bfloat16, for the products; between them, where autocast stays in 16 bits,
             this is float32.
Leaves out:  16 bits between the products, and the memory and time that they save: this only shows the numbers.
"""

import math
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.architecture.transformer import Config, Transformer
from minillm.training.precision import LossScaler
from minillm.training.scaling import letters

PRODUCTS: set[Callable[..., Any]] = {F.linear, torch.matmul, torch.bmm, F.scaled_dot_product_attention}
TOY = Config(vocabulary=27, width=48, layers=2, heads=3, kv_heads=3, head_size=16, hidden=128, context=32)
BATCH = 16  # windows of TOY.context letters: 512 tokens


def through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to a dtype, and in backward the gradient, too. The result has x's dtype.

    >>> x = torch.tensor([1.0, 1e-8], requires_grad=True)
    >>> (through(x, torch.float16) @ torch.tensor([1e-8, 1.0])).backward()
    >>> through(x, torch.float16).detach(), x.grad
    (tensor([1., 0.]), tensor([0., 1.]))
    """
    return x.to(dtype).to(x.dtype)


class Rounding(TorchFunctionMode):
    """Inside `with`, matrix products have their operands, results and gradients rounded to a dtype.

    `gradients` are those of the products' results, as they arrive in backward(): rounded to the dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.gradients = dtype, list[Tensor]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        floats = [through(x, self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        exact = function(*floats, **(kwargs or {}))
        if exact.requires_grad:
            exact.register_hook(lambda gradient: self.gradients.append(gradient.detach().flatten()))
        return through(exact, self.dtype)


def windows(count: int, generator: torch.Generator) -> Int[Tensor, "b t"]:
    """Windows of Jane Austen's letters at random places, one letter longer than the toy's context."""
    ids = letters()
    starts = torch.randint(len(ids) - TOY.context, (count, 1), generator=generator)
    return ids[starts + torch.arange(TOY.context + 1)]


def loss(model: Transformer, ids: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean nats a letter."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def activation_gradients(
    model: Transformer, ids: Int[Tensor, "b t"], *, dtype: torch.dtype = torch.float32, factor: float = 1.0
) -> Float[Tensor, " n"]:
    """The gradients of all products' results, the loss times `factor`. The weights' own gradients are cleared."""
    with Rounding(dtype) as mode:
        (loss(model, ids) * factor).backward()
    model.zero_grad()
    return torch.cat(mode.gradients)


def vanished(gradients: Float[Tensor, " n"], dtype: torch.dtype, *, factor: float = 1.0) -> float:
    """Share of the gradients other than 0 that, times a factor, become 0 in a dtype.

    >>> vanished(torch.tensor([0.0, 1e-9, -1e-8, 1e-7]), torch.float16)            # half of 6e-8 and less rounds to 0
    0.6666666865348816
    """
    there = gradients[gradients != 0]
    return ((there * factor).to(dtype) == 0).float().mean().item()


class Trained(NamedTuple):
    """A model, the loss of each step in nats, and the scale of each step's loss (1 without a scaler)."""

    model: Transformer
    losses: Float[Tensor, " p"]
    scales: Float[Tensor, " p"]


def train(
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    scaler: LossScaler | None = None,
    parts: int = 1,
    steps: int = 100,
    lr: float = 4e-3,
    poison: Container[int] = (),
) -> Trained:
    """The toy trained with AdamW in a dtype.

    A step's batch is `parts` micro-batches, as where it does not fit: each loss is divided by `parts` before its
    backward(), the gradients are added. The micro-batches are the same one, so that one backward() stands for all.
    In the steps of `poison` the loss is infinite.
    """
    torch.manual_seed(seed)
    model, generator = Transformer(TOY), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95))
    losses, scales = list[Tensor](), list[float]()
    for step in range(steps):
        scales.append(1.0 if scaler is None else scaler.value)
        with Rounding(dtype):
            nats = loss(model, windows(BATCH, generator))
            share = nats * (math.inf if step in poison else 1 / parts)
            (share if scaler is None else scaler.scale(share)).backward()
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad *= parts
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        losses.append(nats.detach())
    return Trained(model, torch.stack(losses), torch.tensor(scales))
