"""Tensor parallelism: layers, loss and gradients of the whole model, the bytes they send, and PyTorch's own."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minillm.architecture.feedforward import swiglu_fused
from minillm.distributed.collectives import Traffic
from minillm.distributed.tensor import split_cross_entropy
from minillm.training.objective import IGNORE
from tensor_runs import (
    HIDDEN,
    B,
    C,
    T,
    V,
    drawn,
    linear_weights,
    logits,
    passes,
    results,
    some_targets,
    token_ids,
    trained_whole,
    transformer,
    work,
)

WORLDS = (2, 3)
each = pytest.mark.parametrize("world", WORLDS)


class Silent:
    """For the unsplit layer: nothing is sent."""

    sent = messages = 0


def close(found, expected):
    """float64: sums in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def together(parts, dim, stacked=1):
    """The whole of what is cut: the inverse of `own_part`, written apart from it."""
    pieces = [part.chunk(stacked, dim) for part in parts]
    return torch.cat([torch.cat(matrix, dim) for matrix in zip(*pieces, strict=True)], dim)


def one_all_reduce_each(rank, found):
    """Forward and backward send what one all-reduce of the stream does, counted on one; and that is 2 (N-1)/N of it."""
    assert found[2] == [rank["all-reduce"]] * 2


@each
def test_an_all_reduce_sends_nearly_twice_the_stream(world):
    stream = B * T * C * 8  # bytes in float64
    for rank in results(world):
        padding = -(-B * T * C // world) * world * 8 - stream  # zeros that fill the last chunk
        assert rank["all-reduce"][0] == 2 * (world - 1) * (stream + padding) // world


@each
def test_column_and_row_parallel_linear_layers(world):
    def whole(x, up, up_bias, down, down_bias):
        return F.linear(torch.tanh(F.linear(x, up, up_bias)), down, down_bias)

    out, (x, up, up_bias, down, down_bias), _ = passes(whole, [drawn(B, T, C), *linear_weights()], Silent)
    ranks = [rank["linear pair"] for rank in results(world)]
    for rank, found in zip(results(world), ranks, strict=True):
        close(found[0], out)
        close(found[1][0], x)
        close(found[1][4], down_bias)
        one_all_reduce_each(rank, found)
    close(together([found[1][1] for found in ranks], 0), up)
    close(together([found[1][2] for found in ranks], 0), up_bias)
    close(together([found[1][3] for found in ranks], 1), down)


@each
def test_the_same_as_pytorchs_own_rank_by_rank(world):
    for rank in results(world):
        out, gradients, counts = rank["by torch"]
        close(rank["linear pair"][0], out)
        for found, expected in zip(rank["linear pair"][1], gradients, strict=True):
            close(found, expected)
        assert counts == (1, 1), "one all-reduce forward and one backward"


@each
def test_the_feedforward_layer(world):
    block = transformer().blocks[0]
    out, (x, gate_up, down), _ = passes(swiglu_fused, [drawn(B, T, C), block.gate_up, block.down], Silent)
    ranks = [rank["feedforward"] for rank in results(world)]
    for rank, found in zip(results(world), ranks, strict=True):
        assert found[1][1].shape == (2 * HIDDEN // world, C)
        close(found[0], out)
        close(found[1][0], x)
        one_all_reduce_each(rank, found)
    close(together([found[1][1] for found in ranks], 0, stacked=2), gate_up)
    close(together([found[1][2] for found in ranks], 1), down)


@each
def test_attention_by_heads(world):
    model = transformer()
    block = model.blocks[0]
    cos, sin = model.cos[:T].double(), model.sin[:T].double()
    out, (x,), _ = passes(lambda x: block.attention(x, cos, sin, None, None), [drawn(B, T, C)], Silent)
    ranks = [rank["attention"] for rank in results(world)]
    for rank, found in zip(results(world), ranks, strict=True):
        close(found[0], out)
        close(found[1][0], x)
        one_all_reduce_each(rank, found)
    close(whole_qkv([found[3]["qkv"] for found in ranks]), block.qkv.grad)
    close(together([found[3]["out"] for found in ranks], 1), block.out.grad)


def whole_qkv(parts):
    """Heads of queries, keys and values of all ranks: 12, 6 and 6 of size 4."""
    world = len(parts)
    cut = [part.split([48 // world, 24 // world, 24 // world]) for part in parts]
    return torch.cat([torch.cat(matrix) for matrix in zip(*cut, strict=True)])


# The vocabulary


@each
def test_the_embedding(world):
    table, ids = transformer().embedding, token_ids()
    out, (gradient,), _ = passes(lambda table: F.embedding(ids, table), [table], Silent)
    ranks = [rank["embedding"] for rank in results(world)]
    for found in ranks:
        assert torch.equal(found[0], out)
        assert found[2][1] == (0, 0), "nothing to send backward"
    close(together([found[1][0] for found in ranks], 0), gradient)


@each
@pytest.mark.parametrize("scale", [1, 1000])
def test_the_loss_from_cut_logits(world, scale):
    def whole(x):
        return F.cross_entropy(x, some_targets(), ignore_index=IGNORE)

    out, (gradient,), _ = passes(whole, [logits(scale)], Silent)  # at 1000, exp without the maximum is infinite
    ranks = [rank["loss"][scale] for rank in results(world)]
    for found in ranks:
        close(found[0], out)
        assert found[2][1] == (0, 0), "softmax minus one-hot needs nobody else"
    close(together([found[1][0] for found in ranks], 1), gradient)


@each
def test_the_loss_sends_a_few_numbers_a_token_whatever_the_vocabulary(world):
    for rank in results(world):
        small, large, gathered = rank["bytes"]
        maximum, sums = 30 * 4 * (world - 1), 2 * 2 * 30 * 4 * (world - 1) // world  # gathered; two, in float32
        assert small == large == maximum + sums
        assert gathered == 30 * 4 * 6000 * (world - 1) // world
        assert gathered > 500 * large


# The whole model


@each
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_all_gradients_of_the_whole_model(world, tied):
    model, ids = transformer(tied=tied), token_ids()
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    ranks = [rank["model"][tied] for rank in results(world)]
    for found in ranks:
        close(found[0], loss.detach())
        assert found[1].keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        parts = [found[1][name] for found in ranks]
        if name.endswith("norm"):
            for part in parts:
                close(part, parameter.grad)
        elif name.endswith("qkv"):
            close(whole_qkv(parts), parameter.grad)
        else:
            cut_by_columns = name.endswith(("out", "down"))
            close(together(parts, int(cut_by_columns), 2 if name.endswith("gate_up") else 1), parameter.grad)


@each
def test_a_rank_holds_its_part_of_every_matrix(world):
    norms = 5 * C  # two a block and the last one, whole on each
    total = sum(p.numel() for p in transformer().parameters())
    for rank in results(world):
        assert sum(g.numel() for g in rank["model"][True][1].values()) == (total - norms) // world + norms


@each
def test_a_block_costs_two_all_reduces_each_way(world):
    for rank in results(world):
        one, (forward, backward) = rank["all-reduce"][0], rank["model"][True][2]
        tokens = B * T
        loss = tokens * 8 * (world - 1) + padded_share(2 * tokens, world)
        assert forward == 2 * 2 * one + one + loss, "two blocks, the embedding, the loss"
        assert backward == 2 * 2 * one + one, "two blocks, the head"


@each
def test_the_count_is_that_of_the_model(world):
    for rank in results(world):
        parameters, forward, backward = rank["count"]
        assert parameters == sum(gradient.numel() for gradient in rank["model"][True][1].values())
        assert (2 * forward, 2 * backward) == rank["model"][True][2], "half of float64"


def padded_share(numbers, world):
    """Bytes of a ring all-reduce of so many float64 numbers, filled up to a multiple of the ranks."""
    return 2 * (world - 1) * -(-numbers // world) * 8


@each
def test_training_goes_the_same_way(world):
    expected = trained_whole()
    assert len(set(expected)) == 5
    for rank in results(world):
        assert rank["trained"] == pytest.approx(expected, rel=1e-9)  # Adam divides differences of 1e-16 by small sizes


# Refusals


@each
def test_refuses_what_does_not_divide(world):
    for rank in results(world):
        said = rank["refusals"]
        assert said["heads"] == f"heads must divide by the number of ranks, got 7 for {world}: choose another number"
        assert said["kv_heads"].startswith(f"kv_heads must divide by the number of ranks, got 1 for {world}:")
        assert said["hidden"].startswith(f"hidden must divide by the number of ranks, got 13 for {world}:")
        assert said["vocabulary"].startswith(f"vocabulary must divide by the number of ranks, got 19 for {world}:")
        assert said["weight"].startswith(
            f"the width of dimension 0 must divide by the number of ranks, got 7 for {world}"
        )


@each
def test_refuses_experts_and_norms_of_heads(world):
    for rank in results(world):
        assert rank["refusals"]["experts"] == "a split block must have no experts, got 2: choose experts=0"
        assert rank["refusals"]["qk_norm"] == "a split block must have no qk_norm, got True: choose qk_norm=False"


# One rank, in this process, where shapes in signatures are checked


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_rank_is_the_whole_model_and_sends_nothing():
    found = work(torch_too=False)
    assert found["trained"] == pytest.approx(trained_whole(), rel=1e-9)
    assert found["model"][True][2] == (0, 0)
    assert found["refusals"]["heads"] is None


@pytest.mark.usefixtures("alone")
def test_bfloat16_logits_have_a_loss_in_float32():
    given = logits(1).bfloat16()
    found = split_cross_entropy(given, some_targets(), Traffic())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(given.float(), some_targets(), ignore_index=IGNORE))


@pytest.mark.usefixtures("alone")
def test_no_target_is_a_loss_of_zero():
    given = torch.zeros(2, V, requires_grad=True)
    split_cross_entropy(given, torch.full((2,), IGNORE), Traffic()).backward()
    assert (given.grad == 0).all()
