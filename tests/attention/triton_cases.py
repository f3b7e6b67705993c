"""Compiles the kernels of `flash_triton` without a GPU, as its functions would launch them; prints JSON lines.

    python triton_cases.py DTYPE

Calls `flash_forward` and `flash_backward` on CPU tensors; a stand-in for the driver says which GPU to compile for,
and the launch itself is left out.
"""

import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minillm.attention import flash_triton

H100, A100 = 90, 80
CASES = {  # GPU, head size, h, g, t, s, causal; Triton compiles a size of 1 as a constant
    "bfloat16": [
        (H100, 64, 4, 2, 100, 130, True),
        (H100, 64, 1, 1, 1, 1, True),
        (H100, 128, 4, 4, 100, 130, False),
        (A100, 128, 4, 2, 100, 130, True),
    ],
    "float32": [(H100, 64, 4, 2, 100, 130, True), (H100, 128, 4, 4, 100, 130, False)],
}


class Device:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # Triton keeps one compiled kernel a device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


class CompileOnly:
    """Takes a kernel's place: `kernel[grid](...)` compiles for these arguments and reports."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **settings):
            compiled = self.kernel.warmup(*args, grid=grid, **settings)
            ptx = compiled.asm["ptx"]
            assert compiled.asm["cubin"]
            report = {
                "kernel": self.kernel.__name__,
                "gpu": driver.active.get_current_device(),
                "head size": settings["D"],
                "shared": compiled.metadata.shared,
                "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
                "float64": re.findall(r"\S+\.f64", ptx),
                "tensor cores": bool(re.search(r"\bw?g?mma\.(?:mma_async\.)?sync", ptx)),
            }
            print(json.dumps(report))

        return launch


def main(dtype):
    for name in ("_forward_kernel", "_dq_kernel", "_dkv_kernel"):
        setattr(flash_triton, name, CompileOnly(getattr(flash_triton, name)))
    flash_triton._check = lambda q, k, v: None  # it would refuse CPU tensors
    for capability, d, h, g, t, s, causal in CASES[dtype]:
        driver.set_active(Device(capability))
        q, k = (torch.zeros(2, heads, n, d, dtype=getattr(torch, dtype)) for heads, n in ((h, t), (g, s)))
        out, lse = flash_triton.flash_forward(q, k, k, causal=causal)
        flash_triton.flash_backward(out, q, k, k, out, lse, causal=causal)


if __name__ == "__main__":
    main(sys.argv[1])
