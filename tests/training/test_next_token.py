"""Shifts and masks that teach the wrong thing: what a small model then generates, and what gives it away."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.training.next_token import (
    LETTERS,
    SYMBOLS,
    alphabets,
    both_ways,
    greedy_text,
    influence,
    noise,
    numbered,
    pieces,
    shifted_loss,
    small_model,
    spelt,
    train,
)
from minillm.training.objective import next_token_loss, prefix_lm_mask

V = len(SYMBOLS)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The loss under a shift


def test_shift_1_is_the_loss_of_the_next_token():
    logits, ids = randn(3, 7, 11), torch.randint(11, (3, 7), generator=generator())
    torch.testing.assert_close(shifted_loss(logits, ids, 1), next_token_loss(logits, ids))


@pytest.mark.parametrize("shift", [0, 1, 2, 6])
def test_logits_are_judged_by_the_token_shift_places_on(shift):
    # position by position: the mean of -log p(token i + shift | logits i) over the positions that have one
    logits, ids = randn(2, 7, 5), torch.randint(5, (2, 7), generator=generator())
    log_p = logits.log_softmax(dim=-1)
    each = [-log_p[b, i, ids[b, i + shift]] for b in range(2) for i in range(7 - shift)]
    torch.testing.assert_close(shifted_loss(logits, ids, shift), torch.stack(each).mean())


def test_shift_0_equals_transformers_masked_lm_loss():
    from transformers.loss.loss_utils import ForMaskedLMLoss

    logits, ids = randn(2, 7, 5).float(), torch.randint(5, (2, 7), generator=generator())
    torch.testing.assert_close(shifted_loss(logits, ids, 0), ForMaskedLMLoss(logits, ids, vocab_size=5))


# The texts


def test_alphabets_go_on_after_z():
    ids = alphabets(400, 30, generator=generator())
    assert ids.shape == (400, 30)
    assert ids[:, 0].unique().tolist() == list(range(26))  # one is missing with a chance of 26 (25/26)^400 = 4e-6
    assert ((ids[:, 1:] - ids[:, :-1]) % 26 == 1).all()
    assert torch.equal(ids, alphabets(400, 30, generator=generator()))


def test_noise_is_every_letter_alike_whatever_came_before():
    ids = noise(400, 100, generator=generator())
    pairs = torch.bincount((ids[:, :-1] * 26 + ids[:, 1:]).flatten(), minlength=676)
    # 39,600 pairs, 58.6 of each kind: a deviation of 6 sd of 7.6 in one of 676 has a chance of 1e-6
    assert ((pairs - 39600 / 676).abs() < 6 * math.sqrt(39600 / 676)).all()


def test_pieces_are_the_text_in_small_letters():
    text = "It is--a Truth!\n\nNo. 7"
    plain = "it is a truth no"
    found = {spelt(row) for row in pieces(text)(500, 5, generator=generator())}
    assert found == {plain[i : i + 5] for i in range(len(plain) - 4)}
    assert spelt(pieces(text)(1, len(plain), generator=generator())[0]) == plain


def test_letters_and_numbers():
    assert spelt(torch.tensor([0, 25, 26, 1])) == "az b"
    assert numbered("az b").tolist() == [0, 25, 26, 1]


# Generation


class Counts(torch.nn.Module):
    """Says the number of tokens it has read, at its last place; elsewhere a wrong one."""

    def forward(self, ids, *, visible=None):
        says = torch.zeros(1, ids.shape[1], V)
        says[0, :, 26] = 1.0
        says[0, -1, ids.shape[1]] = 2.0
        self.visible = visible
        return says


def test_each_new_token_is_read_with_the_whole_text():
    model = Counts()
    assert greedy_text(model, torch.tensor([9, 9, 9]), 4).tolist() == [3, 4, 5, 6]
    assert model.visible is None
    assert greedy_text(model, torch.tensor([9]), 2, mask=both_ways).tolist() == [1, 2]
    assert model.visible.shape == (1, 2, 2)


# Who depends on whom


def model(seed=0):
    network = small_model(seed=seed, layers=2).double()
    for weight in network.parameters():  # at the start the blocks add next to nothing
        torch.nn.init.normal_(weight, std=0.3, generator=generator(seed))
    return network


def test_influence_by_hand():
    # logits: one-hot of the token, plus the token before it times 10
    def read(ids, visible=None):
        says = F.one_hot(ids, 4).double()
        says[:, 1:] += 10 * F.one_hot(ids[:, :-1], 4)
        return says

    assert influence(read, torch.tensor([3, 1, 2])).tolist() == [[1, 0, 0], [10, 1, 0], [0, 10, 1]]


def test_a_causal_model_depends_on_nothing_later():
    ids = noise(1, 9, generator=generator())[0]
    moved = influence(model(), ids)
    assert (moved.triu(1) == 0).all()
    assert (moved[torch.ones(9, 9, dtype=torch.bool).tril()] > 0).all()


def test_without_a_mask_everything_depends_on_everything():
    ids = noise(1, 9, generator=generator())[0]
    assert (influence(model(), ids, visible=both_ways(ids[None])) > 0).all()


def test_a_prefix_is_seen_both_ways_and_the_rest_is_not():
    # in two layers nothing gets from a later token to an earlier one outside of the prefix either
    ids, visible = noise(1, 9, generator=generator())[0], prefix_lm_mask(torch.tensor([4]), 9)
    moved = influence(model(), ids, visible=visible)
    assert torch.equal(moved > 0, visible[0])


# What is learnt


@pytest.mark.parametrize(("shift", "says"), [(0, "ccc"), (1, "def"), (2, "egi")])
def test_what_a_shift_teaches(shift, says):
    # 5 seeds of 100 steps: losses below 0.005, true next-token losses of 0.00 or above 9 nats
    network, losses = train(alphabets, shift=shift)
    assert losses[0] > 1  # an untrained guess is about log 27 = 3.3; the tied head starts out with a copy, 2.2
    assert losses[-1] < 0.05
    assert spelt(greedy_text(network, numbered("abc"), 3)) == says
    with torch.no_grad():
        ids = alphabets(32, 16, generator=generator(99))
        true = next_token_loss(network(ids), ids).item()
    assert true < 0.05 if shift == 1 else true > 4


def test_noise_can_not_be_learnt_and_a_leak_makes_it_look_as_if():
    # 5 seeds: 3.26 with the causal mask, 0.000 without
    honest, leaked = (train(noise, mask=mask, steps=200)[1] for mask in (None, both_ways))
    assert honest[-1] > math.log(LETTERS) - 0.05  # 512 letters a batch: their loss varies by less than 0.02
    assert leaked[-1] < 0.1


def test_the_same_seed_gives_the_same_model():
    one, other, third = (train(noise, steps=3, seed=seed) for seed in (1, 1, 2))
    assert one[1] == other[1] != third[1]
    assert torch.equal(one[0].embedding, other[0].embedding)
    assert train(alphabets, steps=1, length=3)[1] != train(alphabets, steps=1, length=9)[1]


@pytest.mark.parametrize("shift", [-1, 7])
def test_refuses_shifts_out_of_the_text(shift):
    with pytest.raises(ValueError, match=rf"0 to 6 for texts of 7 tokens, got {shift}"):
        shifted_loss(randn(2, 7, 5), torch.zeros(2, 7, dtype=torch.int64), shift)
