"""Low-rank adapters: a frozen weight, and beside it a product of two thin matrices that learns.

Idea:        The change that fine-tuning makes to an o x i weight is taken to have a low rank: W + (alpha / r) B A
             with A r x i and B o x r. Only A and B get gradients and optimizer states. B starts at zero, so the
             model is at first unchanged. The sum is not built in training: x goes through W, and through A and then B.
             Afterwards it is, once, and the adapted model is as fast as the base model.
Cost:        r (i + o) trained numbers a matrix, and their optimizer states. Weights stay in memory, and so do
             most activations: the gradient still runs through every layer. Of the 6 operations a weight and token of
             training the 2 for the weight's own gradient are saved.
Paper:       Hu et al. 2021, "LoRA", arXiv:2106.09685, equation 3 and section 4.1; Kalajdzievski 2023, "rsLoRA",
             arXiv:2312.03732 (alpha / sqrt(r) instead, so that the update keeps its size as r grows: pass
             alpha = alpha' sqrt(r)).
Production:  peft LoraConfig(r, lora_alpha, target_modules) with its initialisation; torchtune LoRALinear.
Leaves out:  dropout in front of A, embeddings, experts' stacks, several adapters at once, DoRA.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

MATRICES = ("qkv", "out", "gate_up", "down")  # of a block of `architecture.transformer`


def lora_linear(
    x: Float[Tensor, "*b i"],
    weight: Float[Tensor, "o i"],
    a: Float[Tensor, "r i"],
    b: Float[Tensor, "o r"],
    scale: float,
) -> Float[Tensor, "*b o"]:
    """x (W + scale B A)^T without the sum: two thin products beside the wide one.

    >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> lora_linear(x, weight, a=torch.tensor([[1.0, 1.0]]), b=torch.tensor([[1.0], [0.0]]), scale=0.5)
    tensor([[2.5000, 2.0000]])
    """
    return F.linear(x, weight) + scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of F.linear in its order, however they were given."""
    return input, weight, bias


class LazyWeight(Tensor):
    """A weight that is not stored as one matrix. In F.linear it multiplies its own way; for any other use it is built.

    It has shape, dtype and device, so code written for a plain weight does not notice.
    """

    METADATA = frozenset(
        [Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.numel]
        + [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")]
    )

    @classmethod
    def like(cls, shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Any:
        """One in the memory of a single number."""
        return torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(cls)

    def linear(self, x: Tensor) -> Tensor:
        """x times the transposed weight."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The weight as one matrix."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LazyWeight.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight, bias = linear_arguments(*args, **(kwargs or {}))
            if isinstance(weight, LazyWeight):
                return weight.linear(x) if bias is None else weight.linear(x) + bias
        built = tree_map_only(LazyWeight, lambda weight: weight.dense(), (args, kwargs or {}))
        return func(*built[0], **built[1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}{tuple(self.shape)}"


class Adapted(LazyWeight):
    """W + scale B A, unbuilt."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: int | float

    def linear(self, x: Tensor) -> Tensor:
        """The thin products beside the wide one."""
        return lora_linear(x, self.weight, self.a, self.b, self.scale)

    def dense(self) -> Tensor:
        """The sum, through which gradients flow to A and B."""
        return self.weight + (self.scale * self.b @ self.a).to(self.weight.dtype)


class LoRA(nn.Module):
    """The adapter of one weight, a parametrization: where the module reads its weight it gets the adapted one."""

    def __init__(
        self, weight: Tensor, *, rank: int, alpha: int | float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale, self.merged = alpha / rank, False
        self.a = nn.Parameter(torch.empty(rank, columns, dtype=weight.dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        bound = 1 / math.sqrt(columns)  # as nn.Linear and peft draw it
        nn.init.uniform_(self.a, -bound, bound, generator=generator)

    def delta(self) -> Float[Tensor, "o i"]:
        """scale B A, what the adapter adds to the weight."""
        return self.scale * self.b @ self.a

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, or once it is merged the weight alone."""
        if self.merged:
            return weight
        adapted = Adapted.like(weight.shape, dtype=weight.dtype, device=weight.device)
        adapted.weight, adapted.a, adapted.b, adapted.scale = weight, self.a, self.b, self.scale
        return adapted


def add_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: int | float | None = None,
    names: Iterable[str] = MATRICES,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze the model and put an adapter on every parameter with one of the names; `alpha` is 2 x rank by default.

    The model itself comes back, changed: its output is not, since B is zero. `names` are the last part of a
    parameter's name: "weight" adapts all nn.Linear layers of a foreign model, of which vectors are left out.

    >>> from minillm.architecture.transformer import Config, Transformer
    >>> model = Transformer(Config(width=64, layers=2, heads=2, head_size=32, hidden=128))
    >>> model = add_lora(model, rank=4, names=["qkv"])
    >>> [name for name, p in model.named_parameters() if p.requires_grad][:2]
    ['blocks.0.parametrizations.qkv.0.a', 'blocks.0.parametrizations.qkv.0.b']
    """
    names = set(names)
    if adapters(model):
        raise ValueError("the model has adapters: take them off with finish(model) first")
    found = [(m, name) for m in model.modules() for name in names & _weights(m).keys() if _weights(m)[name].ndim == 2]
    if not found:
        raise ValueError(f"no matrix of the model has one of the names {sorted(names)}")
    smallest = min(min(_weights(m)[name].shape) for m, name in found)
    if not 1 <= rank <= smallest:
        raise ValueError(f"rank must be between 1 and the smallest side of a matrix, {smallest}, got {rank}")
    model.requires_grad_(False)
    for module, name in found:
        adapter = LoRA(
            _weights(module)[name], rank=rank, alpha=2 * rank if alpha is None else alpha, generator=generator
        )
        # unsafe: the check would build the weight, and refuse the packed one of `nf4`
        parametrize.register_parametrization(module, name, adapter, unsafe=True)
    return model


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that a module reads, plain or parametrized."""
    if isinstance(module, parametrize.ParametrizationList):
        return {}
    found: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        found |= {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    return found


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """The adapters by the name of the weight that they change."""
    return {
        name.replace("parametrizations.", "").rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, LoRA)
    }


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter: the file of a fine-tune. `load_state_dict(..., strict=False)` reads it back."""
    return {name: p for name, p in model.state_dict().items() if name.endswith((".a", ".b"))}


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every adapter to its weight: the model computes the same, in one product a weight. `unmerge` undoes it.

    A weight that is quantised must be read out to be merged (`dense`), and rounded again afterwards it is another
    model than the one that was trained.
    """
    return _fold(model, merged=True)


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Subtract the adapters again. The weights come back up to the rounding of one addition in their dtype."""
    return _fold(model, merged=False)


def _fold(model: nn.Module, *, merged: bool) -> nn.Module:
    for module in model.modules():
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        for adapter in module:
            if not isinstance(adapter, LoRA) or adapter.merged == merged:
                continue
            if len(module) > 1:
                raise ValueError("a quantised weight cannot be merged into: dequantise the model first")
            weight = module.original
            weight.add_(adapter.delta().to(weight.dtype), alpha=1 if merged else -1)
            adapter.merged = merged
    return model


def finish(model: nn.Module) -> nn.Module:
    """Merge and take the adapters off: a plain model again, which trains and saves as before."""
    merge(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    return model.requires_grad_(True)


def adapter_parameters(shape: tuple[int, int], rank: int) -> int:
    """Trained numbers for one matrix.

    >>> adapter_parameters((4096, 4096), 16)                # 0.8 % of the 16.8 million of the matrix
    131072
    """
    return rank * sum(shape)
