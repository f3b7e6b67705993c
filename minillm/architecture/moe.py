"""Mixture of experts: many feed-forward layers, and a router that picks a few of them for each token.

Idea:        A linear router scores e experts for each token; the k best run, and their outputs are added with the
             router's weights. Parameters grow with e, arithmetic with k. Left alone the router favours few experts,
             so a loss, or a bias that only the selection sees, evens out the load. Tokens are sorted by expert, so that
             each expert multiplies one block of rows.
Cost:        3 k c f + e c multiply-adds a token, 3 e c f parameters, all of them resident. A batch touches nearly
             every expert, so decoding reads far more weights than its arithmetic suggests.
Paper:       Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961,
             equations 4-6 (balance loss); Wang et al. 2024, arXiv:2408.15664, algorithm 1 (bias); DeepSeek-AI 2024,
             arXiv:2412.19437, equations 12-16 (sigmoid gate).
Production:  transformers MixtralSparseMoeBlock, Qwen3MoeSparseMoeBlock, DeepseekV3MoE (one group).
Leaves out:  limits on an expert's tokens and dropping, groups of experts, experts on several devices, router z-loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.architecture.feedforward import swiglu_fused


def softmax_gate(
    logits: Float[Tensor, "n e"], k: int, *, renormalise: bool = True
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Weights (float32 or better) and numbers of the k experts of each token, the best first.

    Renormalised, the weights of a token sum to 1: the softmax over the chosen logits alone. With k = 1 that weight
    is 1 whatever the router says, so the router learns nothing from the task: Switch (k = 1) keeps the probability.

    >>> softmax_gate(torch.tensor([[1.0, 2.0, 3.0]]).log(), 2)          # probabilities 1/6, 2/6, 3/6
    (tensor([[0.6000, 0.4000]]), tensor([[2, 1]]))
    """
    check_choice(logits, k)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, experts = wide.topk(k, dim=-1)
    weights = top.softmax(dim=-1) if renormalise else wide.softmax(dim=-1).gather(-1, experts)
    return weights, experts


def sigmoid_gate(
    logits: Float[Tensor, "n e"], bias: Float[Tensor, " e"], k: int, *, renormalise: bool = True, scale: float = 1.0
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Like `softmax_gate`, with a score of its own for every expert. The bias decides who is chosen, not the weights.

    >>> sigmoid_gate(torch.tensor([[0.0, 1.0, -3.0]]), torch.tensor([0.0, 0.0, 9.0]), 2)       # scores 0.5, 0.73, 0.05
    (tensor([[0.0609, 0.9391]]), tensor([[2, 1]]))
    """
    check_choice(logits, k)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    experts = (scores + bias).topk(k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, experts


def expert_load(experts: Int[Tensor, "n k"], e: int) -> Int[Tensor, " {e}"]:
    """How many tokens each expert gets. Unlike torch.bincount it does not wait for the device.

    >>> expert_load(torch.tensor([[0, 2], [2, 1], [2, 0]]), 4)
    tensor([2, 1, 3, 0])
    """
    chosen = experts.flatten()
    return torch.zeros(e, dtype=torch.long, device=chosen.device).index_add_(0, chosen, torch.ones_like(chosen))


def balance_loss(logits: Float[Tensor, "n e"], experts: Int[Tensor, "n k"]) -> Float[Tensor, ""]:
    """e sum_i f_i P_i: share of the choices times mean probability. 1 if both are uniform, e if all is one expert.

    The shares f are counts, through which no gradient flows; P is pushed down where f is high. Uniform is not the
    minimum: shares and probabilities that disagree give less than 1. Leave padding out before calling.

    >>> balance_loss(torch.zeros(4, 2), torch.tensor([[0], [1], [0], [1]]))
    tensor(1.)
    """
    if len(logits) != len(experts) or len(logits) == 0:
        raise ValueError(f"one row for each of n > 0 tokens, got logits {len(logits)}, experts {len(experts)}")
    e = logits.shape[-1]
    share = expert_load(experts, e) / experts.numel()
    probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).mean(dim=0)
    return e * (share * probability).sum()


@torch.no_grad()
def update_bias(bias: Float[Tensor, " e"], load: Int[Tensor, " e"], *, rate: float = 1e-3) -> Float[Tensor, " e"]:
    """The selection bias after a step: `rate` up for experts with less than the mean load, down for those with more.

    >>> update_bias(torch.zeros(3), torch.tensor([1, 2, 3]))
    tensor([ 0.0010,  0.0000, -0.0010])
    """
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def run_in_turn(
    rows: Float[Tensor, "m c"],
    load: Int[Tensor, " e"],
    gate_up: Float[Tensor, "e two_f c"],
    down: Float[Tensor, "e c f"],
) -> Float[Tensor, "m c"]:
    """One expert after the other on its block of rows; `load` is the blocks' lengths. Waits once for the device."""
    blocks = rows.split(load.tolist())
    # unbind, not gate_up[i]: the gradient of an index is a tensor of zeros as large as all experts, each time
    return torch.cat([swiglu_fused(*args) for args in zip(blocks, gate_up.unbind(), down.unbind(), strict=True)])


def run_grouped(
    rows: Float[Tensor, "m c"],
    load: Int[Tensor, " e"],
    gate_up: Float[Tensor, "e two_f c"],
    down: Float[Tensor, "e c f"],
) -> Float[Tensor, "m c"]:
    """The same as `run_in_turn` without a loop: one grouped product for all experts. Not for float64.

    In bfloat16 torch.compile makes one graph of it; `run_in_turn` breaks the graph where it waits.
    """
    ends = load.cumsum(dim=0, dtype=torch.int32)
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)


