"""A small model in a minute of CPU time: what counts when everything is short.

Idea:        Three things. Small batches: the gradient's noise is low at first, so many steps beat clean ones. Embedding
             and head are two tables with a learning rate of their own. And a warm start: a decoder whose blocks still
             add nothing sees one token and guesses the next, so that its loss over the whole text is a function of how
             often each token follows each other. The tables learn that from the counts, a pass over all of the text for
             the price of one over the vocabulary, before the first batch is read.
Cost:        Counts v^2 numbers; a step of the warm start 6 v^2 c operations, whatever the length of the text. For 1.1 M
             tokens, v = 2048, c = 128: as much as training two layers on about 800 tokens.
Paper:       None: found by trial on the text that ships, see tools/recipe.py for what it is compared with. That an
             embedding wants a larger rate than matrices: Yang et al. 2022, arXiv:2203.03466 (Adam's rate of matrices
             shrinks with width, that of the embedding does not).
Production:  none.
Leaves out:  anything that pays in longer runs only, such as depth.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.architecture.norm import rms_norm
from minillm.architecture.transformer import Transformer
from minillm.data.corpus import Loader, Rows
from minillm.training.loop import Run, TrainConfig
from minillm.training.schedule import linear_warmup

FOREVER = 10**9  # steps of a run that time ends


def pair_counts(ids: Int[Tensor, "*b"], v: int) -> Float[Tensor, "{v} {v}"]:
    """How often each token (row) is followed by each (column).

    >>> pair_counts(torch.tensor([0, 1, 0, 1, 1]), 2)
    tensor([[0., 2.],
            [1., 1.]])
    """
    ids = ids.flatten()
    return torch.bincount(ids[:-1] * v + ids[1:], minlength=v * v).view(v, v).float()


def bigram_loss(model: Transformer, counts: Float[Tensor, "v v"]) -> Float[Tensor, ""]:
    """Mean nats of a text with these pairs under the model without its blocks: embedding, norm, head."""
    stream = rms_norm(model.embedding, model.norm, eps=model.config.eps)
    return -(counts * F.log_softmax(F.linear(stream, model.unembedding), dim=-1)).sum() / counts.sum()


def warm_start(model: Transformer, counts: Float[Tensor, "v v"], *, steps: int = 40, lr: float = 0.03) -> list[float]:
    """Teach embedding and head the pairs of the text, blocks apart; the loss of each step in nats.

    Few steps: the rare rows of the counts are few samples, and would be learnt by heart.
    """
    if model.head is None:
        raise ValueError("a warm start needs a head of its own, tied=False: tied tables make next and last token alike")
    optimizer = torch.optim.AdamW([model.embedding, model.head], lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * linear_warmup(step + 1, warmup=5) * (1 - step / steps)
        loss = bigram_loss(model, counts)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def table_groups(model: Transformer, *, tables: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: embedding and head with the learning rate `tables`, the rest with the optimizer's."""
    names = ("embedding", "head")
    own, rest = ([p for name, p in model.named_parameters() if (name in names) == given] for given in (True, False))
    return [dict(params=own, lr=tables), dict(params=rest)]


class Budget:
    """A schedule by time: linear warm-up over steps, then a straight line to 0 at the end of `seconds` of `clock`."""

    def __init__(self, seconds: float, *, warmup: int = 50, clock: Callable[[], float] = time.process_time) -> None:
        if seconds <= 0:
            raise ValueError(f"a budget needs more than 0 seconds, got {seconds}")
        self.seconds, self.warmup, self.clock = seconds, warmup, clock
        self.start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the start, pauses left out."""
        return self.clock() - self.start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not counted: evaluation, drawing."""
        begin = self.clock()
        yield
        self.start += self.clock() - begin

    def __call__(self, step: int) -> float:
        """The factor on the learning rate, for TrainConfig's schedule."""
        return linear_warmup(step + 1, warmup=self.warmup) * max(0.0, 1 - self.spent / self.seconds)


def train_for(
    budget: Budget,
    model: Transformer,
    loader: Loader,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    held_out: tuple[Rows, Int[Tensor, " v"]],
    points: int = 1,
) -> list[tuple[float, float]]:
    """Train until the budget is spent; (seconds, held-out bits per byte) at `points` moments, the end the last one."""
    config = TrainConfig(steps=FOREVER, log_every=FOREVER, schedule=budget)
    run, curve = Run(model, loader, optimizers, config, held_out=held_out), list[tuple[float, float]]()
    while len(curve) < points:
        if budget.spent < budget.seconds * (len(curve) + 1) / points:
            run.step()
            continue
        spent = budget.spent
        with budget.pause():
            curve.append((spent, run.bits_per_byte()))
    return curve
