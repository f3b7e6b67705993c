"""NF4: the published levels, blocks, both scales, bytes counted, errors, and QLoRA on our model."""

import copy
import math

import pytest
import torch
from torch import nn

from minillm.architecture.transformer import Config, Transformer
from minillm.finetuning.adam8bit import AdamW8bit
from minillm.finetuning.lora import LazyWeight, adapters, add_lora, merge
from minillm.finetuning.memory import saved_bytes
from minillm.finetuning.nf4 import (
    bits_per_weight,
    dequantise,
    dequantise_blocks,
    dynamic_levels,
    nf4_levels,
    quantise,
    quantise_blocks,
    quantise_model,
)
from minillm.training.objective import next_token_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONFIG = Config(vocabulary=40, width=64, layers=2, heads=4, kv_heads=2, head_size=16, hidden=96, context=32)
PUBLISHED = [  # QLoRA's appendix E, bitsandbytes' table
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def transformer(dtype=torch.float32):
    torch.manual_seed(0)
    return Transformer(CONFIG).to(dtype)


def ids(b=2, t=9):
    return torch.randint(40, (b, t), generator=torch.Generator().manual_seed(1))


# Levels


def test_levels_are_the_published_ones():
    # computed there with an outermost probability of 0.9677083 in float32; its quantile moves by 3e-7
    torch.testing.assert_close(nf4_levels(), torch.tensor(PUBLISHED), rtol=0, atol=1e-6)


def test_levels_are_quantiles():
    # back through the normal distribution: even steps of probability on either side
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    scale = torch.special.ndtri(torch.tensor(outermost, dtype=torch.float64))
    p = torch.special.ndtr(nf4_levels().double() * scale)
    below, above = p[:8].diff(), p[7:].diff()
    torch.testing.assert_close(below, torch.full_like(below, (outermost - 0.5) / 7), rtol=0, atol=1e-6)
    torch.testing.assert_close(above, torch.full_like(above, (outermost - 0.5) / 8), rtol=0, atol=1e-6)


def test_normal_weights_use_nf4_codes_evenly_and_int4_codes_not():
    def entropy(levels):
        codes, _ = quantise_blocks(randn(64 * 5000), levels, 64)
        share = codes.int().bincount() / codes.numel()
        return -(share * share.log2()).nansum().item()

    assert entropy(nf4_levels()) > 3.85  # of 4 bits
    assert entropy(torch.arange(-7, 8) / 7) < 3.65


def test_dynamic_levels():
    signed, unsigned = dynamic_levels(), dynamic_levels(signed=False)
    for levels in (signed, unsigned):
        assert levels.unique().numel() == 256
        assert levels.max() == 1
        assert 0 in levels
    # by hand, the smallest decade: signed one level in the middle of 0.1 to 1, times 1e-6; unsigned two
    assert signed[signed > 0][0].item() == pytest.approx(0.55e-6)
    assert unsigned[1:3].tolist() == pytest.approx([0.325e-6, 0.775e-6])
    # 64 positive levels in the top decade, steps of 0.9 / 64
    top = signed[signed > 0.1][:-1]
    assert len(top) == 64
    torch.testing.assert_close(top.diff(), torch.full((63,), 0.9 / 64), rtol=1e-4, atol=0)


def test_mean_squares_are_finer_than_even_steps_would_be():
    # eight bits in even steps would make 0 of what is 1/1000 of the largest, and the step's divisor with it
    squares = 10.0 ** -torch.arange(0.0, 6.0)
    codes, largest = quantise_blocks(squares, dynamic_levels(signed=False), 256)
    out = dequantise_blocks(codes, largest, dynamic_levels(signed=False), 256)
    torch.testing.assert_close(out, squares, rtol=0.45, atol=0)  # the coarsest decade here has 4 levels
    even = torch.linspace(0, 1, 256)
    assert dequantise_blocks(*quantise_blocks(squares, even, 256), even, 256)[3:].eq(0).all()


# Blocks


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_the_nearest_level_is_taken(n):
    x, levels = randn(n), nf4_levels()
    codes, largest = quantise_blocks(x, levels, 64)
    for i in range(n):
        block = x[i // 64 * 64 : i // 64 * 64 + 64]
        assert largest[i // 64] == block.abs().max()
        distance = (x[i] / block.abs().max() - levels).abs()
        assert distance[codes[i].int()] <= distance.min() + 1e-7
    assert len(largest) == math.ceil(n / 64)
    assert len(dequantise_blocks(codes, largest, levels, 64)) == n


def test_zeros_and_the_largest_of_a_block_are_exact():
    x = torch.cat([torch.zeros(64), torch.tensor([0.0, 0.0, -3.0, 1.0])])
    out = dequantise_blocks(*quantise_blocks(x, nf4_levels(), 64), nf4_levels(), 64)
    assert out[:67].equal(x[:67])


def test_an_outlier_hurts_its_block_only():
    x = randn(64 * 50)
    error = dequantise_blocks(*quantise_blocks(x, nf4_levels(), 64), nf4_levels(), 64) - x
    x[0] = 1000.0
    after = dequantise_blocks(*quantise_blocks(x, nf4_levels(), 64), nf4_levels(), 64) - x
    assert after[64:].equal(error[64:])
    assert after[1:64].square().mean() > 50 * error[1:64].square().mean()


def test_rms_error_beats_evenly_spaced_levels():
    # of normal weights in blocks of 64, without the second quantisation
    def error(levels):
        x = randn(64 * 5000)
        return (dequantise_blocks(*quantise_blocks(x, levels, 64), levels, 64) - x).square().mean().sqrt().item()

    assert error(nf4_levels()) == pytest.approx(0.092, rel=0.02)
    assert error(torch.arange(-7, 8) / 7) == pytest.approx(0.108, rel=0.03)


# Packed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (30, 7), (5,), (3, 1), (2, 9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_and_read_out(shape, dtype, device):
    weight = randn(*shape, dtype=dtype, device=device)
    packed = quantise(weight)
    out = dequantise(packed, weight.shape, dtype)
    assert (out.shape, out.dtype) == (weight.shape, dtype)
    # the nearest level without the second quantisation, whose error is that of a scale, at most 1 % of the largest
    flat = weight.flatten().float()
    once = dequantise_blocks(*quantise_blocks(flat, nf4_levels().to(device), 64), nf4_levels().to(device), 64)
    torch.testing.assert_close(out.float().flatten(), once, rtol=0.02, atol=0.01)


def test_two_codes_share_a_byte():
    packed = quantise(torch.tensor([-1.0, 1.0, 0.0]))  # codes 0, 15, 7, and half a byte of nothing
    assert packed.codes.tolist() == [0 << 4 | 15, 7 << 4]


def test_bytes_are_counted():
    n = 64 * 256 * 4
    packed = quantise(randn(n))
    assert [part.nbytes for part in packed] == [n // 2, n // 64, 4 * n // (64 * 256), 4]
    assert packed.nbytes == sum(part.untyped_storage().nbytes() for part in packed)
    assert 8 * packed.nbytes / n == pytest.approx(bits_per_weight(), rel=1e-3)  # the 4 bytes of the mean
    assert bits_per_weight() == pytest.approx(4.127, abs=5e-4)  # the paper: 0.127 bits instead of 0.5
    assert bits_per_weight(second=None) == 4.5


def test_the_second_quantisation_costs_almost_no_precision():
    weight = randn(512, 512)
    once = dequantise_blocks(*quantise_blocks(weight.flatten(), nf4_levels(), 64), nf4_levels(), 64)
    twice = dequantise(quantise(weight), weight.shape, torch.float32)

    def error(out):
        return (out.view_as(weight) - weight).square().mean().sqrt()

    assert error(once) < error(twice) < 1.01 * error(once)


def test_scales_are_centred_before_they_are_quantised():
    # scales within 1 % of each other: 8 bits of their distance from the mean are fine, of themselves 1.4 % apart
    weight = randn(256, 64)
    weight *= torch.linspace(0.297, 0.303, 256)[:, None] / weight.abs().amax(dim=1, keepdim=True)
    once = dequantise_blocks(*quantise_blocks(weight.flatten(), nf4_levels(), 64), nf4_levels(), 64)
    torch.testing.assert_close(dequantise(quantise(weight), (64 * 256,), torch.float32), once, rtol=5e-4, atol=0)


# In a model


def test_a_quantised_layer_is_the_layer_of_the_weight_read_out():
    layer, x = nn.Linear(40, 24), randn(5, 40).requires_grad_()
    plain = copy.deepcopy(layer)
    quantise_model(layer, names=["weight"])
    plain.weight.data = dequantise(quantise(plain.weight.data), (24, 40), torch.float32)
    out, expected = layer(x), plain(x)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    (right,) = torch.autograd.grad(expected.sin().sum(), x)
    torch.testing.assert_close(grad, right)
    torch.testing.assert_close(x @ layer.weight.mT, x @ plain.weight.mT)  # other products, too


def test_quantised_weights_are_bytes_and_nothing_is_kept_for_backward():
    layer, x = nn.Linear(512, 512, bias=False), randn(4, 512).requires_grad_()
    quantise_model(layer, names=["weight"])
    held = sum(p.nbytes for p in layer.parameters())
    assert held / 512**2 == pytest.approx(0.516, rel=1e-2)
    assert saved_bytes(lambda: layer(x), layer) == 0


def test_quantised_model_is_close_and_its_state_dict_loads():
    model = transformer()
    exact = model(ids()).detach()
    quantise_model(model)
    out = model(ids())
    assert isinstance(model.blocks[0].qkv, LazyWeight)
    assert 0 < (out - exact).norm() / exact.norm() < 0.2  # weights are off by 9 % of their size each, at random
    other = quantise_model(Transformer(CONFIG))
    other.load_state_dict(model.state_dict())
    assert other(ids()).equal(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_starts_as_the_quantised_model_and_learns(dtype):
    model = transformer(dtype)
    model.embedding.data *= 20  # logits of a trained size: the head is the embedding, and frozen
    quantise_model(model)
    codes = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(ids()).detach()
    add_lora(model, rank=8)
    assert model(ids()).equal(before)
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(25):
        loss = next_token_loss(model(ids()), ids())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, p in model.named_parameters():
        assert name not in codes or p.equal(codes[name])
    assert len(adapters(model)) == 8


def test_gradients_of_adapters_on_a_quantised_weight():
    layer = nn.Linear(20, 10, bias=False)
    quantise_model(layer, names=["weight"])
    dense = layer.weight.dense()
    add_lora(layer, rank=2, alpha=3.0, names=["weight"])
    (adapter,) = adapters(layer).values()
    adapter.b.data = randn(10, 2)
    x = randn(6, 20)
    grads = torch.autograd.grad(layer(x).sin().sum(), [adapter.a, adapter.b])
    expected = torch.autograd.grad((x @ (dense + 1.5 * adapter.b @ adapter.a).T).sin().sum(), [adapter.a, adapter.b])
    for got, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_refuses_to_merge_into_codes():
    with pytest.raises(ValueError, match="a quantised weight cannot be merged into"):
        merge(add_lora(quantise_model(transformer()), rank=4))


def test_refuses_names_that_no_matrix_has():
    with pytest.raises(ValueError, match=r"no matrix of the model has one of the names \['q_proj'\]"):
        quantise_model(transformer(), names=["q_proj"])
