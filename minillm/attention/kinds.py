"""Who sees whom in an encoder-decoder, and a task that only cross-attention can solve.

Idea:        An encoder reads a text with self-attention, a decoder writes one with masked self-attention, and
             cross-attention is the only way from the one to the other. The task is to copy random symbols: what the
             decoder has written says nothing about the next one, so without cross-attention it can only guess. With it
             the weights become a diagonal. Without the mask it reads the answer in its own input while it trains, and
             fails as soon as it has to write by itself.
Cost:        Training takes seconds on one core. For a look at the Jacobian, one backward pass for each output value.
Paper:       Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.3; the task is ours.
Production:  torch.nn.MultiheadAttention returns the same weights (need_weights, average_attn_weights=False).
Leaves out:  feed-forward layers, depth, dropout, an end symbol and beam search: what it shows is a mechanism.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.attention.cross import multi_head, split_heads
from minillm.attention.naive import visible

SYMBOLS = 16  # guessing is right in 1 of 16
START, PAD = SYMBOLS, SYMBOLS + 1
SHORTEST, LONGEST = 4, 8  # symbols of a text
WIDTH, HEADS = 32, 2


def attention_weights(
    x_q: Float[Tensor, "b t c"],
    x_kv: Float[Tensor, "b s m"],
    wq: Float[Tensor, "rows c"],
    wk: Float[Tensor, "rows m"],
    *,
    heads: int,
    look: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "b h t s"]:
    """The weights that `multi_head` gives the tokens of x_kv. `look`, broadcast to b h t s, is True where i may look
    at j; a query that may look nowhere has zeros.

    >>> x = torch.eye(2)[None]
    >>> attention_weights(x, x, torch.eye(2), 0 * torch.eye(2), heads=1, look=visible(2, 2))[0, 0]
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    q, k = split_heads(x_q, wq, heads), split_heads(x_kv, wk, heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # b h t s
    if look is not None:
        scores = scores.masked_fill(~look, -math.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)


def prefix(t: int, n: int) -> Bool[Tensor, "t t"]:
    """True where one may look: everywhere in the first n tokens, and in the past.

    >>> prefix(3, 2).int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return visible(t, t) | (torch.arange(t) < n)


def window(t: int, n: int) -> Bool[Tensor, "t t"]:
    """True where one may look: the last n tokens, oneself included.

    >>> window(3, 2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    return visible(t, t) & ~visible(t, t, offset=-n)


def depends(function: Callable[[Tensor], Tensor], x: Float[Tensor, "1 s c"]) -> Bool[Tensor, "t s"]:
    """True at (i, j) if output token i changes with input token j: a block of the Jacobian is not zero.

    >>> depends(lambda x: x.cumsum(dim=1), torch.ones(1, 2, 1)).int().tolist()
    [[1, 0], [1, 1]]
    """
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x)[0], x)  # t out 1 s c
    return (jacobian[:, :, 0] != 0).any(dim=3).any(dim=1)


