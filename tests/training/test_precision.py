"""Mixed precision: the scaler step by step beside torch's, autocast measured two ways, what master weights keep."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.training.precision import (
    LossScaler,
    MasterWeights,
    autocast_map,
    next_scale,
    operations,
    scaled_step,
    unscale,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


# The scaler


class Setup:
    """Two networks in a row with an optimizer each, and what both scalers are driven by."""

    def __init__(self, scaler, device):
        torch.manual_seed(0)
        self.nets = [nn.Linear(3, 4, device=device), nn.Linear(4, 2, device=device)]
        first, second = ([*net.parameters()] for net in self.nets)
        self.optimizers = [torch.optim.SGD(first, 0.05, momentum=0.9), torch.optim.AdamW(second, 0.05)]
        self.scaler = scaler
        self.steps = [0, 0]
        for i, optimizer in enumerate(self.optimizers):
            optimizer.register_step_post_hook(lambda *_, i=i: self.count(i))

    def count(self, i):
        self.steps[i] += 1

    def backward(self, x, y, poison):
        """The scaled loss's gradients, with a value put in those of some networks."""
        loss = (self.nets[1](self.nets[0](x).tanh()) - y).square().mean()
        self.scaler.scale(loss).backward()
        for net, value in zip(self.nets, poison, strict=True):
            if value is not None:
                net.weight.grad[1, 0] = value

    def state(self):
        return [p.detach().clone() for net in self.nets for p in net.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, (2.0**16, 2.0, 0.5, 3)),
        (1, (2.0**16, 2.0, 0.5, 1)),
        (2, (1000.0, 1.7, 0.3, 4)),  # no powers of two: the reciprocal is rounded
        (3, (2.0**124, 2.0, 0.5, 2)),  # the scale reaches the end of float32, and the gradients overflow by themselves
        (4, (2.0**127, 1.9999, 0.9999, 1)),
    ],
)
def test_every_step_is_torchs(seed, options, device):
    scale, growth, backoff, interval = options
    mine = Setup(LossScaler(scale=scale, growth=growth, backoff=backoff, interval=interval), device)
    theirs = Setup(torch.amp.GradScaler(device, scale, growth, backoff, interval), device)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    chance = lambda p: torch.rand((), generator=generator).item() < p  # noqa: E731
    skipped = alone = 0
    for _ in range(150):
        passes = [(draw(5, 3).to(device), draw(5, 2).to(device)) for _ in range(1 + chance(0.3))]  # accumulation
        values = [math.inf, -math.inf, math.nan]
        poison = [values[int(torch.randint(3, (), generator=generator))] if chance(0.12) else None for _ in range(2)]
        clip, first, absent = chance(0.5), chance(0.5), chance(0.1)
        before = list(mine.steps)
        for setup in (mine, theirs):
            for x, y in passes:
                setup.backward(x, y, poison)
            order = setup.optimizers if first else setup.optimizers[::-1]
            if clip:
                setup.scaler.unscale_(order[0])
                torch.nn.utils.clip_grad_norm_(setup.nets[0 if first else 1].parameters(), 0.1)
            for optimizer in order[: 1 if absent else 2]:  # one may be left out of a step
                setup.scaler.step(optimizer)
            setup.scaler.update()
            for optimizer in setup.optimizers:
                optimizer.zero_grad()
        steps = sum(mine.steps) - sum(before)
        skipped += (1 if absent else 2) - steps
        alone += not absent and steps == 1
        assert mine.scaler.value == theirs.scaler.get_scale()
        assert mine.scaler.good == theirs.scaler.state_dict()["_growth_tracker"]
        assert mine.steps == theirs.steps
        assert all(a.equal(b) for a, b in zip(mine.state(), theirs.state(), strict=True))
    assert skipped > 15
    assert min(mine.steps) > 15
    assert alone > 5  # each skips for itself
    assert mine.scaler.state_dict() == theirs.scaler.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_pure_step_is_torchs(dtype):
    """Scale, SGD, clipping: the weights follow GradScaler, and clip_grad_norm_ in float64."""
    generator = torch.Generator().manual_seed(5)
    options = dict(growth=2.0, backoff=0.5, interval=3)
    weight = torch.randn(6, generator=generator)
    state = weight.clone(), torch.tensor(2.0**12), torch.tensor(0)
    theirs = torch.amp.GradScaler("cpu", 2.0**12, 2.0, 0.5, 3)
    copied = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([copied], 0.1)
    for i in range(60):
        clip = (math.inf, 0.5)[i % 2]
        gradient = torch.randn(6, generator=generator) * 2.0 ** (-12 if i % 5 == 0 else 0)
        gradient = torch.zeros(6) if i % 13 == 0 else (gradient * theirs.get_scale()).to(dtype)
        if i % 7 == 0:
            gradient[i % 6] = (math.inf, -math.inf, math.nan)[i % 3]
        kept = gradient.clone(), state[0].clone()
        after = scaled_step(state[0], gradient, *state[1:], rate=0.1, clip=clip, **options)
        torch.testing.assert_close((gradient, state[0]), kept, equal_nan=True, rtol=0, atol=0)  # left as they are
        state = after
        theirs.scale(torch.ones(()))  # it makes its tensors at the first call
        copied.grad = gradient.float()
        theirs.unscale_(optimizer)
        wide = copied.grad.double()
        if wide.norm() > clip:
            copied.grad = (wide * clip / wide.norm()).float()
        theirs.step(optimizer)
        theirs.update()
        torch.testing.assert_close(state[0], copied.detach())
        assert state[1].item() == theirs.get_scale()
        assert state[2].item() == theirs.state_dict()["_growth_tracker"]
    assert (state[0] - weight).abs().max() > 0.1


