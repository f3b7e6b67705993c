"""Trials of PPO's parts: one batch of samples used many times, drawn at another temperature, and KL penalties alone.

Idea:        What samples are worth ends when the policy has moved. `reuse` takes one batch through many updates with
             any loss and notes how far the policy has gone from the one that sampled, measured against the stored
             log-probabilities whatever the loss itself divides by: a loss whose ratio is always 1 notices nothing.
             `penalised` gives a small policy nothing but a penalty to follow, estimated from its own samples: what an
             estimator of KL is worth as a gradient shows in whether the policy comes back to the reference.
Cost:        An update of `reuse` is a forward and a backward pass of the batch; the rest is nothing.
Paper:       Schulman et al. 2017, arXiv:1707.06347, section 3 (many updates on the same samples); Tang and Munos 2025,
             arXiv:2506.09477 (gradients of estimators).
Production:  the clip fraction and approximate KL that PPO trainers log over the epochs of a batch.
Leaves out:  minibatches, a critic, early stop.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.alignment import tasks
from minillm.alignment.kl import Estimator, k1, k2, k3
from minillm.alignment.log_probs import token_mean
from minillm.alignment.ppo import log_ratios, policy_loss, whiten
from minillm.alignment.rollout import Rollout, pass_at_k, rescore, sample
from minillm.architecture.transformer import Transformer

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of log_probs, old, advantages, mask


def in_reward(estimator: Estimator) -> Estimator:
    """A surrogate whose gradient is that of the estimator as a cost in the reward: log p times its detached value."""
    return lambda log_probs, reference: log_probs * estimator(log_probs, reference).detach()


PENALTIES: dict[str, Estimator] = {
    "k1 as a loss": k1,
    "k2 as a loss": k2,
    "k3 as a loss": k3,
    "k1 in the reward": in_reward(k1),
    "k3 in the reward": in_reward(k3),
}


class Tried(NamedTuple):
    """A batch of completions of `tasks`."""

    rollout: Rollout
    rewards: Float[Tensor, " b"]
    advantages: Float[Tensor, "b t"]  # without a critic: the reward minus the batch's mean, scaled to deviation 1


def attempt(
    model: Transformer, prompts: Int[Tensor, "n p"], *, seed: int, group: int = 1, temperature: float = 1.0
) -> Tried:
    """`group` completions of each prompt, their rewards, and one advantage for all tokens of a completion."""
    rollout = sample(
        model,
        prompts,
        group=group,
        new_tokens=tasks.NEW_TOKENS,
        end=tasks.END,
        generator=torch.Generator().manual_seed(seed),
        temperature=temperature,
    )
    rewards = tasks.rewards(rollout.prompts, rollout.tokens)
    return Tried(rollout, rewards, whiten(rewards[:, None].expand(rollout.mask.shape), rollout.mask))


def passes(model: Transformer, prompts: Int[Tensor, "n p"], *, tries: int, seed: int) -> list[float]:
    """pass@1 to pass@tries, from `tries` completions of each prompt."""
    right = attempt(model, prompts, seed=seed, group=tries).rewards.view(-1, tries) == 1
    return [pass_at_k(right, k) for k in range(1, tries + 1)]


def plain_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
) -> Float[Tensor, ""]:
    """REINFORCE, which needs fresh samples: minus the mean of log p times advantage. `old` is not looked at."""
    return -token_mean(log_probs * advantages, mask)


def recomputed_loss(
    log_probs: Float[Tensor, "b t"],
    old: Float[Tensor, "b t"],
    advantages: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
) -> Float[Tensor, ""]:
    """PPO's loss with a mistake: its old log-probabilities are the present ones, so that every ratio is 1."""
    return policy_loss(log_probs, log_probs.detach(), advantages, mask)


class Trace(NamedTuple):
    """How far the policy is from the one that sampled: before each update, and after the last."""

    outside: Float[Tensor, " n"]  # share of tokens with a ratio outside of 1 +- clip
    kl: Float[Tensor, " n"]  # from the sampling policy to the present one, a token, in nats


@torch.no_grad()
def outside(
    log_probs: Float[Tensor, "b t"], old: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"], *, clip: float = 0.2
) -> Float[Tensor, ""]:
    """The share of response tokens whose ratio policy / old is outside of 1 +- clip, whatever their advantages.

    >>> ratios = torch.tensor([[0.7, 0.9, 1.1, 1.3]])
    >>> outside(ratios.log(), torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))     # 1 of 3
    tensor(0.3333)
    """
    ratio = log_ratios(log_probs, old, mask).exp()
    return token_mean(((ratio - 1).abs() > clip).to(log_probs.dtype), mask)


