"""Many small language models trained side by side, to measure what learning rate and batch size do.

Idea:        Whether a rule for the learning rate holds is a question about the best rate at each batch size: a grid of
             trainings. A model that guesses a letter from the two before it is small enough to train dozens of copies
             in one tensor, each with its own rate, and its loss over the whole text is one weighted sum over 27^3
             triples, without noise of evaluation. Steps to a target loss against the batch size B follow
             S = S_min (1 + B_crit / B): at B_crit twice the fewest steps and twice the fewest samples.
Cost:        m copies, B windows, width c, hidden layer h: 6 m B h (2 c + 27) operations a step; the exact loss a third
             of that for 729 windows.
Paper:       A neural network for the next word from a few before it: Bengio et al. 2003, "A Neural Probabilistic
             Language Model", JMLR 3. Steps and samples to a target: McCandlish et al. 2018, arXiv:1812.06162.
             Best rate against batch size under Adam: Malladi et al. 2022, arXiv:2205.10287.
Production:  one copy trains as torch.nn.Embedding and torch.nn.Linear under torch.optim.SGD or Adam do.
Leaves out:  everything that makes a large model: a toy shows how a mechanism works, not how large its effect is.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minillm.data.corpus import documents
from minillm.training.loop import constant
from minillm.training.optimizers import adamw_step
from minillm.training.schedule import NoiseScale, batch_ramp, noise_scale

LETTERS = 27  # the space between words, and a to z
Grads = Sequence[Tensor]  # of each weight, copies first


@cache
def letters() -> Int[Tensor, " n"]:
    """Jane Austen's novels as numbers: 0 for whatever stands between words, 1 to 26 for a to z; 3.7 million.

    >>> "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in letters()[:22])
    'the family of dashwood'
    """
    text = " ".join(re.findall("[a-z]+", " ".join(documents("train")).lower()))
    return (torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() - 96).clamp(min=0)


@cache
def triple_shares() -> Float[Tensor, "729 27"]:
    """How often each pair of letters is followed by each letter, as shares of all triples of the text."""
    ids = letters()
    triples = (ids[:-2] * LETTERS + ids[1:-1]) * LETTERS + ids[2:]
    return (torch.bincount(triples, minlength=LETTERS**3) / len(triples)).view(-1, LETTERS)


class Fleet:
    """`copies` of a model of letters for each seed: embedding, tanh layer, head. Copies of a seed start alike."""

    def __init__(self, copies: int, seeds: Sequence[int], *, width: int = 12, hidden: int = 32) -> None:
        self.copies, self.seeds, self.models = copies, len(seeds), copies * len(seeds)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shapes = (LETTERS, width, 0.5), (2 * width, hidden, (2 * width) ** -0.5), (hidden, LETTERS, 0.1)
        drawn = [[torch.randn(r, c, generator=g) * std for r, c, std in shapes] for g in self.generators]
        stacked = [torch.stack(same).repeat_interleave(copies, dim=0) for same in zip(*drawn, strict=True)]
        self.weights = [weight.requires_grad_() for weight in stacked]

    def sample(self, batch: int) -> Int[Tensor, "m b 3"]:
        """Windows of three letters at random places; copies of a seed get the same."""
        ids = letters()
        starts = [torch.randint(len(ids) - 2, (batch,), generator=g) for g in self.generators]
        places = torch.stack(starts).repeat_interleave(self.copies, dim=0)[..., None]
        return ids[places + torch.arange(3)]

    def logits(self, pairs: Int[Tensor, "m b 2"]) -> Float[Tensor, "m b v"]:
        """Scores of the next letter after two."""
        embedding, hidden, head = self.weights
        read = embedding[torch.arange(self.models)[:, None, None], pairs].flatten(2)
        return torch.tanh(read @ hidden) @ head

    def gradient(self, windows: Int[Tensor, "m b 3"]) -> Grads:
        """Of each model's mean loss over its own windows."""
        rows = self.logits(windows[..., :2]).flatten(0, 1)
        loss = F.cross_entropy(rows, windows[..., 2].flatten(), reduction="sum") / windows.shape[1]
        return torch.autograd.grad(loss, self.weights)

    @torch.no_grad()
    def nats(self) -> Float[Tensor, "s k"]:
        """Mean loss over all of the text, exactly; seeds by copies."""
        pairs = torch.cartesian_prod(torch.arange(LETTERS), torch.arange(LETTERS))
        log_p = F.log_softmax(self.logits(pairs.expand(self.models, -1, -1)), dim=-1)
        return -(log_p * triple_shares()).sum(dim=(1, 2)).view(self.seeds, self.copies)


