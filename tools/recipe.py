"""What a minute of CPU time teaches a model from scratch, three recipes on one text, one thread, several seeds.

    python tools/recipe.py [--seconds 60] [--seeds 3]

Each run has the same text (Jane Austen, see minillm/data/ORIGIN.md), tokenizer (byte-level BPE of 2,048), layers (two
of width 128), row length (128 tokens) and CPU seconds, in which everything but the tokenizer and the evaluation counts.
Learning rates and batch sizes were chosen for each recipe by itself, with runs of 20 seconds: AdamW among rates of
0.002 to 0.006 and 2 to 16 rows; Muon among rates of its tables of 0.002 to 0.01, 4 and 8 rows, tied and untied.

On one machine, 3 seeds: AdamW 1.678 (sd 0.009), Muon 1.647 (0.009), the recipe 1.553 (0.004) bits per byte; its
warm start alone, before the first batch, 1.70. A faster machine reads more text in a minute: compare within one run.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch

from minillm.architecture.feedforward import matched_hidden
from minillm.architecture.transformer import Config, Transformer
from minillm.data import bpe, corpus
from minillm.training.optimizers import Muon, hidden_matrices
from minillm.training.recipe import Budget, pair_counts, table_groups, train_for, warm_start

VOCABULARY, LENGTH, WIDTH = 2048, 128, 128
Optimizers = Sequence[torch.optim.Optimizer]


def shape(*, tied: bool) -> Config:
    """Two layers of width 128 with four heads."""
    hidden = matched_hidden(WIDTH, multiple=8)
    return Config(VOCABULARY, WIDTH, layers=2, heads=4, kv_heads=4, head_size=32, hidden=hidden, context=512, tied=tied)


def adamw(ids: torch.Tensor) -> tuple[Transformer, Optimizers, int]:
    """AdamW with one learning rate, the tables tied."""
    model = Transformer(shape(tied=True))
    return model, [torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), fused=True)], 4


def muon(ids: torch.Tensor) -> tuple[Transformer, Optimizers, int]:
    """Muon for the matrices, AdamW for tables (embedding large, head zero) and norms."""
    model = Transformer(shape(tied=False))
    torch.nn.init.normal_(model.embedding, std=0.5)
    torch.nn.init.zeros_(model.unembedding)
    matrices, others = hidden_matrices(model)
    norms = {"params": [p for p in others if p.ndim < 2], "lr": 2e-3}
    tables = {"params": [p for p in others if p.ndim > 1], "lr": 1e-2}
    rest = torch.optim.AdamW([tables, norms], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return model, [Muon(matrices, 0.02, weight_decay=0.0, dtype=torch.float32), rest], 8


def recipe(ids: torch.Tensor) -> tuple[Transformer, Optimizers, int]:
    """Warm start from the counts of pairs; AdamW, tables with a rate of their own."""
    model = Transformer(shape(tied=False))
    warm_start(model, pair_counts(ids, VOCABULARY))
    groups = table_groups(model, tables=4e-3)
    return model, [torch.optim.AdamW(groups, 3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)], 4


RECIPES: dict[str, Callable[[torch.Tensor], tuple[Transformer, Optimizers, int]]] = {
    "AdamW": adamw,
    "Muon + AdamW": muon,
    "recipe": recipe,
}


def main() -> None:
    """Train each recipe with each seed, in turns, and print held-out bits per byte."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, held_out = corpus.documents("train"), corpus.documents("held_out")
    tokenizer = bpe.train(texts, VOCABULARY)
    eos = tokenizer.special["<|endoftext|>"]
    rows, test = (corpus.pack([tokenizer.encode(x) for x in part], LENGTH, eos=eos) for part in (texts, held_out))
    lengths = corpus.token_bytes(tokenizer)
    found: dict[str, list[float]] = {name: [] for name in RECIPES}
    for seed in range(options.seeds):
        for name, make in RECIPES.items():
            torch.manual_seed(seed)
            budget = Budget(options.seconds)
            model, optimizers, batch = make(rows.ids)
            loader = corpus.Loader(rows, batch, seed=seed)
            curve = train_for(budget, model, loader, optimizers, held_out=(test, lengths), points=6)
            found[name].append(curve[-1][1])
            told = "  ".join(f"{bits:.3f}" for _, bits in curve)
            print(f"seed {seed}  {name:14s}{told}  bits/byte after each sixth; {loader.taken} rows read", flush=True)
    for name, bits in found.items():
        spread = f" (sd {statistics.stdev(bits):.3f})" if len(bits) > 1 else ""
        print(f"{name:14s}{statistics.mean(bits):.3f} bits/byte{spread}")


if __name__ == "__main__":
    main()
