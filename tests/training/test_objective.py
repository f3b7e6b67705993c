"""Objectives: one shift, means over tokens, head and loss in chunks without the logits, BERT's draws, masks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.data import bpe, corpus
from minillm.measure import flops, peak_memory
from minillm.training.objective import (
    IGNORE,
    bits_per_byte,
    chunked_cross_entropy,
    masked_lm_targets,
    next_token_loss,
    next_tokens,
    prefix_lm_mask,
    softmax_and_nats,
    token_nats,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def tokens(*shape, v=11, seed=0, device="cpu"):
    return torch.randint(v, shape, generator=torch.Generator().manual_seed(seed)).to(device)


# Next token


def test_next_token_loss_by_hand():
    # after token 0 the model gives token 1 probability 1/4, after token 1 it gives token 0 probability 1/2;
    # what it says after the last token is judged by nothing
    p = torch.tensor([[[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]]], dtype=torch.float64)
    loss = next_token_loss(p.log(), torch.tensor([[0, 1, 0]]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_the_shift_is_made_once():
    ids = tokens(2, 9, v=5)
    says = {step: 50.0 * F.one_hot(ids.roll(-step, dims=1), 5).double() for step in (0, 1, 2)}  # 50 nats sure
    assert next_token_loss(says[1], ids) < 1e-6  # the next token: right
    assert next_token_loss(says[0], ids) > 10  # the token itself: no shift at all
    assert next_token_loss(says[2], ids) > 10  # the token after the next: shifted twice


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignored", [False, True])
def test_equals_transformers(ignored, device):
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, ids = randn(3, 7, 11, dtype=torch.float32, device=device), tokens(3, 7, device=device)
    ignore = tokens(3, 7, v=2, seed=1, device=device).bool() if ignored else None
    labels = ids if ignore is None else ids.masked_fill(ignore, -100)
    torch.testing.assert_close(
        next_token_loss(logits, ids, ignore=ignore), ForCausalLMLoss(logits, labels, vocab_size=11)
    )


def test_the_mean_is_over_tokens_not_over_rows():
    # row 0 has one target, of 4 nats; row 1 has three targets, of 0 nats each: mean 1, the mean of row means is 2
    logits = torch.zeros(2, 4, 2, dtype=torch.float64)
    logits[0, :, 1] = math.log(math.exp(4) - 1)  # token 0 has probability exp(-4)
    logits[1, :, 0] = 100.0
    ignore = torch.tensor([[False, False, True, True], [False] * 4])
    assert next_token_loss(logits, torch.zeros(2, 4, dtype=torch.int64), ignore=ignore).item() == pytest.approx(1.0)


def test_padding_changes_nothing():
    logits, ids = randn(2, 5, 11), tokens(2, 5)
    padded = torch.cat([logits, randn(2, 3, 11, seed=1)], dim=1), torch.cat([ids, tokens(2, 3, seed=1)], dim=1)
    ignore = torch.arange(8).expand(2, 8) >= 5
    torch.testing.assert_close(next_token_loss(*padded, ignore=ignore), next_token_loss(logits, ids))


def test_the_gradient_is_zero_exactly_where_nothing_is_predicted():
    logits, ids = randn(2, 6, 11).requires_grad_(), tokens(2, 6)
    ignore = torch.zeros(2, 6, dtype=torch.bool)
    ignore[0, 3] = True  # the logits at position 2 would predict it
    next_token_loss(logits, ids, ignore=ignore).backward()
    silent = torch.zeros(2, 6, dtype=torch.bool)
    silent[0, 2] = silent[:, 5] = True
    assert (logits.grad == 0).all(dim=-1).equal(silent)


def test_the_first_token_may_be_ignored_or_not():
    logits, ids = randn(1, 4, 11), tokens(1, 4)
    ignore = torch.tensor([[True, False, False, False]])
    torch.testing.assert_close(next_token_loss(logits, ids, ignore=ignore), next_token_loss(logits, ids))


def test_without_a_target_loss_and_gradient_are_zero():
    logits, ids = randn(1, 4, 11).requires_grad_(), tokens(1, 4)
    loss = next_token_loss(logits, ids, ignore=torch.ones(1, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_judged_in_float32(dtype):
    logits, ids = randn(4, 50, 300, dtype=dtype), tokens(4, 50, v=300)
    loss = next_token_loss(logits, ids)
    assert loss.dtype == torch.float32
    # the log-softmax of numbers that are exact in float32: rounding of float32 only, of the half type not at all
    torch.testing.assert_close(loss.double(), next_token_loss(logits.double(), ids), rtol=1e-6, atol=0)


# Head and loss in chunks


def problem(n=23, c=6, v=11, *, ignored=True, dtype=torch.float64, device="cpu", ignore=IGNORE):
    hidden, weight = randn(n, c, dtype=dtype, device=device), randn(v, c, seed=1, dtype=dtype, device=device)
    targets = tokens(n, v=v, seed=2, device=device)
    if ignored:
        targets[tokens(n, v=3, seed=3, device=device) == 0] = ignore
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
@pytest.mark.parametrize("ignored", [False, True])
def test_chunks_equal_the_plain_way_in_value_and_gradient(chunk, ignored, device):
    hidden, weight, targets = problem(ignored=ignored, device=device)
    ours = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    theirs = F.cross_entropy(hidden @ weight.mT, targets)
    torch.testing.assert_close(ours, theirs)
    for factor in (1.0, -3.5):  # a scaled gradient, and the same graph twice
        grads = [torch.autograd.grad(factor * x, (hidden, weight), retain_graph=True) for x in (ours, theirs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_chunks_gradcheck():
    hidden, weight, targets = problem(n=7, c=3, v=5)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, targets, chunk=3), (hidden, weight))


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_equal_the_plain_way_in_float32_with_the_default_chunk(device):
    hidden, weight, targets = problem(n=1100, c=32, v=301, dtype=torch.float32, device=device)
    losses = chunked_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.mT, targets)
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in losses), strict=True):
        # gradients of size 1e-3, each a sum of some hundred products added in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_under_autocast(device):
    hidden, weight, targets = problem(n=200, c=32, v=301, dtype=torch.float32, device=device)
    exact = F.cross_entropy(hidden.double() @ weight.double().mT, targets)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = chunked_cross_entropy(hidden, weight, targets, chunk=64)
        theirs = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        watched = flops(lambda: chunked_cross_entropy(hidden, weight, targets))
    assert watched == 6 * 200 * 32 * 301
    assert ours.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    # logits of size 6 are rounded to bfloat16, the loss is a mean of 130 of them
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2 * eps)
    # the same logits but for a few, which products in other blocks round to the neighbour; both judged in float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, exact)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2 * eps * b.norm()  # logits and both factors of each product are rounded


def test_under_autocast_the_head_is_cast_once():
    hidden, weight, targets = problem(n=200, c=32, v=301, dtype=torch.float32)
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            casts.append(func.overloadpacket is torch.ops.aten._to_copy and args[0].numel() == weight.numel())
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Casts():
        chunked_cross_entropy(hidden, weight, targets, chunk=64)
    assert sum(casts) == 1  # not once for each of the four chunks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunks_in_half_precision(dtype):
    hidden, weight, targets = problem(n=64, c=16, v=33, dtype=dtype)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=16)
    grads = torch.autograd.grad(loss, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = F.cross_entropy(exact[0] @ exact[1].mT, targets)
    eps = torch.finfo(dtype).eps
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=0, atol=2 * eps)  # logits of size 4, rounded once
    for a, b in zip(grads, torch.autograd.grad(truth, exact), strict=True):
        assert a.dtype == dtype
        assert (a - b).norm() < 2 * eps * b.norm()  # factors rounded, and the result


def test_the_sum_over_chunks_is_kept_in_float32():
    # 4,096 rows with the same gradient: in bfloat16 the sum would stop at 256 times one of them
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk=1).backward()
    assert weight.grad.flatten().tolist() == [-0.5, 0.5]


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, weight, targets = problem()
    for asks in (hidden, weight):
        inputs = [x if x is asks else x.detach() for x in (hidden, weight)]
        (grad,) = torch.autograd.grad(chunked_cross_entropy(*inputs, targets), asks)
        (plain,) = torch.autograd.grad(F.cross_entropy(inputs[0] @ inputs[1].mT, targets), asks)
        torch.testing.assert_close(grad, plain)


def test_without_gradient_the_value_is_the_same_and_costs_a_third():
    hidden, weight, targets = problem()
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_cross_entropy(hidden, weight, targets), F.cross_entropy(hidden @ weight.mT, targets)
        )
        assert flops(lambda: chunked_cross_entropy(hidden, weight, targets)) == 2 * 23 * 6 * 11
    assert flops(lambda: chunked_cross_entropy(hidden, weight, targets)) == 6 * 23 * 6 * 11


def test_another_number_for_ignored_targets():
    hidden, weight, targets = problem(ignore=10)  # an ordinary token here
    torch.testing.assert_close(
        chunked_cross_entropy(hidden, weight, targets, ignore=10),
        F.cross_entropy(hidden @ weight.mT, targets, ignore_index=10),
    )


def test_nothing_to_predict():
    hidden, weight, targets = problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss.item() == hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_large_logits():
    hidden, weight, targets = problem()
    losses = chunked_cross_entropy(hidden * 1e4, weight, targets), F.cross_entropy(hidden * 1e4 @ weight.mT, targets)
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in losses), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_of_one_row_equals_autograd():
    logits, targets = randn(5, 7).requires_grad_(), tokens(5, v=7)
    grad, nats = softmax_and_nats(logits.detach(), targets)
    losses = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nats, losses.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(losses.sum(), logits)[0])


class LargestTensor(TorchDispatchMode):
    """Watches every operation and keeps the largest number of elements that any result holds."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_the_logits_of_all_rows_are_never_held():
    n, c, v, chunk = 1024, 8, 500, 64
    hidden, weight, targets = problem(n=n, c=c, v=v, dtype=torch.float32)

    def backward(loss):
        torch.autograd.grad(loss(), (hidden, weight))

    ways = {
        "plain": lambda: backward(lambda: F.cross_entropy(hidden @ weight.mT, targets)),
        "chunks": lambda: backward(lambda: chunked_cross_entropy(hidden, weight, targets, chunk=chunk)),
        "evaluation": lambda: token_nats(hidden, weight, targets, chunk=chunk),
    }
    largest, peak = {}, {}
    for name, way in ways.items():
        with LargestTensor() as watch:
            way()
        largest[name], peak[name] = watch.numel, peak_memory(way)
    assert largest == {"plain": n * v, "chunks": chunk * v, "evaluation": chunk * v}
    assert peak["plain"] > 2 * n * v * 4  # logits and their gradient, at least
    # logits and log-probabilities of a chunk; the gradients, their scaled copies, a chunk's share of them
    assert peak["chunks"] < (3 * chunk * v + 4 * c * (n + v)) * 4
    assert peak["evaluation"] < (3 * chunk * v + 4 * n) * 4


