"""Pre- and post-norm: equal to PyTorch's, and what the papers say of them at the start."""

import pytest
import torch
from torch import nn

from minillm.architecture.norm import rms_norm_formula
from minillm.architecture.residual import (
    RandomAttention,
    RandomFeedForward,
    gradient_norms,
    post_norm,
    pre_norm,
    random_layers,
    sizes,
    skip_share,
    streams,
    unit,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stack(count, width=64, tokens=24):
    """Random layers, an input of size 1 and a target."""
    return random_layers(count, width), unit(torch.randn(tokens, width)), torch.randn(tokens, width)


@pytest.mark.parametrize(("step", "norm_first"), [(pre_norm, True), (post_norm, False)])
def test_equals_the_layer_of_pytorch(step, norm_first):
    theirs = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, norm_first=norm_first, batch_first=True)
    for norm in (theirs.norm1, theirs.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 7, 16)
    ours = step(x, lambda y: theirs.self_attn(y, y, y)[0], theirs.norm1)
    ours = step(ours, lambda y: theirs.linear2(theirs.linear1(y).relu()), theirs.norm2)
    torch.testing.assert_close(ours, theirs(x))


def test_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # root mean square sqrt(12.5)
    scaled = x / 12.5**0.5
    torch.testing.assert_close(pre_norm(x, lambda y: 10 * y), x + 10 * scaled)
    torch.testing.assert_close(post_norm(x, lambda y: y.flip(-1)), torch.ones(1, 2))  # (7, 7)
    torch.testing.assert_close(unit(x), rms_norm_formula(x, torch.ones(2)))


def test_layers_of_a_stack_take_turns():
    kinds = [type(layer) for layer in random_layers(3, 8)]
    assert kinds == [RandomAttention, RandomFeedForward, RandomAttention]


def test_a_random_layer_keeps_the_size():
    x = unit(torch.randn(200, 256))
    out = RandomFeedForward(256)(x)
    assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)  # 256 channels: 1/sqrt(256) would be one sd
    first = RandomAttention(256)(x)[:1]  # the first token sees itself: no mean is taken
    assert first.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)  # of 256 numbers, with a random gain


def test_attention_of_a_stack_is_causal():
    layer, x = RandomAttention(16), torch.randn(9, 16)
    torch.testing.assert_close(layer(x[:4]), layer(x)[:4])


def test_streams_are_all_of_them():
    layers, x, _ = stack(3)
    found = streams(pre_norm, x, layers)
    assert len(found) == 4
    assert found[0] is x
    torch.testing.assert_close(found[2], found[1] + layers[1](unit(found[1])))


def test_pre_norm_grows_with_the_root_of_the_depth_and_post_norm_does_not_grow():
    layers, x, _ = stack(65)
    before, after = sizes(pre_norm, x, layers), sizes(post_norm, x, layers)
    assert len(before) == len(after) == 66
    assert after == pytest.approx([1] * 66, abs=1e-3)  # eps of the norm
    # variances add up, and from 16 to 64 layers they are four times as many. The gain of each layer is random
    assert before[64] / before[16] == pytest.approx(2, rel=0.25)
    assert before[0] == pytest.approx(1, abs=1e-3)


def test_a_layer_of_known_size_gives_the_exact_growth():
    # every layer adds its input's norm in a channel of its own: squares add up exactly
    x = torch.zeros(1, 8)
    x[0, 0] = 8**0.5

    def layer(channel):
        return lambda y: torch.eye(8)[channel : channel + 1] * y.square().sum().sqrt()

    got = sizes(pre_norm, x, [layer(i) for i in range(1, 8)])
    assert got == pytest.approx([n**0.5 for n in range(1, 9)], rel=1e-5)  # eps of the norm


def test_the_skip_path_is_the_identity_before_and_fades_after():
    layers, x, _ = stack(32)
    assert skip_share(pre_norm, x, layers) == pytest.approx(1, abs=1e-6)
    halves = [skip_share(post_norm, x, layers[:n]) for n in (8, 16, 32)]
    assert halves[0] < 0.5
    assert halves[1] < 2 * halves[0] ** 2  # the factors multiply; they are not the same for all layers
    assert halves[2] < 2 * halves[1] ** 2


def test_the_skip_path_by_hand():
    # one layer that adds a constant vector: the norm divides by the size of the sum, sqrt(2), and drops one direction
    x = torch.zeros(1, 64)
    x[0, 0] = 8
    added = torch.zeros(1, 64)
    added[0, 1] = 8
    share = skip_share(post_norm, x, [lambda y: added + 0 * y])
    assert share == pytest.approx(0.5**0.5, rel=0.05)  # of the 64 directions the radial one is lost


def test_the_last_gradient_shrinks_with_depth_before_and_not_after():
    last = {}
    for step in (pre_norm, post_norm):
        for count in (8, 128):
            layers, x, target = stack(count)
            norms = gradient_norms(step, x, layers, target)
            assert len(norms) == count
            last[step, count] = norms[-1]
    assert last[pre_norm, 8] / last[pre_norm, 128] == pytest.approx(4, rel=0.4)  # sqrt(128 / 8), random gains
    assert last[post_norm, 8] / last[post_norm, 128] == pytest.approx(1, rel=0.3)


def test_gradients_are_those_of_finite_differences():
    layers, x, target = stack(4, width=8, tokens=5)
    layers, x, target = [layer.double() for layer in layers], x.double(), target.double()
    weight = layers[1].out

    def loss():
        return (unit(streams(pre_norm, x, layers)[-1]) - target).square().mean().item()

    squares = 0.0
    with torch.no_grad():
        for i in range(weight.numel()):
            values = []
            for change in (1e-6, -1e-6):
                weight.view(-1)[i] += change
                values.append(loss())
                weight.view(-1)[i] -= change
            squares += ((values[0] - values[1]) / 2e-6) ** 2
    assert gradient_norms(pre_norm, x, layers, target)[1] == pytest.approx(squares**0.5, rel=1e-5)
