"""Hugging Face checkpoints of the Llama family: read into our model, written from it, never a part of one.

Idea:        A checkpoint is a config.json and tensors by name. Our blocks keep products that are done together in one
             matrix (q, k, v; gate, up; all experts), so each tensor of the file is some rows of a parameter of ours: a
             view. One table of views serves both ways. Reading is refused before the first value is read unless the
             names are the same on both sides and every shape fits.
Cost:        memory of the model plus one tensor.
Paper:       Touvron et al. 2023, "LLaMA", arXiv:2302.13971.
Production:  transformers LlamaForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM.
Leaves out:  scaled rotary frequencies, biases, sliding windows and quantised weights: such a checkpoint is refused.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm.architecture.transformer import Block, Config, Transformer, rotation_tables

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
HEAD_SIZE = {"qwen3": 128}  # of a file that does not say; elsewhere width / heads
BASE = {"mixtral": 1e6}  # the same for rope_theta; elsewhere 10,000
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # `transformers` would take 1 and 2


def family_of(config: Config) -> str:
    """The `model_type` of a configuration."""
    dense, sparse = ("qwen3", "qwen3_moe") if config.qk_norm else ("llama", "mixtral")
    return sparse if config.experts else dense


def checkpoint_views(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint by its name there, as a view of the parameter that holds it."""
    config, family = model.config, family_of(model.config)
    q, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    views: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if model.head is not None:
        views["lm_head.weight"] = model.head
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        views[layer + "input_layernorm.weight"] = block.attention_norm
        views[layer + "post_attention_layernorm.weight"] = block.feedforward_norm
        views |= zip((f"{attention}{x}_proj.weight" for x in "qkv"), block.qkv.split([q, kv, kv]), strict=True)
        views[attention + "o_proj.weight"] = block.out
        if block.q_norm is not None and block.k_norm is not None:
            views |= {f"{attention}q_norm.weight": block.q_norm, f"{attention}k_norm.weight": block.k_norm}
        if not config.experts:
            views |= feedforward_views(mlp, ("gate_proj", "up_proj", "down_proj"), block.gate_up, block.down)
            continue
        names = ("gate_proj", "up_proj", "down_proj")
        if family == "mixtral":
            mlp, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
        views[mlp + "gate.weight"] = block.moe.router
        for e, (gate_up, down) in enumerate(zip(block.moe.gate_up, block.moe.down, strict=True)):
            views |= feedforward_views(f"{mlp}experts.{e}.", names, gate_up, down)
    return {name: view.detach() for name, view in views.items()}


