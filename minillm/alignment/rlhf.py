"""RLHF from end to end in a toy whose true quality is known: what happens to it while a learned reward rises.

Idea:        People show what an answer looks like, a model imitates them (SFT). They compare two of its answers, a
             reward model learns to predict which one they prefer. Then the policy is trained to score high, minus beta
             times how far it goes from its start. The reward model is a proxy: fitted where the start policy writes,
             and nobody has checked it elsewhere. In `fact_lists` longer is mostly better as long as answers are short,
             and so the proxy learns. A policy that is free to follow it fills the page, and the true quality, which
             rose at first, falls.
Cost:        Three models of one size: policy, start, reward model. A step samples, scores with all three and learns.
Paper:       Ouyang et al. 2022, "InstructGPT", arXiv:2203.02155, section 3; Gao et al. 2022, arXiv:2210.10760 (proxy
             and gold against the KL).
Production:  TRL SFTTrainer, RewardTrainer and RLOOTrainer; verl with a reward model.
Leaves out:  prompts, a critic, fresh comparisons of what the policy writes later.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.alignment.fact_lists import ASK, END, ROOM, compare, gold, people
from minillm.alignment.grpo import each_token, group_advantages
from minillm.alignment.log_probs import sequence_sum, token_mean
from minillm.alignment.ppo import policy_loss
from minillm.alignment.reward_model import last_real, reward_loss
from minillm.alignment.rollout import Rollout, rescore, sample
from minillm.architecture.transformer import Config, Transformer

SHAPE = Config(vocabulary=22, width=32, layers=1, heads=2, kv_heads=2, head_size=16, hidden=64, context=ROOM + 1)


def write(model: Transformer, count: int, *, generator: torch.Generator) -> Rollout:
    """Answers of a model."""
    ask = torch.full((1, 1), ASK)
    return sample(model, ask, group=count, new_tokens=ROOM, end=END, generator=generator)


def supervised(*, steps: int = 100, batch: int = 64, lr: float = 1e-2, generator: torch.Generator) -> Transformer:
    """The first stage: a small model trained on answers of people, fresh ones in each step. The start of the policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = Transformer(SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        shown = people(batch, generator=generator)
        loss = -token_mean(rescore(model, shown), shown.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class RewardModel(nn.Module):
    """The start policy's body with a head that gives one number a token. The score is read at the last real one."""

    def __init__(self, start: Transformer) -> None:
        super().__init__()
        self.body = copy.deepcopy(start)
        self.head = nn.Parameter(torch.zeros(start.config.width))
        self.mean, self.std = 0.0, 1.0

    def values(self, answers: Rollout) -> Float[Tensor, "b n"]:
        """A number for each token of the answers."""
        ids = torch.cat([answers.prompts, answers.tokens], dim=1)
        return self.body.hidden(ids)[:, answers.prompts.shape[1] :] @ self.head

    def forward(self, answers: Rollout) -> Float[Tensor, " b"]:
        """The scores, shifted and scaled as `standardise` found."""
        return (last_real(self.values(answers), answers.mask) - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, answers: Rollout) -> None:
        """Give these answers scores of mean 0 and standard deviation 1: comparisons fix neither zero nor unit."""
        scores = last_real(self.values(answers), answers.mask)
        self.mean, self.std = scores.mean().item(), scores.std().item()


def fit(
    start: Transformer,
    chosen: Rollout,
    rejected: Rollout,
    *,
    steps: int = 200,
    batch: int = 64,
    lr: float = 3e-3,
    generator: torch.Generator,
) -> RewardModel:
    """The second stage: a reward model from pairs, Adam on the loss of Bradley and Terry."""
    model = RewardModel(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        drawn = torch.randperm(len(chosen.tokens), generator=generator)[:batch]
        both = Rollout(*(torch.cat([w[drawn], l[drawn]]) for w, l in zip(chosen, rejected, strict=True)))
        loss = reward_loss(model.values(both).unflatten(0, (2, -1)), both.mask.unflatten(0, (2, -1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


class Curve(NamedTuple):
    """Means over what the policy wrote in each step, before it moved."""

    proxy: Float[Tensor, " n"]  # the reward model's score
    gold: Float[Tensor, " n"]  # the true quality
    kl: Float[Tensor, " n"]  # from the start, of whole answers, in nats
    length: Float[Tensor, " n"]  # tokens, END included


@torch.no_grad()
def divergences(start: Transformer, answers: Rollout) -> Float[Tensor, " b"]:
    """log(policy / start) of whole answers in nats: the mean over answers of the policy estimates KL(policy, start)."""
    return sequence_sum(answers.log_probs - rescore(start, answers), answers.mask)


def climb(
    policy: Transformer,
    reward: RewardModel,
    start: Transformer,
    *,
    beta: float,
    steps: int = 60,
    batch: int = 128,
    parts: int = 2,
    lr: float = 1e-3,
    generator: torch.Generator,
) -> Curve:
    """The third stage, the policy in place: score - beta log(policy / start) up, by PPO's loss without a critic.

    Each answer's reward is compared with that of the batch, and all its tokens get this advantage.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    rows: list[list[float]] = []
    for _ in range(steps):
        answers = write(policy, batch, generator=generator)
        with torch.no_grad():
            score, away = reward(answers), divergences(start, answers)
        advantages = each_token(group_advantages((score - beta * away)[None])[0], answers.mask)
        for drawn in torch.randperm(batch, generator=generator).chunk(parts):
            part = answers.part(drawn)
            loss = policy_loss(rescore(policy, part), part.log_probs, advantages[drawn], part.mask)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        seen = score, gold(answers.tokens, answers.mask), away, answers.mask.sum(dim=1).float()
        rows.append([x.mean().item() for x in seen])
    return Curve(*torch.tensor(rows).T)


class Stages(NamedTuple):
    """What the first two stages made, and pairs that the reward model has not seen."""

    start: Transformer
    reward: RewardModel
    chosen: Rollout
    rejected: Rollout


def prepare(*, pairs: int = 1500, held_out: int = 2000, seed: int = 0) -> Stages:
    """SFT and a reward model from comparisons of the start policy's own answers."""
    generator = torch.Generator().manual_seed(seed)
    start = supervised(generator=generator).requires_grad_(False)
    first, second = (write(start, pairs + held_out, generator=generator) for _ in range(2))
    chosen, rejected = compare(first, second, generator=generator)
    train, rest = torch.arange(pairs), torch.arange(pairs, pairs + held_out)
    reward = fit(start, chosen.part(train), rejected.part(train), generator=generator)
    reward.standardise(first.part(rest))
    return Stages(start, reward, chosen.part(rest), rejected.part(rest))


def optimise(stages: Stages, *, beta: float, seed: int = 0) -> tuple[Transformer, Curve]:
    """A copy of the start after the third stage, and its curve."""
    policy = copy.deepcopy(stages.start).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed + 1000)
    return policy, climb(policy, stages.reward, stages.start, beta=beta, generator=generator)