def texts(n: int, generator: torch.Generator) -> tuple[Int[Tensor, "n s"], Bool[Tensor, "n s"]]:
    """n texts of SHORTEST to LONGEST random symbols, filled up with PAD, and where the padding is."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (n, 1), generator=generator)
    padding = torch.arange(LONGEST) >= lengths
    return torch.randint(SYMBOLS, (n, LONGEST), generator=generator).masked_fill(padding, PAD), padding


def shifted(text: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
    """What the decoder reads while it learns to write `text`: START, then all but the last symbol."""
    return F.pad(text[:, :-1], (1, 0), value=START)


class Copier(nn.Module):
    """An encoder and a decoder of one block each. The subclasses break one of its rules each."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()

        def normal(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * scale)

        def four() -> nn.ParameterList:  # wq, wk, wv, wo
            return nn.ParameterList(normal(WIDTH, WIDTH, WIDTH**-0.5) for _ in range(4))

        self.symbols = normal(SYMBOLS + 2, WIDTH, 1.0)
        self.places = normal(LONGEST, WIDTH, 1.0)
        self.encoder, self.decoder, self.cross = four(), four(), four()
        self.read = normal(SYMBOLS, WIDTH, WIDTH**-0.5)

    def embed(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t c"]:
        """What a block works on: symbol plus place."""
        return self.symbols[ids] + self.places[: ids.shape[1]]

    def encode(self, source: Int[Tensor, "n s"], padding: Bool[Tensor, "n s"]) -> Float[Tensor, "n s c"]:
        """The memory: self-attention over the whole source."""
        x = norm(self.embed(source))
        return norm(x + multi_head(x, x, *self.encoder, heads=HEADS, key_padding=padding))

    def look_back(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Masked self-attention over what is written."""
        return multi_head(x, x, *self.decoder, heads=HEADS, causal=True)

    def look_across(
        self, x: Float[Tensor, "n t c"], memory: Float[Tensor, "n s c"], padding: Bool[Tensor, "n s"]
    ) -> Float[Tensor, "n t c"]:
        """Cross-attention from what is written to the memory."""
        return multi_head(x, memory, *self.cross, heads=HEADS, key_padding=padding)

    def queries(self, written: Int[Tensor, "n t"]) -> Float[Tensor, "n t c"]:
        """What asks in cross-attention: the output of the block's first sub-layer."""
        x = norm(self.embed(written))
        return norm(x + self.look_back(x))

    def forward(
        self, source: Int[Tensor, "n s"], padding: Bool[Tensor, "n s"], written: Int[Tensor, "n t"]
    ) -> Float[Tensor, "n t v"]:
        """Logits of the next symbol after each of `written`, which begins with START."""
        x = self.queries(written)
        return F.linear(norm(x + self.look_across(x, self.encode(source, padding), padding)), self.read)

    def alignment(self, source: Int[Tensor, "n s"], padding: Bool[Tensor, "n s"]) -> Float[Tensor, "n h t s"]:
        """The weights of cross-attention while the source is copied."""
        x, memory = self.queries(shifted(source)), self.encode(source, padding)
        look = ~padding[:, None, None]
        return attention_weights(x, memory, self.cross[0], self.cross[1], heads=HEADS, look=look)


class WithoutCross(Copier):
    """Nothing leads from the encoder to the decoder."""

    def look_across(
        self, x: Float[Tensor, "n t c"], memory: Float[Tensor, "n s c"], padding: Bool[Tensor, "n s"]
    ) -> Float[Tensor, "n t c"]:
        return torch.zeros_like(x)


class WithoutMask(Copier):
    """The decoder's self-attention also sees what is still to be written."""

    def look_back(self, x: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        return multi_head(x, x, *self.decoder, heads=HEADS)


class WithoutBoth(WithoutMask, WithoutCross):
    """The decoder never sees the source, but the future of its own input."""


def norm(x: Tensor) -> Tensor:
    """Each token scaled to a mean square of 1."""
    return F.rms_norm(x, x.shape[-1:])


def train(kind: type[Copier], seed: int, *, steps: int = 150, rate: float = 1e-2) -> tuple[Copier, list[float]]:
    """A model trained by Adam on fresh texts, all symbols of a text at once, and the loss of every step in nats."""
    generator = torch.Generator().manual_seed(seed)
    model, losses = kind(generator), []
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        source, padding = texts(64, generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(source, padding, shifted(source)).mT, source, ignore_index=PAD)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def write(model: Copier, source: Int[Tensor, "n s"], padding: Bool[Tensor, "n s"]) -> Int[Tensor, "n s"]:
    """What the model writes by itself, the likeliest symbol each time, as long as the source is."""
    written = torch.full_like(source[:, :1], START)
    for _ in range(source.shape[1]):
        following = model(source, padding, written)[:, -1:].argmax(dim=-1)
        written = torch.cat([written, following], dim=1)
    return written[:, 1:]


@torch.no_grad()
def accuracy(model: Copier, *, n: int = 500, seed: int = 1000) -> tuple[float, float]:
    """Share of right symbols on texts never trained on: with the right beginning given, and when it writes alone."""
    source, padding = texts(n, torch.Generator().manual_seed(seed))
    given = model(source, padding, shifted(source)).argmax(dim=-1)
    alone = write(model, source, padding)
    return right(given, source), right(alone, source)


def right(written: Int[Tensor, "n s"], source: Int[Tensor, "n s"]) -> float:
    """Share of the source's symbols, padding left out, that are written in their place.

    >>> right(torch.tensor([[3, 5, 0]]), torch.tensor([[3, 4, PAD]]))
    0.5
    """
    return (written == source)[source != PAD].float().mean().item()
