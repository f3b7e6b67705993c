"""RLHF from end to end in the toy: the three stages, each by itself."""

import copy

import pytest
import torch

from minillm.alignment import rlhf
from minillm.alignment.fact_lists import ASK, END, FACTS, ROOM, gold, people
from minillm.alignment.reward_model import ranking
from minillm.alignment.rlhf import SHAPE, RewardModel, climb, divergences, fit, supervised, write
from minillm.alignment.rollout import Rollout, rescore
from minillm.architecture.transformer import Transformer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(seed=0):
    torch.manual_seed(seed)
    made = Transformer(SHAPE)
    with torch.no_grad():
        made.embedding.mul_(4)  # so that probabilities differ
    return made


def scorer(seed=0):
    made = RewardModel(fresh(seed)).requires_grad_(False)
    made.head.normal_(generator=seeded(seed))
    return made


def row(*facts):
    """An answer with its end, padded to ROOM."""
    tokens = torch.tensor([[*facts, *[END] * (ROOM - len(facts))]])
    mask = torch.arange(ROOM)[None] <= len(facts)
    return Rollout(torch.tensor([[ASK]]), tokens, mask, torch.zeros(1, ROOM), torch.zeros(1, ROOM))


def stack(*rollouts):
    return Rollout(*(torch.cat(several) for several in zip(*rollouts, strict=True)))


# The reward model


def test_a_score_is_read_at_the_last_token_of_the_answer():
    model, answers = scorer(), stack(row(1, 2, 3), row(4))
    for i, facts in enumerate(([1, 2, 3], [4])):
        ids = torch.tensor([[ASK, *facts, END]])
        expected = model.body.hidden(ids)[0, -1] @ model.head
        torch.testing.assert_close(model(answers)[i], expected)


def test_standardised_scores_have_mean_0_and_deviation_1():
    model, answers = scorer(), write(fresh(1), 200, generator=seeded())
    before = model(answers)
    model.standardise(answers)
    assert model(answers).mean().abs() < 1e-4
    assert model(answers).std().item() == pytest.approx(1, abs=1e-4)
    assert torch.corrcoef(torch.stack([before, model(answers)]))[0, 1] > 0.9999  # the order is kept


def test_the_reward_model_is_a_copy_of_the_start():
    start = fresh()
    before = copy.deepcopy(start.state_dict())
    pairs = [people(64, generator=seeded(s)) for s in (1, 2)]
    model = fit(start, *pairs, steps=2, batch=16, generator=seeded())
    assert all(torch.equal(x, before[name]) for name, x in start.state_dict().items())
    assert not torch.equal(model.body.embedding, start.embedding)
    assert not any(p.requires_grad for p in model.parameters())


def test_fitting_learns_which_is_preferred():
    # the chosen have 3 facts, the rejected 1: a model of 30 steps sees it on new ones
    generator = seeded()

    def draw(count):
        facts = [torch.randperm(FACTS, generator=generator)[:3].tolist() for _ in range(count)]
        return stack(*(row(*f) for f in facts)), stack(*(row(f[0]) for f in facts))

    model = fit(fresh(), *draw(200), steps=30, batch=32, generator=generator)
    chosen, rejected = draw(100)
    assert ranking(model(chosen), model(rejected)).accuracy > 0.95


# The policy


def test_divergences_of_whole_answers_by_a_loop():
    policy, start = fresh(0), fresh(1)
    answers = write(policy, 5, generator=seeded())
    for i, away in enumerate(divergences(start, answers).tolist()):
        written = answers.tokens[i][answers.mask[i]]
        ids = torch.cat([torch.tensor([ASK]), written])[None]
        log_p, log_q = (model(ids)[0, :-1].log_softmax(-1) for model in (policy, start))
        each = (log_p - log_q).gather(1, written[:, None])
        assert away == pytest.approx(each.sum().item(), abs=1e-3)  # step by step against at once


def test_one_step_is_reinforce_with_the_score_minus_the_kl(monkeypatch):
    start, policy, reward, seen = fresh(1), fresh(0), scorer(2), []
    monkeypatch.setattr(rlhf, "policy_loss", lambda *a, **k: seen.append(a) or a[0].sum() * 0)
    climb(policy, reward, start, beta=0.3, steps=1, batch=16, parts=1, generator=seeded())
    (now, old, advantages, mask), answers = seen[0], write(fresh(0), 16, generator=seeded())
    torch.testing.assert_close(now, rescore(policy, answers)[old_order(old, answers)])
    goal = reward(answers) - 0.3 * divergences(start, answers)
    expected = ((goal - goal.mean()) / (goal.std() + 1e-4))[old_order(old, answers)]
    torch.testing.assert_close(advantages, expected[:, None].expand_as(mask), rtol=1e-3, atol=1e-3)
    assert mask.equal(answers.mask[old_order(old, answers)])


