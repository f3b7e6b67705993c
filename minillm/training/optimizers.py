"""AdamW, Adafactor and Muon written out: what each remembers of past gradients, and the step it makes of that.

Idea:        All three divide out the size of the gradient. AdamW keeps running means of the gradient and of its square
             for every weight, and steps by their ratio: about lr for each weight, whatever the gradient's scale.
             Adafactor keeps of the square only the row and column means, whose outer product stands for the matrix.
             Muon treats a matrix as a whole: it keeps a running mean and sets all its singular values to about 1, so
             that rare directions move as much as frequent ones. Weight decay shrinks the weight itself, by lr x decay.
Cost:        Memory besides the weight, in numbers for an r x c matrix: AdamW 2 r c, Adafactor r + c, Muon r c. Muon
             does 5 rounds of three products, 20 r^2 c + 10 r^3 operations for r <= c.
Paper:       Kingma and Ba 2014, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2
             (decay apart from the gradient; PyTorch's is times lr); Shazeer and Stern 2018, arXiv:1804.04235,
             algorithms 4 and 5; Jordan et al. 2024, "Muon" (kellerjordan.github.io/posts/muon); Liu et al. 2025,
             arXiv:2502.16982 (Muon's step sized like Adam's).
Production:  torch.optim.AdamW (for speed: fused=True), torch.optim.Adafactor, torch.optim.Muon: the same numbers.
Leaves out:  AMSGrad, momentum in Adafactor, sparse gradients, closures.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a s + b s^3 + c s^5 lifts small singular values fast; 1 is no fixed point


@torch.no_grad()
def adamw_step(
    weight: Float[Tensor, "*w"],
    grad: Float[Tensor, "*w"],
    mean: Float[Tensor, "*w"],
    square: Float[Tensor, "*w"],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """Change the weight and its two running means in place; `step` counts from 1.

    The means start at 0 and are too small by 1 - beta^step, which is divided out. So the first step is lr for every
    weight, whatever the gradient.

    >>> weight, grad = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1e-3, 1.0, -1e6])
    >>> adamw_step(weight, grad, torch.zeros(3), torch.zeros(3), 1, lr=0.1)
    >>> weight
    tensor([0.9000, 0.9000, 1.1000])
    """
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    size = (square / (1 - beta2**step)).sqrt_().add_(eps)
    weight.addcdiv_(mean, size, value=-lr / (1 - beta1**step))


def outer_estimate(row: Float[Tensor, "*b r 1"], column: Float[Tensor, "*b 1 c"]) -> Float[Tensor, "*b r c"]:
    """The matrix of mean squares that its row and column means suggest: exact for a matrix of rank 1.

    >>> squares = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> outer_estimate(squares.mean(dim=-1, keepdim=True), squares.mean(dim=-2, keepdim=True))
    tensor([[1., 2.],
            [3., 6.]])
    """
    return row @ column / row.mean(dim=-2, keepdim=True).clamp(min=torch.finfo(row.dtype).eps)


@torch.no_grad()
def adafactor_step(
    weight: Float[Tensor, "*w"],
    grad: Float[Tensor, "*w"],
    squares: tuple[Tensor, ...],
    step: int,
    *,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    decay: float = -0.8,
    smallest: float = 1e-3,
    clip: float = 1.0,
) -> None:
    """Change the weight and its mean squares in place: (row, column) of a matrix, (all,) of a vector; `step` from 1.

    The step is relative: lr (at most 1 / sqrt(step)) times the root mean square of the weight, at least `smallest`. The
    mean forgets less and less, 1 - step^decay. An update of root mean square above `clip` is scaled down to it.
    """
    tiny, news = torch.finfo(weight.dtype).eps, step**decay
    alpha = max(smallest, rms(weight)) * min(lr, 1 / math.sqrt(step))
    weight.mul_(1 - lr * weight_decay)
    if len(squares) == 2:
        row, column = squares
        row.lerp_(grad.square().mean(dim=-1, keepdim=True), news)
        column.lerp_(grad.square().mean(dim=-2, keepdim=True), news)
        estimate = outer_estimate(row, column)
    else:
        estimate = squares[0].lerp_(grad.square(), news)
    update = grad * estimate.clamp(min=tiny * tiny).rsqrt()
    weight.add_(update, alpha=-alpha / max(1.0, rms(update) / clip))


def rms(x: Tensor) -> float:
    """Root mean square."""
    return (x.norm() / math.sqrt(x.numel())).item()


def orthogonalise(
    matrix: Float[Tensor, "*b r c"], *, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*b r c"]:
    """The matrix with all singular values moved to between about 0.7 and 1.2 and the same singular vectors.

    Newton-Schulz: products only, no decomposition. An odd polynomial of the matrix is one of its singular values.

    >>> steep = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0]])             # singular values 3 and 0.1
    >>> torch.linalg.svdvals(orthogonalise(steep, dtype=torch.float32)).round(decimals=1)
    tensor([1.1000, 0.7000])
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.reshape(-1, *matrix.shape[-2:]).to(dtype)
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b g + c g g) x
    return (x.mT if tall else x).view_as(matrix)


