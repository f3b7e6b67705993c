"""Drawings of distributed/zero."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from minillm.distributed.budget import STAGES, break_even, sending_share, zero_bytes, zero_sent
from minillm.distributed.measure_zero import Run
from minillm.distributed.pipeline import Op, slots
from minillm.study.notebook import COLORS

PARTS = {"weights": COLORS["tiled"], "gradients": COLORS["accent"], "masters and moments": COLORS["naive"]}


def ring(states: Sequence[Tensor]) -> Figure:
    """What each rank holds of each chunk, one panel for the start and one for each message; finished sums are dark."""
    world = len(states[0])
    whole = int(states[-1].max())
    figure = Figure(figsize=(1.75 * len(states), 2.3), layout="constrained")
    for i, (axes, state) in enumerate(zip(figure.subplots(1, len(states), squeeze=False)[0], states, strict=True)):
        values = state.view(world, world, -1)[:, :, 0]
        axes.imshow(_added(values), cmap="Blues", vmin=0, vmax=world * 1.15)
        for rank, row in enumerate(values.tolist()):
            for chunk, value in enumerate(row):
                color = "white" if int(value) == whole else "black"
                axes.text(chunk, rank, f"{int(value)}", ha="center", va="center", fontsize=9, color=color)
        half = "reduce-scatter" if i < world else "all-gather"
        axes.set_title("start" if i == 0 else f"message {i}\n{half}", fontsize=10)
        axes.set_xticks(range(world))
        axes.set_yticks(range(world))
        axes.tick_params(length=0)
        axes.set_xlabel("chunk")
    figure.axes[0].set_ylabel("rank")
    return figure


def _added(values: Tensor) -> list[list[int]]:
    """How many ranks' numbers are in each sum of 1, 10, 100 ..."""
    return [[str(int(value)).count("1") for value in row] for row in values.tolist()]


def stages(runs: dict[int, Run], world: int) -> Figure:
    """Measured bytes held and numbers sent, for each stage, a parameter; a line across each bar is the formula."""
    figure = Figure(figsize=(8.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    for place, run in runs.items():
        bottom = 0.0
        for (name, color), size in zip(PARTS.items(), run.held.values(), strict=True):
            left.bar(place, size / run.size, 0.6, bottom, color=color, label=name if place == 0 else None)
            bottom += size / run.size
        formula = sum(zero_bytes(place, 1.0, world))
        left.hlines(formula, place - 0.42, place + 0.42, color="black", linewidth=1.5)
        left.text(place, formula + 0.3, f"{bottom:.1f}", ha="center", va="bottom")
        sent = run.sent / 2 / run.size
        right.bar(place, sent, 0.6, color=COLORS["sdpa"])
        right.hlines(zero_sent(place, 1.0, world), place - 0.42, place + 0.42, color="black", linewidth=1.5)
        right.text(place, sent + 0.04, f"{sent:.2f}", ha="center", va="bottom")
    for axes in (left, right):
        axes.set_xticks(range(4), STAGES)
    left.set(ylabel="bytes a parameter", title=f"Measured: held by each of {world} ranks", ylim=(0, 18.5))
    right.set(ylabel="numbers a parameter", title="Measured: sent in a step", ylim=(0, 2.4))
    left.hlines([], 0, 0, color="black", linewidth=1.5, label="formula")
    left.legend(loc="upper right", fontsize=9)
    return figure


def timetables(orders: dict[str, list[list[Op]]]) -> Figure:
    """Schedules of a pipeline, slot by slot: blue forward, orange backward, the number is the micro-batch."""
    figure = Figure(figsize=(8.8, 1.75 * len(orders) + 0.3), layout="constrained")
    for axes, (name, order) in zip(figure.subplots(len(orders), 1, squeeze=False)[:, 0], orders.items(), strict=True):
        for time, slot in enumerate(slots(order)):
            for op in slot:
                color = COLORS["tiled"] if op.kind == "forward" else COLORS["accent"]
                axes.barh(op.stage, 1, left=time, height=0.86, color=color, edgecolor="white", linewidth=0.8)
                axes.text(time + 0.5, op.stage, str(op.micro), ha="center", va="center", fontsize=8, color="white")
        axes.set_yticks(range(len(order)))
        axes.invert_yaxis()
        axes.set(ylabel="stage", title=f"{name}: blue forward, orange backward, white idle")
        axes.set_xlim(0, len(slots(order)))
        axes.set_xticks(range(0, len(slots(order)) + 1, 2))
    figure.axes[-1].set_xlabel("slot")
    return figure


def sending(flops: float, links: dict[str, float]) -> Figure:
    """The share of a step that goes to sending against the tokens of a rank, if nothing overlaps."""
    figure = Figure(figsize=(7.4, 3.3), layout="constrained")
    axes = figure.subplots()
    tokens = [2.0**i for i in range(8, 19)]
    for (name, bandwidth), color in zip(links.items(), (COLORS["naive"], COLORS["tiled"]), strict=True):
        for stage, dashes in ((3, "-"), (1, "--")):
            share = [100 * sending_share(stage, t, flops, bandwidth) for t in tokens]
            label = f"{name}, {'ZeRO-3' if stage == 3 else 'DDP, ZeRO-1, ZeRO-2'}"
            axes.plot(tokens, share, dashes, color=color, label=label)
            axes.plot([break_even(stage, flops, bandwidth)], [50], "o", color=color)
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(8, 19, 2)]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="tokens a rank and step", ylabel="share of time spent sending (%)", ylim=(0, 100))
    axes.set_title(f"Calculated: {flops / 1e12:.0f} TFLOP/s a rank, nothing overlaps")
    axes.legend(loc="upper right", fontsize=9)
    return figure


def bars(billions: float = 7.5, ranks: int = 64, card: int = 80) -> tuple[Figure, str]:
    """Gigabytes of weights, gradients and states on a rank, by stage, beside a card of so many."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    axes = figure.subplots()
    totals = []
    for stage in range(4):
        left = 0.0
        parts = [size / 1e9 for size in zero_bytes(stage, billions * 1e9, ranks)]
        for (name, color), size in zip(PARTS.items(), parts, strict=True):
            axes.barh(STAGES[stage], size, 0.6, left, color=color, label=name if stage == 0 else None)
            left += size
        totals.append(left)
        sent = 2 * zero_sent(stage, billions, ranks)
        text = axes.text(left, stage, f"{left:,.1f} GB held, {sent:,.1f} GB sent", va="center", fontsize=10)
        text.set(zorder=3, x=left + 0.015 * 1.5 * max(16 * billions, card))
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85})
    axes.axvline(card, color=COLORS["grey"], linestyle="--", linewidth=1.5, zorder=2)
    side = "right" if card > 0.2 * max(16 * billions, card) else "left"  # inside the axes
    axes.text(card, -0.5, f" card of {card} GB ", ha=side, va="center", fontsize=9, color=COLORS["grey"])
    axes.set_xlim(0, 1.5 * max(*totals, card))
    axes.set_ylim(3.5, -0.75)
    axes.set_xlabel("GB on each rank, without activations")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    fits = [name for name, total in zip(STAGES, totals, strict=True) if total < card]
    caption = (
        f"{billions:g} B parameters on {ranks} ranks: "
        + " / ".join(f"{total:,.1f}" for total in totals)
        + f" GB for DDP / ZeRO-1 / 2 / 3. States fit with {', '.join(fits) or 'none'}; activations come on top."
    )
    return figure, caption
