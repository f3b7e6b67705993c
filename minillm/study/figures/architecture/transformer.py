"""Drawings of architecture/transformer."""

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from minillm.attention.naive import attention, visible
from minillm.study.notebook import COLORS

METHODS = {"pre-norm": COLORS["tiled"], "post-norm": COLORS["naive"]}
HIDDEN_SEEN = ListedColormap([COLORS["light"], COLORS["tiled"]])


def box(axes: Axes, x: float, y: float, text: str, color: str, *, width: float = 1.5, ink: str = "white") -> None:
    """A labelled box centred at (x, y)."""
    patch = FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle="round,pad=0.02,rounding_size=0.12")
    patch.set(facecolor=color, edgecolor="none")
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color=ink)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """An arrow from start to end."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6})


def decoder(layers: int) -> Figure:
    """The whole model: one stream of vectors, from which each layer reads through a norm and to which it adds."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    axes = figure.subplots()
    grey, light = COLORS["grey"], COLORS["light"]
    frame = FancyBboxPatch((2.15, -0.55), 8.75, 3.2, boxstyle="round,pad=0.02,rounding_size=0.2")
    frame.set(facecolor="none", edgecolor=grey, linestyle="--")
    axes.add_patch(frame)
    axes.text(6.5, 2.35, f"block, {layers} times", ha="center", va="center", fontsize=10, color=grey)
    axes.plot([1.85, 12.05], [1.6, 1.6], color=COLORS["accent"], linewidth=4, solid_capstyle="butt", zorder=0)
    axes.text(3.0, 1.85, "residual stream", ha="center", fontsize=9, color="#8a5a00")
    box(axes, 0.9, 1.6, "embedding", grey, width=1.8)
    for left, name, color in (2.6, "attention", COLORS["tiled"]), (6.9, "feed-forward", COLORS["sdpa"]):
        arrow(axes, (left, 1.6), (left, 0.32), grey)
        box(axes, left + 0.4, 0, "norm", light, width=1.1, ink="black")
        arrow(axes, (left + 0.97, 0), (left + 1.35, 0), grey)
        box(axes, left + 2.2, 0, name, color, width=1.7)
        axes.plot([left + 3.07, left + 3.55], [0, 0], color=grey, linewidth=1.6)
        arrow(axes, (left + 3.55, -0.01), (left + 3.55, 1.42), grey)
        axes.plot([left + 3.55], [1.6], "o", markersize=15, color="white", markeredgecolor=grey)
        axes.text(left + 3.55, 1.59, "+", ha="center", va="center", fontsize=14)
    box(axes, 11.75, 1.6, "norm", light, width=1.1, ink="black")
    arrow(axes, (12.3, 1.6), (12.65, 1.6), grey)
    box(axes, 13.2, 1.6, "head", grey, width=1.1)
    axes.text(0.9, 0.95, "token ids in", ha="center", fontsize=9, color=grey)
    axes.text(13.2, 0.95, "logits out", ha="center", fontsize=9, color=grey)
    axes.set(xlim=(-0.1, 13.85), ylim=(-0.65, 2.75))
    axes.axis("off")
    return figure


def influence(changes: dict[str, Tensor]) -> Figure:
    """For each setting, how much the logits of every position (rows) change with the token of every column."""
    figure = Figure(figsize=(3.6 * len(changes), 3.3), layout="constrained")
    panels = figure.subplots(1, len(changes), squeeze=False)[0]
    top = max(change.max().item() for change in changes.values())
    for axes, (name, change) in zip(panels, changes.items(), strict=True):
        picture = axes.imshow(change, vmin=0, vmax=top)
        axes.set(title=name, xlabel="position of the token replaced", ylabel="position of the logits")
        axes.set_xticks(range(0, change.shape[1], 2))
        axes.set_yticks(range(0, change.shape[0], 2))
    figure.colorbar(picture, ax=panels, label="largest change of a logit", shrink=0.9)
    return figure


