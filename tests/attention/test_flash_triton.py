"""FlashAttention in Triton: compiled where there is a GPU, otherwise run by Triton's interpreter on the CPU."""

import importlib
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import minillm
from minillm.attention import naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")

if HAS_TRITON:
    if DEVICE == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton was imported before its interpreter could be chosen; import it in the test")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported; without a GPU nobody else runs Triton
    import triton
    import triton.language as tl

    from minillm.attention import flash_triton

    @triton.jit
    def positions_kernel(out, strides, ROWS: tl.constexpr):
        start, head, batch = flash_triton._program(ROWS)
        at, _ = flash_triton._tile(strides, batch, head, start, 2 * ROWS, ROWS, ROWS, ROWS)
        corner = ((batch * 2 + head) * 2 * ROWS + start) * ROWS
        cell = tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tl.store(out + corner + cell, at)


MASKS = [
    dict(t=33, s=33, causal=False),
    dict(t=40, s=56, causal=False),
    dict(t=48, s=48, causal=True),  # whole tiles
    dict(t=49, s=49, causal=True),  # one row and one key more
    dict(t=3, s=37, causal=True),  # decoding: a few new queries at the end of a cache
    dict(t=37, s=10, causal=True),  # the first queries are before every key: rows without keys
    dict(t=35, s=50, causal=True, offset=0),
    dict(t=35, s=50, causal=True, offset=-18),  # rows without keys, and keys that no query sees
    dict(t=35, s=50, causal=True, offset=5),
    dict(t=35, s=50, causal=True, offset=2**40),  # every key visible
    dict(t=35, s=50, causal=True, offset=-(2**40)),  # none
    dict(t=1, s=1, causal=True),
]
TILES = [(16, 32), (32, 16)]


def tensors(b=1, h=2, g=1, t=33, s=33, d=16, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d), (b, h, t, d)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return q, k, v, grad


