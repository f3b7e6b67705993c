"""Checkpoints: the same logits as transformers from the same files, both ways, and nothing loaded in part."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minillm.architecture.pretrained import load, save
from minillm.architecture.transformer import Cache

BASE = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
BASE |= dict(intermediate_size=48, max_position_embeddings=64)
MODELS = {
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama base": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3 moe": (
        "Qwen3Moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    ),
}


@pytest.fixture(params=MODELS)
def theirs(request, tmp_path):
    """A model of transformers with large random weights, and the folder it is saved in."""
    family, more = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE, **more)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    made.save_pretrained(tmp_path / "theirs")
    return made, tmp_path / "theirs"


IDS = torch.randint(0, 99, (2, 13), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(theirs):
    made, folder = theirs
    ours = load(folder)
    expected = made(IDS).logits
    # float32 sums in another order, logits of size 6: a few units of rounding
    torch.testing.assert_close(ours(IDS), expected, rtol=1e-4, atol=1e-4)
    cache = Cache(ours.config, 2, 16, like=ours.embedding)
    parts = [ours(piece, cache=cache) for piece in IDS.split([5, 4, 1, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_reads_what_we_write(theirs, tmp_path):
    made, folder = theirs
    save(load(folder), tmp_path / "ours")
    again = type(made).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    for (name, a), (_, b) in zip(
        load(folder).named_parameters(), load(tmp_path / "ours").named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE)).save_pretrained(tmp_path)
    return tmp_path


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"no tensor {Q} .1 missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "nothing in this model uses extra"),
        (lambda t: t.update({Q: torch.zeros(32, 31)}), rf"{Q} must be \(32, 32\) by config.json, it is \(32, 31\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight must be \(32,\) .* \(31,\)"),
    ],
)
def test_mismatched_tensors_are_refused_by_name(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model_type="gpt2"), "model_type must be one of llama, qwen3, mixtral, qwen3_moe, it is 'gpt2'"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), "rope_parameters = .*yarn"),
        (dict(attention_bias=True), "attention_bias = True"),
        (dict(num_hidden_layers=3), "no tensor model.layers.2"),
        (dict(num_hidden_layers=1), "nothing in this model uses model.layers.1"),
        (dict(num_key_value_heads=4), r"k_proj.weight must be \(32, 32\) by config.json, it is \(16, 32\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_file_in_parts(folder, tmp_path):
    whole = load(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for a, b in zip(whole.parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(a, b)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names b.safetensors, which is not there"):
        load(folder)


def test_missing_files_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load(folder)