def symmetry(rows: dict[str, tuple[float, float]]) -> Figure:
    """For each setting two distances after the tokens are permuted: to the old outputs, and to those permuted along."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    places = torch.arange(len(rows))
    labels = "compared in place (0: invariant)", "permuted along (0: equivariant)"
    for shift, color, label, which in ((-0.19, "light", labels[0], 0), (0.19, "tiled", labels[1], 1)):
        values = [pair[which] for pair in rows.values()]
        bars = axes.barh(places + shift, values, height=0.36, color=COLORS[color], label=label)
        axes.bar_label(bars, ["0" if v < 1e-4 else f"{v:.1f}" for v in values], padding=4, fontsize=10)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, max(max(pair) for pair in rows.values()) * 1.15)
    axes.set_xlabel("largest difference of a block's outputs")
    figure.legend(loc="outside upper center", ncols=2, fontsize=10)
    return figure


def growth(sizes: dict[str, list[list[float]]], gradients: dict[str, dict[int, list[float]]]) -> Figure:
    """Size of the stream after each layer, a line for each seed; gradient of the last layer against the depth."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, seeds in sizes.items():
        for i, values in enumerate(seeds):
            left.plot(values, color=METHODS[method], linewidth=1.4, alpha=0.8, label=None if i else method)
    depth = len(next(iter(sizes.values()))[0]) - 1
    left.set(xlabel="layers so far", ylabel="stream, root mean square", xlim=(0, depth), ylim=(0, None))
    left.set_title("forward: size of the stream")
    left.legend(loc="upper left")
    for method, by_depth in gradients.items():
        depths = list(by_depth)
        for one in zip(*by_depth.values(), strict=True):
            right.plot(depths, one, ".-", color=METHODS[method], linewidth=1.4, alpha=0.8)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(depths, [str(d) for d in depths])
    ticks = [0.05, 0.1, 0.2, 0.5]
    right.set_yticks(ticks, [f"{y:g}" for y in ticks])
    right.minorticks_off()
    right.set(xlabel="layers in the stack", ylabel="gradient norm", title="backward: gradient of the last layer")
    return figure


def mask(new: int = 3, cached: int = 6, aligned: str = "top left") -> tuple[Figure, str]:
    """What `new` queries behind `cached` tokens see under an alignment, and how far each output is off."""
    s = new + cached
    offset = cached if aligned == "bottom right" else 0
    seen = visible(new, s, offset=offset)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 16, generator=generator) for n in (new, s, s))
    difference = attention(q, k, v, causal=True, offset=offset) - attention(q, k, v, causal=True)
    errors = difference.abs().amax(dim=-1).flatten()
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1], sharey=True)
    left.imshow(seen, cmap=HIDDEN_SEEN, vmin=0, vmax=1, aspect="auto")
    left.set_xticks([x - 0.5 for x in range(1, s)], minor=True)
    left.set_yticks([y - 0.5 for y in range(1, new)], minor=True)
    left.grid(which="minor", color="white", linewidth=1.5)
    left.tick_params(which="minor", length=0)
    if cached:
        left.axvline(cached - 0.5, color=COLORS["accent"], linewidth=3)
    left.set_xticks(range(0, s, max(1, s // 8)))
    left.set_yticks(range(new), [f"new {i} at {cached + i}" for i in range(new)])
    left.set(xlabel="key at position" + (", new ones right of the line" if cached else ""), title=f"{aligned}: seen")
    right.barh(range(new), errors.tolist(), color=COLORS["naive"])
    right.set(
        xlabel="error of the output", title="against the right mask", xlim=(0, max(0.1, errors.max().item() * 1.1))
    )
    counts = seen.sum(dim=1).tolist()
    each = f"1 key of {s}" if counts == [1] else f"{', '.join(map(str, counts))} of {s} keys"
    wrong = "every output is right" if errors.max() < 1e-5 else f"the outputs are off by up to {errors.max():.2f}"
    caption = f"{new} new token{'s' * (new > 1)} behind {cached} cached, {aligned}: the queries see {each}; {wrong}"
    return figure, caption


def operations(weights: float, a_position: float, equal: float) -> Figure:
    """Floating-point operations of one token's forward pass: by the weights, and by the scores at each position."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    axes = figure.subplots()
    positions = [2**i for i in range(10, 18)]
    axes.plot(positions, [weights / 1e9] * len(positions), color=COLORS["tiled"], label="products with weights")
    axes.plot(
        positions, [a_position * p / 1e9 for p in positions], color=COLORS["naive"], label="scores and weighted sums"
    )
    axes.plot([equal], [weights / 1e9], "o", markersize=8, color=COLORS["accent"])
    axes.annotate(
        f"equal near {round(equal, -2):,.0f}",
        (equal, weights / 1e9),
        xytext=(-8, 10),
        textcoords="offset points",
        ha="right",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(positions, [f"{p // 1024}k" for p in positions])
    axes.minorticks_off()
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.set(xlabel="position of the token", ylabel="operations a token (10⁹)", title="Llama 3 8B, forward")
    axes.legend(loc="upper left")
    return figure
