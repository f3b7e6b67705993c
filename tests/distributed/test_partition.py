"""A step of ZeRO on stacked tensors: the weights of one process, shards, padding, clipping, masters; and a ring."""

import math

import pytest
import torch

from minillm.distributed.partition import all_gather, cut, reduce_scatter, ring_pass, zero_step

ADAMW = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
SIZES = [(1, 5), (2, 6), (2, 7), (3, 7), (4, 5), (5, 3)]  # ranks, weights: with and without padding, and empty shards
each = pytest.mark.parametrize(("world", "n"), SIZES)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shared(world, n, gradients, *, clip=math.inf, dtype=torch.float64, start=None):
    """Weights after one step for each [w, n] of the gradients, and the norms are torch's."""
    masters = cut(drawn(n, seed=9, dtype=dtype) if start is None else start, world)
    mean, square = torch.zeros_like(masters), torch.zeros_like(masters)
    for step, given in enumerate(gradients, 1):
        weights, masters, mean, square = zero_step(given, masters, mean, square, step, clip=clip, **ADAMW)
    return weights, masters, mean, square


def alone(n, gradients, *, clip=math.inf):
    """torch.optim.AdamW on one process with the mean gradient: weights and state after all steps."""
    weight = torch.nn.Parameter(drawn(n, seed=9))
    optimizer = torch.optim.AdamW([weight], **ADAMW)
    for given in gradients:
        weight.grad = given.mean(dim=0)
        torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


# The same weights as one process


@each
@pytest.mark.parametrize("clip", [math.inf, 0.3])
def test_five_steps_equal_torch_on_one_process(world, n, clip):
    gradients = [drawn(world, n, seed=seed) for seed in range(5)]
    if clip < 1:
        assert min(given.mean(dim=0).norm() for given in gradients) > clip, "some step is not clipped"
    weights, masters, mean, square = shared(world, n, gradients, clip=clip)
    expected, state = alone(n, gradients, clip=clip)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(masters.flatten()[:n], expected)
    torch.testing.assert_close(mean.flatten()[:n], state["exp_avg"])
    torch.testing.assert_close(square.flatten()[:n], state["exp_avg_sq"])


@each
def test_gradients_below_the_limit_are_left_alone(world, n):
    gradients = [drawn(world, n, seed=seed) for seed in range(2)]
    small, none = (shared(world, n, gradients, clip=clip)[0] for clip in (1e6, math.inf))
    assert torch.equal(small, none)


def test_gradients_of_a_real_model_on_its_parts_of_a_batch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    rows = drawn(6, 3, seed=1)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def gradient(part):
        model.zero_grad()
        model(part).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    ranks = torch.stack([gradient(part) for part in rows.chunk(3)])
    weights, *_ = shared(3, len(start), [ranks], start=start)
    gradient(rows)  # the whole batch
    torch.optim.AdamW(model.parameters(), **ADAMW).step()
    torch.testing.assert_close(weights, torch.nn.utils.parameters_to_vector(model.parameters()).detach())


def test_by_hand():
    # gradients (3, 0) and (5, 8): mean (4, 4), norm sqrt(32); clipped to sqrt(2): (1, 1). The first step of AdamW is
    # lr times the sign; the mean is 0.1, the square 0.001.
    shards = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    gradients = torch.tensor([[3.0, 0.0], [5.0, 8.0]], dtype=torch.float64)
    weights, masters, mean, square = zero_step(gradients, shards, 0 * shards, 0 * shards, 1, lr=0.5, clip=math.sqrt(2))
    near = dict(rtol=1e-6, atol=0)  # eps of AdamW and of the norm
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5], dtype=torch.float64), **near)
    torch.testing.assert_close(masters, torch.tensor([[0.5], [1.5]], dtype=torch.float64), **near)
    torch.testing.assert_close(mean, torch.full((2, 1), 0.1, dtype=torch.float64), **near)
    torch.testing.assert_close(square, torch.full((2, 1), 0.001, dtype=torch.float64), rtol=1e-5, atol=0)


# Shards


def test_shards_are_contiguous_with_zeros_at_the_end():
    assert cut(torch.arange(1.0, 6), 3).tolist() == [[1, 2], [3, 4], [5, 0]]
    assert cut(torch.arange(1.0, 4), 5).tolist() == [[1], [2], [3], [0], [0]]
    gradients = torch.stack([torch.arange(1.0, 6), torch.arange(3.0, 8)])
    assert reduce_scatter(gradients).tolist() == [[2, 3, 4], [5, 6, 0]]
    assert all_gather(torch.tensor([[1, 2, 3], [4, 5, 0.0]]), 5).tolist() == [1, 2, 3, 4, 5]


