"""Train the small policy that reinforcement learning starts from: 87 k parameters, a hundred demonstrations, seconds.

    python tools/start_policy.py                     write minillm/data/sort-87k anew
    python tools/start_policy.py --steps 20          only the first steps, and how far they are from the record

The folder holds a Hugging Face checkpoint (`transformers` reads it) and `training.json`: what was done, how often the
policy is right on held-out prompts, and the loss of every tenth step. It sorts five digits and has seen the answers of
100 prompts, each many times, so it is sure of itself and often wrong: what reinforcement learning can mend.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.alignment import tasks
from minillm.alignment.rollout import greedy, pass_at_k, sample
from minillm.architecture import pretrained
from minillm.architecture.transformer import Config, Transformer
from minillm.training.objective import next_token_loss

SEED, STEPS, BATCH, RATE, WARMUP = 0, 100, 64, 3e-3, 20
EVERY = 10  # steps between two losses of the record
SHAPE = Config(len(tasks.SYMBOLS), width=64, layers=2, heads=4, kv_heads=2, head_size=16, hidden=160, context=32)


class Trained(NamedTuple):
    """A policy and the loss in nats of every tenth step."""

    model: Transformer
    loss: dict[int, float]


def train(steps: int = STEPS) -> Trained:
    """Supervised training on the answers, not on the prompts: everything from one seed, at a constant rate."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Transformer(SHAPE)
    shown = tasks.split().shown
    ids = torch.cat([shown, tasks.answers(shown)], dim=1)
    prompt = torch.arange(ids.shape[1]) < shown.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), fused=True)
    loss: dict[int, float] = {}
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1, step / WARMUP)
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        nats = next_token_loss(model(batch), batch, ignore=prompt.expand(batch.shape))
        optimizer.zero_grad()
        nats.backward()
        optimizer.step()
        if step % EVERY == 0:
            loss[step] = nats.item()
    return Trained(model.eval(), loss)


def measure(model: Transformer) -> dict[str, float]:
    """Shares of right answers to the held-out prompts: greedy, sampled at temperature 1, and one of eight samples."""
    held_out = tasks.split().held_out
    most = {"new_tokens": tasks.NEW_TOKENS, "end": tasks.END}
    best = tasks.rewards(held_out, greedy(model, held_out, **most))
    drawn = sample(model, held_out, group=8, generator=torch.Generator().manual_seed(0), **most)
    right: Tensor = tasks.rewards(drawn.prompts, drawn.tokens).view(-1, 8) == 1
    found = {"greedy": best.mean().item(), "pass@1": pass_at_k(right, 1), "pass@8": pass_at_k(right, 8)}
    return {name: round(share, 4) for name, share in found.items()}


def recorded(folder: Path = tasks.START) -> dict[int, float]:
    """Loss in nats by step, of the run that made the checkpoint."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return {int(step): loss for step, loss in record["loss"].items()}


def write(folder: Path, trained: Trained) -> None:
    """Checkpoint and record."""
    pretrained.save(trained.model, folder, more={"eos_token_id": tasks.END})
    facts = {
        "script": "tools/start_policy.py",
        "data": f"minillm/alignment/tasks.py, the answers of {tasks.SHOWN} prompts",
        "seed": SEED,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "steps": STEPS,
        "torch": torch.__version__.split("+")[0],
        "held_out": measure(trained.model),
        "loss": {step: round(loss, 4) for step, loss in trained.loss.items()},
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Train, or compare the first steps with the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="stop after so many and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(options.steps)
    if options.steps == STEPS:
        write(tasks.START, trained)
        print(measure(trained.model))
        return
    right = recorded()
    for step, loss in trained.loss.items():
        print(f"step {step:4d}  loss {loss:.4f}  recorded {right[step]:.4f}")


if __name__ == "__main__":
    main()
