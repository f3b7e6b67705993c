"""Drawings of finetuning/memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.architecture.llama import RELEASES
from minillm.finetuning.memory import Job, Memory, budget, estimate, fits
from minillm.finetuning.nf4 import BLOCK, dequantise_blocks, nf4_levels, quantise_blocks
from minillm.study.notebook import COLORS

PARTS = {  # name and colour of each part, in the order of the bars
    "weights": ("weights", "#0072B2"),
    "gradients": ("gradients", "#56B4E9"),
    "master": ("float32 masters", "#CC79A7"),
    "optimizer": ("Adam's means", "#E69F00"),
    "gathered": ("gathered for a moment", COLORS["grey"]),
    "activations": ("activations kept", "#009E73"),
    "logits": ("logits and loss", "#D55E00"),
    "layer": ("one block at work", "#F4B183"),
    "rest": ("logits, loss, one block", "#D55E00"),
}
GIB = 2**30
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def stack(axes: Axes, rows: Mapping[str, Mapping[str, int]], unit: float) -> list[str]:
    """Draw a stacked bar a row, from the top; the parts that occur come back in order."""
    found = [part for part in PARTS if any(row.get(part) for row in rows.values())]
    left = [0.0] * len(rows)
    for part in found:
        sizes = [row.get(part, 0) / unit for row in rows.values()]
        axes.barh(list(rows), sizes, left=left, color=PARTS[part][1], label=PARTS[part][0], height=0.62)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    return found


def measured_parts(found: Memory, peak: int) -> dict[str, int]:
    """The parts that were counted, and what the peak has besides."""
    parts = {name: getattr(found, name) for name in ("weights", "gradients", "master", "optimizer", "activations")}
    return parts | {"rest": peak - sum(parts.values())}


def bars(rows: Mapping[str, Mapping[str, int]], title: str, *, gb: bool = False) -> Figure:
    """Stacked bars of bytes by part, one a row, in MB or GB of powers of 10."""
    figure = Figure(figsize=(7.6, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    found = stack(axes, rows, 1e9 if gb else 1e6)
    longest = max(sum(row.values()) for row in rows.values()) / (1e9 if gb else 1e6)
    for i, row in enumerate(rows.values()):
        total = sum(row.values()) / (1e9 if gb else 1e6)
        axes.text(total + 0.01 * longest, i, f"{total:.0f}", va="center")
    axes.set(xlabel="GB" if gb else "MB", xlim=(0, 1.08 * longest), title=title)
    figure.legend(loc="outside lower center", ncols=min(4, len(found)), fontsize=9)
    return figure


def checked(peaks: Mapping[str, tuple[int, int]]) -> Figure:
    """The peak of real steps as bars, the estimate as a mark on each; pairs are (measured, estimated) bytes."""
    figure = Figure(figsize=(7.4, 1.1 + 0.3 * len(peaks)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(peaks))
    measured = axes.barh(rows, [pair[0] / 1e6 for pair in peaks.values()], color=COLORS["light"], height=0.62)
    for i, (_, size) in enumerate(peaks.values()):
        axes.plot([size / 1e6] * 2, [i - 0.38, i + 0.38], color=COLORS["naive"], linewidth=2.5)
    (mark,) = axes.plot([], [], color=COLORS["naive"], linewidth=2.5)
    axes.set_yticks(rows, list(peaks))
    axes.invert_yaxis()
    axes.set(xlabel="peak of a step (MB)", title="Measured on real steps, and estimated")
    axes.legend([measured, mark], ["measured", "estimate"], loc="lower right")
    return figure


def lengths(tokens: Sequence[int], kept: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> Figure:
    """Bytes that autograd keeps against the length of a sequence: measured dots on estimated lines."""
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, sizes), color in zip(kept.items(), (COLORS["naive"], COLORS["sdpa"]), strict=True):
        axes.plot(tokens, [size / 1e6 for size in expected[name]], color=color, label=f"{name}, estimate")
        axes.plot(tokens, [size / 1e6 for size in sizes], "o", color=color, label=f"{name}, measured")
    axes.set(xlabel="tokens of the sequence", ylabel="kept for the backward pass (MB)", ylim=(0, None))
    axes.set_title("Measured: scores that are kept grow with the square")
    axes.legend(loc="upper left")
    return figure


def rounding(table: torch.Tensor) -> float:
    """The root of the mean square error of normal weights rounded to these levels in blocks of 64."""
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    return (dequantise_blocks(*quantise_blocks(x, table, BLOCK), table, BLOCK) - x).square().mean().sqrt().item()


def levels(seed: int = 0) -> Figure:
    """NF4's levels on the density of weights, and how often each of the 16 codes is used."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2**20, generator=generator)
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    scaled = (x.view(-1, BLOCK) / x.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)).flatten()
    left.hist(scaled.numpy(), bins=120, density=True, color=COLORS["light"])
    left.vlines(nf4_levels().tolist(), 0, 0.9, color=COLORS["tiled"], linewidth=1.5)
    left.set(xlabel="weight / largest of its block of 64", ylabel="density", title="weights, and NF4's 16 levels")
    for i, (name, table) in enumerate({"NF4": nf4_levels(), "even steps": torch.linspace(-1, 1, 16)}.items()):
        codes, _ = quantise_blocks(x, table, BLOCK)
        share = 100 * codes.bincount(minlength=16) / len(x)
        color = COLORS["tiled"] if name == "NF4" else COLORS["naive"]
        right.bar(torch.arange(16) + 0.4 * i - 0.2, share, width=0.4, color=color, label=name)
    right.set_xticks(range(0, 16, 3))
    right.axhline(100 / 16, color=COLORS["grey"], linestyle="--", linewidth=1)
    right.set(xlabel="code", ylabel="used by (% of weights)", title="even use would be 6.25 %", ylim=(0, 17))
    right.legend(loc="upper right")
    return figure


