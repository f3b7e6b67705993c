"""Learning rate and batch size over a run: pure functions of the step, and the rules that tie the two together.

Idea:        A schedule gives, for each step, the factor on the peak learning rate. All rise linearly first: Adam's
             second moment is noise at the beginning, and the curvature is high. Then cosine and linear fall to the end
             of a run of known length; warm-up-stable-decay (WSD) stays constant, so that the length may be decided
             late, and falls in the last part; multi-step falls by a factor at set points. A larger batch has less
             noise: SGD takes a rate in proportion to it, Adam in proportion to its square root, up to about the
             noise scale of the gradient, where larger batches stop paying.
Cost:        Nothing; the noise scale needs the squared norms of the gradient of a small and of a large batch.
Paper:       Cosine: Loshchilov and Hutter 2016, arXiv:1608.03983. WSD: Hu et al. 2024, "MiniCPM", arXiv:2404.06395;
             constant rate with cool-down analysed, 1-sqrt: Hägele et al. 2024, arXiv:2405.18392. Inverse square root:
             Vaswani et al. 2017, arXiv:1706.03762, equation 3. Multi-step: DeepSeek-AI 2024, arXiv:2401.02954.
             Linear rule: Goyal et al. 2017, arXiv:1706.02677; square root for Adam: Malladi et al. 2022,
             arXiv:2205.10287. Noise scale: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1. Batch ramp: Brown et
             al. 2020, arXiv:2005.14165.
Production:  transformers get_{linear,cosine,inverse_sqrt}_schedule_with_warmup and get_wsd_schedule;
             torch.optim.lr_scheduler.MultiStepLR; Megatron-LM's ramp of the batch size.
Leaves out:  restarts, schedules that watch the loss. Weight decay of torch.optim.AdamW follows the schedule, too.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_warmup(step: int, *, warmup: int) -> float:
    """The factor rises from 0 at step 0 to 1 at step `warmup` and stays there.

    Steps count from 0 as in transformers, so that the first update of a run with warm-up changes no weight.

    >>> [linear_warmup(step, warmup=4) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, step / warmup) if warmup else 1.0


def progress(step: int, start: int, end: int) -> float:
    """How far `step` is from `start` to `end`, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def linear(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Warm-up, then a straight line to `floor` at step `total`."""
    check_phases(warmup, total)
    return linear_warmup(step, warmup=warmup) * (1 - (1 - floor) * progress(step, warmup, total))


def cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Warm-up, then half a cosine to `floor` at step `total`: half way down in the middle.

    >>> [round(cosine(step, warmup=2, total=10, floor=0.1), 3) for step in (0, 1, 2, 6, 10, 11)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    check_phases(warmup, total)
    fall = (1 - math.cos(math.pi * progress(step, warmup, total))) / 2
    return linear_warmup(step, warmup=warmup) * (1 - (1 - floor) * fall)


def straight(x: float) -> float:
    """The cool-down that is a straight line: 1 - x for the share x of it that is done."""
    return 1 - x


def one_minus_sqrt(x: float) -> float:
    """The cool-down 1 - sqrt(x): steep first, then long at small rates."""
    return 1 - math.sqrt(x)


def wsd(
    step: int,
    *,
    warmup: int,
    total: int,
    decay: int,
    floor: float = 0.0,
    cooldown: Callable[[float], float] = one_minus_sqrt,
) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` steps before `total`, which follow `cooldown` down to `floor`.

    Nothing before the decay depends on `total`: a checkpoint of the stable phase serves runs of any length.

    >>> [round(wsd(step, warmup=2, total=10, decay=4), 3) for step in range(11)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.293, 0.134, 0.0]
    """
    if warmup < 0 or decay < 0 or warmup + decay > total:
        raise ValueError(f"warmup + decay must fit into total, got {warmup} + {decay} and {total}")
    down = cooldown(progress(step, total - decay, total)) if step > total - decay else 1.0
    return linear_warmup(step, warmup=warmup) * (floor + (1 - floor) * down)


def wsd_schedule(
    steps: Int[Tensor, " n"], *, warmup: int, total: int, decay: int, floor: float = 0.0
) -> Float[Tensor, " n"]:
    """`wsd` of every step given, in float32, with the cool-down 1 - sqrt(x).

    >>> import torch
    >>> wsd_schedule(torch.tensor([1, 2, 6, 7, 10, 99]), warmup=2, total=10, decay=4, floor=0.1)
    tensor([0.5000, 1.0000, 1.0000, 0.5500, 0.1000, 0.1000])
    """
    factors = [wsd(step, warmup=warmup, total=total, decay=decay, floor=floor) for step in steps.tolist()]
    return torch.tensor(factors, dtype=torch.float32, device=steps.device)


def multi_step(step: int, *, warmup: int, milestones: Sequence[int], factor: float = 0.316) -> float:
    """Warm-up, then constant, times `factor` at each milestone. DeepSeek LLM: at 80 % and 90 % of the tokens.

    >>> [round(multi_step(step, warmup=0, milestones=(8, 9)), 3) for step in range(6, 11)]
    [1.0, 1.0, 0.316, 0.1, 0.1]
    """
    if list(milestones) != sorted(milestones) or (milestones and milestones[0] < warmup):
        raise ValueError(f"milestones must rise and come after the warm-up, got {list(milestones)}, warmup={warmup}")
    return linear_warmup(step, warmup=warmup) * factor ** bisect_right(milestones, step)


def inverse_sqrt(step: int, *, warmup: int) -> float:
    """Warm-up, then sqrt(warmup / step): no end is planned. The Transformer's own schedule, divided by its peak.

    >>> [inverse_sqrt(step, warmup=4) for step in (2, 4, 16, 64)]
    [0.5, 1.0, 0.5, 0.25]
    """
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1 step, got {warmup}")
    return min(step / warmup, math.sqrt(warmup / max(step, 1)))


def batch_ramp(seen: int, *, start: int, full: int, over: int, multiple: int = 1) -> int:
    """Batch size after `seen` tokens: from `start` up to `full` in a straight line over the first `over` tokens.

    In whichever unit `start` and `full` are, rounded down to a multiple of `multiple`.

    >>> [batch_ramp(seen, start=8, full=64, over=1000, multiple=8) for seen in (0, 142, 143, 999, 1000, 9999)]
    [8, 8, 16, 56, 64, 64]
    """
    if not 0 < start <= full or start % multiple or full % multiple:
        raise ValueError(f"a ramp rises between multiples of {multiple}, got start={start} and full={full}")
    size = start + (full - start) * min(seen, over) // over if over else full
    return size - size % multiple


def scale_lr(lr: float, old: int, new: int, *, optimizer: Literal["sgd", "adam"]) -> float:
    """The learning rate for batches of `new` that does what `lr` did for batches of `old`.

    SGD: in proportion, which keeps the path as a function of the samples seen, while steps are small. Adam (and others
    that divide by the gradient's size): square root, which keeps drift and noise; strictly with 1 - beta1 and 1 - beta2
    times new / old and eps times sqrt(old / new). Both end near the noise scale. The variance of the gradient falls as
    1 / batch under either.

    >>> scale_lr(0.1, 256, 1024, optimizer="sgd"), scale_lr(0.1, 256, 1024, optimizer="adam")
    (0.4, 0.2)
    """
    if old < 1 or new < 1:
        raise ValueError(f"batches hold at least 1 sample, got {old} and {new}")
    if optimizer not in ("sgd", "adam"):
        raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
    return lr * (new / old if optimizer == "sgd" else math.sqrt(new / old))


class NoiseScale(NamedTuple):
    """Estimates of the noise of one sample's gradient, tr(Sigma), and of the true gradient's squared norm."""

    noise: Float[Tensor, "*m"]
    signal: Float[Tensor, "*m"]

    @property
    def batch(self) -> float:
        """tr(Sigma) / |G|^2, each averaged first: near this batch size noise and gradient are of equal size."""
        return (self.noise.mean() / self.signal.mean()).item()


def noise_scale(
    small: Float[Tensor, "*m"], large: Float[Tensor, "*m"], *, small_batch: int, large_batch: int
) -> NoiseScale:
    """Unbiased estimates from squared gradient norms of small and of large batches, in pairs.

    A batch of B has E |g|^2 = |G|^2 + tr(Sigma) / B: two batch sizes are two equations. Single estimates are noisy
    (`signal` may be negative): average them over steps, then take the ratio; a mean of ratios is biased.

    >>> import torch
    >>> small, large = torch.tensor(11.0), torch.tensor(2.0)            # |G|^2 = 1 and tr(Sigma) = 10
    >>> found = noise_scale(small, large, small_batch=1, large_batch=10)
    >>> round(found.noise.item(), 3), round(found.signal.item(), 3), round(found.batch, 3)
    (10.0, 1.0, 10.0)
    """
    if not 0 < small_batch < large_batch:
        raise ValueError(f"the large batch must be larger than the small one, got {large_batch} and {small_batch}")
    signal = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return NoiseScale((small - large) / (1 / small_batch - 1 / large_batch), signal)


def check_phases(warmup: int, total: int) -> None:
    """Refuse a warm-up that is not inside the run."""
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup must be between 0 and total, got {warmup} and {total}")
