"""What a shift or a mask that is wrong teaches: three conventions, a leak, and how either is found.

Idea:        Position i reads tokens 0 to i and must say token i + 1. Two things have to be right, and no error message
             tells when they are not. The shift: without it the target is what was just read, and the model learns to
             copy; made twice, by the data and by the loss, it learns the token after the next. The mask: a model that
             sees the token it must say copies it, and has nothing to copy from when it generates. The training loss
             falls without an error in all these cases. What shows them is the loss of the true next token, a generated
             text, and a look at which tokens a position depends on.
Cost:        Training as in `loop`. `influence` is one forward pass for each token of the text; `greedy_text` one for
             each new token, over the whole text: models that look both ways have no use for a cache.
Paper:       Radford et al. 2018, "GPT" (not on arXiv), equation 1 (the objective); Vaswani et al. 2017,
             arXiv:1706.03762, section 3.2.3 (what the mask must prevent).
Production:  shift 1 is transformers' ForCausalLMLoss on labels that are the ids; shift 0 is its ForMaskedLMLoss.
Leaves out:  tokens of more than one letter and models that learn to write: those are trained by `recipe`.
"""

import string
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.architecture.transformer import Config, Transformer

LETTERS = len(string.ascii_lowercase)
SYMBOLS = string.ascii_lowercase + " "  # what the small model knows, by number

Texts = Callable[..., Tensor]  # texts(rows, length, generator=...): numbers of symbols
Mask = Callable[[Tensor], Tensor]  # from ids b t to who sees whom, b t t


def shifted_loss(logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], shift: int) -> Float[Tensor, ""]:
    """Mean nats when the logits of position i are judged by token i + shift. 1 is right, 0 and 2 are the mistakes.

    >>> says = 9.0 * F.one_hot(torch.tensor([[1, 2, 3]]), 4)      # read 0, 1, 2, each time quite sure of the next
    >>> [round(shifted_loss(says, torch.tensor([[0, 1, 2]]), shift).item(), 1) for shift in (0, 1, 2)]
    [9.0, 0.0, 9.0]
    """
    t = ids.shape[1]
    if not 0 <= shift < t:
        raise ValueError(f"the shift must be 0 to {t - 1} for texts of {t} tokens, got {shift}")
    return F.cross_entropy(logits[:, : t - shift].flatten(0, 1), ids[:, shift:].flatten())


def alphabets(rows: int, length: int, *, generator: torch.Generator) -> Int[Tensor, "{rows} {length}"]:
    """Pieces of the alphabet, which goes on with a after z, from a random letter on. Every next letter is certain.

    >>> spelt(alphabets(1, 5, generator=torch.Generator().manual_seed(0))[0])
    'qrstu'
    """
    start = torch.randint(LETTERS, (rows, 1), generator=generator)
    return (start + torch.arange(length)) % LETTERS


def noise(rows: int, length: int, *, generator: torch.Generator) -> Int[Tensor, "{rows} {length}"]:
    """Random letters: whatever came before, the next one is worth log(26) = 3.26 nats. Who needs less has seen it."""
    return torch.randint(LETTERS, (rows, length), generator=generator)


def pieces(text: str) -> Texts:
    """Pieces of a text from random places, in lower case, with one space for each run of anything but a letter."""
    words = "".join(letter if letter in SYMBOLS else " " for letter in text.lower()).split()
    ids = numbered(" ".join(words))

    def texts(rows: int, length: int, *, generator: torch.Generator) -> Int[Tensor, "{rows} {length}"]:
        start = torch.randint(len(ids) - length + 1, (rows, 1), generator=generator)
        return ids[start + torch.arange(length)]

    return texts


def spelt(ids: Int[Tensor, " t"]) -> str:
    """The text of numbers 0 to 26."""
    return "".join(SYMBOLS[i] for i in ids.tolist())


def numbered(text: str) -> Int[Tensor, " t"]:
    """The numbers of a text of small letters and spaces."""
    return torch.tensor([SYMBOLS.index(letter) for letter in text])


def small_model(*, seed: int, layers: int = 1, width: int = 64) -> Transformer:
    """A decoder for letters."""
    torch.manual_seed(seed)
    shape = Config(len(SYMBOLS), width, layers, 2, kv_heads=2, head_size=width // 2, hidden=2 * width, context=64)
    return Transformer(shape)


def both_ways(ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """A mask that hides nothing: with it, position i sees token i + 1, its own target."""
    b, t = ids.shape
    return torch.ones(b, t, t, dtype=torch.bool, device=ids.device)


def train(
    texts: Texts,
    *,
    shift: int = 1,
    mask: Mask | None = None,
    steps: int = 150,
    length: int = 16,
    seed: int = 0,
) -> tuple[Transformer, list[float]]:
    """A small model trained on fresh texts under a shift and a mask, causal without one; and its losses in nats."""
    model, generator = small_model(seed=seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), fused=True)
    losses = []
    for _ in range(steps):
        ids = texts(32, length, generator=generator)
        loss = shifted_loss(model(ids, visible=None if mask is None else mask(ids)), ids, shift)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@torch.no_grad()
def greedy_text(model: nn.Module, ids: Int[Tensor, " t"], new: int, *, mask: Mask | None = None) -> Int[Tensor, " n"]:
    """The `new` most likely tokens after `ids`, each with the whole text read anew, under the mask of the training."""
    start = len(ids)
    for _ in range(new):
        logits = model(ids[None], visible=None if mask is None else mask(ids[None]))
        ids = torch.cat([ids, logits[0, -1].argmax(dim=-1, keepdim=True)])
    return ids[start:]


@torch.no_grad()
def influence(
    model: Callable[..., Tensor], ids: Int[Tensor, " t"], *, visible: Bool[Tensor, "1 t t"] | None = None
) -> Float[Tensor, "t t"]:
    """How far the logits of each position (row) move, at most, when one token (column) is another one.

    Exactly 0 above the diagonal for a causal model: the one test of a mask that needs to know nothing of the model.
    """
    before = model(ids[None], visible=visible)[0]
    columns = []
    for place in range(len(ids)):
        changed = ids.clone()
        changed[place] = (ids[place] + 1) % before.shape[-1]
        columns.append((model(changed[None], visible=visible)[0] - before).abs().amax(dim=-1))
    return torch.stack(columns, dim=1)