def feedforward_views(prefix: str, names: tuple[str, str, str], gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """The three tensors of a SwiGLU layer."""
    tensors = (*gate_up.chunk(2), down)
    return {f"{prefix}{name}.weight": tensor for name, tensor in zip(names, tensors, strict=True)}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds {type(found).__name__}")
    return found


def read_config(folder: Path) -> Config:
    """The model's shape. ValueError for what the model cannot do and for what the file does not say."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not a Hugging Face checkpoint")
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{path}: model_type must be one of {', '.join(ARCHITECTURES)}, it is {family!r}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    turned = {"rope_type", "type", "rope_theta"}  # any other entry changes the rotation
    refused = {
        "rope_parameters": bool(rope.keys() - turned)
        or not {rope.get("rope_type"), rope.get("type")} <= {"default", None},
        "partial_rotary_factor": raw.get("partial_rotary_factor") not in (None, 1),
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "sliding_window": bool(raw.get("sliding_window")) and bool(raw.get("use_sliding_window", True)),
        "quantization_config": bool(raw.get("quantization_config")),
        "mlp_only_layers": bool(raw.get("mlp_only_layers")),
        "decoder_sparse_step": raw.get("decoder_sparse_step", 1) != 1,
    }
    for what in (what for what, present in refused.items() if present):
        raise ValueError(f"{path}: this model has no {what} = {raw.get(what, rope)!r}")

    def number(*names: str, default: int | float | None = None) -> Any:
        found = [raw[name] for name in names if raw.get(name) is not None]
        value = found[0] if found else default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {' or '.join(names)} must be a number above 0, it is {value!r}")
        return value

    heads, width, moe = number("num_attention_heads"), number("hidden_size"), family in ("mixtral", "qwen3_moe")
    raw.setdefault("rope_theta", rope.get("rope_theta"))
    return Config(
        vocabulary=number("vocab_size"),
        width=width,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_size=number("head_dim", default=HEAD_SIZE.get(family, width // heads)),
        hidden=number("moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"),
        context=number("max_position_embeddings"),
        base=number("rope_theta", default=BASE.get(family, 10000.0)),
        eps=number("rms_norm_eps"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family.startswith("qwen3"),
        experts=number("num_experts", "num_local_experts") if moe else 0,
        active=number("num_experts_per_tok") if moe else Config.active,
        renormalise=bool(raw.get("norm_topk_prob", False)) if family == "qwen3_moe" else True,
    )


def config_entries(config: Config) -> dict[str, Any]:
    """The config.json that `transformers` reads back into the same model."""
    family = family_of(config)
    if family == "mixtral" and not config.renormalise:
        raise ValueError("Mixtral renormalises the weights of its experts, this model does not: no family has that")
    entries: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rope_theta": config.base,  # where transformers looks for it before version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.base},
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
    }
    if config.experts:
        entries |= {"num_experts_per_tok": config.active, "num_local_experts": config.experts}
    if family == "qwen3_moe":
        entries |= {"num_experts": config.experts, "moe_intermediate_size": config.hidden}
        entries |= {"norm_topk_prob": config.renormalise, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return entries


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """For every tensor of the checkpoint the open file that holds it. One file, or parts with an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    listed: dict[str, str] | None = None
    if single.is_file():
        paths = [single]
    elif index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map: it is not the index of a checkpoint")
        paths = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")
    found: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{index} names {path.name}, which is not there")
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        found |= dict.fromkeys(file.keys(), file)
    if listed is not None and (odd := listed.keys() ^ found.keys()):
        raise ValueError(f"{index} and its files disagree about {min(odd)} ({len(odd)} such tensors)")
    return found


def check_tensors(folder: Path, views: Mapping[str, Tensor], files: Mapping[str, Any], *, tied: bool) -> None:
    """Refuse names, shapes and dtypes that are not exactly the model's."""
    if missing := sorted(views.keys() - files.keys()):
        raise ValueError(f"{folder}: the checkpoint has no tensor {missing[0]} ({len(missing)} missing)")
    old_table = {name for name in files if name.endswith("rotary_emb.inv_freq")}  # which config.json says anyway
    if unused := files.keys() - views.keys() - old_table - ({"lm_head.weight"} if tied else set()):
        raise ValueError(f"{folder}: nothing in this model uses {min(unused)} ({len(unused)} such tensors)")
    for name, view in views.items():
        stored = files[name].get_slice(name)
        if (shape := tuple(stored.get_shape())) != tuple(view.shape):
            raise ValueError(f"{folder}: {name} must be {tuple(view.shape)} by config.json, it is {shape}")
        if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
            raise ValueError(f"{folder}: {name} is quantised, {stored.get_dtype()}: only plain weights can be read")


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a checkpoint, on the CPU, in evaluation mode. ValueError names the first tensor that is missing,
    that nothing uses, or whose shape differs, with both shapes; FileNotFoundError the file. Nothing is read in part."""
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    with ExitStack() as stack, torch.no_grad():
        files = open_tensors(folder, stack)
        check_tensors(folder, checkpoint_views(model), files, tied=config.tied)
        model.to_empty(device="cpu")
        model.cos, model.sin = rotation_tables(config)
        for name, view in checkpoint_views(model).items():
            view.copy_(files[name].get_tensor(name))
        if config.tied and "lm_head.weight" in files:
            stored = files["lm_head.weight"].get_tensor("lm_head.weight").to(dtype)
            if not torch.equal(stored, model.embedding):
                raise ValueError(f"{folder}: lm_head.weight differs from the embedding, but config.json ties them")
    return model.eval()


def save(model: Transformer, folder: str | Path, *, more: Mapping[str, Any] | None = None) -> None:
    """Write config.json and model.safetensors for `transformers`. `more` are further entries of config.json, such as
    eos_token_id. ValueError if the model has parameters for which the format has no place. Old files are replaced
    only when the new ones are complete."""
    folder, config = Path(folder), model.config
    with torch.device("meta"):
        plain = dict(Transformer(config).named_parameters())
    if odd := plain.keys() ^ dict(model.named_parameters()).keys():
        raise ValueError(f"a checkpoint holds the parameters of the plain model, this one differs in {min(odd)}")
    dtype = str(model.embedding.dtype).removeprefix("torch.")
    entries = {**config_entries(config), "dtype": dtype, **TOKENS, **(more or {})}
    tensors = {name: view.cpu().contiguous() for name, view in checkpoint_views(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json.part").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f"{name}.part", folder / name)
