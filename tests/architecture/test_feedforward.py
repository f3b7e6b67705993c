"""The feed-forward layer: its formulas, what the activation is for, its parameters, equal to production."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.architecture.feedforward import gelu_feedforward, matched_hidden, relu_feedforward, swiglu, swiglu_fused

PLAIN = [relu_feedforward, gelu_feedforward]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(c=6, f=10, dtype=torch.float64):
    """gate, up, down."""
    return [randn(*shape, seed=i, dtype=dtype) / 3 for i, shape in enumerate([(f, c), (f, c), (c, f)])]


def test_relu_by_hand():
    # x = (1, 2). Neurons: 1 - 2 = -1 -> 0; 1 + 2 + bias 1 = 4. Down: 3 * 0 + 5 * 4 + bias 7 = 27 and -4.
    up, down = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[3.0, 5.0], [2.0, -1.0]])
    out = relu_feedforward(torch.tensor([1.0, 2.0]), up, down, torch.tensor([0.0, 1.0]), torch.tensor([7.0, 0.0]))
    assert out.tolist() == [27.0, -4.0]


def test_gelu_by_hand():
    # x Phi(x) at 1 is 0.8413447 and at -1 is -0.1586553; the tanh form of GPT-2 gives 0.8411920 at 1
    one = torch.ones(1, 1)
    out = gelu_feedforward(torch.tensor([[1.0], [-1.0]]), one, one)
    torch.testing.assert_close(out, torch.tensor([[0.8413447], [-0.1586553]]))
    torch.testing.assert_close(gelu_feedforward(one, one, one, approximate="tanh"), torch.tensor([[0.8411920]]))


def test_swiglu_by_hand():
    # the gate sees ln 3: silu(ln 3) = ln 3 * 3/4; the other branch 2, the way down 10
    one = torch.ones(1, 1)
    expected = 10 * 2 * 0.75 * math.log(3)
    torch.testing.assert_close(swiglu(one, math.log(3) * one, 2 * one, 10 * one), torch.tensor([[expected]]))
    # both branches are not alike: only the gate is bent
    assert abs(swiglu(one, 2 * one, math.log(3) * one, 10 * one).item() - expected) > 0.1


def test_fused_gate_and_up_are_the_same():
    x, (gate, up, down) = randn(2, 3, 6, seed=4), weights()
    torch.testing.assert_close(swiglu_fused(x, torch.cat([gate, up]), down), swiglu(x, gate, up, down))


@pytest.mark.parametrize("layer", PLAIN)
def test_plain_layers_equal_the_formula(layer):
    x, (_, up, down), b_up, b_down = randn(2, 3, 6, seed=4), weights(), randn(10, seed=5), randn(6, seed=6)
    hidden = x @ up.mT + b_up
    bent = hidden.clamp(min=0) if layer is relu_feedforward else hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x, up, down, b_up, b_down), bent @ down.mT + b_down)
    torch.testing.assert_close(layer(x, up, down), layer(x, up, down, 0 * b_up, 0 * b_down))


def test_gradients():
    x, (gate, up, down) = randn(2, 4, seed=4).requires_grad_(), (w.requires_grad_() for w in weights(4, 5))
    assert torch.autograd.gradcheck(swiglu, (x, gate, up, down))
    assert torch.autograd.gradcheck(lambda x, g, u, d: swiglu_fused(x, torch.cat([g, u]), d), (x, gate, up, down))
    for layer in PLAIN:  # no hidden channel of these inputs lies near the corner of the ReLU
        assert torch.autograd.gradcheck(layer, (x, up, down))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, (gate, up, down) = randn(16, 32, seed=4, dtype=dtype), weights(32, 64, dtype)
    got = swiglu(x, gate, up, down)
    exact = swiglu(x.double(), gate.double(), up.double(), down.double())
    assert got.dtype == dtype
    # the two hidden products, silu, their product and the output are each rounded: five times half a unit
    assert (got.double() - exact).abs().max() < 2.5 * torch.finfo(dtype).eps * exact.abs().max()


def test_every_token_alone():
    x, (gate, up, down) = randn(5, 6, seed=4), weights()
    order = torch.tensor([3, 0, 4, 1, 2])
    for layer in (lambda x: swiglu(x, gate, up, down), lambda x: relu_feedforward(x, up, down)):
        torch.testing.assert_close(layer(x[order]), layer(x)[order])


def test_without_the_activation_the_hidden_width_adds_no_rank():
    x, up, down = randn(200, 8), randn(32, 8, seed=1), randn(8, 32, seed=2)
    hidden = x @ up.mT
    assert torch.linalg.matrix_rank(hidden) == 8
    assert torch.linalg.matrix_rank(hidden.relu()) == 32
    torch.testing.assert_close(hidden @ down.mT, x @ (down @ up).mT)  # one 8 x 8 matrix says it all
    both = relu_feedforward(x, up, down) - relu_feedforward(-x, up, down)
    torch.testing.assert_close(both, x @ (down @ up).mT)  # ReLU(z) - ReLU(-z) = z, so the layer itself is not linear
    assert (relu_feedforward(-x, up, down) + relu_feedforward(x, up, down)).abs().max() > 1


def test_one_more_neuron_writes_one_fact():
    c = 64
    x, up, down = F.normalize(randn(20, c), dim=-1), randn(10, c, seed=1) / 8, randn(c, 10, seed=2)
    key, value = x[7], randn(c, seed=3)
    # the new neuron fires where its key is met (key . key = 1) and not where another token is (below 0.5)
    assert (x @ key)[torch.arange(20) != 7].max() < 0.5
    before = relu_feedforward(x, up, down, torch.zeros(10).double())
    bias = torch.cat([torch.zeros(10), torch.tensor([-0.5])]).double()
    after = relu_feedforward(x, torch.cat([up, key[None]]), torch.cat([down, 2 * value[:, None]], dim=1), bias)
    torch.testing.assert_close(after[7] - before[7], value)
    torch.testing.assert_close(after[:7], before[:7])
    torch.testing.assert_close(after[8:], before[8:])


def test_only_relu_has_exact_zeros():
    # f = c and the way down the identity: the layer returns its hidden channels
    x, (gate, up, _), down = randn(1000, 8, seed=4), weights(8, 8), torch.eye(8, dtype=torch.float64)
    assert 0.4 < (relu_feedforward(x, up, down) == 0).double().mean() < 0.6
    assert not (gelu_feedforward(x, up, down) == 0).any()
    assert not (swiglu(x, gate, up, down) == 0).any()


@pytest.mark.parametrize(
    ("c", "multiple", "hidden"),
    [(4096, 256, 11008), (5120, 256, 13824), (6656, 256, 17920), (8192, 256, 22016), (4096, 1, 10922), (3, 1, 8)],
)
def test_matched_hidden_of_llama(c, multiple, hidden):
    assert matched_hidden(c, multiple=multiple) == hidden  # Llama 7B, 13B, 33B and 65B


@pytest.mark.parametrize("c", [3, 12, 64, 100, 768])
def test_matched_hidden_has_the_parameters_of_a_4c_layer(c):
    f = matched_hidden(c)
    assert 0 <= 2 * c * 4 * c - 3 * c * f < 3 * c  # less than one hidden channel apart
    for multiple in (8, 256):
        rounded = matched_hidden(c, multiple=multiple)
        assert rounded % multiple == 0
        assert f <= rounded < f + multiple


def test_refusals():
    x, (gate, up, down) = randn(2, 6), weights()
    calls = [
        (lambda: swiglu(x, gate, up.mT, down), r"got \(10, 6\), \(6, 10\), \(6, 10\) for x with c=6"),
        (lambda: swiglu(x, gate, up[:4], down), r"got \(10, 6\), \(4, 6\)"),
        (lambda: relu_feedforward(x, up, up), r"got \(10, 6\), \(10, 6\)"),
        (lambda: gelu_feedforward(randn(2, 5), up, down), "x with c=5"),
        (lambda: swiglu_fused(x, up, down), "2 f rows, got 10 for f=10"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_equals_transformers_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=16, num_attention_heads=4, intermediate_size=24)).double()
    x = randn(2, 3, 16)
    got = swiglu(x, theirs.gate_proj.weight, theirs.up_proj.weight, theirs.down_proj.weight)
    torch.testing.assert_close(got, theirs(x))


def test_equals_transformers_gpt2():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    theirs = GPT2MLP(24, GPT2Config(n_embd=16, n_inner=24, resid_pdrop=0.0)).double()
    nn.init.normal_(theirs.c_fc.bias)
    x, (up, down) = randn(2, 3, 16), (theirs.c_fc, theirs.c_proj)  # their weights are stored the other way round
    got = gelu_feedforward(x, up.weight.mT, down.weight.mT, up.bias, down.bias, approximate="tanh")
    torch.testing.assert_close(got, theirs(x))


def test_equals_pytorch_transformer_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, dtype=torch.float64)
    x = randn(2, 3, 16)
    first, second = layer.linear1, layer.linear2
    got = relu_feedforward(x, first.weight, second.weight, first.bias, second.bias)
    torch.testing.assert_close(got, layer._ff_block(x))


@pytest.mark.parametrize("layer", [*PLAIN, swiglu_fused])
def test_compiles_to_one_graph(layer):
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    x, (gate, up, down) = randn(2, 6, seed=4), weights()
    up = torch.cat([gate, up]) if layer is swiglu_fused else up
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, up, down), layer(x, up, down))
