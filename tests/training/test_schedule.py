"""Schedules: equal to production's step by step, true to their phases; batch and rate rules that keep what they say."""

import math
from itertools import pairwise

import pytest
import torch

from minillm.training.optimizers import adamw_step
from minillm.training.schedule import (
    batch_ramp,
    cosine,
    inverse_sqrt,
    linear,
    linear_warmup,
    multi_step,
    noise_scale,
    one_minus_sqrt,
    progress,
    scale_lr,
    straight,
    wsd,
    wsd_schedule,
)

STEPS = 101


def production(make):
    """The learning rates, of a peak of 1, that a PyTorch scheduler gives step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(schedule, **options):
    return [schedule(step, **options) for step in range(STEPS)]


@pytest.mark.parametrize("warmup", [0, 1, 13])
def test_linear_and_cosine_equal_transformers(warmup):
    import transformers as hf

    both = dict(num_warmup_steps=warmup, num_training_steps=100)
    pairs = [
        (ours(linear, warmup=warmup, total=100), lambda o: hf.get_linear_schedule_with_warmup(o, **both)),
        (ours(cosine, warmup=warmup, total=100), lambda o: hf.get_cosine_schedule_with_warmup(o, **both)),
        (
            ours(cosine, warmup=warmup, total=100, floor=0.1),
            lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, min_lr_rate=0.1, **both),
        ),
        (
            ours(linear_warmup, warmup=warmup),
            lambda o: hf.get_constant_schedule_with_warmup(o, num_warmup_steps=warmup),
        ),
    ]
    for mine, make in pairs:
        assert mine == pytest.approx(production(make))


@pytest.mark.parametrize(("cooldown", "name"), [(straight, "linear"), (one_minus_sqrt, "1-sqrt")])
@pytest.mark.parametrize("phases", [(0, 20), (13, 20), (13, 1), (13, 87), (0, 0)])
def test_wsd_equals_transformers(cooldown, name, phases):
    import transformers as hf

    warmup, decay = phases
    mine = ours(wsd, warmup=warmup, total=100, decay=decay, cooldown=cooldown)
    theirs = production(
        lambda o: hf.get_wsd_schedule(
            o, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=100, decay_type=name
        )
    )
    last = 100 if decay == 0 else 101  # without a decay they fall to 0 after the run, we do not
    assert mine[:last] == pytest.approx(theirs[:last])
    floor = ours(wsd, warmup=warmup, total=100, decay=decay, cooldown=cooldown, floor=0.25)
    assert floor[warmup:] == pytest.approx([0.25 + 0.75 * x for x in mine[warmup:]])
    assert floor[:warmup] == mine[:warmup]


@pytest.mark.parametrize("phases", [(0, 20), (13, 20), (13, 87)])
def test_the_whole_wsd_schedule_equals_transformers(phases):
    import transformers as hf

    warmup, decay = phases
    options = dict(num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=100, min_lr_ratio=0.1)
    mine = wsd_schedule(torch.arange(STEPS), warmup=warmup, total=100, decay=decay, floor=0.1)
    theirs = production(lambda o: hf.get_wsd_schedule(o, decay_type="1-sqrt", **options))
    assert mine.dtype == torch.float32
    assert mine[warmup:].tolist() == pytest.approx(theirs[warmup:], abs=1e-6)  # float32
    assert mine[:warmup].tolist() == pytest.approx([step / max(1, warmup) for step in range(warmup)], abs=1e-6)
    some = torch.tensor([99, 3, 3, 250])
    assert wsd_schedule(some, warmup=warmup, total=100, decay=decay, floor=0.1).tolist() == pytest.approx(
        [mine[99].item(), mine[3].item(), mine[3].item(), 0.1]
    )


def test_inverse_sqrt_equals_transformers_and_the_paper():
    import transformers as hf

    mine = ours(inverse_sqrt, warmup=13)
    assert mine == pytest.approx(production(lambda o: hf.get_inverse_sqrt_schedule(o, num_warmup_steps=13)))
    # equation 3 of the Transformer paper, min(step^-0.5, step warmup^-1.5), over its value at the end of the warm-up
    paper = [min(step**-0.5, step * 13**-1.5) * 13**0.5 for step in range(1, STEPS)]
    assert mine[1:] == pytest.approx(paper)


def test_multi_step_equals_torch():
    mine = ours(multi_step, warmup=0, milestones=(40, 80, 80), factor=0.3)
    theirs = production(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [40, 80, 80], gamma=0.3))
    assert mine == pytest.approx(theirs)
    warm = ours(multi_step, warmup=20, milestones=(40, 80, 80), factor=0.3)
    assert warm == pytest.approx([x * min(1.0, step / 20) for step, x in enumerate(mine)])


def test_two_milestones_of_deepseek_end_at_a_tenth():
    assert multi_step(95, warmup=0, milestones=(80, 90)) == pytest.approx(0.1, rel=0.002)  # 0.316 is rounded


def test_the_stable_phase_does_not_depend_on_the_length_of_the_run():
    runs = [[wsd(step, warmup=10, total=total, decay=20) for step in range(80)] for total in (100, 200, 5000)]
    assert runs[0] == runs[1] == runs[2]
    assert [cosine(50, warmup=10, total=total) for total in (100, 200)] == pytest.approx([0.587, 0.895], abs=1e-3)


def test_wsd_is_one_until_the_decay_and_ends_at_the_floor():
    rates = ours(wsd, warmup=10, total=100, decay=20, floor=0.05)
    assert rates[10:81] == [1.0] * 71
    assert all(a > b for a, b in pairwise(rates[80:]))
    assert rates[100] == wsd(500, warmup=10, total=100, decay=20, floor=0.05) == 0.05


def test_after_the_end_the_floor_stays():
    assert cosine(150, warmup=10, total=100, floor=0.1) == pytest.approx(0.1)
    assert linear(150, warmup=10, total=100, floor=0.1) == pytest.approx(0.1)
    assert linear(55, warmup=10, total=100, floor=0.1) == pytest.approx(0.55)  # half way between 1 and 0.1


def test_one_minus_sqrt_falls_faster_than_the_line_at_first():
    assert all(one_minus_sqrt(x) < straight(x) for x in (0.1, 0.5, 0.9))
    assert [one_minus_sqrt(x) for x in (0.0, 0.25, 1.0)] == [1.0, 0.5, 0.0]


def test_progress_is_clamped():
    assert [progress(step, 10, 20) for step in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]


# Batch


def test_batch_ramp_by_hand():
    # from 32 to 128 over 3,000 tokens: 32 per 1,000 tokens; in multiples of 16 a step each 500 tokens
    seen = [0, 499, 500, 1000, 2999, 3000, 10**12]
    assert [batch_ramp(x, start=32, full=128, over=3000, multiple=16) for x in seen] == [
        32, 32, 48, 64, 112, 128, 128,
    ]  # fmt: skip
    assert batch_ramp(500, start=32, full=128, over=3000) == 48
    assert batch_ramp(501, start=32, full=128, over=3000) == 48
    assert batch_ramp(0, start=32, full=128, over=0) == 128


def test_rules_by_hand():
    assert scale_lr(0.1, 64, 1024, optimizer="sgd") == pytest.approx(1.6)
    assert scale_lr(0.1, 64, 1024, optimizer="adam") == pytest.approx(0.4)
    assert scale_lr(0.1, 1024, 64, optimizer="adam") == pytest.approx(0.025)


def walk(step_function, batch, lr, samples, seed=0):
    """Where 4,000 weights are after `samples` samples whose gradient is 0.02 with noise of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(4000, dtype=torch.float64)
    state = dict(mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
    for step in range(1, samples // batch + 1):
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step_function(weight, 0.02 + noise / math.sqrt(batch), state, step, lr)
    return weight


def sgd(weight, grad, state, step, lr):
    weight -= lr * grad


def adam(batch):
    """Adam whose means forget by samples, not by steps, as the square-root rule asks."""

    def step_function(weight, grad, state, step, lr):
        adamw_step(weight, grad, state["mean"], state["square"], step, lr=lr, betas=(1 - batch / 100, 1 - batch / 1000))

    return step_function


def test_linear_rule_keeps_the_path_and_the_spread_of_sgd():
    lr, samples = 0.01, 4000
    base = walk(sgd, 1, lr, samples)  # 4,000 x 0.01 x 0.02 = 0.8 down, spread sqrt(4,000) x 0.01 = 0.63
    scaled = walk(sgd, 16, scale_lr(lr, 1, 16, optimizer="sgd"), samples, seed=1)
    wrong = walk(sgd, 16, scale_lr(lr, 1, 16, optimizer="adam"), samples, seed=1)
    # standard errors: of a mean of 4,000 weights 0.01, of a standard deviation 1.1 %
    assert scaled.mean().item() == pytest.approx(base.mean().item(), abs=0.05)
    assert scaled.std().item() == pytest.approx(base.std().item(), rel=0.06)
    assert wrong.mean().item() == pytest.approx(base.mean().item() / 4, abs=0.05)  # a quarter of the way


def test_square_root_rule_keeps_the_path_and_the_spread_of_adam():
    lr, samples = 0.01, 4000
    base = walk(adam(1), 1, lr, samples)
    scaled = walk(adam(16), 16, scale_lr(lr, 1, 16, optimizer="adam"), samples, seed=1)
    wrong = walk(adam(16), 16, scale_lr(lr, 1, 16, optimizer="sgd"), samples, seed=1)
    # as above, and the mean square is one of 60 steps instead of 1,000
    assert scaled.mean().item() == pytest.approx(base.mean().item(), abs=0.1)
    assert scaled.std().item() == pytest.approx(base.std().item(), rel=0.1)
    assert wrong.std().item() == pytest.approx(4 * base.std().item(), rel=0.1)


def test_noise_scale_is_unbiased():
    # |G|^2 = 4 (40 x 0.1), tr(Sigma) = 40 x 9 = 360: B = 90
    generator = torch.Generator().manual_seed(0)
    draws, small, large = 4000, 8, 64
    grads = torch.randn(draws, large // small, 40, generator=generator, dtype=torch.float64) * 3 / math.sqrt(small)
    grads += math.sqrt(0.1)
    norms = grads.square().sum(dim=-1).mean(dim=-1), grads.mean(dim=1).square().sum(dim=-1)
    found = noise_scale(*norms, small_batch=small, large_batch=large)
    assert found.noise.mean().item() == pytest.approx(360, rel=0.01)  # standard error 0.4 %
    assert found.signal.mean().item() == pytest.approx(4, rel=0.05)  # standard error 1 %
    assert found.batch == pytest.approx(90, rel=0.05)
    assert (found.noise / found.signal).mean().item() != pytest.approx(90, rel=0.05)  # a mean of ratios is not it
    naive = norms[0].mean() / norms[1].mean() * small
    assert naive.item() < 60  # what the norms alone, uncorrected, would say


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(0, warmup=11, total=10), "between 0 and total, got 11 and 10"),
        (lambda: cosine(0, warmup=-1, total=10), "between 0 and total, got -1 and 10"),
        (lambda: wsd(0, warmup=6, total=10, decay=5), r"fit into total, got 6 \+ 5 and 10"),
        (lambda: wsd(0, warmup=0, total=10, decay=-5), r"got 0 \+ -5 and 10"),
        (lambda: multi_step(0, warmup=5, milestones=(4, 8)), r"after the warm-up, got \[4, 8\], warmup=5"),
        (lambda: multi_step(0, warmup=0, milestones=(8, 4)), r"must rise .* got \[8, 4\]"),
        (lambda: inverse_sqrt(0, warmup=0), "at least 1 step, got 0"),
        (lambda: batch_ramp(0, start=64, full=32, over=10), "start=64 and full=32"),
        (lambda: batch_ramp(0, start=12, full=32, over=10, multiple=8), "multiples of 8, got start=12"),
        (lambda: scale_lr(0.1, 0, 4, optimizer="sgd"), "at least 1 sample, got 0 and 4"),
        (lambda: scale_lr(0.1, 1, 4, optimizer="lion"), "'sgd' or 'adam', got 'lion'"),
        (lambda: noise_scale(torch.ones(1), torch.ones(1), small_batch=4, large_batch=4), "larger .* got 4 and 4"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
