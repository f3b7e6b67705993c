"""Drawings of alignment/rlhf."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minillm.alignment.best_of_n import best_of_n, kl_bound
from minillm.alignment.kl import exact_kl
from minillm.alignment.preferences import optimum
from minillm.alignment.rlhf import Curve
from minillm.study.notebook import COLORS

REFERENCE = torch.tensor([0.10, 0.20, 0.29, 0.25, 0.15, 0.01], dtype=torch.float64).log()
GOLD = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, -2.0], dtype=torch.float64)  # the last one is the trick
NAMES = ["A", "B", "C", "D", "E", "trick"]
PROXY, TRUE = COLORS["naive"], COLORS["tiled"]


def proxy_of(flaw: float) -> Tensor:
    """The gold, except that the trick scores `flaw`."""
    return torch.cat([GOLD[:-1], GOLD.new_tensor([flaw])])


def bars(axes: Axes, policies: Mapping[str, Tensor]) -> None:
    """The probability of each response under several policies, side by side. Policies are log-probabilities."""
    width, colors = 0.8 / len(policies), [COLORS["grey"], COLORS["accent"], COLORS["sdpa"]]
    for i, ((name, log_p), color) in enumerate(zip(policies.items(), colors, strict=False)):
        place = torch.arange(len(log_p)) + (i - (len(policies) - 1) / 2) * width
        axes.bar(place, log_p.exp(), width * 0.92, color=color, label=name)
    axes.set_xticks(range(len(NAMES)), NAMES)
    axes.set(ylabel="probability", ylim=(0, 1.4 * float(torch.stack([*policies.values()]).exp().max())))
    axes.legend(loc="upper center", fontsize=10, ncols=len(policies))


def ascent(log_reference: Tensor, climbed: Tensor, closed: Tensor, values: Tensor, best: float) -> Figure:
    """Left: where gradient ascent ends, beside the closed form. Right: the objective on the way there."""
    figure = Figure(figsize=(8.8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    bars(left, {"reference": log_reference, "after ascent": climbed, "closed form": closed})
    left.set(xlabel="response", title="The same policy, computed and found")
    right.plot(values, color=COLORS["accent"])
    right.axhline(best, color=COLORS["grey"], linestyle="--", linewidth=1.2)
    right.text(len(values) - 1, best, "beta log Z", ha="right", va="bottom", fontsize=10)
    right.set(xlabel="steps of gradient ascent", ylabel="reward minus beta KL", title="The objective")
    right.set_ylim(float(values.min()) - 0.05, best + 0.2 * (best - float(values.min())))
    return figure


def by_length(facts: Sequence[int], proxy: Tensor, gold: Tensor, seen: int) -> Figure:
    """Mean proxy and gold of answers of random facts against their number; 95 % of the start's have at most `seen`."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    right.spines["right"].set_visible(True)
    left.axvspan(0, seen, color=COLORS["light"], zorder=0)
    left.text(
        seen / 2, 0.03, "95 % of what was compared", ha="center", fontsize=10, transform=left.get_xaxis_transform()
    )
    (one,) = left.plot(facts, proxy, color=PROXY, label="proxy: the reward model's score (left)")
    (two,) = right.plot(facts, gold, color=TRUE, label="gold: the true quality (right)")
    left.set(xlabel="facts in the answer, at random", ylabel="proxy (standard deviations)", xlim=(0, max(facts)))
    left.set_ylim(float(proxy.min()) - 0.8, 2.2 * float(proxy.max()))
    right.set(ylabel="gold", ylim=(float(gold.min()) - 1, 1.6 * float(gold.max())))
    left.set_title("Where nobody compared, the reward model still has an opinion")
    left.legend(handles=[one, two], loc="upper right", fontsize=10)
    return figure


def over_optimised(free: Curve, held: Curve, beta: float, best: Sequence[tuple[float, float, float]]) -> Figure:
    """Proxy and gold against the distance from the start; each dot the mean of four steps.

    `best` are KL bound, proxy and gold of best-of-n.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, place in zip(panels, ("proxy", "gold"), (1, 2), strict=True):
        for curve, color, label in (free, COLORS["naive"], "no KL term"), (held, COLORS["sdpa"], f"beta = {beta:g}"):
            line, kl = (x.unfold(0, 4, 1).mean(dim=1) for x in (getattr(curve, name), curve.kl))
            axes.plot(kl.clamp(min=0).sqrt(), line, color=color, marker=".", markersize=4, label=label)
        points = [p[0] ** 0.5 for p in best]
        axes.plot(points, [p[place] for p in best], color=COLORS["tiled"], marker="s", markersize=4, label="best of n")
        axes.axhline(float(getattr(free, name)[0]), color=COLORS["grey"], linewidth=1, linestyle="--")
        axes.set(xlabel="root of the KL from the start (root nats)", ylabel=name)
    panels[0].set_title("What is optimised: the reward model's score")
    panels[1].set_title("What was meant: the true quality")
    panels[1].legend(loc="lower left")
    return figure


def board(beta: float = 1.0, flaw: float = 2.0, n: int = 8) -> tuple[Figure, str]:
    """The best policy for a proxy that is wrong about one rare response, and best-of-n, exactly.

    Right: mean proxy and gold of the closed form as beta falls from large to small, and where beta and n stand on it.
    """
    proxy = proxy_of(flaw)
    policy, chosen = optimum(REFERENCE, proxy, beta=beta), best_of_n(REFERENCE, proxy, n)
    path = torch.stack([optimum(REFERENCE, proxy, beta=b) for b in torch.logspace(1.3, -1.3, 80).tolist()])
    kl = exact_kl(path, REFERENCE.expand_as(path))
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    bars(left, {"reference": REFERENCE, f"beta = {beta:g}": policy, f"best of {n}": chosen})
    left.set(xlabel="response, from good to bad")
    right.plot(kl, path.exp() @ proxy, color=PROXY, label="proxy")
    right.plot(kl, path.exp() @ GOLD, color=TRUE, label="gold")
    for log_p, marker in (policy, "o"), (chosen, "s"):
        away = exact_kl(log_p, REFERENCE)
        right.plot([away] * 2, [log_p.exp() @ proxy, log_p.exp() @ GOLD], marker, color=COLORS["accent"], zorder=3)
    right.set(xlabel="KL from the reference (nats)", ylabel="mean over responses", ylim=(-2.3, max(4.2, flaw + 0.2)))
    right.set_title("as beta falls; o: this beta, square: this n")
    right.legend(loc="upper left", ncols=2)
    kls = [exact_kl(p, REFERENCE).item() for p in (policy, chosen)]
    golds = [(p.exp() @ GOLD).item() for p in (policy, chosen)]
    caption = f"beta = {beta:g}: KL {kls[0]:.2f}, gold {golds[0]:+.2f}; best of {n}: KL {kls[1]:.2f}"
    return figure, f"{caption} (at most {kl_bound(n):.2f}), gold {golds[1]:+.2f}"
