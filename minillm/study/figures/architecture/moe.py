"""Drawings of architecture/moe."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.architecture.moe import expert_load, experts_touched, softmax_gate
from minillm.study.notebook import COLORS

LINES = {
    "all experts run": COLORS["naive"],
    "two run": COLORS["tiled"],
    "no balancing": COLORS["naive"],
    "balance loss": COLORS["tiled"],
    "selection bias": COLORS["sdpa"],
}


def operations(experts: list[int], measured: dict[str, list[float]]) -> Figure:
    """Operations a token against the number of experts, relative to one expert alone; both axes logarithmic."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for method, ratios in measured.items():
        axes.plot(experts, ratios, "o-", color=LINES[method], label=method)
        axes.annotate(
            f"{ratios[-1]:.3g} x", (experts[-1], ratios[-1]), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=10, color=LINES[method],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(experts, [str(e) for e in experts])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlim(experts[0] * 0.9, experts[-1] * 1.5)
    axes.set(xlabel="experts in the layer (parameters, in experts)", ylabel="operations a token\n(one expert = 1)")
    axes.set_title("Measured: what one layer computes for a token")
    axes.legend(loc="upper left")
    return figure


def parameters(counts: dict[str, tuple[int, int]]) -> Figure:
    """Total and active parameters of each model, in billions, on a logarithmic axis."""
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(counts))
    for shift, color, label, which in ((-0.19, "light", "total", 0), (0.19, "tiled", "used by one token", 1)):
        values = [pair[which] / 1e9 for pair in counts.values()]
        bars = axes.barh(places + shift, values, height=0.36, color=COLORS[color], label=label)
        axes.bar_label(bars, [f"{v:.1f} B" for v in values], padding=4, fontsize=10)
    axes.set_yticks(places, list(counts))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(1, 2500)
    axes.set_xlabel("parameters (billions)")
    axes.set_title("Computed from the numbers in each model's configuration")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.66))
    return figure


def loads(methods: dict[str, list[Tensor]]) -> Figure:
    """For each method the tokens of every expert relative to an even share, sorted; a line for each seed."""
    width = 4.4 if len(methods) == 1 else 3.0 * len(methods)
    figure = Figure(figsize=(width, 3.1), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, (method, seeds) in zip(panels, methods.items(), strict=True):
        ranks = torch.arange(len(seeds[0])) + 1
        for shares in seeds:
            axes.plot(ranks, shares.sort().values, ".-", color=LINES[method], linewidth=1.3, alpha=0.75)
        axes.axhline(1, color=COLORS["grey"], linestyle="--", linewidth=1)
        axes.set(xlabel="expert, least used first", title=method, ylim=(-0.15, 5))
        axes.set_xticks([1, *range(4, len(ranks) + 1, 4)])
    panels[0].text(1, 1.06, "even share", va="bottom", fontsize=9, color=COLORS["grey"])
    panels[0].set_ylabel("tokens / even share")
    return figure


def touched(e: int, k: int) -> Figure:
    """Experts that a batch uses against its tokens: the formula, and random routers that were run."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    tokens = [2**i for i in range(10)]
    curve(axes, tokens, e, k)
    axes.plot(tokens, [simulated(n, e, k) for n in tokens], "o", color=COLORS["accent"], label="simulated, one batch")
    axes.set_title(f"{k} of {e} experts a token")
    axes.legend(loc="lower right")
    return figure


def simulated(n: int, e: int, k: int) -> int:
    """Experts used by n tokens with random logits, drawn from a seed of its own."""
    logits = torch.randn(n, e, generator=torch.Generator().manual_seed(n))
    return int((expert_load(softmax_gate(logits, k)[1], e) > 0).sum())


def curve(axes: Axes, tokens: list[int], e: int, k: int) -> None:
    """Draw the expected number of experts used against the tokens of a batch."""
    axes.axhline(e, color=COLORS["grey"], linestyle="--", linewidth=1)
    axes.plot(tokens, [experts_touched(n, e, k) for n in tokens], color=COLORS["tiled"], label="e (1 - (1 - k/e)^n)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens[::2], [str(n) for n in tokens[::2]])
    axes.minorticks_off()
    axes.set_ylim(0, e * 1.1)
    axes.set(xlabel="tokens in the batch n", ylabel="experts used by the batch")


def layer(experts: int = 64, k: int = 8, shared: int = 1, batch: int = 16) -> tuple[Figure, str]:
    """One layer: weights held, used by a token and read by a batch, in experts; and how the last grows."""
    used = experts_touched(batch, experts, k)
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    names = ["held in memory", f"read for {batch} token{'s' * (batch > 1)}", "computed for one token"]
    values = [experts + shared, used + shared, k + shared]
    bars = left.barh(names, values, color=[COLORS["light"], COLORS["naive"], COLORS["tiled"]])
    left.bar_label(bars, [f"{v:.3g}" for v in values], padding=4)
    left.invert_yaxis()
    left.set_xlim(0, (experts + shared) * 1.2)
    left.set(xlabel="experts, shared ones included", title="one layer")
    curve(right, [2**i for i in range(10)], experts, k)
    right.plot([batch], [used], "o", markersize=9, color=COLORS["naive"])
    right.set_title("routed experts used")
    caption = (
        f"{batch} tokens use {used:.1f} of {experts} routed experts: {(used + shared) / (experts + shared):.0%} of the "
        f"layer is read, {(k + shared) / (experts + shared):.0%} of it is computed for each token, and a routed expert "
        f"that is read serves {batch * k / used:.1f} tokens"
    )
    return figure, caption
