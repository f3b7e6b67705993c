"""Drawings of alignment/ppo."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.alignment.learn import Step
from minillm.alignment.ppo import clipped_surrogate, gae
from minillm.study.notebook import COLORS

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 0.0], dtype=torch.float64)  # a policy over six tokens
REFERENCE = torch.tensor([0.0, 1.0, 1.5, 0.0, -0.5, 1.0], dtype=torch.float64)
SHADES = [COLORS["naive"], COLORS["tiled"], COLORS["sdpa"], COLORS["accent"], COLORS["triton"]]


def push(ratio: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """Minus the gradient of the loss for log p: how hard each token is pushed up."""
    log_ratio = ratio.log().requires_grad_()
    surrogate = clipped_surrogate(log_ratio.exp(), advantage, low=clip, high=clip)
    return torch.autograd.grad(surrogate.sum(), log_ratio)[0]


def surrogates(clip: float = 0.2) -> Figure:
    """The clipped surrogate against the ratio, for a good and a bad token; flat where the gradient is gone."""
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    panels = figure.subplots(1, 2)
    ratio = torch.linspace(0.01, 2, 400)
    for axes, advantage, title in zip(panels, (1.0, -1.0), ("advantage +1", "advantage -1"), strict=True):
        gain = torch.full_like(ratio, advantage)
        value, flat = clipped_surrogate(ratio, gain, low=clip, high=clip), push(ratio, gain, clip=clip) == 0
        axes.axvspan(1 - clip, 1 + clip, color=COLORS["light"], linewidth=0)
        axes.plot(ratio, ratio * advantage, color=COLORS["grey"], linestyle=":", label="not clipped")
        axes.plot(ratio, value, color=COLORS["tiled"], label="surrogate")
        axes.plot(ratio[flat], value[flat], color=COLORS["naive"], linewidth=3.5, label="gradient 0")
        axes.set(xlabel="ratio policy / old", ylabel="surrogate", title=title)
        axes.legend(loc="lower right" if advantage > 0 else "lower left")
    return figure


def wear(traces: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Over the updates on one batch: tokens outside of the range, and KL from the policy that sampled."""
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, (outside, kl)), color in zip(traces.items(), SHADES, strict=False):
        left.plot(100 * outside, color=color, label=name)
        right.plot(kl, color=color, label=name)
    left.set(xlabel="updates on the same samples", ylabel="tokens out of range (%)")
    right.set(xlabel="updates on the same samples", ylabel="KL (nats a token)")
    left.set_ylim(0, 1.4 * 100 * max(float(outside.max()) for outside, _ in traces.values()))
    left.legend(loc="upper left")
    left.set_title("Measured: ratios outside 0.8 to 1.2")
    right.set_title("Measured: KL from the sampler")
    return figure


