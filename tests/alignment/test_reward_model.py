"""The reward model: where the score is read, the loss of Bradley and Terry, and how well scores order pairs."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minillm.alignment.reward_model import bradley_terry_loss, last_real, preference, ranking, reward_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Where the score is read


@pytest.mark.parametrize("device", DEVICES)
def test_the_score_is_read_at_the_last_real_token_by_hand(device):
    values = torch.tensor([[1.0, 2, 3, 4], [5.0, 6, 7, 8], [9.0, 10, 11, 12], [13.0, 14, 15, 16]])
    real = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]]).bool()  # right, left, both, a hole
    assert last_real(values.to(device), real.to(device)).tolist() == [2, 8, 11, 15]


def test_only_the_last_real_token_gets_a_gradient():
    values = randn(2, 4).requires_grad_()
    last_real(values, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()).sum().backward()
    assert values.grad.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_padding_does_not_change_the_score():
    values, real = randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    wide = torch.full((3, 9), 77.0, dtype=torch.float64)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    wide[:, 2:7], mask[:, 2:7] = values, True
    torch.testing.assert_close(last_real(wide, mask), last_real(values, real))


def test_equals_transformers():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    ids = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10], [0, 0, 11, 12, 1]])
    with torch.no_grad():
        theirs = model(ids, attention_mask=(ids != 0).long()).logits.squeeze(-1)
        hidden = model.model(ids, attention_mask=(ids != 0).long()).last_hidden_state
        values = model.score(hidden).squeeze(-1)
    torch.testing.assert_close(last_real(values, ids != 0), theirs)


# The loss


def test_the_loss_by_hand():
    # differences ln 3 and -ln 3: probabilities 3/4 and 1/4, so the loss is (ln 4/3 + ln 4) / 2
    chosen, rejected = torch.tensor([math.log(3), 1.0]).double(), torch.tensor([0.0, 1 + math.log(3)]).double()
    torch.testing.assert_close(preference(chosen, rejected), torch.tensor([0.75, 0.25]).double())
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_equal_scores_cost_ln_2():
    assert bradley_terry_loss(randn(5), randn(5)).item() == pytest.approx(math.log(2))


def test_a_margin_is_what_the_difference_must_reach_to_cost_ln_2():
    chosen, margin = randn(5), randn(5, seed=1).abs()
    assert bradley_terry_loss(chosen, chosen - margin, margin=margin).item() == pytest.approx(math.log(2))
    assert bradley_terry_loss(chosen, chosen, margin=1.0).item() == pytest.approx(
        math.log1p(math.e)
    )  # -log sigmoid(-1)


def test_scores_have_no_zero():
    chosen, rejected, prompt = randn(6), randn(6, seed=1), 100 * randn(6, seed=2)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + prompt, rejected + prompt), bradley_terry_loss(chosen, rejected)
    )


def test_the_gradient_is_the_probability_of_the_wrong_order():
    chosen, rejected = randn(6).requires_grad_(), randn(6, seed=1).requires_grad_()
    bradley_terry_loss(chosen, rejected).backward()
    wrong = 1 / (1 + (chosen - rejected).detach().exp())
    torch.testing.assert_close(chosen.grad, -wrong / 6)
    torch.testing.assert_close(rejected.grad, wrong / 6)


@pytest.mark.parametrize("difference", [-1000.0, 1000.0])
def test_far_apart_scores_do_not_overflow(difference):
    loss = bradley_terry_loss(torch.tensor([difference]), torch.tensor([0.0]))
    assert loss.item() == max(0.0, -difference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop(seed, device):
    chosen, rejected, margin = (randn(7, seed=3 * seed + i).to(device) for i in range(3))
    total = 0.0
    for w, l, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True):
        total -= math.log(1 / (1 + math.exp(-(w - l - m))))
    assert bradley_terry_loss(chosen, rejected, margin=margin).item() == pytest.approx(total / 7)


def test_it_finds_scores_that_agree_with_people():
    # people prefer a to b in 3 of 4 comparisons: at the optimum the difference is ln 3
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scores], lr=1.0)
    for _ in range(100):
        a, b = scores[0].expand(4), scores[1].expand(4)
        first = torch.tensor([True, True, True, False])
        optimizer.zero_grad()
        bradley_terry_loss(torch.where(first, a, b), torch.where(first, b, a)).backward()
        optimizer.step()
    # each step takes 3/8 of what is left: after 100 it is below rounding
    assert (scores[0] - scores[1]).item() == pytest.approx(math.log(3))


# From a number for each token


def token_values():
    values = randn(2, 3, 5)
    real = torch.tensor(
        [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]]
    )
    return values, real.bool()


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_reward_loss_equals_a_loop(margin):
    values, real = token_values()
    total = 0.0
    for b in range(3):
        score = [values[side, b, max(i for i in range(5) if real[side, b, i])].item() for side in (0, 1)]
        total += math.log1p(math.exp(-(score[0] - score[1] - margin)))
    assert reward_loss(values, real, margin=margin).item() == pytest.approx(total / 3)


def test_reward_loss_moves_last_real_tokens_only_and_by_the_same_amount():
    values, real = token_values()
    values.requires_grad_()
    reward_loss(values, real).backward()
    places = [[[b, i] for b, i in enumerate(side)] for side in ([1, 4, 4], [2, 2, 4])]
    assert [side.nonzero().tolist() for side in values.grad] == places
    assert (values.grad[0].sum(1) < 0).all()  # descent raises the chosen
    torch.testing.assert_close(values.grad.sum(dim=(0, 2)), torch.zeros(3, dtype=torch.float64))


def test_reward_loss_sees_no_shift_of_a_pair():
    values, real = token_values()
    shift = torch.tensor([5.0, -100.0, 0.3], dtype=torch.float64)[:, None]
    torch.testing.assert_close(reward_loss(values + shift, real), reward_loss(values, real))


def test_reward_loss_does_not_read_padding():
    values, real = token_values()
    spoilt = values.masked_fill(~real, torch.nan)
    assert torch.equal(reward_loss(spoilt, real), reward_loss(values, real))


# How well scores order


def test_ranking_by_hand():
    # above, below, equal (not above), above: 2 of 4; differences 1, -3, 0, 4 have mean 0.5
    report = ranking(torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 3.0, 2.0, 1.0]))
    assert report.accuracy.item() == 0.5
    assert report.margin.item() == 0.5


def test_ranking_has_no_gradient():
    scores = randn(4).requires_grad_()
    assert not any(x.requires_grad for x in ranking(scores, randn(4, seed=1)))


# Production


@pytest.mark.parametrize("margin", [False, True])
def test_equals_trl(margin):
    reason = "TRL comes with the extra parity, for its tests alone"
    trl = pytest.importorskip("trl.trainer.reward_trainer", reason=reason)
    chosen, rejected = randn(5, dtype=torch.float32), randn(5, seed=1, dtype=torch.float32)
    inputs = {"margin": randn(5, seed=2, dtype=torch.float32)} if margin else {}
    logits = torch.cat([chosen, rejected])[:, None]
    fake = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    theirs = trl.RewardTrainer.compute_loss(fake, lambda **_: SimpleNamespace(logits=logits), dict(inputs))
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin=inputs.get("margin", 0.0)), theirs)
    report = ranking(chosen, rejected)
    assert report.accuracy.item() == pytest.approx(fake._metrics["eval"]["accuracy"][0])
    assert report.margin.item() == pytest.approx(fake._metrics["eval"]["margin"][0])


# Refusals


def test_refuses_a_row_without_a_real_token():
    with pytest.raises(ValueError, match="each row needs a real token, got none in row 1"):
        last_real(randn(2, 2), torch.tensor([[True, False], [False, False]]))


def test_refuses_marks_of_another_shape():
    with pytest.raises(ValueError, match=r"real marks each token of \(2, 3\), got \(2, 2\)"):
        last_real(randn(2, 3), torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("function", [bradley_terry_loss, ranking])
def test_refuses_scores_that_are_no_pairs(function):
    with pytest.raises(ValueError, match="one rejected score for each chosen one, got 3 chosen and 1 rejected"):
        function(randn(3), randn(1))
    with pytest.raises(ValueError, match="got 0 chosen and 0 rejected"):
        function(randn(0), randn(0))


def test_refuses_values_that_are_no_pairs():
    with pytest.raises(ValueError, match=r"pairs are a tensor \[2, b, t\].*got \(3, 2, 4\)"):
        reward_loss(randn(3, 2, 4), torch.ones(3, 2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"real marks each token of \(2, 3, 4\), got \(2, 1, 4\)"):
        reward_loss(randn(2, 3, 4), torch.ones(2, 1, 4, dtype=torch.bool))