def test_what_waits_for_the_backward_pass_is_the_gradient():
    hidden, weight, targets = problem(n=100, c=8, v=50)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        chunked_cross_entropy(hidden, weight, targets)
    assert sum(saved) == 8 * (100 + 50) + 1  # and the count


def test_inputs_are_left_alone():
    inputs = problem()
    before = [x.detach().clone() for x in inputs]
    chunked_cross_entropy(*inputs).backward()
    for now, then in zip(inputs, before, strict=True):
        assert now.equal(then)


def test_token_nats_are_the_losses_of_the_targets():
    hidden, weight, targets = problem()
    with torch.no_grad():
        expected = F.cross_entropy(hidden @ weight.mT, targets, reduction="none")
    found = token_nats(hidden, weight, targets, chunk=4)
    torch.testing.assert_close(found, expected)
    assert found[targets == IGNORE].abs().max() == 0
    assert not found.requires_grad


# Masked tokens


def test_masked_lm_equals_transformers():
    from transformers import DataCollatorForLanguageModeling

    class Tokenizer:
        mask_token = "[MASK]"

        def convert_tokens_to_ids(self, token):
            return 3

        def __len__(self):
            return 40

    ids, special = tokens(16, 50, v=40), tokens(16, 50, v=5, seed=1) == 0
    collator = DataCollatorForLanguageModeling(Tokenizer())
    collator.generator = torch.Generator().manual_seed(7)
    theirs = collator.torch_mask_tokens(ids.clone(), special)
    generator = torch.Generator().manual_seed(7)
    ours = masked_lm_targets(ids, mask=3, vocabulary=40, special=special, generator=generator)
    for a, b in zip(ours, theirs, strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("device", DEVICES)
def test_masked_lm_shares(device):
    n = 200_000
    ids = torch.full((n,), 7, device=device)
    special = torch.arange(n, device=device) % 2 == 0
    generator = torch.Generator(device).manual_seed(0)
    seen, targets = masked_lm_targets(ids, mask=1, vocabulary=1000, special=special, generator=generator)
    chosen = targets != IGNORE
    assert not (chosen & special).any()
    assert targets[chosen].eq(7).all()
    assert seen[~chosen].eq(7).all()
    count = chosen.sum().item()
    # binomial: 100,000 draws of 0.15 have a standard deviation of 113, 15,000 of 0.8 one of 49, of 0.1 one of 37
    assert abs(count - 15_000) < 5 * 113
    assert abs(seen[chosen].eq(1).sum().item() - 0.8 * count) < 5 * 49
    assert abs(seen[chosen].eq(7).sum().item() - 0.1 * count) < 5 * 37
    random = seen[chosen & (seen != 1) & (seen != 7)]
    assert random.unique().numel() > 700  # of 1,000 words, about 1,500 draws: 777 expected
    assert ids.eq(7).all()  # what came in is left alone


def test_masked_lm_takes_another_share():
    _, targets = masked_lm_targets(tokens(100_000), mask=1, vocabulary=11, share=0.4)
    assert abs((targets != IGNORE).sum().item() - 40_000) < 5 * 155  # standard deviation sqrt(1e5 * 0.24)


# Prefix


def test_prefix_mask_is_causal_after_the_prefix_and_open_inside():
    lengths, t = torch.tensor([0, 2, 5]), 5
    mask = prefix_lm_mask(lengths, t)
    for b, prefix in enumerate(lengths.tolist()):
        for i in range(t):
            for j in range(t):
                assert mask[b, i, j].item() == (j <= i or j < prefix)
    assert mask[0].equal(torch.ones(t, t, dtype=torch.bool).tril())
    assert mask[2].all()


# Bits per byte


@pytest.mark.parametrize("size", [259, 300, 700])
def test_bits_per_byte_do_not_depend_on_the_tokenizer(size):
    # a model that gives every byte 1/256 says 8 bits a byte, whatever its tokens are; nats a token depend on them
    text = corpus.documents("held_out")[0][:3000]
    tokenizer = bpe.train([text], size)
    nats = math.log(256) * corpus.token_bytes(tokenizer)[torch.tensor(tokenizer.encode(text))].double()
    assert bits_per_byte(nats.sum().item(), len(text.encode())) == pytest.approx(8.0)
    assert (nats.mean() > 1.5 * math.log(256)) == (size == 700)


def test_bits_per_byte_by_hand():
    # ln 16 nats are 4 bits and ln 4 nats 2 bits: 6 bits for 3 bytes
    assert bits_per_byte(math.log(16) + math.log(4), 3) == pytest.approx(2.0)


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next_tokens(tokens(2, 1)), "at least 2 tokens in a row, got 1"),
        (lambda: next_tokens(tokens(2, 3), torch.ones(2, 2, dtype=torch.bool)), r"\(2, 3\), got \(2, 2\)"),
        (lambda: next_token_loss(randn(2, 3, 5), tokens(2, 4)), r"same b t, got \(2, 3\) and \(2, 4\)"),
        (lambda: chunked_cross_entropy(randn(4, 3), randn(5, 2), tokens(4)), "same channels, got 3 and 2"),
        (lambda: chunked_cross_entropy(randn(4, 3), randn(5, 3), tokens(3)), "got 4 rows and 3 targets"),
        (lambda: chunked_cross_entropy(randn(4, 3), randn(5, 3), tokens(4), chunk=0), "at least 1 row, got 0"),
        (lambda: token_nats(randn(4, 3), randn(5, 3), tokens(3)), "got 4 rows and 3 targets"),
        (lambda: masked_lm_targets(tokens(4), mask=1, vocabulary=9, share=15.0), "between 0 and 1, got 15.0"),
        (
            lambda: masked_lm_targets(tokens(4), mask=1, vocabulary=9, special=torch.ones(3, dtype=torch.bool)),
            r"\(4,\), got \(3,\)",
        ),
        (lambda: bits_per_byte(1.0, 0), "at least 1 byte of text, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
