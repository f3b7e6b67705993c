"""The Llama releases: counts equal real models, frequencies equal production, blocks differ in the one part named."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm as torch_layer_norm

from minillm.architecture.llama import (
    RELEASES,
    LayerNormBlock,
    NoNormBlock,
    PlainBlock,
    ReluBlock,
    cached_bytes,
    differences,
    llama,
    parameter_parts,
    scaled_frequencies,
    with_blocks,
)
from minillm.architecture.transformer import Cache, Config, Transformer
from minillm.position.rope import inverse_frequencies

TINY = Config(vocabulary=11, width=16, layers=2, heads=4, kv_heads=2, head_size=4, hidden=24, context=32, tied=False)
# totals of the published weights; Llama 1's and 2's tables print them to one digit, or as the name
TOTALS = {
    "Llama 1 7B": 6_738_415_616,
    "Llama 1 13B": 13_015_864_320,
    "Llama 1 33B": 32_528_943_616,
    "Llama 1 65B": 65_285_660_672,
    "Llama 2 7B": 6_738_415_616,
    "Llama 2 13B": 13_015_864_320,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3 8B": 8_030_261_248,
    "Llama 3 70B": 70_553_706_496,
    "Llama 3.1 405B": 405_853_388_800,
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# configurations


@pytest.mark.parametrize("name", RELEASES)
def test_formula_equals_the_model_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(RELEASES[name].config)
    parts = parameter_parts(RELEASES[name].config)
    assert sum(parts.values()) == count(model) == TOTALS[name]
    assert parts["embedding"] == model.embedding.numel()
    assert parts["head"] == model.head.numel()
    blocks = dict(model.blocks.named_parameters()).items()
    assert parts["attention"] == sum(p.numel() for key, p in blocks if key.endswith((".qkv", ".out")))
    assert parts["feed-forward"] == sum(p.numel() for key, p in blocks if key.endswith((".gate_up", ".down")))
    assert parts["norms"] == sum(p.numel() for p in model.parameters() if p.ndim == 1)


@pytest.mark.parametrize("name", ["Llama 1 33B", "Llama 2 70B", "Llama 3 8B"])
def test_count_equals_transformers(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = RELEASES[name].config
    with torch.device("meta"):
        theirs = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
            )
        )
    assert sum(parameter_parts(config).values()) == count(theirs)


def test_published_shapes():
    # the papers' tables: width, layers, heads; the feed-forward widths of the released configurations
    shapes = {name.removeprefix("Llama "): release.config for name, release in RELEASES.items()}
    assert [(shapes[s].width, shapes[s].layers, shapes[s].heads, shapes[s].hidden) for s in ("1 33B", "1 65B")] == [
        (6656, 60, 52, 17920),
        (8192, 80, 64, 22016),
    ]
    assert [shapes[s].hidden for s in ("2 70B", "3 8B", "3 70B", "3.1 405B")] == [28672, 14336, 28672, 53248]
    assert {s for s, config in shapes.items() if config.kv_heads == 8} == {"2 70B", "3 8B", "3 70B", "3.1 405B"}
    contexts = {s.split()[0]: config.context for s, config in shapes.items()}
    assert contexts == {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072}
    assert {config.head_size for config in shapes.values()} == {128}
    assert {s[0]: (config.vocabulary, config.base) for s, config in shapes.items()} == {
        "1": (32000, 1e4),
        "2": (32000, 1e4),
        "3": (128256, 5e5),
    }
    assert [RELEASES[f"Llama {s}"].tokens for s in ("1 7B", "1 13B", "1 33B", "1 65B")] == [1.0, 1.0, 1.4, 1.4]
    assert RELEASES["Llama 2 7B"].tokens == RELEASES["Llama 2 70B"].tokens == 2.0
    assert RELEASES["Llama 3 8B"].tokens == 15.0


def test_feed_forward_width_rule_by_hand():
    # 8 * 12 / 3 = 32, times 1.3 = 41.6, whole part 41, next multiple of 8: 48
    assert llama(12, 1, 2, wider=1.3, multiple=8, context=8).hidden == 48
    assert llama(12, 1, 2, wider=1.0, multiple=8, context=8).hidden == 32


def test_differences():
    assert differences(TINY, TINY) == {}
    assert differences(RELEASES["Llama 2 70B"].config, RELEASES["Llama 3 70B"].config) == {
        "vocabulary": (32000, 128256),
        "context": (4096, 8192),
        "base": (1e4, 5e5),
    }


def test_a_tied_head_counts_once():
    for tied in (True, False):
        config = Config(**{**vars(TINY), "tied": tied})
        assert sum(parameter_parts(config).values()) == count(Transformer(config))


def test_refuses_to_count_other_blocks():
    with pytest.raises(ValueError, match="experts=4"):
        parameter_parts(Config(experts=4))
    with pytest.raises(ValueError, match="qk_norm=True"):
        parameter_parts(Config(qk_norm=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_token_bytes_equals_a_real_cache(dtype):
    cache = Cache(TINY, 1, 1, like=torch.empty(0, dtype=dtype))
    assert cached_bytes(TINY, bytes_per_value=dtype.itemsize) == cache.k.nbytes + cache.v.nbytes


def test_token_bytes_of_a_release_in_16_bits():
    # 2 * 80 layers * 8 heads * 128 * 2 bytes
    assert cached_bytes(RELEASES["Llama 2 70B"].config) == 327_680


# Llama 3.1's rotations


@pytest.mark.parametrize(
    ("d", "base", "factor", "low", "high", "original"),
    [(128, 5e5, 8.0, 1.0, 4.0, 8192), (64, 1e4, 32.0, 2.0, 3.0, 512)],
)
def test_scaled_frequencies_equal_transformers(d, base, factor, low, high, original):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = dict(
        rope_type="llama3", rope_theta=base, factor=factor, low_freq_factor=low, high_freq_factor=high,
        original_max_position_embeddings=original,
    )  # fmt: skip
    config = LlamaConfig(hidden_size=4 * d, num_attention_heads=4, rope_parameters=scaling)
    theirs = LlamaRotaryEmbedding(config).inv_freq
    frequencies = inverse_frequencies(d, base=base)
    ours = scaled_frequencies(frequencies, factor=factor, low=low, high=high, original=original)
    torch.testing.assert_close(ours, theirs)


def test_fast_pairs_stay_and_slow_pairs_are_divided():
    frequencies = inverse_frequencies(128, base=5e5)
    ratio = scaled_frequencies(frequencies) / frequencies
    turns = 8192 * frequencies / (2 * math.pi)
    assert (ratio[turns > 4] == 1).all()
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 1 / 8))
    between = (turns > 1) & (turns < 4)
    assert between.sum() == 6
    assert ((ratio[between] > 1 / 8) & (ratio[between] < 1)).all()
    assert (ratio.diff() <= 1e-6).all()  # rounding of a float32 quotient near 1


def test_refuses_bounds_in_the_wrong_order():
    with pytest.raises(ValueError, match="low must be under high, got 4 and 4"):
        scaled_frequencies(inverse_frequencies(8), low=4, high=4)


# blocks with one part replaced


def test_plain_blocks_are_the_models_own():
    model, ids = with_blocks(TINY, PlainBlock), torch.arange(10).view(2, 5)
    reference = Transformer(TINY)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids), reference(ids))


def stream(block):
    """x, and what the block adds to it in its second layer alone: attention is switched off."""
    x = randn(2, 3, 16)
    with torch.no_grad():
        block.out.zero_()
        block.feedforward_norm.copy_(randn(16, seed=1))
    half = torch.ones(3, 2)
    return x, block(x, half, 0 * half) - x


@pytest.mark.parametrize("kind", [PlainBlock, LayerNormBlock, NoNormBlock])
def test_what_the_feed_forward_layer_reads(kind):
    block = with_blocks(TINY, kind).blocks[0]
    x, added = stream(block)
    normed = {
        PlainBlock: x / (x.square().mean(dim=-1, keepdim=True) + TINY.eps).sqrt(),
        LayerNormBlock: torch_layer_norm(x, (16,), eps=TINY.eps),
        NoNormBlock: x,
    }[kind] * block.feedforward_norm
    gate, up = (normed @ block.gate_up.mT).chunk(2, dim=-1)
    torch.testing.assert_close(added, (gate * gate.sigmoid() * up) @ block.down.mT)


@pytest.mark.parametrize("kind", [LayerNormBlock, NoNormBlock])
def test_what_attention_reads(kind):
    # one token attends to itself alone: attention is value and output projection of what is read
    block = with_blocks(TINY, kind).blocks[0]
    x = randn(1, 1, 16)
    with torch.no_grad():
        block.down.zero_()
    normed = torch_layer_norm(x, (16,), eps=TINY.eps) if kind is LayerNormBlock else x
    value = (normed @ block.qkv[-8:].mT).view(2, 4).repeat_interleave(2, dim=0)  # 2 KV heads read by 4
    half = torch.ones(1, 2)
    torch.testing.assert_close(block(x, half, 0 * half) - x, (value.flatten() @ block.out.mT).view(1, 1, 16))


def test_relu_block_has_as_many_parameters():
    relu, plain = (with_blocks(TINY, kind) for kind in (ReluBlock, PlainBlock))
    assert count(relu) == count(plain)
    block = relu.blocks[0]
    x, added = stream(block)
    normed = x / (x.square().mean(dim=-1, keepdim=True) + TINY.eps).sqrt() * block.feedforward_norm
    torch.testing.assert_close(added, (normed @ block.gate_up.mT).clamp(min=0) @ block.down.mT)


def test_refuses_an_odd_width_for_relu():
    with pytest.raises(ValueError, match="hidden must be even to become 3/2 of it, got 23"):
        ReluBlock(Config(**{**vars(TINY), "hidden": 23}), 0)


def test_weights_are_drawn_at_the_size_of_their_columns():
    torch.manual_seed(0)
    wide = with_blocks(Config(**{**vars(TINY), "width": 256, "hidden": 512}), PlainBlock).blocks[1]
    # 0.5 / sqrt(256), and the outputs over sqrt(2 * 2 layers); 2 % is over 4 standard errors of 65,536 draws' spread
    assert wide.gate_up.std().item() == pytest.approx(0.5 / 16, rel=0.02)
    assert wide.down.std().item() == pytest.approx(0.5 / 512**0.5 / 2, rel=0.02)
