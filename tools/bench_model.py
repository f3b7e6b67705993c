"""Benchmarks of the decoder: training steps and generation against transformers and, where installed, litgpt.

    python -m tools.bench_model [--threads 1] [--runs 8]

The calls take turns in one process and time is processor time, so that a busy machine slows all alike; only the ratios
mean something. Two floors of generation: reading every weight once a step, as a product with one row, in the faster of
the two orders in memory; and the products alone, one row a sequence, weights packed as `inference.layout` does it.
"""

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minillm.architecture.pretrained import config_entries
from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Rows
from minillm.inference.generate import generate
from minillm.inference.layout import Packed, by_columns, for_decoding
from minillm.training.loop import before_targets, task
from minillm.training.objective import chunked_cross_entropy
from tools.bench import interleaved

SIZES = {
    "5 M": Config(width=256, layers=5, head_size=32, hidden=688),
    "25 M": Config(width=512, layers=8, head_size=64, hidden=1376),
}
LENGTH, BATCH = 256, 8
PROMPT, NEW = 64, 128


def llama(c: Config) -> Any:
    """The same shape in transformers, without tokens at which generation would stop."""
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_entries(c) | tokens))


def litgpt(c: Config) -> Any:
    """The same shape in litgpt."""
    from litgpt.model import GPT
    from litgpt.model import Config as Shape

    shape = Shape(
        block_size=c.context,
        vocab_size=c.vocabulary,
        padded_vocab_size=c.vocabulary,
        n_layer=c.layers,
        n_head=c.heads,
        head_size=c.head_size,
        n_query_groups=c.kv_heads,
        n_embd=c.width,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=c.hidden,
        norm_eps=c.eps,
    )
    model = GPT(shape)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def has_litgpt() -> bool:
    """It is no dependency: `pip install litgpt==0.5.13 --no-deps` beside what is here is enough for its model."""
    return importlib.util.find_spec("litgpt") is not None


def ours_loss(model: Any, ids: Tensor) -> Tensor:
    """As training.loop does it: head and loss in chunks."""
    given = task(Rows(ids, torch.zeros_like(ids)), separate=False)
    return chunked_cross_entropy(before_targets(model, given), model.unembedding, given.targets)


def llama_loss(model: Any, ids: Tensor) -> Tensor:
    """As its own users do it, labels given."""
    return model(ids, labels=ids, use_cache=False).loss


def litgpt_loss(model: Any, ids: Tensor) -> Tensor:
    """As its own pretraining does it."""
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train_step(model: Any, loss_of: Callable[[Any, Tensor], Tensor], half: bool) -> Callable[[], None]:
    """Forward, backward, fused AdamW."""
    ids = torch.randint(Config.vocabulary, (BATCH, LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row(name: str, seconds: dict[str, float]) -> str:
    """Ours relative to the best peer, then everybody relative to ours."""
    best = min(value for peer, value in seconds.items() if peer != "ours")
    ratios = "  ".join(f"{peer} {value / seconds['ours']:.2f}" for peer, value in seconds.items() if peer != "ours")
    return f"  {name:<22} {seconds['ours'] * 1e3:8.0f} ms  {seconds['ours'] / best:.2f} of the best; {ratios}"


def training_table(runs: int) -> None:
    print(f"\nA training step, vocabulary 6,400, t = {LENGTH}, batch {BATCH}; peers relative to ours (above 1: slower)")
    for size, config in SIZES.items():
        for half in (False, True):
            calls = {"ours": train_step(Transformer(config), ours_loss, half)}
            calls["transformers"] = train_step(llama(config).train(), llama_loss, half)
            if has_litgpt():
                calls["litgpt"] = train_step(litgpt(config), litgpt_loss, half)
            name = f"{size} {'bf16 autocast' if half else 'fp32'}"
            print(row(name, interleaved(calls, runs)), flush=True)


def products(weights: list[Tensor], rows: int) -> None:
    """The least a decoding loop does: every matrix times the rows of one step, once a token."""
    inputs = {width: torch.ones(rows, width) for width in {weight.shape[1] for weight in weights}}
    with torch.inference_mode():
        for _ in range(NEW):
            for weight in weights:
                F.linear(inputs[weight.shape[1]], weight)


def litgpt_generate(model: Any, ids: Tensor) -> Callable[[], Any]:
    """Its own loop, greedy, for one sequence and for several."""
    from litgpt.generate.base import batched_generate_fn
    from litgpt.generate.base import generate as single

    model.max_seq_length = PROMPT + NEW
    model.set_kv_cache(len(ids))
    if len(ids) == 1:
        return lambda: single(model, ids[0], PROMPT + NEW, temperature=0.0, top_p=0.0)
    how = dict(temperature=0.0, top_p=0.0)
    return lambda: list(
        batched_generate_fn(model, ids, PROMPT + NEW, sample_args=how, include_prompt=False, include_eos=True)
    )


def generation_table(runs: int) -> None:
    print(f"\nGreedy generation of {NEW} tokens after {PROMPT}, KV cache; relative to ours (above 1: slower)")
    for size, config in SIZES.items():
        for batch in (1, 8):
            ids = torch.randint(config.vocabulary, (batch, PROMPT))
            model, peer = for_decoding(Transformer(config), batch=batch), llama(config).eval()
            mask = torch.ones_like(ids)
            calls: dict[str, Callable[[], Any]] = {
                "ours": partial(generate, model, ids, new_tokens=NEW),
                "transformers": partial(
                    peer.generate, ids, attention_mask=mask, min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False
                ),
            }
            if has_litgpt():
                calls["litgpt"] = litgpt_generate(litgpt(config).eval(), ids)
            plain = [weight.detach() for weight in Transformer(config).parameters() if weight.ndim > 1]
            columns = [by_columns(weight) for weight in plain]
            floors = {"rows": partial(products, plain, 1), "columns": partial(products, columns, 1)}
            packed: list[Tensor] = columns if batch == 1 else [Packed(weight, batch) for weight in plain]
            seconds = interleaved(calls | floors | {"products": partial(products, packed, batch)}, runs)
            share = [
                floor / seconds["ours"] for floor in (min(seconds.pop(x) for x in floors), seconds.pop("products"))
            ]
            rate = f"{share[0]:.0%} of the rate of reading weights, {share[1]:.0%} of the products"
            print(row(f"{size}, batch {batch}", seconds) + f"; {rate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=6, help="of each call, after one that warms up")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {options.threads} thread(s), processor time")
    training_table(options.runs)
    generation_table(options.runs)


if __name__ == "__main__":
    main()
