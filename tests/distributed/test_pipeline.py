"""Pipelines: schedules as data, and on real processes; gradients, idle slots, activations alive, PyTorch's own."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from minillm.distributed.pipeline import (
    Op,
    Span,
    Stage,
    gpipe,
    idle_share,
    idle_time,
    most_alive,
    needs,
    one_f_one_b,
    plan,
    slots,
    spread,
)
from minillm.training.objective import next_token_loss
from pipeline_runs import LAYERS, MICROS, ROWS, SCHEDULES, WIDTH, T, batches, gradients, results, transformer

STAGES = (2, 3)
SIZES = [(p, m) for p in range(1, 6) for m in (1, 2, 3, 4, 7)]

on_processes = pytest.mark.parametrize(
    ("name", "p", "m"), [(n, p, m) for n in SCHEDULES for p in STAGES for m in MICROS]
)
scheduled = pytest.mark.parametrize("name", SCHEDULES)


def letters(order):
    """F0 B0 ..."""
    return " ".join(f"{op.kind[0].upper()}{op.micro}" for op in order)


# Schedules as data


def test_gpipe_by_hand():
    assert [letters(order) for order in plan(gpipe, 2, 3)] == ["F0 F1 F2 B0 B1 B2"] * 2


def test_one_forward_one_backward_by_hand():
    # the figure with 4 stages and 8 micro-batches in Narayanan et al. 2021
    assert [letters(order) for order in plan(one_f_one_b, 4, 8)] == [
        "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
        "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
    ]


@scheduled
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_every_pass_is_done_once_and_after_what_it_needs(name, p, m):
    timetable = slots(plan(SCHEDULES[name], p, m))
    when = {op: i for i, slot in enumerate(timetable) for op in slot}
    assert sorted(when) == sorted(Op(s, i, k) for s in range(p) for i in range(m) for k in ("forward", "backward"))
    assert sum(map(len, timetable)) == 2 * p * m, "none twice"
    for op, i in when.items():
        if op.kind == "forward" and op.stage > 0:
            assert when[op._replace(stage=op.stage - 1)] < i
        if op.kind == "backward":
            assert when[op._replace(kind="forward")] < i
            assert op.stage == p - 1 or when[op._replace(stage=op.stage + 1)] < i
    for slot in timetable:
        assert len({op.stage for op in slot}) == len(slot), "a stage does one thing at a time"


@scheduled
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_idle_slots_are_the_bubble_of_the_papers(name, p, m):
    timetable = slots(plan(SCHEDULES[name], p, m))
    assert idle_share(timetable, p) == pytest.approx(float(Fraction(p - 1, m + p - 1)), abs=1e-12)  # a float's rounding


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_micro_batches_alive(p, m):
    assert [most_alive(order) for order in plan(gpipe, p, m)] == [m] * p
    assert [most_alive(order) for order in plan(one_f_one_b, p, m)] == [min(m, p - stage) for stage in range(p)]


def test_what_a_pass_needs():
    assert needs(Op(0, 3, "forward"), 4) is None
    assert needs(Op(2, 3, "forward"), 4) == Op(1, 3, "forward")
    assert needs(Op(3, 3, "backward"), 4) == Op(3, 3, "forward")
    assert needs(Op(2, 3, "backward"), 4) == Op(3, 3, "backward")


@pytest.mark.parametrize(("layers", "p"), [(layers, p) for layers in range(1, 9) for p in range(1, layers + 1)])
def test_layers_are_spread_evenly(layers, p):
    found = spread(layers, p)
    assert [i for part in found for i in part] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


# On real processes


@on_processes
def test_loss_and_gradients_of_the_whole_model(name, p, m):
    model = transformer()
    loss = torch.stack([next_token_loss(model(ids), ids) for ids in batches(m)]).mean()
    loss.backward()
    ranks = [rank[name, m] for rank in results(p)]
    assert [rank["loss"] for rank in ranks] == [None] * (p - 1) + [pytest.approx(loss.item(), rel=1e-12)]
    found = {key: value for rank in ranks for key, value in rank["gradients"].items()}
    assert sum(len(rank["gradients"]) for rank in ranks) == len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():  # float64: micro-batches are added in another order
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-12, atol=1e-14, msg=key)


@on_processes
def test_what_was_executed_has_the_bubble_and_the_activations_of_the_papers(name, p, m):
    ranks = [rank[name, m] for rank in results(p)]
    orders = [[span.op for span in rank["timeline"]] for rank in ranks]
    assert orders == plan(SCHEDULES[name], p, m)
    assert idle_share(slots(orders), p) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    expected = [m] * p if name == "gpipe" else [min(m, p - stage) for stage in range(p)]
    assert [rank["most alive"] for rank in ranks] == expected


@on_processes
def test_a_stage_sends_the_stream_to_its_neighbours_and_nothing_else(name, p, m):
    message = ROWS * T * WIDTH * 8  # bytes in float64
    for stage, rank in enumerate(results(p)):
        neighbours = (stage > 0) + (stage < p - 1)
        assert rank[name, m]["sent"] == (neighbours * m * message, neighbours * m)


@pytest.mark.parametrize("p", STAGES)
def test_each_parameter_is_on_one_rank(p):
    total = sum(parameter.numel() for parameter in transformer().parameters())
    assert sum(rank["gpipe", 1]["parameters"] for rank in results(p)) == total


@scheduled
@pytest.mark.parametrize("p", STAGES)
def test_training_goes_the_same_way(name, p):
    model, expected = transformer(), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(4):
        loss = torch.stack([next_token_loss(model(ids), ids) for ids in batches(3, step)]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    found = results(p)[-1]["trained", name]
    assert found == pytest.approx(expected, rel=1e-9)  # Adam divides differences of 1e-16 by small sizes
    assert len(set(found)) == 4


# By the clock: what must come before what, not how long it takes


@scheduled
@pytest.mark.parametrize("p", STAGES)
def test_the_timeline_is_in_order(name, p):
    timelines = [rank["busy", name].timeline for rank in results(p)]
    assert [[span.op for span in timeline] for timeline in timelines] == plan(SCHEDULES[name], p, 4)
    spans = {span.op: span for timeline in timelines for span in timeline}
    for timeline in timelines:
        for one, following in pairwise(timeline):
            assert one.start < one.end <= following.start
    for op, span in spans.items():
        before = needs(op, p)
        assert before is None or spans[before].end <= span.start, "all ranks read one clock"
    assert 0 < idle_time(timelines) < 1


def test_idle_time_by_hand():
    op = Op(0, 0, "forward")
    assert idle_time([[Span(op, 10.0, 11.0)], [Span(op, 11.0, 12.0)]]) == 0.5
    assert idle_time([[Span(op, 1.0, 2.0), Span(op, 3.0, 5.0)]]) == 0.25


# PyTorch's own


@scheduled
@pytest.mark.parametrize("p", STAGES)
def test_the_same_as_pytorchs_schedule(name, p):
    for rank in results(p):
        ours, theirs = rank[name, 5], rank["torch", name]
        assert [span.op.kind for span in ours["timeline"]] == theirs["order"]
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for key, value in theirs["gradients"].items():
            torch.testing.assert_close(ours["gradients"][key], value, rtol=1e-12, atol=1e-14, msg=key)
        if ours["loss"] is not None:
            assert sum(theirs["losses"]) / 5 == pytest.approx(ours["loss"], rel=1e-12)


# Stages of a model, in this process, where shapes in signatures are checked


def test_stages_one_after_the_other_are_the_model():
    model, ids = transformer(), batches(1)[0]
    x = ids
    for stage in range(3):
        x = Stage(model, stage, 3)(x)
    torch.testing.assert_close(x, model(ids), rtol=0, atol=0)


def test_one_stage_is_the_model_even_with_a_tied_head():
    model, ids = transformer(tied=True), batches(1)[0]
    logits = Stage(model, 0, 1)(ids)
    next_token_loss(logits, ids).backward()
    assert torch.equal(logits, model(ids))
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


# Refusals


def test_refuses_a_tied_head():
    with pytest.raises(ValueError, match="embedding and head are on stages 0 and 1, got a tied one: choose tied=False"):
        Stage(transformer(tied=True), 0, 2)


def test_refuses_more_stages_than_layers():
    with pytest.raises(ValueError, match=f"every stage needs a layer, got {LAYERS} layers for 5 stages: use fewer"):
        Stage(transformer(), 0, 5)


@pytest.mark.parametrize(("p", "m"), [(0, 4), (4, 0)])
def test_refuses_an_empty_pipeline(p, m):
    with pytest.raises(ValueError, match=f"at least 1 stage and 1 micro-batch, got {p} and {m}: give more"):
        plan(gpipe, p, m)


def test_refuses_orders_that_wait_for_each_other():
    orders = plan(gpipe, 2, 1)
    orders[1].reverse()  # the backward pass before the forward pass
    with pytest.raises(ValueError, match=r"after 1 slots all stages wait for each other, next are .*: reorder them"):
        slots(orders)