def squared_norms(gradient: Grads) -> Float[Tensor, " m"]:
    """Of each model's gradient, all its weights together."""
    return torch.stack([grad.square().flatten(1).sum(dim=1) for grad in gradient]).sum(dim=0)


def sgd(gradient: Grads) -> Grads:
    """The direction of plain descent, to be scaled by the rate."""
    return gradient


class Adam:
    """The direction of Adam, to be scaled by the rate: `adamw_step` on a weight of 0."""

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.betas, self.step, self.memory = betas, 0, list[tuple[Tensor, Tensor]]()

    def __call__(self, gradient: Grads) -> Grads:
        """The next step's direction."""
        self.step += 1
        self.memory = self.memory or [(torch.zeros_like(grad), torch.zeros_like(grad)) for grad in gradient]
        moved = [torch.zeros_like(grad) for grad in gradient]
        for zero, grad, (mean, square) in zip(moved, gradient, self.memory, strict=True):
            adamw_step(zero, grad, mean, square, self.step, lr=-1.0, betas=self.betas)
        return moved


def step_sizes(noise: Sequence[float], *, betas: tuple[float, float]) -> Float[Tensor, " n"]:
    """Root mean square of Adam's steps, in units of the rate, if gradients are noise of these standard deviations.

    >>> step_sizes([1e-3, 1e-3], betas=(0.9, 0.999))[0].item() > 0.999                # the first is the full rate
    True
    """
    generator, direction = torch.Generator().manual_seed(0), Adam(betas=betas)
    moves = [direction([std * torch.randn(1, 1, 4000, generator=generator)])[0] for std in noise]
    return torch.stack([move.square().mean().sqrt() for move in moves])


def train(
    fleet: Fleet,
    rates: Sequence[float],
    *,
    steps: int,
    batch: int | Sequence[int],
    direction: Callable[[Grads], Grads] = sgd,
    schedule: Callable[[int], float] = constant,
    clip: float = math.inf,
    junk: Sequence[int] = (),
    every: int = 0,
    target: float = -math.inf,
) -> Float[Tensor, "p s k"]:
    """Train every copy with its own rate; the loss over all of the text after each `every` steps, or at the end.

    `batch` may differ from step to step. In the steps `junk` every target is the letter z. Training ends early when
    each seed has a copy with a loss below `target`.
    """
    if len(rates) != fleet.copies:
        raise ValueError(f"one rate for each copy, got {len(rates)} rates and {fleet.copies} copies")
    rate = torch.tensor(rates).repeat(fleet.seeds)[:, None, None]
    curve = []
    for step in range(steps):
        windows = fleet.sample(batch if isinstance(batch, int) else batch[step])
        if step in junk:
            windows[..., 2] = LETTERS - 1
        gradient = fleet.gradient(windows)
        scale = (clip / squared_norms(gradient).sqrt()).clamp(max=1)[:, None, None]
        with torch.no_grad():
            for weight, move in zip(fleet.weights, direction([grad * scale for grad in gradient]), strict=True):
                weight -= rate * schedule(step) * move
        if (every and (step + 1) % every == 0) or step + 1 == steps:
            curve.append(fleet.nats())
            if (curve[-1] < target).any(dim=1).all():
                break
    return torch.stack(curve)


