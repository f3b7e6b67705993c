"""Ring collectives: equal to torch.distributed's on all sizes and types, and the bytes they send."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

from minillm.distributed.collectives import (
    Traffic,
    chunks,
    padded,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
)
from minillm.distributed.launch import launch, own_device

WORLDS = [1, 2, 3, 4]
SHAPES = [(), (0,), (1,), (5,), (12,), (7, 3), (2, 3, 4), (24, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


def values(shape, dtype, rank):
    """Different on every rank: whole numbers, whose sums are exact in every type."""
    generator = torch.Generator().manual_seed(10 * len(shape) + rank)
    return torch.randint(0, 20, shape, generator=generator).to(dtype)


def counted(call):
    """What the call gives, the bytes and the messages this rank sends in it."""
    traffic = Traffic()
    return call(traffic), traffic.sent, traffic.messages


def whole_sum(shape, dtype):
    """By torch, which has no sum of some types."""
    total = values(shape, dtype, dist.get_rank()).to(own_device())
    if dtype is torch.float16:
        total = total.float()
    dist.all_reduce(total)
    return total.to(dtype)


def reduce_scattered(buffer, traffic):
    return ring_reduce_scatter(buffer, traffic).clone()


def gathered(shard, traffic):
    buffer = shard.new_full((len(shard) * traffic.world,), 99)  # what is there before must not matter
    chunks(buffer, traffic)[traffic.rank].copy_(shard)
    ring_all_gather(buffer, traffic)
    return buffer


class Watched(Traffic):
    def __init__(self):
        super().__init__()
        self.passed = []

    def exchange(self, outgoing, incoming):
        self.passed.append(outgoing.tolist())
        super().exchange(outgoing, incoming)


def by_hand():
    """What three ranks pass on, and what comes out."""
    x = torch.tensor([1, 2, 3, 4]) * 10 ** dist.get_rank()
    traffic = Watched()
    chunk = ring_reduce_scatter(padded(x, 3), traffic).clone()
    return {"chunk": chunk, "passed": traffic.passed, "all": ring_all_reduce(x, Traffic())}


def work():
    """All that the tests look at, in one start of processes."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), own_device()
    found = {"reduce": {}, "kept": True}
    for shape in SHAPES:
        for dtype in DTYPES:
            x = values(shape, dtype, rank).to(device)
            before = x.clone()
            out, sent, messages = counted(lambda traffic, x=x: ring_all_reduce(x, traffic))
            found["reduce"][shape, dtype] = (out, whole_sum(shape, dtype), sent, messages)
            found["kept"] &= torch.equal(x, before)
    x = torch.rand(2, 3, device=device)
    turned = torch.rand(5, 4, device=device, generator=torch.Generator(device).manual_seed(rank)).T
    same = turned.clone()
    dist.all_reduce(same)
    found["not contiguous"] = ring_all_reduce(turned, Traffic()), same
    found["parameter"] = ring_all_reduce(torch.nn.Parameter(x), Traffic())

    buffer = values((world * 6,), torch.float32, rank).to(device)
    expected = torch.empty(6, device=device)
    dist.reduce_scatter_single(expected, buffer.clone())
    found["scatter"] = (*counted(lambda traffic: reduce_scattered(buffer.clone(), traffic)), expected)

    shard = values((6,), torch.float32, rank).to(device)
    expected = torch.empty(6 * world, device=device)
    dist.all_gather_single(expected, shard)
    found["gather"] = (*counted(lambda traffic: gathered(shard, traffic)), expected)

    found["by hand"] = by_hand() if world == 3 else None
    random = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).to(device)
    found["rounded"] = random, ring_all_reduce(random, Traffic())
    for name, given in (("uneven", torch.zeros(world * 2 + 1)), ("square", torch.zeros(world, 2))):
        try:
            ring_all_gather(given, Traffic())
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    return found


@cache
def results(world):
    return launch(work, world, backend="gloo")


@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce_equals_torch(world):
    for found in results(world):
        for (shape, dtype), (out, expected, _, _) in found["reduce"].items():
            assert out.shape == shape
            assert out.dtype == dtype
            assert torch.equal(out, expected), (shape, dtype)
        assert torch.equal(*found["not contiguous"]) or world > 2  # sums of three depend on their order
        torch.testing.assert_close(*found["not contiguous"])
        assert found["kept"], "the input was changed"
        assert not found["parameter"].requires_grad


@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter_and_all_gather_equal_torch(world):
    for found in results(world):
        for name in ("scatter", "gather"):
            out, _, _, expected = found[name]
            assert torch.equal(out, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_sends_what_the_theory_says(world):
    for found in results(world):
        for (shape, dtype), (_, _, sent, messages) in found["reduce"].items():
            number = torch.Size(shape).numel()
            assert messages == 2 * (world - 1)
            if number % world == 0:
                assert sent == 2 * (world - 1) / world * number * dtype.itemsize
            padding = (-number % world) * dtype.itemsize
            assert sent == 2 * (world - 1) * (number * dtype.itemsize + padding) / world
        for name in ("scatter", "gather"):
            _, sent, messages, _ = found[name]
            assert messages == world - 1
            assert sent == (world - 1) / world * (world * 6 * 4)


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_have_the_same_bits(world):
    found = results(world)
    given = torch.stack([one["rounded"][0] for one in found])
    for one in found:
        assert torch.equal(one["rounded"][1], found[0]["rounded"][1])
        # sums of at most four numbers of size 1 to 4, in another order: a few float32 roundings of 2e-7
        torch.testing.assert_close(one["rounded"][1], given.double().sum(0).float(), rtol=1e-6, atol=2e-6)


def test_by_hand():
    # three ranks, values 1 2 3 4 | 10 20 30 40 | 100 200 300 400: sums 111 222 333 444, padded to 6, two a chunk
    found = [one["by hand"] for one in results(3)]
    assert [one["chunk"].tolist() for one in found] == [[111, 222], [333, 444], [0, 0]]
    assert [one["all"].tolist() for one in found] == [[111, 222, 333, 444]] * 3
    # rank 0 passes on chunk 2 first, its own zeros, then chunk 1 with the sums of ranks 2 and 0
    assert found[0]["passed"] == [[0, 0], [303, 404]]
    assert found[1]["passed"] == [[10, 20], [0, 0]]
    assert found[2]["passed"] == [[300, 400], [110, 220]]


def test_refuses_a_buffer_that_does_not_divide():
    for found in results(3):
        assert found["uneven"] == "the buffer must be flat and divide into 3 chunks, got shape (7,): use padded()"
        assert found["square"] == "the buffer must be flat and divide into 3 chunks, got shape (3, 2): use padded()"
