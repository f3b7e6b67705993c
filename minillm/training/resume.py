"""A training run whose whole state is five tensors: stopped anywhere, it goes on bit for bit, or it forgot one of them.

Idea:        A step depends on more than the weights: on the optimizer's memory, on the step's number, which sets the
             learning rate, on the position in the data, and on the random numbers of dropout. Give these five back
             and the rest of the run is the one that was interrupted, to the last bit. Leave one out and it is another
             run. The loop is that of linear regression, small enough to see all of it; training/loop has the same five
             for a Transformer.
Cost:        Weights and momentum, twice the weights; Adam has two numbers for each weight, three times. The other three
             take bytes.
Paper:       Momentum: Polyak 1964. Dropout: Srivastava et al. 2014. What bit-exact resumption takes: Mohan et al. 2021,
             "CheckFreq", which saves the data position, too.
Production:  torch.optim.SGD(momentum=0.9) with LambdaLR, their state_dict, and torch.Generator.get_state.
Leaves out:  files (training/checkpoint), several devices, kernels that add in an order of their own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

PARTS = ("weight", "momentum", "step", "position", "generator")
MOMENTUM, KEEP = 0.9, 0.8


def fresh(columns: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """The state of a run that begins, in the order of PARTS.

    Weights and momentum are float32 [columns], the step a whole number, the position a pair: epoch and rows of it
    that are used up. The generator's state is what get_state gives, bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = 0.1 * torch.randn(columns, generator=generator)
    return weight, torch.zeros(columns), torch.tensor(0), torch.tensor([0, 0]), generator.get_state()


def order(rows: int, epoch: int) -> Int[Tensor, " n"]:
    """In which order an epoch reads the rows. It follows from the epoch's number, so that nobody has to save it.

    >>> order(5, 0).tolist() == order(5, 0).tolist(), sorted(order(5, 1).tolist())
    (True, [0, 1, 2, 3, 4])
    """
    return torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))


def rate(step: int) -> float:
    """The learning rate after so many steps: 0.1 at first, half of it after 20, a third after 40.

    >>> rate(0), rate(20)
    (0.1, 0.05)
    """
    return 0.1 / (1 + step / 20)


def update_(
    weight: Float[Tensor, " c"],
    momentum: Float[Tensor, " c"],
    x: Float[Tensor, "b c"],
    y: Float[Tensor, " b"],
    *,
    lr: float,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """One step of SGD with momentum and dropout, which changes `weight` and `momentum` in place; the loss before it."""
    kept = torch.rand(x.shape, generator=generator) < KEEP
    seen = x * kept / KEEP
    error = seen @ weight - y
    momentum.mul_(MOMENTUM).add_(seen.T @ error / len(x))
    weight.sub_(lr * momentum)
    return error.square().mean() / 2


def resume(
    state: Sequence[Tensor], x: Float[Tensor, "n c"], y: Float[Tensor, " n"], *, steps: int, batch: int = 4
) -> tuple[Tensor, ...]:
    """Go on with a run for some steps: their losses, then the new state, in the order of PARTS.

    The state given stays as it is, so that a run can be resumed from it once more. An epoch ends where fewer rows than
    a batch are left.

    >>> x, y = torch.eye(6), torch.ones(6)
    >>> losses, *state = resume(fresh(6), x, y, steps=5)
    >>> again, *state = resume(state, x, y, steps=5)
    >>> torch.cat([losses, again]).equal(resume(fresh(6), x, y, steps=10)[0])
    True
    """
    if not 1 <= batch <= len(x):
        raise ValueError(f"a batch must hold 1 to {len(x)} rows, which is all there are, got {batch}")
    weight, momentum = state[0].clone(), state[1].clone()
    done = int(state[2])
    epoch, taken = state[3].tolist()
    generator = torch.Generator()
    generator.set_state(state[4])
    losses = torch.zeros(steps)
    for i in range(steps):
        if taken + batch > len(x):
            epoch, taken = epoch + 1, 0
        rows = order(len(x), epoch)[taken : taken + batch]
        losses[i] = update_(weight, momentum, x[rows], y[rows], lr=rate(done), generator=generator)
        taken += batch
        done += 1
    return losses, weight, momentum, torch.tensor(done), torch.tensor([epoch, taken]), generator.get_state()


def without(state: Sequence[Tensor], part: str, blank: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The state that comes back from a checkpoint without one part: that part is a beginning run's, `blank`'s.

    >>> [int(x) for x in without([torch.tensor(i) for i in (5, 6, 7, 8, 9)], "step", [torch.tensor(0)] * 5)]
    [5, 6, 0, 8, 9]
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    return tuple(b if name == part else a for name, a, b in zip(PARTS, state, blank, strict=True))
