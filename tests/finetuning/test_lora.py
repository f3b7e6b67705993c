"""LoRA: nothing changes at first, the formula with and without the sum, what trains, merging, a real fine-tune."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.architecture.transformer import Config, Transformer
from minillm.finetuning.lora import (
    MATRICES,
    LazyWeight,
    adapter_parameters,
    adapter_state,
    adapters,
    add_lora,
    finish,
    lora_linear,
    merge,
    unmerge,
)
from minillm.measure import flops
from minillm.training.objective import next_token_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONFIG = Config(vocabulary=40, width=32, layers=2, heads=4, kv_heads=2, head_size=8, hidden=48, context=32)


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def transformer(*, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return Transformer(CONFIG).to(device, dtype)


def ids(b=2, t=9, device="cpu"):
    return torch.randint(40, (b, t), generator=torch.Generator().manual_seed(1)).to(device)


def stirred(model):
    """The model after some training: B is no longer zero."""
    for i, adapter in enumerate(adapters(model).values()):
        adapter.b.data = 0.1 * randn(*adapter.b.shape, seed=i, dtype=adapter.b.dtype, device=adapter.b.device)
    return model


# The formula


def test_by_hand():
    # A x = 1 + 2 = 3, B A x = (3, 6), scale 1/2: (1.5, 3) is added to x
    x, a, b = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.tensor([[1.0], [2.0]])
    assert lora_linear(x, torch.eye(2), a, b, 0.5).equal(torch.tensor([[2.5, 5.0]]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 8.0), (3, 1.5)])
def test_linear_layer_equals_the_written_formula(rank, alpha, device):
    layer = nn.Linear(10, 7).to(device, torch.float64)
    weight, bias, x = layer.weight.detach().clone(), layer.bias.detach().clone(), randn(5, 10, device=device)
    add_lora(layer, rank=rank, alpha=alpha, names=["weight"])
    (adapter,) = stirred(layer) and adapters(layer).values()
    a, b = adapter.a, adapter.b
    assert (a.shape, b.shape) == ((rank, 10), (7, rank))
    out = layer(x)
    torch.testing.assert_close(out, x @ (weight + alpha / rank * b @ a).T + bias)
    # gradients of A and B through the thin products are those through the sum
    grads = torch.autograd.grad(out.sin().sum(), [a, b])
    expected = torch.autograd.grad((x @ (weight + alpha / rank * b @ a).T + bias).sin().sum(), [a, b])
    for got, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (4, 8)])
def test_equals_peft(rank, alpha):
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA is held against the written formula alone")
    theirs = nn.Sequential(nn.Linear(10, 7)).double()
    ours, x = copy.deepcopy(theirs[0]), randn(5, 10)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False)
    (adapter,) = stirred(add_lora(ours, rank=rank, alpha=alpha, names=["weight"])) and adapters(ours).values()
    a, b = (
        next(p for name, p in theirs.named_parameters() if f"lora_{part}" in name and p.requires_grad) for part in "AB"
    )
    assert (a.shape, b.shape) == (adapter.a.shape, adapter.b.shape)
    assert not b.any(), "B starts at zero"
    assert a.abs().max() <= 10**-0.5  # both draw A from the uniform distribution of nn.Linear
    a.data, b.data = adapter.a.detach().clone(), adapter.b.detach().clone()
    torch.testing.assert_close(ours(x), theirs(x))
    grads = torch.autograd.grad(ours(x).sin().sum(), [adapter.a, adapter.b])
    for got, right in zip(grads, torch.autograd.grad(theirs(x).sin().sum(), [a, b]), strict=True):
        torch.testing.assert_close(got, right)
    merged = theirs.merge_and_unload()[0].weight
    merge(ours)
    torch.testing.assert_close(ours.weight, merged)


def test_scale_is_alpha_over_rank_and_alpha_twice_the_rank():
    scales = [
        next(iter(adapters(add_lora(transformer(), rank=r, **options)).values())).scale
        for r, options in [(4, {}), (8, {}), (8, {"alpha": 4.0}), (4, {"alpha": 8 * math.sqrt(4)})]
    ]
    assert scales == [2.0, 2.0, 0.5, 8 / math.sqrt(4)]  # the last is rank-stabilised: alpha' / sqrt(r)


def test_any_other_use_of_the_weight_sees_the_sum():
    layer = stirred(add_lora(nn.Linear(6, 4, bias=False).double(), rank=2, names=["weight"]))
    weight, x = layer.weight, randn(3, 6)
    assert isinstance(weight, LazyWeight)
    dense = (
        layer.parametrizations.weight.original
        + 2.0 * next(iter(adapters(layer).values())).b @ next(iter(adapters(layer).values())).a
    )
    for got, right in [
        (x @ weight.mT, x @ dense.mT),
        (torch.cat([weight, weight]), torch.cat([dense, dense])),
        (torch.einsum("bi,oi->bo", x, weight), x @ dense.mT),
        (weight.sum(), dense.sum()),
        (F.linear(input=x, weight=weight), x @ dense.mT),
        (F.linear(x, weight, bias=randn(4)), x @ dense.mT + randn(4)),
    ]:
        torch.testing.assert_close(got, right)
    assert (weight.shape, weight.dtype, weight.ndim) == ((4, 6), torch.float64, 2)


# In the model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", [MATRICES, ["qkv"], ["out", "down"]])
def test_at_first_the_model_is_unchanged(names, device):
    model = transformer(device=device)
    before = model(ids(device=device)).detach()
    add_lora(model, rank=4, names=names)
    assert model(ids(device=device)).equal(before)
    assert not stirred(model)(ids(device=device)).allclose(before)


def test_one_adapter_for_each_named_matrix():
    model = add_lora(transformer(), rank=3, names=["qkv", "down"])
    assert sorted(adapters(model)) == ["blocks.0.down", "blocks.0.qkv", "blocks.1.down", "blocks.1.qkv"]
    assert adapters(model)["blocks.1.down"].a.shape == (3, 48)


def test_only_adapters_train_and_everything_else_stays():
    model = stirred(add_lora(transformer(), rank=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(name.endswith((".a", ".b")) for name in trained)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    next_token_loss(model(ids()), ids()).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained)
        assert p.equal(before[name]) == (name not in trained)
    assert len(optimizer.state) == len(trained)


def test_gradients_at_the_start_reach_b_only():
    # B = 0 cuts A off: its gradient is B^T times something; B's is not zero, since A is not
    model = add_lora(transformer(), rank=4)
    next_token_loss(model(ids()), ids()).backward()
    for adapter in adapters(model).values():
        assert adapter.a.grad.abs().max() == 0
        assert adapter.b.grad.abs().max() > 0


def test_a_is_drawn_as_nn_linear_draws():
    layer = add_lora(nn.Linear(10_000, 64), rank=16, names=["weight"], generator=torch.Generator().manual_seed(0))
    (adapter,) = adapters(layer).values()
    bound = 1 / math.sqrt(10_000)
    assert 0.999 * bound < adapter.a.abs().max() <= bound  # 160,000 draws
    # uniform: standard deviation bound / sqrt(3); that of the estimate is about 0.1 % of it
    assert adapter.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    again = add_lora(nn.Linear(10_000, 64), rank=16, names=["weight"], generator=torch.Generator().manual_seed(0))
    assert adapters(again)["weight"].a.equal(adapter.a)


def test_the_sum_is_never_built_in_training():
    # products only as wide as W and A, B: counted, not timed. Base 2 n i o forward, as much for the input's gradient,
    # nothing for the weight's
    n, i, o, r = 50, 40, 30, 2
    layer, x = nn.Linear(i, o, bias=False), torch.randn(n, i, requires_grad=True)
    full = flops(lambda: layer(x).sum().backward())
    add_lora(layer, rank=r, names=["weight"])
    adapted = flops(lambda: layer(x).sum().backward())
    assert full == 3 * 2 * n * i * o
    assert adapted == 2 * 2 * n * i * o + 3 * 2 * n * r * (i + o)


def test_fine_tuning_learns_a_new_task():
    model = transformer(dtype=torch.float32)
    model.embedding.data *= 20  # logits of a trained size: the head is the embedding, and frozen
    add_lora(model, rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    data = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
    losses = []
    for _ in range(60):
        loss = next_token_loss(model(data), data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 0.5 * losses[0]


# Merging


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_computes_the_same_and_unmerged_is_as_before(dtype, tolerance, device):
    model = stirred(add_lora(transformer(dtype=dtype, device=device), rank=4))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(ids(device=device)).detach()
    merge(model)
    assert not isinstance(model.blocks[0].qkv, LazyWeight)
    torch.testing.assert_close(model(ids(device=device)), before, rtol=tolerance, atol=tolerance)
    merge(model)  # a second time changes nothing
    torch.testing.assert_close(model(ids(device=device)), before, rtol=tolerance, atol=tolerance)
    unmerge(model)
    torch.testing.assert_close(model(ids(device=device)), before, rtol=tolerance, atol=tolerance)
    for name, p in model.named_parameters():  # one addition and one subtraction of numbers about 1
        torch.testing.assert_close(p.detach(), weights[name], rtol=0, atol=4 * torch.finfo(dtype).eps)
    unmerge(model)
    torch.testing.assert_close(model(ids(device=device)), before, rtol=tolerance, atol=tolerance)


def test_finished_is_a_plain_model_with_the_names_it_had():
    model = transformer()
    names = list(model.state_dict())
    expected = stirred(add_lora(model, rank=4))(ids()).detach()
    finish(model)
    assert sorted(model.state_dict()) == sorted(names)
    torch.testing.assert_close(model(ids()), expected)
    assert all(p.requires_grad for p in model.parameters())
    fresh = transformer()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(ids()), expected)


def test_the_adapters_alone_are_the_file():
    model = stirred(add_lora(transformer(), rank=4))
    state = copy.deepcopy(adapter_state(model))
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    other = add_lora(transformer(), rank=4)
    other.load_state_dict(state, strict=False)
    assert other(ids()).equal(model(ids()))


# Numbers of parameters


def test_published_counts_of_llama_3_8b():
    # rank 16 in 32 layers: q and v alone, and all seven matrices, each with an adapter of its own
    q, kv, wide, narrow = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
    assert 32 * sum(adapter_parameters(shape, 16) for shape in (q, kv)) == 6_815_744
    assert 32 * sum(adapter_parameters(s, 16) for s in (q, kv, kv, q, wide, wide, narrow)) == 41_943_040


@pytest.mark.parametrize("names", [MATRICES, ["qkv"], ["gate_up", "down"]])
def test_counts_are_those_of_the_model(names):
    model = add_lora(transformer(), rank=5, names=names)
    shapes = [tuple(getattr(block, name).shape) for block in model.blocks for name in names]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(adapter_parameters(shape, 5) for shape in shapes)


# Refusals


def test_refuses_names_that_no_matrix_has():
    with pytest.raises(ValueError, match=r"no matrix of the model has one of the names \['q_proj'\]"):
        add_lora(transformer(), rank=4, names=["q_proj"])


def test_refuses_vectors():
    with pytest.raises(ValueError, match=r"no matrix of the model has one of the names \['norm'\]"):
        add_lora(transformer(), rank=4, names=["norm"])


@pytest.mark.parametrize("rank", [0, 33])
def test_refuses_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match=f"between 1 and the smallest side of a matrix, 32, got {rank}"):
        add_lora(transformer(), rank=rank)


def test_refuses_a_second_set():
    with pytest.raises(ValueError, match="the model has adapters"):
        add_lora(add_lora(transformer(), rank=4), rank=4)
