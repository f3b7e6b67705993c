"""The exercise of training/next_token: the loss of a language model with padding, and its wrong versions."""

from collections.abc import Callable
from typing import Any

import torch

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: training/next_token
import torch
import torch.nn.functional as F


def next_token_loss(logits, ids, *, ignore=None):
    """The pre-training loss in nats, a scalar: how badly each token is predicted from those before it.

    ids [b, t] are the tokens that the model read, logits [b, t, v] what it said at each position.
    The logits at position i are judged by ids[:, i + 1]; the last position has no target.
    ignore [b, t] is True at tokens that are not to be learnt (padding, a prompt): they are no
    targets. Logits without a target do not count, be they infinite. The result is the mean over
    all targets that are left, whatever row they are in; 0 if there is none. Half-precision logits
    are judged in float32.
    """
    raise NotImplementedError
'''


def oracle(logits, ids, *, ignore=None):  # type: ignore[no-untyped-def]
    """The definition in float64, one token after the other."""
    total, count = logits.new_zeros((), dtype=torch.float64), 0
    for b, row in enumerate(ids.tolist()):
        for i, token in enumerate(row[1:], start=1):
            if ignore is None or not ignore[b, i]:
                said = logits[b, i - 1].double()
                total = total + said.logsumexp(dim=0) - said[token]
                count += 1
    return (total / max(count, 1)).to(torch.promote_types(logits.dtype, torch.float32))


def said(b: int, t: int, v: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits, and ids in which every token occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(b, t, v, generator=generator)
    return logits.to(dtype), torch.randperm(b * t, generator=generator).view(b, t) % v


def from_place(t: int, *starts: int) -> torch.Tensor:
    """Rows of t tokens, ignored from a place on."""
    return torch.arange(t) >= torch.tensor(starts)[:, None]


def make_cases() -> list[Case]:
    hand = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]]).log(), torch.tensor([[0, 1, 0]])
    scattered = torch.rand(3, 9, generator=torch.Generator().manual_seed(9)) < 0.4
    nothing = torch.ones(2, 5, dtype=torch.bool)
    return [
        Case("by hand", hand, {}, "the targets have probability 1/4 and 1/2: (ln 4 + ln 2) / 2"),
        Case("no padding", said(3, 8, 11, 0), {}, "every token but the first of each row is a target"),
        Case("padding", said(2, 10, 7, 1), {"ignore": from_place(10, 6, 6)}, "the last four tokens are padding"),
        Case("unequal rows", said(3, 12, 7, 2), {"ignore": from_place(12, 2, 12, 5)}, "rows of 1, 11 and 4 targets"),
        Case("prompt", said(2, 9, 7, 3), {"ignore": ~from_place(9, 4, 6)}, "the first tokens are a prompt"),
        Case("scattered", said(3, 9, 5, 4), {"ignore": scattered}, "any token may be ignored, and any id is real"),
        Case("nothing to learn", said(2, 5, 7, 5), {"ignore": nothing}, "all tokens are ignored"),
        Case("half precision", said(4, 60, 300, 6, torch.bfloat16), {}, "bfloat16 logits"),
    ]


def gradient(function: Callable[..., Any]) -> str | None:
    """The gradient is (softmax - one-hot) / targets before a target, and exactly 0 where nothing is predicted."""
    logits, ids = said(2, 6, 5, 7)
    logits = logits.double().requires_grad_()
    ignore = from_place(6, 3, 6)
    loss = function(logits, ids, ignore=ignore)
    if not loss.requires_grad:
        return "No gradient reaches the logits: nothing may be detached on the way from the logits to the loss."
    (got,) = torch.autograd.grad(loss, logits)
    silent = torch.cat([ignore[:, 1:], torch.ones(2, 1, dtype=torch.bool)], dim=1)
    if got[silent].abs().max() > 0:
        return "There is a gradient where nothing is predicted: before an ignored token, or at the last position."
    right = torch.nn.functional.one_hot(ids.roll(-1, dims=1), 5)
    if not torch.allclose(got[~silent], ((logits.detach().softmax(dim=-1) - right) / 7)[~silent], rtol=1e-4):
        return "The value is right but its gradient is not: it is (softmax - one-hot) / number of targets."
    return None


def unread(function: Callable[..., Any]) -> str | None:
    """What is not a target must not count, not even if it is infinite."""
    logits, ids = said(1, 6, 5, 8)
    ignore = from_place(6, 4)
    logits[0, 3:] = torch.inf
    if function(logits, ids, ignore=ignore).isfinite():
        return None
    return (
        "Infinite logits without a target (before an ignored token, or at the last position) spoil the loss: "
        "0 x inf is nan. Leave them out instead of weighing 0."
    )


TARGETS = "    targets = next_tokens(ids, ignore).flatten()\n"
SHIFT = "    rows = logits[:, :-1].flatten(0, 1)\n"
TOTAL = "    return total / (targets != IGNORE).sum().clamp(min=1)\n"
SHIFTED = "return ids[:, 1:].masked_fill(ignore[:, 1:], IGNORE)"
SIZE = "size = (square / (1 - beta2**step)).sqrt_().add_(eps)"
DECAY = "    weight.mul_(1 - lr * weight_decay)\n    mean.lerp_(grad, 1 - beta1)\n"

EXERCISE = Exercise(
    question="training/next_token",
    module="training/objective",
    function="next_token_loss",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("loss",),
    rtol=1e-5,  # float32 sums of up to 236 losses
    atol=1e-6,
    wrong=(
        Wrong(
            "no shift",
            TARGETS + SHIFT,
            "    targets = ids[:, :-1].flatten() if ignore is None else"
            " ids[:, :-1].masked_fill(ignore[:, :-1], IGNORE).flatten()\n" + SHIFT,
            "The logits are judged by the token that was just read, not by the next one: the model learns to copy.",
        ),
        Wrong(
            "no shift at all positions",
            TARGETS + SHIFT,
            "    targets = (ids if ignore is None else ids.masked_fill(ignore, IGNORE)).flatten()\n"
            "    rows = logits.flatten(0, 1)\n",
            "All t positions are judged, each by the token that it just read: the target of position i is "
            "ids[:, i + 1], and the last position has none.",
        ),
        Wrong(
            "shifted twice",
            TARGETS + SHIFT,
            "    ids = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)\n"
            "    ignore = None if ignore is None else torch.cat([ignore[:, 1:], ignore[:, :1] | True], dim=1)\n"
            + TARGETS
            + SHIFT,
            "The targets are shifted twice: the model learns the token after the next.",
        ),
        Wrong(
            "shifted the other way",
            TARGETS + SHIFT,
            "    targets = (ids if ignore is None else ids.masked_fill(ignore, IGNORE))[:, :-1].flatten()\n"
            "    rows = logits[:, 1:].flatten(0, 1)\n",
            "The logits are judged by the token before: the shift has the wrong direction.",
        ),
        Wrong(
            "mask not shifted",
            SHIFTED,
            "return ids[:, 1:].masked_fill(ignore[:, :-1], IGNORE)",
            "ignore marks tokens and is shifted with them: the target is ids[:, i + 1], so ask ignore[:, i + 1].",
        ),
        Wrong(
            "ignored tokens count in the mean",
            TOTAL,
            "    return total / targets.numel()\n",
            "You divide by all positions, ignored ones included: the more padding, the smaller the loss looks.",
        ),
        Wrong(
            "all tokens count in the mean",
            TOTAL,
            "    return total / ids.numel()\n",
            "You divide by all b t tokens: the first of each row is no target, nor is one that is ignored.",
        ),
        Wrong(
            "sum instead of mean",
            TOTAL,
            "    return total\n",
            "The losses are added up: the mean over the targets is asked for.",
        ),
        Wrong(
            "mean of row means",
            TOTAL,
            "    nats = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction='none').view(len(ids), -1)\n"
            "    kept = (targets != IGNORE).view(len(ids), -1).sum(dim=1)\n"
            "    return (nats.sum(dim=1) / kept.clamp(min=1)).mean()\n",
            "Each row has a mean of its own, and the rows are averaged: tokens of short rows then weigh more.",
        ),
        Wrong(
            "mask ignored",
            SHIFTED,
            "return ids[:, 1:]",
            "ignore is not used: padding and prompt are learnt as well.",
        ),
        Wrong(
            "mask inverted",
            SHIFTED,
            "return ids[:, 1:].masked_fill(~ignore[:, 1:], IGNORE)",
            "ignore is the wrong way round: True marks the tokens that are not learnt.",
        ),
        Wrong(
            "half precision loss",
            "wide = rows.to(torch.promote_types(rows.dtype, torch.float32))\n    total",
            "wide = rows\n    total",
            "Softmax and sum are done in the half precision of the logits: convert them to float32 first.",
        ),
        Wrong(
            "divided by nothing",
            TOTAL,
            TOTAL.replace(".clamp(min=1)", ""),
            "A batch without a target gives 0 / 0: the result is to be 0.",
        ),
    ),
    also_wrong=(
        Wrong(
            "gradient of the sum",
            "scale = grad_out / count",
            "scale = grad_out",
            "The loss is a mean, its gradient is divided by the number of targets.",
        ),
        Wrong(
            "ignored rows teach the head",
            "grad_weight += grad.mT @ (rows * counts)",
            "grad_weight += grad.mT @ rows",
            "Rows without a target do not teach the head.",
        ),
        Wrong(
            "all chosen are masked",
            "masked = draw(torch.full_like(chance, 0.8)) & chosen",
            "masked = draw(torch.full_like(chance, 1.0)) & chosen",
            "Of the chosen tokens 80 % are masked, 10 % replaced, 10 % left.",
        ),
        Wrong(
            "all tokens are targets",
            "ids.masked_fill(~chosen, IGNORE)",
            "ids",
            "Masked language modelling judges the chosen tokens only.",
        ),
        Wrong(
            "unchanged tokens not judged",
            "ids.masked_fill(~chosen, IGNORE)",
            "ids.masked_fill(~(masked | random), IGNORE)",
            "The chosen tokens that are left alone are targets as well.",
        ),
        Wrong(
            "prefix one too long",
            "(place < prefix[..., None, None])",
            "(place <= prefix[..., None, None])",
            "The prefix is the first n tokens, positions below n.",
        ),
        Wrong(
            "prefix causal inside",
            "(place <= place[:, None]) | (place < prefix[..., None, None])",
            "(place <= place[:, None]) | (place < 0 * prefix[..., None, None])",
            "Inside the prefix everyone sees everyone.",
        ),
        Wrong("nats a byte", "return nats / math.log(2) / size", "return nats / size", "Bits are nats / ln 2."),
        Wrong(
            "always shifted by one",
            "logits[:, : t - shift].flatten(0, 1), ids[:, shift:]",
            "logits[:, : t - 1].flatten(0, 1), ids[:, 1:]",
            "The shift is the one asked for.",
            module="training/next_token",
        ),
        Wrong(
            "shifted backwards",
            "logits[:, : t - shift].flatten(0, 1), ids[:, shift:]",
            "logits[:, shift:].flatten(0, 1), ids[:, : t - shift]",
            "Position i is judged by token i + shift, not by i - shift.",
            module="training/next_token",
        ),
        Wrong(
            "alphabet with an end",
            "(start + torch.arange(length)) % LETTERS",
            "(start + torch.arange(length)).clamp(max=LETTERS - 1)",
            "After z comes a.",
            module="training/next_token",
        ),
        Wrong(
            "noise that can be learnt",
            "return torch.randint(LETTERS, (rows, length), generator=generator)",
            "return torch.randint(LETTERS, (rows, 1), generator=generator).expand(rows, length)",
            "Every letter is drawn by itself.",
            module="training/next_token",
        ),
        Wrong(
            "open mask that is causal",
            "return torch.ones(b, t, t, dtype=torch.bool, device=ids.device)",
            "return torch.ones(b, t, t, dtype=torch.bool, device=ids.device).tril()",
            "Without a mask every position sees all others.",
            module="training/next_token",
        ),
        Wrong(
            "generated from the last token",
            "ids = torch.cat([ids, logits[0, -1].argmax(dim=-1, keepdim=True)])",
            "ids = torch.cat([ids[1:], logits[0, -1].argmax(dim=-1, keepdim=True)])",
            "The text grows: each token is read with all before it.",
            module="training/next_token",
        ),
        Wrong(
            "changes pile up",
            "changed = ids.clone()",
            "changed = ids",
            "One token is changed at a time, in a copy.",
            module="training/next_token",
        ),
        Wrong(
            "influence turned round",
            "return torch.stack(columns, dim=1)",
            "return torch.stack(columns, dim=0)",
            "Rows are the positions that depend, columns the tokens they depend on.",
            module="training/next_token",
        ),
        Wrong(
            "mean of means",
            "share = count / max(1, sum(counts))",
            "share = 1 / len(batches)",
            "Every micro-batch counts the same, whatever its number of targets: the update is not that of one batch.",
            module="training/loop",
        ),
        Wrong(
            "special tokens are text",
            "nats += (found * (text > 0)).sum(dtype=torch.float64)",
            "nats += found.sum(dtype=torch.float64)",
            "Targets without text are neither loss nor bytes.",
            module="training/loop",
        ),
        Wrong(
            "documents predict each other",
            "targets = next_tokens(rows.ids, first).flatten()",
            "targets = next_tokens(rows.ids).flatten()",
            "Nothing predicts the first token of a document.",
            module="training/loop",
        ),
        Wrong(
            "gradient not cleared",
            "        self.model.zero_grad()\n",
            "",
            "The gradient of the step before is still there.",
            module="training/loop",
        ),
        Wrong(
            "pairs the wrong way round",
            "ids[:-1] * v + ids[1:]",
            "ids[1:] * v + ids[:-1]",
            "The row is the token, the column the one after it.",
            module="training/recipe",
        ),
        Wrong(
            "every pair counts once",
            "-(counts * F.log",
            "-((counts > 0) * F.log",
            "A pair weighs as much as it occurs.",
            module="training/recipe",
        ),
        Wrong(
            "blocks learn in the warm start",
            "torch.optim.AdamW([model.embedding, model.head]",
            "torch.optim.AdamW([*model.parameters()]",
            "The warm start leaves the blocks alone.",
            module="training/recipe",
        ),
        Wrong(
            "decay in the gradient",
            DECAY,
            "    grad = grad + weight_decay * weight\n    mean.lerp_(grad, 1 - beta1)\n",
            "The decay went into the gradient, where Adam divides it by its size: AdamW shrinks the weight itself.",
            module="training/optimizers",
        ),
        Wrong(
            "square not corrected",
            SIZE,
            "size = square.sqrt().add_(eps)",
            "The mean square starts at 0: without 1 - beta2^step the first steps are too large.",
            module="training/optimizers",
        ),
        Wrong(
            "words counted once",
            "pairs[pair] += times[i]",
            "pairs[pair] += 1",
            "A pair counts as often as its word occurs in the text.",
            module="data/bpe",
        ),
        Wrong(
            "merges from the left",
            "heapq.heappush(heap, (found[0], i, pair, found[1]))",
            "heapq.heappush(heap, (0, i, pair, found[1]))",
            "The merge learnt first is applied first, wherever it stands in the word.",
            module="data/bpe",
        ),
        Wrong(
            "held-out chapters trained on",
            'if (i % HELD_OUT == 0) == (split == "held_out")',
            'if split == "train" or i % HELD_OUT == 0',
            "What is held out must not be in the training set.",
            module="data/corpus",
        ),
        Wrong(
            "characters called bytes",
            "lengths[i] = len(tokenizer.bytes_of[i])",
            'lengths[i] = len(tokenizer.bytes_of[i].decode("utf-8", "replace"))',
            "A character has up to four bytes, and a token may hold half of one.",
            module="data/corpus",
        ),
        Wrong(
            "end before the document",
            "(*document, eos)",
            "(eos, *document)",
            "The end of a document follows it.",
            module="data/corpus",
        ),
    ),
    probes=(Probe("gradient", gradient), Probe("unread", unread)),
    hints=(
        "Shift once: logits[:, :-1] are judged by ids[:, 1:]. Shift ignore in the same way as ids.",
        "F.cross_entropy takes logits [n, v] and targets [n]: flatten both. Targets of -100 are left out.",
        "Add up with reduction='sum', then divide by the number of targets that are not -100, at least 1.",
        "In bfloat16, convert the logits with .float() before the loss.",
    ),
)
