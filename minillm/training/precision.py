"""Mixed precision: a loss scaler, which operations autocast runs in half precision, and float32 master weights.

Idea:        Matrix products run in 16 bits, for which tensor cores are built; weights and their sums stay in 32.
             float16 ends at 6e-8, and many gradients are below that: the loss is multiplied by a large power of 2
             before the backward pass, and the gradients, in float32, divided by it before anything looks at them. A
             scale too large makes infinities: then that step is skipped and the scale halved. A scale too small cannot
             be seen, so it is doubled after 2000 steps without infinities. bfloat16 has float32's range and needs no
             scaler. Weights kept in 16 bits lose every update below half an ulp: the optimizer then needs a float32
             copy.
Cost:        With 16-bit weights and gradients, AdamW holds 2 + 2 + 4 + 4 + 4 = 16 bytes a parameter: as many as float32
             alone. What gets smaller is activations, and the time. Autocast keeps weights and gradients in float32, and
             a 16-bit copy of the weights while it is on. The scaler reads all gradients, and waits for the device, once
             a step.
Paper:       Micikevicius et al. 2017, arXiv:1710.03740, section 3 (masters: 3.1, scaling: 3.2);
             Rajbhandari et al. 2019, arXiv:1910.02054, section 3.1 (the 16 bytes).
Production:  torch.amp.GradScaler and torch.autocast; Megatron-LM and DeepSpeed for 16-bit weights with masters.
Leaves out:  float8 with a scale for every tensor, optimizers that unscale in their own kernel, sparse gradients,
             gradients on several devices, stochastic rounding.
"""

import math
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Loss scaling


@torch.no_grad()
def unscale(gradients: Iterable[Tensor], scale: float) -> bool:
    """Divide the gradients by the scale in place; whether all of them are finite. Waits once for the device.

    An infinity in any of them spoils them all: it says that the scale was too large.

    >>> gradients = [torch.tensor([8.0, 16.0]), torch.tensor([float("inf")])]
    >>> unscale(gradients, 8.0), gradients[0]
    (False, tensor([1., 2.]))
    """
    inverse = float32(1 / scale)
    whole = [gradient.mul_(inverse).isfinite().all() for gradient in gradients]
    return bool(torch.stack(whole).all())


def next_scale(
    scale: float, good: int, finite: bool, *, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
) -> tuple[float, int]:
    """The scale after a step, and how many steps in a row have been good since it last changed.

    >>> next_scale(1024.0, 7, False), next_scale(1024.0, 7, True), next_scale(1024.0, 1999, True)
    ((512.0, 0), (1024.0, 8), (2048.0, 0))
    """
    if not finite:
        return float32(scale * backoff), 0
    if good + 1 < interval:
        return scale, good + 1
    larger = scale * growth
    return (float32(larger) if larger < 2.0**128 else scale), 0  # float32 ends there


