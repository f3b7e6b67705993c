"""DPO on a Transformer: the pairs that it writes, the rule, the loop, and what it moved."""

import copy

import pytest
import torch
import torch.nn.functional as F

from minillm.alignment.preference_tuning import (
    Pairs,
    divergence,
    first_end,
    openings,
    response_log_probs,
    shorten,
    shorter_first,
    tune,
    twins,
    write,
)
from minillm.architecture.transformer import Config, Transformer

ENDS = torch.arange(12) == 11


def model(seed=0):
    torch.manual_seed(seed)
    shape = Config(vocabulary=12, width=16, layers=2, heads=2, kv_heads=1, head_size=8, hidden=24, context=32)
    made = Transformer(shape)
    with torch.no_grad():
        made.embedding.mul_(20)  # so that probabilities differ
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def written(made, b=40, new_tokens=10, seed=0):
    prompts = torch.randint(0, 11, (b, 3), generator=seeded(seed))
    return write(made, prompts.repeat(2, 1), new_tokens=new_tokens, generator=seeded(seed)).unflatten(0, (2, b))


# Writing


def test_writing_keeps_the_prompts_and_equals_a_loop_without_cache():
    made, prompts = model(), torch.randint(0, 12, (5, 3), generator=seeded(1))
    out = write(made, prompts, new_tokens=6, generator=seeded(2))
    slow, generator = prompts, seeded(2)
    with torch.no_grad():
        for _ in range(6):
            drawn = torch.multinomial(made(slow)[:, -1].softmax(-1), 1, generator=generator)
            slow = torch.cat([slow, drawn], dim=1)
    assert out.equal(slow)


def test_tokens_are_drawn_by_their_probabilities():
    made, prompts = model(), torch.tensor([[1, 2, 3]])
    drawn = write(made, prompts.expand(20000, -1), new_tokens=1, generator=seeded())[:, -1]
    expected = made(prompts)[0, -1].softmax(-1)
    # a share of 20,000 draws has a standard deviation of 0.0035 at most
    assert (drawn.bincount(minlength=12) / 20000 - expected).abs().max() < 0.015


# The rule


def test_a_response_ends_with_its_first_end_token():
    ids = torch.tensor([[11, 1, 2, 11, 11, 3], [1, 2, 3, 4, 5, 6], [1, 2, 11, 4, 11, 6]])
    expected = [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]
    assert first_end(ids, ENDS, start=2).int().tolist() == expected


def test_several_tokens_may_end_a_response():
    ends = torch.tensor([False, True, True])
    assert first_end(torch.tensor([[0, 0, 2, 1], [0, 1, 2, 0]]), ends, start=1).sum(1).tolist() == [2, 1]


def test_the_shorter_one_is_chosen_and_ties_are_dropped():
    texts = torch.arange(24).view(2, 3, 4)
    mask = torch.tensor([[3, 2, 1], [1, 2, 3]])[..., None] > torch.arange(4)
    pairs = shorter_first(texts, mask)
    assert pairs.ids.tolist() == [[[12, 13, 14, 15], [8, 9, 10, 11]], [[0, 1, 2, 3], [20, 21, 22, 23]]]
    assert pairs.mask.sum(-1).tolist() == [[1, 1], [3, 3]]


def test_openings_stand_behind_the_end_of_a_sentence():
    ids = torch.tensor([1, 11, 2, 3, 4, 11, 5, 6, 11, 7])
    found = openings(ids, ENDS, length=2, count=2, generator=seeded())
    assert sorted(found.tolist()) == [[2, 3], [5, 6]]  # [7] is too short
    with pytest.raises(ValueError, match="3 openings are asked for, the text has 2"):
        openings(ids, ENDS, length=2, count=3, generator=seeded())


def test_twins_differ_in_the_last_token_only():
    made, prompts = model(), torch.randint(0, 11, (50, 3), generator=seeded(1))
    ids, mask = twins(made, prompts, new_tokens=4, generator=seeded(2))
    assert ids[0, :, :-1].equal(ids[1, :, :-1])
    assert (ids[0, :, -1] != ids[1, :, -1]).all()
    assert 3 <= ids.shape[1] <= 50
    assert mask.equal((torch.arange(7) >= 3).expand(2, ids.shape[1], 7))


# Tuning


