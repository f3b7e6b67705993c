"""Rounded products: equal to autocast's, zero where the format says so, and what training loses by it."""

import pytest
import torch
import torch.nn.functional as F

from minillm.architecture.transformer import Transformer
from minillm.training.formats import BF16, FP16, round_to
from minillm.training.precision import LossScaler
from minillm.training.rounding import (
    TOY,
    Rounding,
    activation_gradients,
    loss,
    through,
    train,
    vanished,
    windows,
)

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_values_and_gradients_are_rounded_as_the_format_says(dtype):
    format = FP16 if dtype == torch.float16 else BF16
    x = torch.randn(50).mul(2.0 ** torch.linspace(-30, 10, 50)).requires_grad_()
    weight = torch.randn(50) * 2.0 ** torch.linspace(5, -30, 50)
    rounded = through(x, dtype)
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == [round_to(v, format) for v in x.tolist()]
    (rounded * weight).sum().backward()
    assert x.grad.tolist() == [round_to(v, format) for v in weight.tolist()]


@HALF
def test_products_are_autocasts(dtype):
    """A network whose only operations in 16 bits are products; sums of up to 8 terms, rounded to 16 bits after each."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    weights = [torch.randn(8, 8), torch.randn(8, 8), torch.randn(1, 8)]
    found = []
    for mode in (Rounding(dtype), torch.autocast("cpu", dtype=dtype)):
        copies = [w.clone().requires_grad_() for w in weights]
        with mode:
            y = F.linear(F.linear(F.linear(x, copies[0]), copies[1]), copies[2])
            y.float().square().mean().backward()
        found.append([y.detach().float(), *(w.grad for w in copies)])
    eps = torch.finfo(dtype).eps
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 4 * eps * b.abs().max()  # of order of another sum's rounding, three layers on
        assert a.equal(a.to(dtype).float())


def test_other_operations_stay_in_float32():
    x = torch.tensor([1.0001], requires_grad=True)
    with Rounding(torch.bfloat16):
        assert (x * 1.0001).item() == pytest.approx(1.0002, abs=1e-6)
        assert F.linear(x, torch.ones(1, 1)).item() == 1.0
    assert F.linear(x, torch.ones(1, 1)).item() == pytest.approx(1.0001, abs=1e-6)


def test_gradients_are_seen_of_every_product():
    """qkv, attention, out, gate and up, down in each of two blocks, and the head."""
    torch.manual_seed(0)
    model, ids = Transformer(TOY), windows(2, torch.Generator().manual_seed(0))
    with Rounding(torch.float32) as mode:
        loss(model, ids).backward()
    n = 2 * TOY.context
    width, hidden = TOY.width, TOY.hidden
    each = [27, *[width, 2 * hidden, width, width, 3 * width] * 2]  # backwards, and by size of the result
    assert [g.numel() for g in mode.gradients] == [n * size for size in each]
    plain = Transformer(TOY)
    plain.load_state_dict(model.state_dict())
    loss(plain, ids).backward()
    assert all(a.grad.equal(b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_activation_gradients_leave_the_weights_clean_and_follow_the_factor():
    torch.manual_seed(0)
    model, ids = Transformer(TOY), windows(2, torch.Generator().manual_seed(0))
    one, four = (activation_gradients(model, ids, factor=factor) for factor in (1.0, 4.0))
    assert four.equal(4 * one)  # powers of 2 change no digit
    assert all(weight.grad is None for weight in model.parameters())
    half = activation_gradients(model, ids, dtype=torch.float16)
    assert half.equal(half.half().float())


def test_vanished_by_hand():
    """float16's smallest number is 2^-24; half of it goes to the even neighbour, which is 0."""
    gradients = torch.tensor([0.0, 2.0**-24, 2.0**-25, 1.01 * 2.0**-25, -(2.0**-30)])
    assert vanished(gradients, torch.float16) == 0.5
    assert vanished(gradients, torch.float16, factor=2.0) == 0.25
    assert vanished(gradients, torch.float16, factor=64.0) == 0.0
    assert vanished(gradients, torch.bfloat16) == 0.0


def test_windows_are_letters_one_longer_than_the_context():
    ids = windows(3, torch.Generator().manual_seed(1))
    assert ids.shape == (3, TOY.context + 1)
    assert 0 <= ids.min() <= ids.max() < 27


def test_parts_add_up_to_the_whole():
    """In float32 the loss over 1024 parts, 1024 times, is the loss: powers of 2 change no digit."""
    whole, parts = (train(3, parts=parts, steps=4).losses for parts in (1, 1024))
    assert whole.equal(parts)


def test_float16_learns_with_the_scaler_only():
    """Divided by 2048 parts; measured at these 25 steps: 2.70 and 2.99 nats, spread over seeds below 0.05."""
    plain = train(0, dtype=torch.float16, parts=2048, steps=25).losses
    scaler = LossScaler()
    scaled = train(0, dtype=torch.float16, parts=2048, steps=25, scaler=scaler).losses
    wide = train(0, steps=25).losses
    assert (scaled - wide).abs().max() < 0.05
    assert plain[-3:].mean() > wide[-3:].mean() + 0.1
    assert scaler.good == 25


def test_an_infinite_loss_is_skipped_and_halves_the_scale():
    """Two good steps double 2^10, the third is infinite and halves it, two good ones double it again."""
    scaler = LossScaler(scale=2.0**10, interval=2)
    trained = train(0, dtype=torch.float16, scaler=scaler, steps=6, poison=[2])
    assert trained.scales.log2().tolist() == [10, 10, 11, 10, 10, 11]
    assert trained.losses.isfinite().all()
    assert all(weight.isfinite().all() for weight in trained.model.parameters())
    assert train(0, steps=2).scales.tolist() == [1, 1]
    broken = train(0, steps=4, poison=[1]).losses
    assert broken.isfinite().tolist() == [True, True, False, False]
