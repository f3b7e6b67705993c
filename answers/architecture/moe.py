"""The exercise of architecture/moe: the balance loss of Switch Transformers, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import torch

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: architecture/moe
import torch


def balance_loss(logits, experts):
    """How unevenly a router spreads its tokens: e * sum_i f_i * P_i, a scalar.

    logits [n, e] are the router's raw scores of n tokens for e experts; experts [n, k] are the
    numbers of the k experts that each token was sent to. f_i is the share of the n k choices
    that went to expert i, P_i the mean over the tokens of the softmax probability of expert i.
    1 if both are uniform. Gradients flow through P alone. Softmax and result are float32 for
    half-precision logits.
    """
    raise NotImplementedError
'''


def oracle(logits, experts):  # type: ignore[no-untyped-def]
    """The definition in float64, one expert after the other."""
    exponentials = torch.exp(logits.double() - logits.double().amax(dim=1, keepdim=True))
    total = sum(
        (experts == i).double().mean() * (exponentials[:, i] / exponentials.sum(dim=1)).mean()
        for i in range(logits.shape[1])
    )
    return (logits.shape[1] * total).to(torch.promote_types(logits.dtype, torch.float32))


def routed(n: int, e: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that favour the later experts, and the k best experts of each token."""
    logits = torch.randn(n, e, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 1, e)
    return logits.to(dtype), logits.topk(k, dim=-1).indices


def make_cases() -> list[Case]:
    collapsed = torch.full((6, 3), -20.0)
    collapsed[:, 1] = 20
    below = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]]).log()
    return [
        Case("uniform", (torch.zeros(8, 4), torch.arange(8)[:, None] % 4), {}, "eight tokens spread evenly over four"),
        Case("collapsed", (collapsed, torch.ones(6, 1).long()), {}, "every token goes to expert 1"),
        Case("below one", (below, below.argmax(dim=-1, keepdim=True)), {}, "shares and probabilities disagree"),
        Case("top-1", routed(40, 8, 1, 0), {}, "one expert a token"),
        Case("top-2", routed(40, 8, 2, 1), {}, "two experts a token"),
        Case("more experts than tokens", routed(3, 16, 4, 2), {}, "some experts get no token"),
        Case("half precision", routed(3, 16, 2, 5, torch.bfloat16), {}, "bfloat16 logits of three tokens"),
        Case("all experts", routed(5, 3, 3, 4), {}, "k = e: the shares are uniform whatever the router says"),
    ]


