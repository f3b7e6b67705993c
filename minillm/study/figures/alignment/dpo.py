"""Drawings of alignment/dpo."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.alignment.kl import exact_kl
from minillm.alignment.preference_tuning import Record
from minillm.alignment.preferences import descend, every_pair, optimum, population_loss
from minillm.study.notebook import COLORS

REFERENCE = torch.tensor([0.05, 0.10, 0.20, 0.30, 0.25, 0.10], dtype=torch.float64).log()
REWARD = torch.tensor([1.0, 0.6, 0.2, 0.0, -0.5, -1.0], dtype=torch.float64)
START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()  # No, Never, Yes
FEATURES = torch.tensor([[1.0, 0.2], [1.5, 0.0], [-1.0, 0.0]], dtype=torch.float64)  # the first two are alike
PEOPLE = ["Bradley and Terry", "nine of ten agree", "all agree"]
SHADES = [COLORS["accent"], COLORS["sdpa"], COLORS["tiled"]]
BARS = {"reference": COLORS["grey"], "DPO": COLORS["tiled"], "closed form": COLORS["accent"]}


def bars(axes: Axes, policies: Mapping[str, Tensor]) -> None:
    """The probability of each response under several policies, side by side. Policies are log-probabilities [n]."""
    width = 0.8 / len(policies)
    for i, (name, log_p) in enumerate(policies.items()):
        place = torch.arange(len(log_p)) + (i - (len(policies) - 1) / 2) * width
        axes.bar(place, log_p.exp(), width * 0.92, color=BARS[name], label=name)
    axes.set_xticks(range(len(REWARD)), [f"{r:+.1f}" if r else "0" for r in REWARD.tolist()])
    axes.set(xlabel="reward of the response", ylabel="probability", ylim=(0, None))
    axes.legend(loc="upper right", fontsize=10)


def same_optimum(log_reference: Tensor, dpo: Tensor, closed: Tensor) -> Figure:
    """Reference, the policy that DPO ends at, and the closed form of RLHF's best policy."""
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    axes = figure.subplots()
    bars(axes, {"reference": log_reference, "DPO": dpo, "closed form": closed})
    axes.set_title("DPO on pairs alone ends at the optimum of RLHF")
    axes.set_ylim(0, 1.35 * float(torch.stack([log_reference, dpo, closed]).exp().max()))
    return figure


def drift(kls: Mapping[float, Tensor], limit: float) -> Figure:
    """KL from the reference over the steps of descent, a line a beta; `limit` is that of all mass on one response."""
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for (beta, kl), color in zip(kls.items(), SHADES, strict=True):
        axes.plot(range(1, len(kl)), kl[1:], color=color, label=f"beta = {beta:g}")
    axes.axhline(limit, color=COLORS["grey"], linestyle="--", linewidth=1.2)
    axes.text(1, limit * 1.03, "all mass on one response: ln 3", fontsize=10, va="bottom")
    axes.set_xscale("log")
    axes.set(xlabel="steps of gradient descent", ylabel="KL from the reference (nats)", ylim=(0, limit * 1.25))
    axes.set_title("One response always wins: no beta stops the drift")
    axes.legend(loc="lower right")
    return figure


def band(axes: Axes, several: Tensor, color: str, label: str) -> None:
    """Mean and range over seeds; `several` is [seeds steps]."""
    steps = torch.arange(several.shape[1])
    axes.plot(steps, several.mean(dim=0), color=color, label=label)
    axes.fill_between(steps, several.amin(dim=0), several.amax(dim=0), color=color, alpha=0.2, linewidth=0)


