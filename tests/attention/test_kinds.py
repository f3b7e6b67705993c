"""Who sees whom in an encoder-decoder, and the copy task that only cross-attention can solve."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.attention.cross import may_look, multi_head, split_heads
from minillm.attention.kinds import (
    LONGEST,
    PAD,
    SHORTEST,
    START,
    SYMBOLS,
    Copier,
    WithoutBoth,
    WithoutCross,
    WithoutMask,
    accuracy,
    attention_weights,
    depends,
    prefix,
    right,
    shifted,
    texts,
    train,
    window,
    write,
)
from minillm.attention.naive import visible

KINDS = [Copier, WithoutCross, WithoutMask, WithoutBoth]


def model(kind=Copier, seed=0):
    return kind(torch.Generator().manual_seed(seed)).requires_grad_(False)


def source_and_padding(n=3, seed=1):
    return texts(n, torch.Generator().manual_seed(seed))


# Weights


def test_weights_by_hand():
    # d = 4: scores are halved. Query (2, 0, 0, 0) against keys of first channel 0 and ln 3: weights 1/4, 3/4.
    x_q, x_kv = torch.zeros(1, 1, 4), torch.zeros(1, 2, 4)
    x_q[..., 0], x_kv[0, 1, 0] = 2, math.log(3)
    weights = attention_weights(x_q, x_kv, torch.eye(4), torch.eye(4), heads=1)
    torch.testing.assert_close(weights, torch.tensor([[[[0.25, 0.75]]]]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_those_of_multi_head(causal, padded):
    generator = torch.Generator().manual_seed(0)
    x, memory = (torch.randn(2, n, 8, generator=generator) for n in (4, 6))
    ws = [torch.randn(8, 8, generator=generator) / 3 for _ in range(4)]
    padding = torch.arange(6) >= torch.tensor([[5], [3]]) if padded else None
    look = may_look(4, 6, causal=causal, key_padding=padding)
    weights = attention_weights(x, memory, ws[0], ws[1], heads=2, look=look)
    out = F.linear((weights @ split_heads(memory, ws[2], 2)).transpose(1, 2).flatten(2), ws[3])
    torch.testing.assert_close(out, multi_head(x, memory, *ws, heads=2, causal=causal, key_padding=padding))


def test_weights_equal_pytorch_multihead_attention():
    theirs = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    generator = torch.Generator().manual_seed(0)
    x, memory = (torch.randn(2, n, 8, generator=generator) for n in (4, 6))
    padding = torch.arange(6) >= torch.tensor([[5], [3]])
    _, expected = theirs(x, memory, memory, key_padding_mask=padding, average_attn_weights=False)
    wq, wk, _ = theirs.in_proj_weight.chunk(3)
    got = attention_weights(x, memory, wq, wk, heads=2, look=~padding[:, None, None])
    torch.testing.assert_close(got, expected)


def test_weights_of_a_query_that_may_look_nowhere_are_zero():
    x = torch.ones(1, 2, 4)
    look = torch.tensor([[False, False], [True, False]])
    weights = attention_weights(x, x, torch.eye(4), torch.eye(4), heads=1, look=look)
    assert weights[0, 0].tolist() == [[0, 0], [1, 0]]


# Masks


def test_prefix_and_window():
    everything, itself = torch.ones(4, 4, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    assert torch.equal(prefix(4, 0), visible(4, 4))
    assert torch.equal(prefix(4, 4), everything)
    assert torch.equal(window(4, 4), visible(4, 4))
    assert torch.equal(window(4, 1), itself)
    assert prefix(4, 2).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert window(4, 3).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]


def test_depends_is_the_mask():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, generator=generator)
    ws = [torch.randn(8, 8, generator=generator) / 3 for _ in range(4)]
    assert torch.equal(depends(lambda x: multi_head(x, x, *ws, heads=2, causal=True), x), visible(4, 4))
    assert depends(lambda x: multi_head(x, x, *ws, heads=2), x).all()
    # t x s, not s x t
    assert depends(lambda x: x[:, :2] - x[:, 1:3], x).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]


# The task


def test_texts():
    source, padding = source_and_padding(2000)
    lengths = (~padding).sum(dim=1)
    assert sorted(set(lengths.tolist())) == list(range(SHORTEST, LONGEST + 1))
    assert torch.equal(padding, torch.arange(LONGEST) >= lengths[:, None])  # at the end alone
    assert torch.equal(source == PAD, padding)
    assert sorted(set(source[~padding].tolist())) == list(range(SYMBOLS))


def test_the_decoder_reads_what_comes_before():
    assert shifted(torch.tensor([[3, 5, 7], [1, 2, PAD]])).tolist() == [[START, 3, 5], [START, 1, 2]]


def changes(model, *, source_at=None, written_at=None):
    """Places at which the logits change with one symbol of the source or of what is written."""
    source = torch.tensor([[1, 2, 3, 4, 5, PAD, PAD, PAD]])
    padding, written = source == PAD, torch.tensor([[START, 1, 2, 3, 4, 5, 6, 7]])
    before = model(source, padding, written)
    if source_at is not None:
        source = source.index_fill(1, torch.tensor([source_at]), 9)
    if written_at is not None:
        written = written.index_fill(1, torch.tensor([written_at]), 9)
    after = model(source, padding, written)
    return ((after - before).abs().amax(dim=(0, 2)) > 1e-6).int().tolist()  # above the rounding of float32


def test_who_sees_what_in_the_model():
    all_of_them, none = [1] * 8, [0] * 8
    assert changes(model(), source_at=4) == all_of_them
    assert changes(model(), source_at=5) == none  # padding
    assert changes(model(), written_at=3) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert changes(model(WithoutCross), source_at=4) == none
    assert changes(model(WithoutCross), written_at=3) == [0, 0, 0, 1, 1, 1, 1, 1]
    assert changes(model(WithoutMask), source_at=4) == all_of_them
    assert changes(model(WithoutMask), written_at=3) == all_of_them
    assert changes(model(WithoutBoth), source_at=4) == none
    assert changes(model(WithoutBoth), written_at=3) == all_of_them


def test_the_encoder_sees_both_sides_but_no_padding():
    source = torch.tensor([[1, 2, 3, PAD]])
    before = model().encode(source, source == PAD)
    for place, seen in ((0, True), (2, True), (3, False)):
        after = model().encode(source.index_fill(1, torch.tensor([place]), 9), source == PAD)
        assert (not torch.equal(after[:, 1], before[:, 1])) == seen


def test_padding_is_as_if_it_were_not_there():
    source, padding = torch.tensor([[1, 2, 3, 4, PAD, PAD]]), torch.arange(6)[None] >= 4
    written = shifted(source)
    short = model()(source[:, :4], padding[:, :4], written[:, :4])
    torch.testing.assert_close(model()(source, padding, written)[:, :4], short)


def test_places_are_told_apart():
    source = torch.tensor([[1, 2, 3, 4]])
    padding = source == PAD
    memory, swapped = model().encode(source, padding), model().encode(source[:, [1, 0, 2, 3]], padding)
    assert (memory[:, [1, 0, 2, 3]] - swapped).abs().max() > 0.1


def test_queries_are_the_output_of_the_first_sublayer():
    copier, written = model(), shifted(source_and_padding()[0])
    after = copier.queries(written)
    # what comes before the masked self-attention is another thing, and each token has a mean square of 1
    assert (after - copier.embed(written)).abs().max() > 0.1
    torch.testing.assert_close(after.square().mean(dim=-1), torch.ones(3, LONGEST))
    x = copier.embed(written)
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
    x = x + multi_head(x, x, *copier.decoder, heads=2, causal=True)
    torch.testing.assert_close(after, x / x.square().mean(dim=-1, keepdim=True).sqrt())


def test_alignment_is_what_the_decoder_weighs():
    copier, (source, padding) = model(), source_and_padding()
    weights = copier.alignment(source, padding)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, LONGEST))
    assert weights.masked_select(padding[:, None, None].expand_as(weights)).abs().max() == 0
    v = split_heads(copier.encode(source, padding), copier.cross[2], 2)
    out = F.linear((weights @ v).transpose(1, 2).flatten(2), copier.cross[3])
    x, memory = copier.queries(shifted(source)), copier.encode(source, padding)
    torch.testing.assert_close(out, copier.look_across(x, memory, padding))


def test_writing_alone_is_one_symbol_after_the_other():
    copier, (source, padding) = model(), source_and_padding()
    alone = write(copier, source, padding)
    assert alone.shape == source.shape
    given = copier(source, padding, shifted(alone)).argmax(dim=-1)
    assert torch.equal(alone, given)  # with its own words as input, the whole pass says the same


def test_padding_does_not_count():
    source = torch.tensor([[1, 2, PAD, PAD], [3, 4, 5, 6]])
    assert right(source, source) == 1
    assert right(torch.tensor([[1, 0, PAD, PAD], [3, 0, 0, 6]]), source) == 0.5


# What is learned: guessing is right in 1 of 16 and costs ln 16 = 2.77 nats. The bounds hold for each of 8 seeds tried.


def test_with_cross_attention_it_learns_to_copy():
    copier, losses = train(Copier, seed=3)
    assert losses[0] > 2.7
    assert losses[-1] < 0.1
    assert min(accuracy(copier, n=200)) > 0.97
    source, padding = source_and_padding(100)
    diagonal = copier.alignment(source, padding).diagonal(dim1=-2, dim2=-1).mean(dim=1)  # n t
    assert diagonal[~padding].mean() > 0.8


@pytest.mark.parametrize("kind", [WithoutCross, WithoutBoth])
def test_without_the_source_it_can_only_guess_or_peek(kind):
    blind, losses = train(kind, seed=3, steps=100)
    given, alone = accuracy(blind, n=200)
    assert 0.03 < alone < 0.11  # 1/16 within five standard errors of 1,200 symbols, and no more
    if kind is WithoutCross:
        assert 0.03 < given < 0.11
        assert abs(sum(losses[-20:]) / 20 - math.log(SYMBOLS)) < 0.05
    else:
        assert given > 0.9  # the next symbol stands in its own input


def test_without_the_mask_it_is_right_only_while_it_is_told():
    peeker, losses = train(WithoutMask, seed=3)
    given, alone = accuracy(peeker, n=200)
    assert losses[-1] < 0.1
    assert given > 0.97
    assert alone < 0.97


def test_training_repeats_and_seeds_differ():
    first, again, other = (train(Copier, seed=seed, steps=3)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_padding_has_no_part_in_the_loss():
    losses = train(Copier, seed=0, steps=1)[1]
    generator = torch.Generator().manual_seed(0)
    copier = Copier(generator)
    source, padding = texts(64, generator)
    logits = copier(source, padding, shifted(source))
    each = -logits.log_softmax(dim=-1).gather(-1, source.clamp(max=SYMBOLS - 1)[..., None])[..., 0]
    torch.testing.assert_close(torch.tensor(losses[0]), each[~padding].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_start_from_the_same_weights(kind):
    ours, theirs = model(kind).state_dict(), model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
