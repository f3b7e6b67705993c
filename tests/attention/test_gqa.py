"""Grouped-query attention: query heads share key/value heads, and the shared heads are never copied."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.attention import naive
from minillm.attention.gqa import cache_bytes, grouped_attention, pool_heads, repeat_heads

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def qkv(b=2, h=6, g=2, t=5, s=5, d=8, *, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def test_by_hand():
    # d = 1. Group 0: keys 0 and ln 3, values 1 and 5; group 1: equal keys, values 10 and 30. Queries are 1, 0, 1, 0.
    # Head 0: weights 1/4, 3/4: 4. Head 1: equal scores: 3. Heads 2 and 3: 20.
    q = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 4, 1, 1)
    k = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]]).view(1, 2, 2, 1)
    v = torch.tensor([[1.0, 5.0], [10.0, 30.0]]).view(1, 2, 2, 1)
    torch.testing.assert_close(grouped_attention(q, k, v).flatten(), torch.tensor([4.0, 3.0, 20.0, 20.0]))


@pytest.mark.parametrize("g", [1, 2, 3, 6], ids=["multi-query", "2 groups", "3 groups", "multi-head"])
@pytest.mark.parametrize(("t", "s", "causal"), [(5, 5, False), (5, 5, True), (3, 9, False), (3, 9, True), (1, 9, True)])
def test_equals_one_attention_a_head(g, t, s, causal):
    q, k, v = qkv(g=g, t=t, s=s)
    out = grouped_attention(q, k, v, causal=causal)
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t) if causal else None
    for head in range(6):
        group = head // (6 // g)
        expected = F.scaled_dot_product_attention(q[:, head], k[:, group], v[:, group], attn_mask=mask)
        torch.testing.assert_close(out[:, head], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa_forward_and_backward(causal, device):
    q, k, v = (x.requires_grad_() for x in qkv(t=40, s=40, dtype=torch.float32, device=device))
    ours = grouped_attention(q, k, v, causal=causal)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (ours, theirs)), strict=True):
        # float32 sums over 40 keys and 3 heads in another order: entries of size 1, rounding of size 1e-6
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=4, t=2, s=3, d=2))
    assert torch.autograd.gradcheck(lambda *args: grouped_attention(*args, causal=True), (q, k, v))


def test_gradient_of_a_shared_head_is_the_sum_over_its_group():
    q, k, v = qkv()
    shared = v.clone().requires_grad_()
    grouped_attention(q, k, shared).sum().backward()
    own = repeat_heads(v, 3).requires_grad_()
    grouped_attention(q, repeat_heads(k, 3), own).sum().backward()
    torch.testing.assert_close(shared.grad, own.grad.unflatten(1, (2, 3)).sum(dim=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    q, k, v = qkv(t=64, s=64, d=64, dtype=dtype)
    out = grouped_attention(q, k, v, causal=True)
    exact = grouped_attention(q.double(), k.double(), v.double(), causal=True)
    assert out.dtype == dtype
    # scores of size 4, weights and output are each rounded once: a score off by 2 eps changes a weight by 2 eps
    assert (out.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * v.abs().max()


def test_large_scores():
    q, k, v = qkv()
    expected = naive.attention(q * 1e5, k, v, causal=True)
    torch.testing.assert_close(grouped_attention(q * 1e5, k, v, causal=True), expected)


def test_a_query_without_keys_gets_zeros_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(t=5, s=3))
    out = grouped_attention(q, k, v, causal=True)
    torch.testing.assert_close(out, naive.attention(q, k, v, causal=True))
    assert out[:, :, :2].abs().max() == 0
    out.sum().backward()
    assert q.grad[:, :, :2].abs().max() == 0
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


class LargestNewTensor(TorchDispatchMode):
    """Watches every operation and keeps the size of the largest tensor that is not a view of another."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def largest(function, q, k, v):
    with LargestNewTensor() as watch:
        function(q, k, v)
    return watch.numel