def scaled_step(
    weight: Tensor,
    gradient: Tensor,
    scale: Tensor,
    good: Tensor,
    *,
    rate: float,
    clip: float = math.inf,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> tuple[Tensor, Tensor, Tensor]:
    """All that happens after backward(), for one weight and SGD: the new weight, scale and count of good steps.

    `gradient` is that of the scaled loss, in any dtype. In float32: divide, look for infinities, clip to a norm of
    `clip`, step. Arguments are left as they are.

    >>> state = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), torch.tensor(8.0), torch.tensor(1999)
    >>> scaled_step(*state, rate=1.0)
    (tensor([0.5000, 1.0000]), tensor(16.), tensor(0))
    """
    true = gradient.to(torch.float32, copy=True)
    finite = unscale([true], scale.item())
    true *= min(1.0, clip / max(true.norm().item(), 1e-30))
    moved = weight - rate * true if finite else weight.clone()
    options: dict[str, Any] = dict(growth=growth, backoff=backoff, interval=interval)
    value, count = next_scale(scale.item(), int(good), finite, **options)
    return moved, torch.tensor(value), torch.tensor(count)


class LossScaler:
    """`unscale` and `next_scale` around a training step; the state loads into torch.amp.GradScaler and back.

    Each optimizer skips for itself: one whose gradients are finite steps although another's are not.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer, scaler = torch.optim.SGD([weight], lr=0.5), LossScaler(scale=4.0)
    >>> scaler.scale((weight * 2).sum()).backward()
    >>> weight.grad
    tensor([8.])
    >>> scaler.step(optimizer), weight.grad, weight.data, scaler.update()
    (True, tensor([2.]), tensor([0.]), 4.0)
    """

    def __init__(
        self, *, scale: float = 2.0**16, growth: float = 2.0, backoff: float = 0.5, interval: int = 2000
    ) -> None:
        if not (growth > 1 > backoff > 0 and interval >= 1 and scale > 0):
            given = f"scale {scale}, growth {growth}, backoff {backoff}, interval {interval}"
            raise ValueError(f"a scaler needs scale > 0, growth > 1, 0 < backoff < 1 and interval >= 1, got {given}")
        self.value, self.good = float32(scale), 0
        self.options: dict[str, Any] = dict(growth=growth, backoff=backoff, interval=interval)
        self._finite: dict[int, bool] = {}  # of the optimizers whose gradients are divided already
        self._stepped: set[int] = set()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, for backward(). A scalar becomes float32: 16 bits would not hold it."""
        return loss * torch.tensor(self.value, device=loss.device)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients: before clipping, after the last backward() of a step.

        RuntimeError: they are divided already, or there are none. ValueError: some are float16.
        """
        if id(optimizer) in self._finite:
            raise RuntimeError("the gradients of this optimizer are unscaled already: unscale_ once between updates")
        groups = optimizer.param_groups
        gradients = [weight.grad for group in groups for weight in group["params"] if weight.grad is not None]
        if not gradients:
            raise RuntimeError("this optimizer's weights have no gradients: call scale(loss).backward() before")
        if any(gradient.dtype == torch.float16 for gradient in gradients):
            raise ValueError("float16 gradients vanish again when they are unscaled: keep the weights in float32")
        self._finite[id(optimizer)] = unscale(gradients, self.value)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """The optimizer's step, or none where a gradient is not finite; whether it was made."""
        if id(optimizer) in self._stepped:
            raise RuntimeError("this optimizer has stepped already: call update() after the steps of all optimizers")
        if id(optimizer) not in self._finite:
            self.unscale_(optimizer)
        self._stepped.add(id(optimizer))
        if self._finite[id(optimizer)]:
            optimizer.step()
        return self._finite[id(optimizer)]

    def update(self) -> float:
        """The scale for the next step, smaller if any optimizer's gradients were not finite.

        FloatingPointError: so many steps were skipped that no scale is left to try.
        """
        if not self._finite:
            raise RuntimeError("no gradients were looked at since the last update: call step(optimizer) before")
        self.value, self.good = next_scale(self.value, self.good, all(self._finite.values()), **self.options)
        self._finite, self._stepped = {}, set()
        if self.value < 2.0**-126:
            raise FloatingPointError("no scale gives finite gradients: look for the infinity or NaN in the model")
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Between two steps, everything: torch.amp.GradScaler's names."""
        return {
            "scale": self.value,
            "growth_factor": self.options["growth"],
            "backoff_factor": self.options["backoff"],
            "growth_interval": self.options["interval"],
            "_growth_tracker": self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. ValueError: it is not one of a scaler."""
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the state of a scaler has {', '.join(sorted(missing))}, got {sorted(state)}")
        self.value, self.good = state["scale"], state["_growth_tracker"]
        names = dict(growth="growth_factor", backoff="backoff_factor", interval="growth_interval")
        self.options = {mine: state[name] for mine, name in names.items()}


def float32(x: float) -> float:
    """The nearest float32 number."""
    return struct.unpack("f", struct.pack("f", x))[0]


# Autocast


def operations(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Calls of what a transformer is made of, with arguments of a dtype."""
    x, weight, row = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1, 1, 4, 8), (8, 8), (8,)))
    matrix, stack = x[0, 0], x[0]
    labels = torch.zeros(4, dtype=torch.long, device=device)
    image, kernel = (torch.ones(shape, device=device, dtype=dtype) for shape in ((1, 1, 4, 4), (1, 1, 2, 2)))
    return {
        "linear": lambda: F.linear(matrix, weight),
        "matmul": lambda: matrix @ weight,
        "bmm": lambda: torch.bmm(stack, stack.mT),
        "einsum": lambda: torch.einsum("td,cd->tc", matrix, weight),
        "conv2d": lambda: F.conv2d(image, kernel),
        "attention": lambda: F.scaled_dot_product_attention(x, x, x),
        "embedding": lambda: F.embedding(labels, weight),
        "add": lambda: matrix + matrix,
        "mul": lambda: matrix * matrix,
        "gelu": lambda: F.gelu(matrix),
        "silu": lambda: F.silu(matrix),
        "exp": lambda: matrix.exp(),
        "log": lambda: matrix.log(),
        "pow": lambda: matrix.pow(2),
        "rsqrt": lambda: matrix.rsqrt(),
        "sum": lambda: matrix.sum(),
        "mean": lambda: matrix.mean(),
        "cumsum": lambda: matrix.cumsum(0),
        "norm": lambda: torch.linalg.vector_norm(matrix),
        "softmax": lambda: matrix.softmax(-1),
        "log_softmax": lambda: matrix.log_softmax(-1),
        "layer_norm": lambda: F.layer_norm(matrix, (8,), row, row),
        "rms_norm": lambda: F.rms_norm(matrix, (8,), row),
        "cross_entropy": lambda: F.cross_entropy(matrix, labels),
        "mse_loss": lambda: F.mse_loss(matrix, matrix),
        "cat with float32": lambda: torch.cat([matrix, weight.float()]),
    }


