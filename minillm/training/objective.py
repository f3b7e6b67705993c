"""What a language model is trained to do: the next token, masked tokens, or the rest after a prefix.

Idea:        The loss is the mean negative log-probability of the right token, in nats. What makes the three objectives
             different is which tokens are targets and who sees whom, not the blocks: next token predicts all tokens
             from the left, masked LM a few of them from both sides, prefix LM the rest of a text whose beginning is
             seen both ways. The head is the largest product of a small model, and its logits the largest tensor: done
             in chunks of rows, with the gradient at once, they are never all held.
Cost:        Head and loss: 6 n c v floating-point operations for n tokens, forward and backward. Plain, n v logits
             and their gradients are held; in chunks, chunk x v, and c (n + v) for the gradients.
Paper:       Devlin et al. 2018, "BERT", arXiv:1810.04805, section 3.1 (masked); Raffel et al. 2019, "T5",
             arXiv:1910.10683, section 3.2 (prefix); Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989 (head and
             loss in chunks, their gradients in the forward pass); Gao et al. 2020, "The Pile", arXiv:2101.00027,
             (bits per byte).
Production:  transformers ForCausalLMLoss and DataCollatorForLanguageModeling (the same draws from one generator);
             torch.nn.functional.cross_entropy; LigerFusedLinearCrossEntropyLoss.
Leaves out:  label smoothing, z-loss, whole-word and span masking.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that is not predicted, as in PyTorch and transformers


def next_tokens(ids: Int[Tensor, "b t"], ignore: Bool[Tensor, "b t"] | None = None) -> Int[Tensor, "b t-1"]:
    """The target of every position but the last: the token after it, IGNORE where `ignore` marks that token.

    >>> next_tokens(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[False, False, False, True]]))
    tensor([[   6,    7, -100]])
    """
    if ids.shape[-1] < 2:
        raise ValueError(f"a next token needs at least 2 tokens in a row, got {ids.shape[-1]}")
    if ignore is None:
        return ids[:, 1:]
    if ignore.shape != ids.shape:
        raise ValueError(f"ignore must mark every token of ids {tuple(ids.shape)}, got {tuple(ignore.shape)}")
    return ids[:, 1:].masked_fill(ignore[:, 1:], IGNORE)


def next_token_loss(
    logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], *, ignore: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, ""]:
    """Mean nats of the targets. The shift is made here, once: logits[:, i] are judged by ids[:, i + 1].

    `ids` are what the model read, not shifted. Tokens marked in `ignore` (padding, a prompt) are not targets and do not
    count in the mean, which runs over tokens, not over rows; without a target it is 0.

    >>> logits = torch.zeros(1, 3, 8)                       # all 8 tokens equally likely
    >>> round(next_token_loss(logits, torch.tensor([[3, 1, 4]])).item(), 4), round(math.log(8), 4)
    (2.0794, 2.0794)
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits and ids need the same b t, got {tuple(logits.shape[:-1])} and {tuple(ids.shape)}")
    targets = next_tokens(ids, ignore).flatten()
    rows = logits[:, :-1].flatten(0, 1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def softmax_and_nats(
    logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n v"], Float[Tensor, " n"]]:
    """Gradient of each row's loss with respect to its logits, softmax minus one at the target, and the loss.

    >>> grad, nats = softmax_and_nats(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([1]))    # probabilities 1/4, 3/4
    >>> grad, nats.exp()
    (tensor([[ 0.2500, -0.2500]]), tensor([1.3333]))
    """
    log_p = F.log_softmax(logits, dim=-1)
    nats = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    return log_p.exp_().scatter_add_(-1, targets[:, None], -torch.ones_like(nats)[:, None]), nats


class ChunkedCrossEntropy(torch.autograd.Function):
    """Saves the gradients of the sum of losses, c (n + v) numbers; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, ignore, dtype):  # type: ignore[no-untyped-def]
        wide = torch.promote_types(dtype, torch.float32)
        head, kept = weight.to(dtype), targets != ignore
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
        parts = (hidden, targets.where(kept, 0), kept[:, None])
        for part, rows, right, counts in zip(*(x.split(chunk) for x in (grad_hidden, *parts)), strict=True):
            rows = rows.to(dtype)
            grad, nats = softmax_and_nats((rows @ head.mT).to(wide), right)
            total += (nats * counts[:, 0]).sum()
            grad = grad.to(dtype)
            part.copy_((grad @ head) * counts)
            grad_weight += grad.mT @ (rows * counts)
        count = kept.sum().clamp(min=1)
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad_out / count
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.dtype), None, None, None, None


def chunked_cross_entropy(
    hidden: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    *,
    chunk: int = 512,
    ignore: int = IGNORE,
) -> Float[Tensor, ""]:
    """cross_entropy(hidden @ weight.T, targets): mean nats of the targets that are not `ignore`, 0 if there is none.

    Head, loss and gradients are computed for `chunk` rows at a time, the products in the dtype of autocast where it is
    on, the loss in float32 or better. The gradient may be scaled and asked for again, but not differentiated.

    >>> hidden, weight = torch.randn(1000, 16), torch.randn(50, 16)
    >>> targets = torch.randint(50, (1000,))
    >>> plain = F.cross_entropy(hidden @ weight.T, targets)
    >>> bool((chunked_cross_entropy(hidden, weight, targets) - plain).abs() < 1e-5)
    True
    """
    check_rows(hidden, weight, targets, chunk)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, ignore, product_dtype(hidden))
    nats = token_nats(hidden, weight, targets, chunk=chunk, ignore=ignore)
    return nats.sum() / (targets != ignore).sum().clamp(min=1)


@torch.no_grad()
def token_nats(
    hidden: Float[Tensor, "n c"],
    weight: Float[Tensor, "v c"],
    targets: Int[Tensor, " n"],
    *,
    chunk: int = 512,
    ignore: int = IGNORE,
) -> Float[Tensor, " n"]:
    """The loss of every target in nats, 0 where it is `ignore`: for evaluation, without gradient, in chunks."""
    check_rows(hidden, weight, targets, chunk)
    dtype = product_dtype(hidden)
    head, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
    return torch.cat(
        [
            F.cross_entropy((rows.to(dtype) @ head.mT).to(wide), right, ignore_index=ignore, reduction="none")
            for rows, right in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
    )


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of float32 numbers is done here and now."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def check_rows(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> None:
    """Refuse rows, head and targets that do not belong together."""
    if hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden and weight need the same channels, got {hidden.shape[-1]} and {weight.shape[-1]}")
    if len(hidden) != len(targets):
        raise ValueError(f"one target for each row, got {len(hidden)} rows and {len(targets)} targets")
    if chunk < 1:
        raise ValueError(f"a chunk needs at least 1 row, got {chunk}")


def masked_lm_targets(
    ids: Int[Tensor, "*b t"],
    *,
    mask: int,
    vocabulary: int,
    special: Bool[Tensor, "*b t"] | None = None,
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "*b t"], Int[Tensor, "*b t"]]:
    """What the model reads and what it must say: BERT's 15 %, of which 80 % masked, 10 % random, 10 % left alone.

    `mask` is the id of the mask token. Each token is chosen by itself, those marked in `special` never. The targets of
    all others are IGNORE; nothing is shifted, a chosen token is judged at its own place. So 15 % of the tokens teach,
    where next-token training has all of them.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if special is not None and special.shape != ids.shape:
        raise ValueError(f"special must mark every token of ids {tuple(ids.shape)}, got {tuple(special.shape)}")

    def draw(probability: Tensor) -> Tensor:
        return torch.bernoulli(probability, generator=generator).bool()

    chance = torch.full(ids.shape, share, device=ids.device)
    chosen = draw(chance if special is None else chance.masked_fill(special, 0))
    masked = draw(torch.full_like(chance, 0.8)) & chosen
    random = draw(torch.full_like(chance, 0.5)) & chosen & ~masked  # half of the rest: 10 % of the chosen
    words = torch.randint(vocabulary, ids.shape, device=ids.device, generator=generator)
    return torch.where(random, words, ids.masked_fill(masked, mask)), ids.masked_fill(~chosen, IGNORE)


def prefix_lm_mask(prefix: Int[Tensor, "*b"], t: int) -> Bool[Tensor, "*b t t"]:
    """True where a query (row) sees a key (column): all of the prefix, and what is not later.

    The targets are the tokens after the prefix; `next_token_loss` with `ignore` on the prefix.

    >>> prefix_lm_mask(torch.tensor(2), 4).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    place = torch.arange(t, device=prefix.device)
    return (place <= place[:, None]) | (place < prefix[..., None, None])


def bits_per_byte(nats: float, size: int) -> float:
    """A summed loss in bits for each of the `size` bytes of text it is about, comparable between tokenizers.

    >>> round(bits_per_byte(1000.0, 500), 4)                # 2 nats a byte
    2.8854
    """
    if size < 1:
        raise ValueError(f"bits per byte need at least 1 byte of text, got {size}")
    return nats / math.log(2) / size