@torch.no_grad()
def drift(log_probs: Float[Tensor, "b t"], old: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """KL from the policy that sampled to the present one, a token: the mean of ratio - 1 - log ratio, never negative.

    >>> twice = torch.tensor([[2.0]]).log()
    >>> drift(twice, torch.zeros(1, 1), torch.tensor([[True]]))                 # 2 - 1 - ln 2
    tensor(0.3069)
    """
    d = log_ratios(log_probs, old, mask)
    return token_mean(k3(torch.zeros_like(d), d), mask)  # k3 with the sampler as the policy


def reuse(
    model: Transformer,
    rollout: Rollout,
    advantages: Float[Tensor, "b t"],
    loss: PolicyLoss,
    *,
    updates: int,
    lr: float = 3e-4,
    temperature: float = 1.0,
) -> Trace:
    """Steps of Adam on one batch of samples, gradients cut to norm 1; the model learns in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99))
    trace = Trace(torch.zeros(updates + 1), torch.zeros(updates + 1))
    for i in range(updates + 1):
        now = rescore(model, rollout, temperature=temperature)
        trace.outside[i] = outside(now, rollout.log_probs, rollout.mask)
        trace.kl[i] = drift(now, rollout.log_probs, rollout.mask)
        if i == updates:
            break
        optimizer.zero_grad()
        loss(now, rollout.log_probs, advantages, rollout.mask).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return trace


def penalised(
    surrogate: Estimator,
    logits: Float[Tensor, " v"],
    reference: Float[Tensor, " v"],
    *,
    steps: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> Float[Tensor, "{steps}+1 v"]:
    """The log-probabilities on the way of descent on the mean surrogate of `batch` samples of the policy itself."""
    leaf, log_q = logits.clone(), reference.log_softmax(dim=-1)
    path = [leaf.log_softmax(dim=-1)]
    for _ in range(steps):
        leaf = leaf.detach().requires_grad_()
        log_p = leaf.log_softmax(dim=-1)
        drawn = log_p.detach().exp().multinomial(batch, replacement=True, generator=generator)
        slope = torch.autograd.grad(surrogate(log_p[drawn], log_q[drawn]).mean(), leaf)[0]
        leaf = leaf.detach() - lr * slope
        path.append(leaf.log_softmax(dim=-1))
    return torch.stack(path)


def moments(estimator: Estimator, logits: Float[Tensor, " v"], reference: Float[Tensor, " v"]) -> tuple[float, float]:
    """Mean and standard deviation of an estimator over the policy's samples, exactly.

    >>> logits = torch.tensor([0.5, 0.5]).log()
    >>> mean, deviation = moments(k1, logits, torch.tensor([0.8, 0.2]).log())    # ln 5/8 and ln 5/2 at 1/2 each
    >>> round(mean, 3), round(deviation, 3)                     # ln 5/4, and half of ln 4
    (0.223, 0.693)
    """
    log_p = logits.log_softmax(dim=-1)
    values, p = estimator(log_p, reference.log_softmax(dim=-1)), log_p.exp()
    mean = (p * values).sum()
    return mean.item(), (p * (values - mean).square()).sum().sqrt().item()


def mismatch(logits: Float[Tensor, " v"], worth: Float[Tensor, " v"], *, temperature: float) -> tuple[float, float]:
    """Relative errors of the mean policy gradient of the policy at temperature 1 if samples come from another one.

    First with ratios of 1, as if they were the policy's own, then with ratios to what they were drawn from. `worth` is
    the reward of each token, and the policy's own mean reward is the baseline.
    """
    leaf = logits.detach().requires_grad_()
    log_p, log_drawn = leaf.log_softmax(dim=-1), (logits / temperature).log_softmax(dim=-1)
    gain = worth - (log_p.detach().exp() * worth).sum()
    right = torch.autograd.grad((log_p.exp() * worth).sum(), leaf, retain_graph=True)[0]
    errors = []
    for old in (log_p.detach(), log_drawn):
        mean = (log_drawn.exp() * (log_p - old).exp() * gain).sum()
        pull = torch.autograd.grad(mean, leaf, retain_graph=True)[0]
        errors.append(((pull - right).norm() / right.norm()).item())
    return errors[0], errors[1]