def oracle(q, k, v, grad, *, causal=False, offset=None):
    """Output, log-sum-exp and the three gradients by the formula, in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = naive.attention(q, k, v, causal=causal, offset=offset)
    grads = torch.autograd.grad(out, (q, k, v), grad.double())
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(q.shape[-1])
    if causal:
        hidden = ~naive.visible(q.shape[2], k.shape[2], offset=offset, device=q.device)
        scores = scores.masked_fill(hidden, -math.inf)
    return out.detach(), scores.detach().logsumexp(dim=-1), *grads


def ours(q, k, v, grad, **mask):
    out, lse = flash_triton.flash_forward(q, k, v, **mask)
    return out, lse, *flash_triton.flash_backward(grad, q, k, v, out, lse, **mask)


def assert_agree(got, expected, *, units=0.0):
    """Default float32 tolerances; `units` allows that many roundings, in the result's dtype, of its largest entry."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        rtol, atol = 1.3e-6, 1e-5
        if name != "lse":
            atol = max(atol, units * torch.finfo(a.dtype).eps * b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def use_tiles(monkeypatch, tiles):
    monkeypatch.setattr(flash_triton, "tile_sizes", lambda d, dtype, *, backward: (*tiles, 4, 1))


@needs_triton
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_equals_the_formula(monkeypatch, shape, tiles):
    use_tiles(monkeypatch, tiles)
    shape = dict(shape)
    mask = dict(causal=shape.pop("causal"), offset=shape.pop("offset", None))
    x = tensors(**shape)
    assert_agree(ours(*x, **mask), oracle(*x, **mask))


@needs_triton
@pytest.mark.parametrize("d", [5, 16, 32, 48, 64])
def test_head_sizes(monkeypatch, d):
    use_tiles(monkeypatch, (16, 32))
    x = tensors(t=20, s=36, d=d)
    assert_agree(ours(*x, causal=True), oracle(*x, causal=True))


@needs_triton
@pytest.mark.parametrize(("h", "g"), [(6, 2), (4, 1), (3, 3)])
def test_query_heads_share_key_heads(monkeypatch, h, g):
    use_tiles(monkeypatch, (16, 32))
    x = tensors(b=2, h=h, g=g, t=17, s=18)
    assert_agree(ours(*x, causal=True), oracle(*x, causal=True))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_the_tiles_that_a_gpu_uses(dtype, d):
    t, s = (150, 200) if dtype != torch.float32 else (40, 50)  # more than one tile of each kind
    q, k, v, grad = tensors(h=1, t=t, s=s, d=d, dtype=dtype)
    got = ours(q, k, v, grad, causal=True)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    # half precision rounds the weights, dS, the saved output and the result; the interpreter cuts bfloat16 off instead
    # of rounding it. The log-sum-exp never leaves float32 and keeps its tolerances.
    assert_agree(got, oracle(q, k, v, grad, causal=True), units=0 if dtype == torch.float32 else 2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_float32(dtype):
    q, k, v, _ = tensors(h=1, t=1, s=2560, d=16, dtype=dtype)
    v = torch.full_like(v, 0.1008)
    out, lse = flash_triton.flash_forward(torch.zeros_like(q), k, v)
    # the mean of equal values is that value, but for one rounding; 40 tiles added in half precision would drift
    torch.testing.assert_close(out, v[:, :, :1], rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(2560)))


@needs_triton
def test_large_scores(monkeypatch):
    use_tiles(monkeypatch, (16, 32))
    q, k, v, grad = tensors(t=20, s=70)
    q = q * 1e3
    expected = oracle(q, k, v, grad)
    for a, b in zip(ours(q, k, v, grad), expected, strict=True):
        # float32 holds scores of 5,000 to 2**-12, and a weight is off by that share of itself
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@needs_triton
def test_queries_without_keys_have_zero_output_and_gradient(monkeypatch):
    use_tiles(monkeypatch, (16, 16))
    x = tensors(t=40, s=20)  # the first 20 queries: a whole tile and a part of one
    out, lse, dq, _, _ = ours(*x, causal=True)
    assert torch.equal(out[:, :, :20], torch.zeros_like(out[:, :, :20]))
    assert torch.equal(dq[:, :, :20], torch.zeros_like(dq[:, :, :20]))
    assert torch.equal(lse[:, :, :20], torch.full_like(lse[:, :, :20], -math.inf))
    assert torch.isfinite(lse[:, :, 20:]).all()


@needs_triton
@pytest.mark.parametrize("shape", [dict(t=0), dict(s=0), dict(b=0)], ids=str)
def test_empty_inputs(shape):
    q, k, v, grad = tensors(**shape)
    out, lse, dq, dk, dv = ours(q, k, v, grad)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert all(not x.any() for x in (out, dq, dk, dv))


@needs_triton
def test_hidden_tiles_are_skipped(monkeypatch):
    use_tiles(monkeypatch, (16, 16))
    q, k, v, grad = tensors(h=1, t=64, s=64)
    out, lse = flash_triton.flash_forward(q, k, v, causal=True)
    late = v.clone()
    late[:, :, 48:] = math.nan  # 0 * nan is nan: a tile of weights 0 would show
    assert torch.isfinite(flash_triton.flash_forward(q, k, late, causal=True)[0][:, :, :48]).all()
    dq, _, _ = flash_triton.flash_backward(grad, q, k, late, out, lse, causal=True)
    assert torch.isfinite(dq[:, :, :48]).all()
    early = grad.clone()
    early[:, :, :16] = math.nan
    _, dk, dv = flash_triton.flash_backward(early, q, k, v, out, lse, causal=True)
    assert torch.isfinite(dk[:, :, 16:]).all()
    assert torch.isfinite(dv[:, :, 16:]).all()


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_autograd_equals_sdpa(monkeypatch, causal):
    use_tiles(monkeypatch, (32, 32))
    q, k, v, grad = tensors(h=4, g=2, t=50, s=50, d=32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_triton.flash_attention(*leaves, causal=causal)
    got = out, *torch.autograd.grad(out, leaves, grad)
    leaves = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    expected = out, *torch.autograd.grad(out, leaves, grad.cpu())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@needs_triton
def test_strided_inputs(monkeypatch):
    use_tiles(monkeypatch, (16, 32))
    b, t, h, d = 2, 20, 2, 24
    packed = tensors(b=b, h=t, t=3, d=h * 2 * d)[0].view(b, t, 3, h, 2 * d)  # one projection, b t (q, k or v) h 2d
    q, k, v = packed[..., ::2].permute(2, 0, 3, 1, 4)  # every second column: no stride is the usual one
    assert not any(x.is_contiguous() for x in (q, k, v))
    results = []
    for leaves in ([x.detach().requires_grad_() for x in (q, k, v)], [x.contiguous() for x in (q, k, v)]):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = flash_triton.flash_attention(*leaves, causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))  # the gradient of a sum has strides 0
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c)
    grad = torch.ones(b, h, t, d, device=DEVICE)
    out, _, dq, dk, dv = oracle(q, k, v, grad, causal=True)
    for a, c in zip(results[0], (out, dq, dk, dv), strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1.3e-6, atol=1e-5)


