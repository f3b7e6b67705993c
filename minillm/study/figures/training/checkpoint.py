"""Drawings of training/checkpoint."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.study.notebook import COLORS
from minillm.training.checkpoint import best_interval
from minillm.training.interrupted import lost_share

LINES = {
    "weights": COLORS["naive"],
    "data position": COLORS["triton"],
    "optimizer": COLORS["tiled"],
    "step and schedule": COLORS["sdpa"],
    "random numbers": COLORS["accent"],
    "weights as float16": COLORS["grey"],
}
GPU_HOURS = 54 * 24 * 16384 / 419  # between failures: Llama 3 405B, 419 unexpected interruptions in 54 days


def sized(width: float = 6.8, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def interruption(straight: Sequence[float], stop: int, after: Sequence[float]) -> Figure:
    """The loss of a run, and of one that was stopped and went on with its weights alone."""
    figure, axes = sized(7.0, 3.0)
    axes.plot(range(1, len(straight) + 1), straight, color=COLORS["tiled"], label="not interrupted")
    axes.plot(
        range(stop + 1, stop + 1 + len(after)), after, color=COLORS["naive"], label="resumed with its weights alone"
    )
    axes.axvline(stop + 0.5, color=COLORS["grey"], linestyle=":", linewidth=1.5)
    axes.text(stop - 0.3, 4.0, "stopped here", ha="right", fontsize=10)
    axes.set(xlabel="step", ylabel="loss (nats a letter)", title="Measured: a Transformer with 100,000 weights")
    axes.legend(loc="upper right")
    return figure


def apart(stop: int, gaps: dict[str, Sequence[float]]) -> Figure:
    """How far the losses are from those of the run that was not interrupted, a line for each part forgotten."""
    figure, axes = sized(8.2, 3.8)
    for name, gap in gaps.items():
        axes.plot(range(stop + 1, stop + 1 + len(gap)), gap, ".-", color=LINES[name], linewidth=1.4, label=name)
    axes.set_yscale("symlog", linthresh=1e-6, linscale=0.5)
    axes.set_yticks([0, 1e-6, 1e-4, 1e-2, 1], ["equal", "1e-6", "1e-4", "0.01", "1"])
    axes.minorticks_off()
    axes.set_ylim(-5e-7, 4)
    axes.set(xlabel="step", ylabel="difference of the losses (nats)", title="Measured: one part not restored")
    figure.legend(loc="outside right center", title="forgotten")
    return figure


def race(live: Sequence[int], copied: Sequence[int]) -> Figure:
    """The step that each tensor of a file is from: saved as it changes, and copied first."""
    figure, axes = sized(6.8, 2.9)
    places = torch.arange(len(live))
    axes.bar(places - 0.2, live, width=0.4, color=COLORS["naive"], label="live tensors")
    axes.plot(places, copied, "o", color=COLORS["tiled"], label="copied first", clip_on=False, zorder=3)
    axes.set_xticks(places, [str(i) for i in range(len(live))])
    axes.set(
        xlabel="tensor in the file", ylabel="step it is from", title="One file, saved at step 0 while training goes on"
    )
    axes.legend(loc="upper left")
    return figure


def bytes_a_weight(parts: dict[str, float]) -> Figure:
    """Bars of bytes for each weight of the model."""
    figure, axes = sized(6.8, 1.9)
    bars = axes.barh(list(parts), list(parts.values()), color=[COLORS["tiled"], COLORS["naive"]])
    axes.bar_label(bars, [f"{value:.1f}" for value in parts.values()], padding=4)
    axes.set(xlabel="bytes of file for each weight", xlim=(0, 1.12 * max(parts.values())))
    axes.invert_yaxis()
    return figure


def interval(gpus: int = 16384, save_seconds: float = 60) -> tuple[Figure, str]:
    """Time lost to saves and to failures against the interval, with one failure in 50,677 GPU hours."""
    between = GPU_HOURS * 3600 / gpus
    best = best_interval(save_seconds, between)
    figure, axes = sized(7.2, 3.4)
    times = best * torch.logspace(-1.2, 1.2, 80)
    minutes = times / 60
    axes.plot(minutes, 100 * (save_seconds / times), "--", color=COLORS["naive"], label="saving: C / T")
    axes.plot(minutes, 100 * (times / (2 * between)), "--", color=COLORS["accent"], label="done again: T / 2M")
    axes.plot(
        minutes, [100 * lost_share(float(t), save_seconds, between) for t in times], color=COLORS["tiled"], label="both"
    )
    least = 100 * lost_share(best, save_seconds, between)
    axes.plot([best / 60], [least], "o", color=COLORS["tiled"])
    axes.set_xscale("log")
    ticks = [
        t for t in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000) if minutes[0] <= t <= minutes[-1]
    ]
    axes.set_xticks(ticks, [f"{t:,g}" for t in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="minutes between saves",
        ylabel="time lost (%)",
        ylim=(0, min(100, 5 * least)),
        xlim=(minutes[0], minutes[-1]),
    )
    axes.set_title(f"{gpus:,} GPUs: a failure every {amount(between)}; a save stops training for {save_seconds} s")
    axes.legend(loc="upper center")
    return figure, f"save every {amount(best)}; {least:.2g}% of the time is lost"


def amount(seconds: float) -> str:
    """A time in a unit that suits it.

    >>> amount(90), amount(7200), amount(86400 * 3)
    ('1.5 minutes', '2 hours', '3 days')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size or unit == "minutes":
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    raise AssertionError
