"""Mixture of experts: gates, balance, grouping by sorting, and what each of them means for the gradient."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.architecture.moe import (
    BiasBalancedMoE,
    MoE,
    balance_loss,
    expert_load,
    experts_touched,
    layer_parameters,
    mix_experts,
    run_grouped,
    run_in_turn,
    sigmoid_gate,
    softmax_gate,
    update_bias,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
RUNS = [run_in_turn, run_grouped]


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def inputs(n=7, e=4, k=2, c=8, f=12, dtype=torch.float32, device="cpu"):
    """x, weights, experts, gate_up, down."""
    weights, experts = softmax_gate(randn(n, e, seed=1, dtype=dtype, device=device), k)
    shapes = [(n, c), (e, 2 * f, c), (e, c, f)]
    x, gate_up, down = (randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate(shapes, 2))
    return x, weights, experts, gate_up / 3, down / 3


def token_by_token(x, weights, experts, gate_up, down):
    """The oracle: every token through every one of its experts, in Python loops."""
    rows = []
    for i in range(len(x)):
        row = torch.zeros_like(x[i])
        for w, expert in zip(weights[i], experts[i].tolist(), strict=True):
            gate, up = (gate_up[expert] @ x[i]).chunk(2)
            row = row + w * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows)


# gates


def test_softmax_gate_by_hand():
    # probabilities 1/10, 2/10, 3/10, 4/10: the best two are experts 3 and 2; renormalised 4/7 and 3/7
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    weights, experts = softmax_gate(logits, 2)
    assert experts.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(softmax_gate(logits, 2, renormalise=False)[0], torch.tensor([[0.4, 0.3]]))


def test_sigmoid_gate_by_hand():
    # scores 1/2, 3/4, 1/4; the bias lifts the last over the first; the weights are the scores without it: 1/4 and 3/4
    logits, bias = torch.tensor([[0.0, 3.0, 1 / 3]]), torch.tensor([0.0, 0.0, 0.3])
    logits[0, 1:] = logits[0, 1:].log()
    weights, experts = sigmoid_gate(logits, bias, 2, renormalise=False)
    assert experts.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    assert sigmoid_gate(logits, torch.zeros(3), 2)[1].tolist() == [[1, 0]]
    torch.testing.assert_close(sigmoid_gate(logits, torch.zeros(3), 2, scale=2.5)[0], torch.tensor([[1.5, 1.0]]))


@pytest.mark.parametrize("gate", [softmax_gate, lambda x, k: sigmoid_gate(x, torch.zeros(x.shape[1]), k)])
def test_weights_of_a_token_sum_to_one(gate):
    weights, experts = gate(randn(50, 8), 3)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(50))
    assert all(len(set(row)) == 3 for row in experts.tolist())


def test_without_renormalising_the_output_shrinks_with_the_number_of_experts():
    sums = [softmax_gate(randn(500, e), 2, renormalise=False)[0].sum(dim=-1).mean() for e in (4, 64)]
    assert sums[0] > 0.7
    assert sums[1] < 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_are_not_of_half_precision(dtype):
    logits = randn(20, 64, dtype=dtype)
    weights, experts = softmax_gate(logits, 4, renormalise=False)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, logits.float().softmax(dim=-1).gather(-1, experts))
    assert sigmoid_gate(logits, torch.zeros(64), 4)[0].dtype == torch.float32
    torch.testing.assert_close(balance_loss(logits, experts), balance_loss(logits.float(), experts))


def router_gradient(k, renormalise):
    torch.manual_seed(0)
    layer = MoE(8, 12, experts=4, k=k, renormalise=renormalise)
    for weight in layer.parameters():
        nn.init.normal_(weight)
    out, _ = layer(randn(30, 8))
    (out * randn(30, 8, seed=1)).sum().backward()
    return layer.router.grad.abs().max().item()


def test_one_renormalised_expert_teaches_the_router_nothing():
    assert router_gradient(1, True) == 0  # the weight is 1 whatever the router says
    assert router_gradient(1, False) > 0.1
    assert router_gradient(2, True) > 0.1


# balance


def test_load_counts_tokens():
    assert expert_load(torch.tensor([[0, 2], [2, 3], [2, 0]]), 5).tolist() == [2, 0, 3, 1, 0]
    experts = torch.randint(0, 9, (100, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(expert_load(experts, 9), torch.bincount(experts.flatten(), minlength=9))


@pytest.mark.parametrize(("e", "k"), [(4, 1), (4, 2), (8, 4)])
def test_balance_loss_is_1_if_uniform_and_e_if_one_expert_gets_all(e, k):
    experts = (torch.arange(e)[:, None] + torch.arange(k)) % e  # each expert is chosen k times by e tokens
    torch.testing.assert_close(balance_loss(torch.zeros(e, e), experts), torch.tensor(1.0))
    collapsed = torch.full((e, e), -100.0)
    collapsed[:, 0] = 100
    torch.testing.assert_close(balance_loss(collapsed, torch.zeros(e, 1).long()), torch.tensor(float(e)))


def test_balance_loss_by_hand_below_1():
    # 3 tokens, 2 experts: shares 2/3 and 1/3, mean probabilities (0.51 + 0.51 + 0) / 3 = 0.34 and 0.66:
    # 2 (2/3 * 0.34 + 1/3 * 0.66) = 0.8933: uniform routing is not the minimum
    logits = torch.tensor([[0.51, 0.49], [0.51, 0.49], [1e-30, 1.0]]).log()
    experts = softmax_gate(logits, 1)[1]
    assert experts.flatten().tolist() == [0, 0, 1]
    torch.testing.assert_close(balance_loss(logits, experts), torch.tensor(0.8933333))


def test_balance_gradient_flows_through_the_probabilities_only():
    logits = randn(6, 4, dtype=torch.float64).requires_grad_()
    experts = softmax_gate(logits, 2)[1]
    (got,) = torch.autograd.grad(balance_loss(logits, experts), logits)
    # d/dz of 4 sum_i f_i p_i / 6 with f constant: 4/6 p (f - sum_i f_i p_i)
    p = logits.detach().softmax(dim=-1)
    share = torch.tensor([(experts == i).sum() / 12 for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(got, 4 / 6 * p * (share - (p @ share)[:, None]))
    step = logits.detach() - 0.1 * got
    assert balance_loss(step, experts) < balance_loss(logits, experts)


def test_balance_loss_of_many_experts_per_token_is_a_mean_over_choices():
    logits = randn(40, 8)
    experts = softmax_gate(logits, 3)[1]
    each = torch.stack([balance_loss(logits, experts[:, i : i + 1]) for i in range(3)])
    torch.testing.assert_close(balance_loss(logits, experts), each.mean())


def test_update_bias_by_hand():
    # mean load 4: below it up, above it down, at it nothing
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    got = update_bias(bias, torch.tensor([1, 4, 4, 7]), rate=0.25)
    assert got.tolist() == [0.75, 0.0, 0.0, -0.25]
    assert bias.tolist() == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("run", RUNS)
def test_bias_evens_out_the_load_and_leaves_the_weights_alone(run):
    torch.manual_seed(0)
    layer = BiasBalancedMoE(8, 4, experts=8, k=2, run=run)
    assert layer.run is run
    nn.init.normal_(layer.router, std=0.5)
    x = randn(512, 8) + randn(8, seed=1)  # tokens with something in common: some experts suit them all
    _, before = layer(x)
    for _ in range(300):
        layer.rebalance(layer(x)[1], rate=0.01)
    _, after = layer(x)
    uneven = [expert_load(r.experts, 8).max().item() / (2 * 512 / 8) for r in (before, after)]
    assert uneven[0] > 1.5
    assert uneven[1] < 1.1
    chosen = after.logits.sigmoid().gather(-1, after.experts)
    torch.testing.assert_close(after.weights, chosen / chosen.sum(dim=-1, keepdim=True))
    assert layer.bias.abs().max() > 0.1
    assert "bias" in layer.state_dict()


# experts


def test_mixing_by_hand():
    # c = f = 1. Expert i: gate ln 3 (silu: ln 3 * 3/4), up 1, down i: it multiplies x = 1 by i * 0.75 ln 3.
    gate = torch.full((3, 1, 1), 3.0).log()
    gate_up, down = torch.cat([gate, torch.ones(3, 1, 1)], dim=1), torch.arange(3.0).view(3, 1, 1)
    experts, weights = torch.tensor([[2, 1], [0, 2]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    out = mix_experts(torch.ones(2, 1), weights, experts, gate_up, down)
    torch.testing.assert_close(out, torch.tensor([[0.9 * 2 + 0.1 * 1], [0.5 * 2]]) * 0.75 * torch.tensor(3.0).log())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("n", "e", "k"), [(7, 4, 2), (1, 8, 3), (40, 2, 1), (5, 16, 16)])
def test_equals_the_loop_over_tokens_forward_and_backward(n, e, k, run):
    args = inputs(n, e, k)
    leaves = [args[i].requires_grad_() for i in (0, 1, 3, 4)]
    ours, theirs = mix_experts(*args, run=run), token_by_token(*args)
    torch.testing.assert_close(ours, theirs)
    grad = randn(n, 8, seed=9)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 sums over tokens in another order


def test_gradcheck():
    x, weights, experts, gate_up, down = inputs(n=5, c=3, f=2, dtype=torch.float64)
    leaves = [y.requires_grad_() for y in (x, weights, gate_up, down)]
    assert torch.autograd.gradcheck(lambda x, w, g, d: mix_experts(x, w, experts, g, d), leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", RUNS)
def test_ways_to_run_the_experts_are_equal(run, device):
    args = inputs(n=64, e=8, k=3, c=16, f=32, device=device)
    torch.testing.assert_close(mix_experts(*args, run=run), token_by_token(*args))


@pytest.mark.parametrize("run", RUNS)
def test_an_expert_without_tokens_has_exactly_zero_gradient(run):
    x, weights, _, gate_up, down = inputs(n=6, e=4, k=2)
    experts = torch.tensor([[0, 3]] * 6)  # 1 and 2 get nothing
    gate_up.requires_grad_()
    down.requires_grad_()
    mix_experts(x, weights, experts, gate_up, down, run=run).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert grad[1:3].abs().max() == 0
        assert grad[0].abs().max() > 0
        assert grad[3].abs().max() > 0


@pytest.mark.parametrize("run", RUNS)
def test_experts_alike_and_weights_that_sum_to_one_are_one_dense_layer(run):
    x, weights, experts, gate_up, down = inputs()
    same_up, same_down = gate_up[:1].expand(4, -1, -1).contiguous(), down[:1].expand(4, -1, -1).contiguous()
    gate, up = (x @ gate_up[0].mT).chunk(2, dim=-1)
    expected = (F.silu(gate) * up) @ down[0].mT
    torch.testing.assert_close(mix_experts(x, weights, experts, same_up, same_down, run=run), expected)


def test_a_token_does_not_depend_on_the_others():
    x, weights, experts, gate_up, down = inputs(n=20)
    out = mix_experts(x, weights, experts, gate_up, down)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = mix_experts(x[order], weights[order], experts[order], gate_up, down)
    torch.testing.assert_close(shuffled, out[order])
    torch.testing.assert_close(mix_experts(x[:1], weights[:1], experts[:1], gate_up, down), out[:1])


class Calls(TorchDispatchMode):
    """Counts the operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(run, n, e):
    args = inputs(n=n, e=e)
    with Calls() as watch:
        mix_experts(*args, run=run)
    return watch.count


