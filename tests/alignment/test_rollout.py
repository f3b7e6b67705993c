"""Rollouts: stored log-probabilities are those of the drawing, ends and masks, what a stale policy would give."""

import itertools
import math

import pytest
import torch

from minillm.alignment import tasks
from minillm.alignment.log_probs import response_mask
from minillm.alignment.ppo import clip_fraction, log_ratios
from minillm.alignment.rollout import Rollout, draw, greedy, pass_at_k, rescore, sample, shared_cache, states
from minillm.architecture.pretrained import load
from minillm.architecture.transformer import Cache, Config, Transformer

END, NEW = 0, 8
SHAPE = Config(vocabulary=7, width=16, layers=2, heads=4, kv_heads=2, head_size=8, hidden=24, context=16, tied=False)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def policy(seed=0):
    """A model in double precision with something to say: at its first weights all tokens are nearly equally likely."""
    torch.manual_seed(seed)
    model = Transformer(SHAPE).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(20)  # standard deviations of 0.4, in the outputs 0.2
    return model


MODEL = policy()
PROMPTS = torch.randint(1, 7, (5, 4), generator=seeded(1))


def rollout(model=MODEL, *, group=6, temperature=1.0, seed=0, prompts=PROMPTS):
    return sample(model, prompts, group=group, new_tokens=NEW, end=END, generator=seeded(seed), temperature=temperature)


# The ratio


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_stored_log_probs_equal_those_of_a_pass_over_the_whole_text(temperature):
    drawn = rollout(temperature=temperature)
    ids = torch.cat([drawn.prompts, drawn.tokens], dim=1)
    with torch.no_grad():
        distributions = (MODEL(ids)[:, 3:-1] / temperature).softmax(dim=-1)
    expected = distributions.gather(-1, drawn.tokens[..., None])[..., 0].log()
    torch.testing.assert_close(drawn.log_probs, expected.masked_fill(~drawn.mask, 0))
    torch.testing.assert_close(rescore(MODEL, drawn, temperature=temperature), expected)
    entropies = torch.distributions.Categorical(distributions).entropy()
    torch.testing.assert_close(drawn.entropies, entropies.masked_fill(~drawn.mask, 0))
    assert drawn.log_probs[drawn.mask].std() > 0.1  # not all the same


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_1_before_the_first_update(temperature):
    drawn = rollout(temperature=temperature)
    now = rescore(MODEL, drawn, temperature=temperature)
    ratio = log_ratios(now, drawn.log_probs, drawn.mask).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    advantages = torch.where(torch.rand(ratio.shape, generator=seeded(2)) < 0.5, 1.0, -1.0).double()
    assert clip_fraction(now, drawn.log_probs, advantages, drawn.mask) == 0


def test_a_stale_policy_and_another_temperature_have_another_ratio():
    # the stale copy: what a model that lags behind the one that sampled says of the same tokens
    drawn = rollout(temperature=0.7)
    stale = policy()
    with torch.no_grad():
        for weight in stale.parameters():
            weight.add_(0.05 * weight.std(correction=0) * torch.randn(weight.shape, generator=seeded(3)))
    for log_probs in (rescore(stale, drawn, temperature=0.7), rescore(MODEL, drawn)):
        ratio = log_ratios(log_probs.detach(), drawn.log_probs, drawn.mask).exp()[drawn.mask]
        assert ((ratio - 1).abs() > 1e-3).double().mean() > 0.9


