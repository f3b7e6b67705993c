"""The tiny exact run: stopped anywhere it goes on bit for bit, each missing part shows, and SGD is PyTorch's."""

import pytest
import torch

from minillm.training.checkpoint import load, save
from minillm.training.resume import PARTS, fresh, order, rate, resume, update_, without


def data(rows=10, columns=6):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(rows, columns, generator=generator)
    return x, x @ torch.arange(1.0, columns + 1) + 0.1 * torch.randn(rows, generator=generator)


def equal(a, b):
    return all(x.dtype == y.dtype and x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stop", range(13))
def test_stopped_at_any_step_it_goes_on_bit_for_bit(stop):
    """10 rows in batches of 4: an epoch has two steps, and two rows are left over."""
    x, y = data()
    straight = resume(fresh(6), x, y, steps=12)
    before, *state = resume(fresh(6), x, y, steps=stop)
    after, *end = resume(state, x, y, steps=12 - stop)
    assert torch.cat([before, after]).equal(straight[0])
    assert equal(end, straight[1:])


def test_through_a_file(tmp_path):
    x, y = data()
    _, *state = resume(fresh(6), x, y, steps=7)
    again = load(save(state, tmp_path, 7))
    assert equal(resume(again, x, y, steps=5), resume(state, x, y, steps=5))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_needed(part):
    x, y = data()
    _, *state = resume(fresh(6), x, y, steps=7)
    truth = resume(state, x, y, steps=6)[0]
    other = resume(without(state, part, fresh(6)), x, y, steps=6)[0]
    assert (other - truth).abs().max() > 1e-3  # bits would be 1e-7


def test_a_state_can_be_used_twice():
    x, y = data()
    _, *state = resume(fresh(6), x, y, steps=3)
    before = [part.clone() for part in state]
    first = resume(state, x, y, steps=5)
    assert equal(state, before)
    assert equal(resume(state, x, y, steps=5), first)


def test_no_steps():
    x, y = data()
    _, *state = resume(fresh(6), x, y, steps=3)
    losses, *after = resume(state, x, y, steps=0)
    assert losses.shape == (0,)
    assert equal(after, state)


def test_the_state_says_where_the_run_is():
    """By hand: 10 rows, batches of 4. Steps 0 and 1 are epoch 0, steps 2 and 3 epoch 1, step 4 begins epoch 2."""
    x, y = data()
    for steps, position in ((0, [0, 0]), (1, [0, 4]), (2, [0, 8]), (3, [1, 4]), (4, [1, 8]), (5, [2, 4])):
        state = resume(fresh(6), x, y, steps=steps)[1:]
        assert (int(state[2]), state[3].tolist()) == (steps, position)


def test_an_epoch_reads_rows_once_and_the_next_in_another_order():
    x = torch.eye(8)
    for epoch in (0, 1):
        assert sorted(order(8, epoch).tolist()) == list(range(8))
    assert order(8, 0).tolist() != order(8, 1).tolist()
    weight, seen = torch.zeros(8), []
    state = (weight, *fresh(8)[1:])
    for _ in range(2):
        _, *state = resume(state, x, torch.ones(8), steps=1)
        seen.append(state[1])  # the momentum is not zero in the columns that were read, where dropout kept them
    first = {i for i, v in enumerate(seen[0].tolist()) if v}
    assert first <= set(order(8, 0)[:4].tolist())
    assert {i for i, v in enumerate(seen[1].tolist()) if v} <= set(range(8))


def test_equals_sgd_and_its_scheduler():
    x, y = data(12, 6)
    straight = resume(fresh(6), x, y, steps=9)
    weight = torch.nn.Parameter(fresh(6)[0].clone())
    generator = torch.Generator()
    generator.set_state(fresh(6)[4])
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (1 + step / 20))
    losses = []
    for step in range(9):
        rows = order(12, step // 3)[4 * (step % 3) : 4 * (step % 3) + 4]
        kept = (torch.rand(4, 6, generator=generator) < 0.8) / 0.8
        loss = (((x[rows] * kept) @ weight - y[rows]) ** 2).mean() / 2
        losses.append(loss.item())
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        schedule.step()
    torch.testing.assert_close(straight[0], torch.tensor(losses))
    torch.testing.assert_close(straight[1], weight.detach())
    torch.testing.assert_close(straight[2], sgd.state[weight]["momentum_buffer"])


def test_one_update_by_hand():
    """Nothing dropped: error 2 * 1 - 5 = -3, loss 9 / 2, momentum 0.9 * 10 + 2 * -3 = 3, weight 1 - 0.5 * 3."""
    weight, momentum = torch.tensor([1.0]), torch.tensor([10.0])
    generator = torch.Generator()
    seed = next(s for s in range(50) if torch.rand(1, 1, generator=generator.manual_seed(s)) < 0.8)
    x = torch.tensor([[2.0 * 0.8]])  # what is kept is divided by 0.8
    loss = update_(weight, momentum, x, torch.tensor([5.0]), lr=0.5, generator=generator.manual_seed(seed))
    torch.testing.assert_close(torch.stack([loss, *momentum, *weight]), torch.tensor([4.5, 3.0, -0.5]))


def test_dropout_keeps_the_mean():
    x, weight = torch.ones(1, 20_000), torch.full((20_000,), 1 / 20_000)
    loss = update_(weight, torch.zeros(20_000), x, torch.zeros(1), lr=0.0, generator=torch.Generator().manual_seed(0))
    assert abs((2 * loss).sqrt() - 1) < 0.02  # standard deviation of the mean: 0.0035


def test_rates():
    assert [rate(step) for step in (0, 20, 60)] == [0.1, 0.05, 0.025]


def test_refusals():
    x, y = data()
    for batch in (0, 11):
        with pytest.raises(ValueError, match=rf"a batch must hold 1 to 10 rows.*got {batch}"):
            resume(fresh(6), x, y, steps=1, batch=batch)
    with pytest.raises(ValueError, match="part must be one of weight, momentum, step, position, generator, got 'lr'"):
        without(fresh(6), "lr", fresh(6))
