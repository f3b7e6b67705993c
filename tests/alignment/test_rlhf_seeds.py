"""Over-optimisation in the toy of RLHF, for three seeds: the notebook of alignment/rlhf shows seed 0."""

import pytest
import torch

from minillm.alignment.best_of_n import expected_best
from minillm.alignment.fact_lists import gold
from minillm.alignment.reward_model import ranking
from minillm.alignment.rlhf import optimise, prepare, write


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_proxy_up_gold_down_and_a_price_for_distance_prevents_it(seed):
    stages = prepare(seed=seed)
    report = ranking(stages.reward(stages.chosen), stages.reward(stages.rejected))
    assert 0.65 < report.accuracy < 0.85  # people err: the gold itself is above in 0.69 to 0.74 of the pairs
    _, free = optimise(stages, beta=0.0, seed=seed)
    _, held = optimise(stages, beta=0.4, seed=seed)
    begin = free.gold[:4].mean()
    # measured over 5 seeds: gold 3.0, its peak 3.9 to 4.1, its end -4.6 to -11.8; with the price it ends at 4.7 to 5.0
    assert free.proxy[-4:].mean() > free.proxy[:4].mean() + 1
    peak = free.gold.unfold(0, 4, 1).mean(dim=1).max()
    assert peak > begin + 0.3
    assert free.gold[-4:].mean() < begin - 3
    assert free.kl[-4:].mean() > 8
    assert free.length[-4:].mean() > 25
    assert held.gold[-4:].mean() > max(begin + 0.7, peak)
    assert held.kl[-4:].mean() < 3
    answers = write(stages.start, 2048, generator=torch.Generator().manual_seed(seed))
    score, quality = stages.reward(answers), gold(answers.tokens, answers.mask)
    # the best of 64 is at most 3.2 nats away and does not get to where the proxy is wrong: measured 4.8 to 5.7
    assert expected_best(score, quality, 64) > max(quality.mean() + 1, peak)
