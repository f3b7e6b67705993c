"""The loop: one large batch in small pieces, exact clipping, honest bits per byte, a run that resumes bit for bit."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.architecture.moe import balance_loss
from minillm.architecture.transformer import Config, Transformer
from minillm.data.corpus import Loader, Rows, pack
from minillm.training.loop import Record, Run, TrainConfig, evaluate, task, train
from minillm.training.objective import IGNORE
from minillm.training.optimizers import AdamW, Muon, hidden_matrices

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
V = 24


def model(*, seed=0, dtype=torch.float64, device="cpu", **options):
    torch.manual_seed(seed)
    shape = dict(vocabulary=V, width=16, layers=2, heads=2, kv_heads=1, head_size=8, hidden=24, context=64)
    return Transformer(Config(**shape | options)).to(device, dtype)


def rows(count=32, length=12, *, seed=0):
    """Rows of documents of 1 to 9 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    documents = [
        torch.randint(1, V, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 10, (count * length // 3,), generator=generator)
    ]
    packed = pack(documents, length, eos=0)
    return Rows(*(x[:count] for x in packed))


def sgd(network, lr=1.0):
    return torch.optim.SGD(network.parameters(), lr)


def gradients(network):
    return [p.grad.clone() for p in network.parameters()]


def run(network, *, batch=4, optimizer=None, seed=0, **config):
    return Run(network, Loader(rows(), batch, seed=seed), optimizer or sgd(network), TrainConfig(**config))


# Accumulation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("separate", [False, True])
def test_micro_batches_add_up_to_one_large_batch(separate, device):
    network, data = model(device=device), rows(count=12)
    trainer = run(network, separate=separate)
    whole, count = trainer.gradient([data])
    expected = gradients(network)
    network.zero_grad()
    pieces = [Rows(*(x[a:b] for x in data)) for a, b in ((0, 1), (1, 6), (6, 12))]
    counts = [int((task(piece, separate=separate).targets != IGNORE).sum()) for piece in pieces]
    total, number = trainer.gradient(pieces)
    assert number == count == sum(counts)
    assert len({c / len(piece.ids) for c, piece in zip(counts, pieces, strict=True)}) == (3 if separate else 1)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    for a, b in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)  # float64: the order of sums


def test_the_mean_of_means_would_be_another_gradient():
    network, data = model(), rows(count=12)
    trainer = run(network, separate=True)
    trainer.gradient([data])
    exact = torch.cat([g.flatten() for g in gradients(network)])
    network.zero_grad()
    pieces = [Rows(*(x[a:b] for x in data)) for a, b in ((0, 1), (1, 12))]
    for piece in pieces:
        trainer.gradient([piece])  # each call is a mean of its own
    means = torch.cat([g.flatten() for g in gradients(network)]) / 2
    assert (means - exact).norm() > 0.1 * exact.norm()


def test_an_update_with_accumulation_equals_one_without():
    one, many = model(), model()
    data = rows()
    Run(one, Loader(data, 8), sgd(one), TrainConfig(steps=3)).train()
    Run(many, Loader(data, 2), sgd(many), TrainConfig(steps=3, accumulate=4)).train()
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_the_gradient_is_that_of_the_plain_loss():
    network, data = model(), rows(count=3)
    loss, _ = run(network).gradient([data])
    logits = network(data.ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), data.ids[:, 1:].flatten())
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)  # reported in float32
    for a, b in zip(gradients(network), torch.autograd.grad(expected, list(network.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_no_gradient_is_left_from_the_step_before():
    network = model()
    trainer = run(network, optimizer=sgd(network, 0.0), clip=math.inf)
    norms = [trainer.step().norm for _ in range(3)]
    again = run(network, optimizer=sgd(network, 0.0), clip=math.inf)
    next(again.loader)
    assert again.step().norm == norms[1]


# Documents in one row


@pytest.mark.parametrize("device", DEVICES)
def test_separate_documents_are_as_if_alone(device):
    network = model(device=device)
    packed = pack([[5, 6, 7], [8], [9, 10, 11, 12]], 11, eos=0)
    loss, count = run(network, separate=True).gradient([packed])
    alone = [torch.tensor([ids], device=device) for ids in ([5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0])]
    sums = [F.cross_entropy(network(ids)[0, :-1], ids[0, 1:], reduction="sum") for ids in alone]
    assert count == 3 + 1 + 4  # nothing predicts the first token of a document
    torch.testing.assert_close(loss.double(), sum(sums).detach() / count, rtol=1e-6, atol=0)
    together, count = run(network).gradient([packed])
    assert count == 10
    assert abs(together - loss) > 1e-4


# Clipping, schedule, precision


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_scales_the_whole_gradient_and_reports_the_norm_before(device):
    network, plain = model(device=device), model(device=device)
    limit = 0.01
    trainer = run(network, clip=limit, steps=1)
    batch = next(Loader(rows(), 4))
    plain_trainer = run(plain)
    plain_trainer.gradient([batch])
    total = torch.cat([g.flatten() for g in gradients(plain)]).norm()
    before = [p.detach().clone() for p in network.parameters()]
    record = trainer.step()
    assert record.norm == pytest.approx(total.item())
    assert total > 10 * limit
    moves = [a - b for a, b in zip(before, network.parameters(), strict=True)]  # SGD with a rate of 1: the gradient
    for move, grad in zip(moves, gradients(plain), strict=True):
        # torch divides by the norm plus 1e-6
        torch.testing.assert_close(move, grad * limit / total, rtol=1e-5, atol=1e-12)


def test_a_gradient_below_the_limit_is_left_alone():
    one, two = model(), model()
    run(one, clip=1e6, steps=2).train()
    run(two, clip=math.inf, steps=2).train()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert a.equal(b)


def test_the_schedule_scales_every_group_from_its_own_peak():
    network = model()
    matrices, others = hidden_matrices(network)
    optimizers = [Muon(matrices, 0.2, dtype=torch.float64), AdamW(others, 0.1)]
    seen = []
    config = TrainConfig(steps=4, schedule=lambda step: [0.0, 0.5, 1.0, 0.25][step])
    trainer = Run(network, Loader(rows(), 4), optimizers, config)
    before = [p.detach().clone() for p in network.parameters()]
    while trainer.done < 4:
        trainer.step()
        seen.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        if trainer.done == 1:
            assert all(a.equal(b) for a, b in zip(before, network.parameters(), strict=True))  # factor 0
    assert seen == [[0.0, 0.0], [0.1, 0.05], [0.2, 0.1], [0.05, 0.025]]
    assert [record.lr for record in trainer.records] == [0.0, 0.1, 0.2, 0.05]
    assert all(not a.equal(b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_multiplies_in_bfloat16_and_keeps_weights_in_float32(device):
    exact, half = (model(dtype=torch.float32, device=device) for _ in range(2))
    losses = []
    for network, autocast in ((exact, False), (half, True)):
        dtypes = set()
        forward = network.hidden
        network.hidden = lambda *a, f=forward, d=dtypes, **k: (x := f(*a, **k), d.add(x.dtype))[0]
        optimizer = torch.optim.AdamW(network.parameters(), 0.01)
        losses.append([r.loss for r in run(network, optimizer=optimizer, autocast=autocast, steps=20).train().records])
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    # 3.2 nats; bfloat16 keeps 3 digits of each logit
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1][-1] < losses[1][0] - 0.1


@pytest.mark.parametrize("device", DEVICES)
def test_it_learns(device):
    data = pack([[1, 2, 3, 4, 5, 6, 7] * 20], 15, eos=0)
    network = model(dtype=torch.float32, device=device)
    records = train(network, Loader(data, 4), torch.optim.AdamW(network.parameters(), 0.02), TrainConfig(steps=40))
    assert records[0].loss == pytest.approx(math.log(V), abs=0.2)
    assert records[-1].loss < 0.3


# Experts


def test_the_balance_loss_reaches_the_routers_with_its_weight():
    data = rows(count=4)
    grads = {}
    for weight in (0.0, 0.5):
        network = model(experts=4, active=2)
        run(network, balance=weight).gradient([data])
        grads[weight] = gradients(network)
    network = model(experts=4, active=2)
    routings = []
    network.hidden(data.ids, routings=routings)
    loss = sum(balance_loss(r.logits, r.experts) for r in routings) / len(routings)
    assert len(routings) == 2
    extra = torch.autograd.grad(0.5 * loss, list(network.parameters()), allow_unused=True)
    for a, b, e in zip(grads[0.5], grads[0.0], extra, strict=True):
        torch.testing.assert_close(a - b, torch.zeros_like(a) if e is None else e, rtol=1e-6, atol=1e-12)
    assert any(e is not None and e.abs().max() > 1e-6 for e in extra)


def test_the_loss_reported_is_that_of_the_tokens_alone():
    network, data = model(experts=4, active=2), rows(count=4)
    losses = [run(network, balance=weight).gradient([data])[0] for weight in (0.0, 100.0)]
    assert losses[0] == losses[1]


# Evaluation


def text_lengths():
    lengths = torch.randint(1, 6, (V,), generator=torch.Generator().manual_seed(0))
    lengths[0] = 0  # the end of a document is no text
    return lengths


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_bits_per_byte_by_another_way(batch, separate, device):
    network, data, lengths = model(device=device), rows(count=7), text_lengths()
    nats, targets = [], []
    for ids, documents in zip(*data, strict=True):
        parts = [ids[documents == d] for d in documents.unique()] if separate else [ids]
        for part in parts:
            logits = network(part[None].to(device))[0, :-1]
            nats.append(F.cross_entropy(logits, part[1:].to(device), reduction="none").detach().cpu())
            targets.append(part[1:])
    size = lengths[torch.cat(targets)]
    expected = torch.cat(nats)[size > 0].sum().item() / math.log(2) / size.sum().item()
    assert evaluate(network, data, lengths, batch=batch, separate=separate) == pytest.approx(expected, rel=1e-6)


def test_an_untrained_model_knows_nothing():
    lengths = torch.ones(V, dtype=torch.int64)
    assert evaluate(model(), rows(), lengths) == pytest.approx(math.log2(V), abs=0.05)


def test_evaluation_changes_nothing():
    network = model()
    state = copy.deepcopy(network.state_dict())
    network.eval()
    evaluate(network, rows(), text_lengths())
    assert not network.training
    network.train()
    evaluate(network, rows(), text_lengths())
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(a.equal(b) for a, b in zip(state.values(), network.state_dict().values(), strict=True))


# Records


def test_records_and_evaluations_come_when_due():
    network, seen = model(), []
    config = TrainConfig(steps=10, log_every=3, eval_every=4)
    held_out = rows(count=4, seed=1), text_lengths()
    records = train(network, Loader(rows(), 4), sgd(network, 0.1), config, held_out=held_out, on_step=seen.append)
    assert seen == records
    assert [(r.step, r.bits_per_byte is not None) for r in records] == [
        (3, False), (4, True), (6, False), (8, True), (9, False), (10, True),
    ]  # fmt: skip
    assert [r.tokens for r in records] == [r.step * 4 * 11 for r in records]
    assert records[-1].bits_per_byte == evaluate(network, *held_out)
    assert all(a.seconds < b.seconds for a, b in pairwise(records))


def test_no_record_needs_no_wait():
    trainer = run(model(), steps=5, log_every=2)
    assert [trainer.step() is None for _ in range(5)] == [True, False, True, False, False]


def test_a_line_of_progress():
    record = Record(20, 123456, 3.25, 1.5, 0.002, 61.04, None)
    assert str(record) == ("step    20  tokens   123,456  loss  3.250  norm   1.500  lr 2.00e-03    61.0 s")
    assert str(record._replace(bits_per_byte=2.0)).endswith("s  held-out 2.000 bits/byte")


def test_until_stops_before_the_end():
    trainer = run(model(), steps=10).train(until=4)
    assert trainer.done == 4
    assert trainer.train().done == 10
    assert trainer.train().done == 10


# Resume


class Noisy(Transformer):
    """A model that draws random numbers, as dropout does."""

    def hidden(self, ids, **more):
        out = super().hidden(ids, **more)
        return out + 0.1 * torch.randn(out.shape, device=out.device) if self.training else out


def noisy_run(device="cpu", seed=0, **options):
    torch.manual_seed(seed)
    shape = dict(vocabulary=V, width=16, layers=2, heads=2, kv_heads=1, head_size=8, hidden=24, context=64)
    network = Noisy(Config(**shape)).to(device)
    matrices, others = hidden_matrices(network)
    optimizers = [Muon(matrices, 0.02), torch.optim.AdamW(others, 0.01, fused=True)]
    # 7 batches of 4 rows an epoch: the 10 updates of 2 micro-batches go through two ends of an epoch
    loader = Loader(rows(count=30), 4, seed=seed)
    config = TrainConfig(steps=10, accumulate=2, schedule=lambda step: 1 / (1 + step), eval_every=5, **options)
    return Run(network, loader, optimizers, config, held_out=(rows(count=4, seed=1), text_lengths()))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_to_the_bit(a, b):
    assert all(x.equal(y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert [r._replace(seconds=0) for r in a.records] == [r._replace(seconds=0) for r in b.records]
    assert (a.done, a.tokens) == (b.done, b.tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("until", [1, 4, 7])
def test_a_resumed_run_is_the_uninterrupted_one(until, device):
    with sdpa_kernel(SDPBackend.MATH):  # others may add up in another order each time, on a GPU
        straight = noisy_run(device).train()
        first = noisy_run(device).train(until=until)
        state = through_a_file(first.state_dict())
        torch.manual_seed(99)
        second = noisy_run(device, seed=5)  # other weights to begin with
        second.loader = Loader(rows(count=30), 4, seed=0)
        second.load_state_dict(state)
        second.train()
    same_to_the_bit(second, straight)
    assert second.records[-1].seconds > first.records[-1].seconds


@pytest.mark.parametrize("part", ["model", "optimizers", "loader", "random", "run"])
def test_every_part_of_the_state_is_needed(part):
    straight = noisy_run().train()
    state = noisy_run().train(until=4).state_dict()
    fresh = noisy_run()
    state[part] = fresh.state_dict()[part]
    torch.manual_seed(99)
    fresh.load_state_dict(state)
    fresh.config = TrainConfig(steps=10 if part != "run" else 6, accumulate=2, schedule=fresh.config.schedule)
    fresh.train()
    assert not all(a.equal(b) for a, b in zip(fresh.model.parameters(), straight.model.parameters(), strict=True))


def test_a_snapshot_does_not_move_with_the_run():
    trainer = noisy_run().train(until=4)
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    trainer.train()
    assert_same(state, kept)


def test_one_snapshot_serves_twice():
    straight = noisy_run().train()
    state = noisy_run().train(until=4).state_dict()
    for _ in range(2):
        trainer = noisy_run()
        trainer.load_state_dict(state)
        same_to_the_bit(trainer.train(), straight)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.equal(b)
    else:
        assert a == b


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(accumulate=0), "accumulate must be at least 1, got 0"),
        (dict(log_every=-1), "log_every must be at least 1, got -1"),
        (dict(clip=0.0), "clip must be above 0, math.inf for no clipping, got 0.0"),
        (dict(clip=math.nan), "clip must be above 0"),
    ],
)
def test_refuses_a_config(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_refuses_to_evaluate_on_nothing():
    with pytest.raises(ValueError, match=r"eval_every needs held_out=\(rows, corpus.token_bytes"):
        run(model(), eval_every=1)
    with pytest.raises(ValueError, match="evaluation needs held_out"):
        run(model()).bits_per_byte()


def test_refuses_the_state_of_another_run():
    state = noisy_run().state_dict()
    trainer = noisy_run()
    trainer.optimizers = trainer.optimizers[:1]
    with pytest.raises(ValueError, match="the state has 2 optimizers, this run has 1"):
        trainer.load_state_dict(state)
    trainer = noisy_run()
    trainer.loader = Loader(rows(count=30), 5)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match="position is one with batch 4, this loader has batch 5"):
        trainer.load_state_dict(state)
    assert all(a.equal(b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_refuses_to_go_on_without_a_number():
    network = model()
    with torch.no_grad():
        network.norm.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        run(network).step()