def plan(
    model: str = "Llama 3 8B",
    card: int = 24,
    method: str = "qlora",
    optimizer: str = "adamw",
    batch: int = 1,
    tokens: int = 4096,
    checkpoint: bool = True,
    chunked: bool = True,
    flash: bool = True,
    ranks: int = 1,
    offload: str = "none",
) -> tuple[Figure, str]:
    """The budget of a fine-tune in mixed precision: each method as a bar, the chosen one byte by byte.

    Adapters have rank 16; more than one rank shards with ZeRO-3. A GiB stays free for what is not counted.
    """
    config = RELEASES[model].config
    tokens = min(tokens, config.context)
    job = Job(
        config, batch, tokens, method=method, optimizer=optimizer, checkpoint=checkpoint, chunk=512 if chunked else 0,
        attention="flash" if flash else "naive", zero=3 if ranks > 1 else 0, ranks=ranks, offload=offload,
    )  # fmt: skip
    rows = {label: budget(replace(job, method=name)) for name, label in METHODS.items()}
    parts, total = rows[METHODS[method]], estimate(job).total
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    stack(left, rows, GIB)
    limit = max(1.3 * card, 1.2 * total / GIB)
    for i, (name, row) in enumerate(rows.items()):
        size = sum(row.values()) / GIB
        inside = size > 0.86 * limit
        left.text(
            limit * 0.985 if inside else size + 0.012 * limit, i, f"{size:,.1f}", va="center",
            ha="right" if inside else "left", fontweight="bold" if name == METHODS[method] else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5} if inside else None,
        )  # fmt: skip
    for size in (24, 48, 80):
        if size < limit:
            left.axvline(size, color=COLORS["grey"], linestyle=":", linewidth=1)
    left.axvline(card, color="black", linestyle="--", linewidth=1.5)
    left.text(card, -0.52, f"card: {card} GiB", ha="center", va="bottom", fontsize=10)
    left.set(xlabel="GiB on each card (dotted: 24, 48, 80)", xlim=(0, limit))
    left.set_title(f"{model}, {batch} x {tokens:,} tokens", pad=18)
    right.axis("off")
    right.set_title(f"{METHODS[method]}, byte by byte")
    lines = [(PARTS[part][0], f"{size:,}") for part, size in parts.items()] + [("total", f"{total:,}")]
    for i, (name, number) in enumerate(lines):
        weight = "bold" if name == "total" else "normal"
        style = {"transform": right.transAxes, "fontsize": 10, "fontweight": weight}
        right.text(0, 0.93 - 0.115 * i, name, **style)
        right.text(1, 0.93 - 0.115 * i, number, ha="right", **style)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    largest = fits(card * GIB, job, reserve=GIB)
    verdict = "fits" if total <= (card - 1) * GIB else "does not fit"
    host = estimate(job).host
    caption = (
        f"{METHODS[method]}: {total / GIB:.1f} GiB {verdict} in {card} GiB with 1 GiB free; "
        f"largest batch of {tokens:,} tokens: {largest}"
    )
    return figure, caption + (f"; {host / GIB:.0f} GiB of main memory" if host else "")
