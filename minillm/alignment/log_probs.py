"""What a model gave the tokens of a response: log-probabilities at a temperature, and their sums and means.

Idea:        All of alignment is computed from one table: log p of each token that was written, given what stood before
             it, and a mask of the tokens that the model itself wrote. A response's log-probability is the sum over the
             mask. Prompt, padding and tool output are not actions: they are masked out before anything else is done,
             so that not even an infinity there reaches a loss or a gradient. Tokens sampled at a temperature must be
             scored at that temperature, or ratios of probabilities are not importance weights.
Cost:        One forward pass. With the logits n v numbers are held for n tokens; from hidden states and head in chunks
             chunk x v, for which the head's product is done once more in the backward pass.
Paper:       Ouyang et al. 2022, "InstructGPT", arXiv:2203.02155, section 3.5 (the probabilities that RLHF compares).
Production:  TRL selective_log_softmax and the mask of its completions; transformers compute_transition_scores.
Leaves out:  top-k and top-p: a truncated sampler needs the logits set to -inf before, as its sampling did.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_log_probs(
    logits: Float[Tensor, "*b v"], ids: Int[Tensor, "*b"], *, temperature: float = 1.0
) -> Float[Tensor, "*b"]:
    """log p of each id under the logits beside it, in nats and in float32 or better. Nothing is shifted.

    >>> logits = torch.tensor([[1.0, 4.0], [1.0, 4.0]]).log()           # odds 1 : 4, at temperature 2 their root 1 : 2
    >>> token_log_probs(logits, torch.tensor([0, 1])).exp()
    tensor([0.2000, 0.8000])
    >>> token_log_probs(logits, torch.tensor([0, 1]), temperature=2.0).exp()
    tensor([0.3333, 0.6667])
    """
    check_temperature(temperature)
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"each id needs its own logits, got logits {tuple(logits.shape)} and ids {tuple(ids.shape)}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return wide.log_softmax(dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def next_token_log_probs(
    logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], *, temperature: float = 1.0
) -> Float[Tensor, "b t-1"]:
    """log p of every token but the first, as a model says it that has read `ids`. The shift is made here, once.

    The mask that belongs to it is `mask[:, 1:]` of a mask of `ids`.
    """
    if ids.shape[-1] < 2:
        raise ValueError(f"a next token needs at least 2 tokens in a row, got {ids.shape[-1]}")
    return token_log_probs(logits[:, :-1], ids[:, 1:], temperature=temperature)


def head_log_probs(
    hidden: Float[Tensor, "*b c"],
    weight: Float[Tensor, "v c"],
    ids: Int[Tensor, "*b"],
    *,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Float[Tensor, "*b"]:
    """token_log_probs(hidden @ weight.T, ids) without ever holding the logits of more than `chunk` tokens.

    With gradient for hidden states and head. Select the response's rows before calling: the prompt's cost as much.
    """
    check_temperature(temperature)
    if chunk < 1:
        raise ValueError(f"a chunk needs at least 1 token, got {chunk}")
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"each id needs its own hidden state, got {tuple(hidden.shape)} and ids {tuple(ids.shape)}")

    def score(rows: Tensor, right: Tensor) -> Tensor:
        return token_log_probs(rows @ weight.mT, right, temperature=temperature)

    parts = zip(hidden.flatten(0, -2).split(chunk), ids.flatten().split(chunk), strict=True)
    scores = [checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(scores).view(ids.shape)


def span_mask(start: Int[Tensor, " b"], stop: Int[Tensor, " b"], t: int) -> Bool[Tensor, "b {t}"]:
    """True for the tokens from `start` to before `stop` in each row of t.

    >>> span_mask(torch.tensor([1, 0]), torch.tensor([3, 2]), 4).int()
    tensor([[0, 1, 1, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    place = torch.arange(t, device=start.device)
    return (place >= start[:, None]) & (place < stop[:, None])


def response_mask(ids: Int[Tensor, "b t"], start: Int[Tensor, " b"], *, end: int) -> Bool[Tensor, "b t"]:
    """True for what the model wrote: from `start` up to and including the first `end` token, else to the row's end.

    The end token is an action like any other: a model that is not trained on it does not learn to stop. An end token
    of the prompt does not count.

    >>> response_mask(torch.tensor([[9, 5, 6, 9, 0], [9, 5, 6, 7, 8]]), torch.tensor([2, 2]), end=9).int()
    tensor([[0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    written = torch.arange(ids.shape[1], device=ids.device) >= start[:, None]
    ends = ((ids == end) & written).int()
    return written & (ends.cumsum(dim=1) - ends == 0)


def sequence_sum(x: Float[Tensor, "*b t"], mask: Bool[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
    """The sum over the masked-in tokens of each row: of log-probabilities, the log-probability of the response."""
    check_mask(x, mask)
    return x.masked_fill(~mask, 0).sum(dim=-1)


def sequence_mean(x: Float[Tensor, "*b t"], mask: Bool[Tensor, "*b t"]) -> Float[Tensor, "*b"]:
    """The mean over the masked-in tokens of each row, 0 for a row without any.

    >>> x, mask = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]), torch.arange(3) < torch.tensor([[2], [1]])
    >>> sequence_sum(x, mask), sequence_mean(x, mask), token_mean(x, mask)      # 9 / 3 tokens, not the mean of 2 and 5
    (tensor([4., 5.]), tensor([2., 5.]), tensor(3.))
    """
    return sequence_sum(x, mask) / mask.sum(dim=-1).clamp(min=1)


def token_mean(x: Float[Tensor, "*b t"], mask: Bool[Tensor, "*b t"]) -> Float[Tensor, ""]:
    """The mean over all masked-in tokens of the batch: long rows weigh more. 0 if there are none."""
    return sequence_sum(x, mask).sum() / mask.sum().clamp(min=1)


def check_temperature(temperature: float) -> None:
    """Refuse what no sampler uses."""
    if not temperature > 0:
        raise ValueError(
            f"a temperature is greater than 0, got {temperature}; greedy decoding has no log-probabilities"
        )


def check_mask(x: Tensor, mask: Tensor) -> None:
    """Refuse a mask that would be broadcast, or that is not one."""
    if x.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"a mask has one bool for each token of {tuple(x.shape)}, got {tuple(mask.shape)} of {mask.dtype}"
        )