def test_a_pure_step_by_hand():
    """Scale 8: the gradient (24, 32) is (3, 4) in truth, of norm 5, and clipped to 1 it is (0.6, 0.8)."""
    start, gradient = torch.tensor([1.0, 1.0]), torch.tensor([24.0, 32.0])
    scale, good = torch.tensor(8.0), torch.tensor(1)
    weight, *after = scaled_step(start, gradient, scale, good, rate=1.0, clip=1.0, interval=3)
    torch.testing.assert_close(weight, torch.tensor([0.4, 0.2]))
    assert after == [torch.tensor(8.0), torch.tensor(2)]
    gradient[0] = math.inf  # nothing moves, not the second weight either; the count starts again
    weight, *after = scaled_step(start, gradient, scale, good, rate=1.0, clip=1.0, interval=3)
    assert weight.equal(start)
    assert after == [torch.tensor(4.0), torch.tensor(0)]


def test_a_pure_step_divides_in_float32():
    """2^-24, float16's smallest, divided by 2^10 is 2^-34: zero in float16."""
    gradient = torch.full((1,), 2.0**-24, dtype=torch.float16)
    weight, *_ = scaled_step(torch.zeros(1), gradient, torch.tensor(2.0**10), torch.tensor(0), rate=1.0)
    assert weight.item() == -(2.0**-34)


def test_a_pure_step_looks_at_every_number_not_at_their_sum():
    """3e38 twice is finite, their sum is not."""
    state = torch.full((2,), 3e38), torch.tensor(2.0**127), torch.tensor(0)
    weight, _, good = scaled_step(torch.zeros(2), *state, rate=1.0)
    torch.testing.assert_close(weight, torch.full((2,), -3e38 / 2.0**127))
    assert good.item() == 1


def test_a_pure_step_stops_growing_where_float32_ends():
    state = torch.zeros(1), torch.zeros(1), torch.tensor(2.0**127), torch.tensor(0)
    _, scale, good = scaled_step(*state, rate=1.0, interval=1)
    assert scale.item() == 2.0**127
    assert good.item() == 0


def test_the_state_goes_to_torchs_scaler_and_back():
    mine = LossScaler(scale=64.0, growth=3.0, backoff=0.25, interval=7)
    mine.value, mine.good = 48.0, 5
    theirs = torch.amp.GradScaler("cpu")
    theirs.load_state_dict(mine.state_dict())
    assert theirs.state_dict() == mine.state_dict()
    again = LossScaler()
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == mine.state_dict()
    assert again.options == mine.options


