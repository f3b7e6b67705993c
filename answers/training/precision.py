"""The exercise of training/precision: what a loss scaler does after backward(), and its wrong versions."""

import math
from collections.abc import Callable
from typing import Any

import torch

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: training/precision
import math

import torch


def scaled_step(weight, gradient, scale, good, *, rate, clip=math.inf,
                growth=2.0, backoff=0.5, interval=2000):
    """What a loss scaler does after backward(), around one step of SGD: (weight, scale, good).

    weight [n] is float32, gradient [n] that of the loss times `scale`, in float32 or float16; scale
    (float32) and good (int64) are tensors of no dimension: `good` counts the steps in a row without
    infinity or NaN since the scale last changed. Return all three as new tensors.

    In float32: divide the gradient by the scale. If all of it is finite, scale it down to a norm
    of `clip` where it is larger, and step: weight - rate * gradient. The `interval`-th good step in
    a row sets the count to 0 and, unless float32 would overflow, multiplies the scale by `growth`.
    If something is not finite: no step at all, the scale times `backoff`, count 0.
    """
    raise NotImplementedError
'''


def oracle(  # type: ignore[no-untyped-def]
    weight, gradient, scale, good, *, rate, clip=math.inf, growth=2.0, backoff=0.5, interval=2000
):
    """Python's numbers, one after the other."""
    true = [g / scale.item() for g in gradient.tolist()]
    if not all(map(math.isfinite, true)):
        return weight.clone(), scale * backoff, torch.zeros_like(good)
    norm = math.hypot(*true)
    shrink = clip / norm if norm > clip else 1.0
    moved = [w - rate * g * shrink for w, g in zip(weight.tolist(), true, strict=True)]
    if good.item() + 1 < interval:
        return torch.tensor(moved), scale.clone(), good + 1
    grown = scale * growth
    return torch.tensor(moved), grown if grown.isfinite() else scale.clone(), torch.zeros_like(good)


def case(name: str, asked: str, gradient: list[float], scale: float, good: int, /, **options: Any) -> Case:
    """A case; weights are 1, -2, 3 ..., `half=True` gives float16 gradients."""
    dtype = torch.float16 if options.pop("half", False) else torch.float32
    weight = torch.tensor([(i + 1.0) * (-1) ** i for i in range(len(gradient))])
    return Case(
        name, (weight, torch.tensor(gradient, dtype=dtype), torch.tensor(scale), torch.tensor(good)), options, asked
    )


def make_cases() -> list[Case]:
    inf, nan = math.inf, math.nan
    return [
        case("a good step", "divide, step, count", [8.0, -16.0, 4.0], 8.0, 3, rate=0.5),
        case("an infinity", "no step, half the scale", [8.0, inf, 4.0], 1024.0, 7, rate=0.5),
        case("a NaN", "NaN is not finite either", [8.0, nan, 4.0], 2.0, 7, rate=0.5, backoff=0.25, clip=1.0),
        case("growth", "the last good step of the interval", [8.0, -16.0], 8.0, 4, rate=0.5, interval=5, growth=4.0),
        case("before growth", "one good step fewer", [8.0, -16.0], 8.0, 3, rate=0.5, interval=5),
        case("clipped", "norm 5 in truth, 1 at most", [3072.0, 4096.0], 1024.0, 0, rate=1.0, clip=1.0),
        case("not clipped", "norm 0.5, 1 at most", [307.2, 409.6], 1024.0, 0, rate=1.0, clip=1.0),
        case("float16", "small numbers, divided in float32", [2.0**-20, 2.0**-14], 2.0**16, 0, rate=2.0**28, half=True),
        case("all zero", "underflow can not be seen", [0.0, 0.0], 2.0**16, 8, rate=1.0, clip=1.0),
        case("the end of float32", "the scale can not grow", [2.0**100, 1.0], 2.0**127, 1, rate=2.0**27, interval=2),
        case("a large sum", "finite, and the sum is not", [3e38, 3e38], 2.0**127, 0, rate=1.0),
    ]


def new_tensors(function: Callable[..., Any]) -> str | None:
    """What is given back is nobody else's, after a step that is made and after one that is skipped."""
    for last in (1.0, math.inf):
        given = case("", "", [2.0, last], 8.0, 3).args
        names = zip(("weight", "scale", "good"), function(*given, rate=0.5), strict=True)
        for name, result in names:
            if any(result.data_ptr() == x.data_ptr() for x in given):
                when = "after a step" if math.isfinite(last) else "where the step is skipped"
                return f"The {name} that comes back {when} is the tensor that was given: return a new one, a clone."
    return None


def finite_however_large(function: Callable[..., Any]) -> str | None:
    """Whether the step was skipped is seen in the scale; the weights may overflow by way of the norm."""
    given = case("", "", [1e38] * 4, 1.0, 0).args
    if function(*given, rate=1e-30)[1].item() != 1.0:
        return (
            "It skips the step of the gradient 1e38, 1e38, 1e38, 1e38 at scale 1, which is finite: its sum and its "
            "norm overflow by themselves. Look at each number."
        )
    return None


STEP = "moved = weight - rate * true if finite else weight.clone()"
COPY = "true = gradient.to(torch.float32, copy=True)"
LOOK = "finite = unscale([true], scale.item())"
CLIP = "true *= min(1.0, clip / max(true.norm().item(), 1e-30))"
BACK = "return float32(scale * backoff), 0"
GROW = "return (float32(larger) if larger < 2.0**128 else scale), 0"
MINE = "        if self._finite[id(optimizer)]:\n            optimizer.step()\n"
COPIES = "            weight.copy_(copy)\n"
FORMATS = "training/formats"
ROUNDING = "training/rounding"
EVEN = "return kept + (rest > half or (rest == half and kept % 2 == 1))"
SUBNORMAL = "value = math.ldexp(mantissa, 1 - format.bias - format.mantissa)"

EXERCISE = Exercise(
    question="training/precision",
    module="training/precision",
    function="scaled_step",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("weight", "scale", "good"),
    rtol=1e-5,  # float32: a reciprocal, a product, a norm of a few numbers
    atol=1e-7,
    wrong=(
        Wrong(
            "no skip",
            STEP,
            "moved = weight - rate * true",
            "It steps although the gradient is not finite: one infinity or NaN and the weights are lost.",
        ),
        Wrong(
            "skips single numbers",
            STEP,
            "moved = torch.where(true.isfinite(), weight - rate * true, weight)",
            "It leaves out only the numbers that are not finite: one of them spoils the whole step, skip all of it.",
        ),
        Wrong(
            "not unscaled",
            "inverse = float32(1 / scale)",
            "inverse = 1.0",
            "The gradient is still times the scale: divide it before the step.",
        ),
        Wrong(
            "divided in float16",
            COPY,
            "true = gradient.clone()",
            "float16 gradients are divided in float16, where they vanish again: go to float32 first.",
        ),
        Wrong(
            "clipped before it is divided",
            f"    {LOOK}\n    {CLIP}\n",
            f"    {CLIP}\n    {LOOK}\n",
            "It clips the scaled gradient, whose norm is `scale` times too large, and so the step nearly vanishes: "
            "divide first.",
        ),
        Wrong("not clipped", CLIP, "true *= 1.0", "`clip` is not used: a norm above it is scaled down to it."),
        Wrong(
            "clipped up",
            CLIP,
            "true *= clip / max(true.norm().item(), 1e-30) if clip < math.inf else 1.0",
            "It scales small gradients up to `clip`: only a larger norm changes.",
        ),
        Wrong(
            "clipped up, zeros too",
            CLIP,
            "true *= clip / true.norm() if clip < math.inf else 1.0",
            "It scales every gradient to the norm `clip`, and a gradient of zeros to NaN: only a larger norm changes.",
        ),
        Wrong(
            "clipped one by one",
            CLIP,
            "true.clamp_(-clip, clip)",
            "It clips each number: scale the whole gradient, so that its norm is `clip` and its direction stays.",
        ),
        Wrong(
            "no back-off",
            BACK,
            "return scale, 0",
            "After an infinity the scale stays: the next step overflows as well. Multiply it by `backoff`.",
        ),
        Wrong(
            "back-off by growth",
            BACK,
            "return float32(scale / growth), 0",
            "It backs off by 1 / growth: `backoff` is a factor of its own.",
        ),
        Wrong(
            "count goes on after an infinity",
            BACK,
            "return float32(scale * backoff), good",
            "The good steps must be in a row: an infinity sets the count to 0.",
        ),
        Wrong(
            "an infinity is counted",
            BACK,
            "return float32(scale * backoff), good + 1",
            "A step with an infinity is counted as a good one: it sets the count to 0.",
        ),
        Wrong("no growth", GROW, "return scale, 0", "The scale never grows: it must, after `interval` good steps."),
        Wrong(
            "count goes on after growth",
            GROW,
            "return (float32(larger) if larger < 2.0**128 else scale), good + 1",
            "After growth the count starts again at 0, or the scale doubles at every step from then on.",
        ),
        Wrong(
            "grows one step late",
            "if good + 1 < interval:",
            "if good < interval:",
            "It grows one step late: this good step counts, too.",
        ),
        Wrong(
            "grows at every good step",
            "if good + 1 < interval:",
            "if False:",
            "The scale grows at every good step: it takes `interval` of them in a row.",
        ),
        Wrong(
            "looks for infinity only",
            "whole = [gradient.mul_(inverse).isfinite().all() for gradient in gradients]",
            "whole = [~gradient.mul_(inverse).isinf().any() for gradient in gradients]",
            "It looks for infinity only: NaN is not finite either.",
        ),
        Wrong(
            "looks at the sum",
            LOOK,
            "finite = unscale([true], scale.item()) and bool(gradient.sum().isfinite())",
            "It asks whether the sum of the scaled gradient is finite: a sum of finite numbers can overflow by itself.",
        ),
        Wrong(
            "looks at the norm",
            LOOK,
            "finite = unscale([true], scale.item()) and bool(gradient.float().norm().isfinite())",
            "It asks whether the norm of the scaled gradient is finite: squares of finite numbers can overflow.",
        ),
        Wrong(
            "zeros count as bad",
            LOOK,
            "finite = unscale([true], scale.item()) and bool(true.any())",
            "It takes a gradient of zeros for a bad step: underflow can not be seen, 0 is finite.",
        ),
        Wrong(
            "grows beyond float32",
            "(float32(larger) if larger < 2.0**128 else scale)",
            "larger",
            "It grows where float32 ends, and the scale is infinite: then it stays as it is.",
        ),
        Wrong(
            "grows up to the end of float32",
            "(float32(larger) if larger < 2.0**128 else scale)",
            "min(larger, (2 - 2.0**-23) * 2.0**127)",
            "It grows to the largest number of float32: where a whole step up is too much, the scale stays as it is.",
        ),
    ),
    also_wrong=(
        Wrong("a scaler without a skip", MINE, "        optimizer.step()\n", "A step with infinities is skipped."),
        Wrong(
            "all skip together",
            MINE,
            "        if all(self._finite.values()):\n            optimizer.step()\n",
            "Each optimizer skips for itself.",
        ),
        Wrong(
            "looks at the first only",
            "return bool(torch.stack(whole).all())",
            "return bool(whole[0])",
            "An infinity in any gradient spoils the step.",
        ),
        Wrong(
            "one optimizer decides the scale",
            "all(self._finite.values()), **self.options)",
            "list(self._finite.values())[-1], **self.options)",
            "The scale backs off if any optimizer skipped.",
        ),
        Wrong(
            "unscaled twice",
            "        if id(optimizer) not in self._finite:\n            self.unscale_(optimizer)\n",
            "        self._finite.pop(id(optimizer), None)\n        self.unscale_(optimizer)\n",
            "Gradients that were unscaled for clipping are not unscaled again.",
        ),
        Wrong(
            "scale in the dtype of the loss",
            "return loss * torch.tensor(self.value, device=loss.device)",
            "return loss * self.value",
            "float16 does not hold a loss times 65536.",
        ),
        Wrong(
            "count not in the state",
            'self.value, self.good = state["scale"], state["_growth_tracker"]',
            'self.value = state["scale"]',
            "The state has the count of good steps.",
        ),
        Wrong(
            "map without autocast",
            "with torch.no_grad(), torch.autocast(place.type, dtype=dtype):",
            "with torch.no_grad(), torch.autocast(place.type, dtype=dtype, enabled=False):",
            "The map is that of autocast.",
        ),
        Wrong(
            "masters in 16 bits",
            "[weight.detach().float().clone().requires_grad_() for weight in self.weights]",
            "[weight.detach().clone().requires_grad_() for weight in self.weights]",
            "The masters are float32, or small updates are lost.",
        ),
        Wrong(
            "masters rounded at every step",
            COPIES,
            f"{COPIES}            copy.copy_(weight)\n",
            "What rounding takes from the weight must stay in the master.",
        ),
        Wrong(
            "half of the moments",
            "if isinstance(value, Tensor) and value.ndim],",
            "if isinstance(value, Tensor) and value.ndim][::2],",
            "AdamW holds two numbers of 4 bytes a parameter.",
        ),
        Wrong(
            "ties go up",
            EVEN,
            "return kept + (rest >= half)",
            "Half way goes to the even neighbour: always up, sums drift.",
            FORMATS,
        ),
        Wrong("cut off", EVEN, "return kept", "Digits that do not fit are rounded, not cut off.", FORMATS),
        Wrong("no subnormals", SUBNORMAL, "value = 0.0", "Field 0 has numbers: they fade to zero evenly.", FORMATS),
        Wrong(
            "bias one too large",
            "return 2 ** (self.exponent - 1) - 1",
            "return 2 ** (self.exponent - 1)",
            "The bias is 2^(bits - 1) - 1: 127 of 8 bits.",
            FORMATS,
        ),
        Wrong(
            "E4M3 ends at 240",
            "return last if self.infinities else last | (2**self.mantissa - 1)",
            "return last",
            "E4M3FN uses the last exponent field for numbers: it ends at 448.",
            FORMATS,
        ),
        Wrong(
            "gradients not rounded",
            "return x.to(dtype).to(x.dtype)",
            "return x + (x.to(dtype).to(x.dtype) - x).detach()",
            "The gradients go through 16 bits as well.",
            ROUNDING,
        ),
        Wrong(
            "results not rounded",
            "return through(exact, self.dtype)",
            "return exact",
            "A product's result is written in 16 bits, and its gradient read in 16 bits.",
            ROUNDING,
        ),
        Wrong(
            "zeros counted",
            "there = gradients[gradients != 0]",
            "there = gradients",
            "A gradient that was 0 before did not vanish.",
            ROUNDING,
        ),
    ),
    probes=(Probe("new tensors", new_tensors), Probe("finite, however large", finite_however_large)),
    hints=(
        "Go to float32 with a copy: gradient.to(torch.float32, copy=True), then divide by the scale, then look: "
        "isfinite().all().",
        "Not finite: return the weight's copy, scale * backoff, and a count of 0. That is all.",
        "Finite: the norm of the divided gradient decides on clipping. Then good + 1: if it has reached `interval`, "
        "the scale grows and the count is 0; scale * growth may be infinite, then keep the scale.",
    ),
)
