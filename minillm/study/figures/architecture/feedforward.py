"""Drawings of architecture/feedforward."""

import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from minillm.architecture.feedforward import gelu_feedforward, relu_feedforward, swiglu
from minillm.study.notebook import COLORS

METHODS = {
    "ReLU": COLORS["tiled"],
    "GELU": COLORS["accent"],
    "SwiGLU": COLORS["sdpa"],
    "identity": COLORS["naive"],
}
# name: matrices in the layer, channels c, hidden channels f, channels of keys (and of values)
CONFIGS = {
    "Transformer base": (2, 512, 2048, 512),
    "GPT-2": (2, 768, 3072, 768),
    "Llama 7B": (3, 4096, 11008, 4096),
    "Llama 3 8B": (3, 4096, 14336, 1024),
}


def width_sweep(ratios: list[float], errors: dict[str, list[list[float]]]) -> Figure:
    """Error on held-out data against f / c, one line a method through the mean of its seeds, each seed a dot."""
    figure = Figure(figsize=(6.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for method, several in errors.items():
        middle = [sum(seeds) / len(seeds) for seeds in several]
        axes.plot(ratios, middle, color=METHODS[method], label=method)
        for ratio, seeds in zip(ratios, several, strict=True):
            axes.plot([ratio] * len(seeds), seeds, "o", markersize=4, color=METHODS[method])
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12)
    axes.set(xlabel="hidden width f / c", ylabel="error (1 = predicting the mean)")
    axes.set_title("Products of two inputs, c = 16: toy, three seeds a point")
    axes.legend(loc="lower left")
    return figure


def spectra(before: Tensor, after: Tensor) -> Figure:
    """Singular values of the hidden channels of many tokens, before and after the activation, largest first."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, hidden, method in ("before: x up", before, "identity"), ("after: ReLU(x up)", after, "ReLU"):
        values = torch.linalg.svdvals(hidden)
        axes.semilogy((values / values[0]).clamp(min=1e-9), color=METHODS[method], label=name)
    axes.set_ylim(1e-9, 3)
    axes.set(xlabel="number of the singular value", ylabel="relative to the largest")
    axes.set_title(f"{before.shape[1]} hidden channels of {len(before):,} tokens")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.3))
    return figure


def read_out(keys: list[str], activation: Tensor, values: list[str], logits: Tensor) -> Figure:
    """What one neuron compares with (its key) and what it then adds to the score of each word (its value)."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names, numbers, color in (
        (left, keys, activation, COLORS["tiled"]),
        (right, values, logits, COLORS["sdpa"]),
    ):
        axes.barh(names, numbers.tolist(), color=color)
        axes.axvline(0, color=COLORS["grey"], linewidth=0.8)
        axes.invert_yaxis()
    left.set(xlabel="activation of the new neuron", title="key: which token it answers to")
    right.set(xlabel="added to the score", title="value: which word it writes")
    return figure


def paired(tasks: list[str], errors: dict[str, list[list[float]]]) -> Figure:
    """Errors of several methods on several tasks, every seed a dot, on a logarithmic axis."""
    figure = Figure(figsize=(6.5, 2.8), layout="constrained")
    axes = figure.subplots()
    for shift, (method, several) in zip((-0.12, 0.12), errors.items(), strict=True):
        for place, seeds in enumerate(several):
            label = method if place == 0 else None
            axes.plot(seeds, [place + shift] * len(seeds), "o", color=METHODS[method], label=label)
    axes.set_xscale("log")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.9)
    axes.set(xlabel="error (1 = predicting the mean)", title="Equal parameters, five seeds each: toy")
    axes.legend(loc="upper left", ncols=2)
    return figure


def shares(tokens: int) -> Figure:
    """Shares of one layer of real models, in parameters and in operations a token after `tokens` tokens of context."""
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (matrices, c, f, kv) in enumerate(CONFIGS.values()):
        parts = {"feed-forward": matrices * c * f, "projections": 2 * c * c + 2 * c * kv, "scores and sums": 0}
        _bar(left, place, parts)
        _bar(right, place, {name: 2 * n for name, n in parts.items()} | {"scores and sums": 4 * tokens * c})
    for axes, title in (left, "parameters"), (right, f"operations a token, {tokens:,} tokens of context"):
        axes.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75], xlabel="share of one layer", title=title)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    left.set_yticks(range(len(CONFIGS)), list(CONFIGS))
    left.invert_yaxis()
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles[:3], labels[:3], loc="outside lower center", ncols=3)
    return figure