def test_importance_weights_are_right_in_the_mean():
    # the mean of policy / old over what old wrote is 1 for every policy: the weights sum to the other's probability
    other = policy(seed=5)
    drawn = rollout(temperature=2.0, group=2000)
    ratio = (rescore(other, drawn, temperature=2.0) - drawn.log_probs).detach().exp()[:, 0]
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_that_are_stored(temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).double()
    drawn = draw(logits.expand(20_000, 4), temperature=temperature, generator=seeded(0))
    p = (logits[0] / temperature).softmax(0)
    shares = drawn.tokens.bincount(minlength=4) / 20_000
    assert ((shares - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()
    torch.testing.assert_close(drawn.log_probs, p.log()[drawn.tokens])


def test_low_precision_is_drawn_and_stored_in_float32():
    drawn = draw(torch.zeros(3, 4).bfloat16(), temperature=1.0, generator=seeded(0))
    assert drawn.log_probs.dtype == torch.float32
    torch.testing.assert_close(drawn.log_probs, torch.full((3,), -math.log(4)))


# Ends and masks


def test_masks_end_with_the_first_end():
    drawn = rollout(group=40)
    lengths = set()
    for tokens, mask in zip(drawn.tokens.tolist(), drawn.mask.tolist(), strict=True):
        length = tokens.index(END) + 1 if END in tokens else NEW
        assert mask == [True] * length + [False] * (NEW - length)
        assert tokens[length:] == [END] * (NEW - length)
        lengths.add(length)
    assert {1, 2, 3, NEW} <= lengths  # all cases are there
    for numbers in (drawn.log_probs, drawn.entropies):
        assert (numbers[~drawn.mask] == 0).all()
        assert (numbers[drawn.mask] != 0).all()


def test_a_completion_without_end_is_all_mask():
    drawn = sample(MODEL, PROMPTS, group=2, new_tokens=NEW, end=99, generator=seeded(0))
    assert drawn.mask.all()


def test_stops_when_all_have_ended():
    sure = policy()
    passes = []
    original = sure.hidden
    sure.hidden = lambda *args, **more: passes.append(1) or original(*args, **more)
    with torch.no_grad():
        sure.norm.zero_()  # all logits are 0 then: 7 equally likely tokens
    sample(sure, PROMPTS, group=1, new_tokens=NEW, end=99, generator=seeded(0))
    assert len(passes) == NEW  # the prompt, and every token but the last
    passes.clear()
    drawn = sample(sure, PROMPTS[:1], group=1, new_tokens=NEW, end=END, generator=seeded(0))
    assert len(passes) == drawn.mask.sum()


def test_completions_of_a_prompt_follow_each_other_and_differ():
    drawn = rollout()
    assert drawn.prompts.view(5, 6, 4).equal(PROMPTS[:, None].expand(-1, 6, -1))
    assert all(len(group.unique(dim=0)) > 1 for group in drawn.tokens.view(5, 6, NEW))
    part = drawn.part(torch.tensor([7, 2]))
    assert all(x.equal(y[[7, 2]]) for x, y in zip(part, drawn, strict=True))


def test_the_copied_cache_is_that_of_each_completion_reading_the_prompt_itself():
    few, many = Cache(SHAPE, 5, 4, like=MODEL.embedding), Cache(SHAPE, 15, 4, like=MODEL.embedding)
    with torch.no_grad():
        MODEL.hidden(PROMPTS, cache=few)
        MODEL.hidden(PROMPTS.repeat_interleave(3, 0), cache=many)
    wide = shared_cache(few, MODEL, 3, 2)
    assert wide.length == 4
    assert wide.k.shape[3] == 6  # tokens
    torch.testing.assert_close(wide.k[..., :4, :], many.k)
    torch.testing.assert_close(wide.v[..., :4, :], many.v)


def test_the_prompt_is_read_once_for_its_group():
    read = []
    model = policy()
    original = model.hidden
    model.hidden = lambda ids, **more: read.append(tuple(ids.shape)) or original(ids, **more)
    sample(model, PROMPTS, group=6, new_tokens=3, end=99, generator=seeded(0))
    assert read == [(5, 4), (30, 1), (30, 1)]


def test_a_seed_gives_the_same_and_another_seed_something_else():
    assert all(x.equal(y) for x, y in zip(rollout(seed=3), rollout(seed=3), strict=True))
    assert not rollout(seed=3).tokens.equal(rollout(seed=4).tokens)


def test_no_gradient_in_a_rollout_and_one_in_scores():
    assert not any(x.requires_grad for x in rollout())
    assert rescore(MODEL, rollout()).requires_grad


def test_states_are_those_before_each_token():
    drawn = rollout()
    with torch.no_grad():
        before = MODEL.hidden(torch.cat([drawn.prompts, drawn.tokens], dim=1))[:, 3:11]
    torch.testing.assert_close(states(MODEL, drawn), before)


# Greedy


def test_greedy_equals_a_loop_without_cache():
    tokens = greedy(MODEL, PROMPTS, new_tokens=NEW, end=3)
    for prompt, row in zip(PROMPTS.tolist(), tokens.tolist(), strict=True):
        ids = list(prompt)
        while len(ids) < 4 + NEW and 3 not in ids[4:]:
            with torch.no_grad():
                ids.append(MODEL(torch.tensor([ids]))[0, -1].argmax().item())
        assert row == (ids[4:] + [3] * NEW)[:NEW]
    ended = (tokens == 3).any(dim=1)
    assert ended.any()


def test_sampling_at_a_low_temperature_is_greedy():
    drawn = rollout(temperature=1e-3, group=2)
    assert drawn.tokens.equal(greedy(MODEL, PROMPTS, new_tokens=NEW, end=END).repeat_interleave(2, 0))


# Production


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tasks.START, dtype=torch.float32).eval()


ENDS = {"max_new_tokens": tasks.NEW_TOKENS, "eos_token_id": tasks.END, "pad_token_id": tasks.END}


def test_greedy_equals_transformers_generate(theirs):
    prompts = tasks.split().held_out[:50]
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **ENDS)[:, 6:]
    ours = greedy(load(tasks.START), prompts, new_tokens=tasks.NEW_TOKENS, end=tasks.END)
    assert ours[:, : expected.shape[1]].equal(expected)
    assert (ours[:, expected.shape[1] :] == tasks.END).all()