def test_the_scale_by_hand():
    """interval 3: three good steps double it, and a bad one between starts the count again."""
    scale, good, seen = 8.0, 0, []
    for finite in [True, True, True, True, True, False, True, True, True]:
        scale, good = next_scale(scale, good, finite, interval=3)
        seen.append((scale, good))
    assert seen == [(8, 1), (8, 2), (16, 0), (16, 1), (16, 2), (8, 0), (8, 1), (8, 2), (16, 0)]


def test_a_scalar_loss_in_float16_is_scaled_in_float32():
    loss = torch.tensor(2.0, dtype=torch.float16)
    scaled = LossScaler(scale=2.0**16).scale(loss)
    assert scaled.item() == 2.0**17  # float16 ends at 65504
    assert scaled.equal(torch.amp.GradScaler("cpu", 2.0**16).scale(loss))


def test_small_gradients_arrive_only_with_a_scale():
    """A gradient of 2^-28 on its way through float16: 2^-24 is the smallest number there."""
    found = []
    for scale in (1.0, 2.0**16):
        scaler, x = LossScaler(scale=scale), torch.ones(1, requires_grad=True)
        optimizer = torch.optim.SGD([x], 1.0)
        scaler.scale(x.half().float() * 2.0**-28).backward()
        scaler.step(optimizer)
        found.append(x.grad.item())
    assert found == [0.0, 2.0**-28]


def test_clipping_before_unscaling_shrinks_the_step():
    """The norm is 5 in truth: clipped to 1 after unscaling; before, it is 5 x 2^16 and clipped to 1 / 2^16."""
    norms = []
    for unscale_first in (True, False):
        x = torch.zeros(2, requires_grad=True)
        scaler, optimizer = LossScaler(), torch.optim.SGD([x], 1.0)
        scaler.scale(x @ torch.tensor([3.0, 4.0])).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([x], 1.0)
        scaler.step(optimizer)
        norms.append(x.detach().norm().item())
    assert norms == pytest.approx([1.0, 2.0**-16], rel=1e-5)


@HALF
def test_unscale_looks_at_every_gradient(dtype):
    gradients = [torch.full((2,), 8.0), torch.full((3,), 16.0, dtype=dtype)]
    assert unscale(gradients, 8.0)
    assert [g.tolist() for g in gradients] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    for value in (math.inf, -math.inf, math.nan):
        for place in range(2):
            gradients[place][1] = value
            assert not unscale(gradients, 2.0)
            gradients[place].fill_(1.0)


def test_training_in_float16_learns_only_with_the_scaler():
    """Gradients of about 1e-9: autocast in float16 makes zeros of those of the activations."""
    errors = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        x = torch.randn(64, 8)
        y = x[:, :1] * 0.5
        scaler, optimizer = LossScaler(), torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = (net(x).float() - y).square().mean() * 1e-7
            (scaler.scale(loss) if scaled else loss).backward()
            scaler.step(optimizer) if scaled else optimizer.step()
            if scaled:
                scaler.update()
        errors.append(loss.item() * 1e7)
    assert errors[1] < 0.02 < 0.1 < errors[0]


