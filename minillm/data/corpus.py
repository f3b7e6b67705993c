"""Text to learn from: what ships, how documents become rows of tokens, and a loader that resumes where it stopped.

Idea:        Documents of any length become rows of one length: write them one after the other, each with an
             end-of-document token, and cut every t tokens. No token is padding. A row then holds pieces of several
             documents; a block-diagonal mask and positions that restart keep them apart. The order of rows is a
             function of (seed, epoch), so the position of training is three whole numbers.
Cost:        One pass. Nothing is padded; fewer than t tokens at the end are dropped. Every cut costs a document its
             context: n tokens of documents in rows of t are cut about n / t times.
Paper:       Packing with separators: Brown et al. 2020, arXiv:2005.14165, appendix B. The mask: Zhao et al. 2024,
             arXiv:2402.13991 (intra-document causal masking).
Production:  transformers.DataCollatorWithFlattening (positions); create_mask of torch.nn.attention.flex_attention with
             a document mask; torchdata's StatefulDataLoader (position of the loader).
Leaves out:  best-fit packing, which cuts no document that fits a row (Ding et al. 2024, arXiv:2404.10830); streaming
             from disk; several workers and ranks.
"""

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from minillm.data.bpe import Tokenizer

AUSTEN = Path(__file__).with_name("austen.txt.xz")  # see ORIGIN.md
AUSTEN_2M = Path(__file__).with_name("austen-2m")  # a small model trained on it: checkpoint and tokenizer
HELD_OUT = 20  # every 20th chapter is held out


def documents(split: Literal["train", "held_out"]) -> list[str]:
    """Chapters of Jane Austen's six novels: 256 to train on (3.8 MB), 13 held out, the 20th, 40th ... of them.

    Paragraphs are one line each, with an empty line between them.

    >>> documents("train")[0][:50]
    'The family of Dashwood had long been settled in Su'
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    chapters = lzma.decompress(AUSTEN.read_bytes()).decode().split("\f")
    return [text for i, text in enumerate(chapters, 1) if (i % HELD_OUT == 0) == (split == "held_out")]


class Rows(NamedTuple):
    """Tokens and, for each of them, the number of the document that it is from."""

    ids: Int[Tensor, "b t"]
    documents: Int[Tensor, "b t"]


def pack(tokens: Sequence[Sequence[int]], length: int, *, eos: int) -> Rows:
    """Rows of `length` tokens cut from the documents in their order, each followed by `eos`. The remainder is dropped.

    >>> pack([[1, 2, 3], [4], [5, 6]], 4, eos=0)
    Rows(ids=tensor([[1, 2, 3, 0],
            [4, 0, 5, 6]]), documents=tensor([[0, 0, 0, 0],
            [1, 1, 2, 2]]))
    """
    ids = torch.tensor([token for document in tokens for token in (*document, eos)])
    numbers = torch.arange(len(tokens)).repeat_interleave(torch.tensor([len(document) + 1 for document in tokens]))
    rows = len(ids) // length
    if not rows:
        raise ValueError(f"a row needs {length} tokens, the documents have {len(ids)} with their ends")
    return Rows(*(x[: rows * length].view(rows, length) for x in (ids, numbers)))


def document_mask(documents: Int[Tensor, "*b t"]) -> Bool[Tensor, "*b t t"]:
    """True where a query (row) sees a key (column): the same document, not later.

    >>> document_mask(torch.tensor([7, 7, 8])).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    return (documents[..., :, None] == documents[..., None, :]).tril()


def positions(documents: Int[Tensor, "*b t"]) -> Int[Tensor, "*b t"]:
    """Position of each token in its document, counted from where the document begins in this row.

    >>> positions(torch.tensor([7, 7, 7, 8, 8]))
    tensor([0, 1, 2, 0, 1])
    """
    place = torch.arange(documents.shape[-1], device=documents.device)
    begins = documents.diff(prepend=documents[..., :1]) != 0
    return place - torch.where(begins, place, 0).cummax(dim=-1).values


class Loader:
    """Endless batches of shuffled rows. Every epoch has its own order; rows that fill no batch at its end are left out.

    `state_dict()` between two batches is the whole position: a loader that gets it goes on with the very same batches.

    >>> rows = pack([[1, 2, 3, 4, 5, 6, 7]], 2, eos=0)
    >>> loader = Loader(rows, 2)
    >>> for step, batch in zip(range(3), loader):      # range comes first, or zip takes a fourth batch before it stops
    ...     print(step, batch.ids.shape, loader.epoch)
    0 torch.Size([2, 2]) 0
    1 torch.Size([2, 2]) 0
    2 torch.Size([2, 2]) 1
    """

    def __init__(self, rows: Rows, batch: int, *, seed: int = 0) -> None:
        if not 1 <= batch <= len(rows.ids):
            raise ValueError(f"a batch must hold 1 to {len(rows.ids)} rows, which is all there are, got {batch}")
        self.rows, self.batch, self.seed = rows, batch, seed
        self._begin(epoch=0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0
        self.order = torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(len(self.rows.ids)))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Rows:
        if self.taken + self.batch > len(self.order):
            self._begin(self.epoch + 1)
        chosen = self.order[self.taken : self.taken + self.batch]
        self.taken += self.batch
        return Rows(*(x[chosen] for x in self.rows))

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in."""
        return {"epoch": self.epoch, "taken": self.taken} | self._what()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position. ValueError: it is one in other rows, batches or another shuffle."""
        for name, mine in self._what().items():
            if state[name] != mine:
                raise ValueError(f"the saved position is one with {name} {state[name]}, this loader has {name} {mine}")
        self._begin(state["epoch"])
        self.taken = state["taken"]

    def _what(self) -> dict[str, int]:
        count, length = self.rows.ids.shape
        return {"seed": self.seed, "batch": self.batch, "rows": count, "length": length}


def token_bytes(tokenizer: Tokenizer) -> Int[Tensor, " v"]:
    """Bytes of text that each id stands for; special tokens are no text, 0."""
    lengths = torch.zeros(tokenizer.size, dtype=torch.int64)
    for i in tokenizer.vocabulary.values():
        lengths[i] = len(tokenizer.bytes_of[i])
    return lengths