@pytest.mark.parametrize("run", RUNS)
def test_no_loop_over_tokens(run):
    assert calls(run, 512, 4) == calls(run, 8, 4)


def test_grouped_has_no_loop_over_experts_either():
    assert calls(run_grouped, 64, 16) == calls(run_grouped, 64, 4)
    assert calls(run_in_turn, 64, 16) > calls(run_in_turn, 64, 4)  # the watch sees what it should


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(run, dtype):
    x, weights, experts, gate_up, down = inputs(n=40, c=16, f=24, dtype=dtype)
    assert weights.dtype == torch.float32
    out = mix_experts(x, weights, experts, gate_up, down, run=run)
    exact = token_by_token(*(y if y is experts else y.double() for y in (x, weights, experts, gate_up, down)))
    assert out.dtype == dtype
    # hidden products, silu, their product, an expert's output and the sum are each rounded
    assert (out.double() - exact).abs().max() < 3 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_layer_is_gate_experts_and_shared_experts(shared):
    torch.manual_seed(0)
    layer = MoE(8, 12, experts=4, k=2, shared=shared)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3)
    x = randn(2, 5, 8)
    out, routing = layer(x)
    tokens = x.view(10, 8)
    torch.testing.assert_close(routing.logits, tokens @ layer.router.mT)
    weights, experts = softmax_gate(routing.logits, 2)
    expected = token_by_token(tokens, weights, experts, layer.gate_up, layer.down)
    if shared:
        gate, up = (tokens @ layer.shared_gate_up.mT).chunk(2, dim=-1)
        expected = expected + (F.silu(gate) * up) @ layer.shared_down.mT
    torch.testing.assert_close(out, expected.view(2, 5, 8))
    # router, routed and shared experts of 3 c f each
    assert sum(w.numel() for w in layer.parameters()) == 4 * 8 + (4 + shared) * 3 * 8 * 12


