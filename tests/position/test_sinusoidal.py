"""Sinusoidal encodings: relative by themselves, absolute once added to content."""

import math

import pytest
import torch

from minillm.position.rope import apply_rope, inverse_frequencies, rotations
from minillm.position.sinusoidal import encodings


def test_by_hand():
    # c = 4, base 100: frequencies 1 and 100^(-2/4) = 0.1. Position 10: angles 10 and 1; position 0: sin 0, cos 0.
    got = encodings(torch.tensor([0, 10]), 4, base=100.0)
    expected = [[0.0, 1.0, 0.0, 1.0], [math.sin(10), math.cos(10), math.sin(1), math.cos(1)]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_equals_the_formula_of_the_paper():
    got = encodings(torch.arange(50), 16)
    for m in (0, 1, 7, 49):
        for i in range(8):
            angle = m / 10000 ** (2 * i / 16)
            assert got[m, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)  # float32 angles up to 49
            assert got[m, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_positions_of_any_shape():
    positions = torch.tensor([[3, 1], [0, 2]])
    table = encodings(torch.arange(4), 6)
    assert table.dtype == torch.float32
    torch.testing.assert_close(encodings(positions, 6), table[positions])


def test_encodings_alone_are_relative():
    pe = encodings(torch.arange(300), 64).double()
    gram = pe @ pe.mT
    # PE(m) . PE(n) = sum_i cos((m - n) theta_i); angles up to 300 in float32 are off by 2e-5, in 32 terms
    distance = torch.arange(300)[:, None] - torch.arange(300)
    expected = torch.cos(distance[..., None] * inverse_frequencies(64).double()).sum(dim=-1)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(pe.square().sum(dim=-1), torch.full((300,), 32.0).double())  # all of one length


def test_a_shift_is_one_fixed_rotation():
    pe, k = encodings(torch.arange(200), 16).double(), 13
    sin, cos = pe[:-k, 0::2], pe[:-k, 1::2]
    angle = k * inverse_frequencies(16).double()  # does not depend on the position
    torch.testing.assert_close(pe[k:, 0::2], sin * angle.cos() + cos * angle.sin(), rtol=0, atol=1e-4)  # float32 angles
    torch.testing.assert_close(pe[k:, 1::2], cos * angle.cos() - sin * angle.sin(), rtol=0, atol=1e-4)


def test_added_to_content_the_score_is_no_longer_relative():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, generator=generator)
    wq, wk = torch.randn(2, 64, 64, generator=generator) / 8
    positions = torch.tensor([0, 100, 1000])  # the same two tokens, 5 apart, at three places
    q = (x + encodings(positions + 5, 64)) @ wq.mT
    k = (y + encodings(positions, 64)) @ wk.mT
    scores = (q * k).sum(dim=-1) / 8
    assert scores.max() - scores.min() > 0.5
    frequencies = inverse_frequencies(64).double()
    q = apply_rope((x @ wq.mT).double().expand(3, 64), *rotations(positions + 5, frequencies))
    k = apply_rope((y @ wk.mT).double().expand(3, 64), *rotations(positions, frequencies))
    turned = (q * k).sum(dim=-1) / 8
    assert turned.max() - turned.min() < 1e-12  # RoPE, in float64, on the same content


def test_high_frequencies_do_not_fade_and_low_ones_hardly_move():
    for start in (0, 50_000, 99_000):
        window = encodings(torch.arange(start, start + 1000), 64)
        assert window[:, 0].std().item() == pytest.approx(math.sqrt(1 / 2), abs=0.01)  # 159 full waves of a sine
        assert window[:, -2].std().item() < 0.05  # less than a fortieth of its wave, 47,000 positions long


@pytest.mark.parametrize("c", [5, 0])
def test_refuses_an_odd_number_of_channels(c):
    with pytest.raises(ValueError, match=f"even and positive, got {c}"):
        encodings(torch.arange(3), c)


def test_equals_transformers_xlm():
    from transformers.models.xlm.modeling_xlm import create_sinusoidal_embeddings

    expected = create_sinusoidal_embeddings(512, 48, torch.empty(512, 48))  # computed in float64, rounded at the end
    # angles up to 512 in float32: 512 * 2^-24 = 3e-5
    torch.testing.assert_close(encodings(torch.arange(512), 48), expected, rtol=0, atol=1e-4)