def penalties(kls: Mapping[str, Tensor]) -> Figure:
    """KL to the reference over the steps, if a penalty is all that the policy follows; [seeds steps] each."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    axes = figure.subplots()
    styles = ["-", "-", "--", ":", "-"]
    for (name, several), color, style in zip(kls.items(), SHADES, styles, strict=False):
        for i, kl in enumerate(several):
            axes.plot(kl, color=color, linestyle=style, linewidth=1.5, label=name if i == 0 else None)
    axes.set(xlabel="steps of descent on the penalty alone", ylabel="KL to the reference (nats)")
    axes.set_ylim(0, 1.3 * max(float(kl.max()) for kl in kls.values()))
    axes.set_title("Toy of six tokens: who comes back to the reference?")
    figure.legend(loc="outside right upper", fontsize=10)
    return figure


def credit(rewards: Tensor, values: Tensor, lams: Sequence[float]) -> Figure:
    """The advantages of one response's tokens for several lam, beside what the critic said. Rewards, values: [t]."""
    figure = Figure(figsize=(8.0, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    place = torch.arange(len(values))
    left.plot(place, values, color=COLORS["grey"], marker="o", label="critic")
    left.bar(place, rewards, color=COLORS["accent"], width=0.5, label="reward")
    left.set(xlabel="token", ylabel="expected reward", ylim=(0, 1.6), title="the response")
    left.legend(loc="upper left")
    mask = torch.ones(1, len(values), dtype=torch.bool)
    width = 0.8 / len(lams)
    for i, (lam, color) in enumerate(zip(lams, (COLORS["naive"], COLORS["sdpa"], COLORS["tiled"]), strict=False)):
        shift = (i - (len(lams) - 1) / 2) * width
        advantage = gae(rewards[None], values[None], mask, lam=lam).advantages[0]
        right.bar(place + shift, advantage, width * 0.92, color=color, label=f"lam = {lam:g}")
    right.axhline(0, color=COLORS["grey"], linewidth=1)
    right.set(xlabel="token", ylabel="advantage", title="who gets the credit")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.45 * (high - low))
    right.legend(loc="upper left", ncols=len(lams), fontsize=10)
    return figure


def band(axes: Axes, steps: Sequence[int], several: Tensor, color: str, label: str | None = None) -> None:
    """Mean and range over seeds; `several` is [seeds steps]."""
    axes.plot(steps, several.mean(dim=0), color=color, label=label)
    axes.fill_between(steps, several.amin(dim=0), several.amax(dim=0), color=color, alpha=0.2, linewidth=0)


def learned(runs: Sequence[Sequence[Step]], start: float, tries: Mapping[str, Sequence[float]]) -> Figure:
    """What to watch in a run, the range over its seeds shaded; `tries` is pass@1, pass@2, ... before and after."""
    figure = Figure(figsize=(9.2, 4.8), layout="constrained")
    panels = figure.subplots(2, 3)
    steps = [step.step for step in runs[0]]
    seen = [step.step for step in runs[0] if step.accuracy is not None]
    right = torch.tensor([[start, *(s.accuracy for s in run if s.accuracy is not None)] for run in runs])
    accuracy, entropy, kl, clipped, length, last = panels.flat
    band(accuracy, [0, *seen], right, COLORS["tiled"], "held out, greedy")
    band(accuracy, steps, torch.tensor([[s.reward for s in run] for run in runs]), COLORS["accent"], "as sampled")
    accuracy.set(ylabel="share right", ylim=(0, 1))
    accuracy.legend(loc="lower right", fontsize=10)
    band(entropy, steps, torch.tensor([[s.entropy for s in run] for run in runs]), COLORS["tiled"])
    entropy.set(ylabel="entropy (nats)", ylim=(0, None))
    band(kl, steps, torch.tensor([[s.kl for s in run] for run in runs]), COLORS["tiled"])
    kl.set(ylabel="KL to the start (nats)", ylim=(0, None))
    band(clipped, steps, torch.tensor([[100 * s.clipped for s in run] for run in runs]), COLORS["tiled"])
    clipped.set(ylabel="clip fraction (%)", ylim=(0, None))
    band(length, steps, torch.tensor([[s.length for s in run] for run in runs]), COLORS["tiled"])
    length.set(ylabel="length (tokens)", ylim=(5, 7))
    for axes in (accuracy, entropy, kl, clipped, length):
        axes.set_xlabel("step of PPO")
    for (name, passed), color in zip(tries.items(), (COLORS["grey"], COLORS["tiled"]), strict=False):
        last.plot(range(1, len(passed) + 1), passed, color=color, marker="o", markersize=4, label=name)
    last.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
    last.legend(loc="lower right", fontsize=10)
    return figure


def ratios(several: Mapping[str, Tensor], clip: float = 0.2) -> Figure:
    """Histograms of the ratios of response tokens, the range that clipping allows shaded."""
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    panels = figure.subplots(1, len(several), sharey=True)
    colors = [COLORS["tiled"], COLORS["naive"], COLORS["accent"]]
    for axes, (name, ratio), color in zip(panels, several.items(), colors, strict=False):
        axes.axvspan(math.log2(1 - clip), math.log2(1 + clip), color=COLORS["light"], linewidth=0)
        shares = torch.full((len(ratio),), 100 / len(ratio))
        axes.hist(ratio.clamp(0.01, 99).log2(), bins=33, range=(-3.3, 3.3), weights=shares, color=color)
        axes.set_xticks([-3, -1, 0, 1, 3], ["1/8", "1/2", "1", "2", "8"])
        axes.set(xlabel="ratio before any update", title=name)
    panels[0].set(ylabel="share of tokens (%, log)", yscale="log")
    return figure


def board(clip: float = 0.2, advantage: float = 1.0, ratio: float = 1.5) -> tuple[Figure, str]:
    """Where a token is pushed, and how hard: over all ratios and advantages, and along this advantage."""
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    across, up = torch.linspace(0.02, 2.5, 249), torch.linspace(-2, 2, 161)
    field = push(across.repeat(len(up), 1), up[:, None].expand(-1, len(across)), clip=clip)
    silent = field == 0
    shown = left.imshow(
        field.masked_fill(silent, torch.nan), origin="lower", extent=(0.02, 2.5, -2, 2), aspect="auto",
        cmap="RdBu", vmin=-5, vmax=5,
    )  # fmt: skip
    left.set_facecolor(COLORS["light"])
    figure.colorbar(shown, ax=left, label="push on log p")
    for edge in (1 - clip, 1 + clip):
        left.axvline(edge, color=COLORS["grey"], linewidth=1, linestyle="--")
    left.plot([ratio], [advantage], marker="o", color="black", markersize=9, markerfacecolor=COLORS["accent"])
    left.set(xlabel="ratio policy / old", ylabel="advantage", title="grey: no gradient")
    along = push(across, torch.full_like(across, advantage), clip=clip)
    here = push(torch.tensor([ratio]), torch.tensor([advantage]), clip=clip).item()
    right.axvspan(1 - clip, 1 + clip, color=COLORS["light"], linewidth=0)
    right.axhline(0, color=COLORS["grey"], linewidth=1)
    right.plot(across, along, color=COLORS["tiled"])
    right.plot([ratio], [here], marker="o", color="black", markersize=9, markerfacecolor=COLORS["accent"])
    right.set(xlabel="ratio policy / old", ylabel="push on log p", ylim=(-5.2, 5.2))
    right.set_title(f"along advantage {advantage:+.1f}")
    what = "clipped: no gradient" if here == 0 else f"the token is pushed {'up' if here > 0 else 'down'}"
    return figure, f"ratio {ratio:.2f}, advantage {advantage:+.1f}, clip {clip:.2f}: {what}, {here:+.2f}"
