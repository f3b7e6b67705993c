"""The exercise of training/schedule: the learning rate of warm-up, stable, decay, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import torch

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: training/schedule
import torch


def wsd_schedule(steps, *, warmup, total, decay, floor=0.0):
    """The factor on the peak learning rate at each of the steps: warm-up, stable, decay.

    steps [n] are whole numbers from 0 up, in any order; the result is float32 [n]. The factor
    rises in a straight line from 0 at step 0 to 1 at step `warmup` (with warmup=0 it is 1 at
    once). The last `decay` steps before `total` follow 1 - sqrt(x), where x goes from 0 to 1
    over these steps, scaled so that the factor goes from 1 down to `floor`. Between the two it
    is 1, after `total` it stays at `floor`. There may be no decay (decay=0), or no stable phase.
    """
    raise NotImplementedError
'''


def oracle(steps, *, warmup, total, decay, floor=0.0):  # type: ignore[no-untyped-def]
    """One step after the other, by the phase that it is in."""
    factors = []
    for step in steps.double().tolist():
        if step < warmup:
            factors.append(step / warmup)
        elif step <= total - decay:
            factors.append(1.0)
        elif step >= total:
            factors.append(floor)
        else:
            factors.append(1 - (1 - floor) * ((step - (total - decay)) / decay) ** 0.5)
    return torch.tensor(factors, dtype=torch.float64).float()


def make_cases() -> list[Case]:
    return [
        Case("short run", (torch.arange(11),), {"warmup": 2, "total": 10, "decay": 4}, "10 steps: 2 up, 4 down"),
        Case("floor", (torch.arange(101),), {"warmup": 10, "total": 100, "decay": 30, "floor": 0.1}, "down to 0.1"),
        Case("no warm-up", (torch.arange(21),), {"warmup": 0, "total": 20, "decay": 5}, "warmup=0: no division by 0"),
        Case("no decay", (torch.arange(20),), {"warmup": 5, "total": 20, "decay": 0}, "decay=0: it stays at 1"),
        Case(
            "no stable phase",
            (torch.arange(21),),
            {"warmup": 8, "total": 20, "decay": 12, "floor": 0.2},
            "up, then down",
        ),
        Case(
            "after the end",
            (torch.arange(35, 60),),
            {"warmup": 4, "total": 40, "decay": 10, "floor": 0.05},
            "steps after `total`: the floor",
        ),
        Case(
            "any order",
            (torch.tensor([90, 3, 55, 100, 0, 81, 3]),),
            {"warmup": 10, "total": 100, "decay": 20},
            "steps that are not 0, 1, 2 ...",
        ),
        Case(
            "a long run",
            (torch.arange(0, 1_000_001, 50_000),),
            {"warmup": 2000, "total": 1_000_000, "decay": 200_000, "floor": 0.01},
            "a million steps",
        ),
    ]


def numbers_its_own_steps(function: Callable[..., Any]) -> str | None:
    """The steps are values, not positions."""
    options = {"warmup": 10, "total": 40, "decay": 10}
    if torch.equal(function(torch.tensor([5, 35, 60]), **options), function(torch.arange(3), **options)):
        return "The result does not depend on `steps`: use their values, not their positions 0, 1, 2."
    return None


def stable_phase(function: Callable[..., Any]) -> str | None:
    """What WSD is for: before the decay nothing depends on the length of the run."""
    steps = torch.arange(80)
    short, long = (function(steps, warmup=10, total=total, decay=20) for total in (100, 500))
    if not torch.equal(short, long):
        return "The first 80 steps of a run of 100 and of one of 500 differ: before the decay nothing depends on total."
    return None


DOWN = "down = cooldown(progress(step, total - decay, total)) if step > total - decay else 1.0"
SCALED = "return linear_warmup(step, warmup=warmup) * (floor + (1 - floor) * down)"
WARM = "return min(1.0, step / warmup) if warmup else 1.0"
COOL = "return 1 - math.sqrt(x)"
FALL = "fall = (1 - math.cos(math.pi * progress(step, warmup, total))) / 2"
RULE = 'new / old if optimizer == "sgd" else math.sqrt(new / old)'
BISECT = "factor ** bisect_right(milestones, step)"
OPTIMIZERS = "training/optimizers"
SCALING = "training/scaling"
SIZE = "size = (square / (1 - beta2**step)).sqrt_().add_(eps)"
STEP = "weight.addcdiv_(mean, size, value=-lr / (1 - beta1**step))"
DECAY = "    weight.mul_(1 - lr * weight_decay)\n    mean.lerp_(grad, 1 - beta1)\n"

EXERCISE = Exercise(
    question="training/schedule",
    module="training/schedule",
    function="wsd_schedule",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("factors",),
    rtol=1e-5,  # float32; a step number of a million has 7 digits
    atol=1e-6,
    wrong=(
        Wrong(
            "no warm-up",
            SCALED,
            "return floor + (1 - floor) * down",
            "The factor is 1 from the first step: the linear warm-up is missing.",
        ),
        Wrong(
            "warm-up for ever",
            WARM,
            "return step / warmup if warmup else 1.0",
            "The warm-up goes on rising after its end: the factor is at most 1.",
        ),
        Wrong(
            "warm-up starts one step late",
            WARM,
            "return min(1.0, max(0, step - 1) / warmup) if warmup else 1.0",
            "The warm-up reaches 1 one step too late: step `warmup` already has the factor 1.",
        ),
        Wrong(
            "warm-up counts from 1",
            WARM,
            "return min(1.0, (step + 1) / warmup) if warmup else 1.0",
            "The warm-up is one step ahead: step 0 has the factor 0, step `warmup` is the first with 1.",
        ),
        Wrong(
            "warm-up from the floor",
            SCALED,
            "return floor + (1 - floor) * linear_warmup(step, warmup=warmup) * down",
            "The floor is the end of the decay only: the warm-up starts at 0.",
        ),
        Wrong(
            "decay starts after the warm-up",
            DOWN,
            "down = cooldown(progress(step, warmup, total)) if step > warmup else 1.0",
            "There is no stable phase: the decay takes the last `decay` steps only.",
        ),
        Wrong(
            "decay over the whole run",
            DOWN,
            "down = cooldown(progress(step, 0, total)) if step > total - decay else 1.0",
            "The share x counts from the first step of the run, so the decay begins with a jump: count from its own "
            "first step, total - decay.",
        ),
        Wrong(
            "decay read as its first step",
            DOWN,
            "down = cooldown(progress(step, decay, total)) if step > decay else 1.0",
            "`decay` is how many steps the decay takes, not the step at which it begins.",
        ),
        Wrong(
            "floor cuts off",
            SCALED,
            "return linear_warmup(step, warmup=warmup) * max(floor, down)",
            "The decay is cut off at the floor: scale it, so that it reaches the floor at `total` and not before.",
        ),
        Wrong(
            "floor added",
            SCALED,
            "return linear_warmup(step, warmup=warmup) * (floor + down)",
            "The floor is added on top, so that the stable phase lies above 1: scale the decay by 1 - floor.",
        ),
        Wrong(
            "down to zero",
            SCALED,
            "return linear_warmup(step, warmup=warmup) * down",
            "The decay ends at 0: `floor` is not used.",
        ),
        Wrong(
            "straight line",
            COOL,
            "return 1 - x",
            "The cool-down is a straight line 1 - x: 1 - sqrt(x) is asked, steep at first.",
        ),
        Wrong(
            "sqrt instead of 1 - sqrt",
            COOL,
            "return math.sqrt(1 - x)",
            "The cool-down is sqrt(1 - x), flat at first: 1 - sqrt(x) is asked, steep at first.",
        ),
        Wrong(
            "square",
            COOL,
            "return 1 - x * x",
            "The cool-down is 1 - x^2: 1 - sqrt(x) is asked.",
        ),
        Wrong(
            "cosine",
            COOL,
            "return (1 + math.cos(math.pi * x)) / 2",
            "The cool-down is half a cosine: 1 - sqrt(x) is asked.",
        ),
    ),
    also_wrong=(
        Wrong(
            "cosine of a whole turn",
            FALL,
            "fall = (1 - math.cos(2 * math.pi * progress(step, warmup, total))) / 2",
            "Half a cosine: down, not down and up again.",
        ),
        Wrong(
            "cosine counts from step 0",
            FALL,
            "fall = (1 - math.cos(math.pi * progress(step, 0, total))) / 2",
            "The cosine begins where the warm-up ends.",
        ),
        Wrong(
            "cosine to zero",
            "return linear_warmup(step, warmup=warmup) * (1 - (1 - floor) * fall)",
            "return linear_warmup(step, warmup=warmup) * (1 - fall)",
            "It falls to the floor.",
        ),
        Wrong("milestone one step late", BISECT, "factor ** bisect_right(milestones, step - 1)", "From the step on."),
        Wrong(
            "milestones do not add up",
            BISECT,
            "factor ** min(1, bisect_right(milestones, step))",
            "Each milestone multiplies once more.",
        ),
        Wrong(
            "ramp to nothing",
            "min(seen, over) // over",
            "seen // over",
            "The batch grows during the ramp and stays at its full size after it.",
        ),
        Wrong("ramp not in multiples", "return size - size % multiple", "return size", "Sizes are multiples."),
        Wrong(
            "rules exchanged",
            RULE,
            'new / old if optimizer == "adam" else math.sqrt(new / old)',
            "Linear is for SGD, the square root for Adam.",
        ),
        Wrong("linear for both", RULE, "new / old", "Adam divides by the gradient's size: the square root."),
        Wrong(
            "ratio upside down",
            RULE,
            'old / new if optimizer == "sgd" else math.sqrt(old / new)',
            "Larger batches take larger rates.",
        ),
        Wrong(
            "signal not corrected",
            "signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)",
            "signal = large",
            "The squared norm of a noisy gradient is too large by tr(Sigma) / B.",
        ),
        Wrong(
            "mean of ratios",
            "return (self.noise.mean() / self.signal.mean()).item()",
            "return (self.noise / self.signal).mean().item()",
            "Average noise and signal before the ratio.",
        ),
        Wrong(
            "mean not corrected",
            STEP,
            "weight.addcdiv_(mean, size, value=-lr)",
            "The mean starts at 0: divide by 1 - beta1^step.",
            OPTIMIZERS,
        ),
        Wrong(
            "square not corrected",
            SIZE,
            "size = square.sqrt().add_(eps)",
            "The mean square starts at 0: without 1 - beta2^step the first steps are too large.",
            OPTIMIZERS,
        ),
        Wrong(
            "decay in the gradient",
            DECAY,
            "    grad = grad + weight_decay * weight\n    mean.lerp_(grad, 1 - beta1)\n",
            "The decay went into the gradient, where Adam divides it by its size: AdamW shrinks the weight itself.",
            OPTIMIZERS,
        ),
        Wrong(
            "decay without the rate",
            DECAY,
            "    weight.mul_(1 - weight_decay)\n    mean.lerp_(grad, 1 - beta1)\n",
            "In PyTorch the weight shrinks by lr x decay.",
            OPTIMIZERS,
        ),
        Wrong(
            "betas exchanged",
            "beta1, beta2 = betas",
            "beta2, beta1 = betas",
            "beta1 is the mean's, beta2 the square's.",
            OPTIMIZERS,
        ),
        Wrong(
            "norms decay",
            "[p for p in parameters if p.ndim < 2], weight_decay=0.0",
            "[p for p in parameters if p.ndim < 2], weight_decay=weight_decay",
            "Norms and biases do not decay.",
            OPTIMIZERS,
        ),
        Wrong(
            "clipped up",
            "sqrt()).clamp(max=1)[:, None, None]",
            "sqrt())[:, None, None]",
            "Clipping scales large gradients down and leaves small ones alone.",
            SCALING,
        ),
        Wrong(
            "one norm for all copies",
            "flatten(1).sum(dim=1) for grad",
            "flatten(1).sum(dim=1).mean().expand(len(grad)) for grad",
            "Each model has a norm of its own.",
            SCALING,
        ),
        Wrong(
            "loss summed over the batch",
            'reduction="sum") / windows.shape[1]',
            'reduction="sum")',
            "The gradient is that of the mean loss: a sum grows with the batch.",
            SCALING,
        ),
        Wrong(
            "every copy its own data",
            "torch.stack(starts).repeat_interleave(self.copies, dim=0)",
            "torch.stack(starts).repeat(self.copies, 1)",
            "Copies of one seed see the same data, or their rates can not be compared.",
            SCALING,
        ),
        Wrong(
            "schedule forgotten",
            "weight -= rate * schedule(step) * move",
            "weight -= rate * move",
            "The rate of a step is the peak times the schedule.",
            SCALING,
        ),
        Wrong(
            "critical batch upside down",
            "return fewest, product / fewest",
            "return fewest, fewest / product",
            "B_crit is the fewest samples over the fewest steps.",
            SCALING,
        ),
    ),
    probes=(
        Probe("its own steps", numbers_its_own_steps, wrong_too=True),
        Probe("stable phase", stable_phase, wrong_too=True),
    ),
    hints=(
        "The factor is a product: the warm-up min(1, step / warmup), and the decay, which is 1 until total - decay.",
        "x = (step - (total - decay)) / decay, clamped to 0 ... 1. With warmup=0 or decay=0 do not divide by 0.",
        "The decay goes from 1 to the floor: floor + (1 - floor) * (1 - sqrt(x)).",
    ),
)
