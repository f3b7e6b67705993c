"""Drawings of training/next_token."""

import math

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from minillm.study.notebook import COLORS
from minillm.training.loop import Record
from minillm.training.next_token import LETTERS
from minillm.training.objective import IGNORE, masked_lm_targets, next_tokens, prefix_lm_mask

NAMES = {0: "no shift", 1: "one shift", 2: "two shifts"}
SHIFTS = {0: COLORS["naive"], 1: COLORS["tiled"], 2: COLORS["accent"]}
WORDS = ["It", "is", "a", "truth", "universally", "acknowledged", ",", "that", "a", "single", "man", "in"]
MASK = len(WORDS)  # the number of the mask token
OBJECTIVES = {"next token": COLORS["tiled"], "prefix LM": COLORS["sdpa"], "masked LM": COLORS["triton"]}


def unseen(shares: dict[int, float]) -> Figure:
    """How many of the held-out runs of n tokens never stood in the training text, in percent."""
    figure = Figure(figsize=(6.5, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([str(n) for n in shares], [100 * x for x in shares.values()], color=COLORS["naive"], width=0.6)
    axes.bar_label(bars, [f"{x:.0%}" for x in shares.values()], padding=2)
    axes.set(xlabel="tokens in a row", ylabel="never seen (%)", ylim=(0, 112))
    axes.set_title("Held-out text: runs of tokens that the training text does not contain")
    return figure


def shifts(losses: dict[int, list[list[float]]], true: dict[int, list[float]]) -> Figure:
    """Training losses of three conventions, a line for each seed, and beside them the loss of the true next token."""
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for shift, seeds in losses.items():
        for i, curve in enumerate(seeds):
            left.plot(curve, color=SHIFTS[shift], linewidth=1.3, alpha=0.8, label=None if i else NAMES[shift])
    left.set(xlabel="step", ylabel="loss in training (nats)", title="What the training shows", ylim=(0, None))
    left.legend(loc="upper right")
    heights = [sum(seeds) / len(seeds) for seeds in true.values()]
    bars = right.bar([NAMES[s] for s in true], heights, color=[SHIFTS[s] for s in true], width=0.6)
    right.bar_label(bars, [f"{x:.1f}" for x in heights], padding=2)
    right.set(ylabel="nats", title="Loss of the true next token", ylim=(0, max(heights) * 1.15))
    return figure


def leak(losses: dict[str, list[list[float]]]) -> Figure:
    """Training losses on random letters with the causal mask and without; no honest model gets below log 26."""
    figure = Figure(figsize=(6.5, 2.9), layout="constrained")
    axes = figure.subplots()
    for (name, seeds), color in zip(losses.items(), (COLORS["tiled"], COLORS["naive"]), strict=True):
        for i, curve in enumerate(seeds):
            axes.plot(curve, color=color, linewidth=1.3, alpha=0.8, label=None if i else name)
    axes.axhline(math.log(LETTERS), color=COLORS["grey"], linestyle="--", linewidth=1)
    end = len(next(iter(losses.values()))[0])
    axes.text(end, 3.4, "log 26: what a random letter costs", ha="right", color=COLORS["grey"], fontsize=9)
    axes.set(xlabel="step", ylabel="loss (nats)", title="Training on random letters", ylim=(0, 4))
    axes.legend(loc="center right")
    return figure


def influences(matrices: dict[str, Tensor], text: str) -> Figure:
    """Which logits (rows) move when one token (columns) is another: dark where they do."""
    figure = Figure(figsize=(2.9 * len(matrices), 3.3), layout="constrained")
    for axes, (name, moved) in zip(figure.subplots(1, len(matrices)), matrices.items(), strict=True):
        squares(axes, moved > 0, COLORS["tiled"])
        places = range(len(text))
        axes.set_xticks(places, list(text))
        axes.set_yticks(places, list(text))
        axes.set(title=name, xlabel="token that is changed")
    figure.axes[0].set_ylabel("position whose logits move")
    return figure


def squares(axes: Axes, on: Tensor, color: str) -> None:
    """Draw a matrix of yes and no."""
    axes.imshow(on.float().numpy(), cmap=ListedColormap([COLORS["light"], color]), vmin=0, vmax=1)
    axes.set_xticks([x - 0.5 for x in range(1, len(on))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(on))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def ladder(levels: dict[str, float], records: list[Record], start: float) -> Figure:
    """Bits a byte of held-out text: of ever better models, and of the last one while it trains."""
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    colors = [COLORS["grey"] if "xz" in name else COLORS["tiled"] for name in levels]
    bars = left.barh(list(levels), list(levels.values()), color=colors, height=0.62)
    left.bar_label(bars, [f"{x:.2f}" for x in levels.values()], padding=4)
    left.invert_yaxis()
    left.set(xlabel="bits per byte, held out", xlim=(0, max(levels.values()) * 1.16))
    points = [(r.tokens / 1e3, r.bits_per_byte) for r in records if r.bits_per_byte is not None]
    right.plot(*zip((0, start), *points, strict=True), "o-", color=COLORS["tiled"], markersize=4)
    right.set(xlabel="tokens read in training (thousands)", ylabel="bits per byte", title="after the warm start")
    return figure


def task(objective: str, prefix: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sentence: what is read, who sees whom, and what each position must say (IGNORE: nothing)."""
    ids, t = torch.arange(len(WORDS))[None], len(WORDS)
    if objective == "masked LM":
        generator = torch.Generator().manual_seed(seed)
        read, says = masked_lm_targets(ids, mask=MASK, vocabulary=t, share=share, generator=generator)
        return read[0], torch.ones(t, t, dtype=torch.bool), says[0]
    length = prefix if objective == "prefix LM" else 0
    says = next_tokens(ids, ids < length)[0]
    return ids[0], prefix_lm_mask(torch.tensor(length), t), torch.cat([says, torch.tensor([IGNORE])])


def objective(objective: str = "next token", prefix: int = 5, share: float = 0.15, seed: int = 1) -> tuple[Figure, str]:
    """One sentence under one objective: who sees whom, and beside each position what it reads and must say."""
    read, visible, says = task(objective, prefix, share, seed)
    t, words = len(WORDS), [*WORDS, "[MASK]"]
    figure = Figure(figsize=(8.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    squares(left, visible, OBJECTIVES[objective])
    left.set_yticks(range(t), [words[i] for i in read.tolist()])
    left.set_xticks([])
    left.set(title="a position (row) sees these tokens", xlabel="tokens, from first to last")
    right.set(xlim=(0, 1), ylim=(t - 0.5, -0.5), title="it must say")
    right.axis("off")
    for row, target in enumerate(says.tolist()):
        if target == IGNORE:
            right.text(0.4, row, "-", va="center", ha="center", color=COLORS["grey"])
        else:
            right.barh(row, 0.8, height=0.8, color=OBJECTIVES[objective], alpha=0.25)
            right.text(0.4, row, words[target], va="center", ha="center")
    count = int((says != IGNORE).sum())
    return figure, f"{objective}: {count} of {t} positions have a target, and so a gradient; one pass over {t} tokens"