def gradient(function: Callable[..., Any]) -> str | None:
    """The gradient of e sum f P with f constant: e/n p (f - sum_i f_i p_i)."""
    logits, experts = routed(30, 6, 2, 5)
    logits = logits.double().requires_grad_()
    loss = function(logits, experts)
    if not loss.requires_grad:
        return "No gradient reaches the logits: P must stay attached to the graph, only the shares f are constants."
    (got,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(dim=-1)
    f = torch.stack([(experts == i).double().mean() for i in range(6)])
    if not torch.allclose(got, 6 / 30 * p * (f - (p @ f)[:, None]), rtol=1e-4, atol=1e-7):
        return "The value is right but its gradient is not: it is e/n p (f - sum f p), with the shares f constant."
    return None


SHARE = "share = expert_load(experts, e) / experts.numel()"
RETURN = "return e * (share * probability).sum()"
PROBABILITY = ".softmax(dim=-1).mean(dim=0)"
WIDE = "probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax"
WEIGHTED = "out = out * weights.flatten()[order, None]"
CHOICE = "weights = top.softmax(dim=-1) if renormalise else wide.softmax(dim=-1).gather(-1, experts)"

EXERCISE = Exercise(
    question="architecture/moe",
    module="architecture/moe",
    function="balance_loss",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-4,  # float32 sums of up to 64 probabilities
    atol=1e-6,
    wrong=(
        Wrong(
            "not times e",
            RETURN,
            "return (share * probability).sum()",
            "The factor e is missing: uniform routing gives 1/e instead of 1.",
        ),
        Wrong(
            "not divided by k",
            SHARE,
            "share = expert_load(experts, e) / len(experts)",
            "Counts are divided by the n tokens, not by the n k choices: uniform routing gives k instead of 1. "
            "(Hugging Face's Mixtral does this.)",
        ),
        Wrong(
            "only the first choice counted",
            SHARE,
            "share = expert_load(experts[:, :1], e) / len(experts)",
            "Only the first choice of each token is counted; the shares f are taken over all k choices.",
        ),
        Wrong(
            "squared shares",
            RETURN,
            "return e * (share * share).sum() + 0 * probability.sum()",
            "The loss is built from the shares alone, and no gradient flows through counts: the router cannot learn "
            "from it. One factor must be P.",
        ),
        Wrong(
            "mean of squared shares",
            RETURN,
            "return (share * share).mean() + 0 * probability.sum()",
            "This is the mean of the squared shares: counts have no gradient, so the router cannot learn from it, and "
            "its value if uniform is 1/e^2 instead of 1.",
        ),
        Wrong(
            "squared probabilities",
            RETURN,
            "return e * (probability * probability).sum()",
            "Only probabilities are used: the loss does not see which experts were chosen.",
        ),
        Wrong(
            "product before the means",
            RETURN,
            "return e * logits.float().softmax(dim=-1).gather(-1, experts).mean()",
            "Choice and probability were multiplied token by token and then averaged: first average each over the "
            "tokens, then multiply. As it stands it only punishes a confident router.",
        ),
        Wrong(
            "probabilities summed",
            PROBABILITY,
            ".softmax(dim=-1).sum(dim=0)",
            "The probabilities are summed over the tokens: take their mean, or the loss grows with the batch.",
        ),
        Wrong(
            "softmax over tokens",
            PROBABILITY,
            ".softmax(dim=0).mean(dim=0)",
            "The softmax runs over the tokens (dim=0); each token's probabilities run over the experts.",
        ),
        Wrong(
            "logits for probabilities",
            PROBABILITY,
            ".mean(dim=0)",
            "P is the mean of the raw logits: they must go through a softmax first.",
        ),
        Wrong(
            "softmax in half precision",
            WIDE,
            "probability = logits.softmax",
            "The softmax runs in the half precision of the logits: convert them to float32 first.",
        ),
        Wrong(
            "probabilities converted too late",
            WIDE + "(dim=-1)",
            "probability = logits.softmax(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))",
            "The probabilities are converted to float32 after the softmax, when they are rounded already: convert the "
            "logits before it.",
        ),
    ),
    also_wrong=(
        Wrong(
            "probabilities detached",
            PROBABILITY,
            ".softmax(dim=-1).mean(dim=0).detach()",
            "Without a gradient through P the loss is a number that nothing learns from.",
        ),
        Wrong(
            "never renormalised",
            CHOICE,
            "weights = wide.softmax(dim=-1).gather(-1, experts)",
            "The weights of the chosen experts sum to less than 1: the output shrinks as experts are added.",
        ),
        Wrong(
            "always renormalised",
            CHOICE,
            "weights = top.softmax(dim=-1)",
            "With one expert the weight is 1 and the router gets no gradient: Switch keeps the probability.",
        ),
        Wrong(
            "gate in half precision",
            "wide = logits.to(torch.promote_types(logits.dtype, torch.float32))\n    top",
            "wide = logits\n    top",
            "The router's probabilities are float32.",
        ),
        Wrong(
            "bias leaks into the weights",
            "weights = scores.gather(-1, experts)",
            "weights = (scores + bias).gather(-1, experts)",
            "The bias decides who is chosen; the weights are the scores without it.",
        ),
        Wrong(
            "bias without effect",
            "experts = (scores + bias).topk",
            "experts = scores.topk",
            "The bias takes part in the choice: without it the load stays uneven.",
        ),
        Wrong(
            "scale lost",
            "return weights * scale, experts",
            "return weights, experts",
            "The factor on the routed output is missing.",
        ),
        Wrong(
            "bias moved the wrong way",
            "torch.sign(load.mean() - load)",
            "torch.sign(load - load.mean())",
            "Experts with too many tokens must become less likely.",
        ),
        Wrong(
            "bias moved in proportion",
            "torch.sign(load.mean() - load)",
            "(load.mean() - load)",
            "The step is the sign alone; in proportion to counts it depends on the batch size.",
        ),
        Wrong(
            "tokens of the choices mixed up",
            "token = order // experts.shape[1]",
            "token = order % len(x)",
            "Choice i of the flattened n k belongs to token i // k.",
        ),
        Wrong(
            "weights not sorted along",
            WEIGHTED,
            "out = out * weights.flatten()[:, None]",
            "The rows were sorted by expert, their weights were not.",
        ),
        Wrong("weights forgotten", WEIGHTED, "pass", "The experts' outputs are added without the router's weights."),
        Wrong(
            "weights detached",
            WEIGHTED,
            "out = out * weights.detach().flatten()[order, None]",
            "No gradient reaches the router from the task.",
        ),
        Wrong(
            "last expert wins",
            ".index_add_(0, token, out).to",
            ".index_copy_(0, token, out).to",
            "The outputs of a token's experts are added, not overwritten.",
        ),
        Wrong(
            "not sorted",
            "order = experts.flatten().argsort(stable=True)",
            "order = torch.arange(experts.numel(), device=x.device)",
            "Blocks of rows belong to experts only after sorting by expert.",
        ),
        Wrong(
            "shared experts replace the routed ones",
            "out = out + swiglu_fused(tokens",
            "out = swiglu_fused(tokens",
            "Shared experts are added to the routed ones.",
        ),
        Wrong(
            "blocks end where they are long",
            "ends = load.cumsum(dim=0, dtype=torch.int32)",
            "ends = load.to(torch.int32)",
            "The grouped product takes the ends of the blocks, not their lengths.",
        ),
        Wrong(
            "load of the tokens, not of the choices",
            "chosen = experts.flatten()",
            "chosen = experts[:, 0]",
            "Every one of the k choices counts.",
        ),
        Wrong(
            "shared experts not active",
            "router + (k + shared) * expert",
            "router + k * expert",
            "A shared expert runs for every token: it is active.",
        ),
        Wrong(
            "experts touched without overlap",
            "return e * (1 - (1 - k / e) ** n)",
            "return float(min(e, n * k))",
            "Tokens share experts: n tokens touch fewer than n k.",
        ),
    ),
    probes=(Probe("gradient", gradient),),
    hints=(
        "f_i is a count divided by all n k choices: one_hot(experts, e) averaged over tokens and choices, or bincount.",
        "P_i is logits.softmax(dim=-1) in float32, averaged over the tokens (dim=0).",
        "Multiply f and P expert by expert, add up, times e. Do not detach P: it carries the only gradient.",
    ),
)
