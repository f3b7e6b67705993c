"""The comparison of the notebook: what plain data parallelism holds and sends here, and that all weights are the same.

The stages themselves are tested in test_zero and test_zero3, with uneven sizes and by more counts.
"""

from functools import cache

import pytest

from minillm.distributed.budget import zero_bytes, zero_sent
from minillm.distributed.launch import launch
from minillm.distributed.measure_zero import alone, compare, largest_difference

WORLD = 3
NORM = 4 * 2 * (WORLD - 1)  # bytes of the all-reduce of a norm: 4 a message
RUNS = (0, 1, 2, 3, "DDP", "ZeroRedundancyOptimizer", "FSDP2")


@cache
def results():
    return launch(compare, WORLD, backend="gloo", timeout=100.0)


@pytest.mark.parametrize("name", RUNS)
def test_all_end_with_the_weights_of_one_process(name):
    expected = alone()
    for rank in results():
        # float64: sums in another order differ by 1e-16, which Adam's division by a small size makes larger
        assert largest_difference(rank[name].weights, expected) < 1e-12
        assert set(rank[name].weights) == set(expected)
    assert largest_difference(alone(steps=0), expected) > 0.01


@pytest.mark.parametrize("stage", range(4))
def test_bytes_held_are_those_of_the_calculator(stage):
    for rank in results():
        run = rank[stage]
        expected = zero_bytes(stage, run.size, WORLD)
        for found, one in zip(run.held.values(), expected, strict=True):
            assert one <= found <= 1.001 * one + 12  # zeros that fill up shards
        assert run.peak >= sum(run.held.values())


def test_plain_data_parallelism_holds_16_bytes_a_parameter():
    for rank in results():
        run = rank[0]
        assert run.held == {"parameters": 2 * run.size, "gradients": 2 * run.size, "optimizer": 12 * run.size}


@pytest.mark.parametrize("stage", range(4))
def test_bytes_sent_are_those_of_the_calculator(stage):
    for rank in results():
        run = rank[stage]
        expected = 2 * zero_sent(stage, run.size, WORLD)
        sent = run.sent - (NORM if stage else 0)  # whole gradients need no all-reduce for their norm
        # Stage 3: the last unit (embedding, final norm) stays whole from the forward to the backward pass's end
        assert expected * (1 if stage < 3 else 0.9) <= sent <= 1.001 * expected + 48


def test_what_pytorch_holds():
    for rank in results():
        size = rank[0].size
        assert (rank["DDP"].parameters, rank["DDP"].states) == (size, 2 * size)
        assert rank["ZeroRedundancyOptimizer"].parameters == size
        assert rank["FSDP2"].parameters < 0.4 * size
        assert rank["FSDP2"].states == 2 * rank["FSDP2"].parameters
    for name in ("ZeroRedundancyOptimizer", "FSDP2"):
        assert sum(rank[name].states for rank in results()) == 2 * size
