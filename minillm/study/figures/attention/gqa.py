"""Drawings of attention/gqa."""

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.attention.gqa import cache_bytes
from minillm.study.notebook import COLORS

KIB, MIB, GIB = 2**10, 2**20, 2**30
KINDS = {"MHA": COLORS["naive"], "GQA": COLORS["tiled"], "MQA": COLORS["accent"]}


@dataclass(frozen=True)
class Model:
    """What decides the size of a model's key/value cache, and its number of parameters."""

    layers: int
    heads: int  # query heads
    kv_heads: int
    head_size: int
    parameters: int

    def cache(self, tokens: int, *, batch: int = 1, kv_heads: int | None = None) -> int:
        """Bytes of the cache in 16 bits, with another number of key/value heads if one is given."""
        g = kv_heads or self.kv_heads
        return cache_bytes(layers=self.layers, kv_heads=g, head_size=self.head_size, tokens=tokens, batch=batch)


MODELS = {  # from the released configurations
    "Llama 2 7B": Model(32, 32, 32, 128, 6_738_415_616),
    "Llama 2 70B": Model(80, 64, 8, 128, 68_976_648_192),
    "Llama 3 8B": Model(32, 32, 8, 128, 8_030_261_248),
    "Llama 3 70B": Model(80, 64, 8, 128, 70_553_706_496),
    "Llama 3.1 405B": Model(126, 128, 8, 128, 405_853_388_800),
    "Qwen2 7B": Model(28, 28, 4, 128, 7_615_616_512),
    "Falcon 7B": Model(32, 71, 1, 64, 6_921_720_704),
}


def kind(heads: int, kv_heads: int) -> str:
    """MHA, GQA or MQA."""
    return "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"


def cache_by_model() -> Figure:
    """Cache of one token in 16 bits: as the model is, and with a key/value head for each query head."""
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    axes = figure.subplots()
    for row, model in enumerate(MODELS.values()):
        full, own = (model.cache(1, kv_heads=g) / KIB for g in (model.heads, model.kv_heads))
        color = KINDS[kind(model.heads, model.kv_heads)]
        axes.plot([own, full], [row, row], color=COLORS["light"], linewidth=3, zorder=1)
        axes.scatter(full, row, s=60, color=COLORS["grey"], zorder=2)
        axes.scatter(own, row, s=90, color=color, zorder=3)
        text = f"{own:g}" if own == full else f"{own:g} instead of {full:,.0f}"
        axes.text(full * 1.2, row, text, va="center", fontsize=9)
    heads = [f"{m.heads} query, {m.kv_heads} KV head{'s' if m.kv_heads > 1 else ''}" for m in MODELS.values()]
    names = [f"{name}\n{counts}" for name, counts in zip(MODELS, heads, strict=True)]
    axes.set_yticks(range(len(MODELS)), names, fontsize=9)
    axes.set_ylim(len(MODELS) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(5, 70_000)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="cache of one token, 16-bit values (KiB)")
    for name, color in {**KINDS, "with a KV head for every query head": COLORS["grey"]}.items():
        axes.scatter([], [], color=color, label=name)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9)
    return figure


def head_map(h: int, g: int) -> Figure:
    """Which key/value head each query head reads: h // r as it must be, and h % g as tiling makes it."""
    figure = Figure(figsize=(7.6, 2.5), layout="constrained")
    colors = [COLORS[name] for name in ("tiled", "accent", "sdpa", "triton")]
    rules = {
        "i // r: neighbours share (right)": lambda i: i // (h // g),
        "i % g: dealt in turn (wrong)": lambda i: i % g,
    }
    for axes, (title, group) in zip(figure.subplots(1, 2), rules.items(), strict=True):
        centre = [(j + 0.5) * h / g - 0.5 for j in range(g)]
        for i in range(h):
            color = colors[group(i) % len(colors)]
            axes.plot([i, centre[group(i)]], [1, 0], color=color, linewidth=1.5, zorder=1)
            axes.scatter(i, 1, s=260, color=color, zorder=2)
            axes.text(i, 0.99, str(i), color="white", ha="center", va="center", fontsize=9)
        for j, x in enumerate(centre):
            axes.scatter(x, 0, s=420, marker="s", color=colors[j % len(colors)], zorder=2)
            axes.text(x, -0.01, str(j), color="white", ha="center", va="center", fontsize=9)
        axes.set_yticks([0, 1], ["KV heads", "query heads"])
        axes.set_xticks([])
        axes.set(xlim=(-0.6, h - 0.4), ylim=(-0.4, 1.35))
        axes.set_title(title)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
    return figure