@pytest.mark.parametrize(("e", "k"), [(64, 8), (16, 1)])
def test_a_batch_touches_far_more_experts_than_a_token(e, k):
    for n in (1, 4, 16, 64):
        touched = [(expert_load(softmax_gate(randn(n, e, seed=i), k)[1], e) > 0).sum().item() for i in range(50)]
        # 50 batches: the mean of counts that differ by about 2 is known to 0.3
        assert abs(sum(touched) / 50 - experts_touched(n, e, k)) < 1
    assert experts_touched(1, e, k) == pytest.approx(k)
    assert experts_touched(5, 3, 3) == 3


@pytest.mark.parametrize("shared", [0, 2])
def test_parameters_are_those_of_the_layer_and_active_those_that_a_token_trains(shared):
    layer = MoE(8, 12, experts=6, k=2, shared=shared)
    for weight in layer.parameters():
        nn.init.normal_(weight)
    total, active = layer_parameters(8, 12, experts=6, k=2, shared=shared)
    assert sum(w.numel() for w in layer.parameters()) == total
    layer(randn(1, 8))[0].sum().backward()
    assert sum(int((w.grad != 0).sum()) for w in layer.parameters()) == active - (6 - 2) * 8  # rows of unchosen scores


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_gate(torch.zeros(3, 4), 5), "got k=5, e=4"),
        (lambda: softmax_gate(torch.zeros(3, 4), 0), "got k=0, e=4"),
        (lambda: sigmoid_gate(torch.zeros(3, 4), torch.zeros(4), 5), "got k=5, e=4"),
        (lambda: balance_loss(torch.zeros(3, 4), torch.zeros(2, 1).long()), "got logits 3, experts 2"),
        (lambda: balance_loss(torch.zeros(0, 4), torch.zeros(0, 1).long()), "got logits 0, experts 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_compiles_to_one_graph():
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    layer, x = MoE(8, 16, experts=4, k=2, shared=1, run=run_grouped).bfloat16(), randn(2, 5, 8, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])