def test_log_probs_are_those_of_the_next_token():
    made, texts = model(), written(model(), b=4)
    pairs = Pairs(texts, first_end(texts, ENDS, start=3))
    log_probs = response_log_probs(made, pairs)
    for side in (0, 1):
        for row in range(4):
            ids = texts[side, row]
            expected = -F.cross_entropy(made(ids[None])[0, :-1], ids[1:], reduction="none")
            torch.testing.assert_close(log_probs[side, row], expected, rtol=1e-4, atol=1e-5)  # batches round apart


def test_tuning_begins_at_ln_2_and_is_repeatable():
    texts = written(model())
    pairs = shorter_first(texts, first_end(texts, ENDS, start=3))
    records = [tune(model(), pairs, beta=0.5, lr=1e-2, steps=8, batch=8, generator=seeded(5)) for _ in range(2)]
    assert records[0].loss.equal(records[1].loss)
    assert records[0].loss.shape == records[0].chosen.shape == (8,)
    assert records[0].loss[0].item() == pytest.approx(0.6931, abs=1e-4)
    assert records[0].chosen[0].abs() < 1e-5  # rounding of two forward passes
    assert records[0].rejected[0].abs() < 1e-5


def test_one_step_equals_adam_on_the_formula():
    texts = written(model(), b=6)
    pairs = Pairs(texts, first_end(texts, ENDS, start=3))
    ours, theirs = model(), model()
    record = tune(ours, pairs, beta=0.3, lr=1e-3, steps=1, batch=6, generator=seeded())
    flat, mask = texts.flatten(0, 1), pairs.mask.flatten(0, 1)[:, 1:]
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    labels = flat[:, 1:].masked_fill(~mask, -100)
    logps = -F.cross_entropy(theirs(flat)[:, :-1].mT, labels, reduction="none").sum(1)
    ratio = logps - logps.detach()
    loss = -F.logsigmoid(0.3 * (ratio[:6] - ratio[6:])).mean()
    loss.backward()
    optimizer.step()
    assert record.loss[0].item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # Adam divides rounding by its own size


@pytest.mark.parametrize("seed", range(3))
def test_tuning_shifts_the_preference(seed):
    made = model(seed)
    texts = written(made, b=200, seed=seed)
    mask = first_end(texts, ENDS, start=3)
    tuned = copy.deepcopy(made)
    record = tune(tuned, shorter_first(texts, mask), beta=0.1, lr=1e-2, steps=40, batch=32, generator=seeded(seed + 10))
    assert record.loss[-5:].mean() < 0.5
    assert (record.chosen - record.rejected)[-5:].mean() > 5
    after = first_end(written(tuned, b=200, seed=seed + 20), ENDS, start=3)
    assert after.sum(-1).float().mean() < mask.sum(-1).float().mean() - 1.5
    assert [p.equal(q) for p, q in zip(made.parameters(), model(seed).parameters(), strict=True)].count(False) == 0


def test_shorten_measures_copies_and_repeats():
    made, prompts = model(), torch.randint(0, 11, (100, 3), generator=seeded(1))
    runs = [shorten(made, prompts, ENDS, lr=1e-2, steps=30, batch=32, new_tokens=10, seed=7) for _ in range(2)]
    assert runs[0].texts.equal(runs[1].texts)
    assert runs[0].before.shape == (200,)
    assert runs[0].after.equal(first_end(runs[0].texts, ENDS, start=3).sum(1))
    assert runs[0].after.float().mean() < runs[0].before.float().mean() - 1
    assert runs[0].kl > 0.2
    # what it tuned was a copy
    assert all(p.equal(q) for p, q in zip(made.parameters(), model().parameters(), strict=True))


# Divergence


def test_divergence_by_a_loop():
    policy, reference = model(0), model(1)
    texts = written(policy, b=5)[0]
    mask = first_end(texts, ENDS, start=3)
    total = 0.0
    for ids, kept in zip(texts, mask, strict=True):
        p, q = (m(ids[None])[0].log_softmax(-1).detach() for m in (policy, reference))
        total += sum(p[i - 1, ids[i]].item() - q[i - 1, ids[i]].item() for i in range(1, len(ids)) if kept[i])
    assert divergence(policy, reference, texts, mask) == pytest.approx(total / 5, rel=1e-4)
    assert divergence(policy, policy, texts, mask) == 0.0
