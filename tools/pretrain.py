"""Train the small model that ships: 2.4 M parameters on Jane Austen's novels, one seed, about half an hour on one core.

    python tools/pretrain.py                         write minillm/data/austen-2m anew
    python tools/pretrain.py --steps 20              only the first steps, and how far they are from the record

The folder holds a Hugging Face checkpoint in bfloat16 (`transformers` reads it), the tokenizer, and `training.json`:
what was done, and the loss of every tenth step. The schedule is constant between warm-up and the last third, so that
the first steps of a full run and of a short one are the same steps, and a short run can be held against the record.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from minillm.architecture import pretrained
from minillm.architecture.transformer import Config, Transformer
from minillm.data import bpe, corpus
from minillm.training.loop import Record, Run, TrainConfig
from minillm.training.recipe import pair_counts, table_groups, warm_start
from minillm.training.schedule import wsd

SEED, VOCABULARY, LENGTH, BATCH, STEPS = 0, 2048, 256, 8, 2600
EVERY = 10  # steps between two losses of the record
RATES = {"matrices": 2e-3, "tables": 3e-3}
SHAPE = Config(VOCABULARY, width=192, layers=4, heads=6, kv_heads=2, head_size=32, hidden=512, context=1024, tied=False)


class Prepared(NamedTuple):
    """A run before its first step, and the tokenizer of its data."""

    run: Run
    tokenizer: bpe.Tokenizer


def prepare() -> Prepared:
    """Tokenizer, data, a model warm-started from the counts of pairs, and AdamW: everything from one seed."""
    torch.manual_seed(SEED)
    parts = corpus.documents("train"), corpus.documents("held_out")
    tokenizer = bpe.train(parts[0], VOCABULARY)
    eos = tokenizer.special["<|endoftext|>"]
    rows, test = (corpus.pack([tokenizer.encode(text) for text in part], LENGTH, eos=eos) for part in parts)
    model = Transformer(SHAPE)
    warm_start(model, pair_counts(rows.ids, VOCABULARY))
    groups = table_groups(model, tables=RATES["tables"])
    optimizer = torch.optim.AdamW(groups, RATES["matrices"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    config = TrainConfig(steps=STEPS, schedule=partial(wsd, warmup=20, total=STEPS, decay=STEPS // 3), log_every=EVERY)
    held_out = test, corpus.token_bytes(tokenizer)
    return Prepared(Run(model, corpus.Loader(rows, BATCH, seed=SEED), optimizer, config, held_out=held_out), tokenizer)


def recorded(folder: Path = corpus.AUSTEN_2M) -> dict[int, float]:
    """Loss in nats by step, of the run that made the checkpoint."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return {int(step): loss for step, loss in record["loss"].items()}


def write(folder: Path, run: Run, tokenizer: bpe.Tokenizer) -> None:
    """Checkpoint, tokenizer and record."""
    bits = run.bits_per_byte()
    eos = tokenizer.special["<|endoftext|>"]
    pretrained.save(run.model.to(torch.bfloat16), folder, more={"bos_token_id": eos, "eos_token_id": eos})
    tokenizer.save(folder / "tokenizer.json")
    facts = {
        "script": "tools/pretrain.py",
        "data": "minillm/data/austen.txt.xz, all chapters that are not held out",
        "seed": SEED,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.done,
        "tokens": run.tokens,
        "seconds": round(run.seconds),
        "torch": torch.__version__.split("+")[0],
        "held_out_bits_per_byte": round(bits, 4),
        "loss": {record.step: round(record.loss, 4) for record in run.records},
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train, or compare the first steps with the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after so many and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, tokenizer = prepare()

    def tell(record: Record) -> None:
        if record.step % 200 == 0:
            print(f"{record}  held-out {run.bits_per_byte():.3f} bits/byte", flush=True)

    run.train(until=options.steps, on_step=tell)
    if run.done == STEPS:
        write(corpus.AUSTEN_2M, run, tokenizer)
        return
    right = recorded()
    for record in run.records:
        print(f"step {record.step:4d}  loss {record.loss:.4f}  recorded {right[record.step]:.4f}")


if __name__ == "__main__":
    main()
