"""A copy of a model whose weights lie in memory as a CPU's products of a few rows read them.

Idea:        A decoding step multiplies one row a sequence with every weight, so it is as fast as the weights arrive.
             `F.linear` with a single row takes dot products along rows of the weight; stored by columns, the same
             numbers are added up as they lie, in full vectors. For 2 to about 64 rows oneDNN's blocked order keeps a
             block in registers for all rows. Shapes and values stay; only the order in memory differs.
Cost:        Memory of the weights once more, and one pass over them. Faster by 1.3 to 1.6 on the machines tried.
Paper:       Shazeer 2019, arXiv:1911.02150, section 2.4: decoding is limited by memory, not by arithmetic.
Production:  torch.compile with freezing on a CPU packs weights in the same way, with the same two functions.
Leaves out:  GPUs, half precision (packed by PyTorch itself) and stacked experts, which are used as they are.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.architecture.transformer import Transformer


def by_columns(weight: Tensor) -> Tensor:
    """The same matrix, its columns one after the other in memory.

    >>> by_columns(torch.zeros(2, 3)).stride()
    (1, 2)
    """
    return weight.t().contiguous().t()


class Packed(Tensor):
    """A matrix in oneDNN's blocked order, made for about `rows` rows at a time. `F.linear` is all it can do."""

    blocks: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor, rows: int) -> "Packed":
        shape_only = torch.empty((), dtype=weight.dtype).expand(weight.shape)
        packed = Tensor._make_subclass(cls, shape_only)
        packed.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return packed

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and len(args) == 2:
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1].blocks, None, "none", [], "")
        return super().__torch_function__(function, types, args, kwargs or {})


def for_decoding(model: Transformer, *, batch: int = 1) -> Transformer:
    """A model for `generate` with `batch` sequences: the same function as `model` now is. It has no parameters, so it
    neither trains nor follows `model` when that is trained further. Without float32 weights on a CPU, `model` itself.
    """
    if model.embedding.device.type != "cpu" or model.embedding.dtype != torch.float32:
        return model
    packs = batch > 1 and torch.backends.mkldnn.is_available()
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo=parameters).eval()  # modules of its own around the same tensors
    twin.head = model.unembedding  # type: ignore[assignment]
    for module in twin.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            weight = parameter.detach()
            delattr(module, name)
            if weight.ndim == 2 and name != "embedding":  # of which rows are taken
                weight = Packed(weight, batch) if packs else by_columns(weight)
            setattr(module, name, weight)
    return twin
