"""Sorting digits: the reward is exact, and no answer of a held-out prompt is trained on."""

import pytest
import torch

from minillm.alignment import tasks
from minillm.alignment.tasks import END, EQUALS, NEW_TOKENS, answers, encode, rewards, text

PROMPT = encode("31415=")


@pytest.fixture(scope="module")
def split():
    return tasks.split()


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("11345.", 1.0),
        ("11345..", 1.0),
        ("11345.7", 1.0),  # nobody reads on after the end
        ("113455.", 0.0),
        ("11345=.", 0.0),
        ("113455", 0.0),  # no end
        ("1134...", 0.0),
        ("13145..", 0.0),
        ("31415..", 0.0),
        ("11346..", 0.0),
        (".......", 0.0),
        ("1345...", 0.0),  # a digit that stands twice is wanted twice
    ],
)
def test_the_reward_of_a_completion(completion, reward):
    assert rewards(PROMPT, encode(completion)).tolist() == [reward]


def test_every_answer_equals_sorting_in_python_and_has_reward_1(split):
    for prompts in (split.shown, split.train[:2000], split.held_out):
        right = answers(prompts)
        assert right.tolist() == [[*sorted(row[:-1]), END] for row in prompts.tolist()]
        assert (rewards(prompts, right) == 1).all()


def test_any_one_wrong_token_costs_the_whole_reward(split):
    prompts = split.held_out[:50]
    for place in range(6):
        wrong = answers(prompts)
        wrong[:, place] = (wrong[:, place] + 1 + place) % len(tasks.SYMBOLS)
        assert (rewards(prompts, wrong) == 0).all()


def test_a_completion_is_judged_by_its_own_prompt():
    prompts = torch.cat([PROMPT, encode("54321=")])
    right = answers(prompts)
    assert rewards(prompts, right).tolist() == [1, 1]
    assert rewards(prompts, right.flip(0)).tolist() == [0, 0]


def test_there_is_room_for_being_too_long():
    assert answers(PROMPT).shape[1] < NEW_TOKENS


def test_no_rearrangement_of_a_held_out_prompt_is_trained_on(split):
    seen = {tuple(row) for part in (split.shown, split.train) for row in answers(part).tolist()}
    held_out = {tuple(row) for row in answers(split.held_out).tolist()}
    assert not seen & held_out
    # of 2,002 answers about 1 in 7
    assert len(seen) + len(held_out) <= 2002
    assert len(held_out) > 200


def test_the_parts_are_different_prompts_of_the_right_number(split):
    rows = torch.cat(split)
    assert len(rows.unique(dim=0)) == len(rows)
    assert len(split.shown) == 100
    assert len(split.held_out) == 1000
    assert len(split.train) > 80_000
    assert (rows[:, -1] == EQUALS).all()
    assert rows[:, :-1].min() == 0
    assert rows[:, :-1].max() == 9


def test_the_parts_are_mixed(split):
    # as in all 100,000 numbers: the mean digit is 4.5 at every place; standard error 2.87 / sqrt(1000) = 0.09
    for part in (split.train, split.held_out):
        means = part[:1000, :-1].double().mean(dim=0)
        assert ((means - 4.5).abs() < 0.5).all()
    assert all(x.equal(y) for x, y in zip(split, tasks.split(), strict=True))  # the same every time


def test_text_and_back():
    assert text(encode("0123456789=.")[0]) == "0123456789=."
    assert encode("0123456789=.").tolist() == [list(range(12))]


def test_refuses_what_is_no_prompt():
    for bad in ("3141=", "314159", "314159="):
        with pytest.raises(ValueError, match="a prompt is 5 digits and the id 10 of '='"):
            answers(encode(bad))


def test_refuses_completions_without_room():
    with pytest.raises(ValueError, match=r"each of 1 prompts needs a completion with room for 6 tokens, got \(1, 5\)"):
        rewards(PROMPT, encode("11345"))
    with pytest.raises(ValueError, match=r"each of 1 prompts needs a completion with room for 6 tokens, got \(2, 6\)"):
        rewards(PROMPT, encode("11345.").expand(2, -1))


def test_refuses_other_symbols():
    with pytest.raises(ValueError, match=r"the task is written in 0123456789=\., got 'a'"):
        encode("12a")