@each
def test_padding_stays_zero(world, n):
    results = shared(world, n, [drawn(world, n, seed=seed) for seed in range(3)], clip=0.3)
    for shards in results[1:]:
        assert (shards.flatten()[n:] == 0).all()


def test_a_rank_needs_nothing_of_the_others_states():
    gradients, masters = drawn(3, 9), cut(drawn(9, seed=9), 3)
    mean, square = torch.zeros_like(masters), torch.zeros_like(masters)
    one = zero_step(gradients, masters, mean, square, 1, **ADAMW)
    changed = masters.clone()
    changed[1:] += 1
    other = zero_step(gradients, changed, mean, square, 1, **ADAMW)
    assert torch.equal(one[1][0], other[1][0])
    assert not torch.equal(one[1][1], other[1][1])


def test_nothing_is_changed_in_place():
    given = drawn(2, 5), *(cut(drawn(5, seed=s).abs(), 2) for s in (1, 2, 3))
    copies = [x.clone() for x in given]
    zero_step(*given, 1, **ADAMW)
    assert all(map(torch.equal, given, copies))


# bfloat16 weights with float32 masters


def test_weights_are_the_masters_rounded():
    gradients = [drawn(3, 50, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    weights, masters, mean, _ = shared(3, 50, gradients, dtype=torch.float32)
    assert weights.dtype == torch.bfloat16
    assert masters.dtype == mean.dtype == torch.float32
    assert torch.equal(weights, masters.flatten()[:50].bfloat16())
    assert not torch.equal(masters, masters.bfloat16().float())


def test_masters_remember_steps_that_bfloat16_would_lose():
    shards = cut(torch.ones(4), 2)
    mean, square = torch.zeros_like(shards), torch.zeros_like(shards)
    gradients = torch.ones(2, 4, dtype=torch.bfloat16)
    for step in range(1, 41):
        weights, shards, mean, square = zero_step(gradients, shards, mean, square, step, lr=1e-4)
        assert (weights == 1).all() or step > 19  # bfloat16 has 0.996 next: 19 steps of 1e-4 round back to 1
    torch.testing.assert_close(shards, torch.full((2, 2), 1 - 40e-4), rtol=0, atol=1e-6)
    assert (weights == 0.99609375).all()


def test_gradients_are_averaged_in_float32():
    # 256 + 1 = 256 in bfloat16
    gradients = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert reduce_scatter(gradients).tolist() == [[64.75], [0], [0], [0]]


# Refusals


def test_refuses_shards_that_do_not_fit():
    shards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"7 weights on 2 ranks need shards of shape \(2, 4\), got \(2, 3\)"):
        zero_step(torch.zeros(2, 7), shards, shards, shards, 1, lr=0.1)


def test_refuses_a_ring_that_does_not_divide():
    with pytest.raises(ValueError, match="must divide into 3 chunks, got 4 numbers"):
        ring_pass(torch.zeros(3, 4), 0)


# The ring


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_ring_ends_with_the_sum_everywhere(world):
    given = drawn(world, 2 * world).round(decimals=1)
    buffers = given
    for step in range(world - 1):
        buffers = ring_pass(buffers, step)
    owned = torch.cat([buffers.view(world, world, 2)[rank, rank] for rank in range(world)])
    torch.testing.assert_close(owned, given.sum(dim=0))  # rank r has finished chunk r
    for step in range(world - 1, 2 * world - 2):
        buffers = ring_pass(buffers, step)
    torch.testing.assert_close(buffers, given.sum(dim=0).expand(world, -1))
    assert (buffers == buffers[0]).all()


def test_the_ring_of_test_collectives():
    # what three real processes pass on: 303 404 from rank 0 in the second message, 111 222 at rank 0 after it
    x = torch.tensor([1, 2, 3, 4, 0, 0]) * torch.tensor([[1], [10], [100]])
    one = ring_pass(x, 0)
    assert one[0].tolist() == [1, 2, 303, 404, 0, 0]
    assert ring_pass(one, 1)[0, :2].tolist() == [111, 222]
