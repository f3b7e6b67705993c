"""Drawings of architecture/llama."""

import math

from matplotlib.figure import Figure

from minillm.architecture.llama import RELEASES, cached_bytes, parameter_parts, scaled_frequencies
from minillm.position.rope import inverse_frequencies
from minillm.study.notebook import COLORS

SHARED, OWN = COLORS["tiled"], COLORS["naive"]  # query heads that share key/value heads, that have their own

# Meta's card of Llama 3: Llama 3 8B and Llama 2 70B, higher is better
BASE = {
    "MMLU": (66.6, 69.7),
    "AGIEval English": (45.9, 54.8),
    "CommonSenseQA": (72.6, 78.7),
    "Winogrande": (76.1, 81.8),
    "BIG-Bench Hard": (61.1, 65.7),
    "ARC-Challenge": (78.6, 85.3),
    "TriviaQA": (78.5, 87.5),
    "SQuAD": (76.4, 82.6),
    "QuAC": (44.4, 49.4),
    "BoolQ": (75.7, 73.1),
    "DROP": (58.4, 70.2),
}
INSTRUCT = {
    "MMLU": (68.4, 52.9),
    "GPQA": (34.2, 21.0),
    "HumanEval": (62.2, 25.6),
    "GSM-8K": (79.6, 57.5),
    "MATH": (30.0, 11.6),
}
BELOW = {"Llama 2 70B", "Llama 1 7B", "Llama 1 13B"}  # names under the point


def cache() -> Figure:
    """Cache of one token in 16 bits against the parameters, one point a release; both axes logarithmic."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, release in RELEASES.items():
        if name in ("Llama 2 7B", "Llama 2 13B"):
            continue  # the shapes of Llama 1
        config = release.config
        x, y = sum(parameter_parts(config).values()) / 1e9, cached_bytes(config) / 1024
        color = SHARED if config.kv_heads < config.heads else OWN
        axes.plot([x], [y], "o", color=color, markersize=8)
        label = name.replace("1 7B", "1, 2 7B").replace("1 13B", "1, 2 13B")
        down = name in BELOW
        axes.annotate(
            label, (x, y), xytext=(0, -9 if down else 9), textcoords="offset points", ha="center",
            va="top" if down else "bottom", fontsize=9, color=color,
        )  # fmt: skip
    axes.text(4.6, 3200, "every query head has its own keys", color=OWN, fontsize=10)
    axes.text(130, 130, "8 key/value heads", color=SHARED, fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.set(xlim=(4, 700), ylim=(90, 4600), xlabel="parameters (billions)", ylabel="cache of one token (KiB)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True)
    return figure


def ablation(results: dict[str, list[float]]) -> Figure:
    """Held-out bits per byte of each variant, a dot for each seed; the band is the spread of the first one."""
    figure = Figure(figsize=(7.0, 3.3), layout="constrained")
    axes = figure.subplots()
    first = next(iter(results.values()))
    axes.axvspan(min(first), max(first), color=COLORS["light"])
    for row, values in enumerate(results.values()):
        axes.plot(values, [row] * len(values), "o", color=COLORS["tiled"] if not row else COLORS["naive"], alpha=0.75)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.grid(True, axis="x")
    axes.set(xlabel="held-out bits per byte (lower is better)", title="A toy, one part replaced; a dot is a seed")
    return figure


def vocabulary(sizes: list[int], lengths: list[float]) -> Figure:
    """Bytes a token against the vocabulary, measured; and the share of two tables in the 8B model, computed."""
    figure = Figure(figsize=(8.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(sizes, lengths, "o-", color=COLORS["tiled"])
    left.set(xlabel="vocabulary", ylabel="bytes of text a token", ylim=(0, None), title="Held-out novels, measured")
    parts = parameter_parts(RELEASES["Llama 3 8B"].config)
    body, row = parts["attention"] + parts["feed-forward"] + parts["norms"], 2 * 4096
    many = [2**n for n in range(13, 19)]
    right.plot(many, [100 * v * row / (body + v * row) for v in many], color=COLORS["naive"])
    for v, text in ((32000, "32,000"), (128256, "128,256")):
        share = 100 * v * row / (body + v * row)
        right.plot([v], [share], "o", color=COLORS["naive"])
        right.annotate(
            f"{text}: {share:.1f} %", (v, share), xytext=(-8, 3), textcoords="offset points", ha="right", fontsize=10
        )
    right.set(xlabel="vocabulary", ylabel="embedding and head\n(% of parameters)", ylim=(0, None))
    right.set_title("Llama 3 8B, computed")
    for axes, ticks in ((left, sizes[::2]), (right, many[1::2])):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{v:,}" for v in ticks])
        axes.minorticks_off()
        axes.grid(True)
    return figure


def wavelengths() -> Figure:
    """Positions for a full turn of each of the 64 pairs of a head, for Llama 2, 3 and 3.1; contexts as lines."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = figure.subplots()
    slow = inverse_frequencies(128, base=5e5)
    curves = {
        "Llama 2: base 10,000": (inverse_frequencies(128), COLORS["naive"]),
        "Llama 3: base 500,000": (slow, COLORS["tiled"]),
        "Llama 3.1: the same base, slow pairs / 8": (scaled_frequencies(slow), COLORS["sdpa"]),
    }
    for name, (frequencies, color) in curves.items():
        axes.plot(range(64), 2 * math.pi / frequencies, color=color, label=name)
    for context, text, side in ((4096, "Llama 2", "top"), (8192, "Llama 3", "bottom"), (131072, "Llama 3.1", "bottom")):
        axes.axhline(context, color=COLORS["grey"], linestyle="--", linewidth=1)
        place = context * (1.1 if side == "bottom" else 0.85)
        axes.text(0, place, f"context of {text}: {context:,}", fontsize=9, color=COLORS["grey"], va=side)
    axes.set_yscale("log")
    axes.set(xlabel="pair of channels", ylabel="positions for a full turn", ylim=(3, 1e8))
    axes.legend(loc="lower right", fontsize=9)
    return figure


