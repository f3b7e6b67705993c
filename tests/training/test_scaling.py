"""Models side by side: each trains as it would alone under PyTorch, losses are of the whole text, fits are right."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.training.scaling import (
    LETTERS,
    Adam,
    Fleet,
    best_rate,
    fit_steps,
    letters,
    measure_noise,
    ramp_sizes,
    sgd,
    slope,
    squared_norms,
    step_sizes,
    steps_to,
    train,
    triple_shares,
)
from minillm.training.schedule import linear_warmup


class Alone(nn.Module):
    """The same model from PyTorch's own layers, for one copy."""

    def __init__(self, weights, copy):
        super().__init__()
        embedding, hidden, head = (weight[copy].detach().clone() for weight in weights)
        self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.hidden, self.head = (nn.Linear(*weight.shape, bias=False) for weight in (hidden, head))
        self.hidden.weight.data, self.head.weight.data = hidden.T.clone(), head.T.clone()

    def forward(self, pairs):
        return self.head(torch.tanh(self.hidden(self.embedding(pairs).flatten(1))))

    def loss(self, windows):
        return F.cross_entropy(self(windows[:, :2]), windows[:, 2])


def starts(copies=2, seeds=(0, 1)):
    return Fleet(copies, seeds, width=4, hidden=6)


def test_letters():
    ids = letters()
    assert (ids.min().item(), ids.max().item()) == (0, 26)
    assert not ((ids[1:] == 0) & (ids[:-1] == 0)).any()  # one space between words
    shares = triple_shares()
    assert shares.sum().item() == pytest.approx(1, abs=1e-4)  # 19,683 float32 numbers
    t, h, e = (ord(letter) - 96 for letter in "the")
    count = ((ids[:-2] == t) & (ids[1:-1] == h) & (ids[2:] == e)).sum().item()
    assert shares[t * LETTERS + h, e].item() == pytest.approx(count / (len(ids) - 2))


def test_copies_of_a_seed_start_alike_and_see_the_same():
    fleet = starts()
    for weight in fleet.weights:
        assert weight[0].equal(weight[1])
        assert not weight[1].equal(weight[2])
    windows = fleet.sample(50)
    assert windows[0].equal(windows[1])
    assert not windows[1].equal(windows[2])
    assert not windows.equal(fleet.sample(50))


def test_windows_are_three_letters_of_the_text_in_a_row():
    windows = starts(1, [0]).sample(200)[0]
    seen = triple_shares()[windows[:, 0] * LETTERS + windows[:, 1], windows[:, 2]]
    assert (seen > 0).all()
    assert len(windows.unique(dim=0)) > 100


def test_gradients_are_those_of_each_model_alone():
    fleet = starts()
    windows = fleet.sample(10)
    gradient = fleet.gradient(windows)
    norms = squared_norms(gradient)
    for i in range(4):
        alone = Alone(fleet.weights, i)
        alone.loss(windows[i]).backward()
        expected = [alone.embedding.weight.grad, alone.hidden.weight.grad.T, alone.head.weight.grad.T]
        torch.testing.assert_close([grad[i] for grad in gradient], expected)
        assert norms[i].item() == pytest.approx(sum(grad.square().sum().item() for grad in expected), rel=1e-4)


def test_loss_is_the_mean_over_the_whole_text():
    fleet = starts()
    windows = letters().unfold(0, 3, 1)
    expected = Alone(fleet.weights, 2)
    with torch.no_grad():
        total = sum(expected.loss(part).item() * len(part) for part in windows.split(10**6))
    assert fleet.nats()[1, 0].item() == pytest.approx(total / len(windows), rel=1e-4)  # millions of float32 terms


