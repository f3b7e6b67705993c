"""Adam with its two running means in 8 bits: 2 bytes a weight instead of 8.

Idea:        The means are quantised between steps, in blocks that have a scale of their own, to levels that are spaced
             by a ratio rather than evenly: a mean square spans many decades within one tensor, and its small values
             decide the largest steps. Each step reads a tensor's means out, makes the step of Adam in float32, and
             quantises them again.
Cost:        2 + 8/256 bytes a weight. Numbers in float32 for one tensor at a time.
Paper:       Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2.
Production:  bitsandbytes.optim.AdamW8bit.
Leaves out:  float32 states for small tensors and embeddings, which bitsandbytes keeps; paging to main memory.
"""

from typing import Any

import torch
from torch import Tensor

from minillm.finetuning.nf4 import dequantise_blocks, dynamic_levels, quantise_blocks
from minillm.training.optimizers import AdamW, adamw_step

BLOCK = 256  # numbers that share a scale


class AdamW8bit(AdamW):
    """`adamw_step` with means kept in 8 bits. Weights may be in any precision: the step is made in float32.

    >>> weight = torch.ones(1000, requires_grad=True)
    >>> optimizer = AdamW8bit([weight], 0.1, weight_decay=0.0)
    >>> weight.sum().backward(); optimizer.step()
    >>> round(weight[0].item(), 3)                          # a first step of lr, as Adam's
    0.9
    """

    def begin(self, weight: Tensor) -> dict[str, Any]:
        """Codes and scales of two means of zero."""
        zeros = torch.zeros(weight.numel(), device=weight.device)
        return {name: quantise_blocks(zeros, levels, BLOCK) for name, levels in LEVELS.items()}

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step, in place."""
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        means = {}
        for name, levels in LEVELS.items():
            codes, largest = state[name]
            means[name] = dequantise_blocks(codes, largest, levels, BLOCK).view_as(weight)
        wide = weight.float()
        adamw_step(wide, grad.float(), means["mean"], means["square"], state["step"], **options)
        weight.copy_(wide)
        for name, levels in LEVELS.items():
            state[name] = quantise_blocks(means[name].flatten(), levels, BLOCK)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state. PyTorch's own would cast codes and scales to the dtype of the weights."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for weight, number in zip(weights, saved, strict=True):
            memory = state_dict["state"].get(number, {})
            for name in LEVELS.keys() & memory.keys():
                self.state[weight][name] = tuple(part.to(weight.device, copy=True) for part in memory[name])


LEVELS = {"mean": dynamic_levels(), "square": dynamic_levels(signed=False)}