def test_decoding_makes_no_tensor_of_the_size_of_repeated_heads():
    h, g, s, d = 8, 2, 512, 32
    q, k, v = qkv(b=1, h=h, g=g, t=1, s=s, d=d, dtype=torch.float32)
    repeated = lambda q, k, v: naive.attention(q, repeat_heads(k, h // g), repeat_heads(v, h // g))  # noqa: E731
    assert largest(repeated, q, k, v) == h * s * d  # the watch sees what it should
    assert largest(grouped_attention, q, k, v) == h * s  # one score for each head and key, nothing larger


def test_repeated_heads_give_the_same_attention():
    q, k, v = qkv()
    torch.testing.assert_close(naive.attention(q, repeat_heads(k, 3), repeat_heads(v, 3)), grouped_attention(q, k, v))
    # in a row, not in turn: heads 0, 1, 2 read group 0
    assert torch.equal(repeat_heads(k, 3), k.repeat_interleave(3, dim=1))
    wrong = naive.attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))
    assert (wrong - grouped_attention(q, k, v)).abs().max() > 0.1


def test_repeating_copies_but_expanding_does_not():
    _, k, _ = qkv()
    assert repeat_heads(k, 3).untyped_storage().nbytes() == 3 * k.untyped_storage().nbytes()
    assert k[:, :, None].expand(2, 2, 3, 5, 8).untyped_storage().nbytes() == k.untyped_storage().nbytes()


def test_pooling_is_the_mean_of_the_heads_projections():
    w = torch.randn(6 * 4, 10, dtype=torch.float64)
    x = torch.randn(10, dtype=torch.float64)
    keys = (w @ x).view(6, 4)
    pooled = (pool_heads(w, 6, 2) @ x).view(2, 4)
    torch.testing.assert_close(pooled, torch.stack([keys[:3].mean(dim=0), keys[3:].mean(dim=0)]))
    assert torch.equal(pool_heads(w, 6, 6), w)


def test_pooling_equal_heads_changes_nothing():
    one = torch.randn(2, 4, 10, dtype=torch.float64)
    w = one.repeat_interleave(3, dim=0).flatten(0, 1)  # 6 heads, equal inside their group
    torch.testing.assert_close(pool_heads(w, 6, 2), one.flatten(0, 1))


def test_cache_bytes_of_models():
    # KiB a token in 16 bits: Llama 2 7B (32 layers, 32 heads of 128), Llama 3 8B (8 heads), Llama 2 70B (80 layers, 8)
    kib = [cache_bytes(layers=n, kv_heads=g, head_size=128, tokens=1) / 1024 for n, g in ((32, 32), (32, 8), (80, 8))]
    assert kib == [512, 128, 320]


def test_cache_bytes_are_those_of_the_tensors():
    cache = torch.zeros(2, 3, 4, 2, 7, 8, dtype=torch.float32)  # k and v, layers, batch, heads, tokens, channels
    assert cache.nbytes == cache_bytes(layers=3, kv_heads=2, head_size=8, tokens=7, batch=4, bytes_per_value=4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grouped_attention(*qkv(h=6, g=4)), "multiple of the key/value heads g, got h=6, g=4"),
        (lambda: grouped_attention(qkv()[0], qkv()[1], qkv(s=4)[2]), r"k, v alike as b g s d"),
        (lambda: pool_heads(torch.ones(12, 4), 6, 4), "got g=4, h=6, 12 rows"),
        (lambda: pool_heads(torch.ones(10, 4), 4, 2), "got g=2, h=4, 10 rows"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_equals_transformers_repeat_kv():
    from transformers.models.llama.modeling_llama import repeat_kv

    _, k, _ = qkv()
    assert torch.equal(repeat_heads(k, 3), repeat_kv(k, 3))


def test_compiles_to_one_graph():
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    q, k, v = qkv(dtype=torch.float32)
    compiled = torch.compile(grouped_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, causal=True), grouped_attention(q, k, v, causal=True))