def memory(measured: dict[str, int], kept: int) -> Figure:
    """Peak extra bytes of a decoding step for each way, beside `kept`, the bytes of the cache that it reads."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    values = {"the cache itself": kept, **measured}
    colors = [COLORS["light"], *[COLORS["naive"] if peak > kept else COLORS["tiled"] for peak in measured.values()]]
    bars = axes.barh(list(values), [value / MIB for value in values.values()], color=colors)
    for bar in bars:
        axes.text(bar.get_width() + 1, bar.get_y() + bar.get_height() / 2, f"{bar.get_width():.0f} MiB", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(values.values()) / MIB * 1.15)
    axes.set(xlabel="memory (MiB)")
    axes.set_title("One decoding step: peak beyond the inputs")
    return figure


def latency(
    tokens: list[int], decode: dict[int, list[float]], prefill: dict[int, float] | None = None, *, heads: int = 32
) -> Figure:
    """Milliseconds of a decoding step against cached tokens, a line for each number of key/value heads; beside it, if
    given, milliseconds of a prefill."""
    figure = Figure(figsize=(9 if prefill else 6.5, 3.3), layout="constrained")
    left, *others = figure.subplots(1, 2 if prefill else 1, squeeze=False)[0]
    for g, times in decode.items():
        left.plot(tokens, times, "o-", color=_color(heads, g), label=_label(heads, g))
    left.set(xlabel="tokens in the cache", ylabel="time of one step (ms)")
    left.set_title("Decoding: one new query")
    left.set_xticks(tokens, [f"{n:,}" for n in tokens])
    left.set_xlim(0, tokens[-1] * 1.06)
    left.set_ylim(0, max(map(max, decode.values())) * 1.1)
    left.legend(loc="upper left", fontsize=9)
    if prefill:
        _prefill(others[0], prefill, heads)
    return figure


def _prefill(axes: Axes, prefill: dict[int, float], heads: int) -> None:
    names = [_label(heads, g) for g in prefill]
    axes.bar(names, list(prefill.values()), color=[_color(heads, g) for g in prefill], width=0.6)
    axes.set_ylim(0, max(prefill.values()) * 1.3)
    axes.set(ylabel="time of the prompt (ms)")
    axes.set_title("Prefill: 256 queries at once")


def _label(heads: int, g: int) -> str:
    return f"GQA-{g}" if kind(heads, g) == "GQA" else kind(heads, g)


def _color(heads: int, g: int) -> str:
    return "#56B4E9" if kind(heads, g) == "GQA" and g < 8 else KINDS[kind(heads, g)]


def conversion(steps: list[int], wrong: dict[str, list[list[float]]], trained: int) -> Figure:
    """Share of wrong answers against further training steps; a line for each way, over a band from the best to the
    worst seed. `wrong[way]` has a row for each seed."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots()
    cycle = [COLORS[name] for name in ("naive", "accent", "tiled", "sdpa", "triton")]
    for (way, seeds), color in zip(wrong.items(), cycle, strict=False):
        columns = list(zip(*seeds, strict=True))
        axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, [sum(column) / len(column) for column in columns], "o-", color=color, label=way)
    axes.set_xticks(steps, [f"{n}\n({n / trained:.0%})" for n in steps])
    axes.set_ylim(-0.01, 0.55)
    axes.set(xlabel=f"training steps after the conversion (share of the {trained} before)")
    axes.set(ylabel="share of wrong answers")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def calculator(model: str = "Llama 3 8B", tokens: int = 8192, batch: int = 16) -> tuple[Figure, str]:
    """Cache against context, and the bytes a decoding step reads, for a model of MODELS with 128 channels a head."""
    shape = MODELS[model]
    choices = {g: _label(shape.heads, g) for g in (shape.heads, 8, 1)}
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = [2**n for n in range(10, 18)]
    for g, name in choices.items():
        color = KINDS[kind(shape.heads, g)]
        sizes = [shape.cache(n, batch=batch, kv_heads=g) / GIB for n in lengths]
        left.plot(lengths, sizes, color=color, label=name)
        left.plot(tokens, shape.cache(tokens, batch=batch, kv_heads=g) / GIB, "o", color=color)
    left.axhline(shape.parameters * 2 / GIB, color=COLORS["grey"], linestyle="--", label="weights")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(lengths[1::2], [f"{n // 1024}K" for n in lengths[1::2]])
    left.yaxis.set_major_formatter("{x:,g}")
    left.minorticks_off()
    left.set(xlabel="tokens of each sequence", ylabel="GiB")
    left.set_title(f"Cache of {batch} sequence{'s' if batch > 1 else ''}")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    weights = shape.parameters * 2 / GIB
    caches = {name: shape.cache(tokens, batch=batch, kv_heads=g) / GIB for g, name in choices.items()}
    names = [f"{name}\nas it is" if g == shape.kv_heads else name for g, name in choices.items()]
    right.bar(names, weights, color=COLORS["grey"], width=0.6)
    right.bar(names, list(caches.values()), bottom=weights, width=0.6, color=[KINDS[n.split("-")[0]] for n in caches])
    for x, size in enumerate(caches.values()):
        right.text(x, weights + size, f"{_short(size)} GiB", ha="center", va="bottom", fontsize=9)
    right.set_ylim(0, (weights + max(caches.values())) * 1.15)
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.set(ylabel="GiB")
    right.set_title("Read in one step: weights (grey) + cache")
    own = shape.cache(tokens, batch=batch) / GIB
    caption = (
        f"{model}: {shape.heads} query heads, {shape.kv_heads} KV heads. {batch} x {tokens:,} tokens: "
        f"{_short(own)} GiB of cache, {own / (own + weights):.0%} of what a decoding step reads"
    )
    return figure, caption


def _short(size: float) -> str:
    """No exponent: 64,512; 16; 0.0156."""
    return f"{size:,.0f}" if size >= 10 else f"{size:.3g}"
