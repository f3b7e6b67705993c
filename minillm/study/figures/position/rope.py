"""Drawings of position/rope."""

import math

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from minillm.position.rope import inverse_frequencies
from minillm.study.notebook import COLORS

ENCODINGS = {  # Okabe and Ito's colours, as in COLORS
    "learned": "#CC79A7",
    "sinusoidal": "#D55E00",
    "RoPE": "#0072B2",
    "ALiBi": "#009E73",
    "none": "#767676",
}
D = 16  # channels: 8 dials
FAR = 64  # largest position and distance of the clock
BLOCK = 8  # positions averaged in a curve of accuracy


def clock(m: int = 40, n: int = 12, shift: int = 0, content: str = "equal") -> tuple[Figure, str]:
    """The hands of the pairs of a query at m + shift and a key at n + shift, and their score against the distance."""
    frequencies = inverse_frequencies(D).double()
    start = torch.zeros(D // 2, dtype=torch.float64)
    if content == "random":
        start = torch.rand(D // 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 * math.pi
    hands_q, hands_k = (m + shift) * frequencies + start, (n + shift) * frequencies
    score = torch.cos(hands_q - hands_k).sum().item()
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    dials, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.35, 1])[0]
    for i, axes in enumerate(dials.subplots(2, 4).flat):
        axes.add_patch(Circle((0, 0), 1, facecolor="white", edgecolor=COLORS["light"], linewidth=2))
        for angle, color, width in ((hands_k[i], COLORS["accent"], 5), (hands_q[i], ENCODINGS["RoPE"], 2.2)):
            axes.plot([0, math.cos(angle)], [0, math.sin(angle)], color=color, linewidth=width, solid_capstyle="round")
        wavelength = 2 * math.pi / frequencies[i].item()
        axes.set_title(f"pair {i}\n1 turn: {wavelength:,.0f}", fontsize=9)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        axes.axis("off")
    dials.suptitle(f"query (thin, blue) at {m + shift:,}, key (thick, orange) at {n + shift:,}", fontsize=11)
    axes = right.subplots()
    distances = torch.arange(-FAR, FAR + 1)
    curve = torch.cos(distances[:, None] * frequencies + start).sum(dim=1)
    axes.plot(distances, curve, color=COLORS["grey"], linewidth=1.2)
    axes.plot([m - n], [score], "o", color=ENCODINGS["RoPE"], markersize=9)
    axes.set(xlabel="distance m - n (positions)", ylabel="score: sum of 8 cosines", ylim=(-D / 2 - 0.8, D / 2 + 0.8))
    axes.set_title(f"distance {m - n}: score {score:.2f}")
    caption = (
        f"positions {m + shift:,} and {n + shift:,}, distance {m - n}: score {score:.4f}; "
        "`shift` moves both and turns every hand, but on no dial the angle between the two"
    )
    return figure, caption


def along(scores: dict[str, Tensor], distance: int) -> Figure:
    """Scores of one query and one key content at a fixed distance, against the place where the pair stands."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, values in scores.items():
        axes.plot(values, color=ENCODINGS[name], linewidth=1.4, label=name)
    low, high = min(v.min().item() for v in scores.values()), max(v.max().item() for v in scores.values())
    axes.set_ylim(low - 0.1 * (high - low) - 0.2, high + 0.35 * (high - low) + 0.2)
    axes.set(xlabel=f"position n of the key (the query stands at n + {distance})", ylabel="score")
    axes.set_title(f"The same two tokens, always {distance} apart")
    axes.legend(loc="upper right", ncols=len(scores))
    return figure


def lengths(accuracies: dict[str, Tensor], first: int, trained: int, symbols: int) -> Figure:
    """Accuracy against position: mean over runs as a line, lowest to highest run as a band; each value [r positions].

    Averages over BLOCK positions. `first` is the position of the first column, `trained` the trained length, and
    1 / symbols what guessing gives.
    """
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(first, trained, color=COLORS["light"], linewidth=0)
    axes.text(first * 1.08, 1.06, "trained positions", fontsize=9, color=COLORS["grey"])
    axes.axhline(1 / symbols, color=COLORS["grey"], linestyle=":", linewidth=1.2)
    axes.text(first * 1.08, 1 / symbols - 0.05, "guessing", fontsize=9, color=COLORS["grey"])
    for name, values in accuracies.items():
        blocks = torch.arange(first, first + values.shape[1]) // BLOCK  # 0 for positions 0-7, and so on
        means = torch.stack([values[:, blocks == b].mean(dim=1) for b in blocks.unique()], dim=1)
        middles = [blocks[blocks == b].numel() / 2 + max(first, b.item() * BLOCK) for b in blocks.unique()]
        axes.fill_between(middles, means.amin(dim=0), means.amax(dim=0), color=ENCODINGS[name], alpha=0.18, linewidth=0)
        axes.plot(middles, means.mean(dim=0), color=ENCODINGS[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"])
    axes.minorticks_off()
    axes.set(xlim=(first, first + values.shape[1]), ylim=(-0.02, 1.13))
    axes.set(xlabel="position", ylabel="share of right answers")
    axes.set_title(f"Trained on {trained} positions, tested on {first + values.shape[1]} (toy task)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
