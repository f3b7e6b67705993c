"""Drawings of finetuning/loss_mask."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from minillm.data.bpe import LLAMA3, Chat, Tokenizer, render_chat, train
from minillm.data.corpus import documents
from minillm.finetuning.chat_toy import MASKS, Score
from minillm.finetuning.loss_mask import LLAMA3_SPECIAL, PADDING, add_special, render_llama3
from minillm.study.notebook import COLORS

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote Emma?"},
    {"role": "assistant", "content": "I look it up."},
    {"role": "tool", "content": "Emma: Jane Austen, 1815"},
    {"role": "assistant", "content": "Jane Austen."},
    {"role": "user", "content": "And Persuasion?"},
    {"role": "assistant", "content": "The same author."},
]
KINDS = {  # what a token is: face colour and name
    "target": ("#9CCBEB", "target"),
    "prompt": ("#EEF1F4", "read, no target"),
    "cut": ("white", "cut off"),
}
COLUMNS = 96  # characters in a line of the viewer
VARIANTS: dict[str, Callable[[list[tuple[int, int]], int], list[tuple[int, int]]]] = {
    "the answers": lambda spans, size: spans,
    "starts one late": lambda spans, size: [(start + 1, end) for start, end in spans],
    "not shifted": lambda spans, size: [(start + 1, min(end + 1, size)) for start, end in spans],
    "without the end": lambda spans, size: [(start, end - 1) for start, end in spans],
    "last answer only": lambda spans, size: spans[-1:],
    "all tokens": lambda spans, size: [(0, size)],
}
TEMPLATES = {"ChatML": render_chat, "Llama 3": render_llama3}
BARS = {"first token": COLORS["naive"], "the next three": COLORS["grey"], "end of message": COLORS["tiled"]}


@cache
def tokenizer() -> Tokenizer:
    """A tokenizer learnt from a little of Austen and the names of roles, with the special tokens of both templates."""
    texts = [*documents("train")[60:64], "system user assistant tool ipython\n" * 40]
    return add_special(train(texts, 2000, pattern=LLAMA3), LLAMA3_SPECIAL)


def spell(text: str) -> str:
    """A token's text with its line breaks and its leading space visible."""
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\N{MIDDLE DOT}")


def viewer(chat: Chat, *, length: int | None = None) -> Figure:
    """Every token in its box: targets blue, what is only read grey, what a row of `length` cuts off white."""
    said = {i for start, end in chat.spans for i in range(start, end)}
    kinds = ["target" if i in said else "prompt" for i in range(len(chat.ids))]
    if length is not None:
        kinds[length:] = ["cut"] * len(kinds[length:])
    special = {tokenizer().special[name] for name in tokenizer().special}
    places, column, line = [], 0.0, 0
    texts = [spell(tokenizer().decode([i])) for i in chat.ids]
    for text in texts:
        width = len(text) + 0.9
        if column + width > COLUMNS:
            column, line = 0.0, line + 1
        places.append((column, line, width))
        column += width + 0.25
    figure = Figure(figsize=(8.6, 0.31 * (line + 1) + 0.5))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.01, 0.02, 0.98, 1 - 0.45 / figure.get_figheight()))
    for text, kind, i, (x, y, width) in zip(texts, kinds, chat.ids, places, strict=True):
        edge = "#C9CFD6" if kind == "cut" else "white"
        axes.add_patch(Rectangle((x, y + 0.1), width, 0.8, facecolor=KINDS[kind][0], edgecolor=edge, linewidth=0.8))
        color = "#B0B6BD" if kind == "cut" else "#8A4A00" if i in special else "black"
        axes.text(x + width / 2, y + 0.5, text, family="monospace", size=8.6, color=color, ha="center", va="center")
    axes.set(xlim=(-0.2, COLUMNS + 0.5), ylim=(line + 1, 0))
    axes.set_axis_off()
    shown = [name for name in KINDS if name in kinds]
    handles = [Patch(facecolor=KINDS[name][0], edgecolor="#C9CFD6", label=KINDS[name][1]) for name in shown]
    figure.legend(handles=handles, loc="upper right", ncols=3, fontsize=9.5)
    return figure


