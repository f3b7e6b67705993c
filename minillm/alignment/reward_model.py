"""The reward model: a score for a whole response, learnt from which of two people preferred.

Idea:        People agree more on which of two answers is better than on a grade. Bradley and Terry: the probability
             that one is preferred is the logistic function of the difference of the scores; the loss is minus its log.
             Only differences count, so scores have no zero and no comparison between prompts. The score is read at the
             last real token, the only one that has seen the whole response, not at the last column.
Cost:        One forward pass for each of the two responses, one number a response.
Paper:       Ouyang et al. 2022, "InstructGPT", arXiv:2203.02155, equation 1; Stiennon et al. 2020, arXiv:2009.01325,
             section 3.4 (scores shifted to mean 0 afterwards).
Production:  TRL RewardTrainer; transformers ForSequenceClassification (the last token that is no padding).
Leaves out:  rankings of more than two, ties, a penalty that keeps scores near 0, uncertainty.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def last_real(values: Float[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """The value at the last real token of each row, wherever the padding is.

    >>> values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    >>> last_real(values, torch.tensor([[True, True, False], [False, True, True]]))     # padded right, padded left
    tensor([2., 6.])
    """
    if values.shape != real.shape:
        raise ValueError(f"real marks each token of {tuple(values.shape)}, got {tuple(real.shape)}")
    if not real.any(dim=1).all():
        raise ValueError(f"each row needs a real token, got none in row {int((~real.any(dim=1)).nonzero()[0])}")
    place = torch.arange(real.shape[1], device=real.device)
    last = place.masked_fill(~real, -1).amax(dim=1)
    return values.gather(1, last[:, None]).squeeze(1)


def preference(chosen: Float[Tensor, "*b"], rejected: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """The probability that the first is preferred, by Bradley and Terry.

    >>> preference(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0 - torch.log(torch.tensor(3.0))]))
    tensor([0.5000, 0.7500])
    """
    return (chosen - rejected).sigmoid()


def bradley_terry_loss(
    chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"], *, margin: Float[Tensor, " b"] | float = 0.0
) -> Float[Tensor, ""]:
    """Mean of -log preference(chosen - margin, rejected) over the pairs, in nats; ln 2 if the scores are equal.

    `margin` is by how much the difference should exceed 0 at least to cost less than ln 2: larger for pairs on which
    people were sure.

    >>> bradley_terry_loss(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -3.0]))
    tensor(0.6931)
    """
    check_pairs(chosen, rejected)
    return -F.logsigmoid(chosen - rejected - margin).mean()


def reward_loss(
    values: Float[Tensor, "2 b t"], real: Bool[Tensor, "2 b t"], *, margin: Float[Tensor, " b"] | float = 0.0
) -> Float[Tensor, ""]:
    """The loss of b pairs from a number for each token: [0] are the chosen texts, [1] the rejected ones.

    Each text's score is its value at the last real token. `margin` as in `bradley_terry_loss`.

    >>> values = torch.tensor([[[0.0, 2.0, 9.0]], [[0.0, 0.0, 1.0]]])
    >>> real = torch.tensor([[[True, True, False]], [[True, True, True]]])
    >>> reward_loss(values, real), (1 + torch.tensor(-1.0).exp()).log()             # scores 2 and 1
    (tensor(0.3133), tensor(0.3133))
    """
    if values.ndim != 3 or len(values) != 2:
        raise ValueError(f"pairs are a tensor [2, b, t], chosen first and rejected second, got {tuple(values.shape)}")
    if values.shape != real.shape:
        raise ValueError(f"real marks each token of {tuple(values.shape)}, got {tuple(real.shape)}")
    chosen, rejected = last_real(values.flatten(0, 1), real.flatten(0, 1)).unflatten(0, (2, -1))
    return bradley_terry_loss(chosen, rejected, margin=margin)


class Ranking(NamedTuple):
    accuracy: Tensor  # the share of pairs with chosen above rejected; equal scores are not above
    margin: Tensor  # the mean of chosen minus rejected


@torch.no_grad()
def ranking(chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"]) -> Ranking:
    """How well the scores order the pairs, without gradient.

    >>> ranking(torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0, 0.0]))
    Ranking(accuracy=tensor(0.5000), margin=tensor(0.))
    """
    check_pairs(chosen, rejected)
    return Ranking((chosen > rejected).to(chosen.dtype).mean(), (chosen - rejected).mean())


def check_pairs(chosen: Tensor, rejected: Tensor) -> None:
    """Refuse scores that do not come in pairs."""
    if chosen.shape != rejected.shape or not len(chosen):
        raise ValueError(
            f"one rejected score for each chosen one, got {len(chosen)} chosen and {len(rejected)} rejected"
        )
