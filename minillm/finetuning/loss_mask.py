"""Supervised fine-tuning on conversations: who said which token, labels for the assistant's, and rows without leakage.

Idea:        The loss is that of pre-training, the next token's cross-entropy; what changes is the data, a template
             around the messages, and which tokens are targets: what the assistant says with its end of message, in
             every turn, and nothing that a person, a tool or the template writes. The renderer that builds the ids
             knows these spans, so nobody has to search for them. Labels stand at the token's own place, -100
             elsewhere; the loss shifts them, once. Packed conversations see only themselves.
Cost:        The same as pre-training on all tokens: masked tokens are read and attended to, only their loss is left
             out. Rows with one conversation each also cost their padding.
Paper:       Loss on answers alone: Touvron et al. 2023, "Llama 2", arXiv:2307.09288, section 3.1; on prompts too:
             Shi et al. 2024, arXiv:2405.14394. Packing, best fit: Ding et al. 2024, arXiv:2404.10830. The mask
             between documents: Zhao et al. 2024, arXiv:2402.13991.
Production:  transformers apply_chat_template(return_assistant_tokens_mask=True) with {% generation %} in the template,
             which TRL's assistant_only_loss uses; ForCausalLMLoss (shifts by itself, ignores -100).
Leaves out:  weights between 0 and 1 for the prompt; tool calls as structured messages; images.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minillm.architecture.transformer import Transformer
from minillm.data.bpe import Chat, Tokenizer, check_message
from minillm.data.corpus import document_mask, positions
from minillm.training.objective import IGNORE, chunked_cross_entropy, next_token_loss

LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PADDING = -1  # the number of the document that padding belongs to


def add_special(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with more special tokens, at the first free ids. A model needs rows for them in its embedding."""
    old = tokenizer
    special = old.special | {name: old.size + i for i, name in enumerate(names)}
    kept = {"pattern": old.pattern, "normalize": old.normalize, "whole_words": old.whole_words}
    return Tokenizer(old.vocabulary, old.merges, special=special, **kept)  # type: ignore[arg-type]