def explore(template: str = "ChatML", mask: str = "the answers", length: int = 80) -> tuple[Figure, str]:
    """The conversation under a template and a mask, cut to `length` tokens."""
    chat = TEMPLATES[template](tokenizer(), TALK)
    chat = Chat(chat.ids, VARIANTS[mask](chat.spans, len(chat.ids)))
    end = tokenizer().special["<|im_end|>" if template == "ChatML" else "<|eot_id|>"]
    targets = [chat.ids[i] for start, stop in chat.spans for i in range(start, min(stop, length))]
    caption = (
        f"{len(chat.ids)} tokens, {min(length, len(chat.ids))} in the row; {len(targets)} targets, "
        f"{targets.count(end)} of them an end of message"
    )
    return viewer(chat, length=length), caption


def scores(results: Mapping[str, Sequence[Score]]) -> Figure:
    """What models trained under each mask say right: bars are means over seeds, dots the seeds."""
    figure = Figure(figsize=(8.2, 3.5), layout="constrained")
    axes = figure.subplots()
    for j, (name, color) in enumerate(BARS.items()):
        parts = slice(0, 1) if j == 0 else slice(1, 4) if j == 1 else slice(4, 5)
        for i, mask in enumerate(MASKS):
            shares = [float(result.answer[parts].mean()) for result in results[mask]]
            x = i + (j - 1) * 0.27
            mean = sum(shares) / len(shares)
            axes.bar(x, mean, width=0.25, color=color, label=name if i == 0 else None)
            axes.plot([x] * len(shares), shares, ".", color="black", markersize=4)
    axes.axhline(1 / 12, color="black", linestyle=":", linewidth=1.2, label="one symbol in twelve")
    axes.set_xticks(range(len(MASKS)), list(MASKS))
    axes.set(xlabel="targets in training", ylabel="right, after a true beginning", ylim=(0, 1.06))
    axes.set_title("Measured: a toy trained from nothing, three seeds")
    figure.legend(loc="outside lower center", ncols=4, fontsize=10)
    return figure


def influence(maps: Mapping[str, Tensor], begins: Sequence[int]) -> Figure:
    """Who influences whom in a packed row: the size of the gradient of each state with respect to each token."""
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True)
    low, high = -3.0, max(float(size.max().log10()) for size in maps.values())
    for axes, (name, size) in zip(panels, maps.items(), strict=True):
        shown = size.clamp(min=0).log10().where(size > 0, float("nan"))
        axes.set_facecolor("white")
        image = axes.imshow(shown, vmin=low, vmax=high, cmap="Blues")
        for begin in begins[1:]:
            axes.axhline(begin - 0.5, color=COLORS["naive"], linewidth=1)
            axes.axvline(begin - 0.5, color=COLORS["naive"], linewidth=1)
        axes.set(title=name, xlabel="token that is read", yticks=range(0, len(size), 5))
    panels[0].set_ylabel("token that reads")
    bar = figure.colorbar(image, ax=panels, shrink=0.85)
    ticks = [t for t in (-3, -2, -1, 0, 1) if t <= high]
    bar.set_ticks(ticks, labels=[f"{10.0**t:g}" for t in ticks])
    bar.set_label("size of the gradient; white: exactly 0")
    return figure


def rows(batches: Mapping[str, Tensor]) -> Figure:
    """The documents in the rows of batches: a colour a conversation, white for padding."""
    figure = Figure(figsize=(8.2, 3.3), layout="constrained")
    panels = figure.subplots(1, len(batches))
    for axes, (name, numbers) in zip(panels, batches.items(), strict=True):
        shown = (numbers * 7 % 12).double().where(numbers != PADDING, float("nan"))
        axes.imshow(shown, aspect="auto", cmap="tab20c", vmin=0, vmax=19, interpolation="nearest")
        share = float((numbers != PADDING).double().mean())
        axes.set_title(f"{name}: {len(numbers)} rows, {share:.0%} filled", fontsize=11)
        axes.set(xlabel="place in the row (tokens)", ylabel="row")
    figure.suptitle("48 conversations; a colour is a conversation, white is padding", fontsize=11)
    return figure


def lengths(count: int = 48, *, longest: int = 256, seed: int = 0) -> list[int]:
    """Lengths of conversations as they come: many short, few long."""
    drawn = torch.distributions.LogNormal(4.0, 0.7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return drawn.sample((count,)).clamp(8, longest).round().int().tolist()
