"""The recipe: counts of pairs are the text to a model without blocks; a budget of time; rates of tables and blocks."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Loader, pack
from minillm.training.recipe import Budget, bigram_loss, pair_counts, table_groups, train_for, warm_start

V = 13


def model(**options):
    torch.manual_seed(0)
    shape = dict(vocabulary=V, width=16, layers=2, heads=2, kv_heads=2, head_size=8, hidden=24, context=64, tied=False)
    return Transformer(Config(**shape | options))


def text(n=500):
    """Each token is followed by one of two."""
    generator = torch.Generator().manual_seed(0)
    ids = [0]
    for bit in torch.randint(2, (n - 1,), generator=generator).tolist():
        ids.append((2 * ids[-1] + bit) % V)
    return torch.tensor(ids)


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_pair_counts_by_a_loop():
    ids = text()
    expected = torch.zeros(V, V)
    for a, b in zip(ids.tolist(), ids[1:].tolist(), strict=False):
        expected[a, b] += 1
    assert pair_counts(ids, V).equal(expected)
    assert pair_counts(ids.view(5, 100), V).equal(expected)  # rows that follow each other are one text


def test_the_counts_stand_for_the_text_when_blocks_add_nothing():
    network, ids = model(), text(60)
    with torch.no_grad():
        network.norm.normal_()
        for block in network.blocks:
            block.out.zero_()
            block.down.zero_()
    on_text = F.cross_entropy(network(ids[None])[0, :-1], ids[1:])
    torch.testing.assert_close(bigram_loss(network, pair_counts(ids, V)), on_text)


def test_a_warm_start_learns_the_pairs_and_leaves_the_blocks_alone():
    network, counts = model(), pair_counts(text(), V)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    losses = warm_start(network, counts)
    p = counts / counts.sum(dim=1, keepdim=True)
    least = -(counts * p.clamp(min=1e-9).log()).sum() / counts.sum()  # the entropy of the pairs, about ln 2
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert least < losses[-1] < least + 0.1
    changed = {name for name, p in network.named_parameters() if not p.equal(before[name])}
    assert changed == {"embedding", "head"}
    assert all(p.grad is None for p in network.parameters())


def test_groups_hold_every_parameter_once_and_tables_have_their_rate():
    for network in (model(), model(tied=True), model(experts=4)):
        optimizer = torch.optim.AdamW(table_groups(network, tables=0.5), 0.1)
        tables, rest = optimizer.param_groups
        assert (tables["lr"], rest["lr"]) == (0.5, 0.1)
        assert {id(p) for p in tables["params"]} == {id(network.embedding), id(network.unembedding)}
        held = [id(p) for group in (tables, rest) for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in network.parameters())


def test_a_budget_falls_with_time_and_not_while_it_pauses():
    clock = Clock()
    budget = Budget(10.0, warmup=4, clock=clock)
    assert [budget(step) for step in (0, 1, 3, 100)] == [0.25, 0.5, 1.0, 1.0]
    clock.now += 2.5
    assert (budget.spent, budget(0), budget(100)) == (2.5, 0.25 * 0.75, 0.75)
    with budget.pause():
        clock.now += 1000
    assert (budget.spent, budget(100)) == (2.5, 0.75)
    clock.now += 100
    assert budget(100) == 0.0


def test_training_ends_with_the_budget_and_tells_its_curve():
    clock, network = Clock(), model()
    rows = pack([text().tolist()], 10, eos=0)
    loader = Loader(rows, 4)
    lengths = torch.ones(V, dtype=torch.int64)
    budget = Budget(40.0, warmup=1, clock=clock)
    seen = []

    class Ticking(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            clock.now += 1  # an update takes a second
            seen.append(self.param_groups[0]["lr"])

    curve = train_for(budget, network, loader, Ticking(network.parameters(), 0.01), held_out=(rows, lengths), points=4)
    assert [seconds for seconds, _ in curve] == [10, 20, 30, 40]
    assert seen == pytest.approx([0.01 * (1 - step / 40) for step in range(40)])
    assert curve[-1][1] < curve[0][1] < math.log2(V)


def test_refusals():
    with pytest.raises(ValueError, match="a head of its own, tied=False"):
        warm_start(model(tied=True), pair_counts(text(), V))
    with pytest.raises(ValueError, match="more than 0 seconds, got 0"):
        Budget(0)