def benchmarks() -> Figure:
    """Llama 3 8B against Llama 2 70B on Meta's card: base models, then tuned ones."""
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, rows, title in zip(panels, (BASE, INSTRUCT), ("base models", "tuned models"), strict=True):
        for row, pair in enumerate(rows.values()):
            axes.plot(pair, [row, row], color=COLORS["light"], linewidth=3, zorder=1)
        small, large = zip(*rows.values(), strict=True)
        axes.plot(small, range(len(rows)), "o", color=COLORS["tiled"], label="Llama 3 8B")
        axes.plot(large, range(len(rows)), "o", color=COLORS["naive"], label="Llama 2 70B")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="score", title=title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def serve(model: str = "Llama 3 8B", tokens: int = 8192, users: int = 32) -> tuple[Figure, str]:
    """Memory for weights and cache in 16 bits, as published and with as many key/value as query heads."""
    config = RELEASES[model].config
    weights = 2 * sum(parameter_parts(config).values()) / 2**30
    heads, one = config.kv_heads, cached_bytes(config) / config.kv_heads * tokens * users / 2**30  # of one KV head
    rows = {f"{heads} KV heads": heads * one, f"{config.heads} KV heads": config.heads * one}
    figure = Figure(figsize=(7.4, 1.5 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(rows), [weights] * len(rows), color=COLORS["grey"], label="weights")
    for (name, size), color in zip(rows.items(), (SHARED, OWN), strict=False):
        axes.barh([name], [size], left=weights, color=color)
        axes.annotate(
            f"cache {size:,.1f} GiB", (weights + size, name), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.set_xlim(0, (weights + max(rows.values())) * 1.3)
    axes.set(xlabel=f"GiB in 16 bits: weights {weights:,.0f} (grey), then the cache", title=f"{model}, {users} users")
    over = f"; the model was trained for {config.context:,}" if tokens > config.context else ""
    caption = (
        f"{users} users of {tokens:,} tokens: {heads * one:,.1f} GiB of cache beside {weights:,.1f} GiB of weights, "
        f"{heads * one / weights:.2g} times as much{over}"
    )
    return figure, caption