def render_llama3(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> Chat:
    """Messages {"role", "content"} in Llama 3's template, built from ids; `bpe.render_chat` does it in ChatML.

    Contents lose the spaces around them as in that template; a tool speaks as "ipython", Llama 3.1's name for it (whose
    template also writes its content as JSON). `reply` appends the header of the assistant's next message. Equal to text
    that is encoded as a whole under the word pattern of Llama 3.

    >>> from minillm.data.bpe import train
    >>> tokenizer = train(["hello"], 260, special=LLAMA3_SPECIAL)
    >>> chat = render_llama3(tokenizer, [{"role": "assistant", "content": " yes "}])
    >>> tokenizer.decode(chat.ids[: chat.spans[0][0]]), tokenizer.decode(chat.ids[slice(*chat.spans[0])])
    ('<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\\n\\n', 'yes<|eot_id|>')
    """
    if not tokenizer.special.keys() >= set(LLAMA3_SPECIAL):
        raise ValueError(f"the template needs the special tokens {LLAMA3_SPECIAL}, got {tuple(tokenizer.special)}")
    begin, opened, named, closed = (tokenizer.special[name] for name in LLAMA3_SPECIAL)

    def header(role: str) -> list[int]:
        return [opened, *tokenizer.encode("ipython" if role == "tool" else role), named, *tokenizer.encode("\n\n")]

    ids, spans = [begin], []
    for number, message in enumerate(messages):
        check_message(number, message)
        ids += header(message["role"])
        start = len(ids)
        ids += [*tokenizer.encode(message["content"].strip()), closed]
        if message["role"] == "assistant":
            spans.append((start, len(ids)))
    return Chat(ids + header("assistant") if reply else ids, spans)


def labelled_row(
    ids: Int[Tensor, " t"], spans: Int[Tensor, "n 2"], *, length: int, pad: int
) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """A conversation as one row of `length` tokens, and its labels, int64 both.

    A long one loses its end, a short one is filled with `pad`. The label of a token inside a span (start, one past the
    last) is the token, every other label IGNORE: nothing is shifted, labels[i] is about row[i]. `pad` may be the id
    that ends a message, since what is padding follows from the place. A cut answer has no end of message to learn.

    >>> labelled_row(torch.tensor([5, 6, 7, 2]), torch.tensor([[2, 4]]), length=6, pad=2)
    (tensor([5, 6, 7, 2, 2, 2]), tensor([-100, -100,    7,    2, -100, -100]))
    """
    if length < 1:
        raise ValueError(f"a row needs at least 1 token, got length={length}")
    starts, ends = spans[:, :1], spans[:, 1:]
    if ((starts < 0) | (ends < starts) | (ends > len(ids))).any():
        raise ValueError(f"spans must lie within the {len(ids)} tokens, got {spans.tolist()}")
    row = torch.full((length,), pad, dtype=torch.int64, device=ids.device)
    row[: len(ids)] = ids[:length]
    place = torch.arange(length, device=ids.device)
    said = ((starts <= place) & (place < ends)).any(dim=0)
    return row, row.masked_fill(~said, IGNORE)


class Batch(NamedTuple):
    """Rows of conversations; `documents` numbers the conversation of each token, PADDING where there is none."""

    ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    documents: Int[Tensor, "b t"]


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """What goes into which row of `length`: the longest first, each into the fullest row that has room for it.

    >>> best_fit([3, 5, 6, 2], 8)
    [[2, 3], [1, 0]]
    """
    if sizes and max(sizes) > length:
        raise ValueError(f"a row of {length} tokens holds no conversation of {max(sizes)}: cut it first")
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        free = [row for row in range(len(rows)) if room[row] >= sizes[i]]
        if free:
            row = min(free, key=lambda row: room[row])
        else:
            row = len(rows)
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows


def pack_chats(chats: Sequence[Chat], length: int, *, pad: int, rows: Sequence[Sequence[int]] | None = None) -> Batch:
    """Conversations in rows of `length`, several to a row and each whole; `rows` is `best_fit` unless given.

    `rows=[[0], [1], ...]` gives each a row of its own, and then a longer one is cut. The first token of a conversation
    is no target: the token before it in the row is another's.
    """
    if rows is None:
        rows = best_fit([len(chat.ids) for chat in chats], length)
    made = Batch(*(torch.full((len(rows), length), empty) for empty in (pad, IGNORE, PADDING)))
    for number, row in enumerate(rows):
        at = 0
        for i in row:
            size = min(len(chats[i].ids), length - at)
            spans = torch.tensor(chats[i].spans, dtype=torch.int64).view(-1, 2)
            place = (number, slice(at, at + size))
            made.ids[place], made.labels[place] = labelled_row(torch.tensor(chats[i].ids), spans, length=size, pad=pad)
            made.documents[place] = i
            made.labels[number, at] = IGNORE
            at += size
    return made


def label_loss(logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
    """Mean nats of the labels that are not IGNORE, over tokens, 0 without any: logits[:, i] against labels[:, i + 1].

    >>> round(label_loss(torch.zeros(1, 3, 8), torch.tensor([[-100, -100, 4]])).item(), 4)       # ln 8
    2.0794
    """
    return next_token_loss(logits, labels.clamp(min=0), ignore=labels == IGNORE)


def batch_loss(model: Transformer, batch: Batch) -> Float[Tensor, ""]:
    """`label_loss` of a model that reads every conversation of the batch on its own; the logits are never all held."""
    mask, places = document_mask(batch.documents), positions(batch.documents)
    hidden = model.hidden(batch.ids, positions=places, visible=mask)[:, :-1].flatten(0, 1)
    return chunked_cross_entropy(hidden, model.unembedding, batch.labels[:, 1:].flatten())
