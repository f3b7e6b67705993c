"""Drawings of training/schedule."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.study.notebook import COLORS
from minillm.training.schedule import cosine, linear, multi_step, wsd

LINES = {
    "constant": COLORS["naive"],
    "cosine": COLORS["sdpa"],
    "WSD": COLORS["tiled"],
    "SGD": COLORS["naive"],
    "Adam": COLORS["tiled"],
    "beta2 = 0.999": COLORS["naive"],
    "warm-up of 400 steps": COLORS["accent"],
    "beta2 = 0.95": COLORS["tiled"],
    "clipped at 0.5": COLORS["sdpa"],
    "batches skipped": COLORS["grey"],
}
SHADES = ["#F4B183", COLORS["accent"], COLORS["naive"], "#7F3300"]


def sized(width: float = 6.8, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def constant_rates(every: int, rates: Sequence[float], curve: Tensor) -> Figure:
    """Loss over the steps of training at several constant rates: mean and range of the seeds. `curve` is [p s k]."""
    figure, axes = sized()
    steps = (torch.arange(len(curve)) + 1) * every
    for i, (rate, color) in enumerate(zip(rates, SHADES, strict=True)):
        several = curve[:, :, i]
        axes.plot(steps, several.mean(dim=1), color=color, label=f"rate 1/{1 / rate:.0f}")
        axes.fill_between(steps, several.amin(dim=1), several.amax(dim=1), color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="steps of Adam (batch 32)", ylabel="loss (nats a letter)", ylim=(2.05, 2.9))
    axes.set_title("Measured: one constant rate, three seeds")
    axes.legend(loc="upper right", ncols=2)
    return figure


def tuned(rates: Sequence[float], final: dict[str, Tensor]) -> Figure:
    """Loss at the end against the peak rate, for each schedule: a dot a seed, a line through the means."""
    figure, axes = sized()
    for name, nats in final.items():
        axes.plot(rates, nats.mean(dim=0), color=LINES[name], label=name)
        for seed in nats:
            axes.plot(rates, seed, ".", color=LINES[name], markersize=6, alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"1/{1 / rate:.0f}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="peak learning rate", ylabel="loss at the end (nats a letter)", ylim=(2.03, 2.4))
    axes.set_title("Measured: 1,000 steps of Adam, three seeds")
    axes.legend(loc="upper center", ncols=3)
    return figure


def best_rates(batches: Sequence[int], best: dict[str, list[float]]) -> Figure:
    """The best rate against the batch size for each optimizer, beside the rule through its first point."""
    figure, axes = sized()
    for (name, rates), power, rule in zip(best.items(), (1, 0.5), ("in proportion", "square root"), strict=True):
        axes.plot(batches, rates, "o-", color=LINES[name], label=f"{name}, measured")
        line = [rates[0] * (b / batches[0]) ** power for b in batches]
        axes.plot(batches, line, "--", color=LINES[name], linewidth=1.2, alpha=0.8, label=rule)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.minorticks_off()
    axes.set_ylim(0.002, 12)
    axes.set(xlabel="batch size (samples)", ylabel="best learning rate")
    axes.set_title("Measured: the same 8,192 samples in smaller and larger batches")
    axes.legend(loc="upper left", ncols=2)
    return figure


def trade(batches: Sequence[int], steps: Sequence[float], fewest: float, critical: float) -> Figure:
    """Steps and samples to the target loss against the batch size, and the fitted hyperbola."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fine = torch.logspace(math.log2(batches[0]), math.log2(batches[-1]), 60, base=2.0)
    curve, scale = fewest * (1 + critical / fine), torch.tensor(batches)
    for axes, dots, line, floor in (
        (left, torch.tensor(steps), curve, fewest),
        (right, torch.tensor(steps) * scale, curve * fine, fewest * critical),
    ):
        axes.plot(fine, line, color=COLORS["tiled"], label="fit")
        axes.plot(batches, dots, "o", color=COLORS["naive"], label="measured")
        axes.axhline(floor, color=COLORS["grey"], linestyle="--", linewidth=1)
        axes.axvline(critical, color=COLORS["grey"], linestyle=":", linewidth=1.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(batches[::2], [str(b) for b in batches[::2]])
        axes.minorticks_off()
        axes.set_xlabel("batch size (samples)")
    left.set_yticks([10, 100], ["10", "100"])
    right.set_yticks([3000, 10000], ["3,000", "10,000"])
    left.set(title="steps to the target", ylabel="steps")
    right.set(title="samples to the target", ylabel="samples")
    right.legend(loc="upper left")
    left.text(critical * 1.1, left.get_ylim()[1] * 0.9, "B_crit", va="top", fontsize=10)
    return figure


def noise(seen: Sequence[int], scales: Sequence[float]) -> Figure:
    """The noise scale against the samples that the models have seen."""
    figure, axes = sized(6.2, 2.9)
    axes.plot(seen, scales, "o-", color=COLORS["tiled"])
    axes.set(xlabel="samples seen", ylabel="noise scale (samples)", title="Measured: noise against signal")
    axes.set_ylim(0, max(scales) * 1.15)
    axes.set_xscale("symlog", linthresh=3200)
    axes.set_xlim(-400, max(seen) * 1.2)
    axes.set_xticks(seen, [f"{count:,}" for count in seen])
    axes.minorticks_off()
    return figure


def step_sizes(curves: dict[float, Tensor], jump: int) -> Figure:
    """The size of Adam's steps where the gradient becomes a hundred times as large at step `jump`."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2.2])
    for (beta2, sizes), color in zip(curves.items(), (COLORS["naive"], COLORS["tiled"]), strict=True):
        dashes = "-" if beta2 > 0.99 else "--"
        left.plot(torch.arange(40) + 1, sizes[:40], dashes, color=color, label=f"beta2 = {beta2}")
        after = torch.arange(-40, 400)
        right.plot(after, sizes[jump - 40 : jump + 400], color=color, label=f"beta2 = {beta2}")
    left.set(title="the first steps", xlabel="step", ylabel="size of a step (learning rates)", ylim=(0, 3.2))
    right.set(title="gradients 100 times as large from here on", xlabel="steps after the jump")
    right.legend(loc="upper right")
    return figure


def spikes(every: int, curves: dict[str, Tensor], shown: range) -> Figure:
    """Loss around a few bad batches, a line a remedy: the mean of the seeds. Curves are [p s]."""
    figure, axes = sized(7.4, 3.6)
    for name, curve in curves.items():
        points = torch.arange(shown.start // every, shown.stop // every)
        axes.plot((points + 1) * every, curve[points].mean(dim=1), color=LINES[name], label=name)
    axes.set(xlabel="step", ylabel="loss (nats a letter)", ylim=(2.1, 3.1))
    axes.set_title("Measured: six bad batches at step 450, mean of five seeds")
    axes.legend(loc="upper right")
    return figure


def plan(
    schedule: str = "WSD", warmup: int = 2, decay: int = 20, floor: float = 0.0, batch: float = 1.0
) -> tuple[Figure, str]:
    """A schedule over a run (warm-up and decay in percent of it), and what a batch of so many B_crit costs."""
    total = 1000
    up, down = warmup * total // 100, decay * total // 100
    factor = {
        "WSD": lambda t: wsd(t, warmup=up, total=total, decay=down, floor=floor),
        "cosine": lambda t: cosine(t, warmup=up, total=total, floor=floor),
        "linear": lambda t: linear(t, warmup=up, total=total, floor=floor),
        "multi-step": lambda t: multi_step(t, warmup=up, milestones=(total - down, total - down // 2)),
    }[schedule]
    factors = [factor(t) for t in range(total + 1)]
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    left.plot([100 * t / total for t in range(total + 1)], factors, color=COLORS["tiled"])
    left.fill_between([100 * t / total for t in range(total + 1)], factors, color=COLORS["light"])
    left.set(xlabel="share of the run (%)", ylabel="rate (share of the peak)", ylim=(0, 1.08), xlim=(0, 100))
    left.set_title(schedule)
    bars = right.barh(["steps", "samples"], [1 + 1 / batch, 1 + batch], color=[COLORS["naive"], COLORS["tiled"]])
    right.bar_label(bars, [f"{1 + 1 / batch:.3g} x fewest", f"{1 + batch:.3g} x fewest"], padding=4)
    right.axvline(1, color=COLORS["grey"], linestyle="--", linewidth=1)
    right.set_xlim(0, 1.6 * max(1 + 1 / batch, 1 + batch))
    right.set(xlabel="times the fewest possible", title=f"batch = {batch:g} B_crit")
    right.invert_yaxis()
    mean = sum(factors) / len(factors)
    caption = (
        f"mean rate {mean:.2f} of the peak; a batch of {batch:g} B_crit needs {1 + 1 / batch:.2f} times the fewest "
        f"steps and {1 + batch:.2f} times the fewest samples"
    )
    return figure, caption
