"""Drawings of alignment/grpo."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.alignment import spo
from minillm.alignment.baselines import Makeup, follow, silent
from minillm.alignment.grpo import (
    centred_advantages,
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
)
from minillm.alignment.learn import Step
from minillm.alignment.length_bias import Loss
from minillm.study.notebook import COLORS

METHODS = {"GRPO": COLORS["tiled"], "SPO": COLORS["sdpa"]}
LOSSES = {"GRPO": COLORS["tiled"], "DAPO": COLORS["triton"], "Dr. GRPO": COLORS["accent"]}
TRACKERS = {"always 0.96": COLORS["naive"], "always 0.875": COLORS["accent"], "by movement": COLORS["sdpa"]}
RIGHT, WRONG = COLORS["sdpa"], COLORS["naive"]
LIMIT = 64  # the most tokens of a response in the sandbox
SINGLE = [(1.0, 0.5), (1.0, 1.25), (1.0, 1.5), (-1.0, 0.5), (-1.0, 1.5)]  # advantage and ratio of a single token


def dr_grpo(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Dr. GRPO with the width of the batch as its limit."""
    return dr_grpo_loss(log_probs, old, advantages, mask, limit=mask.shape[1])


VARIANTS: dict[str, Loss] = {
    "GRPO": grpo_loss,
    "DAPO": dapo_loss,
    "Dr. GRPO": dr_grpo,
    "GSPO": gspo_loss,
    "CISPO": cispo_loss,
}
VISITS, PROMPTS = 150, 200  # of the tracker's sandbox