# production


def filled(module):
    torch.manual_seed(0)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return module


def with_weights_of(layer, theirs):
    """Our layer with their weights: the stacked layout is the same."""
    with torch.no_grad():
        layer.router.copy_(theirs.gate.weight)
        layer.gate_up.copy_(theirs.experts.gate_up_proj)
        layer.down.copy_(theirs.experts.down_proj)
    return layer


@pytest.mark.parametrize("e", [4, 8])
def test_equals_transformers_mixtral(e):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

    sizes = dict(hidden_size=8, intermediate_size=12, num_local_experts=e, num_experts_per_tok=2)
    theirs = filled(MixtralSparseMoeBlock(MixtralConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)))
    layer = with_weights_of(MoE(8, 12, experts=e, k=2), theirs)
    x = randn(2, 9, 8)
    out, routing = layer(x)
    torch.testing.assert_close(out, theirs(x))
    their_loss = load_balancing_loss_func((routing.logits,), e, 2)  # k times the one that is 1 if uniform
    torch.testing.assert_close(2 * balance_loss(routing.logits, routing.experts), their_loss)


@pytest.mark.parametrize("renormalise", [False, True])
def test_equals_transformers_qwen3(renormalise):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = dict(hidden_size=8, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3)
    config = Qwen3MoeConfig(num_attention_heads=2, num_key_value_heads=1, norm_topk_prob=renormalise, **sizes)
    theirs = filled(Qwen3MoeSparseMoeBlock(config))
    layer = with_weights_of(MoE(8, 12, experts=6, k=3, renormalise=renormalise), theirs)
    x = randn(2, 9, 8)
    torch.testing.assert_close(layer(x)[0], theirs(x))


def test_equals_transformers_deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = dict(hidden_size=8, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2)
    theirs = filled(DeepseekV3MoE(DeepseekV3Config(n_group=1, topk_group=1, routed_scaling_factor=2.5, **sizes)))
    theirs.gate.e_score_correction_bias.copy_(randn(6, seed=3))
    layer = with_weights_of(BiasBalancedMoE(8, 12, experts=6, k=2, shared=2, scale=2.5), theirs)
    shared = theirs.shared_experts
    with torch.no_grad():
        layer.shared_gate_up.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        layer.shared_down.copy_(shared.down_proj.weight)
        layer.bias.copy_(theirs.gate.e_score_correction_bias)
    x = randn(2, 9, 8)
    torch.testing.assert_close(layer(x)[0], theirs(x))
