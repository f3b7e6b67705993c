"""Best-of-n: ask n times, keep the answer with the highest score. No training, and a known distance from the start.

Idea:        The cheapest way to follow a reward model is to choose, not to learn. The policy that this makes can be
             written down: an answer comes out if it is drawn at least once and none above it is. Its KL from the policy
             that was asked is log n - (n - 1) / n if no two answers have the same score and each single one is
             unlikely, and never more: asking 64 times is at most 3.2 nats away, so it cannot go where the start hardly
             ever goes. What n would give is estimated without bias from N > n scored answers, over all choices of n.
Cost:        n answers and n scores for each that is used, for ever: nothing is learnt.
Paper:       Beirami et al. 2024, arXiv:2401.01879 (the formula is an upper bound); Gao et al. 2022, arXiv:2210.10760
             (proxy and gold against it); Touvron et al. 2023, "Llama 2", arXiv:2307.09288 (trains on the best of K).
Production:  an inference server asked for n answers, a reward model behind it.
Leaves out:  soft best-of-n, training a policy to imitate it.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: the most that best-of-n can be away from the policy that was asked, in nats.

    >>> [round(kl_bound(n), 2) for n in (1, 4, 64, 1000)]
    [0.0, 0.64, 3.17, 5.91]
    """
    check_n(n)
    return math.log(n) - (n - 1) / n


def best_of_n(log_reference: Float[Tensor, " k"], score: Float[Tensor, " k"], n: int) -> Float[Tensor, " k"]:
    """Log-probabilities of what comes out, for k answers of known probability. Among equal scores the first drawn wins.

    The best of n has at most a score s with probability (the share of answers up to s)^n.

    >>> best_of_n(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]), 3).exp()    # the worse one: all three times
    tensor([0.1250, 0.8750])
    """
    check_n(n)
    p = log_reference.to(torch.float64).exp()
    level = score[:, None] - score
    up_to, below = (level >= 0).to(p) @ p, (level > 0).to(p) @ p
    share = p / (up_to - below)  # of the answers that have the same score
    return (share * (up_to**n - below**n)).log().to(log_reference.dtype)


def expected_best(score: Float[Tensor, " m"], value: Float[Tensor, " m"], n: int) -> float:
    """The mean of `value` at the highest score among n of these m answers, over all choices of n.

    Of the (m choose n) choices, (i choose n - 1) have the answer with i lower ones on top. Equal scores in some order.

    >>> expected_best(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 5.0, 2.0]), 2)      # on top: 2nd, 3rd, 3rd
    3.0
    """
    m = len(score)
    if not 1 <= n <= m:
        raise ValueError(f"n is from 1 to the {m} answers, got {n}")
    total, ordered = math.comb(m, n), value[score.argsort()].tolist()
    return sum(math.comb(i, n - 1) / total * v for i, v in enumerate(ordered))


def check_n(n: int) -> None:
    """Refuse to choose among none."""
    if n < 1:
        raise ValueError(f"best-of-n needs n of at least 1, got {n}")