def log_ratios(axes: Axes, records: Sequence[Record]) -> None:
    """How far chosen and rejected responses moved from the reference, over the steps."""
    band(axes, torch.stack([r.chosen for r in records]), COLORS["tiled"], "chosen")
    band(axes, torch.stack([r.rejected for r in records]), COLORS["naive"], "rejected")
    axes.axhline(0, color=COLORS["grey"], linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step of DPO", ylabel="log(policy / reference) (nats)")
    axes.legend(loc="lower left")


def tuned(records: Sequence[Record], before: Tensor, after: Tensor, longest: int) -> Figure:
    """The tuning of several seeds, and the lengths of responses before and after it."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    log_ratios(left, records)
    left.set_title("Measured: 16 steps, three seeds")
    edges = [x - 0.5 for x in range(1, longest + 2)]
    for lengths, color, label in (before, COLORS["grey"], "before"), (after, COLORS["tiled"], "after DPO"):
        shares = torch.full((len(lengths),), 100 / len(lengths))
        right.hist(lengths, bins=edges, weights=shares, color=color, alpha=0.55, label=label)
    right.set(xlabel=f"tokens until the sentence ends (or {longest})", ylabel="share of responses (%)")
    right.set_title("Measured: what it writes")
    right.legend(loc="upper center")
    return figure


def displaced(path: Tensor, names: Sequence[str], records: Sequence[Record]) -> Figure:
    """Left: probabilities of the toy's responses over the steps of descent. Right: the same trap in the small model."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = [COLORS["tiled"], COLORS["naive"], COLORS["sdpa"]]
    roles = ["chosen", "rejected", "never compared"]
    for log_p, name, role, color in zip(path.T, names, roles, colors, strict=True):
        left.plot(log_p.exp(), color=color, label=f"{name} ({role})")
    left.set(xlabel="steps of gradient descent", ylabel="probability", ylim=(0, 1.6))
    left.set_yticks([0, 0.5, 1])
    left.set_title("Toy: prefer No to Never")
    left.legend(loc="upper left", fontsize=10)
    log_ratios(right, records)
    right.set_title("Small model: one token differs, three seeds")
    return figure


def agreements(people: str, pairs: Tensor) -> Tensor:
    """Which share of people prefers the first of each pair; rewards fall from first to last response."""
    if people == PEOPLE[0]:
        return (REWARD[pairs[0]] - REWARD[pairs[1]]).sigmoid()
    return torch.full((pairs.shape[1],), 0.9 if people == PEOPLE[1] else 1.0, dtype=torch.float64)


def board(beta: float, people: str, steps: int) -> Figure:
    """DPO after some steps beside the closed form, and its KL and mean reward on the way.

    The learning rate is 4 / beta, so that the first step is as long for every beta.
    """
    pairs = every_pair(len(REWARD))
    share = agreements(people, pairs)
    path = descend(
        lambda p: population_loss(p, REFERENCE, pairs, share, beta=beta), REFERENCE, lr=4 / beta, steps=steps
    )
    best = optimum(REFERENCE, REWARD, beta=beta)
    figure = Figure(figsize=(8.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    bars(left, {"reference": REFERENCE, "DPO": path[-1], "closed form": best})
    left.set_ylim(0, 1.4 * float(torch.stack([REFERENCE, path[-1], best]).exp().max()))
    left.set_title(f"after {steps} steps, beta = {beta:g}")
    kl = exact_kl(path, REFERENCE.expand_as(path))
    goal = exact_kl(best, REFERENCE).item()
    right.plot(kl, color=COLORS["tiled"], label="DPO")
    right.axhline(goal, color=COLORS["accent"], linestyle="--", label="closed form")
    right.set(xlabel="steps of gradient descent", ylabel="KL from the reference (nats)")
    right.set_ylim(0, 1.35 * max(goal, float(kl.max())) + 1e-3)
    right.set_title(f"KL now {kl[-1]:.2f}, mean reward {path[-1].exp() @ REWARD:+.2f}")
    right.legend(loc="upper left", ncols=2)
    return figure


def pull(beta: float) -> Figure:
    """How hard a pair pulls, beta sigmoid(-margin), against how far apart its two log ratios are."""
    figure = Figure(figsize=(6.2, 2.8), layout="constrained")
    axes = figure.subplots()
    apart = torch.linspace(-60, 60, 241)
    axes.plot(apart, beta * torch.sigmoid(-beta * apart), color=COLORS["tiled"])
    axes.set(xlabel="log ratio of chosen minus that of rejected (nats)", ylabel="weight of the pair")
    axes.set_ylim(0, beta * 1.1)
    axes.axvline(0, color=COLORS["grey"], linewidth=1)
    axes.set_yticks([0, beta / 2, beta], ["0", "beta / 2", "beta"])
    axes.set_title(f"Pairs in the wrong order pull hardest (beta = {beta:g})")
    return figure