def groups(g: int = 8) -> Figure:
    """How hard a group pulls by its number of right responses, and how often a group says nothing."""
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rewards = (torch.arange(g) < torch.arange(g + 1)[:, None]).float()  # row k: the first k are right
    for i, (advantages, color, label) in enumerate(
        (
            (group_advantages, COLORS["tiled"], "divided (GRPO)"),
            (centred_advantages, COLORS["accent"], "not divided (Dr. GRPO)"),
        )
    ):
        total = advantages(rewards).abs().sum(dim=1)
        left.bar(torch.arange(g + 1) + (i - 0.5) * 0.38, total / total[g // 2], 0.36, color=color, label=label)
    left.set(xlabel=f"right responses among {g}", ylabel="sum of |A|, 1 in the middle", ylim=(0, 1.45))
    left.set_xticks(range(g + 1))
    left.set_title("The deviation lifts hard and easy prompts")
    left.legend(loc="upper center", fontsize=10)
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for size, style in ((4, "-"), (8, "--"), (16, ":")):
        right.plot(p, 100 * silent(p, size), style, color=COLORS["grey"], label=f"G = {size}")
    right.set(xlabel="share of responses that are right", ylabel="groups that say nothing (%)", ylim=(0, 100))
    right.set_title("All right or all wrong: no gradient")
    right.legend(loc="upper center")
    return figure


def race(lengths: Mapping[str, Tensor]) -> Figure:
    """Mean lengths of wrong and of right responses over the steps, a line a loss. Lengths are [steps 2]."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    for i, (axes, kind) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("wrong", "right"), strict=True)):
        for name, several in lengths.items():
            axes.plot(several[:, i], color=LOSSES[name], label=name)
        axes.set(xlabel="steps", ylim=(0, 28))
        axes.set_title(f"{kind} responses")
        if i == 0:
            axes.set_ylabel("mean length (tokens)")
            axes.legend(loc="upper left")
    return figure


def makeups(steps: Sequence[int], several: Sequence[Makeup]) -> Figure:
    """Shares of groups over the training."""
    figure = Figure(figsize=(6.8, 3.0), layout="constrained")
    axes = figure.subplots()
    shares = 100 * torch.tensor(several).T
    names = ("all wrong", "mixed: these teach", "all right")
    axes.stackplot(steps, *shares, labels=names, colors=[WRONG, COLORS["tiled"], RIGHT], alpha=0.75)
    axes.set(xlabel="step of GRPO", ylabel="groups of 4 (%)", ylim=(0, 100), xlim=(steps[0], steps[-1]))
    axes.set_title("Measured: most groups say nothing, first and last")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def squares(names: Sequence[str], values: Sequence[float]) -> Figure:
    """Mean squares of advantages, a bar a baseline."""
    figure = Figure(figsize=(6.8, 2.5), layout="constrained")
    axes = figure.subplots()
    colors = [COLORS["grey"], COLORS["naive"], COLORS["sdpa"], COLORS["light"]]
    axes.barh(range(len(names)), values, color=colors)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="mean square of reward - baseline")
    axes.set_title("Measured: 512 prompts of the start policy")
    return figure


def follow_axes(axes: Axes, truth: Tensor, means: Mapping[str, Tensor]) -> None:
    """Truth and trackers over a prompt's visits: mean over prompts, and a standard deviation to both sides."""
    axes.plot(truth, color="black", linewidth=1.2, label="truth")
    for name, mean in means.items():
        middle, spread = mean.mean(dim=1), mean.std(dim=1)
        axes.plot(middle, color=TRACKERS[name], label=name)
        axes.fill_between(
            range(len(mean)), middle - spread, middle + spread, color=TRACKERS[name], alpha=0.15, linewidth=0
        )
    axes.set(xlabel="visits of the prompt", ylabel="share of right responses", ylim=(0, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def learnt(
    runs: Mapping[str, Sequence[Step]], start: float, solved: Mapping[str, Sequence[float]], ks: Sequence[int]
) -> Figure:
    """What each step of the runs saw, the accuracy from `start` on, and pass@k before and after."""
    figure = Figure(figsize=(9.2, 5.0), layout="constrained")
    axes = figure.subplots(2, 3)
    for name, steps in runs.items():
        color = METHODS[name]
        due = [step for step in steps if step.accuracy is not None]
        accuracies = [100 * start, *(100 * step.accuracy for step in due if step.accuracy is not None)]
        axes[0, 0].plot([0, *(step.step for step in due)], accuracies, "o-", markersize=4, color=color, label=name)
        lines = (
            [step.entropy for step in steps],
            [step.kl for step in steps],
            [100 * step.clipped for step in steps],
            [step.length for step in steps],
        )
        for place, line in zip((axes[0, 1], axes[0, 2], axes[1, 0], axes[1, 1]), lines, strict=True):
            place.plot(range(1, len(steps) + 1), line, color=color, linewidth=1.3)
    texts = [
        "held-out accuracy (%)",
        "entropy (nats/token)",
        "KL to start (nats/token)",
        "clipped tokens (%)",
        "length (tokens)",
    ]
    for place, text in zip(axes.flat, texts, strict=False):
        place.set(xlabel="step", ylabel=text)
        place.set_ylim(bottom=0)
        place.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylim(0, 100)
    axes[0, 0].legend(loc="lower right")
    for name, values in solved.items():
        color = METHODS.get(name, COLORS["grey"])
        axes[1, 2].plot(ks, [100 * v for v in values], "o-", markersize=4, color=color, label=name)
    axes[1, 2].set_xscale("log", base=2)
    axes[1, 2].set_xticks(ks, [str(k) for k in ks])
    axes[1, 2].minorticks_off()
    axes[1, 2].set(xlabel="samples k", ylabel="pass@k (%)", ylim=(0, 100))
    axes[1, 2].legend(loc="lower right")
    return figure


def token_pulls(advantages: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Minus the gradient at the first token of each response, by loss, 1 being the mean over all tokens of the group.

    `advantages` are [2 b]: GRPO's and those without the deviation, which go with Dr. GRPO.
    """
    mask = torch.arange(LIMIT) < lengths[:, None]
    old, pulls = torch.zeros(mask.shape), {}
    for name, gains in (("GRPO", advantages[0]), ("DAPO", advantages[0]), ("Dr. GRPO", advantages[1])):
        policy = old.clone().requires_grad_()
        gradient = torch.autograd.grad(VARIANTS[name](policy, old, gains, mask), policy)[0]
        size = gradient[mask].abs().mean().clamp(min=1e-12)
        pulls[name] = -gradient[:, 0] / size
    return pulls


def sandbox(
    g: int = 8, right: int = 2, std: bool = True, right_tokens: int = 10, wrong_tokens: int = 40
) -> tuple[Figure, str]:
    """A group: its advantages, and how hard a token of a right and of a wrong response is pulled."""
    right = min(right, g)
    rewards = (torch.arange(g) < right).float()[None]
    both = torch.stack([group_advantages(rewards)[0], centred_advantages(rewards)[0]])
    shown = both[0] if std else both[1]
    figure = Figure(figsize=(8.8, 3.3), layout="constrained")
    left, axes = figure.subplots(1, 2)
    left.bar(range(1, g + 1), shown, color=[RIGHT] * right + [WRONG] * (g - right))
    left.axhline(0, color=COLORS["grey"], linewidth=1)
    left.set(xlabel=f"response (the first {right} are right)", ylabel="advantage", ylim=(-3.2, 3.2))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("(reward - mean) / std" if std else "reward - mean")
    caption = "All rewards are equal: no advantage, no gradient, whatever the loss."
    if 0 < right < g:
        lengths = torch.where(rewards[0] == 1, right_tokens, wrong_tokens)
        pulls = token_pulls(both, lengths)
        place = torch.arange(len(pulls))
        for i, (kind, color) in enumerate((("right", RIGHT), ("wrong", WRONG))):
            values = [p[0 if kind == "right" else -1].item() for p in pulls.values()]
            tokens = right_tokens if kind == "right" else wrong_tokens
            axes.bar(place + (i - 0.5) * 0.38, values, 0.36, color=color, label=f"{kind}, {tokens} tokens")
        axes.set_xticks(place, list(pulls))
        ratio = (pulls["GRPO"][0] / pulls["DAPO"][0]) / (pulls["GRPO"][-1] / pulls["DAPO"][-1])
        caption = (
            f"The advantages sum to 0. A token of a right response, compared with one of a wrong response, weighs "
            f"{ratio:.2g} times as much in GRPO as in DAPO."
        )
        axes.legend(loc="upper right", fontsize=10)
        top = max(float(p.abs().max()) for p in pulls.values())
        low = min(float(p.min()) for p in pulls.values())
        axes.set_ylim(1.3 * low, 1.5 * top)
    else:
        axes.text(0.5, 0.5, "no gradient", ha="center", va="center", transform=axes.transAxes, fontsize=13)
        axes.set_xticks([])
        axes.set_yticks([])
    axes.axhline(0, color=COLORS["grey"], linewidth=1)
    axes.set(ylabel="pull on a token (mean size 1)")
    axes.set_title("what the loss divides by")
    return figure, caption


def errors(truth: Tensor, mean: Tensor) -> float:
    """Root mean square of tracker - truth, of all visits and prompts."""
    return (mean - truth[:, None]).square().mean().sqrt().item()


def off(truth: Tensor, means: Mapping[str, Tensor], visits: slice) -> dict[str, float]:
    """The errors of several trackers over some visits."""
    return {name: errors(truth[visits], mean[visits]) for name, mean in means.items()}


def trackers(before: float, after: float, over: int, moved: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The success rate of 200 equal prompts, which changes from visit 50 on over so many visits, and what trackers say.

    Only while it changes does the policy move, by `moved` nats a token from visit to visit.
    """
    truth = torch.full((VISITS,), after)
    truth[:50] = before
    truth[50 : 50 + over] = torch.linspace(before, after, over + 1)[1:]
    movement = torch.zeros(VISITS)
    movement[50 : 50 + over] = moved
    constant = {f"always {factor:g}": torch.full((VISITS,), factor) for factor in (spo.MOST, spo.LEAST)}
    size = 1 / (1 - spo.LEAST)
    good = torch.full((PROMPTS,), before * size)
    start, wide = spo.Tracker(good, size - good), truth[:, None].expand(-1, PROMPTS)
    means = {
        name: follow(wide, rho, start, generator=torch.Generator().manual_seed(0))
        for name, rho in (constant | {"by movement": spo.forgetting(movement)}).items()
    }
    return truth, means


def watched(before: float = 0.2, after: float = 0.8, over: int = 1, moved: float = 0.06) -> tuple[Figure, str]:
    """The trackers of `trackers`, and how far they are off."""
    truth, means = trackers(before, after, over, moved)
    figure = Figure(figsize=(8.0, 3.3), layout="constrained")
    follow_axes(figure.subplots(), truth, means)
    texts = ", ".join(f"{name} {error:.3f}" for name, error in off(truth, means, slice(None)).items())
    factor = spo.forgetting(torch.tensor([moved])).item()
    return (
        figure,
        f"Error (root mean square): {texts}. While the policy moves, old counts are multiplied by {factor:.3f}.",
    )


def first_pull(loss: Loss, ratios: list[float], advantage: float) -> float:
    """Minus the gradient of a single response's first token."""
    policy = torch.tensor([ratios]).log().requires_grad_()
    out = loss(policy, torch.zeros_like(policy), torch.tensor([advantage]), torch.ones_like(policy, dtype=torch.bool))
    return -torch.autograd.grad(out, policy)[0][0, 0].item()


def weight(loss: Loss) -> float:
    """The pull on a response of one token over that on each of four, in one batch."""
    policy, mask = torch.zeros(2, 4, requires_grad=True), torch.arange(4) < torch.tensor([[1], [4]])
    loss(policy, policy.detach(), torch.ones(2), mask).backward()
    assert policy.grad is not None
    return (policy.grad[0, 0] / policy.grad[1, 0]).item()


def gradients() -> dict[str, list[float]]:
    """For each loss the pull on a token: SINGLE, then the first of ratios 2 and 1/2 (times two), then `weight`."""
    rows = {}
    for name, loss in VARIANTS.items():
        single = [first_pull(loss, [ratio], advantage) for advantage, ratio in SINGLE]
        rows[name] = [*single, 2 * first_pull(loss, [2.0, 0.5], 1.0), weight(loss)]
    return rows


def table(rows: Mapping[str, Sequence[float]]) -> str:
    """The gradients as text."""
    heads = [f"A{a:+.0f} r{r:g}" for a, r in SINGLE] + ["2, 1/2", "1 : 4"]
    lines = [" " * 9 + "".join(f"{head:>10}" for head in heads)]
    lines += [f"{name:9}" + "".join(f"{x + 0.0:10.2f}" for x in row) for name, row in rows.items()]
    return "\n".join(lines)
