"""ZeRO stages 1 and 2: the weights of one process and of PyTorch's own, a fraction of the memory, counted bytes."""

import math

import pytest
import torch
import torch.distributed as dist

from minillm.distributed.collectives import Traffic
from minillm.distributed.launch import process_group
from minillm.distributed.zero import Stage1, Stage2, cut, own_rows, storage_bytes
from zero_runs import ADAMW, CLIP, STEPS, TASKS, Spare, alone, perceptron, regression, results, tokens, vectors, weights

STAGES, WORLDS = (1, 2), (2, 3)
NORM = 4  # bytes of the float32 number that an all-reduce makes the norm of
LOSS = 8  # bytes of the loss and of its gradient, which exist during the backward pass

each = pytest.mark.parametrize(("world", "stage"), [(world, stage) for world in WORLDS for stage in STAGES])


def found(world, stage):
    """What each rank found for a stage."""
    return [rank[stage] for rank in results(STAGES, world)]


def assert_same(weights, expected):
    """float64: sums in another order differ by 1e-16, which Adam's division by a small size makes larger."""
    assert list(weights) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12, msg=name)


# The same weights


@each
@pytest.mark.parametrize("task", TASKS)
def test_five_steps_equal_one_process_with_the_whole_batch(task, world, stage):
    build, batch, loss, _ = TASKS[task]
    expected, norms = alone(build, batch, loss, CLIP)
    assert (norms[:2] > 1.1 * CLIP).all(), "nothing is clipped"
    assert max((expected[name] - value).abs().max() for name, value in build().named_parameters()) > 0.01
    for rank in found(world, stage):
        weights, norm = rank["weights"][task]
        assert_same(weights, expected)
        torch.testing.assert_close(norm, norms, rtol=1e-12, atol=0)


@each
@pytest.mark.parametrize("kind", ["ddp", "zero", "fsdp2"])
@pytest.mark.parametrize("task", ["transformer", "perceptron"])
def test_five_steps_equal_those_of_pytorch(task, kind, world, stage):
    for rank in results(STAGES, world):
        assert_same(rank[stage]["weights"][task][0], rank[task, kind])


@each
def test_without_clipping_too(world, stage):
    build, batch, loss, _ = TASKS["transformer"]
    expected, norms = alone(build, batch, loss, math.inf)
    for rank in found(world, stage):
        weights, norm = rank["unclipped"]
        assert_same(weights, expected)
        torch.testing.assert_close(norm, norms, rtol=1e-12, atol=0)


@each
def test_gradients_of_micro_batches_add_up(world, stage):
    build, batch, loss, _ = TASKS["transformer"]
    expected, _ = alone(build, batch, loss, CLIP)
    for rank in found(world, stage):
        assert_same(rank["accumulated"][0], expected)


