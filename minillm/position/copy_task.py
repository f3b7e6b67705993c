"""Offset copy: a task that needs positions, for five encodings trained on short texts and tested on long ones.

Idea:        Texts are random symbols, and at every position the model must name the symbol OFFSET places back. Content
             does not help: only the position says which key is wanted. One attention layer can learn it in seconds,
             so the same model with another encoding shows what each encoding can express, and what is left of it
             beyond the trained length. Several runs with weights of their own are trained side by side, since one
             run says little: the tensors carry them as their first axis.
Cost:        Training takes r n t (3 c^2 + c v) + 2 r n t^2 c multiply-adds forward; seconds on one core.
Paper:       the question is that of Press, Smith and Lewis 2021, "Train Short, Test Long", arXiv:2108.12409, figure 1;
             the task is ours.
Production:  attention is torch's scaled_dot_product_attention; the encodings are those of their own modules.
Leaves out:  depth, feed-forward layers and real text: what it shows is a mechanism, not the size of an effect.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.position import alibi, sinusoidal
from minillm.position.rope import apply_rope, inverse_frequencies, rotations

SYMBOLS = 16  # guessing is right in 1 of 16
OFFSET = 5  # how far back the wanted symbol stands
TRAINED = 32  # length of the training texts
LONGEST = 256  # length of the test texts
HEADS = 2


class Copier(nn.Module):
    """One attention layer and a read-out, `runs` times over; without any encoding of positions.

    The subclasses differ in the one method that an encoding changes: what is added to the embeddings (`embed`), how
    queries and keys are turned (`turn`), or what is added to the scores (`scores_bias`).
    """

    def __init__(self, runs: int, generator: torch.Generator, *, width: int = 32) -> None:
        super().__init__()

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(runs, *shape, generator=generator) * scale)

        self.symbols = normal(SYMBOLS, width, scale=1.0)
        self.qkv = normal(width, 3 * width, scale=width**-0.5)
        self.bias = normal(1, 3 * width, scale=1.0)  # a query and a key of no content, which a rotation can turn
        self.read = normal(width, SYMBOLS, scale=width**-0.5)
        self.places = normal(LONGEST, width, scale=1.0)  # only `Learned` uses them; all models draw the same numbers

    def embed(self, ids: Int[Tensor, "r n t"]) -> Float[Tensor, "r n t c"]:
        """The embeddings of the symbols of every run."""
        return self.symbols[torch.arange(len(ids))[:, None, None], ids]

    def turn(self, x: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        """Queries or keys as they enter the scores."""
        return x

    def scores_bias(self, t: int) -> Float[Tensor, "#h {t} {t}"]:
        """What is added to the scores: here the causal mask alone."""
        return torch.full((1, t, t), -math.inf).triu(1)

    def forward(self, ids: Int[Tensor, "r n t"], *, window: int | None = None) -> Float[Tensor, "r n t v"]:
        """Logits of the wanted symbol. With a window a query sees that many keys, itself included, and no more."""
        r, _, t = ids.shape
        if r != len(self.symbols):
            raise ValueError(f"the first axis holds the runs: {len(self.symbols)}, got {r}")
        if window is not None and window < 1:
            raise ValueError(f"a query sees itself at least: window must be 1 or more, got {window}")
        # r n t 3c: the product with every run's own weights
        projected = self.embed(ids) @ self.qkv[:, None] + self.bias[:, None]
        q, k, v = rearrange(projected, "r n t (three h d) -> three (r n) h t d", three=3, h=HEADS)
        mask = self.scores_bias(t)
        if window is not None:
            mask = mask.masked_fill(torch.ones(t, t).tril(-window) == 1, -math.inf)
        out = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, attn_mask=mask)
        return rearrange(out, "(r n) h t d -> r n t (h d)", r=r) @ self.read[:, None]


class Learned(Copier):
    """A learned vector for every position is added. Rows beyond the trained length keep their random start."""

    def embed(self, ids: Int[Tensor, "r n t"]) -> Float[Tensor, "r n t c"]:
        return super().embed(ids) + self.places[:, None, : ids.shape[-1]]


class Sinusoidal(Copier):
    """Sines and cosines of the position are added."""

    def embed(self, ids: Int[Tensor, "r n t"]) -> Float[Tensor, "r n t c"]:
        return super().embed(ids) + sinusoidal.encodings(torch.arange(ids.shape[-1]), self.symbols.shape[-1])


class Rope(Copier):
    """Queries and keys are turned by their position, after the projection."""

    def turn(self, x: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h t d"]:
        return apply_rope(x, *rotations(torch.arange(x.shape[-2]), inverse_frequencies(x.shape[-1])))


class Alibi(Copier):
    """Every score loses slope x distance."""

    def scores_bias(self, t: int) -> Float[Tensor, "#h {t} {t}"]:
        return alibi.bias(t, t, HEADS)


MODELS: dict[str, Callable[..., Copier]] = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "RoPE": Rope,
    "ALiBi": Alibi,
    "none": Copier,
}


def loss(model: Copier, ids: Int[Tensor, "r n t"]) -> Float[Tensor, " r"]:
    """Mean cross-entropy of every run in nats, over the positions that have a symbol OFFSET places back."""
    logits = model(ids)[..., OFFSET:, :]
    each = F.cross_entropy(logits.flatten(0, -2), ids[..., :-OFFSET].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(dim=1)


def train(name: str, *, runs: int = 5, seed: int = 0, steps: int = 300, texts: int = 16, rate: float = 1e-2) -> Copier:
    """`runs` models with the encoding of this name, trained by Adam on fresh texts of TRAINED symbols."""
    if name not in MODELS:
        raise ValueError(f"the encodings are {', '.join(MODELS)}, got {name}")
    generator = torch.Generator().manual_seed(seed)
    model = MODELS[name](runs, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        ids = torch.randint(SYMBOLS, (runs, texts, TRAINED), generator=generator)
        optimizer.zero_grad()
        loss(model, ids).sum().backward()  # the sum: every run gets the gradient of its own mean
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(
    model: Copier, *, texts: int = 32, seed: int = 1000, window: int | None = None
) -> Float[Tensor, "r positions"]:
    """Share of right answers of every run at each position from OFFSET to LONGEST - 1, on texts never trained on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SYMBOLS, (len(model.symbols), texts, LONGEST), generator=generator)
    right = model(ids, window=window)[..., OFFSET:, :].argmax(dim=-1) == ids[..., :-OFFSET]
    return right.float().mean(dim=1)


def bands(accuracies: Float[Tensor, "r positions"]) -> Float[Tensor, "r 4"]:
    """Their means over positions below 32 (the trained ones), 32-63, 64-127 and 128-255.

    >>> bands((torch.arange(OFFSET, LONGEST) < 64).float()[None])
    tensor([[1., 1., 0., 0.]])
    """
    ends = [OFFSET, TRAINED, 2 * TRAINED, 4 * TRAINED, LONGEST]
    sizes = [after - before for before, after in pairwise(ends)]
    return torch.stack([part.mean(dim=-1) for part in accuracies.split(sizes, dim=-1)], dim=-1)