def steps_to(
    target: float, rates: Sequence[float], *, seeds: Sequence[int], batch: int, every: int = 1, limit: int = 4000
) -> Float[Tensor, " s"]:
    """Steps of SGD until the loss is below `target` with the rate that is there first; for each seed, by `every`."""
    fleet = Fleet(len(rates), seeds)
    below = train(fleet, rates, steps=limit, batch=batch, every=every, target=target).amin(dim=2) < target
    if not below.any(dim=0).all():
        raise ValueError(f"no rate of {list(rates)} comes below {target} in {limit} steps of {batch}")
    return (below.float().argmax(dim=0) + 1.0) * every


def ramp_sizes(samples: int, *, start: int, full: int, over: int) -> list[int]:
    """The batch of every step of a run over so many samples that ramps up by `batch_ramp`, in multiples of `start`.

    >>> ramp_sizes(100, start=8, full=32, over=50)
    [8, 8, 8, 16, 24, 32, 32]
    """
    sizes = list[int]()
    while (seen := sum(sizes)) < samples:
        sizes.append(batch_ramp(seen, start=start, full=full, over=over, multiple=start))
    return sizes


def measure_noise(fleet: Fleet, *, small: int = 8, large: int = 512, draws: int = 20) -> NoiseScale:
    """The gradient noise scale where the models stand, from `draws` large batches and as many samples in small ones."""

    def mean_norm(batch: int) -> Tensor:
        several = [squared_norms(fleet.gradient(fleet.sample(batch))) for _ in range(draws * large // batch)]
        return torch.stack(several).mean(dim=0)

    return noise_scale(mean_norm(small), mean_norm(large), small_batch=small, large_batch=large)


def best_rate(rates: Sequence[float | int], nats: Float[Tensor, " k"]) -> float:
    """The rate of the lowest loss: of the parabola, in log rate, through the lowest point and its neighbours.

    >>> round(best_rate([1, 2, 4, 8], torch.tensor([3.0, 1.0, 1.0, 3.0])), 3)         # between 2 and 4
    2.828
    """
    i = int(nats.nan_to_num(math.inf).argmin())
    if not 0 < i < len(rates) - 1:
        raise ValueError(f"the lowest loss must lie inside the rates, it is at {rates[i]}, number {i} of {len(rates)}")
    left, low, right = nats[i - 1 : i + 2].tolist()
    return rates[i] * (rates[i + 1] / rates[i]) ** ((left - right) / (left - 2 * low + right) / 2)


def slope(x: Sequence[float | int], y: Sequence[float | int]) -> float:
    """The power p of the law y = a x^p that fits best: 1 is in proportion, 0.5 the square root.

    >>> round(slope([1, 4, 16], [3, 6, 12]), 6)
    0.5
    """
    u, v = (torch.tensor(values, dtype=torch.float64).log() for values in (x, y))
    return ((u - u.mean()) * (v - v.mean())).sum().div((u - u.mean()).square().sum()).item()


def fit_steps(batches: Sequence[int], steps: Sequence[float | int]) -> tuple[float, float]:
    """(S_min, B_crit) of S = S_min (1 + B_crit / B), with the smallest relative errors.

    >>> fewest, critical = fit_steps([50, 100, 400], [30, 20, 12.5])
    >>> round(fewest, 3), round(critical, 3)
    (10.0, 100.0)
    """
    b, s = (torch.tensor(values, dtype=torch.float64) for values in (batches, steps))
    terms = torch.stack([1 / s, 1 / (b * s)], dim=1)  # S_min / S + S_min B_crit / (B S) = 1
    fewest, product = torch.linalg.lstsq(terms, torch.ones(len(b), 1, dtype=b.dtype)).solution.flatten().tolist()
    return fewest, product / fewest
