"""Measured, not estimated: the bytes a call allocates and the floating-point operations it does."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what native code writes to standard error: this profiler prints a line at each start and stop."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_memory(function: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator held above the start at any moment of the call, its result included.

    Every allocation counts, also the work space inside a fused kernel. For tensors on a GPU the device's own counter
    answers.

    >>> peak_memory(lambda: torch.zeros(1000) + torch.zeros(1000))       # two operands and the sum, 4 bytes each
    12000
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = function()  # kept until the peak is read
        torch.cuda.synchronize()
        on_gpu = torch.cuda.max_memory_allocated() - start
        del result
        if on_gpu:
            return on_gpu
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.__enter__()
    try:
        result = function()
    finally:
        with _silent_stderr():
            profiler.__exit__(None, None, None)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[union-attr]
            peak = max(peak, held)
    return peak


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products (and fused attention) in the call; an addition counts as one.

    >>> flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))       # 2 * 2 * 3 * 5
    60
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