def mix_experts(
    x: Float[Tensor, "n c"],
    weights: Float[Tensor, "n k"],
    experts: Int[Tensor, "n k"],
    gate_up: Float[Tensor, "e two_f c"],
    down: Float[Tensor, "e c f"],
    *,
    run: Callable[..., Tensor] = run_in_turn,
) -> Float[Tensor, "n c"]:
    """The weighted sum of each token's experts, in the dtype of x. Every token is computed, whatever the load."""
    order = experts.flatten().argsort(stable=True)  # the n k choices, those of expert 0 first
    token = order // experts.shape[1]
    out = run(x.index_select(0, token), expert_load(experts, len(down)), gate_up, down)
    out = out * weights.flatten()[order, None]
    return torch.zeros_like(x, dtype=out.dtype).index_add_(0, token, out).to(x.dtype)


class Routing(NamedTuple):
    """What the router decided for the n tokens of a call: the input of `balance_loss` and `expert_load`."""

    logits: Float[Tensor, "n e"]
    weights: Float[Tensor, "n k"]
    experts: Int[Tensor, "n k"]


class MoE(nn.Module):
    """A layer of SwiGLU experts in the place of one feed-forward layer; `shared` experts run for every token."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        k: int,
        shared: int = 0,
        renormalise: bool = True,
        run: Callable[..., Tensor] = run_in_turn,
    ) -> None:
        super().__init__()
        self.k, self.renormalise, self.run = k, renormalise, run
        self.router = nn.Parameter(torch.empty(experts, width))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.shared_gate_up = nn.Parameter(torch.empty(2 * shared * hidden, width)) if shared else None
        self.shared_down = nn.Parameter(torch.empty(width, shared * hidden)) if shared else None
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def gate(self, logits: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Weights and numbers of each token's experts."""
        return softmax_gate(logits, self.k, renormalise=self.renormalise)

    def forward(self, x: Float[Tensor, "*b c"]) -> tuple[Float[Tensor, "*b c"], Routing]:
        """The output, and what the router decided, for the balance loss."""
        tokens = x.flatten(0, -2)
        logits = F.linear(tokens, self.router)
        weights, experts = self.gate(logits)
        out = mix_experts(tokens, weights, experts, self.gate_up, self.down, run=self.run)
        if self.shared_gate_up is not None and self.shared_down is not None:
            out = out + swiglu_fused(tokens, self.shared_gate_up, self.shared_down)
        return out.view_as(x), Routing(logits, weights, experts)


class BiasBalancedMoE(MoE):
    """DeepSeek-V3's layer: a sigmoid gate, and a selection bias that `rebalance` moves instead of a loss."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int,
        k: int,
        shared: int = 0,
        scale: float = 1.0,
        run: Callable[..., Tensor] = run_in_turn,
    ) -> None:
        super().__init__(width, hidden, experts=experts, k=k, shared=shared, run=run)
        self.scale = scale
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts))

    def gate(self, logits: Float[Tensor, "n e"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Weights and numbers of each token's experts; the bias takes part in the choice only."""
        return sigmoid_gate(logits, self.bias, self.k, renormalise=self.renormalise, scale=self.scale)

    def rebalance(self, routing: Routing, *, rate: float = 1e-3) -> None:
        """Move the bias after an optimizer step by what the step's tokens were given."""
        self.bias.copy_(update_bias(self.bias, expert_load(routing.experts, len(self.bias)), rate=rate))


def layer_parameters(width: int, hidden: int, *, experts: int, k: int, shared: int = 0) -> tuple[int, int]:
    """Weights of a layer of SwiGLU experts, and how many of them one token uses: the router, k routed, all shared.

    >>> layer_parameters(4096, 14336, experts=8, k=2)            # a layer of Mixtral 8x7B
    (1409318912, 352354304)
    """
    router, expert = experts * width, 3 * width * hidden
    return router + (experts + shared) * expert, router + (k + shared) * expert


def experts_touched(n: int, e: int, k: int) -> float:
    """How many of e experts n tokens use between them, expected where every choice of k is equally likely.

    A token leaves an expert out with probability 1 - k/e. Uneven routing touches fewer.

    >>> [round(experts_touched(n, 64, 8), 1) for n in (1, 4, 16, 64)]
    [8.0, 26.5, 56.4, 64.0]
    """
    return e * (1 - (1 - k / e) ** n)


def check_choice(logits: Tensor, k: int) -> None:
    """Refuse a k that is no number of experts."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of experts, got k={k}, e={logits.shape[-1]}")
