"""ZeRO stage 3: the weights are sharded, too, and whole only while a layer is at work.

Idea:        Between steps a rank holds one N-th of everything. A layer's weights are gathered just before its forward
             pass and freed after it, gathered again for its backward pass, and freed when its gradients are on their
             way. Activations are not sharded, and every rank still computes whole layers: it is data parallelism.
Cost:        16 p/N bytes a rank for p parameters (2 + 2 + 12 bytes each). At the peak also the whole weights and
             gradients of one layer, and the whole weights of what is outside the layers (embedding, final norm, head),
             which stay for a whole pass. 3 p (N - 1)/N numbers sent a step, 1.5 times plain data parallelism: two
             gathers take the place of the one after the step in stages 1 and 2.
Paper:       Rajbhandari et al. 2019, "ZeRO", arXiv:1910.02054, sections 5.3 and 7.2.2; Zhao et al. 2023, "PyTorch
             FSDP", arXiv:2304.11277, section 3.2.
Production:  torch.distributed.fsdp.fully_shard (FSDP2), which does not free the part outside the layers after the
             forward pass and shards every parameter along its first axis; DeepSpeed's zero_optimization.stage 3.
Leaves out:  gathering the next layer ahead, starting from a model that no rank ever holds whole, calls that go around
             the module's `forward`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from minillm.distributed.collectives import Traffic, chunks, ring_all_gather
from minillm.distributed.zero import Bucket, Stage2


class Unit(Bucket):
    """The parameters of a module that are gathered and freed together. Freed, they are empty tensors."""

    def __init__(
        self, module: nn.Module, parameters: Sequence[nn.Parameter], traffic: Traffic, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(parameters, traffic, dtype)
        self.module = module
        mine = self.shard.clone()  # the whole buffer will be freed
        if self.master is self.shard:
            self.master = mine
        self.shard = mine
        self.free()

    def free(self) -> None:
        """Give the memory of the whole weights back. What autograd saved still points there: gather fills it again."""
        self.whole.untyped_storage().resize_(0)
        for parameter in self.parameters:
            parameter.data = self.shard.new_empty(0)

    @torch.no_grad()
    def gather(self) -> None:
        """Have the whole weights from all ranks, at the place where they were; nothing happens if they are there."""
        if self.whole.untyped_storage().nbytes():
            return
        self.whole.untyped_storage().resize_(self.whole.numel() * self.whole.element_size())
        chunks(self.whole, self.traffic)[self.traffic.rank].copy_(self.shard)
        ring_all_gather(self.whole, self.traffic)
        self.attach()


def units(
    model: nn.Module, modules: Iterable[nn.Module], traffic: Traffic, *, dtype: torch.dtype | None = None
) -> list[Unit]:
    """One unit for each of the modules, and one for the parameters of the model that are in none of them.

    ValueError: a parameter is in two of the modules.
    """
    found, taken = [], set[nn.Parameter]()
    for module in modules:
        parameters = list(module.parameters())
        if taken.intersection(parameters):
            raise ValueError("a parameter must be in one unit, got it in two: give modules that share nothing")
        taken.update(parameters)
        found.append((module, parameters))
    rest = [p for p in model.parameters() if p not in taken]
    if rest:
        found.append((model, rest))
    return [Unit(module, parameters, traffic, dtype) for module, parameters in found]


def _enter(unit: Unit, *of_hook: Any) -> None:
    unit.gather()


def _leave(unit: Unit, module: nn.Module, args: Any, out: Any) -> None:
    """After the forward pass. The first gradient that arrives at an output begins the unit's backward pass."""
    outs = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(x, torch.Tensor) for x in outs):
        raise TypeError(f"a unit must return a tensor or a tuple of tensors, got {type(out).__name__}: wrap it in one")
    unit.free()
    for x in outs:
        if x.requires_grad:
            x.register_hook(partial(_enter, unit))


class Stage3(Stage2):
    """Stage 2, with the weights sharded as well. The model must be called, `model(x)`, so that its hooks run."""

    def __init__(self, buckets: Sequence[Unit], **options: Any) -> None:
        super().__init__(buckets, **options)
        self.units = list(buckets)
        for unit in self.units:
            unit.module.register_forward_pre_hook(partial(_enter, unit))
            unit.module.register_forward_hook(partial(_leave, unit))

    def finish(self, bucket: Bucket) -> None:
        """Send the gradients; nothing needs the weights any more."""
        super().finish(bucket)
        assert isinstance(bucket, Unit)
        bucket.free()

    def publish(self) -> None:
        """Nothing to send: the next forward pass gathers the new weights."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are whole inside, on every rank: for a checkpoint, or to look at them. All ranks must enter."""
        for unit in self.units:
            unit.gather()
        try:
            yield
        finally:
            for unit in self.units:
                unit.free()
