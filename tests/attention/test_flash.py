"""FlashAttention: equal to the naive way and to PyTorch, forward and backward, without ever holding the scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.attention import naive
from minillm.attention.dispatch import attention
from minillm.attention.flash import flash_attention, flash_backward, flash_forward

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def qkv(b=2, h=4, g=2, t=11, s=11, d=8, *, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, t, d), (b, g, s, d), (b, g, s, d)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


SHAPES = [
    dict(t=11, s=11, causal=False),
    dict(t=11, s=11, causal=True),
    dict(t=3, s=17, causal=True),  # decoding: a few new queries at the end of a cache
    dict(t=12, s=5, causal=True),  # the first queries are before every key: rows without keys
    dict(t=11, s=17, causal=True, offset=0),
    dict(t=11, s=17, causal=True, offset=-4),  # rows without keys at the top
    dict(t=11, s=17, causal=True, offset=3),
    dict(t=11, s=17, causal=True, offset=30),  # every key visible
    dict(t=1, s=1, causal=True),
]
BLOCKS = [(4, 4), (3, 5), (5, 3), (1, 1), (16, 32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_forward_equals_naive(shape, blocks):
    shape = dict(shape)
    mask = dict(causal=shape.pop("causal"), offset=shape.pop("offset", None))
    q, k, v = qkv(**shape)
    out, lse = flash_forward(q, k, v, **mask, block_q=blocks[0], block_k=blocks[1])
    torch.testing.assert_close(out, naive.attention(q, k, v, **mask))
    scores = q @ k.repeat_interleave(2, dim=1).mT / math.sqrt(q.shape[-1])
    if mask["causal"]:
        hidden = ~naive.visible(shape["t"], shape["s"], offset=mask["offset"])
        scores = scores.masked_fill(hidden, -math.inf)
    torch.testing.assert_close(lse, torch.logsumexp(scores, dim=-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_backward_equals_autograd_of_naive(shape, blocks):
    shape = dict(shape)
    mask = dict(causal=shape.pop("causal"), offset=shape.pop("offset", None))
    q, k, v = (x.requires_grad_() for x in qkv(**shape))
    expected_out = naive.attention(q, k, v, **mask)
    grad_out = torch.randn(expected_out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(expected_out, (q, k, v), grad_out)
    with torch.no_grad():
        tiles = dict(**mask, block_q=blocks[0], block_k=blocks[1])
        out, lse = flash_forward(q, k, v, **tiles)
        got = flash_backward(grad_out, q, k, v, out, lse, **tiles)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=2, g=1, t=5, s=6, d=3))
    assert torch.autograd.gradcheck(lambda *args: flash_attention(*args, causal=True), (q, k, v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa_forward_and_backward(causal, device):
    q, k, v = (x.requires_grad_() for x in qkv(t=300, s=300, d=32, dtype=torch.float32, device=device))
    ours = attention(q, k, v, causal=causal)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    grad_out = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, (q, k, v), grad_out),
        torch.autograd.grad(theirs, (q, k, v), grad_out),
        strict=True,
    )
    for a, b in pairs:
        # sums over 300 rows in another order, in float32: the gradients are of size 1, rounding of size 1e-6
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_closer_to_the_truth_than_the_naive_way(dtype):
    q, k, v = qkv(t=256, s=256, d=64, dtype=dtype)
    truth = naive.attention(q.double(), k.double(), v.double(), causal=True)
    out, lse = flash_forward(q, k, v, causal=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    ours = (out.double() - truth).abs().max()
    assert ours < (naive.attention(q, k, v, causal=True).double() - truth).abs().max()
    assert ours <= torch.finfo(dtype).eps * truth.abs().max()  # one rounding of the output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients(dtype):
    q, k, v = (x.requires_grad_() for x in qkv(t=64, s=64, d=16, dtype=dtype))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = torch.autograd.grad(flash_attention(q, k, v, causal=True), (q, k, v), grad_out)
    expected = torch.autograd.grad(naive.attention(*exact, causal=True), exact, grad_out.double())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        # the saved output is rounded to half precision and enters D = rowsum(dO * O): a few units of the largest entry
        assert (a.double() - b).abs().max() < 4 * torch.finfo(dtype).eps * b.abs().max()


def test_large_scores():
    q, k, v = qkv(t=20, s=20)
    for size in (1e3, 1e5):
        torch.testing.assert_close(
            flash_attention(q * size, k, v, causal=True), naive.attention(q * size, k, v, causal=True)
        )


def test_queries_without_keys_have_zero_output_and_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(t=9, s=4))
    out = flash_attention(q, k, v, causal=True)
    assert out[:, :, :5].abs().max() == 0
    out.sum().backward()
    assert q.grad[:, :, :5].abs().max() == 0
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


class LargestTensor(TorchDispatchMode):
    """Watches every operation and keeps the largest number of elements that any result holds."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def largest_tensor(function, t):
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=1, g=1, t=t, s=t, d=16, dtype=torch.float32))
    with LargestTensor() as watch:
        function(q, k, v).sum().backward()
    return watch.numel