PAIRS = {
    "sgd": (lambda: sgd, lambda p, lr: torch.optim.SGD(p, lr)),
    "adam": (lambda: Adam(betas=(0.8, 0.99)), lambda p, lr: torch.optim.Adam(p, lr, betas=(0.8, 0.99))),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("clip", [math.inf, 0.3])
def test_each_copy_trains_as_alone_under_torch(pair, clip):
    direction, optimizer = PAIRS[pair]
    rates, sizes = [0.01, 0.05], [4, 8, 16] * 4
    trained = starts()
    curve = train(
        trained, rates, steps=12, batch=sizes, direction=direction(), clip=clip, junk=[5], every=12,
        schedule=lambda step: linear_warmup(step, warmup=4),
    )  # fmt: skip
    torch.testing.assert_close(curve[-1], trained.nats())
    fleet = starts()
    data = [fleet.sample(size) for size in sizes]
    for i in range(4):
        alone = Alone(fleet.weights, i)
        their = optimizer(alone.parameters(), 1.0)
        for step, windows in enumerate(data):
            mine = windows[i].clone()
            if step == 5:
                mine[:, 2] = 26
            alone.zero_grad()
            alone.loss(mine).backward()
            nn.utils.clip_grad_norm_(alone.parameters(), clip)
            their.param_groups[0]["lr"] = rates[i % 2] * min(1, step / 4)
            their.step()
        # twelve steps of at most 0.05: Adam's first ones divide small gradients by their own size
        torch.testing.assert_close(trained.weights[2][i], alone.head.weight.T, rtol=1e-3, atol=1e-4)


def test_points_of_a_curve_and_its_early_end():
    assert train(starts(), [0.1, 0.1], steps=7, batch=4, every=3).shape == (3, 2, 2)  # after 3, 6 and 7
    assert train(starts(), [0.1, 0.1], steps=7, batch=4).shape == (1, 2, 2)
    start = starts().nats().min().item()
    curve = train(starts(), [1.0, 0.0], steps=500, batch=64, every=1, target=start - 0.2)
    assert 1 < len(curve) < 500
    assert (curve[-1, :, 0] < start - 0.2).any()
    assert (curve[:-1].amin(dim=2).amax(dim=1) >= start - 0.2).all()  # before, some seed was not there


def test_refuses_rates_that_are_not_one_for_each_copy():
    with pytest.raises(ValueError, match="got 3 rates and 2 copies"):
        train(starts(), [0.1] * 3, steps=1, batch=4)


def test_steps_to_a_target_are_those_of_the_fastest_rate():
    rates, target = [0.05, 1.0, 0.0], 3.2
    found = steps_to(target, rates, seeds=[3, 4], batch=32, every=2)
    for seed, steps in zip([3, 4], found.tolist(), strict=True):
        curve = train(Fleet(3, [seed]), rates, steps=int(steps), batch=32, every=2)[:, 0]
        assert curve[-1].min() < target
        assert len(curve) == 1 or curve[:-1].min() >= target
    with pytest.raises(ValueError, match=r"no rate of \[0\.0\] comes below 3\.2 in 3 steps of 4"):
        steps_to(target, [0.0], seeds=[3], batch=4, limit=3)


def test_sizes_of_a_ramp_read_all_samples():
    sizes = ramp_sizes(1000, start=16, full=64, over=500)
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (16, 64)
    assert sum(sizes[:-1]) < 1000 <= sum(sizes)
    assert ramp_sizes(100, start=32, full=32, over=0) == [32] * 4


def test_noise_scale_against_the_gradients_of_single_windows():
    fleet = Fleet(1, [0], width=4, hidden=6)
    found = measure_noise(fleet, draws=100)
    windows = fleet.sample(4000)
    single = [torch.cat([g.flatten() for g in fleet.gradient(windows[:, i : i + 1])]) for i in range(4000)]
    noise = torch.stack(single).double().var(dim=0).sum().item()
    signal = squared_norms(fleet.gradient(fleet.sample(400_000))).item()  # of noise there is 1/400,000
    assert found.noise.item() == pytest.approx(noise, rel=0.05)  # standard errors about 1 %
    assert found.signal.item() == pytest.approx(signal, rel=0.2)  # about 5 %


def test_adam_steps_by_noise_alone():
    """Steady state: mean of gradients of variance (1 - b1) / (1 + b1) over a root mean square of 1."""
    steps = step_sizes([1e-3] * 400, betas=(0.9, 0.99))
    assert steps[0].item() == pytest.approx(1, abs=1e-3)  # eps beside the smallest gradients
    assert steps[300:].mean().item() == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.03)


def test_a_jump_of_the_gradient_outruns_a_long_memory():
    sizes = {b: step_sizes([1.0] * 1000 + [100.0] * 60, betas=(0.9, b))[1000:].max().item() for b in (0.95, 0.999)}
    assert sizes[0.95] < 0.6
    assert sizes[0.999] > 2


def test_best_rate_is_the_vertex_of_the_parabola():
    rates = [2.0**i for i in range(-3, 4)]
    nats = torch.tensor([1 + 0.3 * (math.log2(rate) - 0.7) ** 2 for rate in rates])
    assert best_rate(rates, nats) == pytest.approx(2**0.7, rel=1e-3)
    nats[-1] = math.nan  # diverged
    assert best_rate(rates, nats) == pytest.approx(2**0.7, rel=1e-3)
    with pytest.raises(ValueError, match=r"inside the rates, it is at 0\.125, number 0 of 7"):
        best_rate(rates, torch.arange(7.0))


def test_fits_find_what_made_the_numbers():
    batches = [8, 32, 128, 512]
    assert slope(batches, [5 * b**0.8 for b in batches]) == pytest.approx(0.8)
    fewest, critical = fit_steps(batches, [14 * (1 + 200 / b) for b in batches])
    assert (fewest, critical) == (pytest.approx(14), pytest.approx(200))
    wavy = [14 * (1 + 200 / b) * wave for b, wave in zip(batches, (1.05, 0.95, 1.05, 0.95), strict=True)]
    assert fit_steps(batches, wavy)[1] == pytest.approx(200, rel=0.2)
