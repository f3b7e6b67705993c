"""Drawings of attention/kinds."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.attention.kinds import SYMBOLS, attention_weights, prefix, window
from minillm.attention.naive import visible
from minillm.study.notebook import COLORS

ENGLISH, FRENCH = ["the", "black", "cat", "sleeps"], ["le", "chat", "noir", "dort"]
LINES = {
    "no cross-attention": COLORS["naive"],
    "with cross-attention": COLORS["tiled"],
    "computed again": COLORS["naive"],
    "kept": COLORS["tiled"],
}
Panel = tuple[Tensor, Sequence[str], Sequence[str]]  # the matrix, names of its rows, names of its columns


def maps(panels: dict[str, Panel], rows: str = "asks", columns: str = "is looked at") -> Figure:
    """A heat map for each panel, from 0 to 1, with the numbers written in; blank where a weight is exactly 0."""
    widths = [matrix.shape[1] for matrix, _, _ in panels.values()]  # all cells of one size
    figure = Figure(figsize=(2.75 * len(panels) + 0.5, 3.3), layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (title, panel) in zip(places, panels.items(), strict=True):
        heat(axes, *panel)
        axes.set(title=title, xlabel=columns)
    figure.axes[0].set_ylabel(rows)
    return figure


def heat(axes: Axes, matrix: Tensor, queries: Sequence[str], keys: Sequence[str]) -> None:
    """One heat map: queries down, keys across."""
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    whole = not matrix.is_floating_point()
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            if value:
                text = str(int(value)) if whole else f"{value:.2f}".removeprefix("0")
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > 0.5 else "black")
    axes.set_xticks(range(len(keys)), keys, rotation=45 if max(map(len, keys)) > 1 else 0, fontsize=9)
    axes.set_yticks(range(len(queries)), queries, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(COLORS["light"])


def losses(curves: dict[str, list[list[float]]]) -> Figure:
    """Training loss against steps, a line for each seed, and what guessing costs."""
    figure = Figure(figsize=(6.8, 3.1), layout="constrained")
    axes = figure.subplots()
    for name, seeds in curves.items():
        for seed, curve in enumerate(seeds):
            axes.plot(curve, color=LINES[name], linewidth=1.3, alpha=0.8, label=name if seed == 0 else None)
    axes.axhline(math.log(SYMBOLS), color=COLORS["grey"], linestyle="--", linewidth=1)
    last = len(next(iter(curves.values()))[0]) - 1
    axes.text(last, math.log(SYMBOLS) - 0.1, f"guessing: ln {SYMBOLS}", ha="right", va="top", fontsize=9)
    axes.set(xlabel="training step", ylabel="loss (nats a symbol)", ylim=(0, 3.6), xlim=(0, last))
    axes.set_title(f"Copying random symbols, {len(next(iter(curves.values())))} seeds")
    axes.legend(loc="center right")
    return figure


def cost(lengths: list[int], counts: dict[str, list[int]]) -> Figure:
    """Operations of one decoding step in one cross-attention layer against the source's length, both logarithmic."""
    figure = Figure(figsize=(6.8, 3.1), layout="constrained")
    axes = figure.subplots()
    for name, values in counts.items():
        axes.plot(lengths, [n / 1e6 for n in values], "o-", color=LINES[name], label=f"keys and values {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.set(xlabel="tokens of the source", ylabel="million operations")
    axes.set_title("Measured: one new token in one cross-attention layer")
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.55))
    return figure


def sentences(looks_at: str = "itself", mask: str = "the past", padding: int = 0, ratio: int = 9) -> tuple[Figure, str]:
    """The French sentence looks at one of the two: its weights, and how much of them each key collects."""
    own = looks_at == "itself"
    x, names = torch.eye(4)[None, [0, 2, 1, 3]], FRENCH if own else ENGLISH
    memory = x if own else torch.eye(4)[None]
    masks = {"the past": visible(4, 4), "a window of 2": window(4, 2), "a prefix of 2": prefix(4, 2)}
    look = masks.get(mask, torch.ones(4, 4, dtype=torch.bool)) & (torch.arange(4) < 4 - padding)
    weights = attention_weights(x, memory, 2 * math.log(ratio) * torch.eye(4), torch.eye(4), heads=1, look=look)[0, 0]
    shown = [*names[: 4 - padding], *["(padding)"] * padding]
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    heat(left, weights, FRENCH, shown)
    left.set(title="weights", ylabel="asks", xlabel="is looked at")
    bars = right.barh(range(4), weights.sum(dim=0), color=COLORS["tiled"])
    right.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    right.set_yticks(range(4), shown, fontsize=9)
    right.invert_yaxis()
    right.set(xlim=(0, 4.4), xlabel="weight collected from the four queries", title="sum of each column")
    name = {True: "self-attention", False: "cross-attention"}[own]
    unseen = int((weights.sum(dim=1) == 0).sum())
    caption = f"{'masked ' if own and mask == 'the past' else ''}{name}: {int(look.sum())} of 16 pairs are visible"
    if unseen:
        caption += (
            f"; {unseen} quer{'y sees' if unseen == 1 else 'ies see'} no key and gather{'s' * (unseen == 1)} zeros"
        )
    return figure, caption