def test_the_score_matrix_is_never_built():
    t = 2048
    assert largest_tensor(lambda *x: naive.attention(*x, causal=True), t) == t * t  # the watch sees what it should
    assert largest_tensor(lambda *x: flash_attention(*x, causal=True), t) <= 256 * 512  # one tile


def test_nothing_of_size_t_by_s_is_saved_for_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in qkv(b=1, h=1, g=1, t=512, s=512, d=16, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        flash_attention(q, k, v, causal=True)
    assert sum(saved) == 4 * 512 * 16 + 512  # q, k, v, the output, and one log-sum-exp a row


def test_hidden_tiles_are_skipped(monkeypatch):
    from minillm.attention import flash

    seen = []
    step = flash.online_softmax_step
    monkeypatch.setattr(flash, "online_softmax_step", lambda *a: seen.append(a[1].shape[-2:]) or step(*a))
    q, k, v = qkv(b=1, h=1, g=1, t=64, s=64)
    flash_forward(q, k, v, causal=True, block_q=16, block_k=16)
    assert len(seen) == 4 + 3 + 2 + 1  # the lower triangle of a 4 x 4 grid of tiles, not 16


def test_query_heads_read_their_own_group():
    # v of group 0 is 0 and of group 1 is 1: heads 0, 1 must return 0 and heads 2, 3 must return 1
    q, k, v = qkv(b=1, h=4, g=2)
    v = torch.stack([torch.zeros_like(v[:, 0]), torch.ones_like(v[:, 0])], dim=1)
    assert flash_attention(q, k, v)[0, :, 0, 0].round(decimals=9).tolist() == [0, 0, 1, 1]


def test_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    assert not q.is_contiguous()
    torch.testing.assert_close(flash_attention(q, k, v, causal=True), naive.attention(q, k, v, causal=True))


def test_inputs_are_left_alone():
    inputs = qkv()
    before = [x.clone() for x in inputs]
    flash_attention(*inputs, causal=True)
    for now, then in zip(inputs, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        ([(2, 4, 8), (2, 4, 8), (2, 4, 8)], torch.float32, r"b h t d .*got q \(2, 4, 8\)"),
        ([(1, 4, 3, 8), (1, 4, 3, 8), (1, 4, 5, 8)], torch.float32, "k, v alike"),
        ([(1, 4, 3, 8), (1, 4, 3, 4), (1, 4, 3, 4)], torch.float32, "same batch and head size"),
        ([(2, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)], torch.float32, "same batch and head size"),
        ([(1, 4, 3, 8), (1, 3, 3, 8), (1, 3, 3, 8)], torch.float32, "got h=4, g=3"),
        ([(1, 4, 3, 8), (1, 4, 3, 8), (1, 4, 3, 8)], torch.int64, "one floating dtype, got torch.int64"),
    ],
)
def test_refusals(shapes, dtype, message):
    q, k, v = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        flash_attention(q, k, v)