def _bar(axes, place: int, parts: dict[str, int]) -> None:  # type: ignore[no-untyped-def]
    """One bar of stacked shares, each larger one with its percentage."""
    whole, start = sum(parts.values()), 0.0
    for (name, part), color in zip(parts.items(), (COLORS["tiled"], COLORS["accent"], COLORS["grey"]), strict=True):
        axes.barh(place, part / whole, left=start, color=color, label=name, height=0.65)
        if part / whole > 0.08:
            axes.text(start + part / whole / 2, place, f"{part / whole:.0%}", ha="center", va="center", color="white")
        start += part / whole


def growth(factors: list[int], parameters: list[int]) -> Figure:
    """Parameters of one layer against its width, beside an exponential that starts with the same doubling."""
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    first, second = parameters[:2]
    axes.plot(factors, parameters, "o-", color=COLORS["tiled"], label="counted: width squared")
    axes.plot(
        factors, [first * (second / first) ** (n - 1) for n in factors], "--", color=COLORS["naive"],
        label="exponential: times 4 for every step of 1",
    )  # fmt: skip
    for factor, number in zip(factors, parameters, strict=True):
        axes.annotate(
            f"{number / 1e6:.3g} M", (factor, number), xytext=(4, -13), textcoords="offset points", fontsize=9
        )
    axes.set_yscale("log")
    axes.set_xticks(factors)
    axes.set(xlabel="width, in multiples of 512 channels", ylabel="parameters of one layer")
    axes.set_xlim(0.7, factors[-1] + 0.9)
    axes.set_ylim(first / 3)
    axes.legend(loc="upper left")
    return figure


def folds(neurons: int = 8, activation: str = "ReLU") -> tuple[Figure, str]:
    """A curve fitted by one layer: hidden channels drawn by lot, the way down by least squares."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-3, 3, 301)[:, None]
    target = torch.sin(2 * x[:, 0]) + 0.3 * x[:, 0]
    token = torch.cat([x, torch.ones_like(x)], dim=1)  # the second channel carries the bias
    slope = 1.5 * (torch.randint(0, 2, (neurons,), generator=generator) * 2 - 1)
    place = torch.linspace(-3, 3, neurons + 2)[1:-1][torch.randperm(neurons, generator=generator)]
    up = torch.stack([slope, -slope * place], dim=1)
    gate = torch.stack([slope.roll(1), -(slope * place).roll(1)], dim=1)
    layers = {
        "ReLU": lambda down: relu_feedforward(token, up, down),
        "GELU": lambda down: gelu_feedforward(token, up, down),
        "SwiGLU": lambda down: swiglu(token, gate, up, down),
        "identity": lambda down: F.linear(F.linear(token, up), down),
    }
    # Each hidden channel alone: a way down that lets one through, two at a time as the token has two channels.
    ways = torch.eye(neurons + neurons % 2, neurons).view(-1, 2, neurons)
    hidden = torch.cat([layers[activation](way) for way in ways], dim=1)[:, :neurons]
    solved = torch.linalg.lstsq(hidden.double(), target.double()[:, None], rcond=1e-6, driver="gelsd").solution
    out = layers[activation](torch.cat([solved.mT.float(), torch.zeros(1, neurons)]))[:, 0]
    error = ((out - target) ** 2).mean().item() / target.var(correction=0).item()
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, hidden, linewidth=1.2, color=METHODS[activation], alpha=0.7)
    left.set(xlabel="x", ylabel="activation", title=f"{neurons} hidden channels, {activation}")
    right.plot(x, target, color=COLORS["grey"], linewidth=5, alpha=0.45, label="target")
    right.plot(x, out, color=METHODS[activation], label="layer")
    right.set(xlabel="x", ylabel="output", title="their weighted sum", ylim=(-2.6, 2.6))
    right.legend(loc="upper left")
    shape = {"ReLU": f"{neurons} fold{'s' * (neurons > 1)}, straight in between", "identity": "no fold at any width"}
    return figure, f"{shape.get(activation, 'smooth pieces')}; error {min(1.0, math.ceil(error * 1000) / 1000):.1%}"
