"""Listing facts: what an answer is worth, what people show, and how they compare."""

import math

import pytest
import torch

from minillm.alignment.fact_lists import ASK, END, FACTS, ROOM, STOP, compare, gold, people, random_answers
from minillm.alignment.rollout import Rollout


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def row(*facts):
    """An answer with its end, padded to ROOM."""
    tokens = torch.tensor([[*facts, *[END] * (ROOM - len(facts))]])
    mask = torch.arange(ROOM)[None] <= len(facts)
    return Rollout(torch.tensor([[ASK]]), tokens, mask, torch.zeros(1, ROOM), torch.zeros(1, ROOM))


def stack(*rollouts):
    return Rollout(*(torch.cat(several) for several in zip(*rollouts, strict=True)))


# The gold


@pytest.mark.parametrize(
    ("facts", "worth"), [((4,), 1), ((4, 7, 9), 3), ((4, 4), 0), ((4, 4, 4), -1), ((19, 0, 19, 3), 2), ((), 0)]
)
def test_gold_by_hand(facts, worth):
    answer = row(*facts)
    assert gold(answer.tokens, answer.mask).tolist() == [worth]


def test_gold_does_not_read_what_stands_outside_of_the_mask():
    answer = row(1, 2)
    tokens = answer.tokens.clone()
    tokens[0, 3:] = 5
    assert gold(tokens, answer.mask).tolist() == [2]


def test_gold_is_made_of_different_answers_at_once():
    answers = stack(row(1, 2), row(3, 3), row(5))
    assert gold(answers.tokens, answers.mask).tolist() == [2, 0, 1]


def test_a_token_that_is_no_fact_is_worth_nothing():
    answer = row(1, ASK, ASK, 2)  # a model may write the question
    assert gold(answer.tokens, answer.mask).tolist() == [2]


# People


def test_people_write_one_fact_at_least_and_stop():
    shown = people(2000, generator=seeded())
    assert shown.tokens.shape == shown.mask.shape == (2000, ROOM)
    assert shown.prompts.eq(ASK).all()
    assert (shown.tokens[:, 0] < FACTS).all()
    assert (shown.tokens[~shown.mask] == END).all()
    length = shown.mask.sum(1)
    inside = torch.arange(ROOM) < length[:, None] - 1
    assert (shown.tokens[inside] < FACTS).all()
    ended = length < ROOM
    assert (shown.tokens.gather(1, length[:, None] - 1)[ended] == END).all()
    # facts: 1 + (1 - STOP) / STOP = 4, and the end; 2,000 of standard deviation 3.5: 0.08
    assert length.float().mean().item() == pytest.approx(5, abs=0.3)


def test_log_probs_of_people_are_those_they_draw_with():
    shown = people(500, generator=seeded())
    for i in range(20):
        expected = [-math.log(FACTS)]
        written = shown.tokens[i][shown.mask[i]].tolist()
        expected += [math.log(STOP) if t == END else math.log((1 - STOP) / FACTS) for t in written[1:]]
        torch.testing.assert_close(shown.log_probs[i][shown.mask[i]], torch.tensor(expected))
    assert not shown.log_probs[~shown.mask].any()
    assert not shown.entropies[~shown.mask].any()
    inner = torch.tensor([STOP] + [(1 - STOP) / FACTS] * FACTS)
    assert shown.entropies[0, 1].item() == pytest.approx(-(inner * inner.log()).sum().item(), rel=1e-5)


# Answers of a length


def test_random_answers_have_so_many_facts_and_an_end():
    answers = random_answers(3000, 5, generator=seeded())
    assert (answers.tokens[:, :5] < FACTS).all()
    assert (answers.tokens[:, 5:] == END).all()
    assert answers.mask.sum(1).eq(6).all()
    assert answers.mask[:, :6].all()
    # 20 (1 - 0.95^5) = 4.52 different facts in the mean, so 2 x 4.52 - 5; standard deviation of the mean 0.025
    assert gold(answers.tokens, answers.mask).mean().item() == pytest.approx(4.05, abs=0.1)


@pytest.mark.parametrize("facts", [0, ROOM])
def test_refuses_answers_without_facts_or_end(facts):
    with pytest.raises(ValueError, match=f"room for 1 to 31 facts and an end, got {facts}"):
        random_answers(3, facts, generator=seeded())


# Comparisons


def test_people_compare_by_bradley_and_terry():
    good, bad = row(1, 2, 3), row(1, 2, 2)  # gold 3 and 1
    first = Rollout(*(x.expand(10000, -1) for x in good))
    second = Rollout(*(x.expand(10000, -1) for x in bad))
    for one, other in ((first, second), (second, first)):
        chosen, rejected = compare(one, other, generator=seeded(1))
        share = gold(chosen.tokens, chosen.mask).eq(3).float().mean().item()
        assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.015)  # standard deviation 0.003
        assert (gold(chosen.tokens, chosen.mask) + gold(rejected.tokens, rejected.mask)).eq(4).all()


def test_a_comparison_keeps_its_two_answers_together():
    first, second = (people(50, generator=seeded(s)) for s in (1, 2))
    chosen, rejected = compare(first, second, generator=seeded(3))
    swapped = (chosen.tokens != first.tokens).any(1)
    assert 0 < swapped.sum() < 50
    torch.testing.assert_close(torch.where(swapped[:, None], rejected.tokens, chosen.tokens), first.tokens)
    torch.testing.assert_close(torch.where(swapped[:, None], chosen.log_probs, rejected.log_probs), second.log_probs)
