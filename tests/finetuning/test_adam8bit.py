"""8-bit Adam: near Adam's way, two bytes a weight, and a state that is saved and goes on."""

import copy
import itertools
import math

import pytest
import torch

from minillm.finetuning.adam8bit import AdamW8bit


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def follow(optimizer, weight, steps=30):
    for step in range(steps):
        weight.grad = (10 ** math.sin(step) * randn(*weight.shape, seed=step)).to(weight.dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(40, 50), (7,), (16, 16, 3)])
def test_8_bit_adam_goes_where_adam_goes(shape):
    start = randn(*shape, seed=9)
    ours, exact = (start.clone().requires_grad_() for _ in range(2))
    a = follow(AdamW8bit([ours], 0.01), ours)
    b = follow(torch.optim.AdamW([exact], 0.01), exact)
    # the means are rounded by 1 % or so of each number at each step, the way by as much
    assert (a - b).norm() < 0.05 * (b - start).norm()
    assert not a.equal(b)


def test_8_bit_adam_state_is_two_bytes_a_weight():
    weight = torch.zeros(256 * 100).requires_grad_()
    optimizer = AdamW8bit([weight])
    follow(optimizer, weight, 1)
    (state,) = optimizer.state.values()
    tensors = [*itertools.chain(state["mean"], state["square"])]
    assert sum(x.nbytes for x in tensors) == 2 * (256 * 100 + 4 * 100)


def test_8_bit_adam_saves_and_goes_on():
    first = randn(30, 30).requires_grad_()
    optimizer = AdamW8bit([first])
    follow(optimizer, first, 5)
    second = first.detach().clone().requires_grad_()
    resumed = AdamW8bit([second])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert follow(resumed, second, 5).equal(follow(optimizer, first, 5))


def test_half_precision_weights():
    weight = torch.ones(300, dtype=torch.bfloat16).requires_grad_()
    optimizer = AdamW8bit([weight], 0.1, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.detach().float(), torch.full((300,), 0.9), rtol=0.01, atol=0)


def test_refuses_to_go_uphill():
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        AdamW8bit([torch.zeros(2, requires_grad=True)], -0.1)
