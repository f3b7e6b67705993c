"""Benchmark of the tokenizer: training and encoding beside the package tokenizers.

python -m tools.bench_bpe
"""

import os
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minillm.data import bpe
from minillm.data.corpus import documents
from tools.bench import timed

VOCABULARY = 6400


def mixed_text(size: int) -> list[str]:
    """Documents of `size` characters in all: the shipped prose, then Python sources of the installed torch."""
    texts: list[str] = []
    sources = sorted(Path(torch.__file__).parent.rglob("*.py"))
    for text in chain(documents("train"), (path.read_text(encoding="utf-8") for path in sources)):
        if size <= 0:
            break
        texts.append(text[:size])
        size -= len(texts[-1])
    return texts


def tokenizers_train(texts: list[str], parallel: bool) -> Any:
    """The peer: Rust, its built-in GPT-2 pattern, the same alphabet and special tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"  # read at every call
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(bpe.SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def tokenizer_table() -> None:
    version = tokenizers.__version__
    print(f"\nTokenizer, byte-level BPE to {VOCABULARY:,} ids, ours (Python) beside tokenizers {version} (Rust)")
    print("Training in seconds, processor / wall; the ratio is ours to theirs on one thread (processor time):")
    print(f"{'text':>8}  {'ours':>15}  {'one thread':>15}  {'all threads':>15}  ratio  wall ratio to all threads")
    for size in (1_000_000, 5_000_000, 20_000_000):
        texts = mixed_text(size)
        found = timed(
            {
                "ours": partial(bpe.train, texts, VOCABULARY),
                "one": partial(tokenizers_train, texts, parallel=False),
                "all": partial(tokenizers_train, texts, parallel=True),
            },
            runs=3,
        )
        row = "  ".join(f"{found[name][0]:>6.2f} / {found[name][1]:>6.2f}" for name in ("ours", "one", "all"))
        ratio, wall = found["ours"][0] / found["one"][0], found["ours"][1] / found["all"][1]
        print(f"{size // 10**6:>5} MB  {row}  {ratio:>5.2f}  {wall:>5.2f}", flush=True)
    texts = documents("train")
    ours, theirs = bpe.train(texts, VOCABULARY), tokenizers_train(texts, parallel=False)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def encode_cold() -> None:
        ours._cache.clear()
        for text in texts:
            ours.encode(text)

    found = timed(
        {
            "ours, first time": encode_cold,
            "ours, words seen before": lambda: [ours.encode(text) for text in texts],
            "tokenizers, one thread": lambda: [theirs.encode(text) for text in texts],
        },
        runs=5,
    )
    print(f"Encoding {megabytes:.1f} MB of prose, MB/s of processor time:")
    for name, (cpu, _) in found.items():
        print(f"  {name:<26} {megabytes / cpu:6.1f}")


if __name__ == "__main__":
    tokenizer_table()