@torch.no_grad()
def muon_step(
    weight: Float[Tensor, "*b r c"],
    grad: Float[Tensor, "*b r c"],
    mean: Float[Tensor, "*b r c"],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    like_adam: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Change a matrix (or a stack of them) and its running mean in place.

    The update has a root mean square of about 1 / sqrt(max(r, c)). Times sqrt(max(1, r / c)) by default; `like_adam`
    times 0.2 sqrt(max(r, c)) instead, so that Adam's learning rate and weight decay fit.
    """
    mean.lerp_(grad, 1 - momentum)
    update = orthogonalise(grad.lerp(mean, momentum), dtype=dtype)  # Nesterov: the mean, one step further
    r, c = weight.shape[-2:]
    size = 0.2 * math.sqrt(max(r, c)) if like_adam else math.sqrt(max(1, r / c))
    weight.mul_(1 - lr * weight_decay)
    weight.add_(update.to(weight.dtype), alpha=-lr * size)


class Optimizer(torch.optim.Optimizer):
    """A step function for every weight that has a gradient, and the state that it changes."""

    def begin(self, weight: Tensor) -> dict[str, Any]:
        """The state of a weight before its first step."""
        raise NotImplementedError

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step for every weight."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(step=0, **self.begin(weight))
                state["step"] += 1
                self.update(weight, weight.grad, state, group)


class AdamW(Optimizer):
    """`adamw_step` for every weight."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        check_rate(lr)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def begin(self, weight: Tensor) -> dict[str, Any]:
        """Two numbers a weight."""
        return dict(mean=torch.zeros_like(weight), square=torch.zeros_like(weight))

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, in place."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        adamw_step(weight, grad, state["mean"], state["square"], state["step"], **options)


class Adafactor(Optimizer):
    """`adafactor_step` for every weight; matrices factored."""

    def __init__(self, params: Iterable[Any], lr: float = 0.01, *, weight_decay: float = 0.0) -> None:
        check_rate(lr)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    def begin(self, weight: Tensor) -> dict[str, Any]:
        """r + c numbers for an r x c matrix."""
        if weight.ndim < 2:
            return dict(squares=(torch.zeros_like(weight),))
        return dict(squares=(torch.zeros_like(weight[..., :1]), torch.zeros_like(weight[..., :1, :])))

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, in place."""
        options = {name: group[name] for name in ("lr", "weight_decay")}
        adafactor_step(weight, grad, state["squares"], state["step"], **options)


class Muon(Optimizer):
    """`muon_step` for matrices: the hidden ones. Embeddings, the head and vectors need AdamW beside it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        like_adam: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        check_rate(lr)
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, like_adam=like_adam, dtype=dtype)
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 2:
                    raise ValueError(f"Muon needs matrices, got a parameter of shape {tuple(weight.shape)}")

    def begin(self, weight: Tensor) -> dict[str, Any]:
        """One number a weight."""
        return dict(mean=torch.zeros_like(weight))

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, in place."""
        options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "like_adam", "dtype")}
        muon_step(weight, grad, state["mean"], **options)


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters for Muon, matrices inside blocks, and the others: embeddings, head, norms, routers.

    >>> from minillm.architecture.transformer import Config, Transformer
    >>> matrices, others = hidden_matrices(Transformer(Config(width=64, layers=2, heads=2, head_size=32, hidden=128)))
    >>> len(matrices), len(others)                          # 4 a layer; 2 norms a layer, the last norm, the embedding
    (8, 6)
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim > 1 and name.startswith("blocks.") and not name.endswith("router")
        (matrices if inside else others).append(parameter)
    return matrices, others


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices decay, norms and biases do not."""
    parameters = list(model.parameters())
    return [
        dict(params=[p for p in parameters if p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0),
    ]


def check_rate(lr: float) -> None:
    """Refuse a learning rate that goes uphill."""
    if lr < 0:
        raise ValueError(f"the learning rate must not be negative, got {lr}")