def autocast_map(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, *, given: torch.dtype = torch.float32
) -> dict[str, torch.dtype]:
    """The dtype in which autocast gives back each operation's result, found by running it on arguments of `given`.

    In half precision from float32: the matrix products. In float32 from half precision: what autocast protects. As
    given: all the rest. The devices differ: softmax and layer_norm are protected on CUDA and not on CPU.

    >>> found = autocast_map("cpu", torch.bfloat16)
    >>> found["linear"], found["softmax"], autocast_map("cpu", given=torch.bfloat16)["softmax"]
    (torch.bfloat16, torch.float32, torch.bfloat16)
    """
    place = torch.device(device)
    calls = operations(place, given)
    with torch.no_grad(), torch.autocast(place.type, dtype=dtype):
        return {name: call().dtype for name, call in calls.items()}


# Master weights


class MasterWeights:
    """Weights and gradients in 16 bits, and an optimizer that works on a float32 copy of the weights.

    `pull`, the optimizer's step, `push`: with a scaler, `scaler.step(masters.optimizer)` is in the middle, and finds
    the gradients in float32.

    >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))            # the next number down is 0.9961
    >>> masters = MasterWeights([weight], lambda copies: torch.optim.SGD(copies, lr=0.001))
    >>> for _ in range(3):
    ...     weight.grad = torch.ones_like(weight)
    ...     masters.step()
    ...     print(f"{masters.copies[0].item():.4f} {weight.item():.4f}")
    0.9990 1.0000
    0.9980 0.9961
    0.9970 0.9961
    """

    def __init__(self, weights: Iterable[Tensor], optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.weights = list(weights)
        self.copies: list[Tensor] = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        self.optimizer = optimizer(self.copies)

    def pull(self) -> None:
        """Gradients of the weights to the copies, in float32."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            copy.grad = None if weight.grad is None else weight.grad.float()

    @torch.no_grad()
    def push(self) -> None:
        """Copies to the weights, rounded."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.copy_(copy)

    def step(self) -> None:
        """One update of copies and weights."""
        self.pull()
        self.optimizer.step()
        self.push()

    def state_dict(self) -> dict[str, Any]:
        """The copies and the optimizer's state: the weights alone do not bring the copies back."""
        return {"copies": [copy.detach() for copy in self.copies], "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, and set the weights by it. ValueError: the copies have other shapes."""
        shapes = [[tuple(copy.shape) for copy in copies] for copies in (state["copies"], self.copies)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the state's copies have shapes {shapes[0]}, these weights have {shapes[1]}")
        for copy, saved in zip(self.copies, state["copies"], strict=True):
            copy.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.push()

    def bytes_per_parameter(self) -> dict[str, float]:
        """Bytes held now, counted from the tensors, over the number of parameters.

        The optimizer's step counters, one a tensor, are left out. Gradients of the copies are a second set of them;
        they are `None` but between `pull` and the next one where the caller clears them.
        """
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        held: dict[str, list[Any]] = {
            "weights": self.weights,
            "gradients": [weight.grad for weight in self.weights],
            "masters": self.copies,
            "masters' gradients": [copy.grad for copy in self.copies],
            "moments": [value for value in states if isinstance(value, Tensor) and value.ndim],
        }
        count = sum(weight.numel() for weight in self.weights)
        return {name: sum(x.nbytes for x in tensors if x is not None) / count for name, tensors in held.items()}
