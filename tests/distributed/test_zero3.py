"""ZeRO stage 3: the same weights again, everything sharded between uses, half as many bytes sent on top."""

import math

import pytest
import torch
import torch.distributed as dist

from minillm.distributed import zero3
from minillm.distributed.collectives import Traffic
from minillm.distributed.launch import process_group
from minillm.distributed.zero3 import Stage3, units
from zero_runs import ADAMW, CLIP, STEPS, TASKS, alone, results, weights

WORLDS = (2, 3)
NORM = 4  # bytes of the float32 number that an all-reduce makes the norm of
LOSS = 8  # bytes of the loss and of its gradient, which exist during the backward pass

each = pytest.mark.parametrize("world", WORLDS)


def found(world):
    """What each rank found."""
    return [rank[3] for rank in results((3,), world)]


def assert_same(weights, expected):
    """float64: sums in another order differ by 1e-16, which Adam's division by a small size makes larger."""
    assert list(weights) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12, msg=name)


@each
@pytest.mark.parametrize("task", TASKS)
def test_five_steps_equal_one_process_with_the_whole_batch(task, world):
    build, batch, loss, _ = TASKS[task]
    expected, norms = alone(build, batch, loss, CLIP)
    for rank in found(world):
        weights, norm = rank["weights"][task]
        assert_same(weights, expected)
        torch.testing.assert_close(norm, norms, rtol=1e-12, atol=0)


@each
@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp2"])
@pytest.mark.parametrize("task", ["transformer", "perceptron"])
def test_five_steps_equal_those_of_pytorch(task, kind, world):
    for rank in results((3,), world):
        assert_same(rank[3]["weights"][task][0], rank[task, kind])


@each
def test_without_clipping_too(world):
    build, batch, loss, _ = TASKS["transformer"]
    expected, _ = alone(build, batch, loss, math.inf)
    for rank in found(world):
        assert_same(rank["unclipped"][0], expected)


@each
def test_gradients_of_micro_batches_add_up(world):
    build, batch, loss, _ = TASKS["transformer"]
    expected, _ = alone(build, batch, loss, CLIP)
    for rank in found(world):
        assert_same(rank["accumulated"][0], expected)


@each
def test_masters_are_not_rounded_and_weights_are_the_masters_rounded(world):
    for rank in found(world):
        one = rank["bfloat16"]
        for name, exact in one["exact"].items():
            assert torch.equal(one["first masters"][name], exact)
            assert torch.equal(one["start"][name], exact.bfloat16().float())
            assert torch.equal(one["weights"][name], one["masters"][name].bfloat16())
        assert (one["masters"]["norm"] != 1).all()


@each
def test_bytes_held_fall_as_one_over_n(world):
    for rank in found(world):
        one = rank["bytes"]
        psi = one["size"]
        states = {"parameters": 2 * psi / world, "gradients": 0, "optimizer": 12 * psi / world}
        for moment in ("start", "after step"):
            assert one[moment] == states | {"alive": 14 * psi / world}
        assert one["after backward"] == states | {"gradients": 2 * psi / world, "alive": 16 * psi / world}


@each
def test_the_peak_is_the_weights_and_gradients_of_one_layer_above(world):
    for rank in found(world):
        one = rank["bytes"]
        psi, layer = one["size"], one["layer"]
        # the message with the last layer's gradient: its weights, gradient and arriving chunk, all shards but this one
        assert one["peak"] == 16 * psi / world + 2 * layer + 2 * layer + LOSS


@each
def test_a_step_sends_half_as_much_again_as_plain_data_parallelism(world):
    for rank in found(world):
        one = rank["bytes"]
        gather = (world - 1) / world * 2 * one["size"]
        assert one["plain"] == 2 * gather
        assert one["sent forward"] == gather
        assert one["sent"] - 2 * (world - 1) * NORM == 3 * gather


@each
def test_outside_its_layer_a_parameter_is_empty(world):
    for rank in found(world):
        one = rank["freed"]
        assert one["sizes"] == {0}
        torch.testing.assert_close(*one["out"], rtol=0, atol=0)  # no gradient, the same arithmetic
        size = sum(p.numel() for p in TASKS["transformer"][0]().parameters())
        # float64: the shard is the master; buckets are padded
        assert 8 * size / world <= one["held"]["parameters"] <= 1.02 * 8 * size / world
        assert one["held"]["optimizer"] == 2 * one["held"]["parameters"]


@each
def test_parameters_that_no_rank_uses_are_freed_and_shrink_only(world):
    for rank in found(world):
        start = TASKS["perceptron"][0]()
        assert not torch.equal(rank["unused"]["body.first.0.weight"], start.first[0].weight)
        assert rank["unused"]["spare.weight"].shape == (5, 3)


def test_refuses_a_parameter_in_two_units():
    for rank in results((3,), 2):
        assert rank["refusals"]["twice"] == (
            "a parameter must be in one unit, got it in two: give modules that share nothing"
        )


def test_refuses_an_output_whose_gradient_it_cannot_watch():
    for rank in found(2):
        assert rank["freed"]["dict"] == ("a unit must return a tensor or a tuple of tensors, got dict: wrap it in one")


def test_one_rank_alone_sends_nothing_and_frees_all_the_same(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    build, batch, loss, layers = TASKS["transformer"]
    expected, _ = alone(build, batch, loss, CLIP)
    with process_group("gloo", store=dist.HashStore()):
        model, traffic = build(), Traffic()
        zero = Stage3(units(model, layers(model), traffic), **ADAMW, clip=CLIP)
        for step in range(STEPS):
            loss(model, batch(step)).backward()
            zero.step()
            assert {p.numel() for p in model.parameters()} == {0}
        with zero.whole():
            found = weights(model)
        assert {p.numel() for p in model.parameters()} == {0}
    assert traffic.sent == 0
    assert_same(found, expected)


class Twice(torch.nn.Module):
    """Two outputs, so that two gradients arrive in the backward pass."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return x * self.weight, x + self.weight


def test_weights_that_are_whole_are_not_gathered_again(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    calls, original = [], zero3.ring_all_gather
    monkeypatch.setattr(zero3, "ring_all_gather", lambda *given: calls.append(original(*given)))
    with process_group("gloo", store=dist.HashStore()):
        model = Twice()
        zero = Stage3(units(model, [], Traffic()), lr=0.0)
        a, b = model(torch.tensor([3.0]))
        (a + b).sum().backward()
        norm = zero.step()
    assert norm.item() == 3 + 1
    assert len(calls) == 2  # before the forward and before the backward pass