def test_scores_equal_those_with_which_transformers_sampled(theirs):
    prompts = tasks.split().held_out[:50]
    torch.manual_seed(0)
    made = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        temperature=1.3,
        top_k=0,
        output_scores=True,
        return_dict_in_generate=True,
        **ENDS,
    )
    expected = theirs.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    tokens = made.sequences[:, 6:]
    mask = response_mask(made.sequences, torch.full((50,), 6), end=tasks.END)[:, 6:]
    rollout = Rollout(prompts, tokens, mask, expected, torch.zeros_like(expected))
    ours = rescore(load(tasks.START), rollout, temperature=1.3)
    torch.testing.assert_close(ours[mask], expected[mask], atol=1e-4, rtol=1e-4)  # float32, with a cache and without


# pass@k


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_equals_trying_all_choices(k):
    right = torch.rand(20, 5, generator=seeded(0)) < 0.3
    tries = [any(row[i] for i in chosen) for row in right.tolist() for chosen in itertools.combinations(range(5), k)]
    assert pass_at_k(right, k) == pytest.approx(sum(tries) / len(tries))


def test_pass_at_k_is_the_share_of_right_ones_for_1_and_of_solved_prompts_for_all():
    right = torch.rand(50, 8, generator=seeded(1)) < 0.1
    assert pass_at_k(right, 1) == pytest.approx(right.double().mean().item())
    assert pass_at_k(right, 8) == pytest.approx(right.any(dim=1).double().mean().item())


# Refusals


def test_refuses_nothing_to_write():
    for group, new_tokens in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match=f"at least 1 completion of 1 token, got {group} of {new_tokens}"):
            sample(MODEL, PROMPTS, group=group, new_tokens=new_tokens, end=END, generator=seeded(0))


def test_refuses_greedy_by_temperature():
    with pytest.raises(ValueError, match="a temperature is greater than 0, got 0"):
        rollout(temperature=0.0)


def test_refuses_more_tries_than_there_are():
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is from 1 to the 5 completions of each prompt, got {k}"):
            pass_at_k(torch.ones(2, 5, dtype=torch.bool), k)
