"""The training loop: micro-batches, clipping, schedule, evaluation, and a state from which a run goes on bit for bit.

Idea:        A step reads some micro-batches, adds up their gradients, clips, sets the learning rate, and lets the
             optimizer move. Every micro-batch counts by the number of its targets, so that the step is that of one
             large batch: a mean of the micro-batches' means is not, where they differ in targets. Everything a step
             depends on is in `state_dict`: weights, the optimizer's memory, step, position in the data, random numbers.
Cost:        Activations of one micro-batch; gradients, and the optimizer's numbers, of all weights. One wait for the
             device a record.
Paper:       Clipping by the global norm: Pascanu et al. 2012, arXiv:1211.5063, algorithm 1. Autocast to half precision:
             Micikevicius et al. 2017, arXiv:1710.03740; bfloat16 without loss scaling: Kalamkar et al. 2019,
             arXiv:1905.12322. Balance loss: Fedus et al. 2021, arXiv:2101.03961.
Production:  transformers Trainer (token-weighted accumulation since num_items_in_batch);
             torch.nn.utils.clip_grad_norm_.
Leaves out:  several devices, averaged weights; files are in training/checkpoint.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minillm.architecture.moe import Routing, balance_loss
from minillm.architecture.transformer import Transformer
from minillm.data.corpus import Loader, Rows, document_mask, positions
from minillm.training.checkpoint import brief, differences, random_state, set_random_state
from minillm.training.objective import IGNORE, bits_per_byte, chunked_cross_entropy, next_tokens, token_nats
from minillm.training.precision import LossScaler


def constant(step: int) -> float:
    """The learning rate stays."""
    return 1.0


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ValueError for counts below 1."""

    steps: int = 1000  # updates of the weights
    accumulate: int = 1  # micro-batches an update
    schedule: Callable[[int], float] = constant  # factor on the learning rates, from the updates done so far
    clip: float = 1.0  # largest global norm of the gradient; math.inf only measures it
    autocast: bool = False  # matrix products in bfloat16, or float16 where the run has a loss scaler
    separate: bool = False  # documents packed in one row do not see each other
    balance: float = 0.01  # weight of the experts' balance loss, a mean over layers
    log_every: int = 1  # updates between two records
    eval_every: int = 0  # updates between two evaluations, and one at the end; 0 for none

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, math.inf for no clipping, got {self.clip}")


class Record(NamedTuple):
    """What is known after an update. Printed it is a line of progress."""

    step: int  # updates done
    tokens: int  # targets learnt from so far
    loss: float  # nats a target, of this update's batch before the update
    norm: float  # of the gradient before clipping
    lr: float  # of the first parameter group
    seconds: float  # of training so far, without evaluation
    bits_per_byte: float | None  # of held-out text, where it was measured

    def __str__(self) -> str:
        line = f"step {self.step:5d}  tokens {self.tokens:9,d}  loss {self.loss:6.3f}  norm {self.norm:7.3f}"
        held_out = "" if self.bits_per_byte is None else f"  held-out {self.bits_per_byte:.3f} bits/byte"
        return f"{line}  lr {self.lr:.2e}  {self.seconds:6.1f} s{held_out}"


class Task(NamedTuple):
    """What the model reads, and what it must say: a target for each position but the last of each row."""

    ids: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"] | None
    visible: Bool[Tensor, "b t t"] | None
    targets: Int[Tensor, " n"]

    def to(self, device: torch.device) -> "Task":
        """The same on a device."""
        places = None if self.positions is None else self.positions.to(device)
        mask = None if self.visible is None else self.visible.to(device)
        return Task(self.ids.to(device), places, mask, self.targets.to(device))


def task(rows: Rows, *, separate: bool) -> Task:
    """Rows as a task. Separate documents have a mask and positions of their own, and a first token nothing predicts."""
    if not separate:
        return Task(rows.ids, None, None, next_tokens(rows.ids).flatten())
    first = rows.documents.diff(dim=-1, prepend=rows.documents[:, :1]) != 0
    targets = next_tokens(rows.ids, first).flatten()
    return Task(rows.ids, positions(rows.documents), document_mask(rows.documents), targets)


