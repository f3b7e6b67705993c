"""A training run that can be killed at any moment and started again, and a server that forks such runs.

    killed_run.py         reads lines of JSON, the arguments of `train`, and forks a run for each. It kills it `wait`
                          seconds after the run has begun to train, or not if that is null, and prints how it ended.
    killed_run.py JSON    trains in this process.

A run writes where it begins and each step with its loss, exact, to `log`, and after the last step all losses to `done`.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Loader, pack
from minillm.training import checkpoint
from minillm.training.checkpoint import Checkpoints
from minillm.training.loop import Run, TrainConfig
from minillm.training.optimizers import Muon, hidden_matrices
from minillm.training.precision import LossScaler
from minillm.training.schedule import cosine

STEPS = 60


class Noisy(Transformer):
    """Draws random numbers of all three kinds in every forward pass, as dropout and augmentation do."""

    def hidden(self, ids, **more):
        out = super().hidden(ids, **more)
        noise = 0.1 * torch.randn(out.shape) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return out + noise * out.detach().std()


def new_run():
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    model = Noisy(Config(vocabulary=16, width=16, layers=1, heads=2, kv_heads=1, head_size=8, hidden=24, context=16))
    matrices, others = hidden_matrices(model)
    optimizers = [Muon(matrices, 0.02), torch.optim.AdamW(others, 0.01)]
    documents = [[1 + (i * j) % 15 for j in range(2 + i % 9)] for i in range(60)]
    config = TrainConfig(steps=STEPS, accumulate=2, schedule=lambda s: cosine(s, warmup=5, total=STEPS), autocast=True)
    scaler = LossScaler(scale=2.0**18, interval=7)  # changes, and skips steps, in the run
    return Run(model, Loader(pack(documents, 8, eos=0), 4, seed=1), optimizers, config, scaler=scaler)


def train(*, folder, log, done, background, die_at=None):
    """Train from the newest checkpoint to the end, saving every step.

    `die_at`: in which function of a save, and at which of its calls, this process kills itself.
    """
    torch.set_num_threads(1)
    run = new_run()
    if die_at is not None:
        die_in_a_save(*die_at)
    with open(log, "a", encoding="utf-8", buffering=1) as lines:
        with Checkpoints(Path(folder), last=2, every=20, background=background) as checkpoints:
            loaded = checkpoints.load_latest()
            if loaded is not None:
                assert not loaded.skipped, loaded.skipped  # a kill damages no file
                assert loaded.step == loaded.state["run"]["done"]
                run.load_state_dict(loaded.state)
            print(f"from {run.done}", file=lines)
            while run.done < STEPS:
                record = run.step()
                print(record.step, record.loss.hex(), file=lines)
                checkpoints.save(run.state_dict(), run.done)
        Path(done).write_text(json.dumps([r.loss.hex() for r in run.records] + [run.scaler.value]), encoding="utf-8")


def die_in_a_save(name, count):
    """Kill this process before (count 0), or after (1), the first call of a function, and so on."""

    def dying(function):
        def call(*arguments, **options):
            nonlocal count
            for work in (lambda: None, lambda: function(*arguments, **options)):
                result = work()
                if count == 0:
                    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
                count -= 1
            return result

        return call

    place = {"write": checkpoint.Hashed, "fsync": os, "replace": os, "unlink": Path}[name]
    setattr(place, name, dying(getattr(place, name)))


def serve():
    torch.set_num_threads(1)
    new_run()  # what the first one imports
    print("ready", flush=True)
    for line in sys.stdin:
        options = json.loads(line)
        wait = options.pop("wait")
        begun = Path(options["log"]).read_text(encoding="utf-8").count("from")
        child = os.fork()
        if child == 0:
            try:
                train(**options)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        if wait is not None:
            ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while Path(options["log"]).read_text(encoding="utf-8").count("from") == begun:
                if os.waitid(os.P_PID, child, ended) is not None:
                    break
                time.sleep(0.001)
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)  # not reaped yet: the pid is still its own
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    train(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve()