@each
def test_a_parameter_that_no_rank_uses_has_a_gradient_of_zero(world, stage):
    torch.manual_seed(0)
    model = Spare()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(STEPS):
        regression(model, vectors(step)).backward()
        for parameter in model.spare.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    for rank in found(world, stage):
        assert_same(rank["unused"], {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("world", WORLDS)
def test_the_global_norm_by_hand(world):
    # the gradient of both weights is the input, 3 and 4: norm 5. On two ranks a shard is one of them.
    ranks = [rank["clipping"] for rank in results(STAGES, world)]
    assert [own.item() for own, _ in ranks] == pytest.approx([3, 4] if world == 2 else [3, 4, 0])
    assert [norm.item() for _, norm in ranks] == pytest.approx([5] * world)


# bfloat16 weights with float32 masters


@each
def test_masters_are_not_rounded_and_weights_are_the_masters_rounded(world, stage):
    for rank in found(world, stage):
        one = rank["bfloat16"]
        for name, exact in one["exact"].items():
            assert torch.equal(one["first masters"][name], exact)
            assert torch.equal(one["start"][name], exact.bfloat16().float())
            assert one["weights"][name].dtype == torch.bfloat16
            assert torch.equal(one["weights"][name], one["masters"][name].bfloat16())


@each
def test_masters_remember_steps_that_bfloat16_would_lose(world, stage):
    for rank in found(world, stage):
        one = rank["bfloat16"]
        before, after = one["first masters"]["norm"], one["masters"]["norm"]
        assert (before == 1).all()
        assert (after != 1).all()
        assert (after - 1).abs().max() <= STEPS * 1.001e-4  # a step of Adam is about lr, here 1e-4
        assert (one["weights"]["norm"] == 1).all()  # the next smaller bfloat16 is 0.996


@pytest.mark.parametrize("world", WORLDS)
def test_when_gradients_travel_does_not_matter(world):
    for one, two in zip(found(world, 1), found(world, 2), strict=True):
        for name, value in one["bfloat16"]["masters"].items():
            assert torch.equal(value, two["bfloat16"]["masters"][name])


# Bytes


@each
def test_bytes_held_are_those_of_the_paper(world, stage):
    for rank in found(world, stage):
        one = rank["bytes"]
        psi = one["size"]
        gradients = 2 * psi if stage == 1 else 2 * psi / world
        states = {"parameters": 2 * psi, "gradients": 0, "optimizer": 12 * psi / world}
        for moment in ("start", "after step"):
            assert one[moment] == states | {"alive": sum(states.values())}
        states["gradients"] = gradients
        assert one["after backward"] == states | {"alive": sum(states.values())}


@each
def test_the_peak_is_one_bucket_above(world, stage):
    for rank in found(world, stage):
        one = rank["bytes"]
        psi, layer = one["size"], one["layer"]
        without = 2 * psi + 12 * psi / world
        # the largest moment is a message with the bucket's gradient, flat, and the chunk that arrives
        if stage == 1:  # the first bucket, when all other gradients are still whole
            assert one["peak"] == without + 2 * (psi - layer) + 2 * layer + 2 * layer / world
        else:  # the last bucket, when the others' shards are there
            assert one["peak"] == without + 2 * (psi - layer) / world + 2 * layer + 2 * layer / world + LOSS


@each
def test_a_step_sends_as_much_as_plain_data_parallelism(world, stage):
    for rank in found(world, stage):
        one = rank["bytes"]
        share = (world - 1) / world
        assert one["plain"] == 2 * share * 2 * one["size"]
        assert one["sent"] - 2 * (world - 1) * NORM == one["plain"]
        assert one["sent forward"] == 0


@each
def test_only_stage_2_sends_with_every_micro_batch(world, stage):
    build = TASKS["transformer"][0]
    size = sum(p.numel() for p in build().parameters())
    for rank in found(world, stage):
        sent = rank["accumulated"][1]
        if stage == 1:
            assert sent == 0
        else:
            least = 2 * (world - 1) / world * size * 8  # two micro-batches in float64
            assert least <= sent <= 1.05 * least  # buckets are padded


@pytest.mark.parametrize("stage", [Stage1, Stage2])
def test_one_rank_alone_sends_nothing(stage, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    build, batch, loss, _ = TASKS["transformer"]
    expected, _ = alone(build, batch, loss, CLIP)
    with process_group("gloo", store=dist.HashStore()):
        model, traffic = build(), Traffic()
        zero = stage(cut(model, traffic, limit=500), **ADAMW, clip=CLIP)
        for step in range(STEPS):
            loss(model, own_rows(batch(step), traffic)).backward()
            zero.step()
    assert traffic.sent == 0
    assert_same(weights(model), expected)


def test_buckets_begin_with_the_last_parameters(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with process_group("gloo", store=dist.HashStore()):
        model = perceptron()
        # in float64, from the end: 8, 40, 40, 200, 40, 280 bytes; the first four are 288
        buckets = cut(model, Traffic(), limit=288)
        one = cut(perceptron(), Traffic())
    in_order = list(model.parameters())
    assert [len(b.parameters) for b in buckets] == [4, 2]
    assert [id(p) for b in buckets for p in b.parameters] == [id(p) for p in in_order[::-1]]
    assert [len(b.parameters) for b in one] == [6]  # 25 MiB hold all


def test_views_of_the_same_memory_count_once():
    x = torch.zeros(10)
    assert storage_bytes([x, x[2:], x.view(2, 5)], set()) == 40
    assert storage_bytes([x[2:3], torch.zeros(3)], set()) == 40 + 12


# Refusals


def refusals(world=3):
    (said, *others) = [rank["refusals"] for rank in results(STAGES, world)]
    assert others == [said] * (world - 1)
    return said


def test_refuses_a_batch_that_does_not_divide():
    assert refusals()["rows"] == "the batch must divide by the 3 ranks, got 7 rows: add or drop some"


def test_refuses_frozen_parameters():
    assert refusals()["frozen"] == (
        "every parameter must require a gradient, got a frozen one: leave it out of the model"
    )


def test_the_models_of_these_tests_are_uneven():
    sizes = {p.numel() for p in perceptron().parameters()}
    assert any(size % 2 for size in sizes)
    assert any(size % 3 for size in sizes)
    assert len(tokens(0)) % 6 == 0