def before_targets(model: Transformer, given: Task, *, routings: list[Routing] | None = None) -> Float[Tensor, "n c"]:
    """The model's state at the positions that have a target."""
    hidden = model.hidden(given.ids, positions=given.positions, visible=given.visible, routings=routings)
    return hidden[:, :-1].flatten(0, 1)


@torch.no_grad()
def evaluate(
    model: Transformer,
    rows: Rows,
    lengths: Int[Tensor, " v"],
    *,
    batch: int = 32,
    separate: bool = False,
    autocast: bool = False,
    half: torch.dtype = torch.bfloat16,
) -> float:
    """Bits per byte of the rows. `lengths` is `corpus.token_bytes`: targets that are no text do not count.

    The first token of a row is read, not predicted, and counts neither as loss nor as bytes.
    """
    device = model.embedding.device
    size, nats = lengths.to(device), torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    for part in zip(*(x.split(batch) for x in rows), strict=True):
        given = task(Rows(*part), separate=separate).to(device)
        with torch.autocast(device.type, dtype=half, enabled=autocast):
            found = token_nats(before_targets(model, given), model.unembedding, given.targets)
        text = size[given.targets.clamp(min=0)] * (given.targets != IGNORE)
        nats += (found * (text > 0)).sum(dtype=torch.float64)
        total += text.sum()
    model.train(was_training)
    return bits_per_byte(nats.item(), int(total.item()))