def test_refuses_wrong_order():
    x = torch.ones(2, requires_grad=True)
    scaler, optimizer = LossScaler(), torch.optim.SGD([x], 1.0)
    with pytest.raises(RuntimeError, match=r"no gradients: call scale\(loss\).backward\(\) before"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"no gradients were looked at since the last update: call step"):
        scaler.update()
    scaler.scale(x.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscaled already: unscale_ once between updates"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"stepped already: call update\(\) after the steps of all"):
        scaler.step(optimizer)
    scaler.update()
    scaler.step(optimizer)


def test_refuses_float16_gradients():
    x = torch.ones(2, requires_grad=True, dtype=torch.float16)
    scaler, optimizer = LossScaler(), torch.optim.SGD([x], 1.0)
    scaler.scale(x.sum()).backward()
    with pytest.raises(ValueError, match="float16 gradients vanish again when they are unscaled"):
        scaler.step(optimizer)


def test_refuses_to_go_on_when_no_scale_helps():
    x = torch.ones(2, requires_grad=True)
    scaler, optimizer = LossScaler(scale=2.0**-125), torch.optim.SGD([x], 1.0)
    for last in (False, True):
        x.grad = torch.full((2,), math.nan)
        scaler.step(optimizer)
        if not last:
            assert scaler.update() == 2.0**-126
    with pytest.raises(FloatingPointError, match="no scale gives finite gradients: look for the infinity or NaN"):
        scaler.update()


@pytest.mark.parametrize(
    "options", [dict(scale=0.0), dict(growth=1.0), dict(backoff=1.0), dict(backoff=0.0), dict(interval=0)]
)
def test_refuses_options(options):
    with pytest.raises(ValueError, match=r"needs scale > 0, growth > 1, 0 < backoff < 1 and interval >= 1, got"):
        LossScaler(**options)


def test_refuses_the_state_of_something_else():
    with pytest.raises(ValueError, match="the state of a scaler has _growth_tracker, backoff_factor"):
        LossScaler().load_state_dict({"scale": 1.0})


# Autocast


class Watch(TorchDispatchMode):
    """The dtypes of floating-point arguments of every kernel that is not a cast or a change of view."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("_to_copy", "view", "transpose", "permute", "squeeze", "unsqueeze", "expand", "t"):
            flat, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
            self.seen += [x.dtype for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@HALF
def test_results_have_the_dtype_that_the_kernels_ran_in(dtype, device):
    for given in (torch.float32, dtype):
        found = autocast_map(device, dtype, given=given)
        for name, call in operations(torch.device(device), given).items():
            with torch.no_grad(), torch.autocast(device, dtype=dtype), Watch() as watch:
                call()
            assert watch.seen, name
            # made of several kernels on a CPU, rms_norm squares and adds up in float32 and casts back
            inside = {torch.float32} if name == "rms_norm" and device == "cpu" else set()
            assert set(watch.seen) == {found[name]} | inside, name


@HALF
def test_the_map_of_the_cpu(dtype):
    """From PyTorch's list of the CPU's operations that autocast to a lower precision, to float32, and to the widest."""
    wide, half = (autocast_map("cpu", dtype, given=given) for given in (torch.float32, dtype))
    products = {"linear", "matmul", "bmm", "einsum", "conv2d", "attention"}
    protected = {"mse_loss", "cross_entropy", "cat with float32"}
    assert {name for name in wide if wide[name] == dtype} == products
    assert {name for name in half if half[name] == torch.float32} == protected
    assert half["softmax"] == half["layer_norm"] == dtype  # not so on CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_map_of_cuda_protects_softmax_and_norms():
    half = autocast_map("cuda", torch.float16, given=torch.float16)
    for name in ("softmax", "log_softmax", "layer_norm", "exp", "log", "pow", "rsqrt", "sum", "cumsum", "norm"):
        assert half[name] == torch.float32
    wide = autocast_map("cuda", torch.float16)
    for name in ("linear", "matmul", "bmm", "conv2d", "attention"):
        assert wide[name] == torch.float16


def test_nothing_is_left_switched_on():
    autocast_map("cpu", torch.bfloat16)
    assert not torch.is_autocast_enabled("cpu")


# Master weights


@HALF
def test_a_thousand_small_updates_are_lost_without_masters(dtype):
    """1000 times 1e-4 on 1.0: half an ulp above 1 is 0.0005 in float16, 0.004 in bfloat16."""
    plain, kept = (torch.ones(1, dtype=dtype, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([plain], 1e-4)
    masters = MasterWeights([kept], lambda copies: torch.optim.SGD(copies, 1e-4))
    for _ in range(1000):
        plain.grad = kept.grad = -torch.ones_like(plain)
        optimizer.step()
        masters.step()
    assert plain.item() == 1.0
    assert masters.copies[0].item() == pytest.approx(1.1, rel=1e-4)  # 1000 roundings of float32
    assert kept.equal(masters.copies[0].to(dtype))
    assert abs(kept.item() - 1.1) <= torch.finfo(dtype).eps / 2


def network(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False)).to(dtype)


def batches(dtype):
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        x = torch.randn(16, 6, generator=generator)
        yield x.to(dtype), x[:, :1].to(dtype)


@HALF
def test_equal_to_float32_weights_that_are_rounded_for_every_use(dtype):
    net = network(dtype)
    masters = MasterWeights(net.parameters(), lambda copies: torch.optim.AdamW(copies, 0.01))
    wide = network(dtype).float()  # the same numbers
    optimizer = torch.optim.AdamW(wide.parameters(), 0.01)
    for x, y in batches(dtype):
        net.zero_grad()
        (net(x) - y).square().mean().backward()
        masters.step()
        optimizer.zero_grad()
        first, second = (p.to(dtype) for p in wide.parameters())  # the cast's gradient is a cast, too
        (F.linear(F.linear(x, first).relu(), second) - y).square().mean().backward()
        optimizer.step()
    for weight, copied, expected in zip(net.parameters(), masters.copies, wide.parameters(), strict=True):
        assert copied.equal(expected)
        assert weight.equal(expected.to(dtype))
        assert weight.dtype == dtype


def test_with_a_scaler_the_gradients_are_unscaled_in_float32():
    scaler, losses = LossScaler(scale=2.0**10, interval=5), []
    net = network(torch.float16)
    masters = MasterWeights(net.parameters(), lambda copies: torch.optim.AdamW(copies, 0.02))
    for i, (x, y) in enumerate([*batches(torch.float16)] * 3):
        net.zero_grad()
        loss = (net(x) - y).square().mean()
        scaler.scale(loss * (math.inf if i == 30 else 1)).backward()
        before = [copied.detach().clone() for copied in masters.copies]
        masters.pull()
        assert all(copied.grad.dtype == torch.float32 for copied in masters.copies)
        stepped = scaler.step(masters.optimizer)
        masters.push()
        scaler.update()
        losses.append(loss.item())
        moved = any(not a.equal(b) for a, b in zip(before, masters.copies, strict=True))
        assert moved == stepped == (i != 30 and stepped)
    assert losses[-1] < losses[0] / 5


def test_masters_come_back_bit_for_bit():
    def fresh():
        net = network(torch.bfloat16)
        return net, MasterWeights(net.parameters(), lambda copies: torch.optim.AdamW(copies, 0.01))

    def go(net, masters, data):
        for x, y in data:
            net.zero_grad()
            (net(x) - y).square().mean().backward()
            masters.step()

    data = [*batches(torch.bfloat16)]
    straight, resumed = fresh(), fresh()
    go(*straight, data[:8])
    state = copy.deepcopy(straight[1].state_dict())
    go(*straight, data[8:])
    resumed[1].load_state_dict(state)
    go(*resumed, data[8:])
    for a, b in zip(straight[1].copies + straight[1].weights, resumed[1].copies + resumed[1].weights, strict=True):
        assert a.equal(b)


@HALF
def test_sixteen_bytes_a_parameter(dtype):
    """2 + 2 + 4 + 4 + 4: weight, gradient, master, two moments; and 4 more while the copies' gradients are held."""
    net = network(dtype)
    masters = MasterWeights(net.parameters(), lambda copies: torch.optim.AdamW(copies, 0.01))
    assert masters.bytes_per_parameter() == {
        "weights": 2, "gradients": 0, "masters": 4, "masters' gradients": 0, "moments": 0,
    }  # fmt: skip
    x, y = next(batches(dtype))
    (net(x) - y).square().mean().backward()
    masters.step()
    held = masters.bytes_per_parameter()
    assert held == {"weights": 2, "gradients": 2, "masters": 4, "masters' gradients": 4, "moments": 8}
    masters.optimizer.zero_grad()
    assert sum(masters.bytes_per_parameter().values()) == 16


def test_refuses_the_masters_of_another_model():
    net = network(torch.bfloat16)
    masters = MasterWeights(net.parameters(), lambda copies: torch.optim.SGD(copies, 0.1))
    state = masters.state_dict()
    state["copies"] = state["copies"][:1]
    with pytest.raises(ValueError, match=r"copies have shapes \[\(8, 6\)\], these weights have \[\(8, 6\), \(1, 8\)\]"):
        masters.load_state_dict(state)