@needs_triton
def test_positions_go_beyond_32_bits():
    strides = 2**30, 2**29, 2**28, 2**27  # each fits, four of them do not
    out = torch.empty(3, 2, 32, 16, dtype=torch.int64, device=DEVICE)
    positions_kernel[(2, 2, 3)](out, strides, ROWS=16)
    index = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in out.shape), indexing="ij")
    assert torch.equal(out, sum(i * stride for i, stride in zip(index, strides, strict=True)))


class LargestTensor(TorchDispatchMode):
    """Keeps the size in bytes of the largest result of any operation."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel() * x.element_size())
        return result


@needs_triton
def test_the_score_matrix_is_never_built():
    t, d = 200, 16
    leaves = [x.requires_grad_() for x in tensors(h=1, t=t, s=t, d=d, dtype=torch.float16)[:3]]
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with hooks, LargestTensor() as watch:
        flash_triton.flash_attention(*leaves, causal=True).sum().backward()
    assert watch.size == 2 * t * d  # bytes: as large as the inputs, not t * t
    assert sum(saved) == 4 * t * d + t  # q, k, v, the output, one log-sum-exp a row


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program at a time; only a GPU can differ")
def test_backward_repeats_bit_for_bit():
    x = tensors(b=4, h=16, g=2, t=1000, s=1000, d=64, dtype=torch.bfloat16)
    first, second = ours(*x, causal=True), ours(*x, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(1, 4, 3, 8), (1, 3, 3, 8)], torch.float32, "got h=4, g=3"),
        ([(1, 1, 3, 8), (1, 1, 3, 8)], torch.float64, r"float32, float16 or bfloat16, got torch\.float64"),
        ([(1, 1, 3, 257), (1, 1, 3, 257)], torch.float32, "head sizes 1 to 256, got 257"),
    ],
)
def test_refusals(shapes, dtype, message):
    q, k = (torch.zeros(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        flash_triton.flash_attention(q, k, k)


@needs_triton
def test_refuses_two_devices():
    q = torch.zeros(1, 1, 3, 8, device=DEVICE)
    k = torch.zeros(1, 1, 3, 8, device="meta")
    with pytest.raises(ValueError, match=r"q, k and v need one device, got .*, meta, meta"):
        flash_triton.flash_attention(q, k, k)


@needs_triton
def test_refuses_a_second_derivative():
    q, k, v, _ = (x.requires_grad_() for x in tensors(h=1, t=4, s=4))
    out = flash_triton.flash_attention(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_without_triton_the_import_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "minillm.attention.flash_triton", raising=False)
    with pytest.raises(ImportError, match=r"pip install -c requirements\.lock -e \.\[triton\]"):
        importlib.import_module("minillm.attention.flash_triton")


def run_compiled(*args, **environment):
    """Run Python in a process where Triton compiles, against the same copy of the package as this one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(minillm.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-W", "error", *args], env=env | environment, capture_output=True, text=True, timeout=300
    )


@needs_triton
def test_refuses_cpu_tensors_without_the_interpreter():
    code = (
        "import torch; from minillm.attention import flash_triton as f; f.flash_attention(*torch.ones(3, 1, 1, 4, 8))"
    )
    result = run_compiled("-c", code)
    assert "ValueError: flash_triton runs on CUDA tensors, got cpu; call flash" in result.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_a_gpu(dtype, request, tmp_path):
    """Ahead of time, exactly as a call would compile them; no GPU is needed."""
    cache = getattr(request.config, "cache", None)  # compiling takes a second a kernel: keep the results
    folder = tmp_path if cache is None else cache.mkdir("triton")
    script = Path(__file__).with_name("triton_cases.py")
    result = run_compiled(str(script), dtype, TRITON_CACHE_DIR=str(folder))
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {k["kernel"] for k in kernels} == {"_forward_kernel", "_dq_kernel", "_dkv_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= 99 * 1024, kernel  # bytes; the least of Ada (99), A100 (163) and H100 (227 KiB)
        assert not kernel["atomics"], kernel  # sums in an order that changes from run to run
        assert not kernel["float64"], kernel  # a constant that was not narrowed
        assert kernel["tensor cores"] == (dtype == "bfloat16"), kernel
