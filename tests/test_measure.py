"""The meters: right on cases that can be counted by hand."""

import sys

import torch

from minillm.measure import flops, peak_memory


def test_peak_counts_what_lives_at_the_same_time():
    def function():
        a = torch.zeros(1000)  # 4,000
        b = torch.zeros(2000)  # 12,000 in all
        del a  # 8,000
        c = torch.zeros(500)  # 10,000
        return b, c

    assert peak_memory(function) == 12_000


def test_freed_memory_of_the_past_does_not_count():
    kept = torch.zeros(10_000)
    assert peak_memory(lambda: kept.add_(1)) < 1000  # in place: nothing but the scalar


def test_peak_is_measured_when_the_call_raises_nothing_is_left_running():
    def fails():
        raise KeyError("mine")

    try:
        peak_memory(fails)
    except KeyError:
        pass
    else:
        raise AssertionError("the error was swallowed")
    assert peak_memory(lambda: torch.zeros(1000)) == 4000


def test_stderr_is_back_afterwards(capfd):
    peak_memory(lambda: torch.zeros(1))
    print("still here", file=sys.stderr, flush=True)
    assert capfd.readouterr().err == "still here\n"


def test_flops_of_a_product():
    assert flops(lambda: torch.ones(4, 7) @ torch.ones(7, 3)) == 2 * 4 * 7 * 3
