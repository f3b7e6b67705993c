"""The policy of two numbers: what it writes, and that only a mean over each response moves its lengths."""

import pytest
import torch

from minillm.alignment.grpo import cispo_loss, dapo_loss, dr_grpo_loss, grpo_loss, gspo_loss
from minillm.alignment.length_bias import log_probs, mean_length, race, write

FAIR = {"dapo": dapo_loss, "dr_grpo": lambda *args: dr_grpo_loss(*args, limit=64), "cispo": cispo_loss}


def test_mean_length_equals_the_sum_over_lengths():
    stop = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    total = sum(k * stop * (1 - stop) ** (k - 1) for k in range(1, 6)) + 6 * (1 - stop) ** 5
    torch.testing.assert_close(mean_length(stop, 6), total)


def test_what_is_written_stops_once_or_is_cut():
    logits = torch.tensor([0.25]).logit().expand(4000)
    mask, stops = write(logits, 5, generator=torch.Generator().manual_seed(0))
    lengths = mask.sum(dim=1)
    assert lengths.min() == 1
    assert mask.equal(torch.arange(5) < lengths[:, None])
    assert stops.sum(dim=1).max() == 1
    assert (stops.int().argmax(dim=1) == lengths - 1)[stops.any(dim=1)].all()
    assert (lengths[~stops.any(dim=1)] == 5).all()
    # 0.75^5 = 0.237 are cut; the mean length is 3.05
    assert (~stops.any(dim=1)).float().mean().item() == pytest.approx(0.237, abs=0.03)
    assert lengths.float().mean().item() == pytest.approx(mean_length(torch.tensor(0.25), 5).item(), abs=0.1)


def test_log_probs_by_hand():
    out = log_probs(torch.tensor([0.25]).logit(), torch.tensor([[False, True]])).exp()
    torch.testing.assert_close(out, torch.tensor([[0.75, 0.25]]))


@pytest.mark.parametrize("seed", range(3))
def test_a_mean_over_each_response_drives_lengths_apart(seed):
    wrong, right = race(grpo_loss, seed=seed)[-1].tolist()
    assert wrong > 2 * 8
    assert right < 8 / 2


def test_gspo_has_the_same_pull():
    # in a first step all ratios are 1, and its gradient is that of grpo
    torch.testing.assert_close(race(gspo_loss, steps=40), race(grpo_loss, steps=40), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAIR)
@pytest.mark.parametrize("seed", range(3))
def test_the_others_leave_lengths_about_as_they_are(name, seed):
    lengths = race(FAIR[name], seed=seed)
    assert lengths[0].tolist() == pytest.approx([8, 8], abs=0.01)
    assert lengths[-1].min() > 4
    assert lengths[-1].max() < 14


def test_the_race_has_a_value_for_the_start_and_each_step_and_repeats():
    assert race(dapo_loss, steps=3).shape == (4, 2)
    assert race(dapo_loss, steps=3, seed=1).equal(race(dapo_loss, steps=3, seed=1))
    assert not race(dapo_loss, steps=3, seed=1).equal(race(dapo_loss, steps=3, seed=2))
