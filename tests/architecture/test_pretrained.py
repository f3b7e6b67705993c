"""Checkpoints: the same function on both sides, complete or refused by name, never read in part."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.architecture.pretrained import checkpoint_views, family_of, load, save
from minillm.architecture.transformer import Config, Transformer

SMALL = dict(vocabulary=61, width=24, layers=2, heads=4, kv_heads=2, head_size=10, hidden=28, context=40, eps=1e-3)
VARIANTS = {
    "llama": dict(tied=False),
    "llama, tied": dict(base=500.0),
    "qwen3": dict(qk_norm=True, base=1e6),
    "mixtral": dict(experts=4, tied=False),
    "qwen3_moe": dict(experts=4, qk_norm=True, renormalise=False, tied=False),
    "qwen3_moe, renormalised": dict(experts=4, active=3, qk_norm=True),
}


def build(**options):
    """A model in which no two numbers are equal."""
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL | options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.ndim == 1))
    return model.eval()


def ids():
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    """A small Llama checkpoint."""
    save(build(tied=False), tmp_path)
    return tmp_path


def change_config(folder, **entries):
    """Set entries of config.json; None takes one out."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def change_tensors(folder, **changes):
    """Set tensors of the file by the ends of their names; None takes one out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for end, value in changes.items():
        name = end if end.startswith("new") else next(n for n in tensors if n.endswith(end.replace("__", ".")))
        tensors[name] = value(tensors[name]) if callable(value) else value
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


# there and back


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_model_comes_back(options, tmp_path):
    model = build(**options)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.config == model.config
    assert not back.training
    assert {name: p.dtype for name, p in back.named_parameters()} == dict.fromkeys(
        dict(model.named_parameters()), torch.float32
    )
    for (name, ours), (other, theirs) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
        assert theirs.requires_grad
    assert torch.equal(back(ids()), model(ids()))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_views_hold_every_number_once(options):
    model = build(**options)
    views = checkpoint_views(model)
    assert sum(view.numel() for view in views.values()) == sum(p.numel() for p in model.parameters())
    for view in views.values():
        view.fill_(7.0)
    assert all((p == 7).all() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_transformers_reads_what_we_write(options, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(**options)
    save(model, tmp_path, more={"eos_token_id": 3})
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__.lower().removesuffix("forcausallm") == family_of(model.config).replace("_", "")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (3, None)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(ids()).logits, model(ids()), rtol=1e-4, atol=1e-4)  # float32, logits up to 30
    if not model.config.experts:  # transformers runs all experts at once, in another order
        torch.testing.assert_close(theirs(ids()).logits, model(ids()))


@torch.no_grad()
def test_reads_parts_with_an_index(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(load(tmp_path)(ids()), theirs(ids()).logits)
    part = min(tmp_path.glob("model-*.safetensors"))
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_written_and_read_as_asked(dtype, tmp_path):
    model = build().to(dtype)
    save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    wide, half = load(tmp_path), load(tmp_path, dtype=dtype)
    assert (wide.embedding.dtype, half.embedding.dtype) == (torch.float32, dtype)
    assert wide.cos.dtype == half.cos.dtype == torch.float32  # angles are never rounded
    assert torch.equal(wide.embedding, model.embedding.float())
    assert torch.equal(half.embedding, model.embedding)


def test_a_loaded_model_can_be_written_over_its_own_files(folder):
    model = load(folder)
    expected = model(ids())
    with torch.no_grad():
        model.norm.mul_(2.0)
    save(model, folder)
    torch.testing.assert_close(model(ids()), 2 * expected)
    torch.testing.assert_close(load(folder)(ids()), 2 * expected)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_new_file_hides_old_parts(folder):
    save_file({"old": torch.zeros(1)}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"old": "model-1.safetensors"}}))
    assert torch.equal(load(folder)(ids()), build(tied=False)(ids()))


def test_a_loaded_model_trains(folder):
    model = load(folder)
    model(ids()).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("entries", [dict(rope_parameters=None), dict(rope_theta=None)], ids=["old", "new"])
def test_the_base_is_found_where_either_version_of_transformers_writes_it(entries, tmp_path):
    save(build(base=500.0), tmp_path)
    change_config(tmp_path, **entries)
    assert load(tmp_path).config.base == 500.0


def test_what_old_llama_files_leave_out(folder):
    # no head_dim: hidden_size / heads, 24 / 4; no rope_theta: 10,000; no num_key_value_heads: as many as heads
    save(build(tied=False, kv_heads=4, head_size=6), folder)
    change_config(folder, head_dim=None, rope_theta=None, rope_parameters=None, num_key_value_heads=None)
    change_tensors(folder, new_table=None)
    config = load(folder).config
    assert (config.head_size, config.base, config.kv_heads) == (6, 10000.0, 4)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    save(build(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).head is None
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)


def test_old_files_may_hold_the_table_of_frequencies(folder):
    change_tensors(folder, **{"new.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert torch.equal(load(folder)(ids()), build(tied=False)(ids()))


# refusals


def test_refuses_a_missing_tensor(folder):
    change_tensors(folder, layers__1__mlp__down_proj__weight=None)
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.down_proj\.weight \(1 missing\)"):
        load(folder)


def test_refuses_a_tensor_that_nothing_uses(folder):
    change_tensors(folder, **{"new.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"nothing in this model uses new\.bias"):
        load(folder)


def test_refuses_more_layers_than_the_config_says(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"uses model\.layers\.1\..* \(9 such tensors\)"):
        load(folder)


@pytest.mark.parametrize(
    ("tensor", "change", "expected", "got"),
    [
        ("layers__0__self_attn__k_proj__weight", lambda x: x[:10], (20, 24), (10, 24)),
        ("layers__1__mlp__up_proj__weight", lambda x: x.T.contiguous(), (28, 24), (24, 28)),
        ("embed_tokens__weight", lambda x: x[:60], (61, 24), (60, 24)),
        ("model__norm__weight", lambda x: x[:1], (24,), (1,)),  # would be broadcast
        ("lm_head__weight", lambda x: x[None], (61, 24), (1, 61, 24)),
    ],
)
def test_refuses_a_wrong_shape_with_its_name_and_both_shapes(folder, tensor, change, expected, got):
    change_tensors(folder, **{tensor: change})
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is looked at
        load(folder)
    assert tensor.replace("__", ".") in str(error.value)
    assert f"must be {expected} by config.json, it is {got}" in str(error.value)


def test_refuses_swapped_numbers_of_heads(folder):
    change_config(folder, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match=r"q_proj\.weight must be \(20, 24\) by config\.json, it is \(40, 24\)"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_refuses_quantised_weights(folder, dtype):
    change_tensors(folder, layers__0__mlp__down_proj__weight=lambda x: x.to(dtype))
    with pytest.raises(ValueError, match=r"down_proj\.weight is quantised"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_refuses_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_refuses_a_folder_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no config\.json"):
        load(tmp_path / "nowhere")
    save(build(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"lm_head.weight": "model-1.safetensors"}}])
def test_refuses_an_index_that_does_not_fit_its_files(folder, index):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json (has no weight_map|and its files disagree about model)"):
        load(folder)


def test_refuses_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, it holds list"):
        load(folder)


@pytest.mark.parametrize("family", ["gpt2", None])
def test_refuses_another_family(folder, family):
    change_config(folder, model_type=family)
    with pytest.raises(ValueError, match=f"must be one of llama, .*, it is {family!r}"):
        load(folder)


@pytest.mark.parametrize(
    "entries",
    [
        dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0)),
        dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
        dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4))),
        dict(rope_parameters="yarn"),
        dict(partial_rotary_factor=0.5),
        dict(attention_bias=True),
        dict(mlp_bias=True),
        dict(hidden_act="gelu"),
        dict(sliding_window=16),
        dict(quantization_config=dict(quant_method="fp8")),
        dict(mlp_only_layers=[0]),
        dict(decoder_sparse_step=2),
    ],
    ids=str,
)
def test_refuses_what_the_model_has_not(folder, entries):
    change_config(folder, **entries)
    name = list(entries)[-1].replace("rope_scaling", "rope_parameters")
    with pytest.raises(ValueError, match=f"this model has no {name} = "):
        load(folder)


def test_a_window_that_is_switched_off_is_none(tmp_path):
    save(build(qk_norm=True), tmp_path)
    change_config(tmp_path, sliding_window=16, use_sliding_window=False)
    assert load(tmp_path).config.qk_norm


@pytest.mark.parametrize("value", [None, "two", True, 0])
@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"]
)
def test_refuses_a_config_without_a_number(folder, name, value):
    change_config(folder, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a number above 0, it is {value!r}"):
        load(folder)


def test_refuses_to_save_what_the_format_has_no_place_for(tmp_path):
    model = build()
    model.blocks[1].adapter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"differs in blocks\.1\.adapter"):
        save(model, tmp_path)
    with pytest.raises(ValueError, match="Mixtral renormalises"):
        save(build(experts=4, renormalise=False), tmp_path)
    assert list(tmp_path.iterdir()) == []
