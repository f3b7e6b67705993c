"""Benchmarks: ratios measured in one run on this machine, never asserted. `python start.py bench`."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from minillm.attention import flash, naive
from minillm.measure import peak_memory
from minillm.study.paths import ROOT

METHODS: dict[str, Callable[..., Any]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "tiled": lambda q, k, v: flash.flash_attention(q, k, v, causal=True),
    "naive": lambda q, k, v: naive.attention(q, k, v, causal=True),
}
RUNS = 5


def timed(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, tuple[float, float]]:
    """Median processor and wall seconds of each call, the calls taking turns so that a busy machine slows all."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(runs + 1):  # the first round warms up and is dropped
        for name, call in calls.items():
            start = time.process_time(), time.perf_counter()
            call()
            seconds[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {
        name: (statistics.median(cpu for cpu, _ in found[1:]), statistics.median(wall for _, wall in found[1:]))
        for name, found in seconds.items()
    }


def interleaved(calls: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median processor seconds of each call."""
    return {name: processor for name, (processor, _) in timed(calls, runs).items()}


def forward_and_backward(attention: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """One training step of an attention alone."""
    attention(*inputs).sum().backward()


def attention_table() -> None:
    print(
        "Attention, one causal head, d = 64, float32, forward and backward. Time relative to SDPA; peak extra memory."
    )
    print(f"{'t':>6}  " + "  ".join(f"{name + ' time':>11} {'MiB':>8}" for name in METHODS))
    for t in (1024, 2048, 4096, 8192, 16384):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, t, 64).unbind())
        calls = {name: partial(forward_and_backward, method, q, k, v) for name, method in METHODS.items()}
        seconds = interleaved(calls, RUNS if t <= 4096 else 2)
        memory = {name: peak_memory(partial(method, q, k, v)) for name, method in METHODS.items()}
        row = [f"{seconds[name] / seconds['sdpa']:>10.2f}x {memory[name] / 2**20:>8.1f}" for name in METHODS]
        print(f"{t:>6}  " + "  ".join(row), flush=True)


def import_table() -> None:
    print("\nImport time of a module beyond `import torch`, median of 7 fresh processes (milliseconds):")
    for module in ("attention.naive", "attention.flash", "attention.dispatch", "architecture.transformer"):
        begin, end = "a = time.perf_counter()", "print((time.perf_counter() - a) * 1e3)"
        code = f"import time, torch; {begin}; import minillm.{module}; {end}"
        times = [
            float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(7)
        ]
        print(f"  minillm.{module:<32} {statistics.median(times):6.1f}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # waiting threads would count as processor time
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), processor time\n")
    attention_table()
    import_table()
    for tool in (["bench_bpe"], ["bench_model"], ["bench_model", "--threads", str(os.cpu_count() or 1)]):
        print(flush=True)
        subprocess.run([sys.executable, "-m", f"tools.{tool[0]}", *tool[1:]], cwd=ROOT, check=True)
    print("\nTraining recipes of 60 CPU seconds, in ten minutes: python tools/recipe.py")


if __name__ == "__main__":
    main()
