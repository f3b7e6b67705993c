"""Drawings of training/precision."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.study.notebook import COLORS
from minillm.training.formats import BF16, E4M3FN, E5M2, FORMATS, FP16, encode, round_to
from minillm.training.rounding import BATCH, TOY, Trained

LINES = {
    "fp32": COLORS["grey"],
    "fp16": COLORS["naive"],
    "fp16, loss scaled": COLORS["tiled"],
    "bf16": COLORS["sdpa"],
}
NAMED = {format.name: format for format in (FP16, BF16, E5M2, E4M3FN)}
ZERO, SUBNORMAL, NORMAL = COLORS["naive"], "#F4B183", COLORS["tiled"]
MEASURED = BATCH * TOY.context  # letters in the mean that the gradients were measured with


def sized(width: float = 6.8, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def learnt(runs: dict[str, Sequence[Trained]]) -> Figure:
    """Loss over the steps, smoothed over five: mean and range of the seeds."""
    figure, axes = sized()
    for name, several in runs.items():
        losses = torch.stack([run.losses for run in several]).unfold(1, 5, 1).mean(dim=2)
        steps = torch.arange(losses.shape[1]) + 5
        dashes = "--" if name == "bf16" else "-"
        axes.plot(steps, losses.mean(dim=0), dashes, color=LINES[name], label=name)
        axes.fill_between(steps, losses.amin(dim=0), losses.amax(dim=0), color=LINES[name], alpha=0.18, linewidth=0)
    axes.set(xlabel="steps of AdamW", ylabel="loss (nats a letter)", ylim=(2.2, 3.4))
    axes.set_title(f"Measured: a step of 2,048 micro-batches, {len(several)} seeds")
    axes.legend(loc="upper right", ncols=2)
    return figure


def histogram(gradients: Tensor, letters: int = 20, scale: int = 0, format: str = "fp16") -> tuple[Figure, str]:
    """Sizes of the gradients of a mean over 2^letters letters, the loss times 2^scale, and where a format ends."""
    kind = NAMED[format]
    sizes = gradients[gradients != 0].abs() * (MEASURED * 2.0 ** (scale - letters))
    powers = sizes.log2()
    figure, axes = sized(7.4, 3.4)
    low, high = -64, 24
    edges = torch.arange(low, high + 1).double()
    counts = torch.histc(powers.clamp(low, high - 0.01).float(), bins=high - low, min=low, max=high) / len(powers)
    zero, normal = torch.tensor([kind.smallest_subnormal / 2, kind.smallest_normal]).double().log2().tolist()
    end = torch.tensor(kind.largest).double().log2().item()
    middles = edges[:-1] + 0.5
    colors = [
        ZERO if m < zero else SUBNORMAL if m < normal else NORMAL if m < end else COLORS["triton"] for m in middles
    ]
    axes.bar(middles, 100 * counts, width=0.9, color=colors)
    shown = [(zero, zero - 0.6, "becomes 0", "right"), (end, end + 0.6, "the end", "left")]
    if normal - zero > 8:
        shown.append((normal, (zero + normal) / 2, "fewer\ndigits", "center"))
    for line, place, text, side in shown:
        if low < line < high:
            axes.axvline(line, color=COLORS["grey"], linestyle="--", linewidth=1)
            axes.text(place, 16.6, text, ha=side, va="top", fontsize=10)
    axes.set(xlabel="log2 of the gradient's size", ylabel="share (%)", xlim=(low, high), ylim=(0, 17))
    axes.set_title(f"{format}: gradients of activations, a mean over 2^{letters} letters, loss times 2^{scale}")
    lost, faint = (sizes <= kind.smallest_subnormal / 2).float().mean(), (powers < normal).float().mean()
    over = (sizes > kind.largest).float().mean()
    caption = (
        f"{100 * lost:.0f} % become 0, {100 * (faint - lost):.0f} % lose digits, "
        f"{100 * over:.0f} % are beyond the largest number"
    )
    return figure, caption


def number_line(power: int = -26) -> tuple[Figure, str]:
    """Where the numbers of each format lie, and what becomes of 1.1 x 2^power."""
    x = 1.1 * 2.0**power
    figure, axes = sized(8.2, 3.4)
    for row, format in enumerate(FORMATS):
        ends = [format.smallest_subnormal, format.smallest_normal, format.largest]
        tiny, normal, large = torch.tensor(ends).double().log2().tolist()
        axes.barh(row, normal - tiny, left=tiny, height=0.5, color=SUBNORMAL)
        axes.barh(row, large - normal, left=normal, height=0.5, color=NORMAL)
        got = round_to(x, format)
        bad = got == 0 or encode(x, format) >= format.infinity
        text = f"{got:.3g}" + ("" if bad else f"  ({100 * abs(got / x - 1):.2g} % off)")
        axes.text(136, row, text, va="center", fontsize=10, color=ZERO if bad else "black", clip_on=False)
    axes.axvline(power, color="black", linewidth=1)
    axes.set_yticks(range(len(FORMATS)), [format.name for format in FORMATS])
    axes.invert_yaxis()
    axes.set(xlim=(-152, 132), xlabel="log2 of the number  (pale: subnormal, fewer digits)")
    axes.set_title(f"{x:.3g} = 1.1 x 2^{power} in six formats")
    lost = [format.name for format in FORMATS if round_to(x, format) == 0]
    over = [format.name for format in FORMATS if encode(x, format) >= format.infinity]
    caption = f"becomes 0 in {', '.join(lost) or 'none'}; is beyond the end of {', '.join(over) or 'none'}"
    return figure, caption


def trace(run: Trained, bad: int) -> Figure:
    """The scale over a training, with the steps that were skipped."""
    figure, axes = sized(7.2, 3.2)
    powers = run.scales.log2()
    steps = torch.arange(len(powers))
    skipped = (powers.diff() < 0).nonzero().flatten()
    axes.step(steps, powers, where="post", color=NORMAL, label="scale")
    axes.plot(skipped, powers[skipped], "x", color=ZERO, markersize=7, markeredgewidth=2, label="step skipped")
    axes.annotate(
        "an infinite loss", (bad, powers[bad]), xytext=(bad - 4, powers[bad] + 5), arrowprops={"arrowstyle": "->"}
    )
    axes.set(xlabel="step", ylabel="log2 of the scale", title="Measured: from 2^32, doubled after 10 good steps")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper right")
    return figure


def budget(held: dict[str, dict[str, float]]) -> Figure:
    """Bytes a parameter of several ways to train, by what they are for."""
    figure, axes = sized(7.2, 2.7)
    colors = dict(
        zip(("weights", "gradients", "masters", "moments"), (NORMAL, SUBNORMAL, COLORS["sdpa"], "#9AA5B1"), strict=True)
    )
    for row, parts in enumerate(held.values()):
        left = 0.0
        for part, color in colors.items():
            size = parts.get(part, 0.0)
            axes.barh(row, size, left=left, height=0.55, color=color, label=part if row == len(held) - 1 else None)
            if size:
                axes.text(left + size / 2, row, f"{size:.0f}", ha="center", va="center")
            left += size
    axes.set_yticks(range(len(held)), list(held))
    axes.invert_yaxis()
    axes.set(xlabel="bytes a parameter, counted after a step of AdamW", xlim=(0, 21.5), xticks=range(0, 17, 4))
    axes.legend(loc="center right")
    return figure
