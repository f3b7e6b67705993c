"""Drawings of attention/flash."""

import math

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.attention.online_softmax import empty_state, finish, online_softmax_step
from minillm.attention.traffic import naive_traffic, tiled_traffic
from minillm.study.notebook import COLORS

MIB = 2**20


def running_state(scores: Tensor, v: Tensor, block_size: int) -> Figure:
    """Maximum, normaliser and output of one query after each block; `scores` is [s], `v` is [s, 1]."""
    state = empty_state(v[None, 0], 1)
    m, l, out, rescale = [], [], [], []
    for start in range(0, len(scores), block_size):
        block = slice(start, start + block_size)
        new = online_softmax_step(state, scores[None, block], v[block])
        rescale.append(math.exp(state.m.item() - new.m.item()))
        m.append(new.m.item())
        l.append(new.l.item())
        out.append(finish(new)[0].item())
        state = new
    blocks = range(1, len(m) + 1)
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    positions = (torch.arange(len(scores)) + 0.5) / block_size + 0.5
    left.scatter(positions, scores, s=14, color=COLORS["grey"], label="scores")
    left.step([0.5, *[b + 0.5 for b in blocks]], [m[0], *m], where="pre", color=COLORS["tiled"], label="running m")
    left.set(xlabel="block of keys", ylabel="score (nats)", title="m: the largest so far")
    left.set_ylim(scores.min() - 0.4, scores.max() + 2.2)
    left.legend(loc="upper left", fontsize=9)
    middle.bar(blocks, rescale, color=COLORS["accent"])
    for number, factor in zip(blocks, rescale, strict=True):
        middle.text(number, factor + 0.02, f"{factor:.2f}", ha="center", va="bottom", fontsize=8)
    middle.set(xlabel="block of keys", ylabel="exp(m_old - m_new)", ylim=(0, 1.15))
    middle.set_title("factor on what came before")
    exact = torch.softmax(scores, dim=0) @ v[:, 0]
    right.plot(blocks, out, "o-", color=COLORS["tiled"], label="acc / l so far")
    right.axhline(exact.item(), color=COLORS["naive"], linestyle="--", label="softmax over all keys")
    right.set(xlabel="block of keys", ylabel="output", title="the output lands on the exact value")
    low, high = min(*out, exact.item()), max(*out, exact.item())
    right.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
    right.legend(loc="upper left", fontsize=9)
    for axes in (left, middle, right):
        axes.set_xticks(blocks)
    return figure


def memory(lengths: list[int], measured: dict[str, list[int]]) -> Figure:
    """Peak bytes against sequence length, one line a method (keys of COLORS), both axes logarithmic."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, peaks in measured.items():
        axes.plot(lengths, [p / MIB for p in peaks], "o-", color=COLORS[method], label=method)
        axes.annotate(
            f"{peaks[-1] / MIB:.3g} MiB", (lengths[-1], peaks[-1] / MIB), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9, color=COLORS[method],
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 1.7)
    axes.set(xlabel="sequence length t = s", ylabel="peak extra memory (MiB)")
    axes.set_title("One causal head, d = 64, float32: measured allocations")
    axes.legend(loc="upper left")
    return figure


def traffic(t: int, d: int, kib: list[int]) -> Figure:
    """HBM traffic of one head against on-chip memory, in MiB of float16."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    tiled = [tiled_traffic(t, t, d, n * 1024 // 2) * 2 / MIB for n in kib]
    naive = naive_traffic(t, t, d) * 2 / MIB
    axes.axhline(naive, color=COLORS["naive"], linestyle="--", label="naive: scores travel four times")
    axes.plot(kib, tiled, "o-", color=COLORS["tiled"], label="tiled: K and V once per tile of queries")
    axes.set_xscale("log", base=2)
    axes.set_xticks(kib, [str(n) for n in kib])
    axes.minorticks_off()
    axes.set_ylim(0, max(naive, *tiled) * 1.1)
    axes.set(xlabel="on-chip memory for the tiles of q, k, v and output (KiB)", ylabel="HBM traffic (MiB)")
    axes.set_title(f"Forward pass of one head, t = s = {t:,}, d = {d}, float16")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.68))
    return figure


def tiles(
    sequence_length: int = 2048, block_q: int = 128, block_k: int = 128, causal: bool = True
) -> tuple[Figure, str]:
    """The grid of tiles of one head: computed whole, masked on the diagonal, or skipped."""
    t = sequence_length
    rows, columns = math.ceil(t / block_q), math.ceil(t / block_k)
    kind = torch.zeros(rows, columns)  # 0 computed
    if causal:
        first = torch.arange(rows)[:, None] * block_q
        last = (first + block_q).clamp(max=t) - 1
        start = torch.arange(columns)[None] * block_k
        kind[(start + block_k).clamp(max=t) - 1 > first] = 1  # some key lies after the first query of the tile
        kind[start > last] = 2  # every key lies after the last query
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    palette = ListedColormap([COLORS["tiled"], COLORS["accent"], COLORS["light"]])
    left.pcolormesh(
        kind, cmap=palette, vmin=0, vmax=2, edgecolors="white", linewidth=0.5 if rows * columns < 3000 else 0
    )
    left.invert_yaxis()
    left.set_aspect("auto")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel=f"tile of {block_k} keys", ylabel=f"tile of {block_q} queries")
    left.set_title("full · masked · skipped")
    naive_bytes, tile_bytes = t * t * 4, min(block_q, t) * min(block_k, t) * 4
    bars = right.barh(["scores,\nall at once", "scores,\none tile"], [naive_bytes / MIB, tile_bytes / MIB])
    for bar, method in zip(bars, ("naive", "tiled"), strict=True):
        bar.set_color(COLORS[method])
        right.text(
            bar.get_width() * 1.15, bar.get_y() + bar.get_height() / 2, f"{bar.get_width():.3g} MiB", va="center"
        )
    right.set_xscale("log")
    right.set_xlim(tile_bytes / MIB / 4, naive_bytes / MIB * 30)
    right.invert_yaxis()
    right.set(xlabel="float32 scores alive (MiB)")
    right.set_title(f"t = s = {t:,}")
    done = int((kind < 2).sum())
    caption = (
        f"{done:,} of {rows * columns:,} tiles computed ({done / (rows * columns):.0%}), "
        f"{int((kind == 1).sum()):,} of them need the mask; "
        f"one tile holds 1/{naive_bytes / tile_bytes:,.0f} of the scores"
    )
    return figure, caption
