"""Preference losses without a reward model: DPO, and IPO, KTO and SimPO, which change one thing each.

Idea:        The policy that maximises reward minus beta KL(policy, reference) is the reference times exp(reward /
             beta), normalised. Solved for the reward: beta log(policy / reference), plus a term of the prompt alone,
             which cancels between two responses to one prompt. Put into Bradley and Terry, the reward model's loss
             becomes a loss of the policy: no sampling, no reward model. There is no KL term in it: beta is the scale
             of the implicit reward, and only on the responses of the data. IPO puts a finite target in place of "as
             far apart as possible"; KTO judges single responses; SimPO drops the reference and divides by the length.
Cost:        Forward and backward of both responses with the policy, forward with the reference (or its stored
             log-probabilities).
Paper:       Rafailov et al. 2023, arXiv:2305.18290, equation 7; Azar et al. 2023, "IPO", arXiv:2310.12036, equation 17;
             Ethayarajh et al. 2024, "KTO", arXiv:2402.01306; Meng et al. 2024, "SimPO", arXiv:2405.14734.
Production:  TRL DPOTrainer (loss_type "sigmoid" and "ipo"), KTOTrainer ("kto"), CPOTrainer ("simpo", experimental).
Leaves out:  label smoothing, a term of the chosen response's likelihood, log-probabilities that depend on the length.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from minillm.alignment.log_probs import sequence_mean, sequence_sum


def implicit_reward(
    log_probs: Float[Tensor, "*b t"],
    reference: Float[Tensor, "*b t"],
    mask: Bool[Tensor, "*b t"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, "*b"]:
    """beta log(policy / reference) of each response: the reward for which the policy is optimal, up to a prompt's term.

    No gradient flows into the reference.

    >>> half, quarter = torch.tensor([[0.5, 0.5, 0.1]]).log(), torch.tensor([[0.25, 0.25, 0.9]]).log()
    >>> implicit_reward(half, quarter, torch.tensor([[True, True, False]]), beta=1.0).exp()     # twice, two times
    tensor([4.])
    """
    check_beta(beta)
    return beta * sequence_sum(log_probs - reference.detach(), mask)


def dpo_loss(
    log_probs: Float[Tensor, "2 b t"],
    reference: Float[Tensor, "2 b t"],
    mask: Bool[Tensor, "2 b t"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(reward of chosen - reward of rejected) over the pairs; ln 2 while policy is reference.

    `log_probs[0]` are the chosen, `log_probs[1]` the rejected responses to the same prompts; `mask` marks the tokens of
    the response, whose log-probabilities are summed, not averaged. A pair pulls with beta sigmoid(rejected - chosen):
    nearly beta where the policy has the order wrong, nearly 0 where it has it right.

    >>> policy, mask = torch.randn(2, 3, 5), torch.ones(2, 3, 5, dtype=torch.bool)
    >>> dpo_loss(policy, policy, mask)
    tensor(0.6931)
    """
    check_two(log_probs)
    chosen, rejected = implicit_reward(log_probs, reference, mask, beta=beta)
    return -F.logsigmoid(chosen - rejected).mean()


def ipo_loss(
    log_probs: Float[Tensor, "2 b t"],
    reference: Float[Tensor, "2 b t"],
    mask: Bool[Tensor, "2 b t"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean of (h - 1 / (2 beta))^2, h the difference of log(policy / reference) between chosen and rejected.

    Past the target the loss grows again, so certain preferences do not drive the policy to infinity. Here, as in TRL,
    a response's log ratio is the mean over its tokens; equation 17 of the paper has the sum.
    """
    check_two(log_probs)
    check_beta(beta)
    chosen, rejected = sequence_mean(log_probs - reference.detach(), mask)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


@torch.no_grad()
def kto_reference(
    log_probs: Float[Tensor, "b t"], reference: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """KTO's point of reference: mean log(policy / reference) of responses put to other prompts, at least 0.

    An estimate of KL(policy, reference), shared by the batch and without gradient: the responses of the batch, each
    scored after another row's prompt.
    """
    return sequence_sum(log_probs - reference, mask).mean().clamp(min=0)


def kto_loss(
    log_probs: Float[Tensor, "b t"],
    reference: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    desirable: Bool[Tensor, " b"],
    kl: Float[Tensor, ""],
    *,
    beta: float = 0.1,
    gain: float = 1.0,
    loss: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean of 1 - sigmoid of how far a good response is above the point `kl` (a bad one below it), times beta.

    For responses marked good or bad one by one, without pairs. `gain` and `loss` weigh the good and the bad ones, for
    data with many more of one kind.

    >>> policy, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    >>> kto_loss(policy, policy, mask, torch.tensor([True, False, True]), torch.tensor(0.0))
    tensor(0.5000)
    """
    above = implicit_reward(log_probs, reference, mask, beta=beta) - beta * kl.detach()
    good, bad = gain * (1 - above.sigmoid()), loss * (1 - (-above).sigmoid())
    return torch.where(desirable, good, bad).mean()


def simpo_loss(
    log_probs: Float[Tensor, "2 b t"], mask: Bool[Tensor, "2 b t"], *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(beta (mean log p of chosen - of rejected) - gamma): no reference, no gain from length.

    `gamma` is by how much the chosen response's reward should be ahead at least.
    """
    check_two(log_probs)
    check_beta(beta)
    chosen, rejected = beta * sequence_mean(log_probs, mask)
    return -F.logsigmoid(chosen - rejected - gamma).mean()


def check_beta(beta: float) -> None:
    """Refuse a scale that turns the preference round or off."""
    if not beta > 0:
        raise ValueError(f"beta is greater than 0, got {beta}")


def check_two(log_probs: Tensor) -> None:
    """Refuse a batch that is not pairs."""
    if log_probs.ndim != 3 or len(log_probs) != 2:
        raise ValueError(
            f"pairs are a tensor [2, b, t], chosen first and rejected second, got {tuple(log_probs.shape)}"
        )