class Run:
    """A model in training. `step` makes one update, `train` goes on to the end."""

    def __init__(
        self,
        model: Transformer,
        loader: Loader,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: TrainConfig,
        *,
        held_out: tuple[Rows, Int[Tensor, " v"]] | None = None,
        scaler: LossScaler | None = None,
    ) -> None:
        if config.eval_every and held_out is None:
            raise ValueError("eval_every needs held_out=(rows, corpus.token_bytes(tokenizer)), got None")
        self.model, self.loader, self.config, self.held_out = model, loader, config, held_out
        self.scaler, self.half = scaler, torch.bfloat16 if scaler is None else torch.float16
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])
        self.done, self.tokens, self.seconds = 0, 0, 0.0
        self.records: list[Record] = []

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def gradient(self, batches: Sequence[Rows]) -> tuple[Tensor, int]:
        """Add the gradient of the mean loss over all targets of the micro-batches; that loss, and their number.

        With a scaler the gradient is times the scale, the loss is not.
        """
        device = self.model.embedding.device
        tasks = [task(rows, separate=self.config.separate) for rows in batches]
        counts = [int((given.targets != IGNORE).sum()) for given in tasks]
        total = torch.zeros((), device=device)
        for given, count in zip((given.to(device) for given in tasks), counts, strict=True):
            routings: list[Routing] = []
            with torch.autocast(device.type, dtype=self.half, enabled=self.config.autocast):
                hidden = before_targets(self.model, given, routings=routings)
                loss = chunked_cross_entropy(hidden, self.model.unembedding, given.targets)
            share = count / max(1, sum(counts))
            total += loss.detach() * share
            for routing in routings:
                loss = loss + self.config.balance * balance_loss(routing.logits, routing.experts) / len(routings)
            loss = loss * share
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return total, sum(counts)

    def step(self) -> Record | None:
        """One update; its record where one is due. FloatingPointError: the loss is not finite."""
        config, start = self.config, time.perf_counter()
        for group in self._groups():
            group["lr"] = group["initial_lr"] * config.schedule(self.done)
        loss, count = self.gradient([next(self.loader) for _ in range(config.accumulate)])
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self.model.zero_grad()
        self.done, self.tokens = self.done + 1, self.tokens + count
        end = self.done == config.steps
        evaluates = bool(config.eval_every) and (end or self.done % config.eval_every == 0)
        if not (evaluates or end or self.done % config.log_every == 0):
            self.seconds += time.perf_counter() - start
            return None
        nats, size = torch.stack([loss.double(), norm.double()]).tolist()  # waits for the device
        self.seconds += time.perf_counter() - start
        if not math.isfinite(nats):
            raise FloatingPointError(f"the loss is {nats} at step {self.done}: lower the learning rate or go back")
        bits = self.bits_per_byte() if evaluates else None
        lr = self._groups()[0]["lr"]
        self.records.append(Record(self.done, self.tokens, nats, size, lr, self.seconds, bits))
        return self.records[-1]

    def bits_per_byte(self) -> float:
        """Of the held-out rows, now."""
        if self.held_out is None:
            raise ValueError("evaluation needs held_out=(rows, corpus.token_bytes(tokenizer)), got None")
        rows, lengths = self.held_out
        config = self.config
        return evaluate(self.model, rows, lengths, separate=config.separate, autocast=config.autocast, half=self.half)

    def train(self, *, until: int | None = None, on_step: Callable[[Record], object] | None = None) -> "Run":
        """Go on to step `until`, or to the end; `on_step` is called with each record, `print` shows progress."""
        while self.done < min(self.config.steps, until or self.config.steps):
            record = self.step()
            if record is not None and on_step is not None:
                on_step(record)
        return self

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that the rest of the run depends on, for torch.save; it loads with weights_only=True."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "loader": self.loader.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": random_state(),
            "run": {"done": self.done, "tokens": self.tokens, "seconds": self.seconds},
            "records": [tuple(record) for record in self.records],
        }
        return copy.deepcopy(state)  # state_dict() of a module or optimizer is the live tensors

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with the config it was saved under. ValueError: it is one of another run."""
        saved = state["optimizers"]
        if len(saved) != len(self.optimizers):
            raise ValueError(f"the state has {len(saved)} optimizers, this run has {len(self.optimizers)}")
        if (state["scaler"] is None) != (self.scaler is None):
            has = {True: "no loss scaler", False: "a loss scaler"}
            raise ValueError(f"the state has {has[state['scaler'] is None]}, this run has {has[self.scaler is None]}")
        if different := differences(state["model"], self.model.state_dict()):
            raise ValueError(f"the state is of another model: {brief(different)}")
        self.loader.load_state_dict(state["loader"])
        self.model.load_state_dict(state["model"])
        for optimizer, memory in zip(self.optimizers, copy.deepcopy(saved), strict=True):
            optimizer.load_state_dict(memory)  # keeps the tensors it is given: not the caller's
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        self.done, self.tokens, self.seconds = (state["run"][name] for name in ("done", "tokens", "seconds"))
        self.records = [Record(*record) for record in state["records"]]


def train(
    model: Transformer,
    loader: Loader,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    config: TrainConfig,
    *,
    held_out: tuple[Rows, Int[Tensor, " v"]] | None = None,
    on_step: Callable[[Record], object] | None = None,
) -> list[Record]:
    """Train to the end and give the records. `optimizers` share the weights between them: Muon and AdamW, for example.

    >>> from minillm.architecture.transformer import Config
    >>> from minillm.data.corpus import pack
    >>> model = Transformer(Config(vocabulary=8, width=16, layers=1, heads=1, kv_heads=1, head_size=16, hidden=32))
    >>> loader = Loader(pack([[1, 2, 3, 4, 5, 6, 7] * 20], 15, eos=0), 4)
    >>> records = train(model, loader, torch.optim.AdamW(model.parameters(), 0.02), TrainConfig(steps=40))
    >>> records[0].loss > 2.0, records[-1].loss < 0.5               # ln 8 = 2.08 before it has learnt to count
    (True, True)
    """
    return Run(model, loader, optimizers, config, held_out=held_out).train(on_step=on_step).records