def old_order(log_probs, answers):
    """For each row, its place in the answers."""
    return torch.cdist(log_probs, answers.log_probs, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


def test_a_curve_holds_what_the_policy_wrote_before_it_moved():
    start, reward = fresh(1), scorer(2)
    curve = climb(fresh(0), reward, start, beta=0.1, steps=2, batch=16, generator=seeded())
    answers = write(fresh(0), 16, generator=seeded())
    assert all(len(x) == 2 for x in curve)
    assert curve.gold[0].item() == pytest.approx(gold(answers.tokens, answers.mask).mean().item(), rel=1e-5)
    assert curve.proxy[0].item() == pytest.approx(reward(answers).mean().item(), rel=1e-3)
    assert curve.kl[0].item() == pytest.approx(divergences(start, answers).mean().item(), rel=1e-3)
    assert curve.length[0].item() == pytest.approx(answers.mask.sum(1).float().mean().item(), rel=1e-5)


def test_only_the_policy_learns():
    start, policy, reward = fresh(1), fresh(0), scorer(2)
    before = [copy.deepcopy(m.state_dict()) for m in (start, reward, policy)]
    climb(policy, reward, start, beta=0.1, steps=1, batch=16, generator=seeded())
    models = zip((start, reward, policy), before, strict=True)
    same = [[torch.equal(x, old[name]) for name, x in model.state_dict().items()] for model, old in models]
    assert all(same[0])
    assert all(same[1])
    assert not all(same[2])


# The first stage


def test_gradients_of_the_policy_are_cut_to_norm_1(monkeypatch):
    norms = []

    class Watched(torch.optim.Adam):
        def step(self):
            gradients = [weight.grad.flatten() for group in self.param_groups for weight in group["params"]]
            norms.append(torch.cat(gradients).norm())
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr(rlhf, "policy_loss", lambda now, *rest: 1000 * now.sum())
    climb(fresh(0), scorer(2), fresh(1), beta=0.0, steps=2, batch=8, parts=2, generator=seeded())
    torch.testing.assert_close(torch.stack(norms), torch.ones(4))


def test_a_policy_is_a_copy_and_the_stages_stay(monkeypatch):
    def climb(policy, *rest, **options):
        policy.embedding.data.add_(1)
        return rlhf.Curve(*torch.zeros(4, 1))

    monkeypatch.setattr(rlhf, "climb", climb)
    answers = write(fresh(1), 4, generator=seeded())
    stages = rlhf.Stages(fresh(1).requires_grad_(False), scorer(), answers, answers)
    policy, _ = rlhf.optimise(stages, beta=0.1)
    assert stages.start.embedding.equal(fresh(1).embedding)
    assert not any(weight.requires_grad for weight in stages.start.parameters())
    assert all(weight.requires_grad for weight in policy.parameters())


def test_held_out_pairs_are_not_those_that_were_fitted(monkeypatch):
    compared, fitted = [], []
    compare, seeds = rlhf.compare, []
    monkeypatch.setattr(rlhf, "supervised", lambda *, generator: seeds.append(generator.initial_seed()) or fresh(1))
    monkeypatch.setattr(rlhf, "compare", lambda *a, **k: compared.append(compare(*a, **k)) or compared[-1])
    monkeypatch.setattr(rlhf, "fit", lambda start, *pairs, generator: fitted.append(pairs) or scorer())
    stages = rlhf.prepare(pairs=30, held_out=20, seed=7)
    assert seeds == [7]
    for all_of_them, train, rest in zip(compared[0], fitted[0], (stages.chosen, stages.rejected), strict=True):
        assert (len(all_of_them.tokens), len(train.tokens), len(rest.tokens)) == (50, 30, 20)
        assert torch.cat([train.tokens, rest.tokens]).equal(all_of_them.tokens)


def test_supervised_training_counts_what_people_wrote_and_no_padding(monkeypatch):
    shown, masks, draw, mean = [], [], rlhf.people, rlhf.token_mean
    monkeypatch.setattr(rlhf, "people", lambda *a, **k: shown.append(draw(*a, **k)) or shown[-1])
    monkeypatch.setattr(rlhf, "token_mean", lambda values, mask: masks.append(mask) or mean(values, mask))
    supervised(steps=2, generator=seeded())
    assert len(masks) == 2
    assert all(mask.equal(answers.mask) for mask, answers in zip(masks, shown, strict=True))


def test_supervised_training_imitates_people():
    generator = seeded()
    state = torch.random.get_rng_state()
    start = supervised(steps=60, generator=generator)
    assert torch.random.get_rng_state().equal(state)
    again = supervised(steps=60, generator=seeded())
    assert again.embedding.equal(start.embedding)
    shown = people(500, generator=seeded(9))
    with torch.no_grad():
        ours = -(rescore(start, shown) * shown.mask).sum() / shown.mask.sum()
    least = -shown.log_probs.sum() / shown.mask.sum()
    # ln 22 = 3.09 without training; 60 steps come within 0.1 nats of the least there is
    assert least < ours < least + 0.1
    written = write(start, 500, generator=seeded(5))
    assert written.mask.sum(1).float().mean().item() == pytest.approx(5, abs=1)
