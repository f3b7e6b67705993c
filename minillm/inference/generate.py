"""Generation: one forward pass over the prompts, then one token at a time against the key/value cache.

Idea:        The prompts fill the cache in one pass. From then on only the newest token of each sequence goes through
             the model; its keys and values join the cache, and its logits give the next token. Prompts of unequal
             length are padded on the left, so that all of them end, and grow, at the same place.
Cost:        a step reads every weight and the whole cache once; for short contexts the weights dominate.
Paper:       Shazeer 2019, arXiv:1911.02150, section 2.4 (incremental decoding).
Production:  transformers GenerationMixin.generate.
Leaves out:  beams, paged caches, batching of requests that come and go. `layout` makes a faster copy of the model for
             a CPU.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.architecture.transformer import Cache, Transformer

Pick = Callable[[Tensor], Tensor]  # from logits b v to tokens b, such as `sampling.draw` after some cuts


def greedy(logits: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """The most likely token of each row."""
    return logits.argmax(dim=-1)


def pad_left(prompts: list[list[int]], *, pad: int = 0) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Prompts of unequal length in one tensor, and which of its tokens are real.

    >>> pad_left([[5, 6, 7], [8]])
    (tensor([[5, 6, 7],
            [0, 0, 8]]), tensor([[ True,  True,  True],
            [False, False,  True]]))
    """
    longest = max(map(len, prompts), default=0)
    if not longest or not all(prompts):
        raise ValueError(f"every prompt needs at least one token, got lengths {[len(p) for p in prompts]}")
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return ids, real


def padded_positions(real: Bool[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Positions that start with 0 at the first real token of each row; padding is at 0 too, but nobody sees it.

    >>> padded_positions(torch.tensor([[False, False, True, True]]))
    tensor([[0, 0, 0, 1]])
    """
    return (real.cumsum(dim=1) - 1).clamp(min=0)


def padded_mask(real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """Who may look at whom in a prompt: at real tokens that are not later. Padding sees itself: in a row without any
    visible key the softmax would be 0/0.

    >>> padded_mask(torch.tensor([[False, True, True]])).int()
    tensor([[[1, 0, 0],
             [0, 1, 0],
             [0, 1, 1]]], dtype=torch.int32)
    """
    own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return real[:, None, :].expand(-1, real.shape[1], -1).tril() | own


@torch.inference_mode()
def stream(
    model: Transformer,
    ids: Int[Tensor, "b t"],
    *,
    new_tokens: int,
    pick: Pick = greedy,
    real: Bool[Tensor, "b t"] | None = None,
) -> Iterator[Int[Tensor, " b"]]:
    """The new tokens of all sequences, one step after the other, as soon as each is known.

    `real` is False for padding on the left. ValueError if the context is too short for what is asked.
    """
    check_request(model, ids, new_tokens, real)
    b, t = ids.shape
    cache = Cache(model.config, b, t + new_tokens, like=model.embedding)
    wide = torch.promote_types(model.embedding.dtype, torch.float32)
    positions = mask = seen = None
    if real is not None and not bool(real.all()):
        seen = torch.cat([real, real.new_ones(b, new_tokens)], dim=1)  # what may be looked at, of all there will be
        positions, mask = padded_positions(real), padded_mask(real)
    hidden = model.hidden(ids, cache=cache, positions=positions, visible=mask)
    for step in range(new_tokens):
        tokens = pick(F.linear(hidden[:, -1], model.unembedding).to(wide))  # logits of the last position only
        yield tokens
        if step + 1 == new_tokens:
            return
        if positions is not None and seen is not None:
            positions, mask = positions[:, -1:] + 1, seen[:, None, : cache.length + 1]
        hidden = model.hidden(tokens[:, None], cache=cache, positions=positions, visible=mask)


def generate(
    model: Transformer,
    ids: Int[Tensor, "b t"],
    *,
    new_tokens: int,
    pick: Pick = greedy,
    real: Bool[Tensor, "b t"] | None = None,
    stop: int | None = None,
) -> Int[Tensor, "b n"]:
    """The new tokens, n of them at most. After a row's first `stop` token the row holds only `stop`; generation ends
    when every row has one."""
    out: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for tokens in stream(model, ids, new_tokens=new_tokens, pick=pick, real=real):
        if stop is not None:
            tokens = tokens.masked_fill(done, stop)
            done = done | (tokens == stop)
        out.append(tokens)
        if stop is not None and bool(done.all()):
            break
    return torch.stack(out, dim=1)


def check_request(model: Transformer, ids: Tensor, new_tokens: int, real: Tensor | None) -> None:
    """Refuse what the context cannot hold, and padding anywhere but on the left of a real token."""
    t, context = ids.shape[1], model.config.context
    if t < 1 or new_tokens < 1:
        raise ValueError(f"a prompt and the new tokens need at least 1 token each, got {t} and {new_tokens}")
    if t + new_tokens > context:
        raise ValueError(f"the context is {context} tokens, the prompt of {t} and {new_tokens} new ones are more")
    if real is not None and (real.shape != ids.shape or bool((real[:, :-1] & ~real[:, 1:]).any() | ~real[:, -1].all())):
        raise ValueError("real must have the shape of ids, and padding must stand on the left of the prompt")
