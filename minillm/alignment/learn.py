"""Three loops that make a policy better at a task by its own tries: GRPO, SPO and PPO, side by side.

Idea:        All three go round the same circle: draw prompts, sample, reward, turn rewards into advantages, take a few
             clipped steps on these samples, throw them away. They differ in what a reward is compared with: GRPO asks
             the other completions of the prompt, SPO a memory of how often the prompt was solved, PPO a critic that
             reads the text token by token. The reference, a frozen copy of the start, only measures how far the policy
             has gone; no gradient reaches it, nor the rule that rewards.
Cost:        For each batch a rollout, a pass of the reference, and forward and backward once over every completion. SPO
             adds a pass over each prompt's previous completion and a rollout of its whole pool before the start, PPO a
             pass for the critic, which is a small head on the policy's own states here.
Paper:       Shao et al. 2024, arXiv:2402.03300, algorithm 1 (GRPO); Xu and Ding 2025, arXiv:2509.13232 (SPO); Schulman
             et al. 2017, arXiv:1707.06347, algorithm 1 (PPO).
Production:  TRL GRPOTrainer with num_iterations 1; verl RayPPOTrainer.
Leaves out:  a critic with a body of its own, asynchronous rollouts, schedules, several passes over the same samples.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.alignment import spo as tracking
from minillm.alignment import tasks
from minillm.alignment.grpo import dapo_loss, each_token, group_advantages, grpo_loss, reference_kl
from minillm.alignment.kl import k3
from minillm.alignment.log_probs import token_log_probs, token_mean
from minillm.alignment.ppo import clip_fraction, gae, kl_rewards, policy_loss, value_loss, whiten
from minillm.alignment.rollout import Rollout, greedy, rescore, sample, states
from minillm.architecture.transformer import Transformer


@dataclass(frozen=True)
class Settings:
    """What the three loops have in common. ValueError if the parts of a batch are not of one size.

    With the defaults the policy of `tasks.START`, right in 0.42 of held-out prompts, gets to 0.7 and more in seconds.
    """

    steps: int = 80
    batch: int = 256  # completions a step
    parts: int = 4  # the batch is learnt from in so many updates, so that the ratios leave 1
    lr: float = 3e-4
    clip: float = 0.2
    beta: float = 0.02  # weight of the KL to the start; SPO has none
    temperature: float = 1.0
    every: int = 10  # steps between two measurements of held-out accuracy
    seed: int = 0

    def __post_init__(self) -> None:
        if self.parts < 1 or self.batch % self.parts:
            raise ValueError(f"a batch is cut into equal parts, got {self.batch} completions and {self.parts} parts")


class Step(NamedTuple):
    """What one step saw: its samples are those of the policy before it, the accuracy is that after it."""

    step: int
    reward: float  # share of right completions
    length: float  # tokens of a completion, its end included
    entropy: float  # of the policy at a token, in nats
    kl: float  # from the policy to the start, a token, in nats: k3
    clipped: float  # share of tokens whose gradient clipping took away, over the parts
    accuracy: float | None  # of greedy answers to held-out prompts, every few steps


OnStep = Callable[[Step], object]


def accuracy(model: Transformer, prompts: Int[Tensor, "b p"]) -> float:
    """Share of prompts whose greedy completion is right."""
    tokens = greedy(model, prompts, new_tokens=tasks.NEW_TOKENS, end=tasks.END)
    return tasks.rewards(prompts, tokens).mean().item()


class Run:
    """A policy that learns in place, its frozen start, and the bookkeeping that the three loops share."""

    def __init__(self, model: Transformer, split: tasks.Split, settings: Settings, on_step: OnStep | None) -> None:
        self.model, self.split, self.settings, self.on_step = model, split, settings, on_step
        self.reference = copy.deepcopy(model).requires_grad_(False)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
        self.records: list[Step] = []
        self.clipped: list[Tensor] = []  # of the parts of this step

    def draw(self, count: int) -> Int[Tensor, "{count} p"]:
        """Different prompts of those to train on, at random."""
        there = len(self.split.train)
        if not 1 <= count <= there:
            raise ValueError(f"between 1 and {there} different prompts can be drawn, got {count}")
        return self.split.train[torch.randperm(there, generator=self.generator)[:count]]

    def sample(self, prompts: Int[Tensor, "n p"], *, group: int = 1) -> tuple[Rollout, Float[Tensor, " b"]]:
        """Completions of the policy as it is now, and their rewards."""
        rollout = sample(
            self.model,
            prompts,
            group=group,
            new_tokens=tasks.NEW_TOKENS,
            end=tasks.END,
            generator=self.generator,
            temperature=self.settings.temperature,
        )
        return rollout, tasks.rewards(rollout.prompts, rollout.tokens)

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout) -> Float[Tensor, "b n"]:
        """log p under the start."""
        return rescore(self.reference, rollout, temperature=self.settings.temperature)

    def parts(self) -> Iterator[Int[Tensor, " k"]]:
        """The rows of the batch in a random order, part by part."""
        yield from torch.randperm(self.settings.batch, generator=self.generator).chunk(self.settings.parts)

    def learn(self, loss: Float[Tensor, ""], now: Tensor, part: Rollout, advantages: Float[Tensor, "b n"]) -> None:
        """One step of Adam on the loss of a part, its gradient cut to norm 1."""
        self.clipped.append(clip_fraction(now, part.log_probs, advantages, part.mask, clip=self.settings.clip))
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        self.optimizer.step()

    def record(self, rollout: Rollout, reward: Float[Tensor, " b"], reference: Float[Tensor, "b n"]) -> None:
        """Note what this step saw."""
        settings, mask, done = self.settings, rollout.mask, len(self.records) + 1
        due = done % settings.every == 0 or done == settings.steps
        step = Step(
            step=done,
            reward=reward.mean().item(),
            length=mask.sum(dim=1).float().mean().item(),
            entropy=token_mean(rollout.entropies, mask).item(),
            kl=token_mean(k3(rollout.log_probs, reference), mask).item(),
            clipped=torch.stack(self.clipped).mean().item(),
            accuracy=accuracy(self.model, self.split.held_out) if due else None,
        )
        self.clipped.clear()
        self.records.append(step)
        if self.on_step is not None:
            self.on_step(step)


def grpo(
    model: Transformer, split: tasks.Split, settings: Settings, *, group: int = 4, on_step: OnStep | None = None
) -> list[Step]:
    """Groups of completions: a reward counts by how it stands in its group. The KL to the start is in the loss."""
    if settings.batch % group:
        raise ValueError(f"a batch is cut into groups, got {settings.batch} completions and groups of {group}")
    run = Run(model, split, settings, on_step)
    for _ in range(settings.steps):
        rollout, reward = run.sample(run.draw(settings.batch // group), group=group)
        advantages = group_advantages(reward.view(-1, group)).flatten()
        reference = run.reference_log_probs(rollout)
        for rows in run.parts():
            part, gain = rollout.part(rows), advantages[rows]
            now = rescore(model, part, temperature=settings.temperature)
            loss = grpo_loss(now, part.log_probs, gain, part.mask, clip=settings.clip)
            loss = loss + settings.beta * reference_kl(now, reference[rows], part.mask)
            run.learn(loss, now, part, each_token(gain, part.mask))
        run.record(rollout, reward, reference)
    return run.records


def spo(
    model: Transformer,
    split: tasks.Split,
    settings: Settings,
    *,
    pool: int = 1024,
    tries: int = 8,
    on_step: OnStep | None = None,
) -> list[Step]:
    """One completion a prompt, from a pool of prompts: a reward counts by how often its prompt was solved before.

    `tries` completions of each prompt of the pool come first, from which the tracker starts; no KL to the start.
    """
    run = Run(model, split, settings, on_step)
    prompts = run.draw(pool)
    first, reward = run.sample(prompts, group=tries)
    tracker = tracking.start_tracker(reward.view(pool, tries))
    previous = first.part(torch.arange(0, pool * tries, tries))
    for _ in range(settings.steps):
        drawn = tracking.draw_prompts(tracker, settings.batch, generator=run.generator)
        rollout, reward = run.sample(prompts[drawn])
        advantages = tracking.advantages(tracker, drawn, reward)  # by the tracker as it was before these rewards
        tracker = tracking.update(tracker, drawn, reward, tracking.forgetting(moved(run, previous.part(drawn))))
        for kept, new in zip(previous, rollout, strict=True):
            kept[drawn] = new
        reference = run.reference_log_probs(rollout)
        for rows in run.parts():
            part, gain = rollout.part(rows), advantages[rows]
            now = rescore(model, part, temperature=settings.temperature)
            loss = dapo_loss(now, part.log_probs, gain, part.mask, low=settings.clip, high=settings.clip)
            run.learn(loss, now, part, each_token(gain, part.mask))
        run.record(rollout, reward, reference)
    return run.records


@torch.no_grad()
def moved(run: Run, previous: Rollout) -> Float[Tensor, " b"]:
    """How far the policy has moved since these completions were drawn, in nats a token."""
    now = rescore(run.model, previous, temperature=run.settings.temperature)
    return tracking.movement(previous.log_probs, now, previous.mask)


class Critic(nn.Module):
    """The reward to be expected, read off the policy's state before each token. Starts at 0 everywhere.

    The states are detached: the critic learns to read the policy and does not change it.
    """

    def __init__(self, width: int, *, hidden: int = 64, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(hidden, width, generator=generator) * width**-0.5)
        self.outer = nn.Parameter(torch.zeros(hidden))

    def forward(self, states: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
        """The values."""
        return torch.tanh(F.linear(states.detach(), self.inner)) @ self.outer


def ppo(
    model: Transformer, split: tasks.Split, settings: Settings, *, lam: float = 0.95, on_step: OnStep | None = None
) -> list[Step]:
    """One completion a prompt: a critic says what was to be expected at each token. The KL is a cost in the reward."""
    run = Run(model, split, settings, on_step)
    critic = Critic(model.config.width, generator=run.generator)
    run.optimizer.add_param_group({"params": list(critic.parameters()), "lr": 10 * settings.lr})
    for _ in range(settings.steps):
        rollout, reward = run.sample(run.draw(settings.batch))
        reference = run.reference_log_probs(rollout)
        with torch.no_grad():
            values = critic(states(model, rollout))
        given = kl_rewards(reward, rollout.log_probs, reference, rollout.mask, beta=settings.beta)
        advantages, returns = gae(given, values, rollout.mask, lam=lam)
        advantages = whiten(advantages, rollout.mask)
        for rows in run.parts():
            part, gain = rollout.part(rows), advantages[rows]
            seen = states(model, part)
            now = token_log_probs(F.linear(seen, model.unembedding), part.tokens, temperature=settings.temperature)
            loss = policy_loss(now, part.log_probs, gain, part.mask, clip=settings.clip)
            loss = loss + value_loss(critic(seen), values[rows], returns[rows], part.mask, clip=settings.clip)
            run.learn(loss, now, part, gain)
        run.record(rollout, reward, reference)
    return run.records
