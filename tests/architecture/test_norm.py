"""Normalisation: equal to production, blind to what it must be blind to, safe in half precision."""

import math

import jaxtyping
import pytest
import torch
from torch import nn

from minillm.architecture.norm import layer_norm, layer_norm_formula, rms_norm, rms_norm_formula

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RMS = [rms_norm, rms_norm_formula]
LAYER = [layer_norm, layer_norm_formula]


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("norm", RMS)
def test_rms_norm_by_hand(norm):
    # (1, 7): mean square 25, root 5: (0.2, 1.4); times (10, 100). The second token has eps as large as its mean square.
    x, weight = torch.tensor([[1.0, 7.0], [1.0, 1.0]]), torch.tensor([10.0, 100.0])
    torch.testing.assert_close(norm(x, weight, eps=0.0)[0], torch.tensor([2.0, 140.0]))
    torch.testing.assert_close(norm(x, weight, eps=1.0)[1], torch.tensor([10.0, 100.0]) / math.sqrt(2))


@pytest.mark.parametrize("norm", LAYER)
def test_layer_norm_by_hand(norm):
    # (1, 7): mean 4, deviations (-3, 3), variance 9 (over c = 2, not 1): (-1, 1); times (10, 100) plus (1, 2)
    x, weight, bias = torch.tensor([[1.0, 7.0]]), torch.tensor([10.0, 100.0]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(norm(x, weight, bias, eps=0.0), torch.tensor([[-9.0, 102.0]]))
    torch.testing.assert_close(norm(x, weight, eps=7.0), torch.tensor([[-30.0, 300.0]]) / 4)  # sqrt(9 + 7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fused_equals_formula_forward_and_backward(dtype, device):
    # half precision: results rounded once, gradients of the weight summed over 15 tokens in another order
    close = {} if dtype.itemsize > 2 else dict(rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    x, w, b = (randn(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate([(3, 5, 16), (16,), (16,)]))
    grad = randn(3, 5, 16, seed=3, dtype=dtype, device=device)
    for (fast, slow), inputs in ((RMS, (x, w)), (LAYER, (x, w, b))):
        inputs = [y.clone().requires_grad_() for y in inputs]
        outs = [norm(*inputs) for norm in (fast, slow)]
        assert outs[0].dtype == outs[1].dtype == dtype
        torch.testing.assert_close(*outs, **close)
        for pair in zip(*(torch.autograd.grad(out, inputs, grad) for out in outs), strict=True):
            torch.testing.assert_close(*pair, **close)


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
def test_gradcheck(norm):
    assert torch.autograd.gradcheck(norm, (randn(2, 3, 4).requires_grad_(), randn(4, seed=1).requires_grad_()))


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
def test_the_size_of_the_input_is_gone(norm):
    x, weight = randn(3, 8), randn(8, seed=1)
    torch.testing.assert_close(norm(1000 * x, weight, eps=0.0), norm(x, weight, eps=0.0))
    # so the gradient has no part along the input: growing the input changes nothing
    x.requires_grad_()
    (norm(x, weight, eps=0.0) * randn(3, 8, seed=2)).sum().backward()
    torch.testing.assert_close((x.grad * x).sum(dim=-1), torch.zeros(3).double(), rtol=0, atol=1e-12)


def test_only_layer_norm_is_blind_to_a_shift():
    x, weight = randn(3, 8), torch.ones(8).double()
    for norm in LAYER:
        torch.testing.assert_close(norm(x + 5, weight), norm(x, weight))
    for norm in RMS:
        assert (norm(x + 5, weight) - norm(x, weight)).abs().max() > 0.1


def test_layer_norm_is_rms_norm_of_the_centred_input():
    x, weight = randn(3, 8), randn(8, seed=1)
    centred = x - x.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(layer_norm(x, weight, eps=1e-6), rms_norm(centred, weight, eps=1e-6))


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
def test_every_token_alone(norm):
    x, weight = randn(4, 8), randn(8, seed=1)
    torch.testing.assert_close(norm(x, weight)[2], norm(x[2], weight))


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
def test_a_token_of_zeros_stays_finite(norm):
    x = torch.zeros(2, 8, requires_grad=True)
    out = norm(x, torch.ones(8))
    assert out.abs().max() == 0
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_not_of_half_precision(norm, dtype):
    # 300^2 = 90,000 is inf in float16, and a bfloat16 sum of 4,096 ones stops at 256
    x = torch.cat([torch.full((1, 2048), 300.0), torch.full((1, 2048), -300.0)], dim=-1).to(dtype)
    out = norm(x, torch.ones(4096, dtype=dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, x.sign())


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(norm, dtype):
    x, weight = randn(64, 256, dtype=dtype), randn(256, seed=1, dtype=dtype)
    exact = norm(x.double(), weight.double())
    # half a unit of the last place is one rounding; float32 statistics add a little before it
    torch.testing.assert_close(norm(x, weight).double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("norm", [*RMS, *LAYER])
def test_float32_weights_on_half_precision_inputs(norm):
    # as under autocast: no warning (an error in this run) and the dtype of x
    x, weight = randn(3, 8, dtype=torch.bfloat16), randn(8, seed=1, dtype=torch.float32)
    out = norm(x, weight)
    assert out.dtype == torch.bfloat16
    # the fused call rounds the weight as well: two roundings
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(out.double(), norm(x.double(), weight.double()), rtol=1.01 * eps, atol=1e-6)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(1), torch.ones(2, 8)], ids=str)
def test_refuses_a_weight_of_another_width(norm, weight):
    with pytest.raises(ValueError, match=r"one number a channel, got \(.*\) for x \(3, 8\)"):
        norm(torch.ones(3, 8), weight)


@pytest.mark.parametrize("norm", LAYER)
def test_equals_pytorch_layer_norm(norm):
    theirs = nn.LayerNorm(8, eps=1e-3).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    x = randn(2, 3, 8)
    torch.testing.assert_close(norm(x, theirs.weight, theirs.bias, eps=1e-3), theirs(x))


@pytest.mark.parametrize("norm", RMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_llama(norm, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    nn.init.normal_(theirs.weight)
    x = randn(2, 9, 64, dtype=dtype)
    # in bfloat16 theirs is rounded before the weight and after it, ours once
    close = {} if dtype == torch.float32 else dict(rtol=1.5 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(norm(x, theirs.weight, eps=1e-5), theirs(x), **close)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_compiles_to_one_graph(norm):
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    x, weight = randn(2, 3, 8), randn(8, seed=1)
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), norm(x, weight))
